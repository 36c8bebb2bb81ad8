"""Forward `merged_attention`: the reference against a naive oracle, the CPU kernels against the reference."""

from __future__ import annotations

import naive
import pytest
import torch
from attention_cases import Plan, SegmentPlan, build, reference_call
from error_rule import assert_as_exact
from hypothesis import given, settings
from plans import DTYPES, HEAD_DIMS, plans, seeds

import c2c_kernels as c2c


def run(call: dict, backend: str = "cpu"):
    arguments = dict(call)
    query, key, value, segments = (arguments.pop(name) for name in ("query", "key", "value", "segments"))
    return c2c.merged_attention(
        query, key, value, segments, **arguments, return_lse=True, return_mass=True, backend=backend
    )


def check(plan: Plan, seed: int, ours_of=run) -> None:
    """Our result, PyTorch's in the same dtype, and the oracle in float64."""
    check_call(build(plan, seed), ours_of)


def check_call(call: dict, ours_of=run) -> None:
    dtype = call["query"].dtype
    ours = ours_of(call)
    oracle = reference_call(call, torch.float64)
    theirs = reference_call(call, dtype, dtype)
    for name, mine, torchs, exact in zip(("out", "lse", "mass"), ours, theirs, oracle, strict=True):
        assert_as_exact(name, mine, torchs, exact)


@given(plans(max_length=7, max_queries=2), seeds)
@settings(max_examples=40)
def test_reference_is_the_mathematics(plan, seed):
    plan.dtype, plan.head_dim, plan.value_dim = torch.float32, 8, 8
    plan.segments = [part for part in plan.segments if part.length <= 5]
    call = build(plan, seed)
    for name, got, exact in zip(
        ("out", "lse", "mass"), reference_call(call, torch.float64), naive.attention(call), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.sanitize
@given(plans(), seeds)
@settings(max_examples=500)
def test_cpu_matches_reference(plan, seed):
    check(plan, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("q_len", [1, 37])
def test_head_dims(dtype, head_dim, q_len):
    segment = SegmentPlan(length=70, heads=3, key_dim=40, value_dim=24, projector="dense", gate="full")
    check(Plan(dtype, 2, 2, 3, q_len, 90, head_dim, head_dim, is_causal=True, strategy="absorb", segments=[segment]), 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_decode_is_split_over_tokens(dtype):
    segment = SegmentPlan(length=5000, heads=2, key_dim=64, value_dim=64, projector="dense")
    check(Plan(dtype, 1, 1, 2, 1, 9001, 64, 64, is_causal=True, strategy="absorb", segments=[segment]), 3)


@pytest.mark.parametrize(("kv_heads", "group", "q_len"), [(8, 2, 1), (1, 7, 2), (13, 1, 1)])
@pytest.mark.parametrize(("length", "heads", "dim"), [(513, 2, 64), (333, 3, 48), (256, 1, 256), (41, 2, 24)])
def test_absorbed_rows_that_fill_one_vector(kv_heads, group, q_len, length, heads, dim):
    segment = SegmentPlan(length, heads, dim, dim, "dense", bias=True, gate="full", lengths=True)
    call = {"is_causal": True, "lengths": True, "strategy": "absorb"}
    check(Plan(torch.bfloat16, 2, kv_heads, group, q_len, 70, 64, 40, segments=[segment], **call), 3)


@pytest.mark.parametrize("strategy", ["absorb", "materialize"])
def test_long_prefill(strategy):
    segment = SegmentPlan(length=700, heads=2, key_dim=64, value_dim=64, projector="dense", positions="shared")
    plan = Plan(torch.float32, 1, 2, 2, 600, 900, 64, 64, is_causal=True, window=500, segments=[segment])
    plan.strategy = strategy
    check(plan, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_sum_exp_is_exact_to_float32_whatever_is_stored(dtype):
    """Two bytes are storage: weights are summed in float32, before matrix tiles round them."""
    call = build(Plan(dtype, 1, 1, 2, 200, 300, 64, 64, is_causal=True), 5)
    theirs, exact = (reference_call(call, precision)[1] for precision in (torch.float32, torch.float64))
    assert_as_exact("lse", run(call)[1], theirs, exact)


def test_concatenation_is_sdpa():
    query, key, value = torch.randn(2, 6, 5, 32), torch.randn(2, 3, 9, 32), torch.randn(2, 3, 9, 32)
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    segment = c2c.SharerSegment(key[:, :, :4], value[:, :, :4])
    for backend in ("cpu", "reference"):
        out = c2c.merged_attention(query, key[:, :, 4:], value[:, :, 4:], [segment], backend=backend)
        torch.testing.assert_close(out, whole)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("q_len", [1, 3, 40])
@pytest.mark.parametrize("sinks", [False, True])
def test_empty_and_closed_segments_change_no_bit(backend, q_len, sinks):
    query, key, value = torch.randn(2, 4, q_len, 64), torch.randn(2, 2, 130, 64), torch.randn(2, 2, 130, 64)
    logits = torch.randn(4) if sinks else None
    proj = torch.randn(2, 64, 48)
    raw = torch.randn(2, 3, 70, 16)
    wide = (torch.randn(2, 2, 70, 64), torch.randn(2, 2, 70, 64))
    neutral = [
        c2c.SharerSegment(wide[0][:, :, :0], wide[1][:, :, :0]),
        c2c.SharerSegment(raw[:, :, :0], raw[:, :, :0], proj, proj),
        c2c.SharerSegment(*wide, gate=torch.zeros(1)),
        c2c.SharerSegment(raw, raw, proj, proj, gate=torch.zeros(2, 4, 70)),
        c2c.SharerSegment(*wide, lengths=torch.zeros(2, dtype=torch.int64)),
    ]
    plain = c2c.merged_attention(
        query, key, value, is_causal=True, sinks=logits, return_lse=True, return_mass=True, backend=backend
    )
    for segments in ([part] for part in neutral):
        out, lse, mass = c2c.merged_attention(
            query, key, value, segments, is_causal=True, sinks=logits, return_lse=True, return_mass=True,
            backend=backend,
        )  # fmt: skip
        assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])
        assert torch.equal(mass[..., :1], plain[2]) and not mass[..., 1].any()
    out = c2c.merged_attention(query, key, value, neutral, is_causal=True, sinks=logits, backend=backend)
    assert torch.equal(out, plain[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_that_see_nothing(backend):
    query, key = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 5, 16)
    mask = torch.zeros(2, 1, 3, 5, dtype=torch.bool)
    mask[1, 0, 2] = True
    out, lse, mass = c2c.merged_attention(
        query, key, key, attn_mask=mask, return_lse=True, return_mass=True, backend=backend
    )
    assert not out[0].any() and (lse[0] == -torch.inf).all() and not mass[0].any()
    assert out[1, :, 2].any() and lse[1, :, 2].isfinite().all()
    out, lse = c2c.merged_attention(query, key[:, :, :0], key[:, :, :0], return_lse=True, backend=backend)
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(0, 4, 3, 16), (2, 4, 0, 16)])
def test_empty_batches_and_queries(backend, shape):
    key = torch.randn(shape[0], 2, 5, 16)
    out, lse, mass = c2c.merged_attention(
        torch.randn(shape), key, key, return_lse=True, return_mass=True, backend=backend
    )
    assert out.shape == shape and lse.shape == shape[:3] and mass.shape == (*shape[:3], 1)


def test_infinite_and_nan_inputs_stay_visible():
    query, key, value = torch.randn(1, 2, 20, 16), torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16)
    value[0, 0, 3, 1] = torch.nan
    key[0, 1, 4, 0] = torch.nan
    for part in (query, query[:, :, :1]):
        assert torch.equal(
            c2c.merged_attention(part, key, value, backend="cpu").isnan(),
            c2c.merged_attention(part, key, value, backend="reference").isnan(),
        )


def test_gates_multiply_weights():
    query, key, value = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    twice = c2c.merged_attention(
        query, key[:, :, :0], value[:, :, :0], [c2c.SharerSegment(key, value)] * 2, return_lse=True
    )
    gated = c2c.merged_attention(
        query, key[:, :, :0], value[:, :, :0], [c2c.SharerSegment(key, value, gate=torch.tensor([2.0]))],
        return_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(twice, gated)
