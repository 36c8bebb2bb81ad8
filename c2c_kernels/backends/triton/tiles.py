"""Loads, products and masks of tiles, shared by every kernel.

A kernel takes its tensors as pointers and strides in elements; the last dimension of a row is contiguous. Offsets
within a tile are 32 bits wide, a tile's start is 64 bits.
"""

import triton
import triton.language as tl

from .kinds import ALIGN_AT

# numpy, on which the interpreter runs, has no bfloat16: products are formed from float32 there.
INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def factors(x, PRECISION: tl.constexpr):
    """What products are formed of: (x,), or in "bf16x6" ("bf16x3") bfloat16 parts whose sum is x to 2^-24 (2^-16).

    Infinities stay in the first part.
    """
    if INTERPRETING or x.dtype == tl.bfloat16 or (PRECISION != "bf16x6" and PRECISION != "bf16x3"):
        return (x,)
    else:
        x = x.to(tl.float32)
        high = x.to(tl.bfloat16)
        rest = tl.where(tl.abs(x) == float("inf"), 0.0, x - high.to(tl.float32))
        middle = rest.to(tl.bfloat16)
        if PRECISION == "bf16x3":
            return high, middle
        else:
            return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def told(x):
    """A number of a Run as it was before `arguments.unspecialised`."""
    return (x >> 1) - 1


@triton.jit
def step(x, KIND: tl.constexpr):
    """The stride of a Run's tokens, of which the compiler knows what it is a multiple of."""
    ALIGN: tl.constexpr = KIND // ALIGN_AT % 4
    FACTOR: tl.constexpr = 16 if ALIGN == 3 else 8 if ALIGN == 2 else 4 if ALIGN == 1 else 1
    return told(x) * FACTOR


@triton.jit
def stride(x, KIND: tl.constexpr):
    """As `step`, of rows of the batch or of heads, which may lie further apart than 32 bits count."""
    ALIGN: tl.constexpr = KIND // ALIGN_AT % 4
    FACTOR: tl.constexpr = 16 if ALIGN == 3 else 8 if ALIGN == 2 else 4 if ALIGN == 1 else 1
    return tl.cast(told(x), tl.int64) * FACTOR


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32. PRECISION is what becomes of float32 factors: "bf16x6", "bf16x3", "tf32x3" or "ieee"."""
    return product(factors(a, PRECISION), b, acc, PRECISION)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """As `dot`, of a's `factors`: the products of parts that are above the error of the parts, the smallest first."""
    if INTERPRETING:
        return tl.dot(a[0].to(tl.float32), b.to(tl.float32), acc)
    elif PRECISION == "bf16x6" or PRECISION == "bf16x3":
        b = factors(b, PRECISION)
        if PRECISION == "bf16x3" and len(b) == 2:  # through shared memory: no warp holds all of b
            b = from_codes(b[0]), from_codes(b[1])
        most: tl.constexpr = 3 if PRECISION == "bf16x6" else 2
        for smaller in tl.static_range(most):
            for i in tl.static_range(len(a)):
                if most - 1 - smaller >= i and most - 1 - smaller - i < len(b):
                    acc = tl.dot(a[i], b[most - 1 - smaller - i], acc)
        return acc
    else:
        return tl.dot(a[0], b, acc, input_precision=PRECISION)


@triton.jit
def _first(a, b):
    return a


@triton.jit
def from_codes(x):
    """x, made of 8-bit codes, as a factor like any other of 16 bits: a reduction over nothing, for the compiler.

    It looks for the loads behind a factor, through what is elementwise, and lays both factors out by the narrowest
    (triton 3.7.1): the other one then takes conflicting loads from shared memory.
    """
    if INTERPRETING:
        return x
    else:
        return tl.reduce(tl.reshape(x, (x.shape[0], x.shape[1], 1)), 2, _first)


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
def powers_of_two(largest):
    """(up, down) with up * down = 1 for numbers of size `largest` (float32): those times `down` are below 2^15."""
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 14, 1)  # biased by 127, as bits are
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


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
