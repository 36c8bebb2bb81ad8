"""Random calls of many queries on the simulated CUDA backend: at least 200, every option with every other."""

from __future__ import annotations

import pytest
import torch
from attention_cases import build, reference_call
from error_rule import assert_as_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import plans, seeds
from simulated import ARCHS, attend, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

HALVES = (torch.bfloat16, torch.float16)


@given(
    plans(max_length=130), st.sampled_from(HALVES), st.sampled_from((*ARCHS, 86)), st.sampled_from((33, 41, 70, 140)),
    st.booleans(), seeds,
)  # fmt: skip
@settings(max_examples=220)
def test_many_queries(plan, dtype, arch, rows, aligned, seed):
    plan.dtype, plan.strategy, plan.strided = dtype, "auto", plan.strided and not aligned
    plan.batch, plan.kv_heads = min(plan.batch, 2), min(plan.kv_heads, 2)
    plan.q_len = -(-rows // plan.group)  # fewer than 33 rows are decode's
    for part in plan.segments:
        part.projector, part.bias, part.length = "none", False, min(part.length, 130)
    call = build(plan, seed)
    ours, simulated = attend(call, arch)
    assert all(name.startswith("c2c_prefill") for name in simulated.names())
    oracle = reference_call(call, torch.float64)
    theirs = reference_call(call, plan.dtype, plan.dtype)
    for which, mine, torchs, exact in zip(("out", "lse", "mass"), ours, theirs, oracle, strict=True):
        assert_as_exact(which, mine, torchs, exact)
