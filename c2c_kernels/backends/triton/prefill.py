"""`merged_attention` for many queries: one launch over the own cache and every segment in receiver space."""

import triton
import triton.language as tl

from .attend import attend, halves_of, queries_of
from .kinds import CAUSAL_AT, MASK_AT, WIDE_AT, WINDOW_AT
from .softmax import finish, in_base_2, merge, safe
from .tiles import length_of, positions_of, told


@triton.jit
def own_range(end, q_len, first_query, last_query, window, KIND: tl.constexpr, BLOCK_N: tl.constexpr):
    """Own tokens that a tile of queries sees: from, first and last that all of its rows see, to; tile borders."""
    CAUSAL: tl.constexpr = KIND // CAUSAL_AT % 4
    WINDOW: tl.constexpr = KIND // WINDOW_AT % 4
    MASK: tl.constexpr = KIND // MASK_AT % 4
    low, high = 0, end
    full_low, full_high = 0, end
    if CAUSAL:
        # In this order: sm_90 has one instruction for max(min(a, b), 0), which ptxsim takes for min(a, b).
        high = tl.minimum(tl.maximum(end - q_len + last_query + 1, 0), end)
        full_high = tl.minimum(tl.maximum(end - q_len + first_query + 1, 0), end)
    if WINDOW:
        reach = tl.minimum(window, 1 << 30).to(tl.int32)
        low = tl.maximum(end - q_len + first_query - reach + 1, 0)
        low = tl.minimum(low // BLOCK_N * BLOCK_N, high)
        full_low = tl.maximum(end - q_len + last_query - reach + 1, 0)
    full_low = tl.minimum((full_low + BLOCK_N - 1) // BLOCK_N * BLOCK_N, (high + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
    full_high = tl.maximum(full_high // BLOCK_N * BLOCK_N, full_low)
    if MASK != 0:
        full_low = low // BLOCK_N * BLOCK_N
        full_high = full_low
    return low, full_low, full_high, high


@triton.jit(do_not_specialize=["q_len", "own_length"])
def prefill_kernel(
    query, query_b, query_h, query_t,  # (batch, q_heads, q_len, DIM)
    out,  # (batch, q_heads, q_len, VALUE_DIM) contiguous
    lse,  # (batch, q_heads, q_len) float32, nullable
    mass,  # (batch, q_heads, q_len, RUNS) float32, nullable
    query_positions, query_positions_b, query_positions_t,  # (batch, q_len), nullable
    sinks, sinks_h,  # (q_heads,), nullable
    runs,  # RUNS x arguments.Run, the own cache first
    kv_heads, q_len, own_length, scale, softcap, window, segment_window,
    RUNS: tl.constexpr, KINDS: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_M rows (queries x heads of one KV head) over all runs, and one of PARTS of the value dims,
    BLOCK_V each. BLOCK_R: RUNS to a power of 2.

    TOKENS: of a tile, for every run its own: what a run is read with changes no bit of the others' sums.
    """
    tiles = tl.cdiv(q_len * GROUP, BLOCK_M)
    program = tl.program_id(0) // PARTS
    value_first = tl.program_id(0) % PARTS * BLOCK_V
    tile = tiles - 1 - program % tiles  # those with most tokens to see start first
    kv_head, batch_row = program // tiles % kv_heads, program // tiles // kv_heads
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < q_len * GROUP
    queries, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    batch64 = batch_row.to(tl.int64)
    row_offsets = heads.to(tl.int64) * query_h + queries.to(tl.int64) * query_t
    q = queries_of(query + batch64 * query_b, row_offsets, row_inside, DIM, BLOCK_D, PRECISION)
    own_end = length_of(runs[0].lengths, batch_row, own_length)
    own_positions = own_end - q_len + queries
    positions = positions_of(
        query_positions, query_positions_b, query_positions_t, batch64, queries, row_inside, own_end, q_len
    )
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    here = tl.arange(0, BLOCK_R)[None, :]
    shares = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    first_query = tile * BLOCK_M // GROUP
    last_query = tl.minimum(tile * BLOCK_M + BLOCK_M, q_len * GROUP) - 1
    last_query = last_query // GROUP
    for number in tl.static_range(RUNS):
        run = runs[number]
        m_before = m
        part = tl.zeros((BLOCK_M,), tl.float32)  # this run's part of l
        if number == 0:
            low, full_low, full_high, high = own_range(
                own_end, q_len, first_query, last_query, window, KINDS[number], TOKENS[number]
            )
            # Masks cost little beside products in float32, or of wide heads: one loop over all tokens takes fewer
            # registers than three.
            WINDOW: tl.constexpr = KINDS[number] // WINDOW_AT % 4
            ONE_LOOP: tl.constexpr = query.dtype.element_ty == tl.float32 or (WINDOW != 0 and BLOCK_D > 128)
            if ONE_LOOP:
                full_low, full_high = low, low
            if WINDOW != 0 and not ONE_LOOP:
                m, part, acc = attend(
                    q, m, part, acc, run, batch_row, kv_head, heads, queries, row_inside, own_positions, low,
                    tl.minimum(full_low, high), own_end, scale, softcap, window, None, value_first,
                    KINDS[number], True, SOFTCAP, DIM, VALUE_DIM,
                    0, 0, BLOCK_D, BLOCK_V, TOKENS[number], STAGES, PRECISION,
                )  # fmt: skip
            if (KINDS[number] // MASK_AT % 4) == 0 and not ONE_LOOP:
                m, part, acc = attend(
                    q, m, part, acc, run, batch_row, kv_head, heads, queries, row_inside, own_positions, full_low,
                    full_high, own_end, scale, softcap, window, None, value_first,
                    KINDS[number], False, SOFTCAP, DIM, VALUE_DIM, 0, 0, BLOCK_D, BLOCK_V,
                    TOKENS[number], STAGES, PRECISION,
                )  # fmt: skip
            m, part, acc = attend(
                q, m, part, acc, run, batch_row, kv_head, heads, queries, row_inside, own_positions, full_high, high,
                own_end, scale, softcap, window, None, value_first,
                KINDS[number], True, SOFTCAP, DIM, VALUE_DIM, 0, 0, BLOCK_D, BLOCK_V, TOKENS[number], STAGES,
                PRECISION,
            )  # fmt: skip
        else:
            end = length_of(run.lengths, batch_row, told(run.length))
            full = end // TOKENS[number] * TOKENS[number]
            its_q = q
            if query.dtype.element_ty == tl.float32 or (KINDS[number] // WIDE_AT % 4) != 0:
                full = 0
                if query.dtype.element_ty != tl.float32 and BLOCK_D > 128:  # fewer registers than all dims at once take
                    its_q = halves_of(query + batch64 * query_b, row_offsets, row_inside, DIM, BLOCK_D)
            else:
                m, part, acc = attend(
                    q, m, part, acc, run, batch_row, kv_head, heads, queries, row_inside, positions, 0, full, end,
                    scale, softcap, segment_window, None, value_first, KINDS[number], False, SOFTCAP, DIM, VALUE_DIM, 0,
                    0, BLOCK_D, BLOCK_V, TOKENS[number], STAGES, PRECISION,
                )  # fmt: skip
            m, part, acc = attend(
                its_q, m, part, acc, run, batch_row, kv_head, heads, queries, row_inside, positions, full, end, end,
                scale, softcap, segment_window, None, value_first,
                KINDS[number], True, SOFTCAP, DIM, VALUE_DIM, 0, 0, BLOCK_D, BLOCK_V, TOKENS[number], 1, PRECISION,
            )  # fmt: skip
        # Each run's part of l. Of two runs the first one's is l itself while the second is read: no registers for it.
        # One rounding of l in both forms, or a third run that is closed would change bits.
        if RUNS <= 2 and number == 0:
            l = part
            shares = tl.zeros((BLOCK_M, BLOCK_R), tl.float32) + part[:, None]
        else:
            kept = tl.exp2(m_before - safe(m))
            shares = (shares if RUNS > 2 else l[:, None]) * kept[:, None]
            shares = tl.where(here == number, part[:, None], shares)
            l = tl.fma(l, kept, part)
    # What the compiler cannot know: sums of weights are not below 0. So rows are worked out again here, and what is
    # formed of them above, a register for every row of a tile of queries, is not kept beside the sums meanwhile.
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M) + tl.where(l < 0.0, 1, 0)
    store_results(
        m, l, acc, shares, out, lse, mass, sinks, sinks_h, batch_row, kv_head * GROUP + rows % GROUP, rows // GROUP,
        rows < q_len * GROUP, kv_heads * GROUP, q_len, value_first, RUNS, VALUE_DIM, BLOCK_V, BLOCK_R,
    )  # fmt: skip


@triton.jit
def store_results(
    m, l, acc, shares, out, lse, mass, sinks, sinks_h, batch_row, heads, queries, row_inside, q_heads, q_len,
    value_first, RUNS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Lets the sinks in, divides, and writes what a tile of rows has found: from value dim `value_first` on."""
    if sinks is not None:
        sink = in_base_2(tl.load(sinks + heads * sinks_h, mask=row_inside, other=-float("inf")).to(tl.float32))
        m, l, factor, _ = merge(m, l, sink, tl.where(sink == -float("inf"), 0.0, 1.0))
        acc *= factor[:, None]
        shares *= factor[:, None]
    divisor, found = finish(m, l)
    row = (batch_row.to(tl.int64) * q_heads + heads) * q_len + queries
    value_dims, numbers = value_first + tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_R)
    pointers = out + row[:, None] * VALUE_DIM + value_dims[None, :]
    inside = row_inside[:, None] & (value_dims < VALUE_DIM)[None, :]
    tl.store(pointers, (acc / divisor[:, None]).to(out.dtype.element_ty), mask=inside)
    first_of_row = row_inside & (value_first == 0)
    if lse is not None:
        tl.store(lse + row, found, mask=first_of_row)
    if mass is not None:
        inside = first_of_row[:, None] & (numbers < RUNS)[None, :]
        tl.store(mass + row[:, None] * RUNS + numbers[None, :], shares / divisor[:, None], mask=inside)
