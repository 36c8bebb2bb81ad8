"""Random calls with absorbed segments on the simulated CUDA backend: at least 200, every option with every other."""

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
WIDTHS = ((1, 8, 24), (3, 24, 8), (2, 64, 64), (4, 64, 40), (8, 64, 64), (1, 256, 512), (5, 24, 80))  # heads, dims


@given(
    plans(max_length=130, max_queries=5), st.sampled_from(HALVES), st.sampled_from(ARCHS), st.booleans(),
    st.lists(st.sampled_from(WIDTHS), min_size=3, max_size=3), st.booleans(), seeds,
)  # fmt: skip
@settings(max_examples=220)
def test_absorbed(plan, dtype, arch, aligned, widths, float8, seed):
    plan.dtype, plan.strategy, plan.strided = dtype, "absorb", plan.strided and not aligned
    plan.group = min(plan.group, 32 // max(1, plan.q_len))  # more rows are prefill's
    for number, part in enumerate(plan.segments):
        if number == 0 or part.projector == "low_rank":
            part.projector = "dense"
        part.heads, part.key_dim, part.value_dim = widths[number]
        part.length = min(part.length, 130)
    call = build(plan, seed)
    for segment in call["segments"]:
        if float8 and segment.key.dtype == torch.int8:
            segment.key, segment.value = (
                (x.float() / 16).to(torch.float8_e4m3fn) for x in (segment.key, segment.value)
            )
    ours, simulated = attend(call, arch)
    absorbs = any(part.projector == "dense" and part.length for part in plan.segments)
    assert absorbs == any(name.startswith("c2c_absorb_combine") for name in simulated.names()) or not ours[0].numel()
    oracle = reference_call(call, torch.float64)
    theirs = reference_call(call, plan.dtype, plan.dtype)
    for which, mine, torchs, exact in zip(("out", "lse", "mass"), ours, theirs, oracle, strict=True):
        assert_as_exact(which, mine, torchs, exact)
