"""Every way to generate gives the tokens of the model that has the text in its prompt."""

from __future__ import annotations

import pytest
import torch
from tiny_models import PREFIX, build, build_small, pad_left, read, tokens
from transformers import DynamicCache

from c2c_kernels.integrations.transformers import SharedContext, enable, record_mass, session

NEW = 10
QUESTION = 7
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampling beams": {"num_beams": 2, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 3},
    "static cache": {"cache_implementation": "static"},
    "without a cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


def generate(model, input_ids, **kwargs):
    torch.manual_seed(0)
    return model.generate(input_ids, **{"max_new_tokens": NEW, "do_sample": False, **kwargs})[:, -NEW:]


def interleave(texts, prefixes):
    """A left-padded batch with each row's prefix put between its padding and its text."""
    return pad_left([torch.cat([prefix, text]) for prefix, text in zip(prefixes, texts, strict=True)])


@pytest.mark.parametrize("mode", MODES)
def test_modes(family, mode):
    plain, model = build(family), enable(build(family))
    prefix, question = tokens(1, PREFIX, seed=1), tokens(1, QUESTION, seed=2)
    wanted = generate(plain, torch.cat([prefix, question], dim=1), **MODES[mode])
    with session(model, SharedContext.from_caches(read(plain, prefix))):
        got = generate(model, question, **MODES[mode])
    assert torch.equal(got, wanted)
    assert not torch.equal(generate(model, question, **MODES[mode]), wanted)


@pytest.mark.parametrize("context_rows", [1, 3])
@pytest.mark.parametrize("mode", ["greedy", "beams, several returned", "several samples", "static cache"])
def test_left_padded_batches(family, mode, context_rows):
    plain, model = build(family), enable(build(family))
    prefixes = tokens(context_rows, PREFIX, seed=3)
    questions = [tokens(1, length, seed=10 + length)[0] for length in (9, 4, 6)]
    full, full_mask = interleave(questions, prefixes.expand(3, -1))
    wanted = generate(plain, full, attention_mask=full_mask, **MODES[mode])
    batch, mask = pad_left(questions)
    with session(model, SharedContext.from_caches(read(plain, prefixes))):
        got = generate(model, batch, attention_mask=mask, **MODES[mode])
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("carrier", ["session", "cache"])
def test_assisted_decoding_leaves_the_assistant_alone(family, carrier):
    plain, model = build(family), enable(build(family))
    assistant = enable(build_small(family))
    prefix, question = tokens(1, PREFIX, seed=1), tokens(1, QUESTION, seed=2)
    wanted = generate(plain, torch.cat([prefix, question], dim=1))
    context = SharedContext.from_caches(read(plain, prefix))
    with record_mass(assistant) as assistants, record_mass(model) as own:
        if carrier == "session":
            with session(model, context):
                got = generate(model, question, assistant_model=assistant)
        else:
            cache = context.attach(DynamicCache(config=model.config))
            got = generate(model, question, assistant_model=assistant, past_key_values=cache)
    assert torch.equal(got, wanted)
    assert {mass.shape[-1] for mass in assistants.mass[0]} == {1}
    assert {mass.shape[-1] for mass in own.mass[0]} == {2}


def test_a_prompt_cache_goes_on_with_its_context(family):
    """The receiver's cache of a first turn, reused for a second one."""
    plain, model = build(family), enable(build(family))
    prefix, first, second = tokens(1, PREFIX, seed=1), tokens(1, 5, seed=2), tokens(1, 4, seed=3)
    wanted = generate(plain, torch.cat([prefix, first, second], dim=1))
    context = SharedContext.from_caches(read(plain, prefix))
    cache = context.attach(DynamicCache(config=model.config))
    with torch.no_grad():
        model(first, past_key_values=cache)
    got = generate(model, torch.cat([first, second], dim=1), past_key_values=cache)
    assert torch.equal(got, wanted)


def test_embeddings_instead_of_ids(family):
    plain, model = build(family), enable(build(family))
    prefix, question = tokens(1, PREFIX, seed=1), tokens(1, QUESTION, seed=2)
    wanted = generate(plain, torch.cat([prefix, question], dim=1))
    with session(model, SharedContext.from_caches(read(plain, prefix))), torch.no_grad():
        embeddings = model.get_input_embeddings()(question)
        got = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_assistant_that_exits_early_reads_the_context(family):
    """The model's own first layers draft, with the context of the session."""
    plain, model = build(family), enable(build(family))
    prefix, question = tokens(1, PREFIX, seed=1), tokens(1, QUESTION, seed=2)
    wanted = generate(plain, torch.cat([prefix, question], dim=1))
    with session(model, SharedContext.from_caches(read(plain, prefix))), record_mass(model) as record:
        got = generate(model, question, assistant_early_exit=2)
    assert torch.equal(got, wanted)
    assert len(record.mass[0]) > len(record.mass[3]) > 0
