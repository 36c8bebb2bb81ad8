"""`merged_attention` for few queries: tokens of all runs split over programs, then combined. Two launches.

How tokens are split depends on nothing but the numbers of a row of tokens, so that a row gives the same bits in any
batch, and cut to its own length.
"""

import triton
import triton.language as tl

from .absorb import absorbed_output, absorbed_splits, clear_marks, fold_queries
from .attend import attend
from .kinds import ABSORBED_AT, WINDOW_AT
from .prefill import store_results
from .softmax import load_states, safe, store_states
from .tiles import length_of, load_rows, positions_of, told


@triton.jit(do_not_specialize=["q_len", "own_length", "splits", "raw_splits", "folds", "programs", "call"])
def split_kernel(
    query, query_b, query_h, query_t,  # (batch, q_heads, q_len, DIM)
    states,  # (batch, q_heads * q_len, splits + raw_splits, 4) float32: of every split, empty ones too
    sums,  # (batch, q_heads * q_len, splits, VALUE_DIM) float32: acc; that of empty splits is not written
    query_positions, query_positions_b, query_positions_t,  # (batch, q_len), nullable
    runs,  # RUNS x arguments.Run, the own cache first
    absorbed,  # RUNS x absorb.Absorbed, None for runs in receiver space
    call,  # a number of the call's own, 64 bits, even
    kv_heads, q_len, own_length, splits, raw_splits, folds, programs, scale, softcap, window, segment_window,
    RUNS: tl.constexpr, KINDS: tl.constexpr, RAWS: tl.constexpr, FOLDINGS: tl.constexpr, GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program takes all rows of one KV head over one split of a run, or of all heads over a split of raw tokens.

    TOKENS of a tile and SPLITS, tokens of a split, are every run's own: what a run is read with changes no bit of the
    others' sums. Rows of a KV head: query * GROUP + head. RAWS: for every run the dim of a sharer head of keys, their
    width, and the same of values; 0 for runs in receiver space. FOLDINGS: absorb.Folding of every run. The `programs`
    of a batch row: the `folds`, then those of KV heads, then those of raw tokens.
    """
    batch_row, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    raw_program = program - folds - kv_heads * splits  # below 0: a program of a KV head, or one that folds
    kv_head = tl.minimum(tl.maximum(program - folds, 0) // tl.maximum(splits, 1), kv_heads - 1)
    split = tl.maximum(program - folds, 0) % tl.maximum(splits, 1)
    rows = tl.arange(0, BLOCK_M)
    row_inside = rows < q_len * GROUP
    queries, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    batch64 = batch_row.to(tl.int64)
    own_end = length_of(runs[0].lengths, batch_row, own_length)
    if (program < folds) | (raw_program >= 0):
        fold_queries(
            absorbed, runs, query, query_b, query_h, query_t, call, batch_row, program, raw_program, kv_heads, q_len,
            RUNS, RAWS, FOLDINGS, GROUP, DIM, BLOCK_M, BLOCK_D, SPLITS, PRECISION,
        )  # fmt: skip
    if (program >= folds) & (raw_program < 0):
        row_offsets = heads.to(tl.int64) * query_h + queries.to(tl.int64) * query_t
        q = (load_rows(query + batch64 * query_b, row_offsets, row_inside, dims, DIM, BLOCK_D, True),)
        own_positions = own_end - q_len + queries
        positions = positions_of(
            query_positions, query_positions_b, query_positions_t, batch64, queries, row_inside, own_end, q_len
        )
        row = (batch64 * kv_heads + kv_head) * q_len * GROUP + rows
        first_split = 0
        for number in tl.static_range(RUNS):
            if (KINDS[number] // ABSORBED_AT % 4) == 0:
                run = runs[number]
                length = own_length if number == 0 else told(run.length)
                run_splits = tl.cdiv(length, SPLITS[number])
                if (split >= first_split) & (split < first_split + run_splits):
                    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
                    l = tl.zeros((BLOCK_M,), tl.float32)
                    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
                    end = length_of(run.lengths, batch_row, length)
                    first = (split - first_split) * SPLITS[number]
                    last = tl.minimum(first + SPLITS[number], end)
                    if number == 0:
                        if (KINDS[number] // WINDOW_AT % 4) != 0:
                            reach = tl.minimum(window, 1 << 30).to(tl.int32)
                            first = tl.maximum(first, (own_end - q_len - reach + 1) // TOKENS[number] * TOKENS[number])
                        m, l, acc = attend(
                            q, m, l, acc, run, batch_row, kv_head, heads, queries, row_inside, own_positions, first,
                            last, end, scale, softcap, window, None, 0, KINDS[number], True, SOFTCAP, DIM, VALUE_DIM,
                            0, 0, BLOCK_D, BLOCK_V, TOKENS[number], STAGES, PRECISION,
                        )  # fmt: skip
                    else:
                        m, l, acc = attend(
                            q, m, l, acc, run, batch_row, kv_head, heads, queries, row_inside, positions, first, last,
                            end, scale, softcap, segment_window, None, 0, KINDS[number], True, SOFTCAP, DIM, VALUE_DIM,
                            0, 0, BLOCK_D, BLOCK_V, TOKENS[number], STAGES, PRECISION,
                        )  # fmt: skip
                    at = row * (splits + raw_splits) + split
                    store_states(states, at, m, l, tl.full((BLOCK_M,), 1.0, tl.float32), row_inside)
                    inside = (row_inside & (l != 0.0))[:, None] & (value_dims < VALUE_DIM)[None, :]
                    at = row * splits + split
                    tl.store(sums + at[:, None] * VALUE_DIM + value_dims[None, :], acc, mask=inside)
                first_split += run_splits
    elif raw_program >= 0:
        absorbed_splits(
            absorbed, runs, states, query_positions, query_positions_b, query_positions_t, call, batch_row,
            raw_program, splits + raw_splits, splits, kv_heads, q_len, own_end, scale, softcap, segment_window, RUNS,
            KINDS, GROUP, SOFTCAP, RAWS, FOLDINGS, BLOCK_M, TOKENS, SPLITS, STAGES, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["q_len", "splits", "raw_splits", "own_length"])
def combine_kernel(
    states, sums,  # as `split_kernel` leaves them
    out,  # (batch, q_heads, q_len, VALUE_DIM) contiguous
    lse,  # (batch, q_heads, q_len) float32, nullable
    mass,  # (batch, q_heads, q_len, RUNS) float32, nullable
    sinks, sinks_h,  # (q_heads,), nullable
    lengths,  # RUNS numbers of tokens; the own cache's is `own_length`
    absorbed,  # RUNS x absorb.Absorbed, None for runs in receiver space
    kv_heads, q_len, own_length, splits, raw_splits,
    RUNS: tl.constexpr, KINDS: tl.constexpr, RAWS: tl.constexpr, FOLDINGS: tl.constexpr, GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A program merges the states of BLOCK_C rows of a KV head: one, or where projectors are absorbed all.

    Splits are summed one after another, in the order of the tokens and with the same roundings however many rows a
    program has; BLOCK_S of them are loaded at once. BLOCK_M: as in `split_kernel`.
    """
    tiles = tl.cdiv(q_len * GROUP, BLOCK_C)
    program = tl.program_id(0)
    kv_head, batch_row = program // tiles % kv_heads, program // tiles // kv_heads
    rows = program % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row_inside = rows < q_len * GROUP
    queries, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    value_dims, numbers, steps = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_R), tl.arange(0, 16)
    row = (batch_row.to(tl.int64) * kv_heads + kv_head) * q_len * GROUP + rows
    all_splits = splits + raw_splits
    base = row * all_splits
    highest = tl.full((BLOCK_C, 16), -float("inf"), tl.float32)
    for start in range(0, all_splits, 16):
        at = start + steps
        inside = row_inside[:, None] & (at < all_splits)[None, :]
        its_states = states + (base[:, None] + at[None, :]) * 4
        highest = tl.maximum(highest, tl.load(its_states, mask=inside, other=-float("inf")))
    m = tl.max(highest, 1)
    reference = safe(m)
    l = tl.zeros((BLOCK_C,), tl.float32)
    acc = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    shares = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    first_split, first_raw = 0, 0
    for number in tl.static_range(RUNS):
        if (KINDS[number] // ABSORBED_AT % 4) == 0:
            part = tl.zeros((BLOCK_C,), tl.float32)
            length = own_length if number == 0 else told(lengths[number])
            run_splits = tl.cdiv(length, SPLITS[number])
            for start in range(0, run_splits, BLOCK_S):
                for step in tl.static_range(BLOCK_S):
                    split = first_split + start + step
                    inside = row_inside & (start + step < run_splits)
                    factor, count, _ = load_states(states, base + split, reference, inside)
                    filled = (inside & (count != 0.0))[:, None] & (value_dims < VALUE_DIM)[None, :]
                    at = sums + (row * splits + split)[:, None] * VALUE_DIM + value_dims[None, :]
                    found = tl.load(at, mask=filled, other=0.0)
                    acc = tl.fma(found, tl.broadcast_to(factor[:, None], (BLOCK_C, BLOCK_V)), acc)
                    part = tl.fma(count, factor, part)
            first_split += run_splits
        else:
            its_splits = tl.cdiv(told(lengths[number]), SPLITS[number])
            raw, part = absorbed_output(
                absorbed[number], states, base + splits + first_raw, row, row_inside, kv_head, its_splits, reference,
                VALUE_DIM, RAWS[4 * number + 3], BLOCK_V, BLOCK_S, BLOCK_W,
            )  # fmt: skip
            if program % tiles == 0:
                clear_marks(
                    absorbed[number], batch_row, kv_head, kv_heads, RAWS[4 * number + 1], FOLDINGS, number, BLOCK_M
                )  # fmt: skip
            acc += raw
            first_raw += its_splits
        l += part
        shares = tl.where(numbers[None, :] == number, part[:, None], shares)
    store_results(
        m, l, acc, shares, out, lse, mass, sinks, sinks_h, batch_row, heads, queries, row_inside, kv_heads * GROUP,
        q_len, 0, RUNS, VALUE_DIM, BLOCK_V, BLOCK_R,
    )  # fmt: skip
