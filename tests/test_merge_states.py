"""`merge_states`: states of disjoint tokens become the state of all of them."""

from __future__ import annotations

import pytest
import torch
from error_rule import assert_as_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import DTYPES, seeds

import c2c_kernels as c2c
from c2c_kernels.backends import reference


@pytest.mark.sanitize
@given(
    st.integers(1, 5), st.integers(0, 3), st.integers(1, 4), st.integers(0, 9), st.sampled_from((1, 16, 40, 257)),
    st.sampled_from(DTYPES), seeds,
)  # fmt: skip
@settings(max_examples=80)
def test_cpu_matches_reference(count, batch, heads, q_len, dim, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, q_len, dim)
    outs = [torch.randn(batch, q_len, heads, dim, generator=generator).to(dtype).transpose(1, 2) for _ in range(count)]
    lses = [torch.randn(shape[:3], generator=generator) * 4 for _ in range(count)]
    for out, lse in zip(outs, lses, strict=True):
        empty = torch.rand(shape[:3], generator=generator) < 0.3
        lse.masked_fill_(empty, -torch.inf)
        out.masked_fill_(empty.unsqueeze(-1), torch.nan)
    out, lse = c2c.merge_states(outs, lses, backend="cpu")
    oracle = reference.merge_states([o.double() for o in outs], [x.double() for x in lses])
    theirs = c2c.merge_states(outs, lses, backend="reference")
    assert_as_exact("out", out, theirs[0], oracle[0])
    assert_as_exact("lse", lse, theirs[1], oracle[1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_parts_make_the_whole(backend):
    query, key, value = torch.randn(2, 4, 3, 32), torch.randn(2, 2, 50, 32), torch.randn(2, 2, 50, 32)
    whole = c2c.merged_attention(query, key, value, return_lse=True)
    parts = [
        c2c.merged_attention(query, key[:, :, a:b], value[:, :, a:b], return_lse=True)
        for a, b in ((0, 7), (7, 7), (7, 41), (41, 50))
    ]
    outs, lses = zip(*parts, strict=True)
    torch.testing.assert_close(c2c.merge_states(outs, lses, backend=backend), whole)


def test_gradients():
    outs = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *t: c2c.merge_states(t[:3], t[3:], backend="reference"), (*outs, *lses))

    def gradients(backend, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (*outs, *lses)]
        out, lse = c2c.merge_states(leaves[:3], leaves[3:], backend=backend)
        (out.double().pow(2).sum() + lse.double().sin().sum()).backward()
        return [leaf.grad for leaf in leaves]

    for mine, exact in zip(gradients("cpu", torch.float32), gradients("reference", torch.float64), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-6)
