"""Gradients of tokens that an index selected, summed where they came from, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, run
from .tiles import dot

_BLOCK_STORED, _BLOCK_SELECTED = 32, 32
_LARGEST_DIM = 256  # of a launch: wider tokens are taken in parts


@triton.jit
def spread_kernel(
    out,  # (batch, heads, stored, DIM) float32, contiguous
    grad,  # (batch, heads, length, DIM) float32, contiguous
    index, index_b, index_n,  # (batch, length)
    heads, stored, length, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program sums BLOCK_M stored tokens of one head as (places == token) @ grad, over selected tokens in order."""
    program = tl.program_id(0)
    tiles = tl.cdiv(stored, BLOCK_M)
    row = (program // tiles).to(tl.int64)
    tokens = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    dims, steps = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, length, BLOCK_N):
        n = start + steps
        inside = n < length
        places = tl.load(index + row // heads * index_b + n.to(tl.int64) * index_n, mask=inside, other=-1)
        at = grad + (row * length + n)[:, None] * DIM + dims[None, :]
        found = tl.load(at, mask=inside[:, None] & (dims < DIM)[None, :], other=0.0)
        acc = dot((places[None, :] == tokens[:, None]).to(tl.float32), found, acc, "ieee")
    at = out + (row * stored + tokens)[:, None] * DIM + dims[None, :]
    tl.store(at, acc, mask=(tokens < stored)[:, None] & (dims < DIM)[None, :])


def spread(grad: Tensor, index: Tensor, stored: int) -> Tensor:
    """(batch, heads, stored, dim) of grad (batch, heads, n, dim): out[index[n]] += grad[n]; `index` (batch, n)."""
    batch, heads, length, dim = grad.shape
    if dim > _LARGEST_DIM:
        return torch.cat([spread(part, index, stored) for part in grad.split(_LARGEST_DIM, -1)], -1)
    grad = grad.contiguous()
    out = grad.new_empty((batch, heads, stored, dim), dtype=torch.float32)
    names = {
        "out": out, "grad": grad, "index": index, "index_b": index.stride(0), "index_n": index.stride(1),
        "heads": heads, "stored": stored, "length": length, "DIM": dim,
        "BLOCK_D": max(16, 1 << max(0, dim - 1).bit_length()), "BLOCK_M": _BLOCK_STORED, "BLOCK_N": _BLOCK_SELECTED,
    }  # fmt: skip
    run(Launch(spread_kernel, batch * heads * -(-stored // _BLOCK_STORED), names, 4, 1), grad.device)
    return out
