"""The compiled PTX of the Triton kernels for sm_80 and sm_90, run by ptxsim: results, races, bounds, missing waits."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Plan, SegmentPlan, build, reference_call
from error_rule import GRADIENT_ULPS, assert_as_exact
from gpu_simulator import Simulator, simulator
from test_gradients import cotangents
from test_project_kv import at_dtype
from test_project_kv import build as build_projection
from torch_backward import fused_gradients, operator_gradients

import c2c_kernels as c2c
from c2c_kernels.backends import triton as backend
from c2c_kernels.segment import to_tensors

pytestmark = pytest.mark.skipif(simulator() is None, reason="shared/ptxsim is not in or beside the checkout")

ARCHS = [80, 90]
HALF, SINGLE = torch.bfloat16, torch.float32


def forward(call: dict, arch: int) -> tuple[tuple, Simulator]:
    window = call["window"]
    with Simulator(arch).installed() as simulated:
        results = backend.merged_attention(
            "triton", call["query"], call["key"], call["value"], [to_tensors(s) for s in call["segments"]],
            call["attn_mask"], call["is_causal"], call["query_positions"], call["lengths"],
            call["query"].shape[-1] ** -0.5, window, call["segment_window"] or window, call["softcap"], call["sinks"],
            "absorb" if call["strategy"] == "absorb" else "materialize", True, True,
        )  # fmt: skip
    return results, simulated


PLANS = {
    "decode": (
        Plan(HALF, 2, 2, 3, 1, 165, 64, 64, is_causal=True, lengths=True, segments=[
            SegmentPlan(70, gate="head", lengths=True), SegmentPlan(0), SegmentPlan(33, quantised=True)
        ]),
        ["split_kernel", "combine_kernel"],
    ),
    "decode_masks": (
        Plan(torch.float16, 1, 1, 7, 2, 130, 40, 64, window=40, softcap=5.0, sinks=True, mask="bool_heads", segments=[
            SegmentPlan(65, gate="full", positions="shuffled", visibility="causal"), SegmentPlan(17, index=True)
        ]),
        ["split_kernel", "combine_kernel"],
    ),
    "decode_float32": (
        Plan(SINGLE, 1, 2, 2, 3, 70, 32, 16, mask="additive", lengths=True, segments=[SegmentPlan(31, gate="token")]),
        ["split_kernel", "combine_kernel"],
    ),
    "prefill": (
        Plan(HALF, 1, 1, 2, 150, 170, 64, 64, is_causal=True, lengths=True, segments=[
            SegmentPlan(70, gate="full", lengths=True), SegmentPlan(0), SegmentPlan(64)
        ]),
        ["prefill_kernel"],
    ),
    "prefill_masks": (
        Plan(torch.float16, 1, 1, 3, 45, 130, 72, 40, is_causal=True, window=30, softcap=5.0, sinks=True,
            query_positions=True, mask="bool", segments=[
            SegmentPlan(65, gate="token", positions="shared", visibility="causal"), SegmentPlan(19, quantised=True)
        ]),
        ["prefill_kernel"],
    ),
    "prefill_int8": (
        Plan(HALF, 1, 1, 2, 100, 64, 128, 128, segments=[SegmentPlan(200, quantised=True, index=True)]),
        ["prefill_kernel"],
    ),
    "prefill_256": (
        Plan(HALF, 1, 1, 1, 70, 40, 256, 256, is_causal=True, window=60, segments=[SegmentPlan(33, gate="head")]),
        ["prefill_kernel"],
    ),
    "prefill_float32": (
        Plan(SINGLE, 1, 1, 2, 40, 70, 32, 40, mask="additive", segments=[SegmentPlan(33, gate="head")]),
        ["prefill_kernel"],
    ),
    "prefill_256_float32": (
        Plan(SINGLE, 1, 1, 1, 33, 40, 200, 256, is_causal=True, segments=[SegmentPlan(17, gate="head")]),
        ["prefill_kernel"],
    ),
    "projected": (
        Plan(HALF, 1, 2, 2, 1, 40, 64, 64, segments=[SegmentPlan(33, 2, 24, 24, "dense", bias=True)]),
        ["project_kernel", "split_kernel", "combine_kernel"],
    ),
    "absorbed": (
        Plan(HALF, 2, 2, 3, 1, 70, 40, 64, is_causal=True, lengths=True, strategy="absorb", segments=[
            SegmentPlan(290, 2, 24, 40, "dense", bias=True, gate="full", lengths=True), SegmentPlan(33), SegmentPlan(0)
        ]),
        ["split_kernel", "combine_kernel"],
    ),
    "absorbed_masks": (
        Plan(torch.float16, 1, 1, 5, 2, 40, 64, 64, window=30, softcap=5.0, sinks=True, strategy="absorb", segments=[
            SegmentPlan(70, 2, 24, 24, "dense", quantised=True, positions="shuffled", visibility="causal"),
            SegmentPlan(37, 1, 16, 72, "dense", index=True),
        ]),
        ["split_kernel", "combine_kernel"],
    ),
    "absorbed_float32": (
        Plan(SINGLE, 1, 2, 2, 1, 0, 32, 16, strategy="absorb", segments=[
            SegmentPlan(31, 1, 24, 40, "dense", bias=True)
        ]),
        ["split_kernel", "combine_kernel"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", PLANS)
def test_attention(name, arch):
    plan, kernels = PLANS[name]
    call = build(plan, 5)
    ours, simulated = forward(call, arch)
    assert simulated.names() == kernels
    oracle = reference_call(call, torch.float64)
    theirs = reference_call(call, plan.dtype, plan.dtype)
    for which, mine, torchs, exact in zip(("out", "lse", "mass"), ours, theirs, oracle, strict=True):
        assert_as_exact(which, mine, torchs, exact)
    if arch == 90 and name == "prefill":
        assert "wgmma" in simulated.ran[0][1].kernel.asm["ptx"]


@pytest.mark.parametrize(("q_len", "arch", "dim"), [(3, 80, 32), (40, 90, 32), (24, 80, 128)])
def test_closed_segments_change_no_bit(q_len, arch, dim):
    """One wider in dtype than the queries, and where projectors are absorbed one that takes two tiles of rows."""
    call = build(Plan(HALF, 1, 2, 3, q_len, 165, dim, dim, is_causal=True), 5)
    plain, _ = forward(call, arch)
    wide, raw = torch.randn(1, 2, 33, dim), torch.randn(1, 1, 20, 512, dtype=HALF)
    proj = torch.randn(2, 32, 512, dtype=HALF)
    call["segments"] = [c2c.SharerSegment(wide, wide, gate=torch.zeros(1))]
    if q_len == 3:
        call["segments"].append(c2c.SharerSegment(raw, raw, proj, proj, gate=torch.zeros(1)))
        call["strategy"] = "absorb"
    beside, simulated = forward(call, arch)
    assert len(simulated.names()) == (2 if q_len == 3 else 1)
    for name, one, other in zip(("out", "lse", "mass"), plain, beside, strict=True):
        assert torch.equal(one, other[..., : one.shape[-1]]), name


@pytest.mark.parametrize(
    ("dtype", "arch", "dim"), [(HALF, 80, 64), (HALF, 80, 128), (HALF, 80, 200), (SINGLE, 90, 200)]
)
def test_closed_segments_that_take_other_tiles_change_no_bit(dtype, arch, dim):
    """With so many options that rows are halved, or value dims are two programs'; beside an open segment with gates."""
    call = build(Plan(dtype, 1, 1, 2, 40, 50, dim, dim, is_causal=True, window=30, softcap=5.0), 5)
    keys, places = torch.randn(1, 1, 33, dim, dtype=dtype), torch.arange(33)
    codes, scales = torch.randint(-127, 128, (1, 1, 33, dim), dtype=torch.int8), torch.rand(1, 1, 33)
    call["segments"] = [c2c.SharerSegment(keys, keys, gate=torch.rand(1, 2, 33) + 0.1)]
    plain, alone = forward(call, arch)
    call["segments"].append(
        c2c.SharerSegment(
            codes, codes, gate=torch.zeros(1, 2, 33), positions=places, visibility="causal", key_scale=scales,
            value_scale=scales,
        )
    )  # fmt: skip
    beside, simulated = forward(call, arch)
    tiles = [[ran.ran[0][0].arguments[name] for name in ("BLOCK_M", "BLOCK_V")] for ran in (alone, simulated)]
    assert tiles[0] != tiles[1] or dim == 64
    for name, one, other in zip(("out", "lse", "mass"), plain, beside, strict=True):
        assert torch.equal(one, other[..., : one.shape[-1]]), name


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float16, 120), (HALF, 200)], ids=str)
def test_segments_wider_than_the_queries(dtype, dim, arch):
    """Their parts, 2^-16 exact, leave results as good as PyTorch's."""
    call = build(Plan(dtype, 1, 1, 2, 40, 50, dim, dim, is_causal=True), 5)
    wide = [torch.randn(1, 1, 37, dim) for _ in range(2)]
    call["segments"] = [c2c.SharerSegment(*wide, gate=torch.rand(1, 2, 37))]
    ours, simulated = forward(call, arch)
    assert simulated.names() == ["prefill_kernel"]
    oracle, theirs = reference_call(call, torch.float64), reference_call(call, dtype, dtype)
    for which, mine, torchs, exact in zip(("out", "lse", "mass"), ours, theirs, oracle, strict=True):
        assert_as_exact(which, mine, torchs, exact)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("projector", ["dense", "low_rank", "none", "int8"])
def test_projection(projector, dtype, arch):
    part = SegmentPlan(37, 2, 24, 40, projector, bias=True, lengths=True, index=projector == "dense")
    if projector == "int8":  # of several products a head, made in registers
        part = SegmentPlan(150, 2, 72, 80, "dense", bias=True, quantised=True)
    segment, rope = build_projection(part, dtype, 2, 2, 40, True, True, 3)
    packed = to_tensors(segment)
    dims = [raw.shape[3] if proj is None else 40 for raw, proj in (
        (packed.key, packed.key_proj), (packed.value, packed.value_proj)
    )]  # fmt: skip
    outs = [torch.full((2, 2, packed.length, dim), torch.nan, dtype=dtype) for dim in dims]
    with Simulator(arch).installed():
        backend.project_kv("triton", packed, rope, *outs)
    oracle = at_dtype(segment, rope, torch.float64, torch.float64)
    theirs = at_dtype(segment, rope, dtype, dtype)
    for name, mine, torchs, exact in zip(("key", "value"), outs, theirs, oracle, strict=True):
        assert_as_exact(name, mine, torchs, exact)


@pytest.mark.parametrize("arch", ARCHS)
def test_states_and_quantisation(arch):
    outs, lses = [torch.randn(2, 3, 5, 40, dtype=HALF) for _ in range(2)], [torch.randn(2, 3, 5) for _ in range(2)]
    lses[0][1], outs[0][1] = -torch.inf, torch.nan
    with Simulator(arch).installed() as simulated:
        merged = backend.merge_states("triton", outs, lses)
        codes, scale = backend.quantize("triton", outs[1])
    assert simulated.names() == ["merge_kernel", "quantise_kernel"]
    exact = c2c.merge_states([o.double() for o in outs], [s.double() for s in lses], backend="reference")
    theirs = c2c.merge_states(outs, lses, backend="reference")
    for name, mine, torchs, right in zip(("out", "lse"), merged, theirs, exact, strict=True):
        assert_as_exact(name, mine, torchs, right)
    wanted = c2c.quantize_kv(outs[1], outs[1], backend="reference")
    assert torch.equal(codes, wanted[0]) and torch.equal(scale, wanted[2])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_gradients(dtype, arch):
    """Through the public operator, its launches taken over; two of them besides projection."""
    parts = [SegmentPlan(35, gate="full", lengths=True), SegmentPlan(0)]
    plan = Plan(dtype, 1, 1, 2, 40, 70, 32, 24, is_causal=True, softcap=5.0, sinks=True, lengths=True, segments=parts)
    call, wanted = build(plan, 2), cotangents(plan, 2)
    with Simulator(arch).installed() as simulated:
        ours = operator_gradients(call, wanted, "triton")
    assert simulated.names() == ["prefill_kernel", "query_gradient_kernel", "token_gradient_kernel"]
    oracle = operator_gradients(call, wanted, "reference", torch.float64)
    fused, _ = fused_gradients(call, wanted, dtype)
    _, sizes = fused_gradients(call, wanted, torch.float64)
    eager = operator_gradients(call, wanted, "reference")
    for name, gradient in ours.items():
        assert_as_exact(
            name, gradient, fused[name].to(gradient.dtype), oracle[name], GRADIENT_ULPS, others=(eager[name],),
            scale=max(1, sizes.get(name, 1)),
        )  # fmt: skip
