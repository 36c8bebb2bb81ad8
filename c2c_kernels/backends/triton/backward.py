"""Gradients of `merged_attention` in receiver space: two launches, no atomics, the same bits on every run.

Weights are exp2(logit - base - rest), see `normaliser`; a score's gradient is weight * (grad_out . value - delta), with
delta the row's sum of the same over all tokens, less what the loss takes from the run's mass. In float32
throughout, products of 16-bit factors on tensor cores.
"""

import triton
import triton.language as tl

from .kinds import CAUSAL_AT, GATE_AT, WIDE_AT, WINDOW_AT
from .normaliser import is_far, log_gates, logits_of, normaliser, range_of
from .softmax import LOG2E, tanh
from .tiles import dot, length_of, load_rows, positions_of, step, stride, told


@triton.jit
def score_gradients(
    q, g, k, v, base, rest, delta, run, batch_row, heads, queries, row_inside, positions, tokens, inside, scale,
    softcap, window, KIND: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one tile (rows, tokens): weights, gradients of the raw products q . k, and the share of a gate's gradient.

    base, rest: (rows,), the former +inf for rows that saw nothing. delta: (rows,).
    """
    GATE: tl.constexpr = KIND // GATE_AT % 4
    scores, logits = logits_of(
        q, k, run, batch_row, heads, queries, row_inside, positions, tokens, inside, scale, softcap, window, KIND,
        MASKED, SOFTCAP, PRECISION,
    )  # fmt: skip
    logits = (logits - base[:, None]) - rest[:, None]
    along = dot(g, tl.trans(v), tl.zeros((q.shape[0], k.shape[0]), tl.float32), PRECISION) - delta[:, None]
    if GATE == 0:
        weights = tl.exp2(logits)
        for_gate = weights
    else:
        weights = tl.exp2(logits + log_gates(run, batch_row, heads, row_inside, tokens, inside, KIND))
        # A closed token's derivative by its gate is exp(score - lse) (...), which overflows beyond this.
        for_gate = tl.exp2(tl.minimum(logits, 80.0 * LOG2E)) * along
    change = weights * along
    if SOFTCAP:
        bent = tanh(scores * (scale / softcap))
        change *= (1.0 - bent * bent) * scale
    else:
        change *= scale
    return weights, change, for_gate


@triton.jit(do_not_specialize=["row_count", "q_len", "own_length"])
def query_gradient_kernel(
    query, query_b, query_h, query_t,  # (batch, q_heads, q_len, DIM)
    grad_out, grad_out_b, grad_out_h, grad_out_t,  # (batch, q_heads, q_len, VALUE_DIM)
    lse,  # (batch, q_heads, q_len) float32, contiguous
    delta,  # (batch, q_heads, q_len, RUNS) float32, contiguous
    bases,  # (2, batch, q_heads, q_len) float32, contiguous: base and rest, which this kernel writes
    sinks, sinks_h,  # (q_heads,), nullable
    grad_query,  # (batch, q_heads, q_len, DIM) float32, contiguous
    query_positions, query_positions_b, query_positions_t,  # (batch, q_len), nullable
    runs,  # RUNS x arguments.Run
    row_count,  # batch * q_heads * q_len
    kv_heads, q_len, own_length, scale, softcap, window, segment_window,
    RUNS: tl.constexpr, KINDS: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_M rows (queries x heads of one KV head) over all tokens of all runs."""
    tiles = tl.cdiv(q_len * GROUP, BLOCK_M)
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    kv_head, batch_row = program // tiles % kv_heads, program // tiles // kv_heads
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < q_len * GROUP
    queries, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    dims, value_dims, cols = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    batch64, head64 = batch_row.to(tl.int64), kv_head.to(tl.int64)
    own_end = length_of(runs[0].lengths, batch_row, own_length)
    own_positions = own_end - q_len + queries
    positions = positions_of(
        query_positions, query_positions_b, query_positions_t, batch64, queries, row_inside, own_end, q_len
    )
    row_offsets = heads.to(tl.int64) * query_h + queries.to(tl.int64) * query_t
    row = (batch64 * kv_heads * GROUP + heads) * q_len + queries
    first_query = tile * BLOCK_M // GROUP
    last_query = (tl.minimum(tile * BLOCK_M + BLOCK_M, q_len * GROUP) - 1) // GROUP
    found = tl.load(lse + row, mask=row_inside, other=float("inf"))
    base, rest = tl.where(found == -float("inf"), float("inf"), found) * LOG2E, tl.zeros((BLOCK_M,), tl.float32)
    far = is_far(found)
    if tl.max(far.to(tl.int32), 0) != 0:
        its_base, its_rest = normaliser(
            query + batch64 * query_b, row_offsets, runs, sinks, sinks_h, batch_row, kv_head, heads, queries,
            row_inside, own_positions, positions, first_query, last_query, own_end, q_len, scale, softcap, window,
            segment_window, RUNS, KINDS, SOFTCAP, DIM, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
        base, rest = tl.where(far, its_base, base), tl.where(far, its_rest, rest)
    tl.store(bases + row, base, mask=row_inside)
    tl.store(bases + row + row_count, rest, mask=row_inside)
    q = load_rows(query + batch64 * query_b, row_offsets, row_inside, dims, DIM, BLOCK_D, True)
    row_offsets = heads.to(tl.int64) * grad_out_h + queries.to(tl.int64) * grad_out_t
    g = load_rows(grad_out + batch64 * grad_out_b, row_offsets, row_inside, value_dims, VALUE_DIM, BLOCK_V, True)
    grad = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for number in tl.static_range(RUNS):
        run = runs[number]
        its_q, its_g = (q.to(tl.float32), g.to(tl.float32)) if (KINDS[number] // WIDE_AT % 4) else (q, g.to(q.dtype))
        its_delta = tl.load(delta + row * RUNS + number, mask=row_inside, other=0.0)
        low, high, end, its_positions, its_window = range_of(
            run, batch_row, own_end, q_len, first_query, last_query, own_positions, positions, window, segment_window,
            KINDS[number], number == 0, BLOCK_N,
        )  # fmt: skip
        key = run.key + batch64 * stride(run.key_b, KINDS[number]) + head64 * stride(run.key_h, KINDS[number])
        value = run.value + batch64 * stride(run.value_b, KINDS[number]) + head64 * stride(run.value_h, KINDS[number])
        key_n, value_n = step(run.key_n, KINDS[number]), step(run.value_n, KINDS[number])
        for start in tl.range(low, high, BLOCK_N, num_stages=STAGES):
            tokens = start + cols
            inside = tokens < end
            start64 = start + tl.zeros((), tl.int64)
            k = load_rows(key + start64 * key_n, cols * key_n, inside, dims, DIM, BLOCK_D, True).to(its_q.dtype)
            v = load_rows(value + start64 * value_n, cols * value_n, inside, value_dims, VALUE_DIM, BLOCK_V, True)
            if PRECISION == "ieee" and its_q.dtype == tl.float32:
                tl.debug_barrier()  # or all of q would go to registers ahead of the one that k waits for
            _weights, change, _gate = score_gradients(
                its_q, its_g, k, v.to(its_q.dtype), base, rest, its_delta, run, batch_row, heads, queries, row_inside,
                its_positions, tokens, inside, scale, softcap, its_window, KINDS[number], True, SOFTCAP, PRECISION,
            )  # fmt: skip
            grad = dot(change.to(k.dtype), k, grad, PRECISION)
    pointers = grad_query + row[:, None] * DIM + dims[None, :]
    tl.store(pointers, grad, mask=row_inside[:, None] & (dims < DIM)[None, :])


@triton.jit
def first_query_that_sees(own_end, q_len, first, last, window, KIND: tl.constexpr, BLOCK_M: tl.constexpr):
    """Queries from, to that can see own tokens first .. last - 1; `from` is a tile border."""
    CAUSAL: tl.constexpr = KIND // CAUSAL_AT % 4
    WINDOW: tl.constexpr = KIND // WINDOW_AT % 4
    low, high = 0, q_len
    if CAUSAL:
        low = tl.maximum(first - (own_end - q_len), 0) // BLOCK_M * BLOCK_M
    if WINDOW:
        reach = tl.minimum(window, 1 << 30).to(tl.int32)
        high = tl.minimum(tl.maximum(last - 1 + reach - (own_end - q_len), 0), q_len)
    return low, high


@triton.jit(do_not_specialize=["row_count", "q_len", "own_length", "tiles"])
def token_gradient_kernel(
    query, query_b, query_h, query_t,  # as above
    grad_out, grad_out_b, grad_out_h, grad_out_t,
    delta, bases,
    query_positions, query_positions_b, query_positions_t,
    runs,  # RUNS x arguments.Run
    grads,  # RUNS x (key, value, gate): (batch, kv_heads, length, DIM or VALUE_DIM), (batch, q_heads, length) nullable;
    # float32, contiguous
    row_count, kv_heads, q_len, own_length, tiles, scale, softcap, window, segment_window,
    RUNS: tl.constexpr, KINDS: tl.constexpr, GROUP: tl.constexpr, SOFTCAP: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_N tokens of one run over all queries of its KV head's heads, one head after another."""
    program = tl.program_id(0)
    tile = program % tiles
    kv_head, batch_row = program // tiles % kv_heads, program // tiles // kv_heads
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    batch64, head64 = batch_row.to(tl.int64), kv_head.to(tl.int64)
    own_end = length_of(runs[0].lengths, batch_row, own_length)
    first_tile = 0
    for number in tl.static_range(RUNS):
        run = runs[number]
        length = own_length if number == 0 else told(run.length)
        its_tiles = tl.cdiv(length, BLOCK_N)
        dtype = tl.float32 if (KINDS[number] // WIDE_AT % 4) else query.dtype.element_ty
        if (tile >= first_tile) & (tile < first_tile + its_tiles):
            end = length_of(run.lengths, batch_row, length)
            start = (tile - first_tile) * BLOCK_N
            tokens = start + tl.arange(0, BLOCK_N)
            inside = tokens < end
            offsets = tokens.to(tl.int64)
            key = run.key + batch64 * stride(run.key_b, KINDS[number]) + head64 * stride(run.key_h, KINDS[number])
            value = run.value + batch64 * stride(run.value_b, KINDS[number])
            value += head64 * stride(run.value_h, KINDS[number])
            key_n, value_n = step(run.key_n, KINDS[number]), step(run.value_n, KINDS[number])
            k = load_rows(key, offsets * key_n, inside, dims, DIM, BLOCK_D, True).to(dtype)
            v = load_rows(value, offsets * value_n, inside, value_dims, VALUE_DIM, BLOCK_V, True).to(dtype)
            grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            grad_v = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            low, high, its_window = 0, q_len, segment_window
            if number == 0:
                low, high = first_query_that_sees(
                    own_end, q_len, start, start + BLOCK_N, window, KINDS[number], BLOCK_M
                )
                its_window = window
            high = tl.where(start < end, high, 0)
            for member in range(GROUP):
                head = kv_head * GROUP + member
                row_head = (batch64 * kv_heads * GROUP + head) * q_len
                grad_gate = tl.zeros((BLOCK_N,), tl.float32)
                for first in tl.range(low, high, BLOCK_M, num_stages=STAGES):
                    queries = first + tl.arange(0, BLOCK_M)
                    row_inside = queries < q_len
                    heads = tl.zeros((BLOCK_M,), tl.int32) + head
                    at = query + batch64 * query_b + head.to(tl.int64) * query_h
                    q = load_rows(at, queries.to(tl.int64) * query_t, row_inside, dims, DIM, BLOCK_D, True).to(dtype)
                    at = grad_out + batch64 * grad_out_b + head.to(tl.int64) * grad_out_h
                    g = load_rows(
                        at, queries.to(tl.int64) * grad_out_t, row_inside, value_dims, VALUE_DIM, BLOCK_V, True
                    ).to(dtype)
                    base = tl.load(bases + row_head + queries, mask=row_inside, other=float("inf"))
                    rest = tl.load(bases + row_count + row_head + queries, mask=row_inside, other=0.0)
                    its_delta = tl.load(delta + (row_head + queries) * RUNS + number, mask=row_inside, other=0.0)
                    if number == 0:
                        positions = own_end - q_len + queries
                    else:
                        positions = positions_of(
                            query_positions,
                            query_positions_b,
                            query_positions_t,
                            batch64,
                            queries,
                            row_inside,
                            own_end,
                            q_len,
                        )
                    weights, change, for_gate = score_gradients(
                        q, g, k, v, base, rest, its_delta, run, batch_row, heads, queries, row_inside, positions,
                        tokens, inside, scale, softcap, its_window, KINDS[number], True, SOFTCAP, PRECISION,
                    )  # fmt: skip
                    grad_v = dot(tl.trans(weights.to(dtype)), g, grad_v, PRECISION)
                    grad_k = dot(tl.trans(change.to(dtype)), q, grad_k, PRECISION)
                    if grads[number][2] is not None:
                        grad_gate += tl.sum(for_gate, 0)
                if grads[number][2] is not None:
                    at = grads[number][2] + (batch64 * kv_heads * GROUP + head) * length + tokens
                    tl.store(at, grad_gate, mask=tokens < length)
            row = ((batch64 * kv_heads + kv_head) * length + tokens)[:, None]
            kept = (tokens < length)[:, None]
            tl.store(grads[number][0] + row * DIM + dims[None, :], grad_k, mask=kept & (dims < DIM)[None, :])
            kept = kept & (value_dims < VALUE_DIM)[None, :]
            tl.store(grads[number][1] + row * VALUE_DIM + value_dims[None, :], grad_v, mask=kept)
        first_tile += its_tiles
