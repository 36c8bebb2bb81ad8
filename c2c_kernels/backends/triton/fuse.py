"""The paper's fuser in one launch: every matrix product of every layer, those that need others' results behind them.

A *step* is one product of the network (`fuse_steps`), a *job* one half of a layer and BLOCK_M of its tokens. A program
takes a ticket and with it a tile of a step and job. Tickets are given out step by step: whatever a program waits for
has a lower ticket, so it runs or is done, and nothing waits for a program that cannot start. A job's counter says how
many of its tiles are done; what they leave is read only by who has seen the counter. Every number has one program that
sums it in a fixed order, so results do not depend on who was first.

RMS norms are taken in two parts: whoever makes h stores norm * h and the sums of squares of its columns; 1 / rms
multiplies the product with w1. So both factors of each product are plain loads.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .fuse_products import address, buffer_at, product, product_of_cache, rows_of, vector
from .fuse_steps import (
    BLOCKS_AT,
    EMBED,
    ENTER,
    GATE_AT,
    IN_BIAS_AT,
    IN_WEIGHT_AT,
    INDEX_AT,
    INNER,
    LEAVE,
    LOGIT_AT,
    OUT_AT,
    OUT_BIAS_AT,
    OUT_WEIGHT_AT,
    OUTER,
    PROJECT,
    RECEIVER_AT,
    RESIDUAL_AT,
    SCALE,
    SCALE_BIAS_AT,
    SCALE_WEIGHT_AT,
    SHARER_AT,
)
from .tiles import dot


class Layout(NamedTuple):
    """How one half's tensors are read; those of a launch are alike. Tensors stand for their dtypes alone, None: absent.

    `_b`, `_h`, `_n`: strides of (batch, heads, tokens).
    """

    weight: Tensor
    receiver: Tensor  # (batch, kv_heads, length, dim)
    receiver_b: int
    receiver_h: int
    receiver_n: int
    sharer: Tensor  # (batch, sharer_heads, stored, sharer_dim)
    sharer_b: int
    sharer_h: int
    sharer_n: int
    residual: Tensor  # as the receiver
    residual_b: int
    residual_h: int
    residual_n: int
    out: Tensor  # as the receiver
    out_b: int
    out_h: int
    out_n: int
    gate: Tensor | None  # (batch, kv_heads, length); None: gate_logit > 0
    gate_b: int
    gate_h: int
    gate_n: int
    selected: Tensor | None  # (batch, length): an index
    selected_b: int
    selected_n: int
    kv_heads: int
    sharer_heads: int


class Buffers(NamedTuple):
    """What programs leave for each other, for each job BLOCK_M rows."""

    h: Tensor  # (jobs, BLOCK_M, hidden): of embed
    projected: Tensor  # the same, of project's blocks
    normed: Tensor  # norm * h for the next block of embed and project
    scale_normed: Tensor  # the same for the scale's block
    inner: Tensor  # (jobs, BLOCK_M, inner): gelu(w1 ...) of embed and project
    scale_inner: Tensor  # of the scale's block
    hidden: int  # widths with padding, which holds zeros
    width: int
    squares: Tensor  # (jobs, tiles of hidden, BLOCK_M) float32: sums of squares of h
    logits: Tensor  # (jobs, tiles of hidden, kv_heads, BLOCK_M) float32: parts of scale_weight h
    tiles: int  # of hidden
    counters: Tensor  # (1 + jobs,) int32, zeros: tickets, then tiles of each job that are done


@triton.jit
def norm_of(row, block, like):
    """The norm's weight of a block."""
    return address(row, BLOCKS_AT + 3 * block, like, False)


@triton.jit
def store_normed(h, norm, normed, buffers, job, columns, size, BLOCK_M: tl.constexpr):
    """norm * h, for the product with w1."""
    scaled = h.to(tl.float32) * vector(norm, columns, size)[None, :]
    tl.store(buffer_at(normed, job, buffers.hidden, columns, BLOCK_M), scaled.to(h.dtype))


@triton.jit
def store_squares(h, buffers, job, tile, BLOCK_M: tl.constexpr):
    """Sums of squares of the tile's columns of h."""
    exact = h.to(tl.float32)
    at = buffers.squares + (job * buffers.tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(at, tl.sum(exact * exact, 1))


@triton.jit
def enter(
    row, layout, buffers, job, row_tile, tile, size, width, batch, length, reach, DIM: tl.constexpr,
    SHARER_DIM: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = in_weight [sharer, receiver] + in_bias."""
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    batch_rows, tokens, inside = rows_of(row_tile, batch, length, BLOCK_M)
    weight = address(row, IN_WEIGHT_AT, layout.weight, ALIGNED)
    sharer, receiver = (
        address(row, SHARER_AT, layout.sharer, ALIGNED), address(row, RECEIVER_AT, layout.receiver, ALIGNED)
    )  # fmt: skip
    if layout.selected is None:
        sources, stored = tokens, inside
    else:
        index = address(row, INDEX_AT, layout.selected, False)
        at = index + batch_rows * layout.selected_b + tokens * layout.selected_n
        sources = tl.load(at, mask=inside, other=-1).to(tl.int64)
        stored = inside & (sources >= 0) & (sources < reach)
    dtype: tl.constexpr = buffers.h.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = product_of_cache(
        sharer, batch_rows * layout.sharer_b + sources * layout.sharer_n, stored, layout.sharer_h, layout.sharer_heads,
        weight, columns, size, width, acc, dtype, SHARER_DIM, MASKED, BLOCK_K, STAGES, PRECISION,
    )  # fmt: skip
    acc = product_of_cache(
        receiver, batch_rows * layout.receiver_b + tokens * layout.receiver_n, inside, layout.receiver_h,
        layout.kv_heads, weight + layout.sharer_heads * SHARER_DIM, columns, size, width, acc, dtype, DIM, MASKED,
        BLOCK_K, STAGES, PRECISION,
    )  # fmt: skip
    h = (acc + vector(address(row, IN_BIAS_AT, layout.weight, False), columns, size)[None, :]).to(dtype)
    tl.store(buffer_at(buffers.h, job, buffers.hidden, columns, BLOCK_M), h)
    store_squares(h, buffers, job, tile, BLOCK_M)
    store_normed(h, norm_of(row, EMBED, layout.weight), buffers.normed, buffers, job, columns, size, BLOCK_M)


@triton.jit
def inner(
    row, layout, buffers, job, block, tile, size, width, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
    EPSILON: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gelu(w1 rmsnorm(h)): 1 / rms is taken here."""
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    normed, result = buffers.normed, buffers.inner
    if block == SCALE:
        normed, result = buffers.scale_normed, buffers.scale_inner
    weight = address(row, BLOCKS_AT + 3 * block + 1, layout.weight, ALIGNED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = product(
        normed + job * BLOCK_M * buffers.hidden, buffers.hidden, weight, columns, size, width, acc, MASKED, BLOCK_K,
        STAGES, PRECISION,
    )  # fmt: skip
    tiles, rows = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_M)
    at = buffers.squares + (job * buffers.tiles + tiles[:, None]) * BLOCK_M + rows[None, :]
    squares = tl.sum(tl.load(at, mask=(tiles < buffers.tiles)[:, None], other=0.0), 0)
    x = acc * tl.rsqrt(squares / width + EPSILON)[:, None]
    x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    tl.store(buffer_at(result, job, buffers.width, columns, BLOCK_M), x.to(result.dtype.element_ty))


@triton.jit
def outer(
    row, layout, buffers, job, block, blocks, tile, size, width, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """h + w2 inner. Of the scale's block only its part of scale_weight h is kept."""
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    source, before, result = buffers.inner, buffers.h, buffers.h
    if block == SCALE:
        source = buffers.scale_inner
    elif block >= PROJECT:
        result = buffers.projected
        if block > PROJECT:
            before = buffers.projected
    weight = address(row, BLOCKS_AT + 3 * block + 2, layout.weight, ALIGNED)
    acc = tl.load(buffer_at(before, job, buffers.hidden, columns, BLOCK_M)).to(tl.float32)
    acc = product(
        source + job * BLOCK_M * buffers.width, buffers.width, weight, columns, size, width, acc, MASKED, BLOCK_K,
        STAGES, PRECISION,
    )  # fmt: skip
    h = acc.to(result.dtype.element_ty)
    if block == SCALE:
        store_logits(row, layout, buffers, job, tile, h, columns, size, BLOCK_M, BLOCK_H, PRECISION)
    else:
        tl.store(buffer_at(result, job, buffers.hidden, columns, BLOCK_M), h)
        following = block + 1
        if block == EMBED:
            following = PROJECT
            norm = norm_of(row, SCALE, layout.weight)
            store_normed(h, norm, buffers.scale_normed, buffers, job, columns, size, BLOCK_M)
        if following < blocks:
            store_squares(h, buffers, job, tile, BLOCK_M)
            norm = norm_of(row, following, layout.weight)
            store_normed(h, norm, buffers.normed, buffers, job, columns, size, BLOCK_M)


@triton.jit
def store_logits(
    row, layout, buffers, job, tile, h, columns, size, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What a tile's columns of h add to scale_weight h."""
    rows = tl.arange(0, BLOCK_M)
    weight = address(row, SCALE_WEIGHT_AT, layout.weight, False)
    base = buffers.logits + (job * buffers.tiles + tile) * layout.kv_heads * BLOCK_M
    for first in range(0, layout.kv_heads, BLOCK_H):
        heads = first + tl.arange(0, BLOCK_H)
        mask = (heads < layout.kv_heads)[:, None] & (columns < size)[None, :]
        w = tl.load(weight + heads[:, None] * size + columns[None, :], mask=mask, other=0.0)
        part = dot(h, tl.trans(w.to(h.dtype)), tl.zeros((BLOCK_M, BLOCK_H), tl.float32), PRECISION)
        at = base + heads[None, :] * BLOCK_M + rows[:, None]
        tl.store(at, part, mask=(heads < layout.kv_heads)[None, :])


@triton.jit
def token_weights(
    row, layout, buffers, job, head, batch_rows, tokens, inside, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr
):
    """(BLOCK_M,) gate * w of one head."""
    tiles, rows = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_M)
    at = buffers.logits + ((job * buffers.tiles + tiles[:, None]) * layout.kv_heads + head) * BLOCK_M + rows[None, :]
    logit = tl.sum(tl.load(at, mask=(tiles < buffers.tiles)[:, None], other=0.0), 0)
    logit += tl.load(address(row, SCALE_BIAS_AT, layout.weight, False) + head).to(tl.float32)
    weight = 1.0 / (1.0 + tl.exp(-logit))
    if layout.gate is None:
        return weight
    else:
        gate = address(row, GATE_AT, layout.gate, False)
        at = gate + batch_rows * layout.gate_b + tokens * layout.gate_n
        at += (head + tl.zeros((), tl.int64)) * layout.gate_h
        return weight * tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def leave(
    row, layout, buffers, job, row_tile, tile, size, width, batch, length, open, DIM: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = residual + gate * w * (out_weight h + out_bias); the residual alone where the gate is closed."""
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    batch_rows, tokens, inside = rows_of(row_tile, batch, length, BLOCK_M)
    if open:
        weight = address(row, OUT_WEIGHT_AT, layout.weight, ALIGNED)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = product(
            buffers.projected + job * BLOCK_M * buffers.hidden, buffers.hidden, weight, columns, size, width, acc,
            MASKED, BLOCK_K, STAGES, PRECISION,
        )  # fmt: skip
        acc += vector(address(row, OUT_BIAS_AT, layout.weight, False), columns, size)[None, :]
        factors = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        first, last = tile * BLOCK_N // DIM, tl.minimum((tile + 1) * BLOCK_N, size) - 1
        for head in range(first, last // DIM + 1):
            factor = token_weights(row, layout, buffers, job, head, batch_rows, tokens, inside, BLOCK_M, BLOCK_T)
            factors = tl.where((columns // DIM == head)[None, :], factor[:, None], factors)
        acc *= factors
        move(row, layout, batch_rows, tokens, inside, columns, size, acc, DIM, ALIGNED)
    elif tl.load(row + RESIDUAL_AT) != tl.load(row + OUT_AT):
        move(row, layout, batch_rows, tokens, inside, columns, size, None, DIM, ALIGNED)


@triton.jit
def tile_of(row, slot, like, stride_b, stride_h, stride_n, batch_rows, tokens, columns, DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Pointers of tokens and columns of a cache (batch, heads, tokens, DIM)."""
    heads, dims = (columns // DIM).to(tl.int64), columns % DIM
    start = address(row, slot, like, ALIGNED) + (batch_rows * stride_b + tokens * stride_n)[:, None]
    return start + (heads * stride_h + dims)[None, :]


@triton.jit
def move(
    row, layout, batch_rows, tokens, inside, columns, size, added, DIM: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """out = residual + added; its very bits where that is None and dtypes are alike."""
    kept = inside[:, None] & (columns < size)[None, :]
    at = tile_of(
        row, RESIDUAL_AT, layout.residual, layout.residual_b, layout.residual_h, layout.residual_n, batch_rows, tokens,
        columns, DIM, ALIGNED,
    )  # fmt: skip
    result = tl.load(at, mask=kept, other=0.0)
    if added is not None:
        result = result.to(tl.float32) + added
    at = tile_of(
        row, OUT_AT, layout.out, layout.out_b, layout.out_h, layout.out_n, batch_rows, tokens, columns, DIM, ALIGNED
    )
    tl.store(at, result.to(layout.out.dtype.element_ty), mask=kept)


@triton.jit
def fetch(row, layout, kind, block, tile, size, width, BLOCK_N: tl.constexpr):
    """Asks for the tile's weights: they are on their way to the L2 cache while the program waits."""
    slot = OUT_WEIGHT_AT
    if kind == INNER:
        slot = BLOCKS_AT + 3 * block + 1
    elif kind == OUTER:
        slot = BLOCKS_AT + 3 * block + 2
    weight = address(row, slot, layout.weight, False)
    line: tl.constexpr = 1024 // layout.weight.dtype.element_ty.primitive_bitwidth  # numbers of 128 bytes
    columns = tl.minimum(tile * BLOCK_N + tl.arange(0, BLOCK_N), size - 1)
    for first in range(0, width, 16 * line):
        k = tl.minimum(first + tl.arange(0, 16) * line, width - 1)
        pointers = weight + columns[:, None] * width + k[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(tl.int64, bitcast=True)], tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["jobs", "row_tiles", "first_tile", "batch", "length", "stored"])
def fuse_kernel(
    table,  # (halves, ADDRESSES) int64, of fuse_steps
    steps,  # fuse_steps.Step, each
    layout,  # Layout
    buffers,  # Buffers
    jobs, row_tiles, first_tile,  # jobs: halves x row_tiles; a half's tiles start at first_tile
    batch, length,
    stored,  # tokens of the sharer, for an index
    BLOCKS: tl.constexpr, ADDRESSES: tl.constexpr, DIM: tl.constexpr, SHARER_DIM: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, EPSILON: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """One tile (BLOCK_M tokens, BLOCK_N columns) of a step of a job. ALIGNED: tensors and their rows, to 16 bytes."""
    ticket = tl.atomic_add(buffers.counters, 1, sem="relaxed")
    first, kind, block, size, width, tiles, wait = ticket * 0, 0, 0, 0, 0, 1, 0
    for number in tl.static_range(len(steps)):
        step = steps[number]
        reached = ticket >= step.first * jobs
        first, tiles = tl.where(reached, step.first, first), tl.where(reached, step.tiles, tiles)
        kind, block = tl.where(reached, step.kind, kind), tl.where(reached, step.block, block)
        size, width = tl.where(reached, step.size, size), tl.where(reached, step.width, width)
        wait = tl.where(reached, step.wait, wait)
    place = ticket - first * jobs
    tile, place = place % tiles, place // tiles
    job, row_tile = place.to(tl.int64), first_tile + place % row_tiles
    if ALIGNED:
        size, width = tl.multiple_of(size, 16), tl.multiple_of(width, 16)
    row = table + place // row_tiles * ADDRESSES
    if layout.gate is None:
        open = tl.load(address(row, LOGIT_AT, layout.weight, False)) > 0
    else:
        open = job >= 0
    done = buffers.counters + 1 + job
    if open & (kind != ENTER):
        if tl.atomic_add(done, 0, sem="acquire") < wait:
            if FETCH:
                fetch(row, layout, kind, block, tile, size, width, BLOCK_N)
            while tl.atomic_add(done, 0, sem="acquire") < wait:
                pass
        tl.debug_barrier()
    if kind == LEAVE:
        leave(
            row, layout, buffers, job, row_tile, tile, size, width, batch, length, open, DIM, ALIGNED, MASKED,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_T, STAGES, PRECISION,
        )  # fmt: skip
    elif open:
        if kind == ENTER:
            enter(
                row, layout, buffers, job, row_tile, tile, size, width, batch, length, stored, DIM, SHARER_DIM,
                ALIGNED, MASKED, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PRECISION,
            )  # fmt: skip
        elif kind == INNER:
            inner(
                row, layout, buffers, job, block, tile, size, width, ALIGNED, MASKED, EPSILON, BLOCK_M, BLOCK_N,
                BLOCK_K, BLOCK_T, STAGES, PRECISION,
            )  # fmt: skip
        else:
            outer(
                row, layout, buffers, job, block, BLOCKS, tile, size, width, ALIGNED, MASKED, BLOCK_M, BLOCK_N,
                BLOCK_K, BLOCK_H, STAGES, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # all of the tile is stored before the counter says so
        tl.atomic_add(done, 1, sem="release")
