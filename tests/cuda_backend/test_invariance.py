"""What changes no bit of a result of the simulated CUDA backend."""

from __future__ import annotations

import pytest
import torch
from simulated import Simulator, missing

import c2c_kernels as c2c

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

DTYPE = torch.bfloat16


def run(query, key, value, segments=(), **options):
    with Simulator(80).installed():
        return c2c.merged_attention(query, key, value, segments, backend="cuda", return_lse=True, **options)


def tokens(heads: int, length: int, dim: int = 64, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, heads, length, dim).to(DTYPE)


def same(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def nothing(length: int, gate: float | None = None) -> c2c.SharerSegment:
    return c2c.SharerSegment(
        tokens(2, length), tokens(2, length), gate=None if gate is None else torch.full((1, 1, 1), gate)
    )


@pytest.mark.parametrize("q_len", [1, 40])
def test_empty_and_closed_segments(q_len):
    query, key, value = tokens(4, q_len), tokens(2, 300), tokens(2, 300)
    segment = c2c.SharerSegment(tokens(2, 150), tokens(2, 150))
    wanted = run(query, key, value, [segment], is_causal=True)
    for extra in (nothing(0), nothing(200, 0.0)):
        assert same(run(query, key, value, [extra, segment], is_causal=True), wanted)
        assert same(run(query, key, value, [segment, extra], is_causal=True), wanted)
    closed = c2c.SharerSegment(tokens(2, 70), tokens(2, 70), lengths=torch.zeros(1, dtype=torch.int64))
    assert same(run(query, key, value, [closed, segment], is_causal=True), wanted)


@pytest.mark.parametrize("q_len", [1, 40])
def test_rows_do_not_depend_on_the_batch(q_len):
    query, key, value = tokens(4, q_len, batch=3), tokens(2, 300, batch=3), tokens(2, 300, batch=3)
    lengths = torch.tensor([300, 170, 60])
    whole = run(query, key, value, lengths=lengths, is_causal=True)
    for row, length in enumerate(lengths.tolist()):
        cut = [t[row : row + 1, :, :length] for t in (key, value)]
        alone = run(query[row : row + 1], *cut, is_causal=True)
        assert same([t[row : row + 1] for t in whole], alone)


@pytest.mark.parametrize("q_len", [1, 40])
def test_nothing_visible(q_len):
    query, key, value = tokens(4, q_len), tokens(2, 70), tokens(2, 70)
    out, lse = run(query, key, value, [nothing(33, 0.0)], attn_mask=torch.zeros(q_len, 70, dtype=torch.bool))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
