"""`fuse_kv` on Triton: the halves of any number of layers in one launch, those alike in shapes, strides and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...fuser_weights import EPSILON, FuserHalf, lie_of
from .arguments import expanded, rows
from .fuse import Buffers, Layout, fuse_kernel
from .fuse_steps import steps
from .fuse_table import table
from .launch import Launch, Target, run, target_of
from .supported import check_dtype
from .tiles_table import FuseTile, fuse_tile

_SCRATCH = 60 * 2**20  # bytes, at most, of what programs of a launch leave for each other
_LARGEST_MATRIX = 2**31  # within a matrix offsets have 32 bits
_ALIGNMENT = 16  # bytes, and numbers of a row of weights: what loads of four words take


class Half(NamedTuple):
    """One half of a layer."""

    receiver: Tensor  # (batch, kv_heads, length, dim)
    sharer: Tensor  # (batch, sharer_heads, stored, sharer_dim)
    weights: FuserHalf
    selected: Tensor | None  # (batch, length): an index
    residual: Tensor | None  # as the receiver; None: the receiver
    gate: Tensor | None  # broadcastable to (batch, kv_heads, length); None: gate_logit > 0
    out: Tensor  # as the receiver


class Weights(NamedTuple):
    """The weights of a half as the kernel takes them.

    Attributes:
        lie: where and how the tensors of the half lie.
        sizes: hidden, then inner sizes of embed, scale and the blocks of project.
        aligned: whether matrices and their rows start at multiples of 16 bytes.
        fixed, blocks: their part of the half's addresses, before and behind those of caches.
        tensors: all of them, contiguous.
    """

    lie: tuple
    sizes: tuple[int, ...]
    aligned: bool
    fixed: tuple[int, ...]
    blocks: tuple[int, ...]
    tensors: tuple[Tensor, ...]


class Prepared(NamedTuple):
    """A half as the kernel takes it.

    Attributes:
        layout: shapes, strides and dtypes.
        sizes: as those of its weights.
        shape: (batch, length, dim, sharer_dim).
        work: dtype of activations: that of all tensors of the half where they have one, else float32.
        aligned: whether tensors and rows of weights start at multiples of 16 bytes.
        weights: of the half.
        caches: tensors that lie at the addresses between those of weights.
    """

    layout: Layout
    sizes: tuple[int, ...]
    shape: tuple[int, int, int, int]
    stored: int
    work: torch.dtype
    aligned: bool
    weights: Weights
    caches: tuple[Tensor | None, ...]

    @property
    def addresses(self) -> tuple[int, ...]:
        """The half's row of the table."""
        caches = (0 if tensor is None else tensor.data_ptr() for tensor in self.caches)
        return (*self.weights.fixed, *caches, *self.weights.blocks)

    @property
    def alike(self) -> tuple:
        """What halves of one launch have in common."""
        layout = tuple(field.dtype if isinstance(field, Tensor) else field for field in self.layout)
        return (layout, *self[1:6])


def fuse(halves: Sequence[Half]) -> None:
    """Writes the outs of halves that do not depend on each other, all on one device."""
    for half in halves:
        for name in ("receiver", "sharer", "residual", "gate", "out"):
            tensor = getattr(half, name)
            if tensor is not None:
                check_dtype("fuse_kv", name, tensor)
        check_dtype("fuse_kv", "weights", half.weights.in_weight)
    groups: dict[tuple, list[Prepared]] = {}
    for half in halves:
        prepared = _prepared(half)
        groups.setdefault(prepared.alike, []).append(prepared)
    for group in groups.values():
        _fuse_alike(group)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Of batch, heads and tokens; 0 where there is one."""
    return expanded(tensor, tuple(tensor.shape))[1:4]


def _prepared(half: Half) -> Prepared:
    receiver, sharer, out, weights = rows(half.receiver), rows(half.sharer), half.out, half.weights
    residual = receiver if half.residual is None else rows(half.residual)
    batch, kv_heads, length, dim = receiver.shape
    layout = Layout._make((
        weights.in_weight, receiver, *_strides(receiver), sharer, *_strides(sharer), residual, *_strides(residual),
        out, *_strides(out), *expanded(half.gate, (batch, kv_heads, length)), *expanded(half.selected, (batch, length)),
        kv_heads, sharer.shape[1],
    ))  # fmt: skip
    found = _weights_of(weights)
    dtypes = {weights.in_weight.dtype, receiver.dtype, sharer.dtype}
    aligned = found.aligned and all(x.data_ptr() % _ALIGNMENT == 0 for x in (receiver, sharer, residual, out))
    return Prepared(
        layout, found.sizes, (batch, length, dim, sharer.shape[3]), sharer.shape[2],
        dtypes.pop() if len(dtypes) == 1 else torch.float32, aligned, found,
        (receiver, sharer, residual, out, half.gate, half.selected),
    )  # fmt: skip


_known: WeakKeyDictionary[FuserHalf, Weights] = WeakKeyDictionary()


def _weights_of(half: FuserHalf) -> Weights:
    """Looked at once where they stay where they are: of 28 layers it takes a millisecond."""
    lie = lie_of(half.tensors)
    known = _known.get(half)
    if known is not None and known.lie == lie:
        return known
    blocks = (half.embed, half.scale, *half.project)
    matrices = [half.in_weight, half.out_weight, *(part for block in blocks for part in (block.w1, block.w2))]
    for matrix in matrices:
        if matrix.numel() >= _LARGEST_MATRIX:
            raise ValueError(
                f"fuse_kv on triton supports weights of fewer than 2**31 numbers; got {tuple(matrix.shape)}"
            )
    fixed = [
        tensor.contiguous() for tensor in (half.in_weight, half.in_bias, half.out_weight, half.out_bias,
        half.scale_weight, half.scale_bias, half.gate_logit)
    ]  # fmt: skip
    theirs = [part.contiguous() for block in blocks for part in block.tensors]
    aligned = all(size % _ALIGNMENT == 0 for matrix in matrices for size in matrix.shape) and all(
        tensor.data_ptr() % _ALIGNMENT == 0 for tensor in (*fixed, *theirs) if tensor.dim() == 2
    )
    found = Weights(
        lie, (half.in_weight.shape[0], *(block.w1.shape[0] for block in blocks)), aligned,
        tuple(tensor.data_ptr() for tensor in fixed), tuple(tensor.data_ptr() for tensor in theirs),
        (*fixed, *theirs),
    )  # fmt: skip
    if all(tensor.is_contiguous() for tensor in half.tensors):  # a copy would not follow what changes
        _known[half] = found
    return found


def _fuse_alike(group: list[Prepared]) -> None:
    """As few launches as keep scratch small: of few tokens one for all."""
    first = group[0]
    batch, length, _, _ = first.shape
    target = target_of(first.layout.out.device)
    tile = fuse_tile(target, first.work == torch.float32, first.aligned, len(group))
    row_tiles = -(-batch * length // tile.rows)
    most = max(1, _SCRATCH // _bytes_of_job(first, tile))
    of_launch = max(1, most // max(1, row_tiles))
    for start in range(0, len(group), of_launch):
        for first_tile in range(0, row_tiles, most):
            part = group[start : start + of_launch]
            _launch(part, first_tile, min(row_tiles - first_tile, most), tile, target)


def _widths(prepared: Prepared, tile: FuseTile) -> tuple[int, int]:
    """Padded widths of h and of what is between w1 and w2."""
    hidden, *inners = (-(-size // tile.columns) * tile.columns for size in prepared.sizes)
    return hidden, max(inners)


def _bytes_of_job(prepared: Prepared, tile: FuseTile) -> int:
    hidden, width = _widths(prepared, tile)
    sums = hidden // tile.columns * (1 + prepared.layout.kv_heads)
    return tile.rows * ((4 * hidden + 2 * width) * prepared.work.itemsize + 4 * sums)


def _buffers(prepared: Prepared, jobs: int, tile: FuseTile) -> Buffers:
    device, kv_heads = prepared.layout.out.device, prepared.layout.kv_heads
    hidden, width = _widths(prepared, tile)
    tiles = hidden // tile.columns

    def of(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    h = [of(jobs, tile.rows, hidden, dtype=prepared.work) for _ in range(4)]
    inner = [of(jobs, tile.rows, width, dtype=prepared.work) for _ in range(2)]
    squares = of(jobs, tiles, tile.rows, dtype=torch.float32)
    logits = of(jobs, tiles, kv_heads, tile.rows, dtype=torch.float32)
    counters = torch.zeros(1 + jobs, dtype=torch.int32, device=device)
    return Buffers._make((*h, *inner, hidden, width, squares, logits, tiles, counters))


def _launch(group: list[Prepared], first_tile: int, row_tiles: int, tile: FuseTile, target: Target) -> None:
    first = group[0]
    layout, (hidden, *inners), (batch, length, dim, sharer_dim) = first.layout, first.sizes, first.shape
    receiver_width = layout.kv_heads * dim
    found = steps(hidden, layout.sharer_heads * sharer_dim + receiver_width, receiver_width, inners, tile.columns)
    buffers = _buffers(first, len(group) * row_tiles, tile)
    numbers = tuple(number for prepared in group for number in prepared.addresses)
    jobs = len(group) * row_tiles
    masked = any(step.size % tile.columns or step.width % tile.depth for step in found)
    names = {
        "table": table(numbers, layout.out.device), "steps": found, "layout": layout, "buffers": buffers,
        "jobs": jobs, "row_tiles": row_tiles, "first_tile": first_tile, "batch": batch, "length": length,
        "stored": first.stored, "BLOCKS": len(inners), "ADDRESSES": len(first.addresses), "DIM": dim,
        "SHARER_DIM": sharer_dim, "ALIGNED": first.aligned, "MASKED": masked, "EPSILON": EPSILON,
        "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth,
        "BLOCK_T": 1 << (buffers.tiles - 1).bit_length(), "BLOCK_H": max(16, min(64, _power(layout.kv_heads))),
        "STAGES": tile.stages, "PRECISION": "tf32x3" if target.backend == "cuda" else "ieee",
        "FETCH": target.backend == "cuda",
    }  # fmt: skip
    tensors = (tensor for prepared in group for tensor in (*prepared.weights.tensors, *prepared.caches))
    reached = tuple(tensor for tensor in tensors if tensor is not None)
    grid = jobs * sum(step.tiles for step in found)
    run(Launch(fuse_kernel, grid, names, tile.warps, tile.stages, reached=reached), layout.out.device)


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()
