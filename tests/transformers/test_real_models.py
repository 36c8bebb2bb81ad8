"""Exactness on real weights: SmolLM2-135M-Instruct, and Gemma 3 270M with windows shorter than the text."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from error_rule import assert_as_exact
from tiny_models import Float64, read

from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.models import load_model
from c2c_kernels.integrations.transformers import SharedContext, enable, record_mass, session

# model: tokens of the document that the sharer reads
MODELS = {"smollm2-135m": 200, "gemma3-270m": 560}
QUESTION = "\n\nIn one sentence, the text above says that"
NEW = 8


@pytest.fixture(scope="module", params=list(MODELS))
def real(request):
    """(model, prefix ids, question ids)."""
    try:
        model, tokenizer = load_model(request.param, torch.float32)
    except CommandError as error:
        pytest.skip(f"{request.param} cannot be had: {error}")
    document = resources.files("c2c_kernels").joinpath("data/document.txt").read_text(encoding="utf-8")
    prefix = tokenizer(document, return_tensors="pt").input_ids[:, : MODELS[request.param]]
    question = tokenizer(QUESTION, return_tensors="pt", add_special_tokens=False).input_ids
    assert prefix.shape[1] == MODELS[request.param]
    return model, prefix, question


@pytest.mark.slow
@torch.no_grad()
def test_the_cache_stands_for_the_text(real):
    model, prefix, question = real
    text = torch.cat([prefix, question], dim=1)
    keep = question.shape[1]
    model.generation_config.eos_token_id = None
    by_torch = model(text, logits_to_keep=keep).logits
    tokens = model.generate(text, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    context = SharedContext.from_caches(read(model, prefix, logits_to_keep=1))

    enable(model)
    got = model(question, c2c=context).logits
    with session(model, context), record_mass(model) as record:
        shared_tokens = model.generate(question, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    alone = model.generate(question, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    assert torch.equal(shared_tokens, tokens)
    assert not torch.equal(alone, tokens)
    assert all(mass[0][0, :, -1, 1].max() > 0.05 for mass in record.mass)

    shut = SharedContext.from_caches(read(model, prefix, logits_to_keep=1), gates=0.0, position_offset=0)
    assert torch.equal(model(question, c2c=shut).logits, model(question).logits)

    model.set_attn_implementation("eager")
    with Float64():
        oracle = model.double()(text, logits_to_keep=keep).logits
    assert_as_exact("logits", got, by_torch, oracle)
