"""The backward pass as fused kernels do it (weights recomputed from lse, out . grad_out subtracted), in plain PyTorch.

What rule 9 calls "the same computation done by PyTorch in the same dtype" for gradients.
"""

from __future__ import annotations

import torch

import c2c_kernels as c2c
from c2c_kernels.backends import reference
from c2c_kernels.segment import to_tensors


def leaves(call: dict, dtype: torch.dtype | None = None) -> tuple[dict, dict[str, torch.Tensor]]:
    """The call with leaves (cast to `dtype`) for all tensors that have a gradient, and these leaves by name."""
    found: dict[str, torch.Tensor] = {}

    def leaf(name, tensor):
        if tensor is None or not tensor.dtype.is_floating_point:
            return tensor
        if name not in found:
            found[name] = tensor.detach().to(dtype or tensor.dtype).requires_grad_()
        return found[name]

    fresh = dict(call)
    for name in ("query", "key", "value", "sinks"):
        fresh[name] = leaf(name, call[name])
    if call["attn_mask"] is not None and call["attn_mask"].dtype != torch.bool and dtype is not None:
        fresh["attn_mask"] = call["attn_mask"].to(dtype)
    fresh["segments"] = []
    for number, segment in enumerate(call["segments"]):
        fields = {}
        for name, value in vars(segment).items():
            if isinstance(value, tuple):
                fields[name] = tuple(leaf(f"{number}.{name}[{i}]", part) for i, part in enumerate(value))
            else:
                fields[name] = leaf(f"{number}.{name}", value) if isinstance(value, torch.Tensor) else value
        fresh["segments"].append(c2c.SharerSegment(**fields))
    return fresh, found


def operator_gradients(call: dict, cotangents, backend: str, dtype: torch.dtype | None = None) -> dict:
    """Gradients through the public operator; every output takes part in the loss."""
    fresh, found = leaves(call, dtype)
    query, key, value, segments = (fresh.pop(name) for name in ("query", "key", "value", "segments"))
    out, lse, mass = c2c.merged_attention(
        query, key, value, segments, **fresh, return_lse=True, return_mass=True, backend=backend
    )
    grad_out, grad_lse, grad_mass = cotangents
    loss = (out.double() * grad_out).sum() + (mass.double() * grad_mass).sum()
    (loss + (torch.where(lse.isfinite(), lse, 0).double() * grad_lse).sum()).backward()
    return {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in found.items()}


def fused_gradients(call: dict, cotangents, arithmetic: torch.dtype) -> tuple[dict, dict[str, float]]:
    """The same gradients in PyTorch with the arithmetic dtype given, along the formulas of fused kernels.

    Also the size of what is summed for gates and sinks: weights over gates are not bounded by 1, and their sums cancel.
    """
    sizes: dict[str, float] = {}
    fresh, found = leaves(call, arithmetic)
    query, segments = fresh["query"], [to_tensors(segment) for segment in fresh["segments"]]
    batch, q_heads, q_len, _ = query.shape
    length, lengths, window = call["key"].shape[2], call["lengths"], call["window"]
    scale, softcap = query.shape[-1] ** -0.5, call["softcap"]
    grad_out, grad_lse, grad_mass = (c.to(arithmetic) for c in cotangents)

    own_key = reference.zero_beyond(fresh["key"], lengths)
    visible = reference._own_visible(batch, q_len, length, lengths, call["is_causal"], window, "cpu")
    scores = reference._scores(query, own_key, scale, softcap)
    if call["attn_mask"] is not None and call["attn_mask"].dtype == torch.bool:
        visible = visible & call["attn_mask"]
    elif call["attn_mask"] is not None:
        scores = scores + fresh["attn_mask"]
    runs = [(scores, visible, None, reference.zero_beyond(fresh["value"], lengths))]
    positions = call["query_positions"]
    if positions is None:
        positions = reference.default_query_positions(batch, q_len, length, lengths, "cpu")
    for segment in segments:
        key, value = reference.project_kv(segment, None, arithmetic)
        gate = None if segment.gate is None else segment.gate.expand(batch, q_heads, segment.length)[:, :, None]
        visible = reference._segment_visible(segment, positions, call["segment_window"] or window, "cpu")
        runs.append((reference._scores(query, key, scale, softcap), visible, gate, value))

    with torch.no_grad():
        plain = {**fresh, "segments": fresh["segments"]}
        out, lse, mass, _ = reference.merged_attention(
            query, fresh["key"], fresh["value"], segments, plain["attn_mask"], call["is_causal"],
            call["query_positions"], lengths, scale, window, call["segment_window"] or window, softcap,
            fresh["sinks"], arithmetic,
        )  # fmt: skip
        base = (out * grad_out).sum(-1) - grad_lse * lse.isfinite() + (mass * grad_mass).sum(-1)
        shift = torch.where(lse.isfinite(), lse, torch.inf)
    surrogate = torch.zeros((), dtype=torch.float64)
    for number, (scores, visible, gate, value) in enumerate(runs):
        with torch.no_grad():
            weight = torch.exp(scores.masked_fill(~visible, -torch.inf) - shift.unsqueeze(-1))
            along = reference._scores(grad_out, value, 1.0, None)
            change = weight * (along - (base - grad_mass[..., number]).unsqueeze(-1))
            gated = weight if gate is None else weight * gate
        if gate is not None:
            total = change.abs().sum(2).sum_to_size(segments[number - 1].gate.shape)
            sizes[f"{number - 1}.gate"] = total.max().item() if total.numel() else 0.0
            surrogate = surrogate + (change.sum(2) * gate[:, :, 0]).double().sum()
            change = change * gate.detach()
        surrogate = surrogate + (change * scores).double().sum()
        surrogate = surrogate + (reference._weighted_values(gated, value) * grad_out).double().sum()
    if fresh["sinks"] is not None:
        share = torch.exp(fresh["sinks"].detach()[None, :, None] - shift)
        sizes["sinks"] = (share * base).abs().sum((0, 2)).max().item()
        surrogate = surrogate - ((share * base).sum((0, 2)) * fresh["sinks"]).double().sum()
    if surrogate.requires_grad:
        surrogate.backward()
    return {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in found.items()}, sizes
