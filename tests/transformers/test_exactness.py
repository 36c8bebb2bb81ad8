"""A sharer of the same weights that has read a prefix stands for the receiver reading the prefix itself."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from error_rule import assert_as_exact
from tiny_models import PREFIX, Float64, build, pad_left, read, tokens
from transformers import DynamicCache, StaticCache

from c2c_kernels.integrations.transformers import SharedContext, enable

QUESTION, STEPS = 7, 4
PREFIX_IDS = tokens(1, PREFIX, seed=1)
QUESTION_IDS = tokens(1, QUESTION, seed=2)
NEXT_IDS = tokens(1, STEPS, seed=3)
TEXT_IDS = torch.cat([PREFIX_IDS, QUESTION_IDS, NEXT_IDS], dim=1)
EXACT = {"rtol": 1e-11, "atol": 1e-11}  # float64 on the reference backend against float64 eager


def in_float64(test):
    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        with Float64(), torch.no_grad():
            test(*args, **kwargs)

    return wrapped


@torch.no_grad()
def run(model, cache=None, **kwargs):
    """Logits (1, QUESTION + STEPS, vocabulary) of a prefill and single-token steps."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = [model(QUESTION_IDS, past_key_values=cache, **kwargs).logits]
    for step in range(STEPS):
        logits.append(model(NEXT_IDS[:, step : step + 1], past_key_values=cache, **kwargs).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def oracle(family):
    with Float64():
        return build(family).double()(TEXT_IDS).logits[:, PREFIX:]


@torch.no_grad()
def by_torch(family):
    return build(family)(TEXT_IDS).logits[:, PREFIX:]


@in_float64
def test_context_is_exact_in_float64(family):
    model = build(family).double()
    context = SharedContext.from_caches(read(model, PREFIX_IDS))
    enable(model, backend="reference")
    torch.testing.assert_close(run(model, c2c=context), oracle(family), **EXACT)


def test_context_is_within_the_error_rule(family, backend):
    model = build(family)
    context = SharedContext.from_caches(read(model, PREFIX_IDS))
    enable(model, backend=backend)
    assert_as_exact("logits", run(model, c2c=context), by_torch(family), oracle(family))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_context_in_low_precision(family, backend, dtype):
    model = build(family).to(dtype)
    exact = build(family).to(dtype).double()
    with torch.no_grad():
        by_torch = model(TEXT_IDS).logits[:, PREFIX:]
        with Float64():
            wanted = exact(TEXT_IDS).logits[:, PREFIX:]
    context = SharedContext.from_caches(read(model, PREFIX_IDS))
    enable(model, backend=backend)
    assert_as_exact("logits", run(model, c2c=context), by_torch, wanted)


@in_float64
def test_static_cache_is_exact(family):
    model = build(family).double()
    context = SharedContext.from_caches(read(model, PREFIX_IDS))
    enable(model, backend="reference")
    cache = StaticCache(config=model.config, max_cache_len=QUESTION + STEPS + 5)
    torch.testing.assert_close(run(model, cache, c2c=context), oracle(family), **EXACT)


@in_float64
def test_two_segments_make_one_text(family):
    model = build(family).double()
    whole = [(layer.keys, layer.values) for layer in read(model, PREFIX_IDS).layers]
    cut = 13
    first = [(key[:, :, :cut], value[:, :, :cut]) for key, value in whole]
    second = [(key[:, :, cut:], value[:, :, cut:]) for key, value in whole]
    context = SharedContext.from_caches(first, second, positions=[torch.arange(cut), torch.arange(cut, PREFIX)])
    enable(model, backend="reference")
    torch.testing.assert_close(run(model, c2c=context), oracle(family), **EXACT)


@pytest.mark.parametrize("context_rows", [1, 3])
@in_float64
def test_left_padded_receivers(family, context_rows):
    """Every row of a left-padded batch gets what it would get alone, with one prefix for all or one each."""
    model = build(family).double()
    prefixes = tokens(context_rows, PREFIX, seed=4)
    questions = [tokens(1, length, seed=5 + length)[0] for length in (12, 5, 9)]
    with torch.no_grad():
        wanted = [
            model(torch.cat([prefixes[row % context_rows], question])[None]).logits[0, PREFIX:]
            for row, question in enumerate(questions)
        ]
    context = SharedContext.from_caches(read(model, prefixes))
    enable(model, backend="reference")
    batch, mask = pad_left(questions)
    with torch.no_grad():
        logits = model(batch, attention_mask=mask, c2c=context).logits
    for row, question in enumerate(questions):
        torch.testing.assert_close(logits[row, -len(question) :], wanted[row], **EXACT)


@pytest.mark.parametrize("side", ["right", "left by forward", "left by generate"])
@pytest.mark.parametrize("times", [1, 2])
@in_float64
def test_padded_sharers(family, side, times):
    """Sharers of different lengths in one padded batch: each row, or group of rows, continues its own text."""
    model = build(family).double()
    texts = [tokens(1, length, seed=20 + length)[0] for length in (PREFIX, 6, 15)]
    with torch.no_grad():
        wanted = torch.cat([model(torch.cat([text, QUESTION_IDS[0]])[None]).logits[:, len(text) :] for text in texts])
    batch, mask = pad_left(texts)
    positions = None
    if side == "right":
        batch = torch.stack([row.roll(-int((row == 0).sum())) for row in batch])
        mask = mask.flip(1)
        cache = read(model, batch, attention_mask=mask)
    elif side == "left by forward":
        positions = torch.arange(PREFIX)
        cache = read(model, batch, attention_mask=mask)
    else:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = read(model, batch, attention_mask=mask, position_ids=positions)
    context = SharedContext.from_caches(cache, attention_masks=mask, positions=positions)
    enable(model, backend="reference")
    with torch.no_grad():
        logits = model(QUESTION_IDS.expand(3 * times, -1), c2c=context).logits
    torch.testing.assert_close(logits, wanted.repeat_interleave(times, dim=0), **EXACT)


def test_without_context_nothing_changes(family, backend):
    """Left padding, windows, softcap and sinks included, in prefill and steps."""
    batch, mask = pad_left([tokens(1, length, seed=30 + length)[0] for length in (19, 11, 14)])
    more = tokens(3, 1, seed=40)
    longer = torch.cat([mask, torch.ones_like(more)], dim=1)

    @torch.no_grad()
    def logits(model):
        cache = DynamicCache(config=model.config)
        first = model(batch, attention_mask=mask, past_key_values=cache).logits
        return torch.cat([first[mask != 0], model(more, attention_mask=longer, past_key_values=cache).logits[:, 0]])

    with Float64():
        wanted = logits(build(family).double())
    patched = logits(enable(build(family), backend=backend))
    implementations = ["eager"]
    if build(family)._supports_sdpa and family != "gemma2":  # sdpa has no softcap
        implementations.append("sdpa")
    for implementation in implementations:
        assert_as_exact("logits", patched, logits(build(family, attention=implementation)), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_zero_gates_change_no_bit(family, backend, cache_class, dtype):
    model = build(family).to(dtype)
    cache = read(model, PREFIX_IDS)
    enable(model, backend=backend)

    def fresh():
        if cache_class is StaticCache:
            return StaticCache(config=model.config, max_cache_len=QUESTION + STEPS)
        return DynamicCache(config=model.config)

    plain = run(model, fresh())
    shut = SharedContext.from_caches(cache, gates=0.0, position_offset=0)
    assert torch.equal(run(model, fresh(), c2c=shut), plain)
    per_layer = [torch.zeros(6, 1) for _ in range(4)]
    shut = SharedContext.from_caches(cache, cache, gates=[0, per_layer], position_offset=0)
    assert torch.equal(run(model, fresh(), c2c=shut), plain)
    ajar = SharedContext.from_caches(cache, gates=1e-3, position_offset=0)
    assert not torch.equal(run(model, fresh(), c2c=ajar), plain)


def test_zero_gates_with_an_offset_only_move_the_receiver(family, backend):
    model = build(family)
    cache = read(model, PREFIX_IDS)
    enable(model, backend=backend)
    moved = torch.arange(PREFIX, PREFIX + QUESTION)[None]
    with torch.no_grad():
        plain = model(QUESTION_IDS, position_ids=moved).logits
        shut = model(QUESTION_IDS, c2c=SharedContext.from_caches(cache, gates=0.0)).logits
    assert torch.equal(shut, plain)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("PhimoeForCausalLM", {"num_local_experts": 4, "sliding_window": 8}),
        ("PhimoeForCausalLM", {"num_local_experts": 4, "sliding_window": None}),
        (
            "Qwen2MoeForCausalLM",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "shared_expert_intermediate_size": 24,
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 2,
            },
        ),
    ],
)
def test_windows_that_attention_does_not_name(name, settings):
    """Layers that slide by their mask alone window the sharer's tokens too."""
    kind = getattr(transformers, name)
    common = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.25, "pad_token_id": 0}
    config = kind.config_class(**common, **heads, **settings)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = kind(config).eval()
    wanted = by_whole_text(model)
    context = SharedContext.from_caches(read(model, PREFIX_IDS))
    enable(model, backend="reference")
    torch.testing.assert_close(run(model, c2c=context), wanted, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        weights = model(QUESTION_IDS, c2c=context, output_attentions=True).attentions
    for layer, window in enumerate(model._c2c_patch.windows):
        hidden = weights[layer][0, :, -1, QUESTION : QUESTION + PREFIX + QUESTION - (window or PREFIX + QUESTION)]
        assert not hidden.any()
        assert (weights[layer][0, :, -1, QUESTION:] != 0).any()


@torch.no_grad()
def by_whole_text(model):
    return model(TEXT_IDS).logits[:, PREFIX:]
