"""`merged_attention` for many queries on the CUDA backend: PTX for sm_80 and sm_90 run by ptxsim."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Plan, SegmentPlan, build, reference_call
from error_rule import assert_as_exact
from simulated import ARCHS, DEVICE, Simulator, attend, missing

import c2c_kernels as c2c

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

BF16, F16 = torch.bfloat16, torch.float16


def check(plan: Plan, seed: int, arch: int) -> Simulator:
    call = build(plan, seed)
    ours, simulated = attend(call, arch)
    oracle = reference_call(call, torch.float64)
    theirs = reference_call(call, plan.dtype, plan.dtype)
    for which, mine, torchs, exact in zip(("out", "lse", "mass"), ours, theirs, oracle, strict=True):
        assert_as_exact(which, mine, torchs, exact)
    return simulated


PLANS = {
    "plain_64": Plan(BF16, 1, 1, 2, 150, 170, 64, 64, is_causal=True, strided=False, segments=[SegmentPlan(70)]),
    "plain_128": Plan(F16, 1, 1, 1, 70, 90, 128, 128, is_causal=True, strided=False, segments=[SegmentPlan(33)]),
    "plain_256": Plan(BF16, 1, 1, 1, 70, 50, 256, 256, is_causal=True, strided=False, segments=[SegmentPlan(33)]),
    "gates": Plan(BF16, 2, 1, 2, 45, 70, 64, 64, is_causal=True, lengths=True, strided=False, segments=[
        SegmentPlan(70, gate="full", lengths=True), SegmentPlan(0), SegmentPlan(64, gate="zero")]),
    "heads_of_three": Plan(F16, 1, 2, 3, 40, 65, 128, 128, strided=False, segments=[
        SegmentPlan(40, gate="head"), SegmentPlan(17, gate="some_zero")]),
    "masks": Plan(F16, 1, 1, 3, 45, 130, 72, 40, is_causal=True, window=30, softcap=5.0, sinks=True,
        query_positions=True, mask="bool", segments=[
        SegmentPlan(65, gate="token", positions="shared", visibility="causal"), SegmentPlan(19, quantised=True)]),
    "additive": Plan(BF16, 1, 2, 2, 30, 70, 40, 64, mask="additive", lengths=True, sinks=True, segments=[
        SegmentPlan(50, index=True), SegmentPlan(20, positions="shuffled", quantised=True, index=True, lengths=True)]),
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", PLANS)
def test_attention(name, arch):
    simulated = check(PLANS[name], 5, arch)
    (kernel,) = simulated.names()
    assert kernel.startswith("c2c_prefill_wgmma_" if arch == 90 else "c2c_prefill_")


# Runs of many tiles that the warps convert, before and between runs that are copied as they are.
CONVERTED = {
    "int8_64": Plan(BF16, 1, 1, 1, 33, 70, 64, 64, strided=False, segments=[
        SegmentPlan(600, quantised=True), SegmentPlan(70)]),
    "int8_128": Plan(F16, 1, 1, 1, 33, 64, 128, 128, strided=False, segments=[
        SegmentPlan(512, quantised=True), SegmentPlan(70)]),
    "int8_256": Plan(BF16, 1, 1, 1, 33, 64, 256, 256, strided=False, segments=[
        SegmentPlan(193, quantised=True), SegmentPlan(70)]),
    "index": Plan(BF16, 1, 1, 1, 33, 70, 64, 64, strided=False, segments=[
        SegmentPlan(520, index=True), SegmentPlan(70), SegmentPlan(330, quantised=True), SegmentPlan(130)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_who_copies_waits_for_who_converts(name):
    check(CONVERTED[name], 3, 90)


def test_an_own_cache_off_16_bytes_before_a_segment_that_is_copied():
    call = build(Plan(BF16, 1, 1, 1, 33, 500, 64, 64, strided=False, segments=[SegmentPlan(130)]), 3)
    for name in ("key", "value"):
        call[name] = torch.nn.functional.pad(call[name], (4, 0))[..., 4:]
    ours, simulated = attend(call, 90)
    assert simulated.names() == ["c2c_prefill_wgmma_bf16_64"]
    oracle, theirs = reference_call(call, torch.float64), reference_call(call, BF16, BF16)
    for which, mine, torchs, exact in zip(("out", "lse", "mass"), ours, theirs, oracle, strict=True):
        assert_as_exact(which, mine, torchs, exact)


@pytest.mark.skipif(bool(DEVICE), reason="a device's driver makes maps")
@pytest.mark.parametrize("name", ["plain_64", "plain_256"])
def test_where_the_driver_makes_no_map_warps_copy(name):
    """The same bits, and no byte by way of a map."""
    call = build(PLANS[name], 5)
    usual, unmapped = attend(call, 90), attend(call, 90, maps=False)
    assert unmapped[1].names() == usual[1].names()
    assert all(ran.launch.maps for ran in usual[1].ran)
    for mine, theirs in zip(unmapped[0], usual[0], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("aligned", [True, False])
def test_e4m3_is_widened_exactly(aligned, arch):
    """A segment of float8_e4m3fn gives the bits of the same numbers in bfloat16."""
    dim = 64 if aligned else 60
    query, key, value = (torch.randn(1, heads, 40, dim).to(BF16) for heads in (4, 2, 2))
    codes = [torch.randn(1, 2, 70, dim).to(torch.float8_e4m3fn) for _ in range(2)]
    scale = torch.ones(1, 2, 1)
    call = {"query": query, "key": key, "value": value, "is_causal": True}
    stored = {**call, "segments": [c2c.SharerSegment(*codes, key_scale=scale, value_scale=scale)]}
    widened = {**call, "segments": [c2c.SharerSegment(*(x.to(BF16) for x in codes))]}
    for mine, theirs in zip(attend(stored, arch)[0], attend(widened, arch)[0], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("q_len", [1, 40])
def test_a_gate_that_is_not_above_0_closes_its_token(q_len, per_head, arch):
    query, key, value = (torch.randn(1, heads, n, 64).to(BF16) for heads, n in ((6, q_len), (2, 40), (2, 40)))
    wide = [torch.randn(1, 2, 70, 64).to(BF16) for _ in range(2)]
    gate = torch.rand(1, 6 if per_head else 1, 70) + 0.1
    closed = gate.clone()
    gate[..., 3], gate[..., 40], gate[..., 69] = -1.0, torch.nan, -0.0
    closed[..., [3, 40, 69]] = 0.0
    call = {"query": query, "key": key, "value": value, "is_causal": True}
    ours, wanted = (attend({**call, "segments": [c2c.SharerSegment(*wide, gate=g)]}, arch)[0] for g in (gate, closed))
    for mine, theirs in zip(ours, wanted, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("arch", ARCHS)
def test_rising_scores_raise_the_maximum(arch):
    """Scores that grow with every token, far beyond what float16 holds as weights of the first tile's maximum."""
    plan = Plan(F16, 1, 1, 1, 40, 300, 64, 64)
    call = build(plan, 1)
    call["key"] = (call["key"].float() * torch.linspace(0, 12, 300)[:, None]).to(F16)
    ours, _ = attend(call, arch)
    oracle, theirs = reference_call(call, torch.float64), reference_call(call, F16, F16)
    for which, mine, torchs, exact in zip(("out", "lse", "mass"), ours, theirs, oracle, strict=True):
        assert_as_exact(which, mine, torchs, exact)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_scores_of_a_billion(dtype, arch):
    """The highest score of a row weighs 1, in every tile, however its product with the scale is rounded."""
    query, key = (torch.zeros(1, 1, n, 96, dtype=dtype) for n in (40, 100))
    query[0, 0, :, 0] = torch.linspace(40000, 60000, 40).to(dtype)
    key[:, :, [5, 90], 0] = 60000
    value = torch.randn(1, 1, 100, 96).to(dtype)
    (out, lse, _), _ = attend({"query": query, "key": key, "value": value, "scale": 0.3}, arch)
    scores = (query.double() @ key.double().mT * 0.3).amax(-1)
    assert scores.min() > 7e8
    assert torch.equal(out, value[:, :, [5, 90]].float().mean(2, keepdim=True).to(dtype).expand_as(out))
    torch.testing.assert_close(lse.double(), scores, rtol=2**-22, atol=0)


# Tiles that all rows see without masks, of every kind that is not attended to as others are: more than one in a row,
# before and behind such as rows see in part; runs of whole tiles and others; weights of a maximum that lags.
USUAL = {
    "causal_64": Plan(BF16, 1, 1, 2, 40, 700, 64, 64, is_causal=True, segments=[SegmentPlan(512), SegmentPlan(70)]),
    "causal_128": Plan(F16, 2, 1, 3, 90, 400, 128, 128, is_causal=True, lengths=True, segments=[SegmentPlan(256)]),
    "causal_256": Plan(BF16, 1, 1, 2, 70, 230, 256, 256, is_causal=True, segments=[SegmentPlan(128)]),
    "window": Plan(BF16, 1, 1, 1, 300, 300, 128, 128, is_causal=True, window=200, segments=[SegmentPlan(300)]),
    "gates": Plan(F16, 1, 2, 2, 40, 330, 128, 128, segments=[SegmentPlan(200, gate="token"), SegmentPlan(260)]),
}  # fmt: skip
CAPABILITIES = (80, 86, 90)  # blocks of 163 KiB of shared memory, of 99; other kernels


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rises", [False, True])
@pytest.mark.parametrize("name", USUAL)
def test_usual_tiles(name, rises, capability):
    """Where neither lse nor mass is wanted there is a way of its own for usual tiles: it gives the same bits."""
    plan = USUAL[name]
    plan.strided = False
    call = build(plan, 7)
    if rises:
        call["key"] *= torch.linspace(0, 8, call["key"].shape[2])[:, None].to(plan.dtype)
    with_sums, _ = attend(call, capability)
    options = {key: value for key, value in call.items() if key not in ("query", "key", "value")}
    with Simulator(capability).installed():
        out = c2c.merged_attention(call["query"], call["key"], call["value"], **options, backend="cuda")
    assert torch.equal(out, with_sums[0])
    assert_as_exact("out", out, reference_call(call, plan.dtype, plan.dtype)[0], reference_call(call, torch.float64)[0])
