"""The weights of the paper's fuser for one receiver layer, as `fuse_kv` takes them: plain tensors, no modules.

For keys and for values, each with weights of its own (one `FuserHalf`):

    x = [sharer_flat, receiver_flat]        flat order (head, dim), sharer first
    h = block(in_weight x + in_bias)        embed
    P = out_weight blocks(h) + out_bias     project
    w = sigmoid(scale_weight block(h) + scale_bias)
    K' = K + gate * w * P                   gate = [gate_logit > 0]

with block(h) = h + w2 gelu_erf(w1 rmsnorm(h)), eps 1e-6. Source: arXiv 2510.03215; DESIGN.md 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Pair = tuple[Tensor, Tensor]  # keys and values, or what belongs to them

EPSILON = 1e-6  # of the RMS norms
_DTYPE, _DEVICE = Tensor.dtype.__get__, Tensor.device.__get__  # type: ignore[attr-defined]
_FIXED = 13  # tensors of a half besides those of its `project` blocks, three each


@dataclass(frozen=True, eq=False)
class FuserBlock:
    """h + w2 gelu_erf(w1 rmsnorm(h)).

    Attributes:
        norm: (hidden,) weight of the RMS norm.
        w1: (inner, hidden).
        w2: (hidden, inner).
    """

    norm: Tensor
    w1: Tensor
    w2: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.norm, self.w1, self.w2


@dataclass(frozen=True, eq=False)
class FuserHalf:
    """The network of a layer's keys, or of its values. One dtype and device for all tensors.

    Attributes:
        in_weight: (hidden, sharer_width + receiver_width).
        in_bias: (hidden,).
        embed: the block behind it.
        project: at least one block, num_layers - 2 of them.
        out_weight: (receiver_width, hidden), receiver_width = kv_heads * head_dim.
        out_bias: (receiver_width,).
        scale: the block before the weight per token and head; its inner size is `hidden` in rosetta's checkpoints.
        scale_weight: (kv_heads, hidden).
        scale_bias: (kv_heads,).
        gate_logit: (), the half is added where it is above 0.
    """

    in_weight: Tensor
    in_bias: Tensor
    embed: FuserBlock
    project: tuple[FuserBlock, ...]
    out_weight: Tensor
    out_bias: Tensor
    scale: FuserBlock
    scale_weight: Tensor
    scale_bias: Tensor
    gate_logit: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the fields."""
        projects = [tensor for block in self.project for tensor in block.tensors]
        return (
            self.in_weight, self.in_bias, *self.embed.tensors, *projects, self.out_weight, self.out_bias,
            *self.scale.tensors, self.scale_weight, self.scale_bias, self.gate_logit,
        )  # fmt: skip

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> FuserHalf:
        """The half whose `tensors` these are."""
        end = 5 + (len(tensors) - _FIXED)
        projects = tuple(FuserBlock(*tensors[at : at + 3]) for at in range(5, end, 3))
        return FuserHalf(
            tensors[0], tensors[1], FuserBlock(*tensors[2:5]), projects, tensors[end], tensors[end + 1],
            FuserBlock(*tensors[end + 2 : end + 5]), *tensors[end + 5 : end + 8],
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class FuserWeights:
    """Both halves of one receiver layer; dtypes may differ between weights and caches."""

    key: FuserHalf
    value: FuserHalf

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the keys, then those of the values."""
        return (*self.key.tensors, *self.value.tensors)

    @staticmethod
    def of(tensors: Sequence[Tensor], key_count: int) -> FuserWeights:
        """The weights whose `tensors` these are, the first `key_count` of the keys."""
        return FuserWeights(FuserHalf.of(tensors[:key_count]), FuserHalf.of(tensors[key_count:]))


def lie_of(tensors: Sequence[Tensor]) -> tuple:
    """Where and how tensors lie: what has been found out of them holds as long as this is the same.

    An address alone is not enough: memory that is freed is given to other tensors.
    """
    return (
        *map(Tensor.data_ptr, tensors), *map(Tensor.size, tensors), *map(Tensor.stride, tensors),
        *map(_DTYPE, tensors), *map(_DEVICE, tensors),
    )  # fmt: skip
