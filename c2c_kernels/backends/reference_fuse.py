"""The specification of `fuse_kv` in plain PyTorch, and its gradients, which all backends share.

Tokens are rows: (batch * len, width). Arithmetic is float32, or float64 where the caller says so.
Source: arXiv 2510.03215; the equations are in `fuser_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fuser_weights import EPSILON, FuserBlock, FuserHalf
from .reference import gather_tokens

Spread = Callable[[Tensor, Tensor, int], Tensor]
_PLAIN = (Tensor, torch.nn.Parameter)


def rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, heads, len, dim) as (batch * len, heads * dim) in `dtype`: flat order (head, dim)."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1).to(dtype)


def heads(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `rows`, for a tensor of the shape of `like`."""
    batch, count, length, dim = like.shape
    return x.reshape(batch, length, count, dim).transpose(1, 2)


def normalised(h: Tensor) -> tuple[Tensor, Tensor]:
    """h / rms(h), and 1 / rms(h) of every row."""
    inverse = torch.rsqrt(h.square().mean(-1, keepdim=True) + EPSILON)
    return h * inverse, inverse


def block(h: Tensor, weights: FuserBlock, dropout: float = 0.0) -> Tensor:
    """h + w2 gelu_erf(w1 rmsnorm(h)); dropout is applied to what is added."""
    norm, w1, w2 = (tensor.to(h.dtype) for tensor in weights.tensors)
    added = F.gelu((normalised(h)[0] * norm) @ w1.T) @ w2.T
    return h + (F.dropout(added, dropout) if dropout else added)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.to(x.dtype).T + bias.to(x.dtype)


def network(x: Tensor, half: FuserHalf, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """P (rows, receiver_width) and w (rows, kv_heads) of rows x = [sharer, receiver]."""
    hidden = block(linear(x, half.in_weight, half.in_bias), half.embed, dropout)
    projected = hidden
    for weights in half.project:
        projected = block(projected, weights, dropout)
    scale = linear(block(hidden, half.scale, dropout), half.scale_weight, half.scale_bias)
    return linear(projected, half.out_weight, half.out_bias), torch.sigmoid(scale)


def inputs(receiver: Tensor, sharer: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x = [sharer, receiver] of every receiver token."""
    return torch.cat([rows(gather_tokens(sharer, index), dtype), rows(receiver, dtype)], dim=-1)


def fuse_half(
    receiver: Tensor,
    sharer: Tensor,
    half: FuserHalf,
    index: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    dtype: torch.dtype,
    dropout: float = 0.0,
) -> Tensor:
    """residual + gate * w * P (batch, kv_heads, len, dim) in `dtype`, unrounded.

    With `gate` None the half is added where gate_logit > 0, and the residual comes back as it is where it is not:
    whatever the network makes of the tokens.
    """
    base = (receiver if residual is None else residual).to(dtype)
    if gate is None and known_closed(half):
        return base
    projected, weight = network(inputs(receiver, sharer, index, dtype), half, dropout)
    scaled = heads(projected, receiver) * _per_head(weight, receiver)
    if gate is None:
        return torch.where(half.gate_logit > 0, base + scaled, base)
    return base + gate.to(dtype).expand(receiver.shape[:3]).unsqueeze(-1) * scaled


def known_closed(half: FuserHalf) -> bool:
    """Whether the host can see, without waiting for a device, that the hard gate is closed."""
    logit = half.gate_logit
    if torch.compiler.is_compiling() or logit.device.type != "cpu" or type(logit) not in _PLAIN:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not bool(logit > 0)


def token_weights(receiver: Tensor, sharer: Tensor, half: FuserHalf, index: Tensor | None = None) -> Tensor:
    """w = sigmoid(...) (batch, kv_heads, len, 1) float32: how much of the projection every token and head takes."""
    dtype = torch.float64 if receiver.dtype == torch.float64 else torch.float32
    return _per_head(network(inputs(receiver, sharer, index, dtype), half)[1], receiver)


def _per_head(weight: Tensor, like: Tensor) -> Tensor:
    """(batch * len, kv_heads) as (batch, kv_heads, len, 1)."""
    return weight.reshape(like.shape[0], like.shape[2], like.shape[1]).transpose(1, 2).unsqueeze(-1)


def spread(grad: Tensor, index: Tensor, stored: int) -> Tensor:
    """Gradients of gathered tokens (batch, heads, n, dim) summed where they came from (batch, heads, stored, dim)."""
    out = torch.zeros((*grad.shape[:2], stored, grad.shape[3]), dtype=grad.dtype, device=grad.device)
    return out.scatter_add_(2, index.long()[:, None, :, None].expand_as(grad), grad)


def half_backward(
    grad: Tensor,
    receiver: Tensor,
    sharer: Tensor,
    half: FuserHalf,
    index: Tensor | None,
    gate: Tensor | None,
    collect: Spread = spread,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """Gradients in float32 of receiver (without the residual's), sharer, gate (batch, kv_heads, len) and weights.

    The forward is computed again; what is kept meanwhile is linear in tokens. The weights' gradients come in the
    order of `FuserHalf.tensors`; that of a hard gate's logit is 0.
    """
    if gate is None and known_closed(half):
        nothing = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (receiver, sharer, *half.tensors)]
        return nothing[0], nothing[1], None, nothing[2:]
    grad = grad.float()
    x = inputs(receiver, sharer, index, torch.float32)
    entered = linear(x, half.in_weight, half.in_bias)
    hidden = block(entered, half.embed)
    stages = [hidden]
    for weights in half.project:
        stages.append(block(stages[-1], weights))
    scale_hidden = block(hidden, half.scale)
    weight = torch.sigmoid(linear(scale_hidden, half.scale_weight, half.scale_bias))
    projected = linear(stages[-1], half.out_weight, half.out_bias)

    per_head = heads(projected, receiver)
    along = (grad * per_head).sum(-1)
    weight_of = _per_head(weight, receiver)
    grad_gate = None
    if gate is None:
        factor = (half.gate_logit > 0).float()
    else:
        grad_gate = along * weight_of.squeeze(-1)
        factor = gate.float().expand(receiver.shape[:3])
    grad_projected = rows(grad * (weight_of * (factor if gate is None else factor.unsqueeze(-1))), torch.float32)
    grad_scale = (along * factor).transpose(1, 2).flatten(0, 1) * weight * (1 - weight)

    found_scale = [grad_scale.T @ scale_hidden, grad_scale.sum(0)]
    grad_hidden, scale_block = _block_backward(grad_scale @ half.scale_weight.float(), hidden, half.scale)
    found_out = [grad_projected.T @ stages[-1], grad_projected.sum(0)]
    grad_stage = grad_projected @ half.out_weight.float()
    found_projects: list[Tensor] = []
    for weights, before in zip(reversed(half.project), reversed(stages[:-1]), strict=True):
        grad_stage, found = _block_backward(grad_stage, before, weights)
        found_projects = [*found, *found_projects]
    grad_entered, embed = _block_backward(grad_hidden + grad_stage, entered, half.embed)
    grad_x = grad_entered @ half.in_weight.float()
    grads = [
        grad_entered.T @ x, grad_entered.sum(0), *embed, *found_projects, *found_out, *scale_block, *found_scale,
        torch.zeros_like(half.gate_logit, dtype=torch.float32),
    ]  # fmt: skip
    gathered = sharer if index is None else sharer[:, :, :1].expand(-1, -1, index.shape[1], -1)
    width = sharer.shape[1] * sharer.shape[3]
    grad_sharer = heads(grad_x[:, :width], gathered)
    if index is not None:
        grad_sharer = collect(grad_sharer, index, sharer.shape[2])
    return heads(grad_x[:, width:], receiver), grad_sharer, grad_gate, grads


def _block_backward(grad: Tensor, h: Tensor, weights: FuserBlock) -> tuple[Tensor, Sequence[Tensor]]:
    """Gradients of a block's input, and of its norm, w1 and w2."""
    norm, w1, w2 = (tensor.float() for tensor in weights.tensors)
    unit, inverse = normalised(h)
    scaled = unit * norm
    inner = scaled @ w1.T
    grad_inner = torch.ops.aten.gelu_backward(grad @ w2, inner)
    grad_scaled = grad_inner @ w1
    grad_unit = grad_scaled * norm
    grad_h = inverse * (grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True))
    return grad + grad_h, ((grad_scaled * unit).sum(0), grad_inner.T @ scaled, grad.T @ F.gelu(inner))
