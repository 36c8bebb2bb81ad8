"""The normaliser of rows whose log-sum-exp float32 cannot hold: beside a score of -1e9 nothing is left of ln n.

The backward pass takes a weight as exp2(logit - base - rest): base = lse and rest = 0, but in far rows base is the
largest logit and rest = log2 of the sum relative to it, both from the logits that the backward pass itself computes.
"""

import triton
import triton.language as tl

from .attend import gate_of_rows, log_gate, seen
from .kinds import GATE_AT, WIDE_AT
from .prefill import own_range
from .softmax import capped, in_base_2, safe, update
from .tiles import dot, length_of, load_rows, step, stride, told

FAR = tl.constexpr(128.0)  # of lse; up to here half an ulp, the relative error of a row's weights, is at most 4e-6


@triton.jit
def logits_of(
    q, k, run, batch_row, heads, queries, row_inside, positions, tokens, inside, scale, softcap, window,
    KIND: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one tile (rows, tokens): raw products q . k, and logits without gates, -inf where a row does not see."""
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32), PRECISION)
    logits = capped(scores, scale, softcap, SOFTCAP)
    logits = seen(logits, run, batch_row, heads, queries, row_inside, positions, tokens, inside, window, KIND, MASKED)
    return scores, tl.where(row_inside[:, None], logits, -float("inf"))


@triton.jit
def log_gates(run, batch_row, heads, row_inside, tokens, inside, KIND: tl.constexpr):
    """log2 of the gates of a tile, to be broadcast to (rows, tokens)."""
    GATE: tl.constexpr = KIND // GATE_AT % 4
    if GATE == 1:
        return gate_of_rows(run, batch_row, heads, row_inside, GATE)[:, None]
    else:
        return log_gate(run, batch_row, heads, row_inside, tokens, inside, GATE)


@triton.jit
def range_of(
    run, batch_row, own_end, q_len, first_query, last_query, own_positions, positions, window, segment_window,
    KIND: tl.constexpr, OWN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tokens from, to that a tile of queries sees of a run, its valid tokens, and the tile's positions and window."""
    if OWN:
        low, _full_low, _full_high, high = own_range(own_end, q_len, first_query, last_query, window, KIND, BLOCK_N)
        return low, high, own_end, own_positions, window
    else:
        end = length_of(run.lengths, batch_row, told(run.length))
        return 0, end, end, positions, segment_window


@triton.jit
def is_far(lse):
    """Of lse in natural units; rows that see nothing, -inf, are not."""
    return (tl.abs(lse) > FAR) & (tl.abs(lse) < float("inf"))


@triton.jit
def normaliser(
    query, query_offsets, runs, sinks, sinks_h, batch_row, kv_head, heads, queries, row_inside, own_positions,
    positions, first_query, last_query, own_end, q_len, scale, softcap, window, segment_window, RUNS: tl.constexpr,
    KINDS: tl.constexpr, SOFTCAP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(base, rest) of a tile of rows, from one more pass over all runs and the sinks.

    query + query_offsets: where rows start. They are loaded for every tile of tokens: held over the loops they would
    take the registers of all that follows.
    """
    m = tl.full((heads.shape[0],), -float("inf"), tl.float32)
    l = tl.zeros((heads.shape[0],), tl.float32)
    if sinks is not None:
        m = in_base_2(tl.load(sinks + heads * sinks_h, mask=row_inside, other=-float("inf")).to(tl.float32))
        l = tl.where(m == -float("inf"), 0.0, 1.0)
    dims, cols, batch64 = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N), batch_row.to(tl.int64)
    for number in tl.static_range(RUNS):
        run = runs[number]
        dtype = tl.float32 if (KINDS[number] // WIDE_AT % 4) else query.dtype.element_ty
        low, high, end, its_positions, its_window = range_of(
            run, batch_row, own_end, q_len, first_query, last_query, own_positions, positions, window, segment_window,
            KINDS[number], number == 0, BLOCK_N,
        )  # fmt: skip
        key = run.key + batch64 * stride(run.key_b, KINDS[number])
        key += kv_head.to(tl.int64) * stride(run.key_h, KINDS[number])
        key_n = step(run.key_n, KINDS[number])
        for start in tl.range(low, high, BLOCK_N, num_stages=1):
            tokens = start + cols
            inside = tokens < end
            start64 = start + tl.zeros((), tl.int64)
            q = load_rows(query, query_offsets, row_inside & (start < end), dims, DIM, BLOCK_D, True).to(dtype)
            k = load_rows(key + start64 * key_n, cols * key_n, inside, dims, DIM, BLOCK_D, True).to(dtype)
            _scores, logits = logits_of(
                q, k, run, batch_row, heads, queries, row_inside, its_positions, tokens, inside, scale, softcap,
                its_window, KINDS[number], True, SOFTCAP, PRECISION,
            )  # fmt: skip
            if (KINDS[number] // GATE_AT % 4) != 0:
                logits += log_gates(run, batch_row, heads, row_inside, tokens, inside, KINDS[number])
            m, l, _weights, _factor = update(m, l, logits)
    return safe(m), tl.log2(tl.where(l == 0.0, 1.0, l))
