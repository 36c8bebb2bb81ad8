"""What maps between caches read: keys and values of some layers, side by side as one wide head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .backends import reference

Layers = Sequence[tuple[Tensor, Tensor]]


class Source(NamedTuple):
    """What a map reads of the sharer: keys or values of one layer, of the aligned token or one `offset` away."""

    kind: Literal["key", "value"]
    layer: int
    offset: int = 0


@dataclass(frozen=True)
class CacheShape:
    """What the cache of one model looks like.

    Attributes:
        layers, kv_heads, head_dim, value_dim: of keys (batch, kv_heads, len, head_dim) and values.
        frequencies: the model's different rotary embeddings: inverse frequencies, radians per position, each
            rotary_dim / 2 long (half-rotation layout on the first rotary_dim dimensions of a head).
        layer_frequencies: per layer which of them it uses.
        rotary_scale: factor on cos and sin (YaRN), else 1.
    """

    layers: int
    kv_heads: int
    head_dim: int
    value_dim: int
    frequencies: tuple[tuple[float, ...], ...]
    layer_frequencies: tuple[int, ...]
    rotary_scale: float = 1.0

    def __post_init__(self) -> None:
        if len(self.layer_frequencies) != self.layers:
            raise ValueError(f"layer_frequencies has {len(self.layer_frequencies)} entries, wanted {self.layers}")
        if not all(0 <= which < len(self.frequencies) for which in self.layer_frequencies):
            raise ValueError(f"layer_frequencies must be within 0..{len(self.frequencies) - 1}")
        if any(2 * len(f) > self.head_dim for f in self.frequencies):
            raise ValueError(f"frequencies must have at most head_dim / 2 = {self.head_dim // 2} entries")

    def width(self, source: Source) -> int:
        """Numbers per token of a source: kv_heads * head_dim of keys, kv_heads * value_dim of values."""
        return self.kv_heads * (self.head_dim if source.kind == "key" else self.value_dim)

    def angles(self, layer: int, positions: Tensor) -> Tensor:
        """(*positions, rotary_dim / 2) float32 radians."""
        inverse = torch.tensor(self.frequencies[self.layer_frequencies[layer]], device=positions.device)
        return positions[..., None].float() * inverse

    def table(self, layers: Sequence[int], positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (*positions, sum of rotary_dims), for the given layers' heads side by side as one head.

        The layout is that of `wide_columns`: first halves of all, then second halves of all.
        """
        half = torch.cat([self.angles(layer, positions) for layer in layers], dim=-1)
        cos, sin = half.cos() * self.rotary_scale, half.sin() * self.rotary_scale
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def wide_columns(shape: CacheShape, sources: Sequence[Source]) -> Tensor:
    """(width,) which column of the sources side by side, each flattened (head, dim), stands where in the wide head.

    First the halves of all rotary pairs (every key source and head), then the other halves, then all that does not
    rotate: so one rotary table undoes the rotation of layers with different rotary embeddings.
    """
    first, second, rest = [], [], []
    start = 0
    for source in sources:
        half = len(shape.frequencies[shape.layer_frequencies[source.layer]]) if source.kind == "key" else 0
        dim = shape.head_dim if source.kind == "key" else shape.value_dim
        for _ in range(shape.kv_heads):
            columns = list(range(start, start + dim))
            first += columns[:half]
            second += columns[half : 2 * half]
            rest += columns[2 * half :]
            start += dim
    return torch.tensor(first + second + rest, dtype=torch.long)


def stored_of(cache: Layers, source: Source) -> Tensor:
    """(batch, heads, len, dim) of a source, as the cache holds it."""
    return cache[source.layer][0 if source.kind == "key" else 1]


def shifted(stored: Tensor, offset: int) -> Tensor:
    """(batch, heads, len, dim) whose token t is token t + offset of `stored`, the first one where there is none."""
    if not offset:
        return stored
    return stored[:, :, (torch.arange(stored.shape[2], device=stored.device) + offset).clamp(min=0)]


@dataclass(eq=False)
class Wide:
    """Sources of a cache side by side as one wide head, made once for every list of sources.

    Attributes:
        shape: of the cache.
        stored: gives (batch, heads, len, dim) of a source.
        most: lists of sources that are remembered; None: all. What is forgotten is written over by what comes next:
            13 MB that the system would hand out anew, page by page, for every layer of every step.
    """

    shape: CacheShape
    stored: Callable[[Source], Tensor]
    most: int | None = None
    made: dict[tuple[Source, ...], Tensor] = field(default_factory=dict)

    def read(self, sources: tuple[Source, ...]) -> Tensor:
        """(batch, 1, len, width), columns in the order of `wide_columns`."""
        if sources not in self.made:
            room = None
            while self.most is not None and len(self.made) >= self.most:
                room = self.made.pop(next(iter(self.made)))[:, 0]
            first, second, rest = [], [], []
            for source in sources:
                stored = self.stored(source)
                which = self.shape.layer_frequencies[source.layer]
                half = len(self.shape.frequencies[which]) if source.kind == "key" else 0
                for head in range(stored.shape[1]):
                    part = stored[:, head]
                    first.append(part[..., :half])
                    second.append(part[..., half : 2 * half])
                    rest.append(part[..., 2 * half :])
            parts = [part for part in first + second + rest if part.shape[-1]]
            if room is not None and room.shape[-1] != sum(part.shape[-1] for part in parts):
                room = None
            self.made[sources] = torch.cat(parts, dim=-1, out=room)[:, None]
        else:
            self.made[sources] = self.made.pop(sources)  # the one asked for last is forgotten last
        return self.made[sources]


class PlainSources:
    """Sources without rotation, for the tokens of a segment only, float32.

    Args:
        shape: of the cache.
        cache: per layer (key, value), rotated.
        positions: (batch or 1, len) at which the sharer read.
        index: (n,) or (batch, n) tokens of the segment.
    """

    def __init__(self, shape: CacheShape, cache: Layers, positions: Tensor, index: Tensor) -> None:
        self._shape, self._cache, self._positions, self._index = shape, cache, positions, index
        self._made: dict[Source, Tensor] = {}
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        self._wide = Wide(shape, self._plain, most=2)  # keys and values of the receiver layer at hand

    def wide(self, sources: tuple[Source, ...]) -> Tensor:
        """(batch, 1, n, width) float32, columns in the order of `wide_columns`; good until two others are asked for."""
        return self._wide.read(sources)

    def _plain(self, source: Source) -> Tensor:
        if source not in self._made:
            stored = shifted(stored_of(self._cache, source), source.offset)
            remove = None
            # An offset turns a source by a constant angle more, which is part of the fitted map.
            which = self._shape.layer_frequencies[source.layer]
            if source.kind == "key" and self._shape.frequencies[which]:
                if which not in self._tables:
                    self._tables[which] = self._shape.table([source.layer], self._positions)
                remove = self._tables[which]
            self._made[source] = reference.prepare_raw(stored, None, self._index, remove, None, torch.float32)
        return self._made[source]
