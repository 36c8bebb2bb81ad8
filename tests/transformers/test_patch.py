"""enable, disable, sessions, the ways a context travels, and what an enabled model can tell about its attention."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from tiny_models import PREFIX, VOCABULARY, WINDOW, Float64, build, pad_left, read, tokens
from transformers import DynamicCache, Gemma3Config, Gemma3ForConditionalGeneration, StaticCache

from c2c_kernels.integrations.transformers import SharedContext, disable, enable, record_mass, session

PREFIX_IDS, QUESTION_IDS = tokens(1, PREFIX, seed=1), tokens(1, 7, seed=2)


@pytest.fixture
def model():
    return enable(build("gemma3"), backend="reference")


@pytest.fixture
def context():
    return SharedContext.from_caches(read(build("gemma3"), PREFIX_IDS))


@pytest.fixture
def other():
    return SharedContext.from_caches(read(build("gemma3"), tokens(1, 9, seed=7)))


@torch.no_grad()
def logits(model, **kwargs):
    return model(QUESTION_IDS, **kwargs).logits


def test_enable_and_disable_restore_the_implementation():
    for implementation in ("eager", "sdpa"):
        model = build("llama", attention=implementation)
        before = logits(model)
        assert enable(model) is model
        assert model.config._attn_implementation == "c2c"
        assert enable(model, backend="reference") is model
        assert disable(model) is model
        assert model.config._attn_implementation == implementation
        assert not model._forward_pre_hooks
        assert torch.equal(logits(model), before)
        assert disable(model) is model


def test_enable_checks_the_backend(model):
    with pytest.raises(ValueError, match="backend must be one of .* got 'quick'"):
        enable(model, backend="quick")
    with pytest.raises(ValueError, match="backend 'triton' is not available"):
        enable(model, backend="triton")


def test_ways_a_context_travels(model, context, other):
    """The keyword wins over the cache, the cache over the innermost session."""
    by_context, by_other, plain = (logits(model, c2c=c) for c in (context, other, None))
    assert not torch.equal(by_context, by_other)
    assert not torch.equal(by_context, plain)
    carrying = context.attach(DynamicCache())
    assert torch.equal(logits(model, past_key_values=carrying), by_context)
    with session(model, other):
        assert torch.equal(logits(model), by_other)
        assert torch.equal(logits(model, past_key_values=context.attach(DynamicCache())), by_context)
        assert torch.equal(logits(model, c2c=context), by_context)
        assert torch.equal(logits(model, c2c=None), plain)
        with session(model, context):
            assert torch.equal(logits(model), by_context)
            with session(model, None):
                assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), by_other)
    assert torch.equal(logits(model), plain)


def test_sessions_end_with_their_exceptions(model, context):
    plain = logits(model)
    with pytest.raises(KeyError), session(model, context):
        raise KeyError("inside")
    assert torch.equal(logits(model), plain)


def test_sessions_belong_to_one_thread(model, context, other):
    plain, by_context, by_other = (logits(model, c2c=c) for c in (None, context, other))
    results = {}

    def in_thread(name, use):
        thread = threading.Thread(target=lambda: results.update({name: use()}))
        thread.start()
        thread.join()
        return results[name]

    def with_session():
        with session(model, other):
            return logits(model)

    with session(model, context):
        assert torch.equal(in_thread("none", lambda: logits(model)), plain)
        assert torch.equal(in_thread("own", with_session), by_other)
        assert torch.equal(logits(model), by_context)
    assert torch.equal(logits(model), plain)

    def held():
        with session(model, context):
            yield

    generator = held()
    next(generator)
    in_thread("ended elsewhere", generator.close)
    assert torch.equal(logits(model), plain)
    disable(model)


def test_sessions_of_one_thread_overlap(model, context, other):
    plain, by_context, by_other = (logits(model, c2c=c) for c in (None, context, other))

    def held(shared):
        with session(model, shared):
            yield

    generators = [held(context), held(other), held(context)]
    for generator in generators:
        next(generator)
    for ended, wanted in zip((0, 2, 1), (by_context, by_other, plain), strict=True):
        generators[ended].close()
        assert torch.equal(logits(model), wanted)


def test_sessions_belong_to_one_model(model, context):
    second = enable(build("gemma3"), backend="reference")
    plain = logits(second)
    with session(model, context):
        assert torch.equal(logits(second), plain)


def test_two_models_swap_roles():
    """Each reads a text of its own and answers with the other's."""
    first, second = build("qwen3", seed=1), build("qwen3", seed=2)
    texts = [tokens(1, 9, seed=3), tokens(1, 12, seed=4)]
    caches = [read(first, texts[0]), read(second, texts[1])]
    enable(first)
    enable(second)
    for reader, cache in ((first, caches[1]), (second, caches[0])):
        context = SharedContext.from_caches(cache)
        with session(reader, context):
            shared = logits(reader)
        assert shared.isfinite().all()
        assert not torch.equal(shared, logits(reader))


def test_arguments_by_position(model, context):
    mask = torch.ones_like(QUESTION_IDS)
    positions = torch.arange(7)[None]
    wanted = logits(model, c2c=context)
    with torch.no_grad():
        got = model(QUESTION_IDS, mask, positions, DynamicCache(), c2c=context).logits
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_positions_follow_the_cache_where_none_are_given(model, context, cache_class):
    def cache():
        return StaticCache(model.config, max_cache_len=12) if cache_class is StaticCache else DynamicCache()

    step = tokens(1, 1, seed=5)
    left, right = cache(), cache()
    with torch.no_grad():
        for ids, start in ((QUESTION_IDS, 0), (step, 7)):
            implied = model(ids, past_key_values=left, c2c=context).logits
            positions = torch.arange(start, start + ids.shape[1])
            given = model(ids, past_key_values=right, position_ids=positions, c2c=context).logits
            assert torch.equal(implied, given)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache, None])
def test_masks_longer_than_the_text(model, context, cache_class):
    """A mask over all that a cache can hold, left padding included, gives the positions of one that ends in time."""
    rows = [tokens(1, length, seed=length)[0] for length in (6, 3)]
    batch, mask = pad_left(rows)
    steps = [batch] if cache_class is None else [batch, tokens(2, 2, seed=8), tokens(2, 1, seed=9)]
    full = torch.cat([mask, torch.ones(2, 12 - mask.shape[1], dtype=torch.long)], dim=1)

    @torch.no_grad()
    def outputs(ending):
        cache, read_so_far, found = None, 0, []
        if cache_class is not None:
            cache = StaticCache(model.config, max_cache_len=12) if cache_class is StaticCache else DynamicCache()
        for ids in steps:
            start, read_so_far = read_so_far, read_so_far + ids.shape[1]
            positions = (full.cumsum(-1) - 1).masked_fill(full == 0, 0)[:, start:read_so_far]
            extra = {"attention_mask": full} if ending is None else {"attention_mask": full[:, :read_so_far]}
            if ending:
                extra["position_ids"] = positions
            found.append(model(ids, past_key_values=cache, c2c=context, **extra).logits)
        return torch.cat(found, dim=1)[full[:, :read_so_far] != 0]

    wanted = outputs(True)
    torch.testing.assert_close(outputs(None), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs(False), wanted, rtol=1e-5, atol=1e-5)


def test_left_padding_counts_as_generate_counts(model, context):
    rows = [tokens(1, length, seed=length)[0] for length in (6, 3)]
    batch, mask = pad_left(rows)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    with torch.no_grad():
        implied = model(batch, attention_mask=mask, c2c=context).logits
        given = model(batch, attention_mask=mask, position_ids=positions, c2c=context).logits
    assert torch.equal(implied, given)


def test_bypassing_the_hook_is_an_error_not_a_loss(model, context):
    plain = logits(model)
    with torch.no_grad():
        assert torch.equal(model.forward(QUESTION_IDS).logits, plain)
        with session(model, context):
            with pytest.raises(RuntimeError, match="a session is open"):
                model.forward(QUESTION_IDS)
            with pytest.raises(RuntimeError, match="a session is open"):
                model.model(QUESTION_IDS)
        with pytest.raises(TypeError, match="a layer got a SharedContext"):
            model.model(QUESTION_IDS, c2c=context)


def test_an_inner_model_can_be_enabled_instead(context):
    model = build("gemma3")
    enable(model.model, backend="reference")
    whole = enable(build("gemma3"), backend="reference")
    with session(model.model, context):
        assert torch.equal(logits(model), logits(whole, c2c=context))


def test_the_language_model_of_a_composite():
    """The patch goes on the language model inside; the composite's `generate` runs it as its own."""

    def composite():
        text = {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "pad_token_id": 0,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "initializer_range": 0.25,
        }
        vision = {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        }
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=100)
        torch.manual_seed(0)
        return Gemma3ForConditionalGeneration(config).eval()

    plain, model = composite(), composite()
    language_model = enable(model.model.language_model)
    prefix, question = PREFIX_IDS % 90 + 2, QUESTION_IDS % 90 + 2
    with torch.no_grad(), session(language_model, SharedContext.from_caches(read(plain, prefix))):
        wanted = plain(torch.cat([prefix, question], dim=1)).logits[:, PREFIX:]
        torch.testing.assert_close(model(question).logits, wanted, rtol=1e-4, atol=1e-4)


def test_both_levels_enabled(model, context):
    wanted = logits(model, c2c=context)
    enable(model.model, backend="reference")
    assert torch.equal(logits(model, c2c=context), wanted)
    disable(model.model)
    assert torch.equal(logits(model, c2c=context), wanted)
    disable(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("inner_first", [True, False])
@pytest.mark.parametrize("inner_leaves_first", [True, False])
def test_one_of_two_levels_is_disabled(context, inner_first, inner_leaves_first):
    model = build("gemma3")
    levels = [model.model, model]
    wanted = logits(enable(build("gemma3"), backend="reference"), c2c=context)
    for level in levels if inner_first else reversed(levels):
        enable(level, backend="reference")
    first, last = levels if inner_leaves_first else reversed(levels)
    disable(first)
    assert model.config._attn_implementation == "c2c"
    with session(last, context):
        assert torch.equal(logits(model), wanted)
        with pytest.raises(RuntimeError, match="a session is open"), torch.no_grad():
            last.forward(QUESTION_IDS)
    disable(last)
    assert model.config._attn_implementation == "eager"
    assert not any(name.startswith("_c2c") for module in model.modules() for name in vars(module))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in levels)


def test_models_loaded_with_the_implementation_can_be_disabled(context):
    model = build("gemma3", attention="c2c")
    wanted = logits(enable(build("gemma3")), c2c=context)
    enable(model)
    assert torch.equal(logits(model, c2c=context), wanted)
    assert disable(model).config._attn_implementation == "sdpa"


def test_enable_again_takes_a_changed_model_over(model, context):
    wanted = logits(model, c2c=context)
    model.set_attn_implementation("sdpa")
    enable(model, backend="reference")
    assert model.config._attn_implementation == "c2c"
    assert torch.equal(logits(model, c2c=context), wanted)
    assert disable(model).config._attn_implementation == "sdpa"


def test_a_changed_implementation_does_not_drop_the_context(model, context):
    model.set_attn_implementation("sdpa")
    assert logits(model).isfinite().all()
    with session(model, context), pytest.raises(RuntimeError, match="is 'sdpa' now, not 'c2c'"):
        logits(model)
    disable(model)
    assert model.config._attn_implementation == "sdpa"


def test_deep_copies_are_independent(model, context):
    wanted = logits(model, c2c=context)
    clone = copy.deepcopy(model)
    with session(clone, context):
        assert torch.equal(logits(clone), wanted)
        assert not torch.equal(logits(model), wanted)
    disable(model)
    assert torch.equal(logits(clone, c2c=context), wanted)
    cache = copy.deepcopy(context.attach(DynamicCache()))
    assert torch.equal(logits(clone, past_key_values=cache), wanted)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_made_inside_a_session_have_none(model, context, duplicate):
    plain, wanted = logits(model), logits(model, c2c=context)
    with session(model, context), record_mass(model) as record:
        clone = duplicate(model)
        assert torch.equal(logits(clone), plain)
    assert record.mass[0] == []
    assert torch.equal(logits(clone), plain)
    with session(clone, context):
        assert torch.equal(logits(clone), wanted)
        assert torch.equal(logits(model), plain)
    assert disable(clone).config._attn_implementation == "eager"
    assert not clone._forward_pre_hooks
    assert not clone._forward_hooks
    assert torch.equal(logits(model, c2c=context), wanted)


def test_accelerate_hooks_pass_the_context_on(model, context):
    hooks = pytest.importorskip("accelerate.hooks")
    wanted = logits(model, c2c=context)
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert torch.equal(logits(model, c2c=context), wanted)


def test_recorded_mass(family, backend):
    """The shares of own tokens and of each segment, equal to what eager attention gives those tokens."""
    model = build(family)
    whole = [(layer.keys, layer.values) for layer in read(model, PREFIX_IDS).layers]
    cut = 5
    halves = [[(k[:, :, s], v[:, :, s]) for k, v in whole] for s in (slice(0, cut), slice(cut, None))]
    positions = [torch.arange(cut), torch.arange(cut, PREFIX)]
    shared = SharedContext.from_caches(*halves, positions=positions)
    with torch.no_grad():
        eager = model(torch.cat([PREFIX_IDS, QUESTION_IDS], dim=1), output_attentions=True).attentions
    enable(model, backend=backend)
    with record_mass(model) as record:
        logits(model)
        logits(model, c2c=shared)
    assert [len(calls) for calls in record.mass] == [2] * 4
    for layer, (alone, mass) in enumerate(record.mass):
        assert alone.shape == (1, 6, 7, 1)
        assert mass.shape == (1, 6, 7, 3)
        assert mass.dtype == torch.float32
        weights = eager[layer][:, :, PREFIX:]
        wanted = torch.stack(
            [weights[..., PREFIX:].sum(-1), weights[..., :cut].sum(-1), weights[..., cut:PREFIX].sum(-1)], dim=-1
        )
        torch.testing.assert_close(mass, wanted, rtol=1e-4, atol=1e-5)
    logits(model)
    assert [len(calls) for calls in record.mass] == [2] * 4


def test_mass_with_a_context_row_per_receiver_row(backend):
    model = build("llama")
    shared = SharedContext.from_caches(read(model, tokens(2, PREFIX, seed=3)))
    enable(model, backend=backend)
    questions = tokens(4, 7, seed=4)
    with record_mass(model) as record, torch.no_grad():
        model(questions, c2c=shared)
    assert record.mass[0][0].shape == (4, 6, 7, 2)
    torch.testing.assert_close(record.mass[0][0].sum(-1), torch.ones(4, 6, 7))


def test_attention_weights(family):
    """output_attentions gives the own tokens' weights, then each segment's, as eager attention weighs them."""
    with Float64(), torch.no_grad():
        model = build(family).double()
        shared = SharedContext.from_caches(read(model, PREFIX_IDS))
        text = torch.cat([PREFIX_IDS, QUESTION_IDS], dim=1)
        eager = model(text, output_attentions=True).attentions
        eager_plain = model(QUESTION_IDS, output_attentions=True).attentions
        enable(model)
        got = model(QUESTION_IDS, c2c=shared, output_attentions=True).attentions
        plain = model(QUESTION_IDS, output_attentions=True).attentions
    for layer in range(4):
        wanted = eager[layer][:, :, PREFIX:]
        wanted = torch.cat([wanted[..., PREFIX:], wanted[..., :PREFIX]], dim=-1)
        torch.testing.assert_close(got[layer], wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(plain[layer], eager_plain[layer], rtol=1e-10, atol=1e-12)


def test_attention_weights_by_the_config():
    model = build("llama")
    shared = SharedContext.from_caches(read(model, PREFIX_IDS))
    model.config.output_attentions = True
    enable(model)
    with torch.no_grad():
        assert model(QUESTION_IDS, c2c=shared).attentions[0].shape == (1, 6, 7, 7 + PREFIX)


def test_attention_weights_from_generate():
    model = build("llama")
    shared = SharedContext.from_caches(read(model, tokens(2, PREFIX, seed=3)))
    enable(model)
    with session(model, shared):
        output = model.generate(
            tokens(2, 7, seed=4),
            max_new_tokens=3,
            num_return_sequences=2,
            do_sample=True,
            output_attentions=True,
            return_dict_in_generate=True,
        )
    assert [step[0].shape for step in output.attentions] == [
        (4, 6, 7, 7 + PREFIX),
        (4, 6, 1, 8 + PREFIX),
        (4, 6, 1, 9 + PREFIX),
    ]
    assert output.sequences.max() < VOCABULARY
    static = StaticCache(model.config, max_cache_len=12)
    with torch.no_grad():
        output = model(tokens(2, 7, seed=4), past_key_values=static, c2c=shared, output_attentions=True)
    assert output.attentions[0].shape == (2, 6, 7, 12 + PREFIX)
