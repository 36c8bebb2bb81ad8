"""Modules that bring the cache of one model into the space of another: affine maps per receiver layer.

    projector = c2c.CacheProjector.load("gemma3-smollm2.safetensors")
    context = projector.context(sharer_cache, sharer_spans, receiver_spans)     # for enable()d receivers

For a receiver layer, token r and the sharer token t that is aligned to it:

    key   = rotate(Wk x_t + bk, position of r),   x_t = [sharer keys, rotation removed | sharer values] of its sources
    value = Wv y_t + bv

Sources are (sharer layer, key or value, token offset). All sources of a receiver layer are one segment of one wide
head, so that one `project_kv` call un-rotates, gathers, projects and rotates. Source: DESIGN.md 2.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from .alignment import NO_TEXT, Strategy, TokenSpans, align
from .ops.project_kv import project_kv
from .segment import Rope, SharerSegment
from .sources import (
    CacheShape,
    Layers,
    PlainSources,
    Source,
    Wide,
    shifted,
    stored_of,
    wide_columns,
)

if TYPE_CHECKING:
    from .integrations.transformers import SharedContext

__all__ = [
    "CacheProjector",
    "CacheShape",
    "Identity",
    "Layers",
    "LinearProjector",
    "Source",
    "TokenPlan",
    "Tokens",
    "shifted",
    "wide_columns",
]

Tokens = Literal["receiver", "sharer"]


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """Which sharer tokens a segment reads and where they stand in the receiver's sequence.

    Attributes:
        index: (n,) or (batch, n) int64, the sharer token of every segment token.
        positions: (n,) or (batch, n) int64, positions of the segment tokens in the receiver's sequence.
        end: position after the text: where the receiver's own tokens go on. int or (batch,).
        lengths: (batch,) valid segment tokens, None for all.
    """

    index: Tensor
    positions: Tensor
    end: int | Tensor
    lengths: Tensor | None = None


@dataclass(frozen=True)
class Identity:
    """Which model it is.

    Attributes:
        name: for people.
        model: SHA-256 of configuration and weights (`c2c_kernels.identity.model_hash`).
        tokenizer: SHA-256 of what the tokenizer does (`c2c_kernels.identity.tokenizer_hash`).
    """

    name: str = ""
    model: str = ""
    tokenizer: str = ""


class LinearProjector(nn.Module):
    """The affine maps of one receiver layer.

    Args:
        shape: of the sharer's cache.
        kv_heads, head_dim, value_dim: of the receiver layer.
        key_sources, value_sources: what the maps read; at least one each.
        rank: None for full matrices, else W = U A with A (rank, width) shared by all heads.

    Attributes:
        key_proj, value_proj: parameters (kv_heads, dim, width or rank); zero at first. The columns are in the order of
            `wide_columns`.
        key_proj_in, value_proj_in: parameters (rank, width), None without a rank.
        key_bias, value_bias: parameters (kv_heads, dim).
    """

    def __init__(
        self,
        shape: CacheShape,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        key_sources: Sequence[Source],
        value_sources: Sequence[Source],
        *,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        self.key_sources = tuple(Source(*s) for s in key_sources)
        self.value_sources = tuple(Source(*s) for s in value_sources)
        for name, sources in (("key_sources", self.key_sources), ("value_sources", self.value_sources)):
            if not sources:
                raise ValueError(f"{name} is empty: at least one source is wanted")
            for source in sources:
                if source.kind not in ("key", "value") or not 0 <= source.layer < shape.layers or source.offset > 0:
                    raise ValueError(
                        f'{name} has {tuple(source)}, wanted ("key" or "value", layer 0..{shape.layers - 1}, '
                        "token offset of 0 or below)"
                    )
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1 or None, got {rank}")
        self.rank = rank
        self.key_bias: nn.Parameter
        self.value_bias: nn.Parameter
        for half, dim, sources in (("key", head_dim, self.key_sources), ("value", value_dim, self.value_sources)):
            width = sum(shape.width(source) for source in sources)
            inner = width if rank is None else rank
            self.register_parameter(f"{half}_proj", nn.Parameter(torch.zeros(kv_heads, dim, inner)))
            into = None if rank is None else nn.Parameter(torch.zeros(rank, width))
            self.register_parameter(f"{half}_proj_in", into)
            self.register_parameter(f"{half}_bias", nn.Parameter(torch.zeros(kv_heads, dim)))

    def weights(self, half: Literal["key", "value"]) -> Tensor | tuple[Tensor, Tensor]:
        """What `SharerSegment` takes as a projector: W, or (U, A)."""
        outward, into = getattr(self, f"{half}_proj"), getattr(self, f"{half}_proj_in")
        return outward if into is None else (outward, into)

    def extra_repr(self) -> str:
        return f"key_sources={len(self.key_sources)}, value_sources={len(self.value_sources)}, rank={self.rank}"


class CacheProjector(nn.Module):
    """Maps from the cache of a sharer to that of a receiver, one `LinearProjector` per receiver layer.

    Args:
        sharer, receiver: shapes of both caches.
        sources: per receiver layer (key_sources, value_sources).
        rank: of every map, None for full matrices.
        tokens: "receiver": a segment has one token for every receiver token of the text, read from the sharer token
            aligned to it. "sharer": one for every sharer token, at the position of the receiver token that it ends in.
        strategy: how tokens are aligned, see `Alignment.index`.
        prefix: ids that the receiver reads itself before the text (its start token), at positions 0, 1, ...
        sharer_identity, receiver_identity: the models it is made for.
        facts: what it was fitted on and how; plain JSON values.

    Attributes:
        layers: nn.ModuleList of LinearProjector, one per receiver layer.
        gate_logits: None (gate 1, plain concatenation), or a parameter (receiver layers, q_heads).
        gate_temperature: gates are sigmoid(gate_logits / gate_temperature). Training lowers it.
    """

    def __init__(
        self,
        sharer: CacheShape,
        receiver: CacheShape,
        sources: Sequence[tuple[Sequence[Source], Sequence[Source]]],
        *,
        rank: int | None = None,
        tokens: Tokens = "receiver",
        strategy: Strategy = "last",
        prefix: Sequence[int] = (),
        sharer_identity: Identity = Identity(),
        receiver_identity: Identity = Identity(),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if len(sources) != receiver.layers:
            raise ValueError(f"sources has {len(sources)} entries, wanted one per receiver layer ({receiver.layers})")
        if tokens not in ("receiver", "sharer"):
            raise ValueError(f'tokens must be "receiver" or "sharer", got {tokens!r}')
        self.sharer, self.receiver = sharer, receiver
        self.rank, self.tokens, self.strategy = rank, tokens, strategy
        self.prefix = tuple(int(token) for token in prefix)
        self.sharer_identity, self.receiver_identity = sharer_identity, receiver_identity
        self.facts: dict[str, Any] = dict(facts or {})
        space = (receiver.kv_heads, receiver.head_dim, receiver.value_dim)
        self.layers = nn.ModuleList(LinearProjector(sharer, *space, *pair, rank=rank) for pair in sources)
        self.gate_temperature = 1.0
        self.gate_logits: nn.Parameter | None
        self.register_parameter("gate_logits", None)

    @property
    def maps(self) -> list[LinearProjector]:
        """`layers` as a list."""
        return cast("list[LinearProjector]", list(self.layers))

    def add_gates(self, q_heads: int, logit: float = 4.0) -> nn.Parameter:
        """Gives every layer and query head a gate sigmoid(logit / temperature); returns `gate_logits`."""
        device = self.maps[0].key_bias.device
        self.gate_logits = nn.Parameter(torch.full((self.receiver.layers, q_heads), float(logit), device=device))
        return self.gate_logits

    def gates(self) -> Tensor | None:
        """(receiver layers, q_heads) float32 in 0..1, None where there are none (all 1)."""
        if self.gate_logits is None:
            return None
        return torch.sigmoid(self.gate_logits.float() / self.gate_temperature)

    def plan(self, sharer: TokenSpans, receiver: TokenSpans, *, start: int | None = None) -> TokenPlan:
        """Which sharer tokens a segment of this text reads, and their positions.

        Args:
            sharer, receiver: the text's tokens, see `c2c_kernels.alignment.token_spans`.
            start: position of the text's first token in the receiver's sequence; None: after the prefix.
        """
        start = len(self.prefix) if start is None else start
        if self.tokens == "receiver":
            index = align(sharer, receiver).index(self.strategy)
            index = index[index != NO_TEXT]
            return TokenPlan(index, torch.arange(start, start + len(index)), start + len(index))
        place = align(receiver, sharer).index("last")
        (text,) = torch.nonzero(place != NO_TEXT, as_tuple=True)
        # Special receiver tokens are not part of the text: positions count the others.
        rank = torch.cumsum(torch.tensor([g != NO_TEXT for g in receiver.group]), 0) - 1
        return TokenPlan(text, start + rank[place[text]], start + int(rank[-1]) + 1)

    def segments(
        self,
        cache: Layers,
        plan: TokenPlan,
        *,
        sharer_positions: Tensor | None = None,
        visibility: Literal["all", "causal"] = "all",
        backend: str | None = None,
    ) -> list[SharerSegment]:
        """One segment in receiver space per receiver layer: one `project_kv` call each, differentiable.

        Args:
            cache: per sharer layer (key, value), each (batch, kv_heads, len, dim), rotated, as its cache holds them.
            plan: see `plan`; batched plans pad `index` with 0 and `positions` with 0 beyond `lengths`.
            sharer_positions: (len,) or (batch, len) positions at which the sharer read; None: 0, 1, ...
            visibility: see `SharerSegment`.
            backend: of `project_kv`.

        Raises:
            ValueError: for a cache of another shape.
        """
        self.check_cache(cache)
        first = cache[0][0]
        batch = first.shape[0]
        at = _sharer_rows(cache, sharer_positions)
        index, positions = plan.index.to(first.device), _rows(plan.positions.to(first.device))
        gates = self.gates()
        tables = _Tables(self.sharer, self.receiver, at, positions)
        wide = Wide(self.sharer, lambda source: shifted(stored_of(cache, source), source.offset))
        plain = PlainSources(self.sharer, cache, at, index) if self._trains(cache) else None
        segments = []
        for number, layer in enumerate(self.maps):
            if plain is not None:
                pair = _project_recorded(layer, plain, tables.apply(number), plan.lengths, first.dtype, backend)
            else:
                sources = (wide.read(layer.key_sources), wide.read(layer.value_sources))
                removed = (tables.remove(layer.key_sources), tables.remove(layer.value_sources))
                pair = _project(layer, sources, removed, tables.apply(number), index, plan.lengths, backend)
            segments.append(
                SharerSegment(
                    *pair,
                    gate=None if gates is None else gates[number].reshape(1, -1, 1),
                    lengths=plan.lengths,
                    positions=positions.expand(batch, -1),
                    visibility=visibility,
                )
            )
        return segments

    def features(
        self, cache: Layers, plan: TokenPlan, *, sharer_positions: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Per receiver layer what its maps read of every segment token: (tokens, width) float32 for keys and values.

        Columns in the order of `wide_columns`, rotation removed, tokens of all rows within their lengths; arguments as
        for `segments`.
        """
        self.check_cache(cache)
        plain = PlainSources(self.sharer, cache, _sharer_rows(cache, sharer_positions), plan.index)
        valid = torch.ones(plan.index.shape[-1], dtype=torch.bool)[None]
        if plan.lengths is not None:
            valid = torch.arange(plan.index.shape[-1]) < plan.lengths[:, None]
        valid = valid.expand(cache[0][0].shape[0], -1)
        for layer in self.maps:
            yield plain.wide(layer.key_sources)[:, 0][valid], plain.wide(layer.value_sources)[:, 0][valid]

    def _trains(self, cache: Layers) -> bool:
        """Whether maps are recorded for a backward pass that does not go on into the cache."""
        return (
            torch.is_grad_enabled()
            and any(parameter.requires_grad for parameter in self.layers.parameters())
            and not any(tensor.requires_grad for pair in cache for tensor in pair)
        )

    def check_cache(self, cache: Layers) -> None:
        """ValueError unless `cache` has the shape of the sharer's."""
        wanted = self.sharer
        if len(cache) != wanted.layers:
            raise ValueError(f"cache has {len(cache)} layers, the projector's sharer has {wanted.layers}")
        for number, (key, value) in enumerate(cache):
            came = (*key.shape[1:2], *key.shape[3:], *value.shape[3:])
            if came != (wanted.kv_heads, wanted.head_dim, wanted.value_dim):
                raise ValueError(
                    f"cache layer {number}: key {tuple(key.shape)} and value {tuple(value.shape)}, wanted "
                    f"(batch, {wanted.kv_heads}, len, {wanted.head_dim}) and (..., {wanted.value_dim})"
                )

    def context(
        self,
        sharer_cache: Any,
        sharer_spans: TokenSpans,
        receiver_spans: TokenSpans,
        *,
        prefix: Any = None,
        visibility: Literal["all", "causal"] = "all",
        backend: str | None = None,
    ) -> SharedContext:
        """A `SharedContext` that stands for the text; see `integrations.transformers.projected_context`."""
        # Imports go down; this is the one step up, taken when the integration is asked for.
        from .integrations.transformers import projected_context

        return projected_context(
            self, sharer_cache, sharer_spans, receiver_spans, prefix=prefix, visibility=visibility, backend=backend
        )

    @classmethod
    def fit(cls, sharer: Any, receiver: Any, texts: Sequence[str], **keywords: Any) -> CacheProjector:
        """A projector in closed form from what two models keep of texts; see `c2c_kernels.fitting.fit_projector`."""
        from .fitting import fit_projector

        return fit_projector(sharer, receiver, texts, **keywords)

    def save(self, path: str | Path, *, storage: str = "float32") -> None:
        """Writes a safetensors file; see `c2c_kernels.projector_file.save`."""
        from .projector_file import save

        save(self, path, storage=storage)

    @classmethod
    def load(cls, path: str | Path) -> CacheProjector:
        """Reads what `save` wrote; see `c2c_kernels.projector_file.load`."""
        from .projector_file import load

        return load(path)


Tables = tuple[Tensor, Tensor] | None


def _project(
    layer: LinearProjector,
    sources: tuple[Tensor, Tensor],
    removed: tuple[Tables, Tables],
    applied: Tables,
    index: Tensor,
    lengths: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(key, value) of a receiver layer: one kernel call, two where values are mapped from keys.

    `project_kv` undoes the rotation of what it makes keys of. Values that read rotated keys go that way too, beside a
    value half of one number.
    """

    def run(key: Tensor, value: Tensor, maps: tuple[Any, Any, Any, Any], rope: Rope) -> tuple[Tensor, Tensor]:
        segment = SharerSegment(key, value, *maps, lengths=lengths, index=index)
        return project_kv(segment, rope=rope, backend=backend)

    key_maps, value_maps = (layer.weights("key"), layer.key_bias), (layer.weights("value"), layer.value_bias)
    if removed[1] is None:
        maps = (key_maps[0], value_maps[0], key_maps[1], value_maps[1])
        return run(*sources, maps, Rope(removed[0], applied))
    none = sources[0][..., :1]
    nothing = layer.key_bias.new_zeros(layer.key_bias.shape[0], 1, 1)
    key, _ = run(sources[0], none, (key_maps[0], nothing, key_maps[1], None), Rope(removed[0], applied))
    value, _ = run(sources[1], none, (value_maps[0], nothing, value_maps[1], None), Rope(removed[1]))
    return key, value


def _project_recorded(
    layer: LinearProjector,
    plain: PlainSources,
    applied: Tables,
    lengths: Tensor | None,
    dtype: torch.dtype,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(key, value) of a receiver layer for a backward pass: one kernel call on sources whose rotation is removed.

    Every sharer layer is un-rotated and gathered once for all receiver layers, and nothing of a wide head is kept for
    the backward pass, which puts it together again: 13 MB a receiver layer at 2,048 tokens of Gemma 3 270M.
    """
    sources = layer.key_sources, layer.value_sources
    key, value = (plain.wide(found) for found in sources)
    segment = SharerSegment(
        key, value, layer.weights("key"), layer.weights("value"), layer.key_bias, layer.value_bias, lengths=lengths
    )
    recipes = {half.untyped_storage().data_ptr(): found for half, found in zip((key, value), sources, strict=True)}

    def keep(tensor: Tensor) -> Any:
        found = recipes.get(tensor.untyped_storage().data_ptr())
        # Views as well: the next layer's heads are written to the same place.
        return tensor if found is None else (found, tensor.shape, tensor.stride(), tensor.storage_offset())

    def fetch(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else plain.wide(kept[0]).as_strided(*kept[1:])

    with torch.autograd.graph.saved_tensors_hooks(keep, fetch):
        made = project_kv(segment, rope=None if applied is None else Rope(apply=applied), backend=backend)
    return made[0].to(dtype), made[1].to(dtype)


def _sharer_rows(cache: Layers, positions: Tensor | None) -> Tensor:
    """(batch or 1, len) positions at which the sharer read."""
    first = cache[0][0]
    return _rows((torch.arange(first.shape[2]) if positions is None else positions).to(first.device))


def _rows(tensor: Tensor) -> Tensor:
    """(n,) as (1, n)."""
    return tensor if tensor.dim() == 2 else tensor[None]


@dataclass(eq=False)
class _Tables:
    """Rotary tables of a call, made once for every kind of layer."""

    sharer: CacheShape
    receiver: CacheShape
    sharer_positions: Tensor
    positions: Tensor
    made: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    applied: dict[int, tuple[Tensor, Tensor] | None] = field(default_factory=dict)

    def remove(self, sources: tuple[Source, ...]) -> tuple[Tensor, Tensor] | None:
        # An offset turns a source by a constant angle more, which is part of the fitted map.
        heads = self.sharer.kv_heads
        layers = [source.layer for source in sources if source.kind == "key" for _ in range(heads)]
        kinds = tuple(self.sharer.layer_frequencies[layer] for layer in layers)
        if not any(self.sharer.frequencies[kind] for kind in kinds):
            return None
        if kinds not in self.made:
            self.made[kinds] = self.sharer.table(layers, self.sharer_positions)
        return self.made[kinds]

    def apply(self, layer: int) -> tuple[Tensor, Tensor] | None:
        which = self.receiver.layer_frequencies[layer]
        if which not in self.applied:
            turns = bool(self.receiver.frequencies[which])
            self.applied[which] = self.receiver.table([layer], self.positions) if turns else None
        return self.applied[which]
