"""Random calls of `project_kv` on the simulated CUDA backend: at least 200, every option with every other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import seeds, segments
from simulated import ARCHS, missing
from test_project import check
from test_project_kv import build

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@given(
    segments(130), st.sampled_from((torch.bfloat16, torch.float16)), st.sampled_from(ARCHS), st.integers(1, 2),
    st.integers(1, 3), st.sampled_from((16, 40, 64, 128)), st.booleans(), st.booleans(), seeds,
)  # fmt: skip
@settings(max_examples=220)
def test_projections(part, dtype, arch, batch, kv_heads, dim, removes, applies, seed):
    segment, rope = build(part, dtype, batch, kv_heads, dim, removes, applies, seed)
    check(segment, rope, dtype, arch, kv_heads, dim)
