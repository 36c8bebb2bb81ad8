"""The shared context: for every receiver layer, the sharer segments that its attention reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

import c2c_kernels as c2c
from c2c_kernels.integrations.transformers.caches import per_cache, read_cache, sharer_segments

# Where `context.attach(cache)` leaves the context on a cache.
CARRIED = "_c2c_context"
# Fields of a segment whose first dimension is the batch where they have this many dimensions.
_BATCHED = {
    "key": 4,
    "value": 4,
    "gate": 3,
    "lengths": 1,
    "positions": 2,
    "key_scale": 3,
    "value_scale": 3,
    "index": 2,
}


class LayerSpace(NamedTuple):
    """What the keys and values of a receiver layer must look like for a context to fit."""

    kv_heads: int
    head_dim: int
    value_dim: int
    device: torch.device


class SharedContext:
    """For every receiver layer the sharer segments its attention reads, and where the receiver's positions start.

    Opaque on purpose (no container, no `.to`): accelerate would copy it whole at every layer. It holds the tensors it
    was given, not copies, so that optimiser steps on gates and projectors act at once; its segments are not to be
    replaced. A context with batch 1 serves any receiver batch. Otherwise row i of a receiver batch B reads row
    `i // (B / batch)`, as beams and several return sequences need.

    Args:
        layers: per receiver layer a list of `c2c.SharerSegment`; an empty list leaves a layer alone.
        position_offset: int or (batch,) integers, added to the receiver's own positions. None: 0.

    Attributes:
        layers: as given.
        batch: rows of every segment.
        position_offset: (batch,) integers, None where all are 0.
        positioned: whether a segment has positions.
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
        device = next(space.device for space in self.spaces if space is not None)
        self.position_offset = _offset_tensor(position_offset, self.batch, device)
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

        Every keyword but the last takes a list with one entry per cache, or one entry that is no list for all caches.
        With a single cache, an entry that is a list itself (one item per layer) need not be wrapped.

        Args:
            caches: what each sharer has read: a Transformers cache, or per layer (key, value), each
                (batch, sharer_heads, len, sharer_head_dim), rotated. Batches are equal, or 1.
            projectors: None where the sharer's space is the receiver's own. Else a list or mapping over receiver
                layers of tuples (key_proj, value_proj[, key_bias[, value_bias]]) or of objects with attributes of
                these names, shapes as in `c2c.SharerSegment`.
            gates: None, a number, a tensor broadcastable to (batch, q_heads, len), or a list of these, one per
                receiver layer. >= 0. Kept as tensors, so that another value does not recompile.
            positions: the tokens' positions, (len,) or (batch, len) integers. None: 0 .. len - 1, as a plain forward
                pass reads them. False: no positions; every query sees every token, sliding windows or not.
            visibility: "all", or "causal" to hide from every query the tokens at later positions (aligned text).
            attention_masks: (batch, len) padding masks of sharers that read a padded batch. One that is not plain
                right padding needs `positions`: those of `generate` are mask.cumsum(-1) - 1, those of a plain
                forward pass arange(len).
            layer_maps: per receiver layer the sharer layer it reads, None for no segment. None: the same layer, for
                which the layer counts must be equal.
            position_offset: int or (batch,), added to the receiver's own positions. None: one past the last position
                of any sharer, row by row, so that the receiver continues the text; 0 for visibility "causal".

        Raises:
            ValueError, TypeError: naming the argument, for caches that cannot be read (quantised, offloaded,
                truncated sliding windows, empty), and for whatever does not fit together.
        """
        if not caches:
            raise ValueError("caches: give at least one cache")
        count = len(caches)
        entries = {
            "projectors": per_cache("projectors", projectors, count),
            "gates": per_cache("gates", gates, count),
            "positions": per_cache("positions", positions, count),
            "visibility": per_cache("visibility", visibility, count),
            "attention_mask": per_cache("attention_masks", attention_masks, count),
            "layer_map": per_cache("layer_maps", layer_maps, count),
        }
        read = [read_cache(cache, f"caches[{index}]") for index, cache in enumerate(caches)]
        batches = {layers[0][0].shape[0] for layers in read} - {1}
        if len(batches) > 1:
            raise ValueError(f"caches: batch sizes must be equal or 1, got {sorted(batches)}")
        batch = batches.pop() if batches else 1

        columns: list[list[c2c.SharerSegment | None]] = []
        ends: list[Tensor] = []
        for index, layers in enumerate(read):
            entry = {name: values[index] for name, values in entries.items()}
            column, end = sharer_segments(layers, f"caches[{index}]", batch, **entry)
            columns.append(column)
            ends.append(end)
        depths = sorted({len(column) for column in columns})
        if len(depths) > 1:
            raise ValueError(f"caches map to different numbers of receiver layers: {depths}")
        if position_offset is None:
            position_offset = torch.stack(ends).amax(dim=0)
        return cls([[s for s in row if s is not None] for row in zip(*columns, strict=True)], position_offset)

    def attach(self, cache: Cache) -> Cache:
        """Makes `cache` carry this context into every forward pass that uses it; returns the cache."""
        if not isinstance(cache, Cache):
            raise TypeError(f"cache must be a Transformers Cache, got {type(cache).__name__}")
        setattr(cache, CARRIED, self)
        return cache

    def materialize(self, backend: str | None = None) -> SharedContext:
        """The same context with every segment in receiver space, projected here once by `project_kv`.

        Best for many queries and wide sharers; takes receiver-sized memory per sharer token.
        """

        def project(segment: c2c.SharerSegment) -> c2c.SharerSegment:
            raw = {f.name for f in fields(segment) if getattr(segment, f.name) is not None}
            if raw <= {"key", "value", "gate", "lengths", "positions", "visibility"}:
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

        layers = [[project(segment) for segment in segments] for segments in self.layers]
        return SharedContext(layers, self.position_offset)

    def shard(self, rank: int, world_size: int) -> SharedContext:
        """The part of one rank under tensor parallelism: its slice of the receiver's heads, as views.

        Segments in receiver space are cut by KV head, projected ones by their projectors' heads (the sharer's cache
        stays whole), gates that differ by head likewise.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. {world_size - 1}, got {rank}")
        layers = [[_shard(s, rank, world_size) for s in segments] for segments in self.layers]
        return SharedContext(layers, self.position_offset)

    @property
    def trainable(self) -> bool:
        """Whether some tensor of the context requires a gradient."""
        return any(tensor.requires_grad for layer in self.layers for s in layer for _, tensor in _tensors(s))

    def rows(self, batch: int) -> list[list[list[c2c.SharerSegment]]]:
        """Per layer, per group of neighbouring receiver rows that read the same context row, the segments expanded.

        One group where the context's batch is 1 or `batch`, else one per context row. Expanding is a stride of 0 and
        copies nothing; without gradients and traces the views are kept for the next forward pass.
        """
        # One operator call per group beats repeating the rows: 4 rows x 4 beams over 400 shared tokens of SmolLM2-135M
        # take 102 ms a step on one CPU core, 111 ms with repeated rows (and 4 times their memory).
        if self.batch == batch:
            return [[segments] for segments in self.layers]
        keep = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
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
        """(batch or 1, 1) integers to add to the receiver's positions, None where all are 0."""
        offset = self.position_offset
        if offset is not None and self.batch not in (1, batch):
            offset = offset.repeat_interleave(batch // self.batch)
        return None if offset is None else offset[:, None]

    def with_leaves(self) -> SharedContext:
        """The same context with every computed tensor that needs a gradient replaced by a leaf that hands it on.

        Re-entrant checkpointing runs a backward pass per layer. A graph that layers share, such as a gate behind a
        sigmoid, would be freed by the first of them.
        """

        def leaf(field: Any) -> Any:
            if isinstance(field, (tuple, list)):
                return tuple(leaf(part) for part in field)
            computed = isinstance(field, Tensor) and field.requires_grad and not field.is_leaf
            return _handing_on(field) if computed else field

        def swap(segment: c2c.SharerSegment) -> c2c.SharerSegment:
            return c2c.SharerSegment(*(leaf(getattr(segment, f.name)) for f in fields(segment)))

        return SharedContext([[swap(s) for s in segments] for segments in self.layers], self.position_offset)

    def __copy__(self) -> SharedContext:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedContext:
        # A cache is deep-copied to reuse a prompt; the context it carries is read-only and shared.
        return self

    def __repr__(self) -> str:
        segments = max(len(layer) for layer in self.layers)
        tokens = sum(s.key.shape[2] for s in max(self.layers, key=len))
        return f"SharedContext(layers={len(self.layers)}, segments={segments}, batch={self.batch}, tokens={tokens})"


def _tensors(segment: c2c.SharerSegment) -> Iterator[tuple[str, Tensor]]:
    for name, field in vars(segment).items():
        if isinstance(field, Tensor):
            yield name, field
        elif isinstance(field, (tuple, list)):
            yield from ((name, part) for part in field)


def _layer_space(index: int, segments: list[c2c.SharerSegment]) -> LayerSpace | None:
    """The receiver space that the segments of a layer agree on, None for a layer without segments."""
    space = None
    for number, segment in enumerate(segments):
        where = f"layers[{index}][{number}]"
        if not isinstance(segment, c2c.SharerSegment):
            raise TypeError(f"{where} must be a SharerSegment, got {type(segment).__name__}")
        heads, head_dim = _receiver_shape(segment.key, segment.key_proj)
        value_heads, value_dim = _receiver_shape(segment.value, segment.value_proj)
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


def _receiver_shape(stored: Tensor, projector: Any) -> tuple[int, int]:
    """(heads, head_dim) of stored keys or values after their projector."""
    if projector is None:
        return stored.shape[1], stored.shape[3]
    outward = projector[0] if isinstance(projector, (tuple, list)) else projector
    return outward.shape[0], outward.shape[1]


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
    """Row `row` of a segment, `times` times through a stride of 0."""
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


def _shard(segment: c2c.SharerSegment, rank: int, world_size: int) -> c2c.SharerSegment:
    changes: dict[str, Any] = {}

    def cut(name: str, dim: int) -> None:
        """Keeps the rank's heads of a field, unless it is None or (from the right) has none or one for all."""
        field = getattr(segment, name)
        tensor = field[0] if isinstance(field, (tuple, list)) else field
        if tensor is None or (dim < 0 and (tensor.dim() < -dim or tensor.shape[dim] == 1)):
            return
        if tensor.shape[dim] % world_size:
            raise ValueError(f"{name}: {tensor.shape[dim]} heads do not divide by world_size {world_size}")
        size = tensor.shape[dim] // world_size
        part = tensor.narrow(dim, rank * size, size)
        changes[name] = part if tensor is field else (part, field[1])

    for kind in ("key", "value"):
        if getattr(segment, f"{kind}_proj") is None:
            cut(kind, 1)
            cut(f"{kind}_scale", -2)
        cut(f"{kind}_proj", 0)
        cut(f"{kind}_bias", 0)
    cut("gate", -2)
    return replace(segment, **changes)
