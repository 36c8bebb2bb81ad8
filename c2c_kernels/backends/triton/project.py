"""`project_kv`: keys and values of a segment brought into receiver space, written straight to their destination.

y = rotate(W unrotate(x) + b). Rotary dims are handled in pairs (d, d + half): a program holds both halves of a tile of
output dims, and where a rotation is removed both halves of the input, so that either rotation is local to it. Dims
beyond the rotary ones are paired among themselves and pass with cos = 1, sin = 0.
"""

import triton
import triton.language as tl

from .tiles import decoded, dot, length_of


@triton.jit
def pairs(j, rotary, dim):
    """The two dims of pair j; `dim` or more where there is none."""
    half, rest = rotary // 2, (dim - rotary + 1) // 2
    first = tl.where(j < half, j, half + j)
    second = tl.where(j < half, half + j, half + rest + j)
    return tl.where(j < half + rest, first, dim), tl.where(j < half + rest, second, dim)


@triton.jit
def table(cos, sin, base, rows, stride, dims, rotary, inside):
    """(rows, dims) of a rotation's cos and sin; 1 and 0 beyond the rotary dims."""
    at = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    mask = inside[:, None] & (dims < rotary)[None, :]
    return tl.load(cos + at, mask=mask, other=1.0).to(tl.float32), tl.load(sin + at, mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def raw_tile(half, base, rows, dims, inside, scale, E4M3: tl.constexpr, dtype: tl.constexpr):
    """(tokens, dims) of one sharer head, de-quantised; scale: (tokens,) float32, not read without scales."""
    at = half.raw + base + rows[:, None] * half.raw_n + dims[None, :]
    x = tl.load(at, mask=inside[:, None] & (dims < half.raw_dim)[None, :], other=0)
    if half.scale is None:
        return decoded(x, E4M3, dtype)
    else:
        return (decoded(x, E4M3, tl.float32) * scale[:, None]).to(dtype)


@triton.jit
def weights(half, head, dims, columns, column_limit, dtype: tl.constexpr):
    """(columns, dims): a tile of the head's projector, transposed."""
    at = half.proj + head.to(tl.int64) * half.proj_h + dims[None, :] * half.proj_d + columns[:, None]
    w = tl.load(at, mask=(dims < half.dim)[None, :] & (columns < column_limit)[:, None], other=0.0)
    return w.to(dtype)


@triton.jit
def unrotated(half, rotation, base, rows, j, inside, scale, rows_b, E4M3: tl.constexpr, dtype: tl.constexpr):
    """Both halves of a tile of pairs with the sharer's rotation removed, also one that carries a factor."""
    first, second = pairs(j, rotation.remove_dim, half.raw_dim)
    x1 = raw_tile(half, base, rows, first, inside, scale, E4M3, tl.float32)
    x2 = raw_tile(half, base, rows, second, inside, scale, E4M3, tl.float32)
    c1, s1 = table(
        rotation.remove_cos, rotation.remove_sin, rows_b, rows, rotation.remove_n, first, rotation.remove_dim, inside
    )
    c2, s2 = table(
        rotation.remove_cos, rotation.remove_sin, rows_b, rows, rotation.remove_n, second, rotation.remove_dim, inside
    )
    u1 = (x1 * c1 + x2 * s1) / (c1 * c1 + s1 * s1)
    u2 = (x2 * c2 - x1 * s2) / (c2 * c2 + s2 * s2)
    return u1.to(dtype), u2.to(dtype)


@triton.jit
def scales_of(half, batch64, sharer_head, rows, inside):
    """(tokens,) float32 scales of one sharer head; ones where there are none."""
    if half.scale is None:
        return tl.full(rows.shape, 1.0, tl.float32)
    else:
        at = half.scale + batch64 * half.scale_b + sharer_head.to(tl.int64) * half.scale_h + rows * half.scale_n
        return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def project_half(
    half, rotation, selection, batch_row, head, token_tile, pair_tile, length, E4M3: tl.constexpr,
    REMOVES: tl.constexpr, APPLIES: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_M tokens, BLOCK_P pairs of dims of one receiver head, keys or values."""
    batch64 = batch_row.to(tl.int64)
    tokens = token_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    end = length_of(selection.lengths, batch_row, length)
    inside = tokens < end
    if selection.selected is None:
        rows, stored = tokens.to(tl.int64), inside
    else:
        at = selection.selected + batch64 * selection.selected_b + tokens.to(tl.int64) * selection.selected_n
        rows = tl.load(at, mask=inside, other=-1).to(tl.int64)
        stored = inside & (rows >= 0) & (rows < selection.stored)
    j = pair_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    if APPLIES:
        rotary = rotation.apply_dim
    elif REMOVES and half.proj is None:
        rotary = rotation.remove_dim
    else:
        rotary = 0
    first, second = pairs(j, rotary, half.dim)
    raw = batch64 * half.raw_b
    removed_b = batch64 * rotation.remove_b if REMOVES else 0
    if half.proj is None:
        scale = scales_of(half, batch64, head, rows, stored)
        base = raw + head.to(tl.int64) * half.raw_h
        if REMOVES:  # the two rotations pair dims alike: whoever launches sees to it
            y1, y2 = unrotated(half, rotation, base, rows, j, stored, scale, removed_b, E4M3, tl.float32)
        else:
            y1 = raw_tile(half, base, rows, first, stored, scale, E4M3, tl.float32)
            y2 = raw_tile(half, base, rows, second, stored, scale, E4M3, tl.float32)
    else:
        dtype: tl.constexpr = tl.float32 if WIDE else half.proj.dtype.element_ty
        y1 = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        y2 = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        in_steps = half.raw_dim
        if REMOVES:
            in_steps = rotation.remove_dim // 2 + (half.raw_dim - rotation.remove_dim + 1) // 2
        per_head = tl.cdiv(in_steps, BLOCK_K)
        steps = tl.arange(0, BLOCK_K)
        for step in tl.range(0, half.heads * per_head, num_stages=STAGES):
            sharer_head = step // per_head
            k = step % per_head * BLOCK_K + steps
            scale = scales_of(half, batch64, sharer_head + tl.zeros((), tl.int32), rows, stored)
            base = raw + (sharer_head + tl.zeros((), tl.int64)) * half.raw_h
            column = sharer_head * half.raw_dim
            limit = column + half.raw_dim
            if REMOVES:
                x1, x2 = unrotated(half, rotation, base, rows, k, stored, scale, removed_b, E4M3, dtype)
                k1, k2 = pairs(k, rotation.remove_dim, half.raw_dim)
                w11 = weights(half, head, first, column + k1, limit, dtype)
                w21 = weights(half, head, first, column + k2, limit, dtype)
                w12 = weights(half, head, second, column + k1, limit, dtype)
                w22 = weights(half, head, second, column + k2, limit, dtype)
                y1 = dot(x2, w21, dot(x1, w11, y1, PRECISION), PRECISION)
                y2 = dot(x2, w22, dot(x1, w12, y2, PRECISION), PRECISION)
            else:
                x = raw_tile(half, base, rows, k, stored, scale, E4M3, dtype)
                y1 = dot(x, weights(half, head, first, column + k, limit, dtype), y1, PRECISION)
                y2 = dot(x, weights(half, head, second, column + k, limit, dtype), y2, PRECISION)
    if half.bias is not None:
        bias = half.bias + head * half.bias_h
        y1 += tl.load(bias + first, mask=first < half.dim, other=0.0).to(tl.float32)[None, :]
        y2 += tl.load(bias + second, mask=second < half.dim, other=0.0).to(tl.float32)[None, :]
    if APPLIES:
        base = batch64 * rotation.apply_b
        c1, s1 = table(rotation.apply_cos, rotation.apply_sin, base, tokens, rotation.apply_n, first, rotary, inside)
        c2, s2 = table(rotation.apply_cos, rotation.apply_sin, base, tokens, rotation.apply_n, second, rotary, inside)
        turned = y1 * c1 - y2 * s1
        y2 = y2 * c2 + y1 * s2
        y1 = turned
    y1 = tl.where(inside[:, None], y1, 0.0)  # tokens beyond `lengths` are written as zero
    y2 = tl.where(inside[:, None], y2, 0.0)
    out = half.out + batch64 * half.out_b + head.to(tl.int64) * half.out_h
    at = out + tokens.to(tl.int64)[:, None] * half.out_n
    kept = (tokens < length)[:, None]
    dtype_out = half.out.dtype.element_ty
    tl.store(at + first[None, :], y1.to(dtype_out), mask=kept & (first < half.dim)[None, :])
    tl.store(at + second[None, :], y2.to(dtype_out), mask=kept & (second < half.dim)[None, :])


@triton.jit
def project_kernel(
    key, value,  # arguments.Half
    rotation,  # arguments.Rotation, of keys alone
    selection,  # arguments.Selection
    kv_heads, length,
    KEY_E4M3: tl.constexpr, VALUE_E4M3: tl.constexpr, REMOVES: tl.constexpr, APPLIES: tl.constexpr,
    KEY_WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs: (tile of pairs, head, tile of tokens, batch row), keys before values."""
    program = tl.program_id(0)
    token_tiles = tl.cdiv(length, BLOCK_M)
    key_tiles, value_tiles = tl.cdiv((key.dim + 1) // 2, BLOCK_P), tl.cdiv((value.dim + 1) // 2, BLOCK_P)
    tiles = key_tiles + value_tiles
    pair_tile = program % tiles
    head = program // tiles % kv_heads
    token_tile = program // tiles // kv_heads % token_tiles
    batch_row = program // tiles // kv_heads // token_tiles
    if pair_tile < key_tiles:
        project_half(
            key, rotation, selection, batch_row, head, token_tile, pair_tile, length, KEY_E4M3, REMOVES, APPLIES,
            KEY_WIDE, BLOCK_M, BLOCK_P, BLOCK_K, STAGES, PRECISION,
        )  # fmt: skip
    else:
        project_half(
            value, rotation, selection, batch_row, head, token_tile, pair_tile - key_tiles, length, VALUE_E4M3, False,
            False, VALUE_WIDE, BLOCK_M, BLOCK_P, BLOCK_K, STAGES, PRECISION,
        )  # fmt: skip
