"""Forward and backward attention in one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import c2c_kernels as c2c
from c2c_kernels.backends import reference
from c2c_kernels.bench.alternatives import sdpa_options
from c2c_kernels.bench.attention import visible_pairs
from c2c_kernels.bench.check import GRADIENT_ULPS, disagreement
from c2c_kernels.bench.inputs import AttentionInputs, Device, Random, attention, joined, storage_bytes
from c2c_kernels.bench.shapes import Case
from c2c_kernels.bench.work import Cost, Work
from c2c_kernels.segment import to_tensors

_NAMES = ("grad_query", "grad_key", "grad_value", "grad_key_proj", "grad_value_proj")
_PRODUCT = 2  # FLOPs of a multiply-add
_TO_TOKENS = 2 + 5  # matrix products for each pair and dimension, forward and backward
_TO_RAW_TOKENS = 2 + 3  # raw tokens have no gradients of their own


def build(case: Case, device: Device = "cpu") -> Work:
    """The work of a case with gradients of query, key and value, and of the projectors where it has them."""
    inputs = attention(case, device)[0]
    leaves = [leaf.requires_grad_() for leaf in _leaves(inputs)]
    grad_out = Random(case, device)(*inputs.query.shape)

    def with_gradients(forward: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), leaves, grad_out)

    def ours() -> tuple[Tensor, ...]:
        return with_gradients(inputs.merged)

    options = sdpa_options(inputs)

    def torchs() -> tuple[Tensor, ...]:
        return with_gradients(lambda: F.scaled_dot_product_attention(inputs.query, *joined(inputs), **options))

    costs = _costs(case, leaves, grad_out)
    return Work(
        ours=ours,
        problem=lambda: _problem(inputs, grad_out, ours(), torchs()),
        costs=costs,
        touched=costs[0].bytes,
        alternatives={"sdpa": lambda: torchs},
    )


def _leaves(inputs: AttentionInputs) -> list[Tensor]:
    leaves = [inputs.query, inputs.key, inputs.value]
    if inputs.segment is not None:
        assert isinstance(inputs.segment.key_proj, Tensor) and isinstance(inputs.segment.value_proj, Tensor)
        leaves += [inputs.segment.key_proj, inputs.segment.value_proj]
    return leaves


def _costs(case: Case, leaves: list[Tensor], grad_out: Tensor) -> list[Cost]:
    """Every input read and every gradient written once; raw tokens projected, or read through folded queries."""
    receiver, sharer = case.receiver, case.sharer
    moved = 2 * storage_bytes(*leaves) + storage_bytes(grad_out)
    heads = case.batch * receiver.q_heads
    rows = heads * receiver.head_dim
    if sharer is None:
        return [Cost(moved, _PRODUCT * _TO_TOKENS * rows * visible_pairs(case))]
    own = _PRODUCT * _TO_TOKENS * rows * (visible_pairs(case) - case.q_len * case.shared)
    raw = 2 * case.batch * case.shared * sharer.width  # keys and values
    moved += raw * grad_out.element_size()
    # A projector is multiplied by its tokens, and its gradient is one more product.
    projected = _PRODUCT * (2 * raw * receiver.kv_heads * receiver.head_dim)
    projected += _PRODUCT * _TO_TOKENS * rows * case.q_len * case.shared
    # Queries and results go through the projectors forward, their gradients backward, and into the projectors'.
    absorbed = _PRODUCT * 6 * rows * case.q_len * sharer.width
    absorbed += _PRODUCT * _TO_RAW_TOKENS * heads * sharer.width * case.q_len * case.shared
    return [Cost(moved, own + projected), Cost(moved, own + absorbed)]


def _problem(inputs: AttentionInputs, grad_out: Tensor, ours: tuple[Tensor, ...], torchs: tuple[Tensor, ...]) -> str:
    """Compares the gradients that one KV head is part of with the reference in float64; "" where right."""
    q_heads, kv_heads = inputs.query.shape[1], inputs.key.shape[1]
    group, kv_head = q_heads // kv_heads, kv_heads - 1
    heads, here = slice(kv_head * group, q_heads), slice(kv_head, kv_head + 1)
    cuts = [(slice(0, 1), heads), (slice(0, 1), here), (slice(0, 1), here), (here,), (here,)]
    leaves = [leaf.detach()[cut].double().requires_grad_() for leaf, cut in zip(_leaves(inputs), cuts, strict=False)]
    segments = []
    if inputs.segment is not None:
        raw_key, raw_value = (tensor[:1].double() for tensor in (inputs.segment.key, inputs.segment.value))
        segments = [to_tensors(c2c.SharerSegment(raw_key, raw_value, leaves[3], leaves[4]))]
    query, key, value = leaves[:3]
    scale = query.shape[3] ** -0.5
    out, *_ = reference.merged_attention(
        query, key, value, segments, None, True, None, None, scale, None, None, None, None, torch.float64
    )
    oracle = torch.autograd.grad(out, leaves, grad_out[:1, heads].double())
    for name, mine, theirs, wanted, cut in zip(_NAMES, ours, torchs, oracle, cuts, strict=False):
        if not mine.isfinite().all():
            return f"{name} has NaN or infinity"
        problem = disagreement(name, mine[cut], theirs[cut], wanted, GRADIENT_ULPS)
        if problem:
            return problem
    return ""
