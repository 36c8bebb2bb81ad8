"""`merged_attention` on the CUDA backend, its compiled PTX for sm_80 and sm_90 run by ptxsim through the operator."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Plan, SegmentPlan, build, reference_call
from error_rule import assert_as_exact
from simulated import ARCHS, attend, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

BF16, F16 = torch.bfloat16, torch.float16


PLANS = {
    "decode": Plan(BF16, 2, 2, 4, 1, 165, 64, 64, is_causal=True, strided=False, segments=[SegmentPlan(70)]),
    "decode_128": Plan(F16, 1, 1, 7, 2, 300, 128, 128, is_causal=True, strided=False, lengths=True, segments=[
        SegmentPlan(130, gate="full", lengths=True), SegmentPlan(0), SegmentPlan(33, quantised=True)]),
    "decode_256": Plan(BF16, 1, 1, 3, 1, 150, 256, 200, softcap=5.0, sinks=True, segments=[
        SegmentPlan(50, gate="head"), SegmentPlan(70, quantised=True, index=True)]),
    "decode_masks": Plan(F16, 1, 2, 7, 2, 130, 40, 64, window=40, softcap=5.0, sinks=True, mask="bool_heads", segments=[
        SegmentPlan(65, gate="full", positions="shuffled", visibility="causal"), SegmentPlan(17, index=True)]),
    "decode_additive": Plan(BF16, 3, 1, 2, 5, 70, 72, 80, mask="additive", lengths=True, query_positions=True,
        segments=[SegmentPlan(64, gate="token", positions="shared", quantised=True, lengths=True)]),
}  # fmt: skip


PLANS["projected"] = Plan(BF16, 1, 2, 2, 1, 40, 64, 64, strategy="materialize", segments=[
    SegmentPlan(33, 2, 24, 24, "dense", bias=True), SegmentPlan(20, bias=True)])  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", PLANS)
def test_attention(name, arch):
    plan = PLANS[name]
    call = build(plan, 5)
    ours, simulated = attend(call, arch)
    assert [n for n in simulated.names() if "project" not in n and "copy" not in n][1:] == ["c2c_combine"]
    oracle = reference_call(call, torch.float64)
    theirs = reference_call(call, plan.dtype, plan.dtype)
    for which, mine, torchs, exact in zip(("out", "lse", "mass"), ours, theirs, oracle, strict=True):
        assert_as_exact(which, mine, torchs, exact)


@pytest.mark.parametrize("softcap", [20.0, 1e5])
@pytest.mark.parametrize("q_len", [1, 40])
def test_a_softcap_of_any_size(q_len, softcap):
    """40 queries go through the prefill kernel. A cap far above all scores changes none."""
    call = build(Plan(BF16, 1, 1, 2, q_len, 70, 64, 64, is_causal=True, softcap=softcap, segments=[SegmentPlan(30)]), 6)
    ours, _ = attend(call, 80)
    oracle, theirs = reference_call(call, torch.float64), reference_call(call, BF16, BF16)
    for which, mine, torchs, exact in zip(("out", "lse", "mass"), ours, theirs, oracle, strict=True):
        assert_as_exact(which, mine, torchs, exact)


@pytest.mark.parametrize("q_len", [1, 40])
def test_lengths_have_a_stride(q_len):
    """Of the own cache, of a segment and of a projected one; 40 queries go through the prefill kernel."""
    call = build(
        Plan(BF16, 3, 1, 1, q_len, 40, 16, 16, segments=[SegmentPlan(30), SegmentPlan(20, projector="dense")]), 4
    )
    apart, packed = torch.tensor([5, 99, 17, 99, 12, 99])[::2], torch.tensor([5, 17, 12])
    found = []
    for lengths in (apart, packed):
        call["lengths"] = lengths
        for segment in call["segments"]:
            segment.lengths = lengths
        found.append(attend(call, 80)[0])
    for strided, contiguous in zip(*found, strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("q_len", [1, 40])
def test_the_lowest_finite_mask_weighs_but_hides_nothing(q_len, dtype):
    """finfo.min on all tokens of the first query: all weigh alike; on one of the second's, which weighs nothing."""
    call = build(Plan(BF16, 1, 1, 1, max(q_len, 2), 20, 16, 16), 4)
    mask = torch.zeros(1, 1, max(q_len, 2), 20, dtype=dtype)
    mask[..., 0, :] = mask[..., 1, 5] = torch.finfo(dtype).min
    mask[..., 0, 7] = mask[..., 1, 8] = -torch.inf
    call["attn_mask"] = mask
    (out, lse, _), _ = attend(call, 80)
    seen = torch.arange(20) != 7
    assert lse.isfinite().all()
    assert (out[0, 0, 0].float() - call["value"][0, 0, seen].float().mean(0)).abs().max() < 2**-8
    call["attn_mask"] = mask.masked_fill(mask < -1e30, -torch.inf)
    call["attn_mask"][..., 0, :] = 0
    hidden, _ = attend(call, 80)
    assert torch.equal(out[:, :, 1:], hidden[0][:, :, 1:]) and torch.equal(lse[:, :, 1:], hidden[1][:, :, 1:])
