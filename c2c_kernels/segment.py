"""The two things that operators take besides tensors: a sharer segment and rotary tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Projector = Tensor | tuple[Tensor, Tensor] | None

# The order in which a segment's tensors travel to operators and kernels. A low-rank projector W = U A fills
# `*_proj` with U and `*_proj_in` with A. `SegmentTensors` has the same fields in the same order.
SLOTS = (
    "key",
    "value",
    "key_proj",
    "key_proj_in",
    "value_proj",
    "value_proj_in",
    "key_bias",
    "value_bias",
    "gate",
    "lengths",
    "positions",
    "key_scale",
    "value_scale",
    "index",
)
CAUSAL_BIT = 1 << len(SLOTS)


@dataclass(eq=False)
class SharerSegment:
    """One run of a sharer's keys and values that a receiver's queries attend to.

    Attributes:
        key, value: (batch, sharer_heads, len, sharer_head_dim), the sharer's cache of one layer. int8 or
            float8_e4m3fn storage needs `key_scale` and `value_scale`.
        key_proj, value_proj: (kv_heads, head_dim, sharer_width) with sharer_width = sharer_heads *
            sharer_head_dim, or a pair (U, A) for W = U A with U (kv_heads, head_dim, rank) and
            A (rank, sharer_width). None: the segment is in receiver space already.
        key_bias, value_bias: (kv_heads, head_dim), added after the projection.
        gate: broadcastable to (batch, q_heads, len), >= 0; multiplies the weight of a token before
            normalisation. 0 removes a token exactly, 1 (or None) is plain concatenation.
        lengths: (batch,) integers, valid tokens of each row; tokens beyond are never read.
        positions: (batch, len) or (len,) integers, the tokens' positions in the receiver's sequence.
        visibility: "all", or "causal" to hide tokens from query positions before theirs (needs positions).
        key_scale, value_scale: broadcastable to (batch, sharer_heads, len); multiplies the raw token first
            (de-quantisation).
        index: (batch, n) or (n,) integers; the segment is these tokens of key and value, in this order.
            `gate`, `lengths` and `positions` then speak of the n selected tokens.

    Shapes are checked by the operators, which know the receiver. Source: DESIGN.md 2.1 and arXiv 2510.03215.
    """

    key: Tensor
    value: Tensor
    key_proj: Projector = None
    value_proj: Projector = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    gate: Tensor | None = None
    lengths: Tensor | None = None
    positions: Tensor | None = None
    visibility: Literal["all", "causal"] = "all"
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    index: Tensor | None = None


class SegmentTensors(NamedTuple):
    """A segment as operators see it: one optional tensor per slot and the visibility as a flag."""

    key: Tensor
    value: Tensor
    key_proj: Tensor | None
    key_proj_in: Tensor | None
    value_proj: Tensor | None
    value_proj_in: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None
    gate: Tensor | None
    lengths: Tensor | None
    positions: Tensor | None
    key_scale: Tensor | None
    value_scale: Tensor | None
    selected: Tensor | None  # the segment's index; tuples have a method of that name
    causal: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors in the order of SLOTS."""
        return self[:14]

    @property
    def length(self) -> int:
        """Tokens that a query can attend to: those selected where there is an index."""
        return self.key.shape[2] if self.selected is None else self.selected.shape[-1]

    @property
    def plain(self) -> bool:
        """Whether keys and values can be attended to as they are stored."""
        return (
            self.key_proj is None
            and self.value_proj is None
            and self.key_bias is None
            and self.value_bias is None
            and self.key_scale is None
            and self.value_scale is None
            and self.selected is None
        )


@dataclass(eq=False)
class Rope:
    """Rotary tables for `project_kv`, as Transformers' rotary modules return them (half-rotation layout).

    Attributes:
        remove: (cos, sin), each (batch or 1, sharer_len, rotary_dim): rotation that the sharer's keys carry; undone
            before the projection on the first rotary_dim dimensions of every sharer head. A table scaled by a
            factor (YaRN) is undone exactly too.
        apply: (cos, sin), each (batch or 1, len, rotary_dim): rotation to the receiver's positions, applied after the
            projection. `len` counts selected tokens where the segment has an index.
    """

    remove: tuple[Tensor, Tensor] | None = None
    apply: tuple[Tensor, Tensor] | None = None


def _split_projector(name: str, projector: Projector) -> tuple[Tensor | None, Tensor | None]:
    if projector is None or isinstance(projector, Tensor):
        return projector, None
    if isinstance(projector, (tuple, list)) and len(projector) == 2 and all(isinstance(p, Tensor) for p in projector):
        return projector[0], projector[1]
    raise TypeError(
        f"{name} must be a tensor (kv_heads, head_dim, sharer_width), a pair (U, A), or None; "
        f"got {type(projector).__name__}"
    )


def to_tensors(segment: SharerSegment, name: str = "segment") -> SegmentTensors:
    """Flattens a segment; TypeError where it or a projector is something else, ValueError for an unknown visibility.

    That the other fields are tensors is checked with their devices (ops/_checks.py).
    """
    if not isinstance(segment, SharerSegment):
        raise TypeError(f"{name} must be a SharerSegment, got {type(segment).__name__}")
    if segment.visibility not in ("all", "causal"):
        raise ValueError(f'{name}.visibility must be "all" or "causal", got {segment.visibility!r}')
    key_proj, key_proj_in = _split_projector(f"{name}.key_proj", segment.key_proj)
    value_proj, value_proj_in = _split_projector(f"{name}.value_proj", segment.value_proj)
    return SegmentTensors(
        segment.key,
        segment.value,
        key_proj,
        key_proj_in,
        value_proj,
        value_proj_in,
        segment.key_bias,
        segment.value_bias,
        segment.gate,
        segment.lengths,
        segment.positions,
        segment.key_scale,
        segment.value_scale,
        segment.index,
        segment.visibility == "causal",
    )


def pack(segments: list[SegmentTensors]) -> tuple[list[Tensor], list[int]]:
    """The segments as operator arguments: the tensors present, and per segment a bit mask of its slots."""
    tensors: list[Tensor] = []
    layout: list[int] = []
    for segment in segments:
        bits = CAUSAL_BIT if segment.causal else 0
        for slot, tensor in enumerate(segment.tensors):
            if tensor is not None:
                tensors.append(tensor)
                bits |= 1 << slot
        layout.append(bits)
    return tensors, layout


def unpack(tensors: list[Tensor], layout: list[int]) -> list[SegmentTensors]:
    """The inverse of `pack`."""
    rest = iter(tensors)
    return [
        SegmentTensors._make(
            (*(next(rest) if bits >> slot & 1 else None for slot in range(len(SLOTS))), bool(bits & CAUSAL_BIT))
        )
        for bits in layout
    ]
