"""Offsets beyond 2^31 elements."""

from __future__ import annotations

import pytest
import torch

import c2c_kernels as c2c


def available_memory() -> int:
    with open("/proc/meminfo") as info:
        return next(int(line.split()[1]) for line in info if line.startswith("MemAvailable")) * 1024


needs_memory = pytest.mark.skipif(
    available_memory() < 14 * 2**30, reason="needs 14 GiB of free memory for tensors of more than 2^31 elements"
)


@needs_memory
def test_batch_rows_beyond_2_to_the_31():
    shape = (3, 1, 2**24, 64)  # 3.2e9 elements; pages that are never touched take no memory
    key = torch.empty(shape, dtype=torch.bfloat16)
    lengths = torch.tensor([5, 3, 7])
    small = torch.randn(3, 1, 7, 64).bfloat16()
    key[:, :, :7] = small
    query = torch.randn(3, 2, 1, 64).bfloat16()
    out = c2c.merged_attention(query, key, key, lengths=lengths, backend="cpu")
    assert torch.equal(out, c2c.merged_attention(query, small, small, lengths=lengths, backend="cpu"))
    segment = c2c.SharerSegment(key, key, lengths=lengths)
    empty = small[:, :, :0]
    out = c2c.merged_attention(query, empty, empty, [segment], backend="cpu")
    alone = c2c.merged_attention(query, empty, empty, [c2c.SharerSegment(small, small, lengths=lengths)], backend="cpu")
    assert torch.equal(out, alone)


@needs_memory
def test_tokens_beyond_2_to_the_31():
    length = 2**25 + 77  # times 64 elements
    key = torch.zeros(1, 1, length, 64, dtype=torch.bfloat16)
    query = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
    query[..., 0] = 8.0
    key[..., -3:, 0] = 64.0  # these three hold all of the weight: exp(64) against 3e7 times 1
    key[0, 0, -3:, 1] = torch.tensor([1.0, 2.0, 6.0])
    out = c2c.merged_attention(query, key, key, backend="cpu")
    torch.testing.assert_close(out[0, 0, 0, :2].float(), torch.tensor([64.0, 3.0]))
