"""One tile of queries over a range of one run's tokens: what prefill and decode have in common.

A run is `arguments.Run`: the own cache or a segment in receiver space. `KIND` is the code of its `arguments.Kind`.
Rows of a tile are queries packed with the query heads of one KV head: row = query * GROUP + head within the group, so
that keys and values are read once for all of them.
"""

import triton
import triton.language as tl

from .kinds import CAUSAL_AT, GATE_AT, KEY_E4M3_AT, MASK_AT, POSITIONS_AT, VALUE_E4M3_AT, WIDE_AT, WINDOW_AT
from .softmax import capped, in_base_2, update
from .tiles import INTERPRETING, decoded, dot, factors, from_codes, load_rows, load_tile, product, step, stride, told


@triton.jit
def gate_of_rows(run, batch_row, heads, row_inside, GATE: tl.constexpr):
    """log2 of a gate that is the same for all tokens (GATE 1): (rows,). -inf closes the segment."""
    gates = run.gate + batch_row.to(tl.int64) * run.gate_b + heads * run.gate_h
    gate = tl.load(gates, mask=row_inside, other=1.0).to(tl.float32)
    return tl.where(gate > 0.0, tl.log2(gate), -float("inf"))


@triton.jit
def log_gate(run, batch_row, heads, row_inside, tokens, inside, GATE: tl.constexpr):
    """log2 of gates of a tile: (1, tokens) for GATE 2 (alike for all heads), (rows, tokens) for GATE 3."""
    gates = run.gate + batch_row.to(tl.int64) * run.gate_b
    if GATE == 2:
        gate = tl.load(gates + tokens.to(tl.int64) * run.gate_n, mask=inside, other=1.0).to(tl.float32)[None, :]
    else:
        pointers = gates + heads.to(tl.int64)[:, None] * run.gate_h + tokens.to(tl.int64)[None, :] * run.gate_n
        gate = tl.load(pointers, mask=row_inside[:, None] & inside[None, :], other=1.0).to(tl.float32)
    return tl.where(gate > 0.0, tl.log2(gate), -float("inf"))


@triton.jit
def seen(
    logits,
    run,
    batch_row,
    heads,
    queries,
    row_inside,
    positions,
    tokens,
    inside,
    window,
    KIND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Logits with the tokens that a row does not see at -inf, and additive masks added."""
    POSITIONS: tl.constexpr = KIND // POSITIONS_AT % 4
    CAUSAL: tl.constexpr = KIND // CAUSAL_AT % 4
    WINDOW: tl.constexpr = KIND // WINDOW_AT % 4
    MASK: tl.constexpr = KIND // MASK_AT % 4
    if MASK != 0:
        rows = batch_row.to(tl.int64) * run.mask_b + heads.to(tl.int64) * run.mask_h
        rows += queries.to(tl.int64) * run.mask_q
        pointers = run.mask + rows[:, None] + tokens.to(tl.int64)[None, :] * run.mask_n
        mask = tl.load(pointers, mask=row_inside[:, None] & inside[None, :], other=0)
        if MASK == 1:
            logits = tl.where(mask != 0, logits, -float("inf"))
        else:
            logits += in_base_2(mask.to(tl.float32))
    if MASKED:
        logits = tl.where(inside[None, :], logits, -float("inf"))
    if POSITIONS == 2:  # a segment's own positions, in any order
        at = run.positions + batch_row.to(tl.int64) * run.positions_b + tokens.to(tl.int64) * run.positions_n
        places = tl.load(at, mask=inside, other=0).to(tl.int64)
    else:
        places = tokens
    if POSITIONS == 2 or (POSITIONS == 1 and MASKED):
        if CAUSAL:
            logits = tl.where(places[None, :] <= positions[:, None], logits, -float("inf"))
        if WINDOW:
            logits = tl.where(places[None, :] > positions[:, None] - window, logits, -float("inf"))
    return logits


@triton.jit
def stored_rows(run, batch_row, tokens, inside):
    """Where tokens lie in the segment's tensors, by its index; outside of them nothing is read."""
    if run.selected is None:
        return tokens.to(tl.int64), inside
    else:
        at = run.selected + batch_row.to(tl.int64) * run.selected_b + tokens.to(tl.int64) * run.selected_n
        rows = tl.load(at, mask=inside, other=-1).to(tl.int64)
        return rows, inside & (rows >= 0) & (rows < told(run.stored))


@triton.jit
def columns_of(dims, RAW_DIM: tl.constexpr, head_stride):
    """Where a token's numbers lie after its first: RAW_DIM numbers of one head after another (0: one head)."""
    if RAW_DIM == 0:
        return dims
    else:
        return (dims // RAW_DIM).to(tl.int64) * head_stride + dims % RAW_DIM


@triton.jit
def scaled(x, scales, scale_h, scale_n, rows, stored, dims, RAW_DIM: tl.constexpr, DIM: tl.constexpr):
    """Raw tokens (tokens, dims) in float32 times the scale of their token and sharer head."""
    tokens: tl.constexpr = x.shape[0]
    block: tl.constexpr = x.shape[1]
    if block == DIM and (RAW_DIM & (RAW_DIM - 1)) == 0:
        heads = tl.arange(0, block // RAW_DIM)
        pointers = scales + rows[:, None] * scale_n + (heads * scale_h)[None, :]
        found = tl.load(pointers, mask=stored[:, None], other=0.0).to(tl.float32)
        return tl.reshape(tl.reshape(x, (tokens, block // RAW_DIM, RAW_DIM)) * found[:, :, None], (tokens, block))
    else:
        pointers = scales + rows[:, None] * scale_n + (dims // RAW_DIM * scale_h)[None, :]
        return x * tl.load(pointers, mask=stored[:, None] & (dims < DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def scores_by_head(
    q, run, key, key_n, batch64, rows, stored, zero, KIND: tl.constexpr, RAW_DIM: tl.constexpr, PRECISION: tl.constexpr
):
    """Products with raw tokens that have a scale for each sharer head: one after another, so that codes stay exact.

    q: of every head a tuple's entry, (rows, RAW_DIM). zero: (rows, tokens).
    """
    KEY_E4M3: tl.constexpr = KIND // KEY_E4M3_AT % 4
    dims = tl.arange(0, RAW_DIM)
    scores = zero
    for head in tl.static_range(len(q)):
        at = key + (rows * key_n)[:, None] + (stride(run.key_h, KIND) * head + dims)[None, :]
        k = from_codes(decoded(tl.load(at, mask=stored[:, None], other=0), KEY_E4M3, q[head].dtype))
        scales = run.key_scale + batch64 * run.key_scale_b + head * run.key_scale_h + rows * run.key_scale_n
        scale = tl.load(scales, mask=stored, other=0.0).to(tl.float32)
        scores += dot(q[head], tl.trans(k), zero, PRECISION) * scale[None, :]
    return scores


@triton.jit
def queries_of(base, offsets, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Factors of a tile of queries; of float32 in parts of 16 bits those of 64 dims after those of 64 others: fewer
    registers at once."""
    if PRECISION != "bf16x6" or BLOCK_D <= 64 or base.dtype.element_ty != tl.float32:
        return factors(load_rows(base, offsets, inside, tl.arange(0, BLOCK_D), DIM, BLOCK_D, True), PRECISION)
    else:
        found = ()
        for number in tl.static_range(BLOCK_D // 64):
            found = found + factors(piece_of(base, offsets, inside, number, DIM, 64), PRECISION)
        return found


@triton.jit
def piece_of(base, offsets, inside, number: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """A tile of queries' dims number * WIDTH to (number + 1) * WIDTH."""
    return load_rows(base, offsets, inside, number * WIDTH + tl.arange(0, WIDTH), DIM, WIDTH, True)


@triton.jit
def halves_of(base, offsets, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of queries as two of half its dims."""
    low = piece_of(base, offsets, inside, 0, DIM, BLOCK_D // 2)
    return low, piece_of(base, offsets, inside, 1, DIM, BLOCK_D // 2)


@triton.jit
def scores_by_piece(
    q, key, offsets, stored, zero, KIND: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, EDGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of queries in pieces of their dims. key + offsets (tokens, 1): where tokens start."""
    width: tl.constexpr = q[0].shape[1]
    each: tl.constexpr = len(q) * width // BLOCK_D
    scores = zero
    for number in tl.static_range(BLOCK_D // width):
        dims = number * width + tl.arange(0, width)
        k = load_tile(key + offsets + dims[None, :], stored, dims, DIM, width, EDGES)
        k = decoded(k, KIND // KEY_E4M3_AT % 4, tl.float32)
        scores = product(q[number * each : number * each + each], tl.trans(k), scores, PRECISION)
    return scores


@triton.jit
def load_values(
    value, value_n, run, batch_row, start, end, value_dims, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, EDGES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Values of BLOCK_N tokens from `start` on; with two PARTS those of even tokens and those of odd ones."""
    found = ()
    for part in tl.static_range(PARTS):
        cols = tl.arange(0, BLOCK_N // PARTS) * PARTS + part
        if run.selected is None:
            start64 = start + tl.zeros((), tl.int64)
            pointers, inside = value + start64 * value_n + (cols * value_n)[:, None], start + cols < end
        else:
            rows, inside = stored_rows(run, batch_row, start + cols, start + cols < end)
            pointers = value + (rows * value_n)[:, None]
        found = found + (load_tile(pointers, inside, value_dims, VALUE_DIM, BLOCK_V, EDGES),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def attend(
    q, m, l, acc, run, batch_row, kv_head, heads, queries, row_inside, positions, first, last, end, scale, softcap,
    window, shift, value_first, KIND: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, KEY_RAW: tl.constexpr, VALUE_RAW: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes tokens first, first + 1, ... last - 1 (first a multiple of BLOCK_N, `end` valid tokens) into (m, l, acc).

    q: `factors` of (BLOCK_M, BLOCK_D). m, l: (BLOCK_M,) float32. acc: (BLOCK_M, BLOCK_V) float32. MASKED: a tile may
    hold tokens that some row does not see. KEY_RAW, VALUE_RAW: of an absorbed segment, whose tokens are read as they
    are, all sharer heads of this dim at once; then q is absorbed, and `shift` (BLOCK_M,), its product with the key
    key bias, is added to products (None: nothing). Otherwise 0. q may then be a tuple of sharer heads. In prefill it
    may be the factors of some dims after those of others (`queries_of`). acc holds value dims
    value_first, value_first + 1, ...
    """
    GATE: tl.constexpr = KIND // GATE_AT % 4
    KEY_E4M3: tl.constexpr = KIND // KEY_E4M3_AT % 4
    VALUE_E4M3: tl.constexpr = KIND // VALUE_E4M3_AT % 4
    WIDE: tl.constexpr = KIND // WIDE_AT % 4
    EDGES: tl.constexpr = MASKED or run.selected is not None
    BY_HEAD: tl.constexpr = KEY_RAW != 0 and q[0].shape[1] != BLOCK_D
    PIECES: tl.constexpr = KEY_RAW == 0 and q[0].shape[1] != BLOCK_D
    LATE: tl.constexpr = PIECES or WIDE != 0  # values are loaded when keys are done with
    SINGLE: tl.constexpr = (len(q) >= 3 and not BY_HEAD) or q[0].dtype == tl.float32  # queries in float32
    # What of a wider dtype than 16-bit queries is read in two parts: 2^-16, in the own cache's tiles of rows.
    MODE: tl.constexpr = PRECISION if SINGLE else "bf16x3" if WIDE else "ieee"
    dtype: tl.constexpr = tl.float32 if WIDE or SINGLE else q[0].dtype
    if WIDE and not SINGLE:
        q = factors(q[0], MODE) + factors(q[1], MODE) if PIECES else factors(q[0], MODE)
    # Weights of even and of odd tokens are two factors: a thread holds both, and stores of every second one meet no
    # other thread's bank on their way to where products take float32 factors from; stores of pairs do (Ampere's mma).
    SCALED: tl.constexpr = VALUE_RAW != 0 and run.value_scale is not None
    PARTS: tl.constexpr = 2 if MODE == "tf32x3" and BLOCK_N >= 32 and not SCALED else 1
    cols, dims, value_dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), value_first + tl.arange(0, BLOCK_V)
    batch64, head64 = batch_row.to(tl.int64), kv_head.to(tl.int64)
    key_columns = columns_of(dims, KEY_RAW, stride(run.key_h, KIND))[None, :]
    value_columns = columns_of(value_dims, VALUE_RAW, stride(run.value_h, KIND))[None, :]
    if KEY_RAW != 0 and run.key_scale is not None:  # 8 codes a thread: as 16-bit factors they leave in one store
        key_columns = tl.max_contiguous(key_columns, (1, 8))
    if VALUE_RAW != 0 and run.value_scale is not None:
        value_columns = tl.max_contiguous(value_columns, (1, 8))
    key = run.key + batch64 * stride(run.key_b, KIND) + head64 * stride(run.key_h, KIND)
    if not PIECES:
        key += key_columns
    value = run.value + batch64 * stride(run.value_b, KIND) + head64 * stride(run.value_h, KIND) + value_columns
    key_n, value_n = step(run.key_n, KIND), step(run.value_n, KIND)
    if GATE == 1:
        row_gate = gate_of_rows(run, batch_row, heads, row_inside, GATE)
    # A condition of its own, so that the wait for the loop's last product stays before the place where those meet who
    # skip it: sm_90's products would all wait for one another. Absorbed runs are free of that, and would spill.
    if KEY_RAW != 0 or first < last:
        for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
            tokens = start + cols
            inside = tokens < end
            if run.selected is None:
                start64 = start + tl.zeros((), tl.int64)
                if not BY_HEAD and not PIECES:
                    k = load_tile(key + start64 * key_n + (cols * key_n)[:, None], inside, dims, DIM, BLOCK_D, EDGES)
                rows, stored = tokens.to(tl.int64), inside
            else:
                rows, stored = stored_rows(run, batch_row, tokens, inside)
                if not BY_HEAD and not PIECES:
                    k = load_tile(key + (rows * key_n)[:, None], stored, dims, DIM, BLOCK_D, EDGES)
            if not LATE:
                v = load_values(
                    value, value_n, run, batch_row, start, end, value_dims, VALUE_DIM, BLOCK_N, BLOCK_V, EDGES, PARTS
                )
            zero = tl.zeros((acc.shape[0], BLOCK_N), tl.float32)
            if BY_HEAD:
                heads_of_row = run.key + batch64 * stride(run.key_b, KIND)
                scores = scores_by_head(q, run, heads_of_row, key_n, batch64, rows, stored, zero, KIND, KEY_RAW, MODE)
            elif PIECES:
                scores = scores_by_piece(q, key, (rows * key_n)[:, None], stored, zero, KIND, DIM, BLOCK_D, EDGES, MODE)
            else:
                if KEY_RAW != 0 and run.key_scale is not None:
                    scales = run.key_scale + batch64 * run.key_scale_b
                    k = decoded(k, KEY_E4M3, tl.float32)
                    k = scaled(k, scales, run.key_scale_h, run.key_scale_n, rows, stored, dims, KEY_RAW, DIM)
                    k = from_codes(k.to(dtype))
                else:
                    k = decoded(k, KEY_E4M3, dtype)
                scores = product(q, tl.trans(k), zero, MODE)
            if KEY_RAW == 0 and run.key_scale is not None:
                scales = run.key_scale + batch64 * run.key_scale_b + head64 * run.key_scale_h + rows * run.key_scale_n
                scores *= tl.load(scales, mask=stored, other=0.0).to(tl.float32)[None, :]
            if shift is not None:
                scores += shift[:, None]
            logits = capped(scores, scale, softcap, SOFTCAP)
            if GATE == 1:
                logits += row_gate[:, None]
            elif GATE != 0:
                logits += log_gate(run, batch_row, heads, row_inside, tokens, inside, GATE)
            logits = seen(
                logits, run, batch_row, heads, queries, row_inside, positions, tokens, inside, window, KIND, MASKED
            )
            m, l, weights, factor = update(m, l, logits)
            if LATE:
                v = load_values(
                    value, value_n, run, batch_row, start, end, value_dims, VALUE_DIM, BLOCK_N, BLOCK_V, EDGES, PARTS
                )
            if SCALED:
                scales = run.value_scale + batch64 * run.value_scale_b
                its_v = scaled(
                    decoded(v[0], VALUE_E4M3, tl.float32), scales, run.value_scale_h, run.value_scale_n, rows, stored,
                    value_dims, VALUE_RAW, VALUE_DIM,
                )  # fmt: skip
                factors_v = (from_codes(its_v.to(dtype)),)
            elif PARTS == 1:
                factors_v = (decoded(v[0], VALUE_E4M3, dtype),)
            else:
                factors_v = decoded(v[0], VALUE_E4M3, dtype), decoded(v[1], VALUE_E4M3, dtype)  # type: ignore[assignment]
            if VALUE_RAW == 0 and run.value_scale is not None:
                scales = run.value_scale + batch64 * run.value_scale_b + head64 * run.value_scale_h
                value_scale = tl.load(scales + rows * run.value_scale_n, mask=stored, other=0.0).to(tl.float32)
                if dtype == tl.float16:  # a weight times a scale may be below the smallest float16, 6e-8
                    factors_v = ((factors_v[0].to(tl.float32) * value_scale[:, None]).to(dtype),)
                else:
                    weights *= value_scale[None, :]
            acc *= factor[:, None]
            if MODE == "bf16x3" and not INTERPRETING:
                # A part of the values at a time, for which they are loaded twice: fewer registers.
                parts = factors(weights, MODE)
                acc = tl.dot(parts[0], from_codes(factors(factors_v[0], MODE)[1]), acc)
                tl.debug_barrier()
                v = load_values(
                    value, value_n, run, batch_row, start, end, value_dims, VALUE_DIM, BLOCK_N, BLOCK_V, EDGES, PARTS
                )
                high = from_codes(v[0].to(tl.bfloat16))
                acc = tl.dot(parts[0], high, tl.dot(parts[1], high, acc))
            elif PARTS == 1:
                acc = dot(weights.to(dtype), factors_v[0], acc, MODE)
            else:
                even, odd = tl.split(tl.reshape(weights, (weights.shape[0], BLOCK_N // 2, 2)))
                acc = dot(odd, factors_v[1], dot(even, factors_v[0], acc, MODE), MODE)  # type: ignore[misc]
    return m, l, acc
