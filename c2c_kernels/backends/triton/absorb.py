"""Segments whose projectors are absorbed: for few queries, raw tokens are read once for all heads, at their own width.

A score is q . (Wk x + bk) = (Wk^T q) . x + q . bk and an output Wv (sum w y) + bv sum w: `absorb_kernel` folds the
queries through Wk, a split of decode attends to raw tokens with all query heads in one tile, and what splits have found
goes through Wv when they are combined.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .attend import attend
from .tiles import dot, length_of, load_rows, positions_of


class Absorbed(NamedTuple):
    """What decode knows of an absorbed segment beside its Run."""

    query: Tensor  # (batch, q_heads, q_len, key width), contiguous: queries through the key projector
    shift: Tensor | None  # (batch, q_heads, q_len) float32: q . bk
    sums: Tensor  # (batch, q_heads * q_len, its splits, value width) float32
    value_proj: Tensor  # (kv_heads, VALUE_DIM, value width)
    value_proj_h: int
    value_proj_d: int
    value_bias: Tensor | None  # (kv_heads, VALUE_DIM)
    value_bias_h: int


@triton.jit(do_not_specialize=["q_len"])
def absorb_kernel(
    query, query_b, query_h, query_t,  # (batch, q_heads, q_len, DIM)
    proj, proj_h, proj_d,  # (kv_heads, DIM, WIDTH)
    bias, bias_h,  # (kv_heads, DIM), nullable
    out,  # (batch, q_heads, q_len, WIDTH), contiguous
    shift,  # (batch, q_heads, q_len) float32, contiguous; nullable with bias
    kv_heads, q_len, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program folds BLOCK_M rows of one KV head through BLOCK_W columns of its projector. WIDE: in float32."""
    tiles: tl.constexpr = (WIDTH + BLOCK_W - 1) // BLOCK_W
    row_tiles = tl.cdiv(q_len * GROUP, BLOCK_M)
    program = tl.program_id(0)
    tile, program = program % tiles, program // tiles
    first_row, program = program % row_tiles * BLOCK_M, program // row_tiles
    kv_head, batch_row = program % kv_heads, program // kv_heads
    rows, dims = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = rows < q_len * GROUP
    queries, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    offsets = heads.to(tl.int64) * query_h + queries.to(tl.int64) * query_t
    q = load_rows(query + batch_row.to(tl.int64) * query_b, offsets, inside, dims, DIM, BLOCK_D, True)
    columns = tile * BLOCK_W + tl.arange(0, BLOCK_W)
    at = proj + kv_head.to(tl.int64) * proj_h + dims[:, None] * proj_d + columns[None, :]
    w = tl.load(at, mask=(dims < DIM)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    dtype: tl.constexpr = tl.float32 if WIDE else q.dtype
    folded = dot(q.to(dtype), w.to(dtype), tl.zeros((BLOCK_M, BLOCK_W), tl.float32), PRECISION)
    row = (batch_row.to(tl.int64) * kv_heads * GROUP + heads) * q_len + queries
    kept = inside[:, None] & (columns < WIDTH)[None, :]
    tl.store(out + row[:, None] * WIDTH + columns[None, :], folded.to(out.dtype.element_ty), mask=kept)
    if bias is not None:
        b = tl.load(bias + kv_head.to(tl.int64) * bias_h + dims, mask=dims < DIM, other=0.0).to(tl.float32)
        tl.store(shift + row, tl.sum(q.to(tl.float32) * b[None, :], 1), mask=inside & (tile == 0))


@triton.jit
def absorbed_split(
    absorbed, run, states, query_positions, query_positions_b, query_positions_t, batch_row, split, its_splits,
    state_splits, first_state, kv_heads, q_len, own_end, scale, softcap, segment_window, KIND: tl.constexpr,
    GROUP: tl.constexpr, SOFTCAP: tl.constexpr, KEY_RAW: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_RAW: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_T: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Split number `split` of an absorbed segment: SPLIT raw tokens and the rows of all heads; row: query, head."""
    block_d: tl.constexpr = triton.next_power_of_2(max(KEY_WIDTH, 16))
    block_v: tl.constexpr = triton.next_power_of_2(max(VALUE_WIDTH, 16))
    rows, dims, value_dims = tl.arange(0, BLOCK_A), tl.arange(0, block_d), tl.arange(0, block_v)
    q_heads = kv_heads * GROUP
    row_inside = rows < q_len * q_heads
    queries, heads = rows // q_heads, rows % q_heads
    batch64 = batch_row.to(tl.int64)
    folded = (batch64 * q_heads + heads) * q_len + queries
    q = load_rows(absorbed.query, folded * KEY_WIDTH, row_inside, dims, KEY_WIDTH, block_d, True)
    if absorbed.shift is None:
        shift = None
    else:
        shift = tl.load(absorbed.shift + folded, mask=row_inside, other=0.0)
    positions = positions_of(
        query_positions, query_positions_b, query_positions_t, batch64, queries, row_inside, own_end, q_len
    )
    m = tl.full((BLOCK_A,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_A,), tl.float32)
    acc = tl.zeros((BLOCK_A, block_v), tl.float32)
    end = length_of(run.lengths, batch_row, run.length)
    first = split * SPLIT
    m, l, acc = attend(
        q, m, l, acc, run, batch_row, split * 0, heads, queries, row_inside, positions, first,
        tl.minimum(first + SPLIT, end), end, scale, softcap, segment_window, shift, KIND, True, SOFTCAP, KEY_WIDTH,
        VALUE_WIDTH, KEY_RAW, VALUE_RAW, block_d, block_v, BLOCK_T, STAGES, PRECISION,
    )  # fmt: skip
    row = (batch64 * kv_heads + heads // GROUP) * q_len * GROUP + queries * GROUP + heads % GROUP
    at = row * state_splits + first_state + split
    tl.store(states + at * 2, m, mask=row_inside)
    tl.store(states + at * 2 + 1, l, mask=row_inside)
    inside = (row_inside & (l != 0.0))[:, None] & (value_dims < VALUE_WIDTH)[None, :]
    at = row * its_splits + split
    tl.store(absorbed.sums + at[:, None] * VALUE_WIDTH + value_dims[None, :], acc, mask=inside)


@triton.jit
def absorbed_output(
    absorbed, states, base, row, kv_head, run_splits, reference, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """What an absorbed segment adds to a row's acc and l: (BLOCK_V,), (1,). `base`: its first state.

    BLOCK_W columns of the raw sums at a time, so that a wide sharer takes no more registers.
    """
    value_dims, steps, within = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_W)
    part = tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_V,), tl.float32)
    proj = (
        absorbed.value_proj
        + kv_head.to(tl.int64) * absorbed.value_proj_h
        + value_dims[:, None] * (absorbed.value_proj_d)
    )
    for start in range(0, run_splits, BLOCK_S):
        inside = start + steps < run_splits
        at = states + (base + start + steps) * 2
        factors = tl.exp2(tl.load(at, mask=inside, other=-float("inf")) - reference)
        part += tl.sum(tl.load(at + 1, mask=inside, other=0.0) * factors, 0)
    for first in range(0, VALUE_WIDTH, BLOCK_W):
        columns = first + within
        raw = tl.zeros((BLOCK_W,), tl.float32)
        for start in range(0, run_splits, BLOCK_S):
            inside = start + steps < run_splits
            at = states + (base + start + steps) * 2
            factors = tl.exp2(tl.load(at, mask=inside, other=-float("inf")) - reference)
            filled = inside & (tl.load(at + 1, mask=inside, other=0.0) != 0.0)
            at = absorbed.sums + (row * run_splits + start + steps)[:, None] * VALUE_WIDTH + columns[None, :]
            found = tl.load(at, mask=filled[:, None] & (columns < VALUE_WIDTH)[None, :], other=0.0)
            raw += tl.sum(found * factors[:, None], 0)
        mask = (value_dims < VALUE_DIM)[:, None] & (columns < VALUE_WIDTH)[None, :]
        w = tl.load(proj + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += tl.sum(w * raw[None, :], 1)
    if absorbed.value_bias is not None:
        at = absorbed.value_bias + kv_head.to(tl.int64) * absorbed.value_bias_h + value_dims
        acc += tl.load(at, mask=value_dims < VALUE_DIM, other=0.0).to(tl.float32) * part
    return acc, part
