"""`project_kv` on the CUDA backend: PTX for sm_80 and sm_90 run by ptxsim, through the operator."""

from __future__ import annotations

import pytest
import torch
from attention_cases import SegmentPlan
from error_rule import assert_as_exact
from simulated import ARCHS, Simulator, missing
from test_project_kv import at_dtype, build

import c2c_kernels as c2c

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

BF16, F16 = torch.bfloat16, torch.float16


def check(segment, rope, dtype, arch: int, kv_heads: int, dim: int) -> Simulator:
    """Both halves, written into slices of larger tensors, against the reference."""
    length = c2c.segment.to_tensors(segment).length
    shapes = [
        (raw.shape[0], raw.shape[1] if proj is None else kv_heads, length, raw.shape[3] if proj is None else dim)
        for raw, proj in ((segment.key, segment.key_proj), (segment.value, segment.value_proj))
    ]
    caches = [torch.full((b, h, n + 5, d), torch.nan, dtype=dtype) for b, h, n, d in shapes]
    outs = tuple(cache[:, :, 3 : 3 + length] for cache in caches)
    with Simulator(arch).installed() as simulated:
        c2c.project_kv(segment, rope=rope, out=outs, backend="cuda")
    oracle = at_dtype(segment, rope, torch.float64, torch.float64)
    theirs = at_dtype(segment, rope, dtype, dtype)
    for name, mine, torchs, exact in zip(("key", "value"), outs, theirs, oracle, strict=True):
        assert_as_exact(name, mine, torchs, exact)
    for cache in caches:
        assert cache[:, :, :3].isnan().all() and cache[:, :, 3 + length :].isnan().all()
    return simulated


CASES = {
    # part, dtype, kv_heads, dim, removes, applies
    "plain": (SegmentPlan(150, 2, 64, 64, "dense"), BF16, 2, 64, False, False),
    "rotated": (SegmentPlan(37, 2, 24, 40, "dense", bias=True, lengths=True, index=True), F16, 2, 40, True, True),
    "wide": (SegmentPlan(20, 3, 64, 40, "dense", bias=True), BF16, 1, 256, True, True),
    "low_rank": (SegmentPlan(140, 2, 32, 40, "low_rank", bias=True, lengths=True), BF16, 2, 64, True, True),
    "int8": (SegmentPlan(70, 2, 72, 80, "dense", bias=True, quantised=True), F16, 2, 72, True, False),
    "copied": (SegmentPlan(37, bias=True, lengths=True, index=True), F16, 2, 40, True, True),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CASES)
def test_projection(name, arch):
    part, dtype, kv_heads, dim, removes, applies = CASES[name]
    segment, rope = build(part, dtype, 2, kv_heads, dim, removes, applies, 3)
    simulated = check(segment, rope, dtype, arch, kv_heads, dim)
    kernel = "c2c_project_wgmma" if arch == 90 else "c2c_project"
    kernel = "c2c_project_copy" if name == "copied" else f"{kernel}_{'bf16' if dtype == BF16 else 'f16'}"
    assert simulated.names() == [kernel] * (2 if name == "low_rank" else 1)
