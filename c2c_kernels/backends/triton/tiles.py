"""Loads, products and masks of tiles, shared by every kernel.

A kernel takes its tensors as pointers and strides in elements; the last dimension of a row is contiguous. Offsets
within a tile are 32 bits wide, a tile's start is 64 bits.
"""

import triton
import triton.language as tl

# numpy, on which the interpreter runs, has no bfloat16: products are formed from float32 there.
INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32. PRECISION is what becomes of float32 factors: "tf32x3" or "ieee"."""
    if INTERPRETING:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def decoded(x, E4M3: tl.constexpr, dtype: tl.constexpr):
    """x in `dtype`. E4M3: x holds float8_e4m3fn codes as uint8, which sm_80 cannot convert.

    A code's low 7 bits, moved up by 7, are a float16 with the same mantissa and an exponent that is 8 less.
    """
    if E4M3:
        bits = x.to(tl.uint16)
        magnitude = ((bits & 0x7F) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        magnitude = tl.where((bits & 0x7F) == 0x7F, float("nan"), magnitude)
        return tl.where((bits & 0x80) != 0, -magnitude, magnitude).to(dtype)
    elif x.dtype == dtype:
        return x
    else:
        return x.to(tl.float32).to(dtype)  # the interpreter has no way from int8 to bfloat16


@triton.jit
def load_rows(base, offsets, inside, dims, DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(len(offsets), BLOCK) tile of rows at base + offsets; 0 outside of `inside` (where MASKED) and beyond DIM."""
    return load_tile(base + offsets[:, None] + dims[None, :], inside, dims, DIM, BLOCK, MASKED)


@triton.jit
def load_tile(pointers, inside, dims, DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """As `load_rows`, from pointers (rows, BLOCK)."""
    if MASKED and DIM != BLOCK:
        return tl.load(pointers, mask=inside[:, None] & (dims < DIM)[None, :], other=0)
    elif MASKED:
        return tl.load(pointers, mask=inside[:, None], other=0)
    elif DIM != BLOCK:
        return tl.load(pointers, mask=(dims < DIM)[None, :], other=0)
    else:
        return tl.load(pointers)


@triton.jit
def positions_of(places, places_b, places_t, batch64, queries, row_inside, own_end, q_len):
    """(rows,) int64 positions of queries in the receiver's sequence: `places`, or the end of the own cache."""
    if places is None:
        return (own_end - q_len + queries).to(tl.int64)
    else:
        at = places + batch64 * places_b + queries.to(tl.int64) * places_t
        return tl.load(at, mask=row_inside, other=0).to(tl.int64)


@triton.jit
def length_of(lengths, row, length):
    """Valid tokens of a batch row, never outside the tensor: values are not checked on a device."""
    if lengths is None:
        return length
    else:
        return tl.minimum(tl.maximum(tl.load(lengths + row), 0), length).to(tl.int32)
