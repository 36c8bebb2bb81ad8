"""What `fuse_kernel` is told: the matrix products in order, and which of a half's tensors is which.

A half of a layer has one row of addresses: those below, then norm, w1 and w2 of each block. Blocks: embed, scale, then
those of project.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton.language as tl

# Kinds of steps, by what becomes of a product.
ENTER, INNER, OUTER, LEAVE = (tl.constexpr(number) for number in range(4))
# Blocks that are told apart.
EMBED, SCALE, PROJECT = (tl.constexpr(number) for number in range(3))
# Addresses of a half.
(
    IN_WEIGHT_AT, IN_BIAS_AT, OUT_WEIGHT_AT, OUT_BIAS_AT, SCALE_WEIGHT_AT, SCALE_BIAS_AT, LOGIT_AT, RECEIVER_AT,
    SHARER_AT, RESIDUAL_AT, OUT_AT, GATE_AT, INDEX_AT, BLOCKS_AT,
) = (tl.constexpr(number) for number in range(14))  # fmt: skip


class Step(NamedTuple):
    """One matrix product of the network: rows x width by width x size.

    Attributes:
        first: tiles of a job before this step's.
        kind: ENTER (in_weight), INNER (w1), OUTER (w2) or LEAVE (out_weight).
        block: which, 0 where it is of none.
        size, width: of the product.
        tiles: of a job.
        wait: tiles of the job that have to be done before.
    """

    first: int
    kind: int
    block: int
    size: int
    width: int
    tiles: int
    wait: int


def steps(hidden: int, width: int, receiver_width: int, inners: Sequence[int], columns: int) -> tuple[Step, ...]:
    """The products of one half in an order in which each comes behind what it needs.

    `inners`: inner sizes of embed, scale and the blocks of project; `columns`: of a tile.
    """
    found: list[Step] = []

    def stage(*products: tuple[int, int, int, int]) -> None:
        wait = sum(step.tiles for step in found)
        for kind, block, size, across in products:
            first = sum(step.tiles for step in found)
            found.append(Step(first, kind, block, size, across, -(-size // columns), wait))

    embed, scale, project = EMBED.value, SCALE.value, PROJECT.value
    stage((ENTER.value, 0, hidden, width))
    stage((INNER.value, embed, inners[embed], hidden))
    stage((OUTER.value, embed, hidden, inners[embed]))
    stage((INNER.value, scale, inners[scale], hidden), (INNER.value, project, inners[project], hidden))
    stage((OUTER.value, scale, hidden, inners[scale]), (OUTER.value, project, hidden, inners[project]))
    for block in range(project + 1, len(inners)):
        stage((INNER.value, block, inners[block], hidden))
        stage((OUTER.value, block, hidden, inners[block]))
    stage((LEAVE.value, 0, receiver_width, hidden))
    return tuple(found)
