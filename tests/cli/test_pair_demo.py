"""`demo --pair` and `--swap` on tiny models of different kinds, and on the real ones where their maps are there."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path

import pytest
import torch
from threads import torch_threads
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from c2c_kernels import CacheProjector, corpus
from c2c_kernels.alignment import token_spans
from c2c_kernels.cli import evaluated, known_pairs, main, pair_facts
from c2c_kernels.cli.gguf_tokenizer import load_tokenizer
from c2c_kernels.cli.models import load_model
from c2c_kernels.cli.pair_documents import ABOUT_ANY_TEXT, Asked, packaged, parts
from c2c_kernels.evaluate import ARMS as EVALUATION_ARMS
from c2c_kernels.evaluate import AnswerResult
from c2c_kernels.identity import identify
from c2c_kernels.integrations.transformers import cache_shape, read_tokens
from c2c_kernels.projectors import Source

_PNG = b"\x89PNG\r\n\x1a\n"
ARMS = ("none", "text", "cache", "mismatched")


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


def _base_tokenizer(chat: Fast) -> Fast:
    """Without a chat template, with a start token, and cutting words in other places."""
    state = json.loads(chat.backend_tokenizer.to_str())
    state["model"]["merges"] = state["model"]["merges"][:2]
    made = Tokenizer.from_str(json.dumps(state))
    made.post_processor = TemplateProcessing(single=f"{chat.bos_token} $A", special_tokens=[(chat.bos_token, 1)])
    return Fast(tokenizer_object=made, bos_token=chat.bos_token, eos_token=chat.eos_token)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, str]:
    """A chat model of full attention, a base model with a sliding window of 8, and one of a short context."""
    root, chat = tmp_path_factory.mktemp("pair"), load_tokenizer(tiny)
    common = {
        "vocab_size": len(chat),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.3,
    }
    kinds = ["sliding_attention", "full_attention"]
    wide = {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16}
    base = Gemma3TextConfig(**common, **wide, sliding_window=8, layer_types=kinds, max_position_embeddings=8192)
    narrow = {**common, "num_hidden_layers": 3, "num_key_value_heads": 2}
    made = {
        "chat": (LlamaForCausalLM, LlamaConfig(**narrow, max_position_embeddings=8192), chat),
        "base": (Gemma3ForCausalLM, base, _base_tokenizer(chat)),
        "short": (LlamaForCausalLM, LlamaConfig(**narrow, max_position_embeddings=100), chat),
    }
    for name, (kind, config, tokenizer) in made.items():
        torch.manual_seed(0)
        kind(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in made}


@pytest.fixture(scope="module")
def projectors(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """Random maps by (sharer, receiver)."""
    loaded = {name: load_model(folder) for name, folder in folders.items()}
    found = {}
    for way in (("base", "chat"), ("chat", "base"), ("short", "base"), ("base", "short")):
        shapes = [cache_shape(loaded[name][0]) for name in way]
        who = [identify(*loaded[name], name) for name in way]
        sources = [
            ([Source("key", n % 2), Source("value", 1)], [Source("value", n % 2)]) for n in range(shapes[1].layers)
        ]
        projector = CacheProjector(*shapes, sources, prefix=[1], sharer_identity=who[0], receiver_identity=who[1])
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in projector.parameters():
                parameter.normal_(generator=generator).mul_(0.2)
        path = tmp_path_factory.mktemp("projectors") / f"{way[0]}-{way[1]}.safetensors"
        projector.save(path)
        found[way] = str(path)
    return found


@pytest.fixture
def note_files(tmp_path: Path) -> list[str]:
    texts = ("The bees are in the boat, and the boat is in the rain. Then in the end they went home to the hive.",)
    texts += ("In winter the train is late. The engine driver eats his bread there, and the others wait in the inn.",)
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    return [str(tmp_path / f"{name}.txt") for name in "ab"]


def _demo(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["demo", "--json", *arguments]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def _failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["demo", *arguments]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("c2c-kernels: ")
    return line


def _way(folders: dict[str, str], projectors: dict[tuple[str, str], str], sharer: str, receiver: str) -> list[str]:
    named = ["--sharer", folders[sharer], "--receiver", folders[receiver]]
    return [*named, "--projector", projectors[sharer, receiver]]


class ByHand:
    """The same with unpatched models: caches put together token by token."""

    def __init__(self, folders, projectors, sharer: str, receiver: str) -> None:
        self.sharer, self.receiver = load_model(folders[sharer]), load_model(folders[receiver])
        self.projector = CacheProjector.load(projectors[sharer, receiver])

    def ids(self, text: str) -> list[int]:
        return self.receiver[1](text, add_special_tokens=False).input_ids

    def projected(self, head: list[int], text: str) -> DynamicCache:
        spans = token_spans(self.sharer[1], text), token_spans(self.receiver[1], text, add_special_tokens=False)
        theirs = [(layer.keys, layer.values) for layer in read_tokens(self.sharer[0], spans[0].ids).layers]
        own = read_tokens(self.receiver[0], head)
        segments = self.projector.segments(theirs, self.projector.plan(*spans, start=len(head)))
        for layer, segment in enumerate(segments):
            own.update(segment.key, segment.value, layer)
        return own

    def loss(self, cache: DynamicCache, ids: list[int]) -> float:
        given = torch.tensor([ids])
        logits = self.receiver[0](given[:, :-1], past_key_values=cache).logits[0]
        return float(torch.nn.functional.cross_entropy(logits, given[0, 1:]))

    def nats(self, head: list[int], document: str, other: str, scored: int) -> dict[str, float]:
        tokens = self.ids(document)
        cut = len(tokens) - scored - 1
        # the cut moves on until both sides are tokenized as in the whole
        found = next(at for at in range(cut - 16, cut + 1) if self._stands_alone(document, tokens, at))
        start, end = tokens[:found], tokens[found : found + scored + 1]
        text = self.receiver[1].decode(start)
        assert document.startswith(text)
        return {
            "none": self.loss(read_tokens(self.receiver[0], head), end),
            "text": self.loss(read_tokens(self.receiver[0], [*head, *start]), end),
            "cache": self.loss(self.projected(head, text), end),
            "mismatched": self.loss(self.projected(head, other), end),
        }

    def _stands_alone(self, document: str, tokens: list[int], at: int) -> bool:
        return self.ids(self.receiver[1].decode(tokens[:at])) == tokens[:at]


@torch.no_grad()
@pytest.mark.parametrize(("sharer", "receiver"), [("base", "chat"), ("chat", "base")])
def test_a_pair(folders, projectors, note_files, capsys, sharer, receiver):
    way = _way(folders, projectors, sharer, receiver)
    outcome = _demo(capsys, *way, "--document", note_files[0], "--max-new-tokens", "5")
    [found] = outcome["directions"]
    text, other = Path(note_files[0]).read_text(), packaged()[0].text
    hand = ByHand(folders, projectors, sharer, receiver)
    scored = found["loss"]["continuation"]
    assert scored + 1 == len(hand.ids(text)) // 4
    assert scored + 1 + found["loss"]["context"] <= len(hand.ids(text))
    assert found["loss"]["nats"] == pytest.approx(hand.nats([1], text, other, scored), rel=1e-4)
    assert len({round(value, 3) for value in found["loss"]["nats"].values()}) == 4
    gap = found["loss"]["nats"]["none"] - found["loss"]["nats"]["text"]
    recovered = (found["loss"]["nats"]["none"] - found["loss"]["nats"]["cache"]) / gap
    assert found["loss"]["recovered"]["cache"] == (pytest.approx(recovered) if gap > 0 else None)

    [question] = found["questions"]
    is_chat = receiver == "chat"
    assert question["question"] == (ABOUT_ANY_TEXT.question if is_chat else f"{ABOUT_ANY_TEXT.cloze} ...")
    assert set(question["answers"]) == set(ARMS)
    assert all(given["right"] is None for given in question["answers"].values())
    prompt = parts(hand.receiver[1], text, ABOUT_ANY_TEXT)
    for arm, cache in (
        ("text", read_tokens(hand.receiver[0], [*prompt.head, *hand.ids(text)])),
        ("cache", hand.projected(prompt.head, text)),
        ("mismatched", hand.projected(prompt.head, other)),
        ("none", None),
    ):
        ids = [*(prompt.bare if cache is None else prompt.rest), *question["answers"][arm]["tokens"]]
        logits = hand.receiver[0](torch.tensor([ids[:-1]]), past_key_values=cache).logits[0]
        written = question["answers"][arm]["tokens"]
        assert logits[-len(written) :].argmax(-1).tolist() == written, arm
    sizes = {"chat": 3 * 2 * 2 * 8 * 4, "base": 2 * 2 * 16 * 4}  # bytes a token: layers, halves, heads * dim, float32
    assert found["bytes_moved"]["none"] == 0
    assert found["bytes_moved"]["text"] == found["document_bytes"] == len(text.encode())
    assert found["bytes_moved"]["cache"] == found["tokens"] * sizes[sharer]
    assert found["tokens"] == len(hand.sharer[1](text).input_ids)
    assert found["projected_bytes"] == len(hand.ids(text)) * sizes[receiver]
    assert question["answers"]["cache"]["prompt_tokens"] == len(prompt.rest)
    assert len(question["attention_share"]) == (3 if is_chat else 2)
    # the cloze is longer than the window: the sliding layer no longer sees the text when the answer begins
    shares = question["attention_share"]
    assert shares[0] == 0 if not is_chat else 0 < shares[0] < 1
    assert all(0 < share < 1 for share in shares[1:])


@torch.no_grad()
def test_a_swap(folders, projectors, note_files, capsys):
    """Each has read its own document and is scored on the other's."""
    both = ("--projector", projectors["base", "chat"], "--projector", projectors["chat", "base"])
    documents = ("--document", note_files[0], "--document", note_files[1], "--question", "Who is in the boat?")
    outcome = _demo(
        capsys, "--swap", "--sharer", folders["base"], "--receiver", folders["chat"], *both, *documents,
        *("--max-new-tokens", "3"),
    )  # fmt: skip
    there, back = outcome["directions"]
    assert (
        (there["sharer"], there["receiver"]) == (back["receiver"], back["sharer"]) == (folders["base"], folders["chat"])
    )
    assert (there["document"], there["own"]) == (back["own"], back["document"]) == ("a.txt", "b.txt")
    texts, other = [Path(path).read_text() for path in note_files], packaged()[0].text
    for found, way, text, own in (
        (there, ("base", "chat"), *texts),
        (back, ("chat", "base"), *texts[::-1]),
    ):
        hand = ByHand(folders, projectors, *way)
        head = [1, *hand.ids(f"{own}\n\n")]
        nats = hand.nats(head, text, other, found["loss"]["continuation"])
        assert found["loss"]["nats"] == pytest.approx(nats, rel=1e-4)
        [question] = found["questions"]
        assert question["question"] == "Who is in the boat?"  # a question of the user's has no cloze
        given = question["answers"]
        assert given["none"]["prompt_tokens"] == given["cache"]["prompt_tokens"]
        assert given["text"]["prompt_tokens"] == given["cache"]["prompt_tokens"] + len(hand.ids(text))
        prompt = parts(hand.receiver[1], text, Asked("Who is in the boat?"))
        before = [*prompt.head, *hand.ids(f"{own}\n\n")]
        for arm, cache in (
            ("none", read_tokens(hand.receiver[0], before)),
            ("text", read_tokens(hand.receiver[0], [*before, *hand.ids(text)])),
            ("cache", hand.projected(before, text)),
            ("mismatched", hand.projected(before, other)),
        ):
            written = given[arm]["tokens"]
            logits = hand.receiver[0](torch.tensor([[*prompt.rest, *written[:-1]]]), past_key_values=cache).logits[0]
            assert logits[-len(written) :].argmax(-1).tolist() == written, arm


def test_the_report_and_the_picture(folders, projectors, tmp_path, capsys):
    """With the package's own documents, whose answers are known."""
    pytest.importorskip("matplotlib")
    way = ["--sharer", folders["base"], "--receiver", folders["chat"], "--swap", "--projector"]
    way += [projectors["base", "chat"], "--projector", projectors["chat", "base"]]
    assert main(["demo", *way, "--max-new-tokens", "2", "--plot", str(tmp_path / "p.png")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    bees, train, station = packaged()
    for document in (bees, train):
        assert f"read {document.name}:" in said
        assert f"the last 128 tokens of {document.name} after its first" in said
    assert bees.questions[0].question in said
    assert f"{train.questions[2].cloze} ..." in said
    for kind in ("gist", "fact"):
        line = rf"{kind} questions answered right: own document only \d of 2, text in the prompt \d of 2, through"
        assert len(re.findall(line, said)) == 2
    assert "mismatched: the sharer has read another text" in said
    assert (tmp_path / "p.png").read_bytes().startswith(_PNG)
    assert station.name not in said


@torch.no_grad()
def test_facts_are_asked_as_an_evaluation_asks_them(folders, projectors, tmp_path, capsys):
    """Where no document is named: every question in the demo's arms, and what an evaluation of the file found."""
    path = tmp_path / "p.safetensors"
    path.write_bytes(Path(projectors["base", "chat"]).read_bytes())
    way = ["--sharer", folders["base"], "--receiver", folders["chat"], "--projector", str(path)]
    share = {"value": 0.5, "low": 0.254, "high": 0.75}
    arms = dict.fromkeys(("alone", "text", "projected", "mismatched", "noise"), share)
    found = {
        "projector_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "loss": [{"name": "handbook", "documents": 7, "recovered": arms, "by_document": {}}],
        "questions": [{"name": "made-up", "questions": 9, "accuracy": arms, "relative": arms, "answers": []}],
    }
    path.with_suffix(".json").write_text(json.dumps(found))
    outcome = _demo(capsys, *way, "--max-new-tokens", "1")
    [direction] = outcome["directions"]
    assert direction["evaluated"]["loss"] == [{"name": "handbook", "documents": 7, "recovered": arms}]
    facts = direction["facts"]
    assert facts["relative"]["projected"] == {"value": None, "low": None, "high": None}, "the text is never right here"
    wanted = corpus.made_up(12, seed=1, split="held-out")
    assert [(a["question"], a["answer"]) for a in facts["answers"]] == [(q.question, q.answer) for q in wanted]
    hand, text, rest = ByHand(folders, projectors, "base", "chat"), wanted[0].context, Asked(wanted[0].question)
    prompt = parts(hand.receiver[1], text, rest)
    for arm, cache in (
        ("text", read_tokens(hand.receiver[0], [*prompt.head, *hand.ids(text)])),
        ("projected", hand.projected(prompt.head, text)),
    ):
        written = answer(hand.receiver[0], hand.receiver[1], cache, prompt.rest)
        assert facts["answers"][0]["written"][arm] == written, arm
    path.with_suffix(".json").write_text(json.dumps({**found, "projector_sha256": "0" * 64}))
    assert main(["demo", *way, "--max-new-tokens", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "facts of 4 short made-up texts" in said and re.search(r"right │ \d+ of 12 │ \d+ of 12 │", said)
    assert f"no evaluation of {path} is known" in said.replace("- ", "-")


def answer(model, tokenizer, cache: DynamicCache, rest: list[int]) -> str:
    """Greedy, 24 tokens at most, by a model that is not patched."""
    ids, written = list(rest), []
    while len(written) < 24 and (not written or written[-1] != model.generation_config.eos_token_id):
        written.append(int(model(torch.tensor([ids]), past_key_values=cache).logits[0, -1].argmax()))
        ids = written[-1:]
    return tokenizer.decode(written, skip_special_tokens=True).strip()


def test_what_is_said_of_facts_and_of_an_evaluation():
    answers = [
        {"question": "Who?", "answer": "Ada", "written": dict(zip(EVALUATION_ARMS, written, strict=True))}
        for written in (("Bo", "It is\n Ada", "It is Ada.", "Bo", "x"), ("Bo", "Ada", "Bo", "Bo", "x"))
    ]
    right = torch.tensor([[0, 0], [0, 1], [1, 0], [0, 0], [0, 0]], dtype=torch.float64)
    facts = AnswerResult("", right, right, torch.ones(2, dtype=torch.float64), tuple(answers))
    assert pair_facts.rows(facts) == [
        ["Who? (Ada)", "Bo", "It is Ada", "It is Ada. (right)", "Bo"],
        ["Who? (Ada)", "Bo", "Ada (right)", "Bo", "Bo"],
        ["right", "0 of 2", "1 of 2", "1 of 2", "0 of 2"],
    ]
    assert facts.count_right("projected") == 1
    shares = {arm: {"value": 0.1 * at, "low": 0.0, "high": 1.0} for at, arm in enumerate(EVALUATION_ARMS)}
    assert evaluated.lines(
        {
            "loss": [{"name": "manual", "documents": 20, "recovered": shares}],
            "questions": [{"questions": 30, "accuracy": shares}],
        }
    ) == [
        "20 manual pages: 20% [0, 100] of the loss gap recovered, through a mismatched cache 30% [0, 100]",
        "30 questions about made-up texts: 20% [0, 100] right, with the text 10% [0, 100], through a mismatched cache "
        "30% [0, 100]",
    ]


def test_a_document_that_is_too_short_to_be_cut(folders, projectors, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Bees hum.")
    way = _way(folders, projectors, "base", "chat")
    picture = tmp_path / "p.png"
    arguments = ["demo", *way, "--document", str(tmp_path / "a.txt"), "--max-new-tokens", "1", "--plot", str(picture)]
    assert main(arguments) == 0
    assert "a.txt is too short to be cut" in capsys.readouterr().out
    assert picture.read_bytes().startswith(_PNG)


@pytest.mark.parametrize(("sharer", "receiver"), [("base", "chat"), ("chat", "base")])
def test_inspect_and_evaluate_go_both_ways(folders, projectors, note_files, tmp_path, capsys, sharer, receiver):
    named = ["--sharer", folders[sharer], "--receiver", folders[receiver]]
    path, page, figures = projectors[sharer, receiver], tmp_path / "p.html", tmp_path / "p.json"
    more = ["--document", note_files[0], "--question", "Who is in the boat?", "--max-new-tokens", "3"]
    assert main(["inspect", path, *named, *more, "--html", str(page)]) == 0
    [data] = re.findall(r'id="data">(.*?)</script>', page.read_text(), flags=re.DOTALL)
    assert len(json.loads(data)["byHead"]) == (3 if receiver == "chat" else 2)
    texts = [{"text": " ".join(Path(path).read_text() for path in note_files), "split": "held-out"}] * 2
    texts[1] = {**texts[1], "text": texts[1]["text"][50:]}
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, texts)))
    sizes = ["--pieces", "2", "--context", "60", "--continuation", "20"]
    projector = CacheProjector.load(path)
    projector.facts["corpus"] = {"texts": []}
    projector.save(tmp_path / "p.safetensors")
    command = ["evaluate", str(tmp_path / "p.safetensors"), *named, "--corpus", str(tmp_path / "t.jsonl"), *sizes]
    assert main([*command, "--questions", "none", "--json", str(figures)]) == 0
    [loss] = json.loads(figures.read_text())["loss"]
    assert (loss["documents"], loss["tokens"]) == (2, 38)
    assert len({round(arm["value"], 4) for arm in loss["loss"].values()}) == 5


# what is right


def test_the_packages_documents_answer_their_own_questions_alone():
    documents = packaged()
    assert len({document.name for document in documents}) == 3
    for document in documents:
        assert [asked.kind for asked in document.questions] == ["gist", "gist", "fact", "fact"]
        for asked in document.questions:
            assert asked.right(f"I think: {asked.wanted[0]}.")
            assert asked.right("Perhaps.") is False
            # an answer that repeats the question is not right by that
            assert not asked.right(asked.question) and not asked.right(asked.cloze), asked
            if asked.kind == "fact":
                assert asked.wanted[0] in document.text
                assert not any(
                    w in other.text for w in asked.wanted[:1] for other in documents if other is not document
                )
    assert Asked("Who?").right("Nobody") is None


# refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--pair", "gemma3-smollm2"],
            "there is no projector for gemma3-smollm2 yet: `c2c-kernels fit --pair gemma3-sm",
        ),
        (["--pair", "smollm2-gemma3"], "`c2c-kernels fit --pair smollm2-gemma3` makes it in under 20 minutes"),
        (["--swap"], "there is no projector for gemma3-smollm2 yet"),
        (["--pair", "gemma3-smollm2", "--projector", "{tmp}/no.safetensors"], "no.safetensors does not exist: a file"),
        (
            ["--pair", "gemma3-smollm2", "--projector", "{tmp}/bad.safetensors"],
            "is truncated, damaged or no safetensors",
        ),
        (["--swap", "--pair", "gemma3-smollm2"], "--pair and --swap: one of them is wanted"),
        (
            ["--swap", "--projector", "{tmp}/bad.safetensors"],
            r"given 1 times: two \(there and back\) or none is wanted",
        ),
        (["--projector", "x", "--projector", "x"], "--projector was given 2 times: one or none is wanted"),
        (
            ["--pair", "gemma3-smollm2", "--projector", "{tmp}/bad.safetensors", "--sharer", "a", "--sharer", "b"],
            "given 2",
        ),
        (
            ["--projector", "{tmp}/bad.safetensors", *["--document", "{tmp}/a.txt"] * 2],
            "given 2 times: one document or",
        ),
        (
            ["--swap", *["--projector", "{tmp}/bad.safetensors"] * 2, "--document", "{tmp}/a.txt"],
            "given 1 times: 2 documents, one for each model or none is wanted",
        ),
        (
            ["--projector", "{tmp}/bad.safetensors", "--document", "{tmp}/empty.txt"],
            "empty.txt is empty: a text is wan",
        ),
        (["--pair", "gemma3-smollm2", "--plot", "{tmp}/p.pdf"], "ends in .png is wanted"),
    ],
)
def test_what_cannot_be(arguments, message, tmp_path, capsys, cache, no_network, monkeypatch):
    monkeypatch.setattr("c2c_kernels.cli.known_pairs._FOLDER", "nowhere")  # also where the package ships one
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "a.txt").write_text("one paragraph")
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0")
    line = _failure(capsys, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert re.search(message, line), line
    assert not cache.exists()


@pytest.mark.parametrize("arguments", [["--pair", "gemma3"], ["--projector", " "], ["--swap", "--question", " "]])
def test_argparse_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments])
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search("invalid choice: 'gemma3'.*gemma3-smollm2.*smollm2-gemma3|it is empty", line), line


def test_other_models_and_long_documents_are_refused(folders, projectors, note_files, tmp_path, capsys):
    way = _way(folders, projectors, "base", "chat")
    line = _failure(capsys, *way[:2], "--receiver", folders["base"], *way[4:])
    assert "the receiver's model" in line and "the projector was made for chat" in line
    for sharer, receiver in (("short", "base"), ("base", "short")):
        line = _failure(capsys, *_way(folders, projectors, sharer, receiver), "--document", note_files[0])
        role = "sharer" if sharer == "short" else "receiver"
        assert re.search(rf"\d+ tokens; the {role}'s context holds 100: a shorter text is wanted", line), line


# the pair's own file


def test_fit_makes_a_pairs_projector_where_the_demo_finds_it(folders, tmp_path, capsys, cache, monkeypatch):
    draw = random.Random(4)
    words = ["the", "cat", "reads", "a", "book", "about", "boats", "and", "bees", "in", "rain"]
    lines = [{"text": " ".join(draw.choice(words) for _ in range(150)), "split": "fit"} for _ in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = ["--corpus", str(tmp_path / "texts.jsonl"), "--window", "64", "--layers", "1", "--tokens", "1500"]
    monkeypatch.setitem(known_pairs.PAIRS, "smollm2-gemma3", known_pairs.KnownPair(folders["chat"], folders["base"]))
    assert main(["fit", "--pair", "smollm2-gemma3", *given]) == 0
    capsys.readouterr()
    outcome = _demo(capsys, "--pair", "smollm2-gemma3", "--max-new-tokens", "1")
    [found] = outcome["directions"]
    assert found["projector"] == str(cache / "projectors" / "smollm2-gemma3.safetensors")
    assert (found["sharer"], found["receiver"]) == (folders["chat"], folders["base"])
    assert main(["fit", "--sharer", folders["chat"], "--corpus", "x"]) == 1
    assert "--receiver, --output missing: all of them, or --pair, are wanted" in capsys.readouterr().err


@pytest.mark.slow
def test_on_the_real_models(smollm2_gguf, gemma3_gguf, capsys):
    """Through the projector that ships, or the user's own, the text helps more than another one."""
    question = ("--question", "What is this text about?", "--max-new-tokens", "1", "--threads", "1")
    [found] = _demo(capsys, "--pair", "gemma3-smollm2", *question)["directions"]
    nats = found["loss"]["nats"]
    assert nats["text"] < nats["cache"] < nats["mismatched"] and nats["cache"] < nats["none"]
