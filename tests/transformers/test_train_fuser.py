"""Training a fuser on tiny models: it learns, goes on to the same bits, and refuses what cannot be."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import build
from tiny_tokenizers import build_tokenizer, random_texts

import c2c_kernels as c2c
from c2c_kernels.training import Asked, Examples, TrainOptions
from c2c_kernels.training.fuser import train_fuser

SHARER_TOKENIZER, TOKENIZER = build_tokenizer(25, bos=True), build_tokenizer(4)
OPTIONS = TrainOptions(
    steps=3, context=30, least_context=8, continuation=10, accumulate=2, held_out=0, lr=3e-3, gate_lr=5e-2, distill=0.0,
    gate_temperature=(1.0, 0.01),
)  # fmt: skip
TEXTS = random_texts(12, 100)
QUESTIONS = [Asked(text[:40], (1, 5), (3, 4, 5), (7, 9)) for text in random_texts(4, 60, seed=3)]


@pytest.fixture(scope="module")
def pair():
    plain = {"sliding_window": None, "use_sliding_window": False, "layer_types": None}
    return build("llama", seed=1), build("qwen3", seed=2, **plain)


def start(pair, **options) -> c2c.C2CFuser:
    torch.manual_seed(5)
    return c2c.C2CFuser.for_models(pair[1], pair[0], hidden=16, inner=24, **options)


def train(pair, fuser, examples, options=OPTIONS, **more):
    return train_fuser(
        *pair, fuser, examples, sharer_tokenizer=SHARER_TOKENIZER, receiver_tokenizer=TOKENIZER, options=options, **more
    )


def test_it_learns_what_the_sharer_could_tell(pair):
    """One text again and again: the loss falls below what the receiver alone reaches, with both models untouched."""
    before = [copy.deepcopy(model.state_dict()) for model in pair]
    fuser = start(pair, dropout=0.0)
    options = replace(OPTIONS, steps=30, accumulate=1, lr=1e-2)
    trained = train(pair, fuser, Examples(TEXTS[:1]), options)
    facts = trained.facts["training"]
    first, last = sum(facts["losses"][:3]) / 3, sum(facts["losses"][-3:]) / 3
    assert last < 0.8 * first, facts["losses"]
    assert facts["steps"] == 30 and trained.gate_temperature == pytest.approx(0.01) and not trained.training
    assert any(gates.key or gates.value for gates in trained.gate_report())
    for model, state in zip(pair, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(gates.key or gates.value for gates in fuser.gate_report())
    assert trained.sharer.model and trained.receiver.tokenizer


def test_text_questions_and_what_is_held_out(pair):
    seen = []
    options = replace(OPTIONS, question_weight=0.5, held_out=1, validations=1)
    trained = train(pair, start(pair), Examples(TEXTS, QUESTIONS * 3), options, update=seen.append)
    assert set(trained.facts["training"]["windows"]) == {"text", "questions"}
    looks = trained.facts["training"]["held_out"]
    assert len(looks) == 2 and looks[0]["fused"] == looks[0]["alone"]  # closed gates at first
    assert [progress.step for progress in seen] == [0, 1, 2, 3] and seen[-1].done == 1


def test_goes_on_to_the_same_bits(pair, tmp_path):
    path = tmp_path / "run.checkpoint"
    options = replace(OPTIONS, steps=4, checkpoint_seconds=0.0)

    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    whole = train(pair, start(pair), Examples(TEXTS), options)
    with pytest.raises(KeyboardInterrupt):
        train(pair, start(pair), Examples(TEXTS), options, checkpoint=path, update=stop)
    assert path.exists()
    with pytest.raises(ValueError, match=r"belongs to another fuser-training \(other options\)"):
        train(pair, start(pair), Examples(TEXTS), replace(options, seed=9), checkpoint=path)
    steps = []
    again = train(pair, start(pair), Examples(TEXTS), options, checkpoint=path, update=lambda p: steps.append(p.step))
    assert steps[0] == 2 and not path.exists()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_what_cannot_be_is_refused(pair):
    with pytest.raises(ValueError, match=r"distill must be 0 for a fuser"):
        train(pair, start(pair), Examples(TEXTS), replace(OPTIONS, distill=0.5))
    with pytest.raises(ValueError, match="examples are empty"):
        train(pair, start(pair), Examples())
    other = build("llama", seed=1, num_key_value_heads=3)
    with pytest.raises(ValueError, match="the sharer has 3 KV heads x 16, the fuser is made for 2 x 16"):
        train((other, pair[1]), start(pair), Examples(TEXTS))
    trained = train(pair, start(pair), Examples(TEXTS), replace(OPTIONS, steps=1))
    with pytest.raises(ValueError, match="the sharer's model .* has SHA-256"):
        train((build("llama", seed=7), pair[1]), trained, Examples(TEXTS))
