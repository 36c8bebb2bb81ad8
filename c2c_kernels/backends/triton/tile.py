"""The tile of a kernel, and which tiles may be tried or taken from a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .launch import Target

SIDES = (16, 32, 64, 128)  # what a side of a tensor-core product may be; 128 divides every split of decode
WARPS = (2, 4, 8)
STAGES = (1, 2, 3, 4)
_ACCUMULATORS = 128 * 256  # float32 of a block: 128 registers in each of 8 warps' threads
_SHARED = 192 * 1024  # bytes of keys and values in flight


class Tile(NamedTuple):
    """Rows and tokens of a tile, warps, and stages of the loads' pipeline."""

    rows: int
    tokens: int
    warps: int
    stages: int


class Call(NamedTuple):
    """What tiles are chosen by.

    Attributes:
        block_dim: the larger of the padded head dims.
        rows: queries x heads of a KV head.
        wide: whether some run needs products in float32.
        heavy: whether a mask, a gate per head and token, or scales are read beside the tokens.
    """

    target: Target
    block_dim: int
    dtype: torch.dtype
    rows: int
    wide: bool
    heavy: bool

    @property
    def single(self) -> bool:
        return self.wide or self.dtype == torch.float32

    def precision(self, widest: int = 128) -> str:
        """What becomes of float32 factors: three tensor-core products; wider heads take too many registers for them."""
        return "tf32x3" if self.target.backend == "cuda" and self.block_dim <= widest else "ieee"


def refusal(tile: Tile, block_dim: int, size: int, rows: int | None) -> str:
    """Why a tile may not be used for head dims padded to `block_dim` and numbers of `size` bytes; "" where it may.

    `rows`: how many rows the tile has to have, None where it is free.
    """
    for name, value, allowed in (
        ("rows", tile.rows, SIDES if rows is None else (rows,)),
        ("tokens", tile.tokens, SIDES),
        ("warps", tile.warps, WARPS),
        ("stages", tile.stages, STAGES),
    ):
        if type(value) is not int or value not in allowed:
            return f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}"
    if tile.rows * block_dim > _ACCUMULATORS:
        return f"rows x head dim must be at most {_ACCUMULATORS}; got {tile.rows} x {block_dim}"
    if 2 * tile.tokens * block_dim * size * tile.stages > _SHARED:
        return f"{tile.stages} stages of {tile.tokens} keys and values of {block_dim} take over {_SHARED} bytes"
    return ""


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Tiles that differ in one thing by one step."""
    for field, steps in (("rows", SIDES), ("tokens", SIDES), ("warps", WARPS), ("stages", STAGES)):
        at = steps.index(getattr(tile, field))
        for step in steps[max(0, at - 1) : at + 2]:
            if step != steps[at]:
                yield tile._replace(**{field: step})
