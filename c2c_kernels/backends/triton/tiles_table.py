"""Which tile a kernel takes, by architecture, head dim and dtype, unless a tuning has found another (`tuned`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import Kind
from .launch import Target
from .supported import LARGEST_DIM
from .tile import Call as Call
from .tile import Tile as Tile
from .tuned import tunable

# The tile of prefill: (largest padded head dim, tile for 16-bit dtypes, the same with a mask or a gate per head and
# token, tile for float32). The largest that neither spills registers nor leaves fewer than 8 warps on a multiprocessor
# (tests/triton_backend/compiled_targets.py). Factors of float32 are split in two, and held whole by every warp; on
# sm_90 in three parts of 16 bits, which wgmma takes from shared memory.
_PREFILL = {
    "sm_80": (
        (64, Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 16, 4, 1)),
        (128, Tile(64, 32, 4, 2), Tile(64, 16, 4, 2), Tile(16, 32, 8, 1)),
        (256, Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 16, 8, 1)),
    ),
    "sm_90": (
        (64, Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(128, 32, 8, 1)),
        (128, Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 1)),
        (256, Tile(128, 32, 8, 2), Tile(128, 16, 8, 2), Tile(128, 16, 8, 1)),
    ),
    "sm_100": (
        (64, Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 16, 8, 1)),
        (128, Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(16, 32, 8, 1)),
        (256, Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(16, 16, 8, 1)),
    ),
    "hip": (
        (64, Tile(128, 32, 4, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        (128, Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(64, 16, 4, 1)),
        (256, Tile(64, 16, 4, 1), Tile(64, 16, 4, 1), Tile(32, 16, 4, 1)),
    ),
}
FEWEST_TOKENS = 16  # of a tile
WIDE_TOKENS = FEWEST_TOKENS  # of a tile of a segment that is wider in dtype than 16-bit queries: products in float32


class FuseTile(NamedTuple):
    """Tokens, columns of a product, numbers of a token that one product takes; warps, and stages of the loads."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


FUSED_HALVES = 32  # of a call, from which products of 1024 columns fill 128 multiprocessors with tiles of 256
DECODE_ROWS = 64  # queries x heads of a KV head up to which tokens are split over programs, at most
# Of an absorbed segment: query heads x queries of a tile, the sharer's width, and their product, at most. In float32
# every warp holds the folded queries whole, in two parts.
ABSORBED_ROWS = {False: 64, True: 32}  # by whether products are in float32
ABSORBED_WIDTH = {False: 512, True: 128}
ABSORBED_AREA = {False: 16384, True: 2048}


def _family(target: Target) -> str:
    if target.backend == "hip":
        return "hip"
    # sm_86, sm_89 and sm_120 have 100 KiB of shared memory: the tiles of sm_80 take less.
    if target.arch in (100, 103):
        return "sm_100"
    return "sm_90" if target.arch == 90 else "sm_80"


@tunable("prefill")
def prefill_tile(call: Call) -> Tile:
    for largest, half, heavy, single in _PREFILL[_family(call.target)]:
        if call.block_dim <= largest:
            return single if call.single else heavy if call.heavy else half
    raise ValueError(f"head dims up to {LARGEST_DIM} are supported; got {call.block_dim}")


def burdened(kinds: Sequence[Kind], softcap: bool) -> bool:
    """Whether beside products of some run so much is read and computed for a score that registers become few: three or
    more of these. Up to two fit.
    """
    return any(
        softcap + sum(map(bool, (kind.mask, kind.gate == 3, kind.window, kind.positions == 2, kind.scaled, kind.wide)))
        >= 3
        for kind in kinds
    )


def relieved_tokens(call: Call, tokens: Sequence[int], kinds: Sequence[Kind], softcap: bool) -> tuple[int, ...]:
    """Tokens of a tile of prefill for every run.

    On sm_80 fewer where many options, or scales beside gates or positions, would spill registers.
    """
    if _family(call.target) != "sm_80":
        return tuple(tokens)
    crowded = [burdened([kind], softcap) or (kind.scaled and (kind.gate == 3 or kind.positions == 2)) for kind in kinds]
    return tuple(min(its, FEWEST_TOKENS) if many else its for its, many in zip(tokens, crowded, strict=True))


def relieved(call: Call, tile: Tile, kinds: Sequence[Kind], softcap: bool, block_v: int) -> tuple[Tile, int]:
    """The tile of prefill, and how many programs it takes, each with its part of the value dims.

    Two, which form scores twice (1.5 times the products), above a value dim of 128 where many options (in float32 on
    sm_90 a mask and a gate too) would spill registers, or a wider segment's three accumulators took more than sm_100's
    512 columns of tensor memory. On sm_80 rows are halved instead where they are fewer than value dims, and two parts
    would turn how warps share them out (4 warps of 64 rows and 128 dims): for many options and wider segments. No bit
    of any run changes.
    """
    family, many = _family(call.target), burdened(kinds, softcap)
    wide = any(kind.wide for kind in kinds)
    if family == "sm_80" and not call.single and tile.rows < block_v <= 2 * tile.rows:
        return tile._replace(rows=max(16, tile.rows // 2)) if many or wide else tile, 1
    if family == "sm_80":
        crowded = many and not call.single
    elif family == "sm_90":
        crowded = call.single and (many or (call.heavy and any(kind.gate == 3 for kind in kinds)))
    else:
        crowded = wide and family == "sm_100"
    return tile, 2 if crowded and block_v > 128 else 1


def prefill_precision(call: Call) -> str:
    """What becomes of float32 factors in prefill; on sm_90 what leaves wgmma tiles of 64 rows without a spill."""
    return "bf16x6" if _family(call.target) == "sm_90" else call.precision()


@tunable("decode", by_rows=True)
def decode_tile(call: Call) -> Tile:
    """One tile holds all rows."""
    block_rows = max(16, 1 << (call.rows - 1).bit_length())
    # With many options 64 rows of head dim 64 spill on sm_80, in 4 warps or beside 64 tokens.
    crowded = call.heavy or (block_rows > 32 and call.block_dim <= 64 and call.target.backend != "hip")
    tokens = 32 if call.single or crowded or call.block_dim > 128 else 64
    stages = 2
    if call.single and call.block_dim > 128:
        tokens, stages = (16, 2) if call.target.backend == "hip" else (32, 1)
    warps = 4 if block_rows * call.block_dim * (1 + call.single) <= (2048 if crowded else 4096) else 8
    return Tile(block_rows, tokens, warps, stages)


def split_tokens(rows: int, size: int) -> int:
    """Tokens of one program in decode, of numbers of `size` bytes: so many that partial sums are below 3% of the bytes
    of keys and values."""
    return max(128, 1 << (128 * rows // size - 1).bit_length())


def decodes(call: Call) -> bool:
    """Whether tokens are split over programs: one tile then holds all rows, in float32 in two parts."""
    return call.rows <= decode_rows(call.single, call.block_dim)


def decode_rows(single: bool, block_dim: int) -> int:
    """Rows of a KV head up to which tokens are split; `single`: products in float32."""
    return max(16, 2048 // block_dim) if single else DECODE_ROWS


def raw_tokens(block_width: int) -> int:
    """Tokens of a tile of raw tokens of an absorbed segment, `block_width` wide."""
    return 16 if block_width > 128 else 32


def raw_split_tokens(rows: int, size: int, single: bool) -> int:
    """Tokens of one program of an absorbed segment, of numbers of `size` bytes, for `rows` query heads x queries.

    `single`: products, and so partial sums, are in float32.

    A split reads the folded queries and leaves partial sums that are read once: 6 bytes x rows x width in 16 bits,
    against 2 x size x width a token. So many tokens that the former are below 5% of the latter: 512 of 16 rows in
    bfloat16. With 100 programs at 16k tokens they would be 15%, and 9% in one byte each.
    """
    return max(128, 64 * -(-rows * (1 + single) // size))


def raw_rows(rows: int, block_width: int, warps: int) -> int:
    """Of all heads, in a tile of an absorbed segment: as many as the registers of `warps` hold sums for."""
    return min(max(16, 1 << (rows - 1).bit_length()), max(16, 2048 * warps // block_width))


def combine_tile(target: Target, block_rows: int, block_v: int) -> tuple[int, int, int]:
    """Rows of a KV head that one program combines, splits whose loads it has under way, and warps.

    One row in one warp up to a value dim of 128; where value projectors are absorbed all `block_rows`, so that they
    are read once, or what registers hold.
    """
    block_rows = min(block_rows, max(16, 4096 // block_v))
    at_once = 16 if block_rows == 1 else max(1, min(8, 16384 // (block_rows * block_v)))
    warps = max(1, block_v // 128) if block_rows == 1 else 8
    return block_rows, 1 if target.backend == "interpreter" else at_once, warps


def merged_columns(target: Target, block_v: int, proj: Tensor) -> int:
    """Columns of a value projector (kv_heads, dim, width) in shared memory at once: 64 KiB of 16-bit numbers.

    Others are held in three parts of 16 bits, on AMD in registers.
    """
    others = 2048 if target.backend == "hip" else 8192
    columns = (32768 if proj.dtype == torch.bfloat16 else others) // block_v
    return max(16, min(columns, 1 << (proj.shape[2] - 1).bit_length()))


def folding_tile(single: bool, block_dim: int, rows: int, width: int) -> tuple[int, int]:
    """Rows of a KV head and columns of the projector that one program folds; `single`: products in float32."""
    block_rows, columns = max(16, 1 << (rows - 1).bit_length()), max(16, 1 << (width - 1).bit_length())
    if single:
        return min(block_rows, 16), min(columns, max(16, 4096 // block_dim))
    most = 128 if block_dim <= 128 and block_rows == 16 else 64
    return min(block_rows, 64 if block_dim <= 128 else 32), min(columns, most)


@tunable("backward")
def backward_tile(call: Call) -> Tile:
    """Two accumulators of tokens x head dim, and four tiles in shared memory."""
    if call.single:
        if call.block_dim <= 64 or call.target.backend == "hip":
            return Tile(16, 16, 4, 1)
        return Tile(32, 16, 8, 1) if call.block_dim <= 128 else Tile(16, 16, 8, 1)
    if call.block_dim <= 64:
        return Tile(64, 32, 8 if _family(call.target) == "sm_100" else 4, 1 if call.heavy else 2)
    if call.target.arch == 90:
        return Tile(32, 64, 8, 1) if call.block_dim <= 128 else Tile(32, 32, 8, 1)
    if call.target.backend == "hip":
        return Tile(32, 16, 4, 1) if call.block_dim <= 128 else Tile(16, 16, 4, 1)
    return Tile(32, 64, 8, 2) if call.block_dim <= 128 else Tile(32, 32, 8, 1)


def attention_registers(call: Call, many: bool) -> int:
    """Launch.registers of prefill and decode: as in `backward_registers` of prefill of wide heads in float32, and on
    sm_100 with a mask or where `many` options meet (`burdened`). Registers change no bit.
    """
    if call.single and call.block_dim > 128 and not decodes(call):
        return 255
    return 255 if (call.heavy or many) and _family(call.target) == "sm_100" else 0


def backward_registers(call: Call) -> int:
    """Launch.registers of the backward pass: 128 of each of 256 threads, the compiler's choice, are a few too few where
    masks are read too, or factors are of two dtypes.
    """
    return 255 if call.heavy or call.wide else 0


def fuse_tile(target: Target, single: bool, aligned: bool, halves: int) -> FuseTile:
    """Of `fuse_kernel`. `single`: products in float32; `aligned`: rows of weights, to 16 bytes; `halves`: of a call.

    A tile of 64 tokens reads activations of 64 / columns of the bytes of its weights. Halves of many layers fill a GPU
    with wide tiles too; by their number alone, so that a token's result depends neither on its batch nor its length.
    """
    if single or not aligned:
        return FuseTile(64, 64, 16 if single and _family(target) == "sm_80" else 32, 8, 2)
    if target.backend == "hip":
        return FuseTile(64, 128, 64, 8, 2)
    return FuseTile(64, 256, 64, 8, 3) if halves >= FUSED_HALVES else FuseTile(64, 128, 64, 8, 3)
