"""Five arms, with the identity as projector: what a perfect projector has to reach is known then."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from error_rule import assert_as_exact
from test_projected import identity_projector
from tiny_models import build
from tiny_tokenizers import build_tokenizer, random_texts
from torch.nn import functional as F

from c2c_kernels import corpus, evaluate
from c2c_kernels.evaluate import ARMS, Reader, arms
from c2c_kernels.evaluate.arms import Statistics
from c2c_kernels.evaluate.bootstrap import interval
from c2c_kernels.fitting.reading import unrotated
from c2c_kernels.integrations.transformers import enable

PREFIX = (1,)


@pytest.fixture(scope="module")
def documents() -> list[corpus.Document]:
    return [corpus.Document(f"d{number}", text, "tiny") for number, text in enumerate(random_texts(5, 150))]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def reader(request: pytest.FixtureRequest) -> Reader:
    """A model that is its own sharer, through maps that change nothing."""
    sharer, receiver = build(request.param), enable(build(request.param))
    # The sharer's tokenizer writes the start token, the receiver reads it itself.
    tokenizers = build_tokenizer(8, bos=True), build_tokenizer(8)
    return Reader(sharer, receiver, *tokenizers, identity_projector(sharer, prefix=PREFIX))


@pytest.fixture(scope="module")
def pieces(documents: list[corpus.Document]) -> list[evaluate.Piece]:
    return evaluate.cut(documents, build_tokenizer(8), context=30, continuation=9, most=8)[0]


@torch.no_grad()
def plain_loss(model, before: tuple[int, ...], continuation: tuple[int, ...]) -> float:
    """By a model whose attention is not patched, over all tokens at once."""
    ids = torch.tensor([[*before, *continuation]])
    logits = model(ids).logits[0, len(before) : -1]
    return float(F.cross_entropy(logits, ids[0, len(before) + 1 :], reduction="sum"))


def test_every_arm_is_the_loss_it_says(reader: Reader, pieces: list[evaluate.Piece]):
    done: list[int] = []
    result = evaluate.score(reader, pieces, name="tiny", update=done.append)
    assert done == list(range(1, 9)) and result.documents == ("d0", "d1", "d2", "d3", "d4")

    def by_hand(model) -> torch.Tensor:
        wanted = torch.zeros(len(ARMS), 5, dtype=torch.float64)
        for piece in pieces:
            column = result.documents.index(piece.document)
            # the last piece of the document before, the first document's being the last
            other = [p for p in pieces if p.document == result.documents[column - 1]][-1]
            wanted[0, column] += plain_loss(model, PREFIX, piece.continuation_ids)
            wanted[1:3, column] += plain_loss(model, (*PREFIX, *piece.context_ids), piece.continuation_ids)
            wanted[3, column] += plain_loss(model, (*PREFIX, *other.context_ids), piece.continuation_ids)
        return wanted

    wanted = by_hand(copy.deepcopy(reader.sharer).double())
    assert_as_exact("losses", result.losses[:4].float(), by_hand(reader.sharer)[:4], wanted[:4])
    assert result.tokens.tolist() == [16, 16, 16, 8, 8]
    assert result.recovered("projected").value == pytest.approx(1, abs=0.05)
    # noise and another text are neither the text nor nothing
    assert all((result.losses[row] - wanted[other]).abs().max() > 0.1 for row in (3, 4) for other in (0, 1))


def test_the_noise_is_drawn_again_alike(reader: Reader, pieces: list[evaluate.Piece]):
    first, second, third = (evaluate.score(reader, pieces, seed=seed).losses for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert torch.equal(first[:4], third[:4]) and not torch.equal(first[4], third[4])


@torch.no_grad()
def test_the_noise_has_the_statistics_of_what_it_replaces(reader: Reader):
    contexts = [reader.project(text, PREFIX) for text in random_texts(20, 400, seed=1)]
    shape = reader.projector.receiver
    statistics = Statistics(shape)
    for context in contexts:
        statistics.add(context)
    generator = torch.Generator().manual_seed(0)
    noise = [statistics.noise(context, generator) for context in contexts]
    for layer in range(shape.layers):
        for half in ("key", "value"):
            real, drawn = (_plain(shape, found, layer, half) for found in (contexts, noise))
            assert real.shape == drawn.shape and real.shape[1] > 4000
            error = real.std(dim=1) / real.shape[1] ** 0.5
            # 4.5 standard errors: 1e-5 for each of some 250 figures
            assert ((drawn.mean(dim=1) - real.mean(dim=1)).abs() < 4.5 * error + 1e-6).all()
            torch.testing.assert_close(drawn.std(dim=1), real.std(dim=1), rtol=0.08, atol=1e-6)
            assert not torch.allclose(drawn, real, atol=0.1)
    first, made = contexts[0].layers[0], noise[0].layers[0]
    assert torch.equal(first[-1].positions, made[-1].positions) and made[0] is first[0]
    assert torch.equal(contexts[0].position_offset, noise[0].position_offset)


def _plain(shape, contexts, layer: int, half: str) -> torch.Tensor:
    """(heads, tokens, dim) of the last segments, keys without their rotation."""
    parts = []
    for context in contexts:
        segment = context.layers[layer][-1]
        part = getattr(segment, half)
        parts.append(unrotated(shape, layer, part, segment.positions[0])[0] if half == "key" else part[0])
    return torch.cat(parts, dim=1)


def test_no_text_is_projected_twice(reader: Reader, pieces: list[evaluate.Piece], monkeypatch):
    """The statistics of the noise and the first mismatched cache come from the contexts that are scored."""
    read: list[str] = []
    project = Reader.project

    def counted(self, text, head):
        read.append(text)
        return project(self, text, head)

    monkeypatch.setattr(Reader, "project", counted)
    monkeypatch.setattr(arms, "_FOR_STATISTICS", 2)
    evaluate.score(reader, pieces[:5])
    assert sorted(read) == sorted(piece.context for piece in pieces[:5])


def test_noise_needs_statistics(reader: Reader):
    with pytest.raises(ValueError, match="at least two tokens"):
        Statistics(reader.projector.receiver).noise(reader.project("abc", PREFIX), torch.Generator())


def test_pieces_follow_one_another_and_documents_take_turns(documents: list[corpus.Document]):
    tokenizer = build_tokenizer(8)
    short = corpus.Document("short", documents[0].text[:20], "tiny")
    pieces, left_out = evaluate.cut([*documents, short], tokenizer, context=30, continuation=9, most=8)
    assert left_out == 1
    assert [p.document for p in pieces] == ["d0", "d0", "d1", "d1", "d2", "d2", "d3", "d4"]
    texts = {document.name: document.text for document in documents}
    for piece in pieces:
        assert tuple(tokenizer(piece.context).input_ids) == piece.context_ids
        assert 30 <= len(piece.context_ids) <= 46 and len(piece.continuation_ids) == 9
        whole = piece.context + tokenizer.decode(piece.continuation_ids).replace(" ", "")
        assert piece.context in texts[piece.document] and len(whole) > len(piece.context)
    first, second = pieces[:2]
    assert texts["d0"].startswith(first.context)
    assert texts["d0"].index(second.context) > len(first.context)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"continuation": 1}, "continuation must be at least 2, got 1"),
        ({"most": 1}, "most must be at least 2, got 1"),
        ({"context": 1000}, r"0 of 5 documents have the 1000 \+ 9 tokens"),
    ],
)
def test_pieces_that_cannot_be_are_refused(documents: list[corpus.Document], sizes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        evaluate.cut(documents, build_tokenizer(8), **{"context": 30, "continuation": 9, "most": 8, **sizes})


def test_one_document_leaves_no_mismatched_cache(reader: Reader, pieces: list[evaluate.Piece]):
    with pytest.raises(ValueError, match="pieces are of 1 documents, at least 2"):
        evaluate.score(reader, pieces[:2])
    with pytest.raises(ValueError, match="questions are about 1 text, at least 2"):
        evaluate.ask(reader, [corpus.Question("a b", "c", "b")], None, None)


def test_questions_are_answered_in_every_arm(reader: Reader):
    """What the receiver writes is compared with what the unpatched model writes after the same tokens."""
    tokenizer, head = reader.receiver_tokenizer, list(PREFIX)
    texts = [text[:40].strip() for text in random_texts(3, 60, seed=2)]
    asked = [corpus.Question(text, "abc" if n else "dead", text[4:6]) for text in texts for n in range(2)]

    def prompt(text: str, question: str) -> SimpleNamespace:
        ids = tokenizer(question).input_ids
        return SimpleNamespace(head=head, rest=ids, bare=[*head, *ids])

    @torch.no_grad()
    def write(model, ids: list[int], before: tuple[int, ...] = ()) -> str:
        written: list[int] = []
        for _ in range(4):
            logits = model(torch.tensor([[*before, *ids, *written]]), use_cache=False).logits
            written.append(int(logits[0, -1].argmax()))
        return " ".join(map(str, written))

    result = evaluate.ask(reader, asked, prompt, lambda ids: write(reader.receiver, ids), name="tiny")
    assert result.asked.tolist() == [2, 2, 2] and len(result.answers) == 6
    for at, (question, answer) in enumerate(zip(asked, result.answers, strict=True)):
        rest = tokenizer(question.question).input_ids
        other = texts[at // 2 - 1]
        read, wrong = (tuple(head) + tuple(tokenizer(text).input_ids) for text in (question.context, other))
        assert answer["written"]["alone"] == write(reader.sharer, rest, tuple(head))
        assert answer["written"]["text"] == answer["written"]["projected"] == write(reader.sharer, rest, read)
        assert answer["written"]["mismatched"] == write(reader.sharer, rest, wrong)
        assert set(answer["written"]) == set(ARMS)


def test_right_answers_are_counted_by_arm_and_text(reader: Reader):
    texts = ["abc dij", "bij cagh", "ch edj"]
    asked = [corpus.Question(text, "a", text.split()[1], "kind") for text in texts for _ in range(2)]
    replies = iter(
        reply
        for number, question in enumerate(asked)
        # alone: never; text: always, in a sentence; projected: the second of two; mismatched: exactly; noise: never
        for reply in ("", f"It is {question.answer}.", question.answer if number % 2 else "no", question.answer, "no")
    )
    parts = SimpleNamespace(head=[1], rest=[2], bare=[1, 2])
    result = evaluate.ask(reader, asked, lambda text, question: parts, lambda ids: next(replies))
    assert result.right.tolist() == [[0, 0, 0], [2, 2, 2], [1, 1, 1], [2, 2, 2], [0, 0, 0]]
    assert result.exact.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1], [2, 2, 2], [0, 0, 0]]
    assert result.accuracy("projected").value == 0.5 and result.relative("projected").value == 0.5
    record = evaluate.Evaluation({"sharer": "a"}, [], [result]).as_json()
    assert record["questions"][0]["relative"]["projected"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert record["questions"][0]["answers"][1]["written"]["projected"] == "dij"


def test_intervals_are_those_of_the_mean():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, generator=generator, dtype=torch.float64)
    found = interval(lambda weights: weights @ values / weights.sum(dim=1), 200)
    half = 1.96 * float(values.std(correction=0)) / math.sqrt(200)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.low == pytest.approx(float(values.mean()) - half, abs=0.06 * half)
    assert found.high == pytest.approx(float(values.mean()) + half, abs=0.06 * half)
    assert found == interval(lambda weights: weights @ values / weights.sum(dim=1), 200)


def test_intervals_of_nothing_are_nan_and_none_in_json():
    none = torch.zeros(3, dtype=torch.float64)
    result = evaluate.AnswerResult("x", torch.zeros(5, 3).double(), torch.zeros(5, 3).double(), none + 2, ())
    assert math.isnan(result.relative("projected").value)
    record = evaluate.Evaluation({}, [], [result]).as_json()["questions"][0]
    assert record["relative"]["projected"] == {"value": None, "low": None, "high": None}
    assert record["accuracy"]["projected"] == {"value": 0, "low": 0, "high": 0}


def test_a_recovered_share_is_a_ratio_of_means_over_documents():
    tokens = torch.tensor([10.0, 30.0]).double()
    losses = torch.tensor([[40.0, 90.0], [20.0, 60.0], [22.0, 69.0], [30.0, 90.0], [50.0, 100.0]]).double()
    result = evaluate.LossResult("x", ("a", "b"), losses, tokens, 2)
    assert result.loss("alone").value == 130 / 40
    recovered = result.recovered("projected")
    assert recovered.value == pytest.approx((130 - 91) / (130 - 80))
    # resamples of two documents: (a, a), (a, b) or (b, a), (b, b)
    assert (recovered.low, recovered.high) == (pytest.approx(21 / 30), pytest.approx(18 / 20))
    assert result.recovered("noise").value < 0


def test_documents_of_the_fit_are_refused(documents: list[corpus.Document]):
    projector = identity_projector(build("llama"))
    with pytest.raises(ValueError, match="does not say which texts it was fitted on"):
        evaluate.check_unseen(projector, documents)
    projector.facts["corpus"] = {"texts": ["0" * 16, documents[3].sha256[:16]]}
    with pytest.raises(ValueError, match=r"1 of 5 documents are among those .* \(d3\): held-out"):
        evaluate.check_unseen(projector, documents)
    evaluate.check_unseen(projector, documents[:3])
