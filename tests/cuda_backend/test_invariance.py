"""What changes no bit of a result of the simulated CUDA backend."""

from __future__ import annotations

import pytest
import torch
from simulated import ARCHS, Simulator, missing

import c2c_kernels as c2c

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

DTYPE = torch.bfloat16


@pytest.fixture(params=ARCHS, autouse=True)
def arch(request):
    return request.param


def run(arch, query, key, value, segments=(), **options):
    with Simulator(arch).installed():
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
def test_empty_and_closed_segments(q_len, arch):
    query, key, value = tokens(4, q_len), tokens(2, 300), tokens(2, 300)
    segment = c2c.SharerSegment(tokens(2, 150), tokens(2, 150))
    wanted = run(arch, query, key, value, [segment], is_causal=True)
    for extra in (nothing(0), nothing(200, 0.0)):
        assert same(run(arch, query, key, value, [extra, segment], is_causal=True), wanted)
        assert same(run(arch, query, key, value, [segment, extra], is_causal=True), wanted)
    closed = c2c.SharerSegment(tokens(2, 70), tokens(2, 70), lengths=torch.zeros(1, dtype=torch.int64))
    assert same(run(arch, query, key, value, [closed, segment], is_causal=True), wanted)


@pytest.mark.parametrize("length", [0, 70])
def test_closed_segments_in_bytes(length, arch):
    """Whatever it is stored as: a kernel is not chosen by what segments are stored as."""
    query, key, value = tokens(4, 40), tokens(2, 300), tokens(2, 300)
    codes = [torch.randint(-127, 127, (1, 2, length, 64), dtype=torch.int8) for _ in range(2)]
    scale = torch.rand(1, 2, length) + 0.1
    closed = c2c.SharerSegment(*codes, key_scale=scale, value_scale=scale, gate=torch.zeros(1, 1, 1))
    wanted = run(arch, query, key, value, is_causal=True)
    assert same(run(arch, query, key, value, [closed], is_causal=True), wanted)


def test_where_tokens_lie(arch):
    """Rows off 16 bytes, a step between tokens, one head or batch row for all: the same numbers, the same bits."""
    query, key, value = tokens(4, 20, batch=2), tokens(1, 150), tokens(1, 150)
    key, value = (x.expand(2, 2, -1, -1) for x in (key, value))
    wanted = run(arch, query, key.contiguous(), value.contiguous(), is_causal=True)
    assert same(run(arch, query, key, value, is_causal=True), wanted)
    for wide, first, step in ((80, 3, 1), (64, 0, 2)):
        moved = []
        for x in (key, value):
            larger = torch.full((2, 2, 150 * step, wide), torch.nan, dtype=DTYPE)
            moved.append(larger[:, :, ::step, first : first + 64])
            moved[-1].copy_(x)
        assert same(run(arch, query, *moved, is_causal=True), wanted)


@pytest.mark.parametrize("q_len", [1, 40])
def test_rows_do_not_depend_on_the_batch(q_len, arch):
    query, key, value = tokens(4, q_len, batch=3), tokens(2, 300, batch=3), tokens(2, 300, batch=3)
    lengths = torch.tensor([300, 170, 60])
    whole = run(arch, query, key, value, lengths=lengths, is_causal=True)
    for row, length in enumerate(lengths.tolist()):
        cut = [t[row : row + 1, :, :length] for t in (key, value)]
        alone = run(arch, query[row : row + 1], *cut, is_causal=True)
        assert same([t[row : row + 1] for t in whole], alone)


@pytest.mark.parametrize("q_len", [1, 40])
def test_nothing_visible(q_len, arch):
    query, key, value = tokens(4, q_len), tokens(2, 70), tokens(2, 70)
    out, lse = run(arch, query, key, value, [nothing(33, 0.0)], attn_mask=torch.zeros(q_len, 70, dtype=torch.bool))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
