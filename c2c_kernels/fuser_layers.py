"""One receiver layer's fuser as a module: the parameters of `FuserWeights`, and gates for training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .backends import reference_fuse
from .fuser_weights import FuserWeights, Pair
from .ops.fuse_kv import fuse_kv

_TINY = 1e-20  # keeps the logarithms of Gumbel noise finite, as the reference implementation does


@dataclass(frozen=True)
class FuserShape:
    """Sizes of every layer of a fuser.

    Attributes:
        sharer_heads, sharer_head_dim, sharer_value_dim: of the sharer's keys and values.
        kv_heads, head_dim, value_dim: of the receiver's.
        hidden: width of the network.
        inner: of its blocks; that before the weight per token and head has `hidden`.
        num_layers: blocks before the projection are num_layers - 2; at least 3.
    """

    sharer_heads: int
    sharer_head_dim: int
    sharer_value_dim: int
    kv_heads: int
    head_dim: int
    value_dim: int
    hidden: int = 1024
    inner: int = 1024
    num_layers: int = 3

    def __post_init__(self) -> None:
        for name, size in self.__dict__.items():
            least = 3 if name == "num_layers" else 1
            if isinstance(size, bool) or not isinstance(size, int) or size < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {size!r}")

    @property
    def blocks(self) -> int:
        return self.num_layers - 2

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter of a layer, in the order of `FuserWeights.tensors`."""
        for half, raw, own in (
            ("key", self.sharer_heads * self.sharer_head_dim, self.kv_heads * self.head_dim),
            ("value", self.sharer_heads * self.sharer_value_dim, self.kv_heads * self.value_dim),
        ):
            yield f"{half}_in_weight", (self.hidden, raw + own)
            yield f"{half}_in_bias", (self.hidden,)
            yield from self._block(f"{half}_embed", self.inner)
            for number in range(self.blocks):
                yield from self._block(f"{half}_project_{number}", self.inner)
            yield f"{half}_out_weight", (own, self.hidden)
            yield f"{half}_out_bias", (own,)
            yield from self._block(f"{half}_scale", self.hidden)
            yield f"{half}_scale_weight", (self.kv_heads, self.hidden)
            yield f"{half}_scale_bias", (self.kv_heads,)
            yield f"{half}_gate_logit", ()

    def _block(self, name: str, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}_norm", (self.hidden,)
        yield f"{name}_w1", (inner, self.hidden)
        yield f"{name}_w2", (self.hidden, inner)


def check_temperature(name: str, value: object) -> None:
    """ValueError unless it is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")


def check_dropout(value: object) -> None:
    """ValueError unless it is a probability below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {value!r}")


class FuserLayer(nn.Module):
    """Weights of one receiver layer; its parameters are those of `FuserShape.tensors`, flat and in that order.

    Args:
        shape: of the layer.
        dropout: of what every block adds, in training.
    """

    def __init__(self, shape: FuserShape, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = dropout
        self.key_count = 13 + 3 * shape.blocks
        self._weights: tuple[tuple[Tensor, ...], FuserWeights] | None = None
        fan_in = 1
        for name, size in shape.tensors():
            if len(size) == 2:
                fan_in = size[1]
            parameter = nn.Parameter(torch.empty(size))
            if name.endswith("_norm"):
                nn.init.ones_(parameter)
            elif name.endswith("_gate_logit"):
                nn.init.zeros_(parameter)
            else:  # as nn.Linear begins; a bias comes after its weight
                nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
            self.register_parameter(name, parameter)

    def weights(self) -> FuserWeights:
        """The parameters as `fuse_kv` takes them: the same object as long as they are the same tensors."""
        tensors = tuple(self._parameters.values())
        if torch.compiler.is_compiling():  # a trace that has looked at `_weights` is made again when they are kept
            return FuserWeights.of(tensors, self.key_count)  # type: ignore[arg-type]
        kept = self._weights
        if kept is None or any(mine is not other for mine, other in zip(tensors, kept[0], strict=True)):
            kept = (tensors, FuserWeights.of(tensors, self.key_count))  # type: ignore[arg-type, assignment]
            self._weights = kept
        return kept[1]  # type: ignore[index]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_weights": None}

    @property
    def gate_logits(self) -> Pair:
        return cast("Tensor", self.key_gate_logit), cast("Tensor", self.value_gate_logit)

    def gates(self, uniforms: Pair, temperature: float) -> Pair:
        """sigmoid((gate_logit + g) / temperature) with Gumbel noise g from uniforms (batch, kv_heads, len)."""
        key, value = (
            torch.sigmoid((logit.float() - torch.log(-torch.log(u + _TINY) + _TINY)) / temperature)
            for logit, u in zip(self.gate_logits, uniforms, strict=True)
        )
        return key, value

    def forward(
        self,
        receiver: Pair,
        sharer: Pair,
        *,
        index: Tensor | None = None,
        residual: Pair | None = None,
        temperature: float = 1.0,
        uniforms: Pair | None = None,
        backend: str | None = None,
    ) -> Pair:
        """New (key, value), differentiable. In training with soft gates and dropout, else with the hard gates.

        Args:
            receiver, sharer, index, residual, backend: see `fuse_kv`.
            temperature: of the soft gates.
            uniforms: (key, value) each (batch, kv_heads, len) in 0..1 behind the soft gates; None: fresh ones.
        """
        gates = None
        if self.training:
            if uniforms is None:
                shape = receiver[0].shape[:3]
                uniforms = torch.rand(shape, device=receiver[0].device), torch.rand(shape, device=receiver[0].device)
            gates = self.gates(uniforms, temperature)
        weights = self.weights()
        if not (self.training and self.dropout):
            return fuse_kv(*receiver, *sharer, weights, index=index, residual=residual, gates=gates, backend=backend)
        base, soft = residual or (None, None), gates or (None, None)
        fused = [
            reference_fuse.fuse_half(own, raw, half, index, residual_half, gate, torch.float32, self.dropout)
            for own, raw, half, residual_half, gate in zip(
                receiver, sharer, (weights.key, weights.value), base, soft, strict=True
            )
        ]
        return fused[0].to(receiver[0].dtype), fused[1].to(receiver[1].dtype)
