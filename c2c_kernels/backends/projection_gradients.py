"""Gradients of `project_kv`: plain matrix products over tokens, memory linear in length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..segment import SLOTS, Rope, SegmentTensors
from . import reference

# Storage of tokens whose products with bfloat16 weights PyTorch would round to bfloat16.
NARROW = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)


def gradients(
    grad_key: Tensor,
    grad_value: Tensor,
    segment: SegmentTensors,
    rope: Rope | None,
    needs: Sequence[bool] | None = None,
    *,
    spread: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    narrow: bool = False,
) -> list[Tensor | None]:
    """Gradients by slot, in float32 or as products leave them.

    `needs`: of the tensors that are there, in the order of their slots, which are wanted; None: all. What is frozen
    costs nothing: of a sharer that is not trained that is half of the products. `spread(grad, index, stored)` sums
    gradients of selected tokens (batch, heads, n, dim) where they came from; PyTorch does it by default, in an order
    that is fixed on the CPU alone. `narrow`: products of bfloat16 weights and tokens are in bfloat16, their gradients
    rounded before, as PyTorch rounds them; else, and where a scale's gradient is made of them, in float32.
    """
    flat: list[Tensor | None] = [None] * len(SLOTS)
    flags = iter(needs or ())
    wanted = {
        name: t is not None and (needs is None or next(flags)) for name, t in zip(SLOTS, segment.tensors, strict=True)
    }
    removed = rope.remove if rope is not None else None
    applied = rope.apply if rope is not None else None
    if removed is None and _reads_once(segment, wanted):
        return _of_one_read(grad_key, grad_value, segment, applied, narrow)
    for first, grad, remove, apply in ((0, grad_key, removed, applied), (1, grad_value, None, None)):
        name = SLOTS[first]
        raw, proj, proj_in, scale = (getattr(segment, f"{name}{end}") for end in ("", "_proj", "_proj_in", "_scale"))
        grad = _received(grad, segment, apply)
        if wanted[f"{name}_bias"]:
            flat[SLOTS.index(f"{name}_bias")] = grad.sum((0, 2))
        wants_raw = wanted[name] or wanted[f"{name}_scale"]
        if not (wants_raw or wanted[f"{name}_proj"] or wanted[f"{name}_proj_in"]):
            continue
        dtype = _product_dtype(raw, (proj, proj_in), narrow and not wanted[f"{name}_scale"])
        exact = scale is not None or remove is not None  # de-quantised and un-rotated in float32, rounded afterwards
        made = torch.float32 if exact or raw.dtype != dtype else dtype
        x = reference.prepare_raw(raw, scale, segment.selected, remove, segment.lengths, made)
        wants = (wants_raw, wanted[f"{name}_proj"], wanted[f"{name}_proj_in"])
        grad_raw, grad_proj, grad_proj_in = _through_projector(grad, x, proj, proj_in, wants, dtype)
        flat[SLOTS.index(f"{name}_proj")], flat[SLOTS.index(f"{name}_proj_in")] = grad_proj, grad_proj_in
        if grad_raw is None:
            continue
        grad_raw = reference.zero_beyond(grad_raw, segment.lengths)
        if segment.selected is not None:
            index = segment.selected.expand(raw.shape[0], segment.length)
            grad_raw = (spread or _spread)(grad_raw, index, raw.shape[2])
        if remove is not None:
            grad_raw = reference.unrotate_backward(grad_raw, *remove)
        if scale is not None:
            expanded = scale.float().expand(raw.shape[:3])
            # Where a quantised or padded token is not finite it has no gradient either.
            grad_scale = (grad_raw * raw.float().masked_fill(grad_raw == 0, 0)).sum(-1)
            flat[SLOTS.index(f"{name}_scale")] = grad_scale.sum_to_size(scale.shape)
            grad_raw = grad_raw * expanded.unsqueeze(-1)
        flat[first] = grad_raw
    return flat


def _received(grad: Tensor, segment: SegmentTensors, apply: tuple[Tensor, Tensor] | None) -> Tensor:
    """The gradient before the receiver's rotation, in float32; 0 where padding is."""
    grad = reference.zero_beyond(grad.float(), segment.lengths)
    return grad if apply is None else reference.rotate_backward(grad, *apply)


def _product_dtype(raw: Tensor, weights: Sequence[Tensor | None], narrow: bool) -> torch.dtype:
    dtypes = {weight.dtype for weight in weights if weight is not None}
    return torch.bfloat16 if narrow and dtypes == {torch.bfloat16} and raw.dtype in NARROW else torch.float32


def _spread(grad: Tensor, index: Tensor, stored: int) -> Tensor:
    out = torch.zeros((*grad.shape[:2], stored, grad.shape[3]), dtype=torch.float32, device=grad.device)
    return out.scatter_add_(2, index.long()[:, None, :, None].expand_as(grad), grad)


def _reads_once(segment: SegmentTensors, wanted: dict[str, bool]) -> bool:
    """Whether keys and values are made of the same tokens by dense maps whose gradients are wanted, the tokens' not."""
    key, value = segment.key, segment.value
    same = key.data_ptr() == value.data_ptr() and key.shape == value.shape and key.stride() == value.stride()
    dense = segment.key_proj_in is None and segment.value_proj_in is None and key.dtype == value.dtype
    scaled = segment.key_scale is not None or segment.value_scale is not None
    maps = wanted["key_proj"] and wanted["value_proj"]
    return same and dense and maps and not scaled and not (wanted["key"] or wanted["value"])


def _of_one_read(
    grad_key: Tensor, grad_value: Tensor, segment: SegmentTensors, apply: tuple[Tensor, Tensor] | None, narrow: bool
) -> list[Tensor | None]:
    """Gradients of both projectors and biases from one product over the tokens that both read."""
    dtype = _product_dtype(segment.key, (segment.key_proj, segment.value_proj), narrow)
    grads = [_received(grad_key, segment, apply), _received(grad_value, segment, None)]
    made = dtype if segment.key.dtype == dtype else torch.float32
    x = reference.prepare_raw(segment.key, None, segment.selected, None, segment.lengths, made)
    both = torch.cat([_rows(grad, dtype) for grad in grads], dim=1).T @ _rows(x, dtype)
    width = segment.key_proj.shape[0] * segment.key_proj.shape[1]
    flat: list[Tensor | None] = [None] * len(SLOTS)
    flat[SLOTS.index("key_proj")] = both[:width].reshape(segment.key_proj.shape)
    flat[SLOTS.index("value_proj")] = both[width:].reshape(segment.value_proj.shape)
    flat[SLOTS.index("key_bias")], flat[SLOTS.index("value_bias")] = (grad.sum((0, 2)) for grad in grads)
    return flat


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, heads, n, dim) as rows of all heads, (batch x n, heads x dim)."""
    return x.to(dtype).transpose(1, 2).flatten(2).flatten(0, 1)


def _through_projector(
    grad: Tensor,
    x: Tensor,
    proj: Tensor | None,
    proj_in: Tensor | None,
    wants: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of raw tokens x (batch, heads, n, dim), of the projector and of its inner factor, where wanted."""
    if proj is None:
        return grad, None, None
    wants_raw, wants_proj, wants_inner = wants
    tokens, rows = _rows(x, dtype), _rows(grad, dtype)
    grad_raw = grad_proj = grad_proj_in = None
    if wants_proj:
        inner = tokens if proj_in is None else tokens @ proj_in.to(dtype).T
        grad_proj = (rows.T @ inner).reshape(proj.shape)
    if not (wants_raw or wants_inner):
        return None, grad_proj, None
    grad_inner = rows @ proj.to(dtype).flatten(0, 1)
    if wants_inner:
        grad_proj_in = grad_inner.T @ tokens
    if wants_raw:
        batch, heads, length, dim = x.shape
        through = grad_inner if proj_in is None else grad_inner @ proj_in.to(dtype)
        grad_raw = through.float().reshape(batch, length, heads, dim).transpose(1, 2)
    return grad_raw, grad_proj, grad_proj_in
