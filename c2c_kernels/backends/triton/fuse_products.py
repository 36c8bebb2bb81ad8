"""Products and pointers of `fuse_kernel`'s tiles."""

import triton
import triton.language as tl

from .tiles import dot


@triton.jit
def address(row, slot, like, ALIGNED: tl.constexpr):
    """The pointer in a slot of a job's addresses, to numbers like those of `like`. ALIGNED: to 16 bytes."""
    found = tl.load(row + slot).to(tl.pointer_type(like.dtype.element_ty))
    return tl.multiple_of(found, 16) if ALIGNED else found


@triton.jit
def product(
    a, pitch, weight, columns, size, width, acc, MASKED: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + a w^T: a (BLOCK_M, width) of a buffer, w rows `columns` of weight (size, width). MASKED: odd sizes."""
    rows, steps = tl.arange(0, acc.shape[0]), tl.arange(0, BLOCK_K)
    for first in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        k = first + steps
        x = tl.load(a + rows[:, None] * pitch + k[None, :])
        at = weight + columns[:, None] * width + k[None, :]
        if MASKED:
            w = tl.load(at, mask=(columns < size)[:, None] & (k < width)[None, :], other=0.0)
        else:
            w = tl.load(at)
        acc = dot(x, tl.trans(w.to(x.dtype)), acc, PRECISION)
    return acc


@triton.jit
def product_of_cache(
    cache, offsets, inside, stride_h, heads, weight, columns, size, width, acc, dtype: tl.constexpr, DIM: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x w^T: x (tokens, heads * DIM) of a cache, w as many columns of weight (size, width) from its first on."""
    steps = tl.arange(0, BLOCK_K)
    per_head: tl.constexpr = (DIM + BLOCK_K - 1) // BLOCK_K
    for step in tl.range(0, heads * per_head, num_stages=STAGES):
        head, dims = step // per_head, step % per_head * BLOCK_K + steps
        at = cache + (head + tl.zeros((), tl.int64)) * stride_h + offsets[:, None] + dims[None, :]
        within = weight + head * DIM + columns[:, None] * width + dims[None, :]
        if DIM % BLOCK_K == 0:
            x = tl.load(at, mask=inside[:, None], other=0.0)
        else:
            x = tl.load(at, mask=inside[:, None] & (dims < DIM)[None, :], other=0.0)
        if DIM % BLOCK_K == 0 and not MASKED:
            w = tl.load(within)
        else:
            w = tl.load(within, mask=(columns < size)[:, None] & (dims < DIM)[None, :], other=0.0)
        acc = dot(x.to(dtype), tl.trans(w.to(dtype)), acc, PRECISION)
    return acc


@triton.jit
def rows_of(row_tile, batch, length, BLOCK_M: tl.constexpr):
    """Tokens of all batch rows one behind the other: their batch rows and places, and which of them there are."""
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return (rows // length).to(tl.int64), (rows % length).to(tl.int64), rows < batch * length


@triton.jit
def buffer_at(buffer, job, pitch, columns, BLOCK_M: tl.constexpr):
    """Pointers of a tile (BLOCK_M, columns) of a job's buffer."""
    return buffer + job * BLOCK_M * pitch + tl.arange(0, BLOCK_M)[:, None] * pitch + columns[None, :]


@triton.jit
def vector(pointer, columns, size):
    """`columns` of a vector in float32, 0 beyond its size."""
    return tl.load(pointer + columns, mask=columns < size, other=0.0).to(tl.float32)
