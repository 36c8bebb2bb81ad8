"""Random calls of `merge_states` and `quantize_kv` on the simulated CUDA backend: at least 200 of each."""

from __future__ import annotations

import pytest
import torch
from attention_cases import numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import seeds
from simulated import ARCHS, missing
from test_states import check_codes, check_merge

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

HALVES = st.sampled_from((torch.bfloat16, torch.float16))
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 21), st.integers(1, 256))
SPREADS = st.sampled_from((1e-4, 1.0, 3000.0))


@given(SHAPES, HALVES, st.integers(1, 32), SPREADS, st.booleans(), st.sampled_from(ARCHS), seeds)
@settings(max_examples=220)
def test_merges(shape, dtype, count, spread, strided, arch, seed):
    batch, heads, tokens, dim = shape
    if dim % 2:  # blocks that write one half each of a word are a race to the simulator: all rows in one block
        shape = (batch, heads, min(tokens, 256 // (batch * heads * ((dim + 7) // 8))), dim)
    generator = torch.Generator().manual_seed(seed)
    outs = [numbers(generator, shape, dtype, strided=strided) for _ in range(count)]
    types = (torch.float32, torch.bfloat16, torch.float16)
    lses = [numbers(generator, shape[:3], types[i % 3], strided=strided, spread=spread) for i in range(count)]
    for out, lse in zip(outs, lses, strict=True):  # rows that a state has not, and what it holds of them
        empty = torch.rand(shape[:3], generator=generator) < 0.2
        lse.masked_fill_(empty, -torch.inf)
        out.masked_fill_(empty[..., None], torch.nan)
    check_merge(outs, lses, arch)


@given(SHAPES, HALVES, SPREADS, st.booleans(), st.sampled_from(ARCHS), seeds)
@settings(max_examples=220)
def test_codes(shape, dtype, spread, strided, arch, seed):
    generator = torch.Generator().manual_seed(seed)
    key, value = (numbers(generator, shape, dtype, strided=strided, spread=each) for each in (spread, 1.0))
    for special in (0.0, torch.nan, torch.inf):
        key.masked_fill_(torch.rand(shape, generator=generator) < 0.5 / shape[3], special)
    check_codes(key, value, arch)
