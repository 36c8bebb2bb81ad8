"""Tensors of a case, the same for every contender."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

import c2c_kernels as c2c
from c2c_kernels.bench.shapes import DTYPES, Case

# Queries are spread so that attention is on a few tokens: a token that is read wrongly then shows.
_SPREAD = 3.0
_QUANTISED_MAX = 127

Device = torch.device | str


@dataclass
class AttentionInputs:
    """What one attention call reads.

    Attributes:
        query: (batch, q_heads, q_len, head_dim).
        key, value: (batch, kv_heads, own, head_dim).
        segment: the sharer's, None where there is none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    segment: c2c.SharerSegment | None

    @property
    def segments(self) -> list[c2c.SharerSegment]:
        """As `merged_attention` takes them."""
        return [] if self.segment is None else [self.segment]

    @cached_property
    def projected(self) -> tuple[Tensor, Tensor]:
        """The segment's keys and values in receiver space, for what is timed without making them: made once.

        On a CPU products are of float32, where torch's in two bytes take seconds, rounded to the dtype once.
        """
        assert self.segment is not None
        if self.segment.key_proj is None:
            return self.segment.key, self.segment.value
        dtype = self.query.dtype
        products = torch.float32 if self.query.device.type == "cpu" else dtype
        key, value = project_with_torch(self.segment, products)
        return key.to(dtype).contiguous(), value.to(dtype).contiguous()  # as `project_kv` writes them

    def merged(self, strategy: str = "auto", backend: str | None = None) -> Tensor:
        """out (batch, q_heads, q_len, head_dim) of merged attention, causal as in a model."""
        out = c2c.merged_attention(
            self.query, self.key, self.value, self.segments, is_causal=True, strategy=strategy, backend=backend
        )
        return cast(Tensor, out)


class Random:
    """Normal numbers, the same on every run and device for the same case: drawn on the CPU."""

    def __init__(self, case: Case, device: Device = "cpu") -> None:
        self._device = device
        self._generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
        self._dtype = DTYPES[case.dtype]

    def __call__(self, *shape: int, spread: float = 1.0) -> Tensor:
        """(shape) in the case's dtype."""
        return torch.randn(shape, generator=self._generator).mul_(spread).to(self._dtype).to(self._device)


def attention(case: Case, device: Device = "cpu") -> list[AttentionInputs]:
    """One set of inputs for every layer of the case."""
    random, receiver = Random(case, device), case.receiver
    return [
        AttentionInputs(
            random(case.batch, receiver.q_heads, case.q_len, receiver.head_dim, spread=_SPREAD),
            random(case.batch, receiver.kv_heads, case.own, receiver.head_dim),
            random(case.batch, receiver.kv_heads, case.own, receiver.head_dim),
            _segment(case, random),
        )
        for _ in range(case.layers)
    ]


def _segment(case: Case, random: Random) -> c2c.SharerSegment | None:
    if case.sharer is not None:
        return raw_segment(case, random)
    if not case.family.endswith("materialised"):
        return None
    receiver = case.receiver
    shape = (case.batch, receiver.kv_heads, case.shared, receiver.head_dim)
    return c2c.SharerSegment(random(*shape), random(*shape))


def raw_segment(case: Case, random: Random) -> c2c.SharerSegment:
    """A sharer's tokens with dense projectors; stored as int8 in the families that say so."""
    receiver, sharer = case.receiver, case.sharer
    assert sharer is not None, f"{case.name} has no sharer"
    shape = (case.batch, sharer.heads, case.shared, sharer.head_dim)
    weights = (receiver.kv_heads, receiver.head_dim, sharer.width)
    key, value = random(*shape), random(*shape)
    key_proj, value_proj = (random(*weights, spread=sharer.width**-0.5) for _ in range(2))
    if not case.family.endswith("int8"):
        return c2c.SharerSegment(key, value, key_proj, value_proj)
    key, key_scale = _quantise(key)
    value, value_scale = _quantise(value)
    return c2c.SharerSegment(key, value, key_proj, value_proj, key_scale=key_scale, value_scale=value_scale)


def _quantise(cache: Tensor) -> tuple[Tensor, Tensor]:
    """int8 with a scale (batch, heads, len) for each token and head."""
    scale = cache.float().abs().amax(dim=3) / _QUANTISED_MAX
    return (cache.float() / scale.unsqueeze(3)).round().to(torch.int8), scale


def dequantised(segment: c2c.SharerSegment, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Raw keys and values as numbers of `dtype`."""
    if segment.key_scale is None or segment.value_scale is None:
        return segment.key, segment.value
    return tuple(  # type: ignore[return-value]
        (tensor * scale.unsqueeze(3)).to(dtype)
        for tensor, scale in ((segment.key, segment.key_scale), (segment.value, segment.value_scale))
    )


def project_with_torch(segment: c2c.SharerSegment, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The segment in receiver space by matrix products in `dtype`: (batch, kv_heads, len, head_dim), views."""

    def apply(raw: Tensor, proj: Tensor) -> Tensor:
        flat = raw.transpose(1, 2).flatten(2)
        return F.linear(flat, proj.flatten(0, 1)).unflatten(2, proj.shape[:2]).transpose(1, 2)

    key, value = dequantised(segment, dtype)
    assert isinstance(segment.key_proj, Tensor) and isinstance(segment.value_proj, Tensor)
    return apply(key.to(dtype), segment.key_proj.to(dtype)), apply(value.to(dtype), segment.value_proj.to(dtype))


def joined(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """The cache that attention without segments needs: sharer tokens, projected here, then own ones, in one copy."""
    if inputs.segment is None or inputs.segment.key_proj is None:
        return joined_beforehand(inputs)
    return _concatenated(inputs, project_with_torch(inputs.segment, inputs.query.dtype))


def joined_beforehand(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """The same from `inputs.projected`: for what is timed without the projection."""
    return (inputs.key, inputs.value) if inputs.segment is None else _concatenated(inputs, inputs.projected)


def _concatenated(inputs: AttentionInputs, segment: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([segment[0], inputs.key], dim=2), torch.cat([segment[1], inputs.value], dim=2)


def storage_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
