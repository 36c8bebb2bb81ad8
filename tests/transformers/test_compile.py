"""torch.compile: whole graphs, the same results, and no recompilation for other texts, lengths and gates."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from tiny_models import PREFIX, build_small, pad_left, read, tokens
from transformers import CompileConfig, StaticCache

from c2c_kernels.integrations.transformers import SharedContext, enable, record_mass, session

QUESTION = 7


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def contexts(model, gates=None):
    for seed, length in enumerate((PREFIX, 33, 17, 40)):
        yield SharedContext.from_caches(
            read(model, tokens(1, length, seed=seed)), gates=None if gates is None else gates[seed]
        )


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_one_graph_for_every_length_and_gate(family):
    model = build_small(family, experts="grouped_mm")
    shared = list(contexts(model, gates=(0.5, 0.25, 0.125, 1.0)))
    enable(model, backend="cpu")
    question = tokens(1, QUESTION, seed=9)
    expected = [model(question, use_cache=False, c2c=context).logits for context in shared]
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    graphs = []
    for context, wanted in zip(shared, expected, strict=True):
        with session(model, context):
            torch.testing.assert_close(compiled(question, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-5)
        graphs.append(counter.frame_count)
    # The second length makes lengths symbolic; after that nothing is compiled any more.
    assert graphs[1] == graphs[-1], graphs


@torch.no_grad()
def test_generate_compiles_its_steps(family):
    """`generate` with a static cache, left padding included, compiles the decode step to one graph."""
    plain, model = build_small(family), enable(build_small(family, experts="grouped_mm"))
    prefix = tokens(1, PREFIX, seed=1)
    questions = [tokens(1, length, seed=10 + length)[0] for length in (7, 4)]
    full, full_mask = pad_left([torch.cat([prefix[0], question]) for question in questions])
    batch, mask = pad_left(questions)
    wanted = plain.generate(full, attention_mask=full_mask, max_new_tokens=4, do_sample=False)[:, -4:]
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    with session(model, SharedContext.from_caches(read(plain, prefix))):
        got = model.generate(
            batch,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            cache_implementation="static",
            compile_config=config,
        )[:, -4:]
    assert torch.equal(got, wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@torch.no_grad()
def test_compiled_forward_method(backend):
    """`model.forward = torch.compile(model.forward)`, as Transformers documents it: the hook stays outside."""
    model = build_small("llama")
    context = next(contexts(model))
    enable(model, backend=backend)
    question = tokens(2, QUESTION, seed=9)
    cache = StaticCache(config=model.config, max_cache_len=QUESTION + 3)
    steps = [question] + [tokens(2, 1, seed=seed) for seed in (5, 6, 7)]
    with session(model, context):
        wanted = [model(ids, past_key_values=cache).logits for ids in steps]
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
        cache = StaticCache(config=model.config, max_cache_len=QUESTION + 3)
        got = [model(ids, past_key_values=cache).logits for ids in steps]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mass_is_recorded_in_compiled_passes(backend):
    model = build_small("llama")
    context = next(contexts(model))
    enable(model, backend=backend)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with session(model, context), record_mass(model) as record:
        for _ in range(3):
            compiled(tokens(1, QUESTION, seed=9), use_cache=False)
    with session(model, context), record_mass(model) as plain:
        model(tokens(1, QUESTION, seed=9), use_cache=False)
    assert [len(calls) for calls in record.mass] == [3, 3]
    for layer, (wanted,) in enumerate(plain.mass):
        for mass in record.mass[layer]:
            torch.testing.assert_close(mass, wanted, rtol=1e-4, atol=1e-5)


def test_compiled_training_step(backend):
    model = enable(build_small("llama"), backend=backend).train()
    gate = torch.full((), 0.5, requires_grad=True)
    cache = read(build_small("llama"), tokens(1, PREFIX, seed=1))
    context = SharedContext.from_caches(cache, gates=gate)
    input_ids = tokens(2, QUESTION, seed=2)
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        gate.grad = None
        with session(model, context):
            run(input_ids, labels=input_ids, use_cache=False).loss.backward()
        gradients.append(gate.grad)
    assert gradients[0].abs() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
