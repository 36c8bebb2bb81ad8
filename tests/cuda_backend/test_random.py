"""Random calls of `merged_attention` on the simulated CUDA backend: at least 200, every option with every other."""

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


@given(plans(max_length=300, max_queries=5), st.sampled_from(HALVES), st.sampled_from(ARCHS), st.booleans(), seeds)
@settings(max_examples=220)
def test_few_queries(plan, dtype, arch, aligned, seed):
    plan.dtype, plan.strategy, plan.strided = dtype, "materialize", plan.strided and not aligned
    plan.group = min(plan.group, 32 // max(1, plan.q_len))  # more rows are prefill's
    call = build(plan, seed)
    ours, _ = attend(call, arch)
    oracle = reference_call(call, torch.float64)
    theirs = reference_call(call, plan.dtype, plan.dtype)
    for which, mine, torchs, exact in zip(("out", "lse", "mass"), ours, theirs, oracle, strict=True):
        assert_as_exact(which, mine, torchs, exact)
