"""`quantize_kv` on Triton: int8 and a scale per token and head, one launch for keys or values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .launch import Launch, run


@triton.jit
def rounded(x):
    """To the nearest integer, ties to even, for |x| < 2^22: the addition has no bits left for a fraction."""
    magic: tl.constexpr = 12582912.0  # 1.5 * 2^23
    return (x + magic) - magic


@triton.jit
def quantise_kernel(
    x, x_b, x_h, x_n,  # (batch, heads, length, DIM)
    out, scale,  # (batch, heads, length, DIM) int8 and (batch, heads, length) float32, contiguous
    rows, heads, length, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """scale = max |x| / 127, q = x / scale to the nearest; a token that is not finite gets a scale that is not."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, dims = row < rows, tl.arange(0, BLOCK_D)
    batch, head, token = row // length // heads, row // length % heads, row % length
    at = x + batch.to(tl.int64) * x_b + head.to(tl.int64) * x_h + token.to(tl.int64) * x_n
    mask = inside[:, None] & (dims < DIM)[None, :]
    values = tl.load(at[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    broken = tl.max((values != values).to(tl.int32), 1) != 0
    its_scale = tl.where(broken, float("nan"), tl.div_rn(tl.max(tl.abs(values), 1), 127.0))
    usable = (its_scale > 0.0) & (its_scale < float("inf"))
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, its_scale, 1.0)), 0.0)
    scaled = tl.where(usable[:, None], values * inverse[:, None], 0.0)
    codes = tl.minimum(tl.maximum(rounded(scaled), -127.0), 127.0)
    tl.store(out + row.to(tl.int64)[:, None] * DIM + dims[None, :], codes.to(tl.int8), mask=mask)
    tl.store(scale + row, its_scale, mask=inside)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (batch, heads, length, dim) as int8, and the scales (batch, heads, length)."""
    x = arguments.rows(x)
    out, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:3], dtype=torch.float32)
    dim = x.shape[3]
    if scale.numel() == 0:
        return out, scale
    if dim == 0:
        return out, scale.zero_()
    block = 1 << (dim - 1).bit_length()
    block_rows = max(1, 2048 // block)
    names = {
        "x": x, "x_b": x.stride(0), "x_h": x.stride(1), "x_n": x.stride(2), "out": out, "scale": scale,
        "rows": scale.numel(), "heads": x.shape[1], "length": x.shape[2], "DIM": dim, "BLOCK_D": block,
        "BLOCK_M": block_rows,
    }  # fmt: skip
    run(
        Launch(quantise_kernel, -(-scale.numel() // block_rows), names, 4, 1, fusion=False), x.device
    )  # or it rounds x / scale + magic once
    return out, scale
