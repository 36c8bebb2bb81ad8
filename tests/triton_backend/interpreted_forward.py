"""The Triton kernels in Triton's interpreter, or on a GPU (C2C_TRITON_DEVICE): run by test_processes.py."""

from __future__ import annotations

import pytest
import test_merged_attention
import torch
from attention_cases import Plan, SegmentPlan, build, reference_call
from error_rule import assert_as_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import DTYPES, plans, seeds, segments
from test_merged_attention import run
from test_project_kv import at_dtype
from test_project_kv import build as build_projection
from triton.runtime.interpreter import interpreter_builder
from triton_calls import CALLS
from triton_device import DEVICE, ON_GPU, absorbed_where_it_fits, examples, here, on_triton, there

import c2c_kernels as c2c


def check(plan: Plan, seed: int) -> None:
    test_merged_attention.check(
        plan, seed, lambda call: absorbed_where_it_fits(lambda there: run(there, "triton"), call)
    )  # fmt: skip


@given(plans(max_length=130, max_queries=33), seeds)
@settings(max_examples=examples(10))
def test_attention_matches_reference(plan, seed):
    check(plan, seed)


ABSORBED = {
    "gates and lengths": Plan(torch.bfloat16, 2, 2, 4, 1, 300, 40, 64, is_causal=True, lengths=True, segments=[
        SegmentPlan(700, 2, 24, 40, "dense", bias=True, gate="full", lengths=True), SegmentPlan(33)
    ]),
    "float32": Plan(torch.float32, 2, 2, 2, 1, 0, 40, 64, segments=[SegmentPlan(300, 2, 24, 40, "dense", bias=True)]),
    "float16": Plan(torch.float16, 2, 2, 4, 3, 70, 40, 64, segments=[
        SegmentPlan(70, 2, 24, 40, "dense", gate="token")
    ]),
    "low rank, int8, index": Plan(
        torch.bfloat16, 1, 2, 3, 2, 50, 40, 64, is_causal=True, window=40, softcap=3.0, sinks=True,
        query_positions=True, segments=[
            SegmentPlan(300, 1, 24, 24, "low_rank", bias=True, positions="shuffled", visibility="causal"),
            SegmentPlan(90, 3, 16, 8, "dense", quantised=True, index=True),
            SegmentPlan(0, 2, 16, 16, "dense"),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ABSORBED)
def test_absorbed_segments(name):
    plan = ABSORBED[name]
    plan.strategy = "absorb"
    test_merged_attention.check(plan, 1, lambda call: here(run(there(call), "triton")))


@pytest.mark.skipif(ON_GPU, reason="a device starts programs in its own order")
@pytest.mark.parametrize("name", ABSORBED)
def test_programs_of_absorbed_segments_may_start_in_any_order(name, monkeypatch):
    """Nothing else runs beside a program here: those of raw tokens, which wait for folded queries, come first."""
    call = build(ABSORBED[name], 1)
    call["strategy"] = "absorb"
    forwards = run(call, "triton")
    place = interpreter_builder.set_grid_idx
    last_first = lambda x, y, z: place(interpreter_builder.grid_dim[0] - 1 - x, y, z)  # noqa: E731
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", last_first)
    for ours, wanted in zip(run(call, "triton"), forwards, strict=True):
        assert torch.equal(ours, wanted)


SEGMENTS = [
    SegmentPlan(130, gate="full", lengths=True, positions="shuffled", visibility="causal"),
    SegmentPlan(0),
    SegmentPlan(33, gate="head", quantised=True, index=True),
    SegmentPlan(70, 2, 24, 24, "low_rank", bias=True, gate="token"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", [1, 5, 70])
def test_every_feature_at_once(dtype, q_len):
    check(
        Plan(
            dtype, 2, 2 if q_len == 1 else 1, 4, q_len, 300, 40, 64, is_causal=True, window=40, softcap=2.0, sinks=True,
            lengths=True, mask="additive", query_positions=True, segments=SEGMENTS,
        ),
        3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("q_len", "sinks", "dtype"),
    [
        (1, False, torch.float32), (40, True, torch.float32), (1, True, torch.bfloat16), (40, False, torch.bfloat16),
        (1, False, torch.float16),
    ],
)  # fmt: skip
def test_empty_and_closed_segments_change_no_bit(q_len, sinks, dtype):
    query = torch.randn(1, 4, q_len, 32, dtype=dtype)
    key, value = (torch.randn(1, 2, 300 if q_len == 1 else 100, 32, dtype=dtype) for _ in range(2))
    logits = torch.randn(4) if sinks else None
    wide = tuple(torch.randn(1, 2, 70, 32, dtype=dtype) for _ in range(2))
    raw, proj = torch.randn(1, 3, 70, 8, dtype=dtype), torch.randn(2, 32, 24, dtype=dtype)
    codes, scales = torch.ones(1, 2, 70, 32, dtype=torch.int8), torch.ones(1, 2, 70)
    single = torch.randn(1, 2, 70, 32)  # wider than the queries, where these have 16 bits
    neutral = [
        c2c.SharerSegment(single, single, gate=torch.zeros(1, 1, 70)),
        c2c.SharerSegment(*wide, gate=torch.zeros(1, 4, 70)),
        c2c.SharerSegment(codes, codes, key_scale=scales, value_scale=scales, gate=torch.zeros(1)),
        c2c.SharerSegment(wide[0][:, :, :0], wide[1][:, :, :0]),
        c2c.SharerSegment(raw[:, :, :0], raw[:, :, :0], proj, proj),
        c2c.SharerSegment(*wide, gate=torch.zeros(1)),
        c2c.SharerSegment(raw, raw, proj, proj, gate=torch.zeros(1, 4, 70)),
        c2c.SharerSegment(*wide, lengths=torch.zeros(1, dtype=torch.int64)),
    ]
    options = {"is_causal": True, "sinks": logits, "return_lse": True, "return_mass": True}
    plain = on_triton(c2c.merged_attention, query, key, value, **options)
    for parts in (*([part] for part in neutral), neutral):
        out, lse, mass = on_triton(c2c.merged_attention, query, key, value, parts, **options)
        assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])
        assert torch.equal(mass[..., :1], plain[2]) and not mass[..., 1:].any()


@pytest.mark.parametrize("q_len", [3, 50])
def test_rows_that_see_nothing(q_len):
    query, key = torch.randn(2, 2, q_len, 16), torch.randn(2, 1, 5, 16)
    mask = torch.zeros(2, 1, q_len, 5, dtype=torch.bool)
    mask[1, 0, 2] = True
    options = {"return_lse": True, "return_mass": True}
    out, lse, mass = on_triton(c2c.merged_attention, query, key, key, attn_mask=mask, **options)
    assert not out[0].any() and (lse[0] == -torch.inf).all() and not mass[0].any()
    assert out[1, :, 2].any() and lse[1, :, 2].isfinite().all()
    out, lse, mass = on_triton(c2c.merged_attention, query, key[:, :, :0], key[:, :, :0], **options)
    assert not out.any() and (lse == -torch.inf).all() and not mass.any()


@pytest.mark.parametrize("q_len", [3, 50])
def test_the_lowest_finite_mask_weighs_but_hides_nothing(q_len):
    query, key, value = torch.randn(1, 2, q_len, 16), torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
    mask = torch.zeros(1, 1, q_len, 20)
    mask[..., 0, :] = mask[..., 1, 5] = torch.finfo(torch.float32).min
    mask[..., 0, 7] = -torch.inf
    options = {"return_lse": True}
    out, lse = on_triton(c2c.merged_attention, query, key, value, attn_mask=mask, **options)
    assert lse.isfinite().all()
    assert torch.allclose(out[0, :, 0], value[0, :, torch.arange(20) != 7].mean(1), rtol=0, atol=2**-22)
    hidden = mask.masked_fill(mask < -1e30, -torch.inf)
    hidden[..., 0, :] = 0
    theirs = on_triton(c2c.merged_attention, query, key, value, attn_mask=hidden, **options)
    assert torch.equal(out[:, :, 1:], theirs[0][:, :, 1:]) and torch.equal(lse[:, :, 1:], theirs[1][:, :, 1:])


def test_gradients_under_the_lowest_finite_mask():
    """Where the first row sees one token, it weighs 1; a token that others see as well weighs nothing."""
    tensors = [torch.randn(1, 1, n, 16, requires_grad=True) for n in (3, 20, 20)]
    mask = torch.zeros(1, 1, 3, 20)
    mask[..., 0, :] = -torch.inf
    mask[..., 5] = torch.finfo(torch.float32).min
    out = on_triton(c2c.merged_attention, *tensors, attn_mask=mask)
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[2][:, :, 5] == 1).all()


@pytest.mark.parametrize("q_len", [1, 40])
def test_lengths_have_a_stride(q_len):
    """Of the own cache, of a segment and of a projected one."""
    parts = [SegmentPlan(30), SegmentPlan(20, projector="dense")]
    call = build(Plan(torch.float32, 3, 1, 1, q_len, 40, 16, 16, segments=parts), 4)
    apart, packed = torch.tensor([5, 99, 17, 99, 12, 99])[::2], torch.tensor([5, 17, 12])
    found = []
    for strategy in ("materialize", "absorb") if q_len == 1 else ("materialize",):
        for lengths in (apart, packed):
            call.update(lengths=lengths, strategy=strategy)
            for segment in call["segments"]:
                segment.lengths = lengths
            found.append(absorbed_where_it_fits(lambda there: run(there, "triton"), call)[0])
        assert torch.equal(*found[-2:])


@pytest.mark.parametrize("shape", [(0, 4, 3, 16), (2, 4, 0, 16)])
def test_empty_batches_and_queries(shape):
    key = torch.randn(shape[0], 2, 5, 16)
    out, lse, mass = on_triton(c2c.merged_attention, torch.randn(shape), key, key, return_lse=True, return_mass=True)
    assert out.shape == shape and lse.shape == shape[:3] and mass.shape == (*shape[:3], 1)


@given(
    segments(130), st.sampled_from(DTYPES), st.integers(1, 3), st.integers(1, 3), st.sampled_from((16, 40, 64)),
    st.booleans(), st.booleans(), seeds,
)  # fmt: skip
@settings(max_examples=examples(12))
def test_projection_matches_reference(part, dtype, batch, kv_heads, dim, remove, apply, seed):
    segment, rope = build_projection(part, dtype, batch, kv_heads, dim, remove, apply, seed)
    ours = on_triton(c2c.project_kv, segment, rope=rope)
    oracle = at_dtype(segment, rope, torch.float64, torch.float64)
    theirs = at_dtype(segment, rope, dtype, dtype)
    for name, mine, torchs, exact in zip(("key", "value"), ours, theirs, oracle, strict=True):
        assert_as_exact(name, mine, torchs, exact)


@pytest.mark.parametrize("length", [1, 70])
def test_projected_into_the_slice_of_a_cache_and_nowhere_else(length):
    segment = c2c.SharerSegment(
        torch.randn(2, 3, length, 24), torch.randn(2, 3, length, 24), torch.randn(2, 40, 72), torch.randn(2, 56, 72)
    )
    caches = [torch.full((2, 2, length + 11, dim), torch.nan, device=DEVICE) for dim in (40, 56)]
    views = tuple(cache[:, :, 4 : 4 + length] for cache in caches)
    c2c.project_kv(there(segment), out=views, backend="triton")
    for cache, view, wanted in zip(
        here(caches), here(views), c2c.project_kv(segment, backend="reference"), strict=True
    ):
        torch.testing.assert_close(view, wanted)
        assert cache[:, :, :4].isnan().all() and cache[:, :, 4 + length :].isnan().all()


def test_every_e4m3_code():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(1, 1, 16, 16)
    scale = torch.full((1, 1, 16), 0.5)
    segment = c2c.SharerSegment(codes, codes, key_scale=scale, value_scale=scale)
    key, value = on_triton(c2c.project_kv, segment)
    torch.testing.assert_close(key, codes.float() * 0.5, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(value, key, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("q_len", [1, 40])
def test_quantised_segments_are_read_in_place(dtype, q_len):
    query, key, value = (torch.randn(2, heads, n, 32) for heads, n in ((4, q_len), (2, 50), (2, 50)))
    stored = [(torch.randn(2, 2, 77, 32) * 30).to(dtype) for _ in range(2)]
    scales = [torch.rand(2, 2, 77) * 0.1 for _ in range(2)]
    segment = c2c.SharerSegment(*stored, key_scale=scales[0], value_scale=scales[1])
    wide = c2c.SharerSegment(*(x.float() * s.unsqueeze(-1) for x, s in zip(stored, scales, strict=True)))
    exact = c2c.merged_attention(*(x.double() for x in (query, key, value)), [
        c2c.SharerSegment(wide.key.double(), wide.value.double())
    ])  # fmt: skip
    theirs = c2c.merged_attention(query, key, value, [wide], backend="reference")
    assert_as_exact("out", on_triton(c2c.merged_attention, query, key, value, [segment]), theirs, exact)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("q_len", [1, 70])
def test_scales_of_values_below_the_range_of_float16(dtype, q_len):
    """One token outweighs 3000 others, which together are as much: their weights times scales are below 6e-8."""
    query = torch.ones(1, 1, q_len, 16, dtype=torch.float16)
    own = torch.zeros(1, 1, 0, 16, dtype=torch.float16)
    codes = torch.full((1, 1, 3001, 16), 4.0)
    codes[:, :, 0] = 20.0
    key_scale, value_scale = torch.full((1, 1, 3001), 0.125), torch.full((1, 1, 3001), 1e-4)
    segment = c2c.SharerSegment(codes.to(dtype), codes.to(dtype), key_scale=key_scale, value_scale=value_scale)
    wide = c2c.SharerSegment(
        codes.double() * key_scale.double()[..., None], codes.double() * value_scale.double()[..., None]
    )
    exact = c2c.merged_attention(query.double(), own.double(), own.double(), [wide])
    theirs = c2c.merged_attention(query, own, own, [segment], backend="reference")
    ours = on_triton(c2c.merged_attention, query, own, own, [segment])
    assert_as_exact("out", ours, theirs, exact, scale=exact.max().item())


@pytest.mark.parametrize(
    ("q_len", "window"), [(20, 2**31 - 50), (20, 2**31 - 1), (20, 2**31), (20, 2**40), (70, 2**31 - 50), (70, 2**31)]
)
def test_windows_wider_than_any_cache_hide_nothing(window, q_len):
    """Also from queries whose positions are below 0, where a position less the window has more than 32 bits."""
    query, key = torch.randn(1, 2, q_len, 16), torch.randn(1, 2, 5, 16)
    mine = on_triton(c2c.merged_attention, query, key, key, window=window)
    torch.testing.assert_close(mine, c2c.merged_attention(query, key, key, backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_states_are_merged(dtype, count):
    outs = [torch.randn(2, 5, 7, 40, dtype=dtype).transpose(1, 2)[:, 1:] for _ in range(count)]
    lses = [torch.randn(2, 7, 5)[:, 1:] * 9 for _ in range(count)]
    lses[0][1] = -torch.inf
    outs[0][1] = torch.nan
    lses[-1][1, 2] = -torch.inf
    out, lse = on_triton(c2c.merge_states, outs, lses)
    exact = c2c.merge_states([o.double() for o in outs], [s.double() for s in lses], backend="reference")
    theirs = c2c.merge_states(outs, lses, backend="reference")
    assert_as_exact("out", out, theirs[0], exact[0])
    assert_as_exact("lse", lse, theirs[1], exact[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_caches_are_quantised_as_by_the_reference(dtype):
    x = (torch.randn(2, 3, 37, 40) * torch.logspace(-3, 3, 37).reshape(37, 1)).to(dtype).transpose(1, 2)
    x[0, 0, 0] = 0
    x[0, 0, 1, 3] = torch.inf
    x[0, 0, 2, 3] = torch.nan
    mine, wanted = on_triton(c2c.quantize_kv, x, -x), c2c.quantize_kv(x, -x, backend="reference")
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(ON_GPU, reason="values on a GPU are not looked at")
def test_values_that_no_kernel_takes_are_refused():
    query, key = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 5, 16)
    refused = [
        ("segments", {"segments": [c2c.SharerSegment(key, key, lengths=torch.tensor([6]))]}),
        ("gate", {"segments": [c2c.SharerSegment(key, key, gate=torch.tensor([-1.0]))]}),
        ("index", {"segments": [c2c.SharerSegment(key, key, index=torch.tensor([5]))]}),
        ("lengths", {"lengths": torch.tensor([9])}),
    ]
    for word, options in refused:
        with pytest.raises(ValueError, match=word):
            c2c.merged_attention(query, key, key, backend="triton", **options)
    wide = torch.randn(1, 2, 5, 264)
    with pytest.raises(ValueError, match="supports head_dim up to 256; got 264"):
        c2c.merged_attention(wide, wide, wide, backend="triton")
    raw, proj = torch.randn(1, 2, 5, 520), torch.randn(2, 16, 1040)
    with pytest.raises(ValueError, match=r"absorbs a sharer's width .* segments\[0\] has width 2048, query 2 x 1"):
        c2c.merged_attention(
            query, key, key, [c2c.SharerSegment(raw, raw, proj, proj)], strategy="absorb", backend="triton"
        )
    with pytest.raises(ValueError, match="supports bfloat16, float16, float32; got float64"):
        c2c.merged_attention(query.double(), key.double(), key.double(), backend="triton")


@pytest.mark.skipif(ON_GPU, reason="about the interpreter")
def test_the_interpreter_is_taken_only_by_name():
    (record,) = (r for r in c2c.backends() if r.name == "triton")
    assert record.available and record.isa == "interpreter" and record.devices == ()
    x = torch.randn(1, 2, 3, 16)
    assert torch.equal(c2c.merged_attention(x, x, x), c2c.merged_attention(x, x, x, backend="cpu"))


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith(("decode", "prefill"))])
def test_what_is_captured_on_a_gpu_is_right(name):
    """The attention calls of gpu_only.py, which compares them with themselves."""
    function, (query, key, value, parts), options = CALLS[name]()
    ours = on_triton(function, query, key, value, parts, **options)
    absent = dict.fromkeys(("attn_mask", "query_positions", "lengths", "window", "segment_window", "softcap", "sinks"))
    call = absent | {"query": query, "key": key, "value": value, "segments": parts} | options
    oracle, theirs = reference_call(call, torch.float64), reference_call(call, query.dtype, query.dtype)
    for result, mine, torchs, exact in zip(("out", "lse"), ours, theirs, oracle, strict=False):
        assert_as_exact(result, mine, torchs, exact)
