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


PLANS["projected"] = Plan(
    BF16, 1, 2, 2, 1, 40, 64, 64, segments=[SegmentPlan(33, 2, 24, 24, "dense", bias=True), SegmentPlan(20, bias=True)]
)


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
