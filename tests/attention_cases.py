"""Random calls of `merged_attention`: fresh numbers at odd sizes, strided views, poisoned padding."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import c2c_kernels as c2c
from c2c_kernels.backends import reference
from c2c_kernels.segment import to_tensors


@dataclass
class SegmentPlan:
    """What one segment of a call has."""

    length: int = 7
    heads: int = 2
    key_dim: int = 8
    value_dim: int = 8
    projector: str = "none"  # none, dense, low_rank
    bias: bool = False
    gate: str = "none"  # none, scalar, head, token, full, zero, some_zero
    lengths: bool = False
    positions: str = "none"  # none, shared, shuffled
    visibility: str = "all"
    index: bool = False
    quantised: bool = False


@dataclass
class Plan:
    """What one call has."""

    dtype: torch.dtype = torch.float32
    batch: int = 2
    kv_heads: int = 2
    group: int = 2
    q_len: int = 3
    length: int = 11
    head_dim: int = 16
    value_dim: int = 16
    is_causal: bool = False
    window: int | None = None
    segment_window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    mask: str = "none"  # none, bool, bool_heads, additive
    lengths: bool = False
    query_positions: bool = False
    strategy: str = "auto"
    strided: bool = True
    segments: list[SegmentPlan] = field(default_factory=list)


def numbers(generator: torch.Generator, shape, dtype=torch.float32, strided: bool = False, spread: float = 1.0):
    """Normal numbers; strided: a slice of a larger tensor whose surroundings are NaN."""
    values = (torch.randn(shape, generator=generator) * spread).to(dtype)
    if not strided or values.dim() < 3:
        return values
    if values.dim() == 4 and shape[1] > 1 and int(torch.randint(2, (), generator=generator)):
        # (batch, len, heads, dim) in memory, as a projection leaves it
        larger = torch.full((shape[0], shape[2] + 2, shape[1] + 1, shape[3] + 8), torch.nan, dtype=dtype)
        view = larger.transpose(1, 2)[:, : shape[1], 1 : 1 + shape[2], : shape[3]]
    else:
        larger = torch.full([*shape[:-2], shape[-2] + 3, shape[-1] + 5], torch.nan, dtype=dtype)
        view = larger[..., 1 : 1 + shape[-2], 2 : 2 + shape[-1]]
    view.copy_(values)
    return view


def poison(cache: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Padding becomes NaN: whoever reads it shows it."""
    if lengths is not None and cache.dtype.is_floating_point and cache.dtype != torch.float8_e4m3fn:
        for row, length in enumerate(lengths.tolist()):
            cache[row, :, length:] = torch.nan
    return cache


def _integers(generator, low: int, high: int, shape, dtype=torch.int64):
    return torch.randint(low, max(high, low + 1), shape, generator=generator).to(dtype)


def _projector(generator, plan: SegmentPlan, heads: int, dim: int, width: int, dtype):
    if plan.projector == "none":
        return None
    spread = width**-0.5
    if plan.projector == "dense":
        return numbers(generator, (heads, dim, width), dtype, spread=spread)
    rank = max(1, width // 2 - 1)
    return (
        numbers(generator, (heads, dim, rank), dtype, spread=rank**-0.5),
        numbers(generator, (rank, width), dtype, spread=spread),
    )


def _gate(generator, kind: str, batch: int, heads: int, length: int):
    shapes = {"scalar": (1, 1, 1), "head": (1, heads, 1), "token": (batch, 1, length), "zero": (1,)}
    if kind == "none":
        return None
    # Away from 0: the gradient of a gate g is a sum of weights / g, and its rounding grows with 1 / g.
    gate = torch.rand(shapes.get(kind, (batch, heads, length)), generator=generator) * 2 + 0.1
    if kind == "zero":
        return gate * 0
    if kind == "some_zero" and length:
        gate = gate * (torch.rand(gate.shape, generator=generator) < 0.5)
    return gate


def build_segment(generator, plan: Plan, part: SegmentPlan) -> c2c.SharerSegment:
    heads, key_dim, value_dim = part.heads, part.key_dim, part.value_dim
    if part.projector == "none":
        heads, key_dim, value_dim = plan.kv_heads, plan.head_dim, plan.value_dim
    raw_length = part.length + 3 if part.index else part.length
    lengths = _integers(generator, 0, part.length + 1, (plan.batch,)) if part.lengths else None
    cache = []
    scales = []
    for dim in (key_dim, value_dim):
        x = numbers(generator, (plan.batch, heads, raw_length, dim), plan.dtype, plan.strided)
        scale = None
        if part.quantised:
            scale = torch.rand((plan.batch, heads, raw_length), generator=generator) * 0.02 + 0.005
            x = (x.float() / scale.unsqueeze(-1)).round().clamp(-127, 127).nan_to_num().to(torch.int8)
        cache.append(x if part.index else poison(x, lengths))
        scales.append(scale)
    positions = None
    if part.positions != "none":
        shape = (part.length,) if part.positions == "shared" else (plan.batch, part.length)
        positions = _integers(generator, 0, part.length + plan.length, shape)
        if part.positions == "shared":
            positions = positions.sort().values
    bias = part.bias
    return c2c.SharerSegment(
        cache[0],
        cache[1],
        _projector(generator, part, plan.kv_heads, plan.head_dim, heads * key_dim, plan.dtype),
        _projector(generator, part, plan.kv_heads, plan.value_dim, heads * value_dim, plan.dtype),
        numbers(generator, (plan.kv_heads, plan.head_dim), plan.dtype) if bias else None,
        numbers(generator, (plan.kv_heads, plan.value_dim), plan.dtype) if bias else None,
        _gate(generator, part.gate, plan.batch, plan.kv_heads * plan.group, part.length),
        lengths,
        positions,
        part.visibility if positions is not None else "all",
        scales[0],
        scales[1],
        _integers(generator, 0, raw_length, (plan.batch, part.length)) if part.index else None,
    )


def _mask(generator, plan: Plan, q_heads: int):
    shape = (plan.batch, 1 if plan.mask == "bool" else q_heads, plan.q_len, plan.length)
    if plan.mask == "none":
        return None
    if plan.mask == "additive":
        mask = torch.randn(shape, generator=generator)
        return mask.masked_fill(torch.rand(shape, generator=generator) < 0.3, -torch.inf)
    mask = torch.rand(shape, generator=generator) < 0.7
    if plan.q_len:
        mask[:, :, 0] = False  # one query that sees nothing of its own
    return mask


def build(plan: Plan, seed: int) -> dict:
    """Keyword arguments of a call (and its three positional tensors under their names)."""
    generator = torch.Generator().manual_seed(seed)
    q_heads = plan.kv_heads * plan.group
    lengths = None
    if plan.lengths:
        lengths = _integers(generator, 0, plan.length + 1, (plan.batch,), torch.int32)
    shape = (plan.batch, plan.kv_heads, plan.length)
    return {
        "query": numbers(generator, (plan.batch, q_heads, plan.q_len, plan.head_dim), plan.dtype, plan.strided),
        "key": poison(numbers(generator, (*shape, plan.head_dim), plan.dtype, plan.strided), lengths),
        "value": poison(numbers(generator, (*shape, plan.value_dim), plan.dtype, plan.strided), lengths),
        "segments": [build_segment(generator, plan, part) for part in plan.segments],
        "attn_mask": _mask(generator, plan, q_heads),
        "is_causal": plan.is_causal,
        "query_positions": _integers(generator, 0, plan.length + 9, (plan.batch, plan.q_len))
        if plan.query_positions
        else None,
        "lengths": lengths,
        "window": plan.window,
        "segment_window": plan.segment_window,
        "softcap": plan.softcap,
        "sinks": numbers(generator, (q_heads,)) if plan.sinks else None,
        "strategy": plan.strategy,
    }


def reference_call(call: dict, dtype: torch.dtype, arithmetic: torch.dtype | None = None):
    """The reference on the same inputs cast to `dtype`; `arithmetic` as in backends.reference."""

    def cast(tensor):
        keep = tensor is None or not tensor.dtype.is_floating_point or tensor.dtype == torch.float8_e4m3fn
        return tensor if keep else tensor.to(dtype)

    segments = [to_tensors(segment) for segment in call["segments"]]
    segments = [type(s)(*(cast(t) for t in s[:-1]), s.causal) for s in segments]
    window = call["window"]
    return reference.merged_attention(
        cast(call["query"]),
        cast(call["key"]),
        cast(call["value"]),
        segments,
        cast(call["attn_mask"]),
        call["is_causal"],
        call["query_positions"],
        call["lengths"],
        call.get("scale", call["query"].shape[-1] ** -0.5),
        window,
        call["segment_window"] or window,
        call["softcap"],
        cast(call["sinks"]),
        arithmetic,
    )[:3]
