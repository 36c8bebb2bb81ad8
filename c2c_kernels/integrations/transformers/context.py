"""The shared context: for every receiver layer, the sharer segments that its attention reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

import c2c_kernels as c2c
from c2c_kernels.integrations.transformers.caches import per_cache, read_cache, sharer_segments

# Where `context.attach(cache)` leaves the context on a cache.
CARRIED = "_c2c_context"
_TENSORS = (
    "key", "value", "key_proj", "value_proj", "key_bias", "value_bias", "gate", "lengths", "positions",
    "key_scale", "value_scale", "index",
)  # fmt: skip
# Fields whose first dimension is the batch where they have this many dimensions.
_BATCHED = {
    "key": 4, "value": 4, "gate": 3, "lengths": 1, "positions": 2, "key_scale": 3, "value_scale": 3, "index": 2,
}  # fmt: skip


class LayerSpace(NamedTuple):
    """What a receiver layer must have for the segments of a context to fit."""

    kv_heads: int
    head_dim: int
    value_dim: int
    device: torch.device


class SharedContext:
    """For every receiver layer the sharer segments its attention reads, and where the receiver's positions start.

    Opaque on purpose (no container, no `.to`): accelerate would copy it whole at every layer. Its tensors are those it
    was given, not copies: optimiser steps on gates and projectors act at once. A context with batch 1 serves any
    receiver batch; otherwise row i of a receiver batch B reads row `i // (B / batch)`, as beams and several return
    sequences need.

    Args:
        layers: per receiver layer a list of `c2c.SharerSegment`; an empty list leaves a layer alone.
        position_offset: int or (batch,) integers, added to the receiver's own positions. Default 0.
    """

    def __init__(
        self, layers: Sequence[Sequence[c2c.SharerSegment]], position_offset: int | Tensor | None = None
    ) -> None:
        self.layers: list[list[c2c.SharerSegment]] = [list(segments) for segments in layers]
        if not any(self.layers):
            raise ValueError("layers: a context needs at least one segment")
        self.spaces = [_layer_space(index, segments) for index, segments in enumerate(self.layers)]
        self.batch = _common_batch(self.layers)
        self.positioned = any(s.positions is not None for segments in self.layers for s in segments)
        tensors = [tensor for segments in self.layers for s in segments for _, tensor in _tensors(s)]
        self.trainable = any(tensor.requires_grad for tensor in tensors)
        self.position_offset = _offset_tensor(position_offset, self.batch, tensors[0].device)
        self._rows: dict[int, list[list[list[c2c.SharerSegment]]]] = {}

    @classmethod
    def from_caches(
        cls,
        *caches: Cache | Sequence[tuple[Tensor, Tensor]],
        projectors: Any = None,
        gates: Any = None,
        positions: Any = None,
        visibility: Any = "all",
        attention_masks: Any = None,
        layer_maps: Any = None,
        position_offset: int | Tensor | None = None,
    ) -> SharedContext:
        """A context over the caches of one or more sharers, without copying them.

        Every keyword takes a list with one entry per cache, or a single entry meant for every cache (with one cache, a
        list per layer need not be wrapped).

        Args:
            caches: what each sharer has read: a Transformers cache, or per layer (key, value), each
                (batch, sharer_heads, len, sharer_head_dim), rotated. Batches are equal, or 1.
            projectors: None where the sharer's space is the receiver's own; else per receiver layer (list or mapping) a
                tuple (key_proj, value_proj, key_bias, value_bias), shorter ones ending early, or an object with these
                attributes. Shapes as in `c2c.SharerSegment`.
            gates: None, a number, a tensor broadcastable to (batch, q_heads, len), or a list of these per receiver
                layer. >= 0; kept as tensors, so that changing one does not recompile.
            positions: the tokens' positions, (len,) or (batch, len) integers. None: 0 .. len - 1, as read by a plain
                forward pass. False: no positions; every query sees every token, sliding windows included.
            visibility: "all", or "causal" to hide from every query the tokens at later positions (aligned text).
            attention_masks: (batch, len) padding masks of sharers that read a padded batch. A mask that is not plain
                right padding needs `positions`: `mask.cumsum(-1) - 1` after `generate`, arange(len) after a forward.
            layer_maps: per receiver layer the sharer layer it reads, or None for no segment. None: the same layer,
                which needs equal layer counts.
            position_offset: int or (batch,), added to the receiver's own positions. None: one past the last position
                of any sharer, row by row, so that the receiver continues the text; 0 for visibility "causal".

        Raises:
            ValueError, TypeError: naming the argument, for caches that cannot be read (quantised, offloaded, truncated
                sliding windows, empty), and whatever does not fit together.
        """
        if not caches:
            raise ValueError("caches: give at least one cache")
        count = len(caches)
        entries = {
            name: per_cache(name, value, count)
            for name, value in (
                ("projectors", projectors),
                ("gates", gates),
                ("positions", positions),
                ("visibility", visibility),
                ("attention_masks", attention_masks),
                ("layer_maps", layer_maps),
            )
        }
        read = [read_cache(cache, f"caches[{index}]") for index, cache in enumerate(caches)]
        batches = {layers[0][0].shape[0] for layers in read} - {1}
        if len(batches) > 1:
            raise ValueError(f"caches: batch sizes must be equal or 1, got {sorted(batches)}")
        batch = batches.pop() if batches else 1

        columns: list[list[c2c.SharerSegment | None]] = []
        ends: list[Tensor] = []
        for index in range(count):
            entry = {name: values[index] for name, values in entries.items()}
            column, end = sharer_segments(read[index], index, batch, **entry)
            columns.append(column)
            ends.append(end)
        lengths = sorted({len(column) for column in columns})
        if len(lengths) > 1:
            raise ValueError(f"caches map to different numbers of receiver layers: {lengths}")
        if position_offset is None:
            position_offset = torch.stack(ends).amax(dim=0)
        layers = [[s for s in row if s is not None] for row in zip(*columns, strict=True)]
        return cls(layers, position_offset)

    def attach(self, cache: Cache) -> Cache:
        """Makes `cache` carry this context into every forward pass that uses it; returns the cache."""
        if not isinstance(cache, Cache):
            raise TypeError(f"cache must be a Transformers Cache, got {type(cache).__name__}")
        setattr(cache, CARRIED, self)
        return cache

    def materialize(self, backend: str | None = None) -> SharedContext:
        """The same context with every projected segment in receiver space: projected once, here, by `project_kv`.

        Best for many queries and wide sharers; costs receiver-sized memory per sharer token.
        """

        def project(segment: c2c.SharerSegment) -> c2c.SharerSegment:
            plain = (segment.key_proj, segment.value_proj, segment.key_bias, segment.value_bias) == (
                None,
            ) * 4
            if plain and segment.key_scale is None and segment.value_scale is None and segment.index is None:
                return segment
            key, value = c2c.project_kv(segment, backend=backend)
            return c2c.SharerSegment(
                key,
                value,
                gate=segment.gate,
                lengths=segment.lengths,
                positions=segment.positions,
                visibility=segment.visibility,
            )

        return SharedContext(
            [[project(s) for s in segments] for segments in self.layers], self.position_offset
        )

    def shard(self, rank: int, world_size: int) -> SharedContext:
        """The part of rank `rank` of `world_size` under tensor parallelism: its slice of the receiver's heads.

        Segments in receiver space are cut by KV head, projected ones by the heads of their projectors (the sharer's
        cache stays whole); gates that differ by head are cut alike. Views, no copies.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. {world_size - 1}, got {rank}")

        def cut(tensor: Tensor | None, dim: int, name: str) -> Tensor | None:
            if tensor is None:
                return None
            heads = tensor.shape[dim]
            if heads % world_size:
                raise ValueError(f"{name}: {heads} heads do not divide by world_size {world_size}")
            size = heads // world_size
            return tensor.narrow(dim, rank * size, size)

        def cut_projector(projector: Any, name: str) -> Any:
            return (
                (cut(projector[0], 0, name), projector[1])
                if isinstance(projector, (tuple, list))
                else (cut(projector, 0, name))
            )

        def part(segment: c2c.SharerSegment) -> c2c.SharerSegment:
            changes: dict[str, Any] = {}
            for kind in ("key", "value"):
                projector = getattr(segment, f"{kind}_proj")
                if projector is None:
                    changes[kind] = cut(getattr(segment, kind), 1, kind)
                    if getattr(segment, f"{kind}_scale") is not None:
                        changes[f"{kind}_scale"] = _cut_shared(
                            getattr(segment, f"{kind}_scale"), cut, f"{kind}_scale"
                        )
                else:
                    changes[f"{kind}_proj"] = cut_projector(projector, f"{kind}_proj")
                changes[f"{kind}_bias"] = cut(getattr(segment, f"{kind}_bias"), 0, f"{kind}_bias")
            if segment.gate is not None:
                changes["gate"] = _cut_shared(segment.gate, cut, "gate")
            return replace(segment, **changes)

        return SharedContext([[part(s) for s in segments] for segments in self.layers], self.position_offset)

    def rows(self, batch: int) -> list[list[list[c2c.SharerSegment]]]:
        """Per layer, per group of neighbouring receiver rows that read the same context row, the segments expanded.

        One group where the context's batch is `batch` or 1, else one per context row: expanding is a stride of 0 and
        copies nothing. Kept for the next forward pass unless a gradient or a trace needs it fresh.
        """
        if self.batch == batch:
            return [[segments] for segments in self.layers]
        keep = not (self.trainable or torch.compiler.is_compiling())
        if keep and batch in self._rows:
            return self._rows[batch]
        times = batch // self.batch
        groups = [
            [[_row(segment, row, times) for segment in segments] for row in range(self.batch)]
            for segments in self.layers
        ]
        if keep:
            self._rows = {batch: groups}
        return groups

    def offset_rows(self, batch: int) -> Tensor | None:
        """(batch, 1) or (1, 1) integers to add to the receiver's positions, or None."""
        if self.position_offset is None:
            return None
        offset = self.position_offset
        return (offset if self.batch in (1, batch) else offset.repeat_interleave(batch // self.batch))[
            :, None
        ]

    def with_leaves(self) -> SharedContext:
        """The same context with every computed tensor that needs a gradient replaced by a leaf that hands it on.

        Re-entrant checkpointing runs one backward pass per layer; a graph that layers share (a gate behind a sigmoid)
        would be walked, and freed, more than once.
        """
        leaves: dict[int, Tensor] = {}

        def leaf(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad or tensor.is_leaf:
                return tensor
            if id(tensor) not in leaves:
                leaves[id(tensor)] = _handing_on(tensor)
            return leaves[id(tensor)]

        def swap(segment: c2c.SharerSegment) -> c2c.SharerSegment:
            changes: dict[str, Any] = {}
            for name in _TENSORS:
                field = getattr(segment, name)
                if isinstance(field, Tensor):
                    changes[name] = leaf(field)
                elif field is not None:
                    changes[name] = tuple(leaf(part) for part in field)
            return replace(segment, **changes)

        swapped = SharedContext.__new__(SharedContext)
        swapped.__dict__.update(self.__dict__)
        swapped.layers = [[swap(segment) for segment in segments] for segments in self.layers]
        return swapped

    def __copy__(self) -> SharedContext:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedContext:
        # A cache is deep-copied to reuse a prompt; the context it carries is read-only and shared.
        return self

    def __repr__(self) -> str:
        segments = max(len(segments) for segments in self.layers)
        tokens = max(s.key.shape[2] for layer in self.layers for s in layer)
        return f"SharedContext(layers={len(self.layers)}, segments={segments}, batch={self.batch}, tokens<={tokens})"


def _tensors(segment: c2c.SharerSegment) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for name in _TENSORS:
        field = getattr(segment, name)
        if isinstance(field, Tensor):
            found.append((name, field))
        elif field is not None:
            found.extend((name, part) for part in field)
    return found


def _layer_space(index: int, segments: list[c2c.SharerSegment]) -> LayerSpace | None:
    """The receiver space that the segments of one layer agree on, None for a layer without segments."""
    space = None
    for number, segment in enumerate(segments):
        where = f"layers[{index}][{number}]"
        if not isinstance(segment, c2c.SharerSegment):
            raise TypeError(f"{where} must be a SharerSegment, got {type(segment).__name__}")
        heads, head_dim = _out_shape(segment.key, segment.key_proj)
        value_heads, value_dim = _out_shape(segment.value, segment.value_proj)
        if heads != value_heads:
            raise ValueError(f"{where}: keys have {heads} heads in receiver space, values {value_heads}")
        found = LayerSpace(heads, head_dim, value_dim, segment.key.device)
        for name, tensor in _tensors(segment):
            if tensor.device != found.device:
                raise ValueError(f"{where}.{name} is on {tensor.device}, its key on {found.device}")
        if space is not None and found != space:
            raise ValueError(f"{where}: {found} differs from the first segment's {space}")
        space = found
    return space


def _out_shape(stored: Tensor, projector: Any) -> tuple[int, int]:
    if projector is None:
        return stored.shape[1], stored.shape[3]
    out = projector[0] if isinstance(projector, (tuple, list)) else projector
    return out.shape[0], out.shape[1]


def _common_batch(layers: list[list[c2c.SharerSegment]]) -> int:
    batches = {segment.key.shape[0] for segments in layers for segment in segments}
    if len(batches) > 1:
        raise ValueError(f"layers: segments must have the same batch, got {sorted(batches)}")
    return batches.pop()


def _offset_tensor(offset: int | Tensor | None, batch: int, device: torch.device) -> Tensor | None:
    if offset is None:
        return None
    tensor = torch.as_tensor(offset, device=device)
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise TypeError(f"position_offset must be integers, got {tensor.dtype}")
    if tensor.dim() > 1 or (tensor.dim() == 1 and tensor.shape[0] not in (1, batch)):
        raise ValueError(f"position_offset must be a number or ({batch},), got {tuple(tensor.shape)}")
    if bool((tensor < 0).any()):
        raise ValueError(f"position_offset must be >= 0, got {int(tensor.min())}")
    return tensor.long().expand(batch) if bool(tensor.any()) else None


def _row(segment: c2c.SharerSegment, row: int, times: int) -> c2c.SharerSegment:
    """Row `row` of a segment, seen `times` times through a stride of 0."""
    changes: dict[str, Any] = {}
    for name, dims in _BATCHED.items():
        tensor = getattr(segment, name)
        if tensor is not None and tensor.dim() == dims:
            one = tensor if tensor.shape[0] == 1 else tensor[row : row + 1]
            changes[name] = one.expand(times, *tensor.shape[1:])
    return replace(segment, **changes)


def _handing_on(tensor: Tensor) -> Tensor:
    """A leaf with `tensor`'s values whose gradients run on into `tensor`'s graph as they come."""
    leaf = tensor.detach().requires_grad_()

    def hand_on(accumulated: Tensor) -> None:
        gradient, accumulated.grad = accumulated.grad, None
        torch.autograd.backward(tensor, gradient, retain_graph=True)

    leaf.register_post_accumulate_grad_hook(hand_on)
    return leaf


def _cut_shared(tensor: Tensor, cut: Any, name: str) -> Tensor:
    """A (batch, heads, len) broadcastable tensor cut by head, or as it is where all heads share it."""
    return tensor if tensor.dim() < 2 or tensor.shape[-2] == 1 else cut(tensor, tensor.dim() - 2, name)
