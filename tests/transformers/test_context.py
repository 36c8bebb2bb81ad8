"""SharedContext: from caches, by hand, in receiver space, and in parts."""

from __future__ import annotations

import pytest
import torch
from tiny_models import PREFIX, WINDOW, Float64, build, build_small, read, tokens
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer, QuantizedLayer

import c2c_kernels as c2c
from c2c_kernels.integrations.transformers import SharedContext, enable, record_mass

PREFIX_IDS, QUESTION_IDS = tokens(1, PREFIX, seed=1), tokens(1, 7, seed=2)


@pytest.fixture
def cache():
    return read(build("gemma3"), PREFIX_IDS)


def segments(context):
    return [segment for layer in context.layers for segment in layer]


def test_defaults(cache):
    context = SharedContext.from_caches(cache)
    assert len(context.layers) == 4
    assert context.batch == 1
    assert context.position_offset.tolist() == [PREFIX]
    for layer, (segment,) in zip(cache.layers, context.layers, strict=True):
        assert segment.key.data_ptr() == layer.keys.data_ptr()
        assert segment.value.data_ptr() == layer.values.data_ptr()
        assert segment.gate is None
        assert segment.lengths is None
        assert segment.positions.tolist() == [list(range(PREFIX))]
        assert segment.visibility == "all"
    assert not isinstance(context, (dict, list, tuple))
    assert not hasattr(context, "to")
    assert repr(context) == f"SharedContext(layers=4, segments=1, batch=1, tokens={PREFIX})"


def test_several_sharers_and_their_offset():
    model = build("gemma3")
    caches = [read(model, tokens(rows, length, seed=length)) for rows, length in ((1, 9), (3, 14), (3, 5))]
    context = SharedContext.from_caches(*caches, gates=[1.0, None, 0.25], visibility=["all", "all", "causal"])
    assert context.batch == 3
    assert context.position_offset.tolist() == [14] * 3
    first, second, third = context.layers[0]
    assert first.key.shape[0] == 3
    assert first.key.data_ptr() == caches[0].layers[0].keys.data_ptr()
    assert [s.gate if s.gate is None else s.gate.item() for s in (first, second, third)] == [1.0, None, 0.25]
    assert third.visibility == "causal"
    # One tensor for all layers.
    assert len({id(layer[2].gate) for layer in context.layers}) == 1


def test_positions_and_offsets(cache):
    positions = torch.arange(PREFIX) * 2 + 3
    assert SharedContext.from_caches(cache, positions=positions).position_offset.tolist() == [2 * PREFIX + 2]
    assert SharedContext.from_caches(cache, position_offset=5).position_offset.tolist() == [5]
    assert SharedContext.from_caches(cache, position_offset=0).position_offset is None
    assert SharedContext.from_caches(cache, visibility="causal").position_offset is None
    free = SharedContext.from_caches(cache, positions=False)
    assert free.position_offset is None
    assert segments(free)[0].positions is None


def test_tokens_without_positions_ignore_windows(cache):
    """In a sliding layer every query sees a sharer without positions, and only the window's part of one with."""
    model = enable(build("gemma3"), backend="reference")
    near = SharedContext.from_caches(cache)
    free = SharedContext.from_caches(cache, positions=False, position_offset=PREFIX)
    with torch.no_grad(), record_mass(model) as record:
        model(tokens(1, WINDOW + 4, seed=3), c2c=near)
        model(tokens(1, WINDOW + 4, seed=3), c2c=free)
    mass = record.mass[0]
    assert (mass[0][0, :, WINDOW - 1 :, 1] == 0).all()
    assert (mass[0][0, :, 0, 1] > 0).all()
    assert (mass[1][0, :, :, 1] > 0).all()


def test_padding_masks():
    model = build("llama")
    batch = tokens(3, 6, seed=4)
    right = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    cache = read(model, batch)
    context = SharedContext.from_caches(cache, attention_masks=right)
    assert segments(context)[0].lengths.tolist() == [6, 2, 4]
    assert segments(context)[0].gate is None
    assert context.position_offset.tolist() == [6, 2, 4]
    holes = right.flip(1)
    with pytest.raises(ValueError, match="positions of caches\\[0\\] are needed"):
        SharedContext.from_caches(cache, attention_masks=holes)
    context = SharedContext.from_caches(cache, attention_masks=holes, positions=torch.arange(6), gates=0.5)
    assert segments(context)[0].lengths is None
    assert torch.equal(segments(context)[0].gate, 0.5 * holes[:, None])
    assert context.position_offset.tolist() == [6, 6, 6]
    counted = torch.where(holes != 0, holes.cumsum(-1) - 1, 99)  # the padding's positions do not count
    context = SharedContext.from_caches(cache, attention_masks=holes, positions=counted)
    assert context.position_offset.tolist() == [6, 2, 4]
    assert segments(SharedContext.from_caches(cache, attention_masks=torch.ones(3, 6)))[0].lengths is None


def test_static_caches_are_read_up_to_their_length():
    model = build("gemma3")
    static = StaticCache(model.config, max_cache_len=20)
    with torch.no_grad():
        model(tokens(1, 5, seed=5), past_key_values=static)
    dynamic = read(model, tokens(1, 5, seed=5))
    for (one,), (other,) in zip(
        SharedContext.from_caches(static).layers, SharedContext.from_caches(dynamic).layers, strict=True
    ):
        torch.testing.assert_close(one.key, other.key)
        torch.testing.assert_close(one.value, other.value)


def test_sliding_caches_that_dropped_nothing():
    model = build("gemma3")
    sliding = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, WINDOW - 1, seed=5), past_key_values=sliding)
    assert SharedContext.from_caches(sliding).position_offset.tolist() == [WINDOW - 1]
    with torch.no_grad():
        model(tokens(1, 1, seed=5), past_key_values=sliding)
    with pytest.raises(ValueError, match=r"caches\[0\].layers\[0\] is a sliding window that has dropped 1 of 8 tokens"):
        SharedContext.from_caches(sliding)


class _Quantised(QuantizedLayer):
    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


def _filled(layer):
    layer.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
    return Cache(layers=[layer])


@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (lambda: _filled(_Quantised()), ValueError, r"layers\[0\] is a _Quantised"),
        (lambda: DynamicCache(offloading=True), ValueError, "is offloaded"),
        (lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()), ValueError, "self_attention_cache"),
        (lambda: Cache(layers=[LinearAttentionLayer()]), ValueError, "LinearAttentionLayer"),
        (lambda: Cache(layers=[DynamicLayer()]), ValueError, r"layers\[0\] is empty"),
        (DynamicCache, ValueError, "has no layers"),
        (lambda: [torch.zeros(1)], TypeError, r"caches\[0\]\[0\] must be a \(key, value\) pair"),
        (lambda: 3, TypeError, "must be a Transformers Cache"),
        (lambda: [(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4))], ValueError, "layer 0: key and value"),
        (lambda: [(torch.zeros(1, 2, n, 4),) * 2 for n in (3, 4)], ValueError, "layer 1: batch and len are 1 and 4"),
    ],
)  # fmt: skip
def test_unreadable_caches(make, error, reason):
    with pytest.raises(error, match=reason):
        SharedContext.from_caches(make())


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"gates": -1.0}, ValueError, r"gates of caches\[0\] must be finite and >= 0"),
        ({"gates": torch.tensor([0.5, torch.nan, 1.0] * 7)}, ValueError, "and not NaN"),
        ({"gates": "wide"}, TypeError, "must be None, a number or a tensor, got str"),
        ({"gates": torch.ones(PREFIX, dtype=torch.long)}, TypeError, "floating point"),
        ({"gates": [1.0, 2.0]}, ValueError, r"one entry per receiver layer \(4\), got 2"),
        ({"positions": torch.arange(3)}, ValueError, r"positions of caches\[0\] must be \(21,\) or \(1, 21\)"),
        ({"positions": torch.ones(PREFIX)}, TypeError, "must be integers"),
        ({"positions": False, "visibility": "causal"}, ValueError, "needs positions"),
        ({"visibility": "some"}, ValueError, 'must be "all" or "causal", got \'some\''),
        ({"attention_masks": torch.ones(1, 3)}, ValueError, r"\(1, 21\) like its cache, got \(1, 3\)"),
        ({"layer_maps": [[0, 1, 2, 9]]}, ValueError, "layer 3 reads sharer layer 9, there are 4"),
        ({"projectors": 3}, TypeError, "list or mapping over receiver layers"),
        ({"projectors": [[None] * 2]}, ValueError, "layer_maps of .* is needed: there are 2 projectors for 4"),
        ({"projectors": {0: None}}, ValueError, "no entry for receiver layer 1"),
        ({"projectors": [[(1,)] * 4]}, ValueError, "got 1 entries"),
        ({"projectors": [[object()] * 4]}, TypeError, "object has no key_proj"),
        ({"position_offset": -1}, ValueError, "position_offset must be >= 0, got -1"),
        ({"position_offset": torch.ones(3, dtype=torch.long)}, ValueError, r"a number or \(1,\), got \(3,\)"),
        ({"position_offset": 0.5}, TypeError, "must be integers"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(cache, arguments, error, reason):
    with pytest.raises(error, match=reason):
        SharedContext.from_caches(cache, **arguments)


def test_caches_that_do_not_fit_together(cache):
    with pytest.raises(ValueError, match="at least one cache"):
        SharedContext.from_caches()
    with pytest.raises(ValueError, match="one entry per cache \\(2\\), got 3"):
        SharedContext.from_caches(cache, cache, gates=[1, 1, 1])
    model = build("gemma3")
    with pytest.raises(ValueError, match=r"batch sizes must be equal or 1, got \[2, 3\]"):
        SharedContext.from_caches(read(model, tokens(2, 4, seed=1)), read(model, tokens(3, 4, seed=1)))
    with pytest.raises(ValueError, match=r"different numbers of receiver layers: \[2, 4\]"):
        SharedContext.from_caches(cache, read(build_small("gemma3"), PREFIX_IDS))


def test_layers_given_by_hand(cache):
    key, value = cache.layers[0].keys, cache.layers[0].values
    segment = c2c.SharerSegment(key, value)
    context = SharedContext([[segment], [], [segment], []])
    assert not context.positioned
    model = enable(build("gemma3"), backend="reference")
    with torch.no_grad():
        assert model(QUESTION_IDS, c2c=context).logits.isfinite().all()
    with pytest.raises(ValueError, match="at least one segment"):
        SharedContext([[], []])
    with pytest.raises(TypeError, match=r"layers\[0\]\[0\] must be a SharerSegment, got tuple"):
        SharedContext([[(key, value)]])
    with pytest.raises(ValueError, match="same batch"):
        SharedContext([[segment], [c2c.SharerSegment(key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1))]])
    with pytest.raises(ValueError, match=r"layers\[0\]\[0\].gate is on meta, its key on cpu"):
        SharedContext([[c2c.SharerSegment(key, value, gate=torch.ones((), device="meta"))]])
    with pytest.raises(ValueError, match=r"layers\[0\]\[1\]: .* differs from the first segment's"):
        SharedContext([[segment, c2c.SharerSegment(key[:, :1], value[:, :1])]])
    with pytest.raises(TypeError, match="cache must be a Transformers Cache, got list"):
        context.attach([])


class _LayerProjector:
    def __init__(self, weight, bias):
        self.key_proj, self.value_proj, self.key_bias, self.value_bias = weight, (weight, torch.eye(32)), bias, bias


@pytest.mark.parametrize("given", ["tuples", "mapping", "objects"])
def test_projectors_and_layer_maps(given):
    """A sharer with fewer layers and another width, through projectors, equals its projected cache read directly."""
    sharer = build_small("llama", seed=3, num_key_value_heads=2, head_dim=16, hidden_size=48)
    cache = read(sharer, PREFIX_IDS)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(2, 16, 32, generator=generator) * 0.3 for _ in range(4)]
    biases = [torch.randn(2, 16, generator=generator) for _ in range(4)]
    if given == "objects":
        projectors = [_LayerProjector(w, b) for w, b in zip(weights, biases, strict=True)]
    else:
        projectors = [(w, w, b, b) for w, b in zip(weights, biases, strict=True)]
    if given == "mapping":
        projectors = dict(enumerate(projectors))
    layer_map = [0, None, 1, 1]
    context = SharedContext.from_caches(cache, projectors=projectors, layer_maps=layer_map, gates=0.7)
    assert [len(layer) for layer in context.layers] == [1, 0, 1, 1]

    def flat(x):
        return x.transpose(1, 2).flatten(2)

    by_hand = []
    for source, weight, bias in zip(layer_map, weights, biases, strict=True):
        if source is None:
            by_hand.append([])
            continue
        key, value = (
            torch.einsum("bnw,hdw->bhnd", flat(x), weight) + bias[:, None]
            for x in (cache.layers[source].keys, cache.layers[source].values)
        )
        by_hand.append(
            [c2c.SharerSegment(key, value, gate=torch.tensor(0.7), positions=torch.arange(PREFIX).expand(1, -1))]
        )
    model = enable(build("llama"), backend="reference")
    with torch.no_grad():
        wanted = model(QUESTION_IDS, c2c=SharedContext(by_hand, PREFIX)).logits
        got = model(QUESTION_IDS, c2c=context).logits
        materialized = context.materialize(backend="reference")
        again = model(QUESTION_IDS, c2c=materialized).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-4)
    assert all(segment.key_proj is None and segment.key_bias is None for segment in segments(materialized))
    assert materialized.position_offset.tolist() == [PREFIX]


def test_materialize_keeps_plain_segments(cache):
    context = SharedContext.from_caches(cache, gates=0.5)
    assert [a is b for a, b in zip(segments(context), segments(context.materialize()), strict=True)] == [True] * 4


def test_shards_for_tensor_parallelism():
    """Each rank attends with its heads and its shard; together they give the whole layer."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key, value = random(2, 6, 3, 8), random(2, 2, 5, 8), random(2, 2, 5, 8)
    plain = c2c.SharerSegment(random(2, 2, 7, 8), random(2, 2, 7, 8), gate=random(6, 1).abs())
    projected = c2c.SharerSegment(
        random(2, 3, 4, 8),
        random(2, 3, 4, 8),
        key_proj=(random(2, 8, 5), random(5, 24)),
        value_proj=random(2, 8, 24),
        key_bias=random(2, 8),
        gate=random(2, 1, 4).abs(),
    )
    whole = SharedContext([[plain, projected]], position_offset=7)
    wanted = c2c.merged_attention(query, key, value, whole.layers[0], is_causal=True)
    parts = [
        c2c.merged_attention(
            query[:, 3 * rank : 3 * rank + 3],
            key[:, rank : rank + 1],
            value[:, rank : rank + 1],
            whole.shard(rank, 2).layers[0],
            is_causal=True,
        )
        for rank in range(2)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, rtol=1e-12, atol=1e-12)
    assert whole.shard(1, 2).position_offset.tolist() == [7, 7]
    with pytest.raises(ValueError, match="key: 2 heads do not divide by world_size 3"):
        whole.shard(0, 3)
    with pytest.raises(ValueError, match="rank must be in 0 .. 1, got 2"):
        whole.shard(2, 2)


@torch.no_grad()
def test_rows_are_views_and_kept():
    model = build("gemma3")
    shared = SharedContext.from_caches(read(model, tokens(2, 5, seed=1)), gates=torch.ones(2, 6, 5))
    groups = shared.rows(6)
    assert shared.rows(6) is groups
    assert [len(layer) for layer in groups] == [2] * 4
    for row, (segment,) in enumerate(groups[0]):
        original = shared.layers[0][0]
        for field in ("key", "value", "gate", "positions"):
            expanded, whole = getattr(segment, field), getattr(original, field)
            assert expanded.shape[0] == 3
            assert expanded.stride(0) == 0
            assert expanded.data_ptr() == whole[row].data_ptr()
    assert shared.offset_rows(6).tolist() == [[5]] * 6
    assert shared.rows(2)[0][0] is shared.layers[0]


def test_a_batch_per_context_row_equals_single_calls():
    model = build("gemma2").double()
    shared = read(model, tokens(2, PREFIX, seed=8))
    enable(model, backend="reference")
    questions = tokens(4, 7, seed=9)
    with Float64(), torch.no_grad():
        together = model(questions, c2c=SharedContext.from_caches(shared)).logits
        for row in range(4):
            single = [(x.keys[row // 2, None], x.values[row // 2, None]) for x in shared.layers]
            alone = model(questions[row, None], c2c=SharedContext.from_caches(single)).logits
            torch.testing.assert_close(together[row, None], alone, rtol=1e-11, atol=1e-11)
