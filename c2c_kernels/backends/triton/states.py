"""`merge_states` on Triton: any number of attention states into one, one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .launch import Launch, run
from .softmax import LN2, LOG2E, safe


class State(NamedTuple):
    """One attention result; strides in elements."""

    out: Tensor  # (batch, heads, q_len, DIM)
    out_b: int
    out_h: int
    out_t: int
    lse: Tensor  # (batch, heads, q_len)
    lse_b: int
    lse_h: int
    lse_t: int


@triton.jit
def merge_kernel(
    out, lse,  # (batch, heads, q_len, DIM) and (batch, heads, q_len), contiguous
    states,  # COUNT x State
    rows, heads, q_len, COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program merges BLOCK_M rows. A state with lse -inf is not read."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    batch, head, token = (row // q_len // heads).to(tl.int64), (row // q_len % heads).to(tl.int64), row % q_len
    dims = tl.arange(0, BLOCK_D)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for number in tl.static_range(COUNT):
        state = states[number]
        at = state.lse + batch * state.lse_b + head * state.lse_h + token.to(tl.int64) * state.lse_t
        m = tl.maximum(m, tl.load(at, mask=inside, other=-float("inf")).to(tl.float32) * LOG2E)
    reference = safe(m)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for number in tl.static_range(COUNT):
        state = states[number]
        at = state.lse + batch * state.lse_b + head * state.lse_h + token.to(tl.int64) * state.lse_t
        its_lse = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32) * LOG2E
        weight = tl.exp2(its_lse - reference)
        l += weight
        at = state.out + batch * state.out_b + head * state.out_h + token.to(tl.int64) * state.out_t
        read = (inside & (its_lse != -float("inf")))[:, None] & (dims < DIM)[None, :]
        found = tl.load(at[:, None] + dims[None, :], mask=read, other=0.0).to(tl.float32)
        acc += found * weight[:, None]
    empty = l == 0.0
    divisor = tl.where(empty, 1.0, l)
    at = out + row.to(tl.int64)[:, None] * DIM + dims[None, :]
    kept = inside[:, None] & (dims < DIM)[None, :]
    tl.store(at, (acc / divisor[:, None]).to(out.dtype.element_ty), mask=kept)
    merged = tl.where(empty, -float("inf"), (m + tl.log2(divisor)) * LN2)
    tl.store(lse + row, merged, mask=inside)


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """out = sum_s exp(lse_s - lse) out_s with lse = ln sum_s exp(lse_s)."""
    outs = [arguments.rows(out) for out in outs]
    lses = [arguments.supported(lse) for lse in lses]
    out = outs[0].new_empty(outs[0].shape)
    lse = out.new_empty(out.shape[:3], dtype=torch.float32)
    dim = out.shape[3]
    if lse.numel() == 0:
        return out, lse
    block = 1 << max(0, dim - 1).bit_length()
    block_rows = max(1, 2048 // block)
    states = tuple(State._make((o, *o.stride()[:3], s, *s.stride())) for o, s in zip(outs, lses, strict=True))
    names = {
        "out": out, "lse": lse, "states": states, "rows": lse.numel(), "heads": out.shape[1], "q_len": out.shape[2],
        "COUNT": len(states), "DIM": dim, "BLOCK_D": block, "BLOCK_M": block_rows,
    }  # fmt: skip
    run(Launch(merge_kernel, -(-lse.numel() // block_rows), names, 4, 1), out.device)
    return out, lse
