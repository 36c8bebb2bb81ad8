"""Training a projector on tiny models: it learns, goes on to the same bits, and refuses what cannot be."""

from __future__ import annotations

import copy
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from error_rule import GRADIENT_ULPS, assert_as_exact
from test_projected import identity_projector, random_projector
from tiny_models import build
from tiny_tokenizers import build_tokenizer, random_texts
from torch.nn import functional as F

import c2c_kernels as c2c
from c2c_kernels import corpus, evaluate
from c2c_kernels.alignment import token_spans
from c2c_kernels.backends import native
from c2c_kernels.fitting.texts import text_hashes
from c2c_kernels.integrations.transformers import enable
from c2c_kernels.training import Asked, Examples, TrainOptions, train_projector
from c2c_kernels.training import train as module
from c2c_kernels.training.batches import collate
from c2c_kernels.training.course import rate, temperature
from c2c_kernels.training.examples import Questions, Repeats, Texts
from c2c_kernels.training.head import Head, head_loss
from c2c_kernels.training.trainee import Trainee

TEXTS = random_texts(12, 150)
OPTIONS = TrainOptions(
    steps=4, context=40, least_context=8, continuation=12, accumulate=1, held_out=0, lr=3e-3, distill=0.5
)
SHARER_TOKENIZER, TOKENIZER = build_tokenizer(25, bos=True), build_tokenizer(4)
QUESTIONS = [
    Asked(text[:40], (1, 5), (3 + n, 4, 5), (7 + n, 9)) for text in random_texts(9, 60, seed=3) for n in range(2)
]
EXAMPLES = Examples(TEXTS, QUESTIONS)


@pytest.fixture(scope="module")
def models():
    return build("gemma3"), build("llama")


def projector_of(models, **settings):
    return random_projector(*models, prefix=(1,), **settings)


def train(models, projector=None, examples=EXAMPLES, options=OPTIONS, tokenizers=(SHARER_TOKENIZER, TOKENIZER), **more):
    projector = projector_of(models) if projector is None else projector
    return train_projector(
        *models,
        projector,
        examples,
        sharer_tokenizer=tokenizers[0],
        receiver_tokenizer=tokenizers[1],
        options=options,
        **more,
    )


def streams(projector, options=OPTIONS, tokenizers=(SHARER_TOKENIZER, TOKENIZER)):
    return Texts(TEXTS, *tokenizers, projector.prefix, options), Questions(QUESTIONS, *tokenizers, options)


def gradients(trainee, batch):
    """Of every parameter of the projector, and the terms of the loss."""
    parameters = list(trainee.projector.parameters())
    loss, terms = trainee(batch)
    found = torch.autograd.grad(loss, parameters, allow_unused=False)
    return loss.detach(), terms, found


class Same:
    """A model that is its own sharer, through maps that change nothing: what is projected is its own cache."""

    tokenizers = build_tokenizer(8, bos=True), build_tokenizer(8)

    def __init__(self, family, dtype=torch.float32):
        self.models = build(family).to(dtype), build(family).to(dtype)
        self.projector = identity_projector(self.models[0], prefix=(1,))
        # the sharer writes one start token, so that the head of a question is that token alone
        asked = [replace(one, head=(1,)) for one in QUESTIONS]
        self.streams = (
            Texts(TEXTS, *self.tokenizers, (1,), OPTIONS),
            Repeats(Texts(TEXTS, *self.tokenizers, (1,), OPTIONS)),
            Questions(asked, *self.tokenizers, OPTIONS),
        )

    def batches(self, count=3):
        return [collate([stream.window(n) for n in range(count)], self.projector) for stream in self.streams]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_ones_own_cache_is_worth_the_text(family):
    """No divergence from the teacher, no error to match, in every row of padded batches of both kinds."""
    same = Same(family)
    trainee = Trainee(same.projector, *same.models, distill=0.5, match=1.0)
    for batch in same.batches():
        assert len(set(batch.visible.tolist())) > (2 if batch.inside else 1)
        with torch.no_grad():
            loss, (entropy, divergence, match) = trainee(batch)
        text, alone = (trainee.cross_entropy(batch, arm) / batch.scored for arm in ("text", "alone"))
        assert abs(divergence) < 1e-6 and match < 1e-9
        assert float(entropy) == pytest.approx(text, rel=1e-5)
        assert abs(alone - text) > 0.01
        assert float(loss) == pytest.approx(0.5 * text, rel=1e-5)


def test_the_loss_is_that_of_plain_models():
    """Every row on its own, by a model that is not patched: head, visible text and own tokens as one sequence."""
    same = Same("llama")
    trainee = Trainee(same.projector, *same.models)
    plain = build("llama")
    for stream, batch in zip(same.streams, same.batches(), strict=True):
        total, count = 0.0, 0
        for window in (stream.window(n) for n in range(3)):
            for row in window.rows:
                before = [*window.head, *window.receiver.ids[: row.start]]
                ids = torch.tensor([[*before, *row.ids]])
                with torch.no_grad():
                    logits = plain(ids).logits[0, len(before) + row.first - 1 : -1]
                total += float(F.cross_entropy(logits, ids[0, len(before) + row.first :], reduction="sum"))
                count += len(logits)
        assert batch.scored == count
        assert trainee.cross_entropy(batch, "projected") == pytest.approx(total, rel=1e-5)
        assert trainee.cross_entropy(batch, "text") == pytest.approx(total, rel=1e-5)


@torch.no_grad()
def written(model, ids, count):
    """What a plain model writes after `ids`."""
    made = list(ids)
    for _ in range(count):
        made.append(int(model(torch.tensor([made])).logits[0, -1].argmax()))
    return tuple(made[len(ids) :])


def test_it_learns():
    """From disturbed maps back to what the receiver that has read the text says, which is unlikely without it."""
    same, plain = Same("llama"), build("llama")
    rest = (3, 4)
    asked = [
        Asked(text, (1,), rest, written(plain, [1, *same.tokenizers[1](text).input_ids, *rest], 6))
        for text in random_texts(8, 40, seed=5)
    ]
    start = copy.deepcopy(same.projector)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in start.maps:
            for half in (layer.key_proj, layer.value_proj):
                half += 0.1 * torch.randn(half.shape, generator=generator)
    options = replace(OPTIONS, steps=25, question_batch=8, lr=5e-3, distill=1.0)
    seen = []
    trained = train(same.models, start, Examples((), asked), options, same.tokenizers, update=seen.append)
    assert seen[-1].loss < 0.25 * seen[0].loss
    assert [p.step for p in seen] == list(range(1, 26)) and seen[-1].done == 1
    stream = Questions(asked, *same.tokenizers, OPTIONS)
    batch = collate([stream.window(n) for n in range(8)], start)
    recovered = []
    for projector in (start, trained):
        trainee = Trainee(projector, *same.models)
        alone, text, projected = (trainee.cross_entropy(batch, arm) for arm in ("alone", "text", "projected"))
        recovered.append((alone - projected) / (alone - text))
    assert alone > 2 * text
    assert recovered[0] < 0.5 and 0.9 < recovered[1] < 1.1
    facts = trained.facts["training"]
    assert facts["steps"] == 25 and facts["windows"] == {"questions": 200}
    assert [point["step"] for point in facts["curve"]] == list(range(1, 26))
    assert facts["curve"][-1]["kl"] == pytest.approx(seen[-1].loss, abs=1e-3)


def test_what_is_frozen_stays_and_gates_move(models, tmp_path):
    start = projector_of(models)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    untouched = copy.deepcopy(start.state_dict())
    trained = train(models, start)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    assert start.gate_logits is None and all(torch.equal(t, untouched[n]) for n, t in start.state_dict().items())
    for name, parameter in start.named_parameters():
        assert not torch.equal(parameter, trained.state_dict()[name]), name
    assert trained.gate_temperature == OPTIONS.gate_temperature[1]
    assert trained.gate_logits.unique().numel() > 20
    assert ((trained.gates() > 0.9) & (trained.gates() < 1)).all()
    trained.save(tmp_path / "p.safetensors", storage="int8")
    again = c2c.CacheProjector.load(tmp_path / "p.safetensors")
    assert torch.equal(again.gates(), trained.gates())
    assert again.facts["training"]["options"]["lr"] == OPTIONS.lr


@torch.no_grad()
def test_biases_and_gates_can_hold_still(models, monkeypatch):
    """What a map gives at the mean of what it reads stays, to the rounding of a sum of so many products."""
    measured = []
    measure = module._moments
    monkeypatch.setattr(module, "_moments", lambda *given: measured.append(measure(*given)) or measured[-1])
    with torch.enable_grad():
        first = train(models)
        second = train(models, first, options=replace(OPTIONS, bias_lr=0.0, gate_lr=0.0))
    assert torch.equal(second.gates(), first.gates()) and second.gate_temperature == first.gate_temperature
    for before, after in zip(first.maps, second.maps, strict=True):
        for half in ("key", "value"):
            mean = measured[-1].whitening(getattr(before, f"{half}_sources"))[0].mean
            (proj, bias), (start, start_bias) = (
                (getattr(maps, f"{half}_proj").flatten(0, 1), getattr(maps, f"{half}_bias").flatten())
                for maps in (after, before)
            )
            assert not torch.equal(proj, start) and not torch.equal(bias, start_bias)
            products = proj.abs().maximum(start.abs()) @ mean.abs() + bias.abs().maximum(start_bias.abs())
            moved = (proj.double() @ mean.double() + bias) - (start.double() @ mean.double() + start_bias)
            assert (moved.abs() <= 2 * len(mean) * torch.finfo(torch.float32).eps * products).all()


def test_a_second_run_tells_of_the_first(models):
    first = train(models, examples=replace(EXAMPLES, questions=()))
    second = train(models, first, replace(EXAMPLES, texts=()))
    before, after = first.facts["training"], second.facts["training"]
    assert set(after["texts"]) == {digest[:16] for digest in EXAMPLES.hashes} > set(before["texts"])
    assert after["before"] == {name: value for name, value in before.items() if name != "texts"}


def test_rates_and_temperatures():
    assert [rate(done, 0.25) for done in (0.0, 0.125, 0.25, 0.625, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert rate(0.0, 0.0) == 1
    assert [temperature(done, (2.0, 0.5)) for done in (0.0, 0.5, 1.0, 1.1)] == pytest.approx([2, 1, 0.5, 0.5])


class StoppedError(Exception):
    pass


def stop_after(steps):
    def update(progress):
        if progress.step == steps:
            raise StoppedError

    return update


def test_an_interrupted_run_goes_on_to_the_same_bits(models, tmp_path):
    """Twice interrupted; the second time after steps that no checkpoint holds."""
    options = replace(OPTIONS, steps=5, accumulate=2, held_out=1, validations=2)
    whole = train(models, options=options)
    checkpoint = tmp_path / "run.checkpoint"
    often, rarely = replace(options, checkpoint_seconds=0.0), replace(options, checkpoint_seconds=1e6)
    with pytest.raises(StoppedError):
        train(models, options=often, checkpoint=checkpoint, update=stop_after(3))
    kept = checkpoint.read_bytes()
    seen = []

    def watch(progress):
        seen.append(progress.step)
        stop_after(4)(progress)

    with pytest.raises(StoppedError):
        train(models, options=rarely, checkpoint=checkpoint, update=watch)
    assert seen == [2, 3, 4], "the checkpoint of step 2 was the last before the interruption"
    assert checkpoint.read_bytes() == kept
    resumed = train(models, options=rarely, checkpoint=checkpoint)
    assert not checkpoint.exists()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    ours, theirs = resumed.facts["training"], whole.facts["training"]
    for name in ("steps", "windows", "tokens_scored", "texts"):
        assert ours[name] == theirs[name]
    assert [p["loss"] for p in ours["curve"]] == [p["loss"] for p in theirs["curve"]]
    assert [p["step"] for p in ours["held_out"]] == [p["step"] for p in theirs["held_out"]]


def test_a_checkpoint_of_another_run(models, tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    often = replace(OPTIONS, checkpoint_seconds=0.0)
    with pytest.raises(StoppedError):
        train(models, options=often, checkpoint=checkpoint, update=stop_after(2))
    for changes, message in (
        ({"options": replace(OPTIONS, lr=1e-4)}, "other options"),
        ({"examples": Examples(TEXTS[1:], QUESTIONS)}, "other texts"),
        ({"examples": Examples(TEXTS, QUESTIONS[1:])}, "other questions"),
        ({"projector": projector_of(models, seed=5)}, "other projector"),
        ({"backend": "reference"}, "other backend"),
    ):
        with pytest.raises(ValueError, match=f"belongs to another training \\({message}\\): remove it, or name"):
            train(models, checkpoint=checkpoint, **changes)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged .*: remove it to start again"):
        train(models, checkpoint=checkpoint)


def test_accumulating_is_a_larger_batch(models):
    """Questions with answers of one length: the mean over a batch is the mean of the means over its halves."""
    projector = projector_of(models).requires_grad_(True)
    projector.add_gates(6)
    trainee = Trainee(projector, *models, distill=0.5)
    windows = [streams(projector)[1].window(n) for n in range(4)]
    _, _, together = gradients(trainee, collate(windows, projector))
    halves = [gradients(trainee, collate(part, projector))[2] for part in (windows[:2], windows[2:])]
    exact = exact_gradients(projector, models, windows)
    for number, wanted in enumerate(exact):
        summed = (halves[0][number] + halves[1][number]) / 2
        assert_as_exact(f"gradient {number}", together[number], summed, wanted, GRADIENT_ULPS)


def exact_gradients(projector, models, windows):
    """By the reference on float64 models."""
    from tiny_models import Float64

    doubles = [copy.deepcopy(model).double() for model in models]
    exact = copy.deepcopy(projector).double()
    trainee = Trainee(exact, *doubles, distill=0.5, backend="reference")
    with Float64():
        return gradients(trainee, collate(windows, exact))[2]


@pytest.mark.parametrize("kind", [0, 1])
def test_gradients_go_through_our_kernels(models, kind, monkeypatch):
    """backend="cpu" runs the compiled kernels, forward and backward, and is as exact as PyTorch in float32."""
    calls: dict[str, int] = {}

    def counted(name):
        original = getattr(native, name)

        def run(backend, *arguments, **keywords):
            assert backend == "cpu"
            calls[name] = calls.get(name, 0) + 1
            return original(backend, *arguments, **keywords)

        return run

    names = ("project_kv", "project_kv_backward", "merged_attention", "merged_attention_backward")
    for name in names:
        monkeypatch.setattr(native, name, counted(name))
    found = []
    for seed in range(10):  # whose errors are compared together: of one draw they differ by more than twice
        projector = projector_of(models, seed=seed).requires_grad_(True)
        projector.add_gates(6)
        windows = [streams(projector)[kind].window(n) for n in range(2)]
        batch = collate(windows, projector)
        ours = gradients(Trainee(projector, *models, distill=0.5, backend="cpu"), batch)[2]
        layers = len(projector.maps)
        assert calls["project_kv"] == calls["project_kv_backward"] == calls["merged_attention_backward"] == layers
        if not seed:  # later calls of the teacher are those of the first, which are made again without a look at them
            assert calls["merged_attention"] > layers
        calls.clear()
        torchs = gradients(Trainee(projector, *models, distill=0.5, backend="reference"), batch)[2]
        assert not calls
        found.append((ours, torchs, exact_gradients(projector, models, windows)))
    for number in range(len(found[0][0])):
        assert_as_exact(
            f"gradient {number}",
            *(torch.stack([of_seed[way][number] for of_seed in found]) for way in range(3)),
            GRADIENT_ULPS,
        )


def test_bfloat16(models):
    halves = [copy.deepcopy(model).bfloat16() for model in models]
    start = projector_of(models)
    trained = train(halves, start)
    assert all(parameter.dtype == torch.float32 for parameter in trained.parameters())
    batch = collate([streams(start)[0].window(n) for n in range(2)], start)
    wanted, got = (Trainee(start, *pair, distill=0.5)(batch)[0].detach() for pair in (models, halves))
    assert float(got) == pytest.approx(float(wanted), rel=0.02)
    assert trained.facts["training"]["curve"][0]["loss"] == pytest.approx(
        train(models, start, options=replace(OPTIONS, steps=1)).facts["training"]["curve"][0]["loss"], rel=0.05
    )


@pytest.mark.parametrize("strategy", ["first", "last"])
@pytest.mark.parametrize("tokens", ["receiver", "sharer"])
def test_recorded_segments_are_the_kernels(models, tokens, strategy):
    """What is projected for a backward pass is what one kernel call makes of the rotated cache."""
    projector = projector_of(models, tokens=tokens, strategy=strategy)
    batch = collate([streams(projector)[1].window(n) for n in range(3)], projector)
    cache = Trainee(projector, *models).read(batch)
    projector.requires_grad_(True)
    recorded = projector.segments(cache, batch.plan)
    with torch.no_grad():
        kernel = projector.segments(cache, batch.plan)
    exact = copy.deepcopy(projector).double()
    with torch.no_grad():
        wanted = exact.segments([(k.double(), v.double()) for k, v in cache], batch.plan, backend="reference")
        plain = projector.segments(cache, batch.plan, backend="reference")
    for one, other, reference, oracle in zip(recorded, kernel, plain, wanted, strict=True):
        assert one.key.requires_grad and not other.key.requires_grad
        for half in ("key", "value"):
            ours, theirs, true = (getattr(s, half).detach() for s in (one, reference, oracle))
            assert_as_exact(half, ours, theirs, true)
            assert_as_exact(half, getattr(other, half), theirs, true)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_heads_loss_and_gradient(softcap, monkeypatch):
    """In chunks, against PyTorch's own over all logits."""
    monkeypatch.setattr("c2c_kernels.training.head._CHUNK", 101 * 3)
    model = build("gemma2" if softcap else "llama")
    if softcap:
        model.config.final_logit_softcapping = softcap
    head = Head(model)
    assert head.softcap == softcap
    generator = torch.Generator().manual_seed(1)
    hidden, teacher = (torch.randn(11, 48, generator=generator) for _ in range(2))
    targets = torch.randint(101, (11,), generator=generator)

    def plain(dtype, w):
        h = hidden.clone().to(dtype).requires_grad_()
        weight = model.get_output_embeddings().weight.detach().to(dtype)

        def logits(states):
            z = states.to(dtype) @ weight.T
            return softcap * torch.tanh(z / softcap) if softcap else z

        log_p, q = torch.log_softmax(logits(h), -1), torch.softmax(logits(teacher), -1)
        entropy = F.nll_loss(log_p, targets)
        loss = (1 - w) * entropy + w * F.kl_div(log_p, q, reduction="batchmean")
        loss.backward()
        return loss.detach(), h.grad

    for w in (0.0, 0.3, 1.0):
        mine = hidden.clone().requires_grad_()
        loss, terms = head_loss(head, mine, targets, teacher if w else None, w)
        (2 * loss).backward()
        theirs, oracle = plain(torch.float32, w), plain(torch.float64, w)
        assert_as_exact("loss", loss.detach(), theirs[0], oracle[0])
        assert_as_exact("gradient", mine.grad, 2 * theirs[1], 2 * oracle[1])
        assert torch.isnan(terms[1]) == (w == 0)
    with torch.no_grad():
        assert not head_loss(head, hidden, targets, None, 0.0)[0].requires_grad


def test_the_mean_with_the_projector_that_it_started_from(models):
    """Every parameter is the mean of both; gates begin at 4 where there were none: at 2 with half the temperature."""
    begun = projector_of(models)
    plain, mean = (train(models, begun, options=replace(OPTIONS, average=share)) for share in (0.0, 0.5))
    before = dict(begun.named_parameters())
    for (name, trained), averaged in zip(plain.named_parameters(), mean.parameters(), strict=True):
        start = before.get(name, torch.full_like(trained, 2.0))
        assert not torch.equal(trained, start)
        torch.testing.assert_close(averaged, (start + trained) / 2)
    assert mean.facts["training"]["options"]["average"] == 0.5


TWO = """
import sys
import torch
from torch import distributed
sys.path[:0] = sys.argv[4:]
from dataclasses import replace
import test_train
from c2c_kernels.training import train as module

rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
processes = 2 if rank >= 0 else 1
if processes == 2:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
kept = {}
clip = torch.nn.utils.clip_grad_norm_

def keep(parameters, *arguments, **keywords):
    parameters = list(parameters)
    if not kept:
        kept.update({f"gradient.{n}": p.grad.clone() for n, p in enumerate(parameters)})
    return clip(parameters, *arguments, **keywords)

torch.nn.utils.clip_grad_norm_ = keep
options = replace(test_train.OPTIONS, steps=2, accumulate=2 // processes)
called = []
trained = test_train.train(
    (test_train.build("gemma3"), test_train.build("llama")), options=options, update=called.append,
    checkpoint=out + ".checkpoint",
)
assert bool(called) == (rank < 1)
torch.save({**kept, **trained.state_dict()}, out)
"""


def test_two_processes_are_one_that_accumulates(tmp_path):
    """Gradients of the first step to rounding, and the same parameters in both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parent
    folders = [str(tests), str(tests.parent)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(rank), str(port), str(tmp_path / f"{rank}.pt"), *folders],
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1, -1)
    ]
    for process in running:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error.decode()
    first, second, one = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1, -1))
    assert set(first) == set(one) and sum(name.startswith("gradient") for name in one) == 17
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        if name.startswith("gradient"):
            # a sum of two numbers and its half are rounded once in either way
            assert_as_exact(name, tensor, one[name], one[name])
            assert tensor.abs().max() > 0
    assert not list(tmp_path.glob("*.checkpoint*"))


def test_an_evaluation_refuses_what_was_trained_on(models):
    projector = projector_of(models)
    projector.facts["corpus"] = {"texts": []}
    trained = train(models, projector, options=replace(OPTIONS, steps=1))
    assert trained.facts["training"]["texts"] == [
        digest[:16] for digest in text_hashes([*TEXTS, *dict.fromkeys(one.context for one in QUESTIONS)])
    ]
    unseen = corpus.Document("new", random_texts(1, 99, seed=8)[0])
    evaluate.check_unseen(trained, [unseen])
    for text in (TEXTS[3], QUESTIONS[4].context):
        with pytest.raises(ValueError, match=r"1 of 2 documents are among those that the projector was .*\(old\)"):
            evaluate.check_unseen(trained, [unseen, corpus.Document("old", text)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples": Examples()}, "examples are empty"),
        ({"examples": Examples(["abc", " "])}, r"texts\[1\] is empty"),
        ({"examples": Examples(["abc", "abd"])}, "none of 2 documents has the 14 tokens"),
        ({"examples": Examples((), [replace(QUESTIONS[0], answer=())])}, r"questions\[0\] has an empty context"),
        (
            {"examples": Examples((), [*QUESTIONS, replace(QUESTIONS[0], context="ab" * 300)])},
            r"questions\[18\] takes 601 tokens of the sharer, whose context is 512",
        ),
        ({"options": replace(OPTIONS, context=300)}, "context is 300 tokens, the sharer's own 512 .*at most 249"),
        ({"options": replace(OPTIONS, context=4)}, r"context must be at least least_context \(8\), got 4"),
        ({"options": replace(OPTIONS, continuation=1)}, "continuation must be at least 2, got 1"),
        ({"options": replace(OPTIONS, steps=None)}, "either steps or minutes is wanted"),
        ({"options": replace(OPTIONS, minutes=1.0)}, "either steps or minutes is wanted"),
        ({"options": replace(OPTIONS, steps=0)}, "steps must be at least 1, got 0"),
        ({"options": replace(OPTIONS, lr=0.0)}, "lr must be a number above 0, got 0.0"),
        ({"options": replace(OPTIONS, lr=float("nan"))}, "lr must be a number above 0, got nan"),
        ({"options": replace(OPTIONS, bias_lr=-1e-3)}, "bias_lr must be at least 0, got -0.001"),
        ({"options": replace(OPTIONS, gate_lr=float("inf"))}, "gate_lr must be at least 0, got inf"),
        ({"options": replace(OPTIONS, distill=1.5)}, r"distill must be within 0\.\.1, got 1.5"),
        ({"options": replace(OPTIONS, match=-1.0)}, "match must be at least 0, got -1.0"),
        ({"options": replace(OPTIONS, warmup=1.0)}, "warmup must be at least 0 and below 1"),
        ({"options": replace(OPTIONS, average=1.0)}, "average must be at least 0 and below 1, got 1.0"),
        ({"options": replace(OPTIONS, repeat_weight=-0.1)}, r"repeat_weight must be within 0\.\.1, got -0.1"),
        ({"options": replace(OPTIONS, gate_temperature=(1.0, 0.0))}, "gate_temperature must be two numbers above 0"),
        ({"backend": "nothing"}, "backend must be one of"),
    ],
)
def test_what_cannot_be_is_refused_before_a_step(models, changes, message):
    def update(progress):
        raise AssertionError("began")

    with pytest.raises(ValueError, match=message):
        train(models, update=update, **changes)


def test_other_projectors_are_refused(models):
    zero = projector_of(models).requires_grad_(False)
    for parameter in zero.parameters():
        parameter.zero_()
    with pytest.raises(ValueError, match="the projector's maps are zero: training starts from a fit"):
        train(models, zero)
    other = projector_of(models)
    other.sharer_identity = replace(other.sharer_identity, name="Another", model="0" * 64)
    with pytest.raises(ValueError, match=r"the sharer's model .* the projector was made for Another"):
        train(models, other)
    with pytest.raises(ValueError, match="match compares with the receiver's own tokens: .* not \"?'?sharer"):
        train(models, projector_of(models, tokens="sharer"), options=replace(OPTIONS, match=0.1))


def test_a_receiver_is_left_as_it_was():
    sharer, receiver = build("gemma3"), build("llama")
    train((sharer, receiver), options=replace(OPTIONS, steps=1))
    assert receiver.config._attn_implementation == "eager"
    enable(receiver)
    train((sharer, receiver), options=replace(OPTIONS, steps=1))
    assert receiver.config._attn_implementation == "c2c"
    spans = token_spans(TOKENIZER, TEXTS[0])
    with torch.no_grad():
        assert receiver(torch.tensor([spans.ids])).logits.isfinite().all()
