"""`merged_attention` for few queries: tokens of all runs split over programs, then combined. Two launches.

How tokens are split depends on nothing but the numbers of a row of tokens, so that a row gives the same bits in any
batch, and cut to its own length.
"""

import triton
import triton.language as tl

from .absorb import absorbed_output, absorbed_split
from .attend import attend
from .kinds import ABSORBED_AT, WINDOW_AT
from .prefill import store_results
from .softmax import safe
from .tiles import length_of, load_rows, positions_of


@triton.jit(do_not_specialize=["q_len", "own_length", "splits", "raw_splits"])
def split_kernel(
    query, query_b, query_h, query_t,  # (batch, q_heads, q_len, DIM)
    states,  # (batch, q_heads * q_len, splits + raw_splits, 2) float32: m and l of every split, empty ones too
    sums,  # (batch, q_heads * q_len, splits, VALUE_DIM) float32: acc; that of empty splits is not written
    query_positions, query_positions_b, query_positions_t,  # (batch, q_len), nullable
    runs,  # RUNS x arguments.Run, the own cache first
    absorbed,  # RUNS x absorb.Absorbed, None for runs in receiver space
    kv_heads, q_len, own_length, splits, raw_splits, scale, softcap, window, segment_window,
    RUNS: tl.constexpr, KINDS: tl.constexpr, RAWS: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program takes all rows of one KV head over one split of a run, or of all heads over a split of raw tokens.

    TOKENS of a tile and SPLITS, tokens of a split, are every run's own: what a run is read with changes no bit of the
    others' sums. Rows of a KV head: query * GROUP + head. RAWS: for every run the dim of a sharer head of keys, their
    width, and the same of values; 0 for runs in receiver space. Programs of a batch row: those of KV heads, then those
    of raw tokens.
    """
    programs = kv_heads * splits + raw_splits
    batch_row, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    raw_split = program - kv_heads * splits  # below 0: a program of a KV head
    kv_head = tl.minimum(program // tl.maximum(splits, 1), kv_heads - 1)
    split = tl.where(raw_split < 0, program % tl.maximum(splits, 1), -1)
    rows = tl.arange(0, BLOCK_M)
    row_inside = rows < q_len * GROUP
    queries, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    batch64 = batch_row.to(tl.int64)
    own_end = length_of(runs[0].lengths, batch_row, own_length)
    if raw_split < 0:
        row_offsets = heads.to(tl.int64) * query_h + queries.to(tl.int64) * query_t
        q = load_rows(query + batch64 * query_b, row_offsets, row_inside, dims, DIM, BLOCK_D, True)
        own_positions = own_end - q_len + queries
        positions = positions_of(
            query_positions, query_positions_b, query_positions_t, batch64, queries, row_inside, own_end, q_len
        )
        row = (batch64 * kv_heads + kv_head) * q_len * GROUP + rows
        first_split = 0
        for number in tl.static_range(RUNS):
            if (KINDS[number] // ABSORBED_AT % 4) == 0:
                run = runs[number]
                length = own_length if number == 0 else run.length
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
                            last, end, scale, softcap, window, None, KINDS[number], True, SOFTCAP, DIM, VALUE_DIM,
                            0, 0, BLOCK_D, BLOCK_V, TOKENS[number], STAGES, PRECISION,
                        )  # fmt: skip
                    else:
                        m, l, acc = attend(
                            q, m, l, acc, run, batch_row, kv_head, heads, queries, row_inside, positions, first, last,
                            end, scale, softcap, segment_window, None, KINDS[number], True, SOFTCAP, DIM, VALUE_DIM,
                            0, 0, BLOCK_D, BLOCK_V, TOKENS[number], STAGES, PRECISION,
                        )  # fmt: skip
                    at = row * (splits + raw_splits) + split
                    tl.store(states + at * 2, m, mask=row_inside)
                    tl.store(states + at * 2 + 1, l, mask=row_inside)
                    inside = (row_inside & (l != 0.0))[:, None] & (value_dims < VALUE_DIM)[None, :]
                    at = row * splits + split
                    tl.store(sums + at[:, None] * VALUE_DIM + value_dims[None, :], acc, mask=inside)
                first_split += run_splits
    else:
        first_raw = 0
        for number in tl.static_range(RUNS):
            if (KINDS[number] // ABSORBED_AT % 4) != 0:
                its_splits = tl.cdiv(runs[number].length, SPLITS[number])
                if (raw_split >= first_raw) & (raw_split < first_raw + its_splits):
                    absorbed_split(
                        absorbed[number], runs[number], states, query_positions, query_positions_b, query_positions_t,
                        batch_row, raw_split - first_raw, its_splits, splits + raw_splits, splits + first_raw,
                        kv_heads, q_len, own_end, scale, softcap, segment_window, KINDS[number], GROUP, SOFTCAP,
                        RAWS[4 * number], RAWS[4 * number + 1], RAWS[4 * number + 2], RAWS[4 * number + 3], BLOCK_A,
                        TOKENS[number], SPLITS[number], STAGES, PRECISION,
                    )  # fmt: skip
                first_raw += its_splits


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
    RUNS: tl.constexpr, KINDS: tl.constexpr, RAWS: tl.constexpr, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A program merges the states of one row, in the order of the tokens, BLOCK_S at a time from each run's first."""
    program = tl.program_id(0)
    rows = q_len * GROUP
    kv_head, batch_row = program // rows % kv_heads, program // rows // kv_heads
    queries, heads = program % rows // GROUP, kv_head * GROUP + program % rows % GROUP
    value_dims, numbers, steps = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S)
    row = program.to(tl.int64)
    all_splits = splits + raw_splits
    base = row * all_splits
    highest = tl.full((BLOCK_S,), -float("inf"), tl.float32)
    for start in range(0, all_splits, BLOCK_S):
        at = start + steps
        highest = tl.maximum(highest, tl.load(states + (base + at) * 2, mask=at < all_splits, other=-float("inf")))
    m = tl.max(highest, 0)
    reference = safe(m)
    l = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, BLOCK_V), tl.float32)
    shares = tl.zeros((1, BLOCK_R), tl.float32)
    first_split, first_raw = 0, 0
    for number in tl.static_range(RUNS):
        part = tl.zeros((1,), tl.float32)
        if (KINDS[number] // ABSORBED_AT % 4) == 0:
            length = own_length if number == 0 else lengths[number]
            run_splits = tl.cdiv(length, SPLITS[number])
            for start in range(0, run_splits, BLOCK_S):
                inside = start + steps < run_splits
                at = base + first_split + start + steps
                factors = tl.exp2(tl.load(states + at * 2, mask=inside, other=-float("inf")) - reference)
                counts = tl.load(states + at * 2 + 1, mask=inside, other=0.0)
                filled = (inside & (counts != 0.0))[:, None] & (value_dims < VALUE_DIM)[None, :]
                at = row * splits + first_split + start + steps
                found = tl.load(sums + at[:, None] * VALUE_DIM + value_dims[None, :], mask=filled, other=0.0)
                acc += tl.sum(found * factors[:, None], 0)[None, :]
                part += tl.sum(counts * factors, 0)
            first_split += run_splits
        else:
            its_splits = tl.cdiv(lengths[number], SPLITS[number])
            raw, part = absorbed_output(
                absorbed[number], states, base + splits + first_raw, row, kv_head, its_splits, reference, VALUE_DIM,
                RAWS[4 * number + 3], BLOCK_V, BLOCK_S, BLOCK_W,
            )  # fmt: skip
            acc += raw[None, :]
            first_raw += its_splits
        l += part
        shares = tl.where(numbers[None, :] == number, part[:, None], shares)
    one = tl.zeros((1,), tl.int32)
    store_results(
        m + tl.zeros((1,), tl.float32), l, acc, shares, out, lse, mass, sinks, sinks_h, batch_row, heads + one,
        queries + one, one == 0, kv_heads * GROUP, q_len, RUNS, VALUE_DIM, BLOCK_V, BLOCK_R,
    )  # fmt: skip
