"""Which tile a kernel takes, by architecture, head dim and dtype, unless a tuning has found another (`tuned`)."""

from __future__ import annotations

import torch

from .launch import Target
from .tile import Tile as Tile
from .tuned import tunable

# Upper bounds on the tile of prefill: (largest padded head dim, tile for 16-bit dtypes, tile for float32).
# 8 warps of 255 registers fill a multiprocessor; accumulators of rows x value dim floats set the bound on rows.
_PREFILL = {
    "sm_80": (
        (64, Tile(128, 64, 4, 3), Tile(64, 32, 4, 2)),
        (128, Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        (256, Tile(64, 32, 8, 2), Tile(32, 16, 8, 1)),
    ),
    "sm_90": (
        (64, Tile(128, 64, 4, 3), Tile(64, 32, 4, 2)),
        (128, Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        (256, Tile(128, 32, 8, 2), Tile(32, 32, 8, 2)),
    ),
    "hip": (
        (64, Tile(128, 32, 4, 1), Tile(64, 32, 4, 1)),
        (128, Tile(64, 32, 4, 1), Tile(64, 16, 4, 1)),
        (256, Tile(64, 16, 4, 1), Tile(32, 16, 4, 1)),
    ),
}
DECODE_ROWS = 64  # queries x heads of a KV head up to which tokens are split over programs


def _family(target: Target) -> str:
    if target.backend == "hip":
        return "hip"
    # sm_86, sm_89 and sm_120 have 100 KiB of shared memory: the tiles of sm_80 fit.
    return "sm_90" if target.arch in (90, 100, 103) else "sm_80"


@tunable("prefill")
def prefill_tile(target: Target, block_dim: int, dtype: torch.dtype, rows: int, wide: bool) -> Tile:
    """`block_dim`: the larger of the padded head dims. `rows`: queries x heads of a KV head. `wide`: some run needs
    products in float32."""
    for largest, half, full in _PREFILL[_family(target)]:
        if block_dim <= largest:
            tile = full if wide or dtype == torch.float32 else half
            break
    return tile


@tunable("decode", by_rows=True)
def decode_tile(target: Target, block_dim: int, dtype: torch.dtype, rows: int, wide: bool) -> Tile:
    """As `prefill_tile`; one tile holds all rows."""
    block_rows = max(16, 1 << (rows - 1).bit_length())
    full = wide or dtype == torch.float32
    tokens = 32 if full or block_dim > 128 else 64
    warps = 4 if block_rows * block_dim <= 4096 else 8
    return Tile(block_rows, tokens, warps, 2)


def split_tokens(rows: int, dtype: torch.dtype) -> int:
    """Tokens of one program in decode: so many that partial sums are below 3% of the bytes of keys and values."""
    wanted = 32 * rows if dtype == torch.float32 else 64 * rows
    return max(128, 1 << (wanted - 1).bit_length())


@tunable("backward")
def backward_tile(target: Target, block_dim: int, dtype: torch.dtype, rows: int, wide: bool) -> Tile:
    """As `prefill_tile`. Two accumulators of tokens x head dim, and four tiles in shared memory."""
    if wide or dtype == torch.float32:
        return Tile(32, 32, 4, 1) if block_dim <= 128 else Tile(16, 16, 4, 1)
    if block_dim <= 64:
        return Tile(64, 64, 4, 2)
    return Tile(64, 64, 8, 2) if block_dim <= 128 else Tile(32, 32, 8, 1)
