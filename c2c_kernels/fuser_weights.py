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

from dataclasses import dataclass

from torch import Tensor


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


@dataclass(frozen=True, eq=False)
class FuserWeights:
    """Both halves of one receiver layer; dtypes may differ between weights and caches."""

    key: FuserHalf
    value: FuserHalf
