"""Segments whose projectors are absorbed: for few queries, raw tokens are read once for all heads, at their own width.

A score is q . (Wk x + bk) = (Wk^T q) . x + q . bk and an output Wv (sum w y) + bv sum w. The first programs of
`split_kernel` fold the queries through Wk; those of raw tokens wait for them, then attend with all query heads in one
tile. What they have found goes through Wv where it is combined, once for all rows of a KV head.

Each piece of folding has a mark, in which a program that takes it on leaves the call's own number (random, 64 bits,
even) and, once it has folded, that number + 1. With anything else in its mark a piece is free to be taken. A program of
raw tokens takes on what it finds free before it waits, so it waits only for programs that run and wait for nobody:
nothing can block, in whatever order a device starts programs. `combine_kernel` clears the marks for the next run of a
CUDA graph.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .attend import attend
from .softmax import load_states, store_states
from .tiles import INTERPRETING, dot, length_of, load_rows, positions_of, powers_of_two, told


class Absorbed(NamedTuple):
    """What decode knows of an absorbed segment beside its Run."""

    key_proj: Tensor  # (kv_heads, DIM, key width)
    key_proj_h: int
    key_proj_d: int
    key_bias: Tensor | None  # (kv_heads, DIM)
    key_bias_h: int
    query: Tensor  # (batch, q_heads, q_len, query_row), contiguous: queries through the key projector
    query_row: int  # key width padded to 16 bytes
    shift: Tensor | None  # (batch, q_heads, q_len) float32: q . bk
    marks: Tensor  # (batch, programs that fold) int64
    sums: Tensor  # (batch, q_heads * q_len, its splits, value width), float16 or float32, to be scaled as states say
    value_proj: Tensor  # (kv_heads, VALUE_DIM, value width)
    value_proj_h: int
    value_proj_d: int
    value_bias: Tensor | None  # (kv_heads, VALUE_DIM)
    value_bias_h: int


class Folding(NamedTuple):
    """How a segment's queries are folded; compiled in. All 0 for runs in receiver space."""

    rows: int = 0  # of a KV head that a program takes
    columns: int = 0  # of the projector
    wide: int = 0  # 1: in float32, because queries and projector differ in dtype
    marks: int = 0  # programs of a batch row, to a power of 2
    tile: int = 0  # rows of all heads that a program of raw tokens takes
    # 1: what is folded is stored by atomic exchanges, by which race checkers know that it is shared; AMD's compiler in
    # triton 3.7.1 fails on them.
    exchange: int = 0


FOLDING = tl.constexpr(len(Folding._fields))  # kernels take the Folding of every run in one tuple of numbers


@triton.jit
def shared_store(pointers, values, mask, EXCHANGE: tl.constexpr):
    """Stores what other programs of the launch read after a mark that is released; see Folding.exchange."""
    if INTERPRETING or not EXCHANGE:
        tl.store(pointers, values, mask=mask)
    else:
        tl.atomic_xchg(pointers, values, mask=mask, sem="relaxed")


@triton.jit
def store_folded(absorbed, row, columns, inside, values, WIDTH: tl.constexpr, EXCHANGE: tl.constexpr):
    """values (rows, columns) to the rows of absorbed.query; 16-bit numbers in pairs, for exchanges have 32 bits."""
    rows: tl.constexpr = values.shape[0]
    pairs: tl.constexpr = values.shape[1] // 2
    values = values.to(absorbed.query.dtype.element_ty)
    if values.dtype == tl.float32 or INTERPRETING or not EXCHANGE:
        kept = inside[:, None] & (columns < WIDTH)[None, :]
        shared_store(absorbed.query + row[:, None] * absorbed.query_row + columns[None, :], values, kept, EXCHANGE)
    else:
        bits = tl.reshape(values.to(tl.int16, bitcast=True), (rows, pairs, 2))
        low, high = tl.split(bits)
        both = (high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)
        first = tl.min(columns, 0) // 2 + tl.arange(0, pairs)
        at = absorbed.query.to(tl.pointer_type(tl.int32), bitcast=True)
        kept = inside[:, None] & (first * 2 < WIDTH)[None, :]
        shared_store(at + row[:, None] * (absorbed.query_row // 2) + first[None, :], both, kept, EXCHANGE)


@triton.jit
def folds_of(kv_heads, WIDTH: tl.constexpr, FOLDINGS: tl.constexpr, NUMBER: tl.constexpr, BLOCK_M: tl.constexpr):
    """Pieces of the folding of a batch row's queries for a segment, BLOCK_M rows of each KV head."""
    block_f: tl.constexpr = FOLDINGS[FOLDING * NUMBER]
    block_w: tl.constexpr = FOLDINGS[FOLDING * NUMBER + 1]
    of_head: tl.constexpr = BLOCK_M // block_f * ((WIDTH + block_w - 1) // block_w)
    return kv_heads * of_head


@triton.jit
def raw_programs_of(run, q_len, q_heads, FOLDINGS: tl.constexpr, NUMBER: tl.constexpr, SPLIT: tl.constexpr):
    """Programs of a batch row that take a segment's raw tokens: splits x tiles of rows of all heads."""
    return tl.cdiv(told(run.length), SPLIT) * tl.cdiv(q_len * q_heads, FOLDINGS[FOLDING * NUMBER + 4])


@triton.jit
def fold(
    absorbed, query, query_b, query_h, query_t, mark, call, batch_row, number, kv_heads, q_len, GROUP: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, FOLDINGS: tl.constexpr, NUMBER: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Piece `number`: Folding.rows rows of one KV head through Folding.columns columns of its projector."""
    block_f: tl.constexpr = FOLDINGS[FOLDING * NUMBER]
    block_w: tl.constexpr = FOLDINGS[FOLDING * NUMBER + 1]
    tiles: tl.constexpr = (WIDTH + block_w - 1) // block_w
    row_tiles: tl.constexpr = BLOCK_M // block_f
    tile, kv_head = number % tiles, number // tiles // row_tiles
    rows, dims = number // tiles % row_tiles * block_f + tl.arange(0, block_f), tl.arange(0, BLOCK_D)
    inside = rows < q_len * GROUP
    queries, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    offsets = heads.to(tl.int64) * query_h + queries.to(tl.int64) * query_t
    q = load_rows(query + batch_row.to(tl.int64) * query_b, offsets, inside, dims, DIM, BLOCK_D, True)
    columns = tile * block_w + tl.arange(0, block_w)
    head64 = kv_head.to(tl.int64)
    at = absorbed.key_proj + head64 * absorbed.key_proj_h + dims[:, None] * absorbed.key_proj_d + columns[None, :]
    w = tl.load(at, mask=(dims < DIM)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    dtype: tl.constexpr = tl.float32 if FOLDINGS[FOLDING * NUMBER + 2] != 0 else q.dtype
    folded = dot(q.to(dtype), w.to(dtype), tl.zeros((block_f, block_w), tl.float32), PRECISION)
    row = (batch_row.to(tl.int64) * kv_heads * GROUP + heads) * q_len + queries
    exchange: tl.constexpr = FOLDINGS[FOLDING * NUMBER + 5]
    store_folded(absorbed, row, columns, inside, folded, WIDTH, exchange)
    if absorbed.key_bias is not None:
        at = absorbed.key_bias + head64 * absorbed.key_bias_h + dims
        b = tl.load(at, mask=dims < DIM, other=0.0).to(tl.float32)
        shared_store(absorbed.shift + row, tl.sum(q.to(tl.float32) * b[None, :], 1), inside & (tile == 0), exchange)
    tl.debug_barrier()  # all of it is stored before the mark says so
    tl.atomic_xchg(mark, call + 1, sem="release")


@triton.jit
def taken_on(mark, call):
    """Whether the piece of that mark was free and is now this program's."""
    found = tl.atomic_add(mark, 0, sem="relaxed")
    free = (found != call) & (found != call + 1)
    if free:
        free = tl.atomic_cas(mark, found, call, sem="relaxed") == found  # only who takes it on changes a free one
    return free


@triton.jit
def marks_of(absorbed, batch_row, count, FOLDINGS: tl.constexpr, NUMBER: tl.constexpr):
    """The marks of a batch row's pieces, and which of a block's places have one."""
    numbers = tl.arange(0, FOLDINGS[FOLDING * NUMBER + 3])
    at, inside = absorbed.marks + batch_row.to(tl.int64) * count + numbers, numbers < count
    return tl.atomic_add(at, tl.zeros_like(numbers).to(tl.int64), mask=inside, sem="acquire"), inside


@triton.jit
def fold_queries(
    absorbed, runs, query, query_b, query_h, query_t, call, batch_row, program, raw_program, kv_heads, q_len,
    RUNS: tl.constexpr, RAWS: tl.constexpr, FOLDINGS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program `program` of those that fold takes on its own piece, one of raw tokens (from 0 on) all that are free."""
    first, first_raw = 0, 0
    for number in tl.static_range(RUNS):
        if absorbed[number] is not None:
            count = folds_of(kv_heads, RAWS[4 * number + 1], FOLDINGS, number, BLOCK_M)
            its_programs = raw_programs_of(runs[number], q_len, kv_heads * GROUP, FOLDINGS, number, SPLITS[number])
            low = tl.minimum(tl.maximum(program - first, 0), count)
            high = tl.where(program < first, low, tl.minimum(low + 1, count))
            # Float32 products of wide heads take no tensor cores, and spill in a loop: there a piece is left to its own
            # program, and those of raw tokens rely on a device that starts programs in the order of their numbers.
            float32 = query.dtype.element_ty == tl.float32 or FOLDINGS[FOLDING * number + 2] != 0
            if float32 and PRECISION == "ieee" and BLOCK_D > 128:
                if (raw_program < 0) & (low < high):
                    mark = absorbed[number].marks + batch_row.to(tl.int64) * count + low
                    fold(
                        absorbed[number], query, query_b, query_h, query_t, mark, call, batch_row, low, kv_heads, q_len,
                        GROUP, DIM, RAWS[4 * number + 1], FOLDINGS, number, BLOCK_M, BLOCK_D, PRECISION,
                    )  # fmt: skip
            else:
                if raw_program >= 0:
                    low, high = tl.zeros_like(low), tl.zeros_like(high)
                    if (raw_program >= first_raw) & (raw_program < first_raw + its_programs):
                        found, inside = marks_of(absorbed[number], batch_row, count, FOLDINGS, number)
                        free = inside & (found != call) & (found != call + 1)
                        high = tl.where(tl.max(free.to(tl.int32), 0) != 0, count, high)
                for piece_number in range(low, high):
                    piece = piece_number + tl.zeros((), tl.int32)
                    mark = absorbed[number].marks + batch_row.to(tl.int64) * count + piece
                    if taken_on(mark, call):
                        fold(
                            absorbed[number], query, query_b, query_h, query_t, mark, call, batch_row, piece, kv_heads,
                            q_len, GROUP, DIM, RAWS[4 * number + 1], FOLDINGS, number, BLOCK_M, BLOCK_D, PRECISION,
                        )  # fmt: skip
            first += count
            first_raw += its_programs


@triton.jit
def await_folds(absorbed, call, batch_row, count, FOLDINGS: tl.constexpr, NUMBER: tl.constexpr):
    """Returns when all of the batch row's queries are folded, which other programs have taken on."""
    missing = count
    while missing > 0:
        found, inside = marks_of(absorbed, batch_row, count, FOLDINGS, NUMBER)
        missing = tl.sum((inside & (found != call + 1)).to(tl.int32), 0)
    tl.debug_barrier()


@triton.jit
def clear_marks(
    absorbed, batch_row, kv_head, kv_heads, WIDTH: tl.constexpr, FOLDINGS: tl.constexpr, NUMBER: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Those of one KV head, so that a graph's next run finds none of this run's."""
    block: tl.constexpr = FOLDINGS[FOLDING * NUMBER + 3]
    numbers = tl.arange(0, block)
    count = folds_of(1, WIDTH, FOLDINGS, NUMBER, BLOCK_M)
    at = absorbed.marks + (batch_row.to(tl.int64) * kv_heads + kv_head) * count + numbers
    tl.store(at, tl.zeros((block,), tl.int64), mask=numbers < count)


@triton.jit
def absorbed_split(
    absorbed, run, states, query_positions, query_positions_b, query_positions_t, call, batch_row, program, its_splits,
    state_splits, first_state, kv_heads, q_len, own_end, scale, softcap, segment_window, KIND: tl.constexpr,
    GROUP: tl.constexpr, SOFTCAP: tl.constexpr, KEY_RAW: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_RAW: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, FOLDINGS: tl.constexpr, NUMBER: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program `program` of an absorbed segment: SPLIT raw tokens and Folding.tile rows of all heads; row: query, head.

    Neighbours take the same tokens.
    """
    block_a: tl.constexpr = FOLDINGS[FOLDING * NUMBER + 4]
    block_d: tl.constexpr = triton.next_power_of_2(max(KEY_WIDTH, 16))
    block_v: tl.constexpr = triton.next_power_of_2(max(VALUE_WIDTH, 16))
    q_heads = kv_heads * GROUP
    row_tiles = tl.cdiv(q_len * q_heads, block_a)
    split = program // row_tiles
    rows = program % row_tiles * block_a + tl.arange(0, block_a)
    dims, value_dims = tl.arange(0, block_d), tl.arange(0, block_v)
    row_inside = rows < q_len * q_heads
    queries, heads = rows // q_heads, rows % q_heads
    batch64 = batch_row.to(tl.int64)
    folded = (batch64 * q_heads + heads) * q_len + queries
    positions = positions_of(
        query_positions, query_positions_b, query_positions_t, batch64, queries, row_inside, own_end, q_len
    )
    await_folds(absorbed, call, batch_row, folds_of(kv_heads, KEY_WIDTH, FOLDINGS, NUMBER, BLOCK_M), FOLDINGS, NUMBER)
    at = folded * absorbed.query_row
    if run.key_scale is not None and KEY_RAW >= 16 and (KEY_RAW & (KEY_RAW - 1)) == 0 and KEY_WIDTH != KEY_RAW:
        q = ()
        for head in tl.static_range(KEY_WIDTH // KEY_RAW):
            raw_dims = head * KEY_RAW + tl.arange(0, KEY_RAW)
            q = q + (  # type: ignore[assignment]  # noqa: RUF005
                load_rows(absorbed.query, at, row_inside, raw_dims, KEY_WIDTH, KEY_RAW, True),
            )
    else:
        q = (load_rows(absorbed.query, at, row_inside, dims, KEY_WIDTH, block_d, True),)  # type: ignore[assignment]
    if absorbed.shift is None:
        shift = None
    else:
        shift = tl.load(absorbed.shift + folded, mask=row_inside, other=0.0)
    m = tl.full((block_a,), -float("inf"), tl.float32)
    l = tl.zeros((block_a,), tl.float32)
    acc = tl.zeros((block_a, block_v), tl.float32)
    end = length_of(run.lengths, batch_row, told(run.length))
    first = split * SPLIT
    m, l, acc = attend(
        q, m, l, acc, run, batch_row, split * 0, heads, queries, row_inside, positions, first,
        tl.minimum(first + SPLIT, end), end, scale, softcap, segment_window, shift, 0, KIND, True, SOFTCAP, KEY_WIDTH,
        VALUE_WIDTH, KEY_RAW, VALUE_RAW, block_d, block_v, BLOCK_T, STAGES, PRECISION,
    )  # fmt: skip
    row = (batch64 * kv_heads + heads // GROUP) * q_len * GROUP + queries * GROUP + heads % GROUP
    at = row * state_splits + first_state + split
    up, down = powers_of_two(tl.max(tl.abs(acc), 1))
    store_states(states, at, m, l, up, row_inside)
    acc *= down[:, None]  # the largest of a row at 2^14: in float16, 11 bits of what is not below 2^-28 of it
    at = row * its_splits + split
    inside = (row_inside & (l != 0.0))[:, None] & (value_dims < VALUE_WIDTH)[None, :]
    kept = absorbed.sums + at[:, None] * VALUE_WIDTH + value_dims[None, :]
    tl.store(kept, acc.to(absorbed.sums.dtype.element_ty), mask=inside)


@triton.jit
def absorbed_splits(
    absorbed, runs, states, query_positions, query_positions_b, query_positions_t, call, batch_row, program,
    state_splits, first_state, kv_heads, q_len, own_end, scale, softcap, segment_window, RUNS: tl.constexpr,
    KINDS: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr, RAWS: tl.constexpr, FOLDINGS: tl.constexpr,
    BLOCK_M: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program `program` of those of raw tokens, over all absorbed segments."""
    first = 0
    for number in tl.static_range(RUNS):
        if absorbed[number] is not None:
            its_splits = tl.cdiv(told(runs[number].length), SPLITS[number])
            its_programs = raw_programs_of(runs[number], q_len, kv_heads * GROUP, FOLDINGS, number, SPLITS[number])
            if (program >= first) & (program < first + its_programs):
                absorbed_split(
                    absorbed[number], runs[number], states, query_positions, query_positions_b, query_positions_t,
                    call, batch_row, program - first, its_splits, state_splits, first_state, kv_heads, q_len, own_end,
                    scale, softcap, segment_window, KINDS[number], GROUP, SOFTCAP, RAWS[4 * number],
                    RAWS[4 * number + 1], RAWS[4 * number + 2], RAWS[4 * number + 3], FOLDINGS, number, BLOCK_M,
                    TOKENS[number], SPLITS[number], STAGES, PRECISION,
                )  # fmt: skip
            first += its_programs
            first_state += its_splits


@triton.jit
def absorbed_output(
    absorbed, states, base, row, row_inside, kv_head, run_splits, reference, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """What an absorbed segment adds to the rows' acc (rows, BLOCK_V) and l (rows,). `base`: their first states of it.

    BLOCK_W columns of the raw sums at a time, so that a wide sharer takes no more registers.
    """
    value_dims, within = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_W)
    rows: tl.constexpr = row.shape[0]
    acc = tl.zeros((rows, BLOCK_V), tl.float32)
    part = tl.zeros((rows,), tl.float32)
    proj = (
        absorbed.value_proj
        + kv_head.to(tl.int64) * absorbed.value_proj_h
        + value_dims[None, :] * (absorbed.value_proj_d)
    )
    for first in range(0, VALUE_WIDTH, BLOCK_W):
        columns = first + within
        mask = (columns < VALUE_WIDTH)[:, None] & (value_dims < VALUE_DIM)[None, :]
        w = tl.load(proj + columns[:, None], mask=mask, other=0.0)
        raw = tl.zeros((rows, BLOCK_W), tl.float32)
        for start in range(0, run_splits, BLOCK_S):
            for step in tl.static_range(BLOCK_S):
                split = start + step
                inside = row_inside & (split < run_splits)
                factor, count, scale = load_states(states, base + split, reference, inside)
                filled = inside & (count != 0.0)
                if first == 0:
                    part = tl.fma(count, factor, part)
                factor *= scale
                at = absorbed.sums + (row * run_splits + split)[:, None] * VALUE_WIDTH + columns[None, :]
                found = tl.load(at, mask=filled[:, None] & (columns < VALUE_WIDTH)[None, :], other=0.0)
                raw = tl.fma(found.to(tl.float32), tl.broadcast_to(factor[:, None], (rows, BLOCK_W)), raw)
        acc = dot(raw, w, acc, "bf16x6")
    if absorbed.value_bias is not None:
        at = absorbed.value_bias + kv_head.to(tl.int64) * absorbed.value_bias_h + value_dims
        bias = tl.load(at, mask=value_dims < VALUE_DIM, other=0.0).to(tl.float32)
        acc += bias[None, :] * part[:, None]
    return tl.where(part[:, None] != 0.0, acc, 0.0), part
