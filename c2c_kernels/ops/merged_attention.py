"""`merged_attention`: one softmax over the receiver's own cache and any number of sharer segments."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import ENVIRONMENT_VARIABLE, choose, kernels, reference
from ..segment import SegmentTensors, SharerSegment, pack, to_tensors, unpack
from . import _repeated
from ._checks import check_lengths, check_merged_attention, check_segment_values
from ._library import LIBRARY, implement, needs_dispatcher, refuse_second_derivative, wants_grad

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor[] segments, int[] layout, Tensor? attn_mask, bool is_causal, "
    "Tensor? query_positions, Tensor? lengths, float scale, SymInt? window, SymInt? segment_window, float? softcap, "
    "Tensor? sinks, str strategy"
)
LIBRARY.define(
    f"merged_attention({_ARGUMENTS}, bool return_mass, bool for_backward, str backend) "
    "-> (Tensor out, Tensor lse, Tensor mass, Tensor exact)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "merged_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor? grad_mass, Tensor exact, Tensor lse, "
    f"Tensor mass, {_ARGUMENTS}, bool[] needs, str backend) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def merged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[SharerSegment] = (),
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    query_positions: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    segment_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    strategy: str = "auto",
    return_lse: bool = False,
    return_mass: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """out_i = (sum_j exp(z_ij) v_j + sum_s sum_j g^s_j exp(z^s_ij) (Wv y_j + bv)) / Z_i.

    z is cap(scale * q . k) plus the mask; k is an own key or, in a segment, Wk x + bk. Query head h reads KV head
    h // (q_heads / kv_heads). Where nothing is visible, out = 0 and lse = -inf.

    NaN and inf: tokens at and beyond `lengths` are not read. A key that is not finite changes no output of the rows
    from which causality, a window, positions or a boolean mask hide it (an additive mask or a gate of 0 does not hide
    it). A value that is not finite reaches every row that sees its token; a row that does not see it may become NaN
    too (0 * NaN) where it reads the same KV head of the same batch row, and which of those do depends on the kernel.
    Gradients promise nothing where a token within `lengths` is not finite.

    Args:
        query: (batch, q_heads, q_len, head_dim) float32, bfloat16 or float16 (float64: backend "reference").
        key: (batch, kv_heads, len, head_dim), rotary embedding applied, dtype of query.
        value: (batch, kv_heads, len, value_dim), dtype of query. value_dim may differ from head_dim.
        segments: what sharers have read; each adds its tokens to the softmax.
        attn_mask: broadcastable to (batch, q_heads, q_len, len), boolean (True: visible) or additive; own tokens.
        is_causal: own token j is visible to query i when j <= len - q_len + i (lower-right aligned).
        query_positions: broadcastable to (batch, q_len) integers in the receiver's sequence, compared with the
            `positions` of segments. Default: len - q_len + i.
        lengths: (batch,) integers, valid own tokens of each row; replaces len above, row by row.
        scale: factor of q . k. Default: head_dim ** -0.5.
        window: own tokens are visible when their index > len - q_len + i - window, sharer tokens that have
            positions when their position > query position - window.
        segment_window: the window for segments, where it differs from the own one (for example when `attn_mask`
            holds the own one already). Default: `window`.
        softcap: z = softcap * tanh(z / softcap) before gates and masks.
        sinks: (q_heads,), a logit per head that joins the normalisation and has no value.
        strategy: "absorb" folds a segment's projector into query and output, "materialize" projects the segment
            first, "auto" takes the cheaper by the cost model of `backends.cost` from the tensors' sizes, padding
            included (where autograd records the call, "materialize", which its backward pass needs anyway). Same
            result within rounding.
        return_lse: also return lse (batch, q_heads, q_len) float32, ln of the normaliser Z.
        return_mass: also return mass (batch, q_heads, q_len, 1 + len(segments)) float32, the share of Z that each
            segment holds, own cache first. The shares sum to 1, less what the sink takes.
        backend: name of a backend, None for the fastest that can run the call.

    Returns:
        out (batch, q_heads, q_len, value_dim) like query; then lse and mass where asked for.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is wanted, before anything is computed.

    Source: arXiv 2510.03215 for the setting; softmax merging as in FlashAttention (arXiv 2205.14135).
    """
    if not isinstance(segments, (list, tuple)):
        raise TypeError(f"segments must be a list or tuple of SharerSegment, got {type(segments).__name__}")
    known = None
    bare = attn_mask is None and query_positions is None and lengths is None and sinks is None
    if bare and not (segments or return_lse or return_mass or torch.compiler.is_compiling()):
        asked = os.environ.get(ENVIRONMENT_VARIABLE) if backend is None else backend
        known = _repeated.signature(
            query, key, value, is_causal, scale, window, segment_window, softcap, strategy, asked
        )
        if known is not None and needs_dispatcher((query, key, value)):
            known = None
        if known is not None and (out := _repeated.run(known, query, key, value, scale, softcap)) is not None:
            return out
    packed = [to_tensors(segment, f"segments[{number}]") for number, segment in enumerate(segments)]
    if segment_window is None:
        segment_window = window
    check_merged_attention(
        query, key, value, packed, attn_mask, is_causal, query_positions, lengths, scale, window, segment_window,
        softcap, sinks, strategy,
    )  # fmt: skip
    if scale is None:
        scale = query.shape[3] ** -0.5
    refusal = ""
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        refusal = "has no gradient for attn_mask"
    everything: list[Tensor | None] = [query, key, value, sinks]
    for segment in packed:
        everything += [tensor for tensor in segment.tensors if tensor is not None]
    call = (query, value, packed, strategy, everything, attn_mask, sinks, segment_window)
    record = choose("merged_attention", backend, query.device, query.dtype, refusal, call)
    arguments = (attn_mask, is_causal, query_positions, lengths, scale, window, segment_window, softcap, sinks)
    if record.name == "reference":
        out, lse, mass = _reference(query, key, value, packed, *arguments)
    else:
        if needs_dispatcher(everything):
            tensors, layout = pack(packed)
            out, lse, mass, _ = torch.ops.c2c.merged_attention(
                query, key, value, tensors, layout, *arguments, strategy, return_mass, wants_grad(everything),
                record.name,
            )  # fmt: skip
        else:
            out, lse, mass = kernels(record.name).merged_attention(
                record.name, query, key, value, packed, *arguments, strategy, return_mass, return_lse
            )
        if known is not None and record.name == "cpu":
            _repeated.remember(known, query, key, value, is_causal, window)
    if return_mass:
        return (out, lse, mass) if return_lse else (out, mass)
    return (out, lse) if return_lse else out


def _reference(query, key, value, segments: list[SegmentTensors], *arguments) -> tuple[Tensor, Tensor, Tensor]:
    if not torch.compiler.is_compiling():
        check_lengths("lengths", arguments[3], key.shape[2])
        for number, segment in enumerate(segments):
            check_segment_values(f"segments[{number}]", segment)
    out, lse, mass, _ = reference.merged_attention(query, key, value, segments, *arguments)
    return out.to(query.dtype), lse, mass


def _forward(
    query, key, value, segments, layout, attn_mask, is_causal, query_positions, lengths, scale, window,
    segment_window, softcap, sinks, strategy, return_mass, for_backward, backend,
):  # fmt: skip
    # The backward pass subtracts out . grad_out from every score's gradient: out is kept unrounded for it.
    exact = for_backward and query.dtype != torch.float32
    if for_backward and strategy == "auto":
        strategy = "materialize"  # the backward pass works on projected segments; lse has to be theirs
    out, lse, mass = kernels(backend).merged_attention(
        backend, query, key, value, unpack(segments, layout), attn_mask, is_causal, query_positions, lengths, scale,
        window, segment_window, softcap, sinks, strategy, return_mass, True, torch.float32 if exact else query.dtype,
    )  # fmt: skip
    return (out.to(query.dtype), lse, mass, out) if exact else (out, lse, mass, out.new_empty(0, dtype=torch.float32))


def _backward(
    grad_out, grad_lse, grad_mass, exact, lse, mass, query, key, value, segments, layout, attn_mask, is_causal,
    query_positions, lengths, scale, window, segment_window, softcap, sinks, strategy, needs, backend,
):  # fmt: skip
    return kernels(backend).merged_attention_backward(
        backend, grad_out, grad_lse, grad_mass, exact, lse, mass, query, key, value, unpack(segments, layout),
        attn_mask, is_causal, query_positions, lengths, scale, window, segment_window, softcap, sinks, strategy, needs,
    )  # fmt: skip


def _fake_forward(query, key, value, segments, layout, *arguments):
    batch, q_heads, q_len, _ = query.shape
    return_mass, for_backward = arguments[-3], arguments[-2]
    out = query.new_empty((batch, q_heads, q_len, value.shape[3]))
    lse = query.new_empty((batch, q_heads, q_len), dtype=torch.float32)
    shape = (batch, q_heads, q_len, 1 + len(layout)) if return_mass else (0,)
    exact = out.shape if for_backward and query.dtype != torch.float32 else (0,)
    return out, lse, *(query.new_empty(s, dtype=torch.float32) for s in (shape, exact))


def _fake_backward(grad_out, grad_lse, grad_mass, exact, lse, mass, query, key, value, segments, layout, *arguments):
    sinks, needs = arguments[-4], arguments[-2]
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, need in zip((query, key, value, sinks, *segments), needs, strict=True)
        if need
    ]


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, segments, layout, *arguments, return_mass, _, backend = inputs
    out, lse, mass, exact = output
    ctx.mark_non_differentiable(exact)
    attn_mask, is_causal, query_positions, lengths, scale, window, segment_window, softcap, sinks, strategy = arguments
    optional = (attn_mask, query_positions, lengths, sinks)
    exact = exact if exact.numel() else out
    ctx.save_for_backward(query, key, value, exact, lse, mass, *(t for t in optional if t is not None), *segments)
    ctx.present = [t is not None for t in optional]
    ctx.call = (layout, is_causal, scale, window, segment_window, softcap, strategy, return_mass, backend)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad_out, grad_lse, grad_mass, _):
    layout, is_causal, scale, window, segment_window, softcap, strategy, return_mass, backend = ctx.call
    query, key, value, exact, lse, mass, *rest = ctx.saved_tensors
    rest = iter(rest)
    attn_mask, query_positions, lengths, sinks = (next(rest) if present else None for present in ctx.present)
    segments = list(rest)
    if grad_out is None:
        grad_out = torch.zeros_like(exact, dtype=query.dtype)
    if not return_mass:
        grad_mass = None
    segment_needs = ctx.needs_input_grad[3]
    segment_needs = list(segment_needs) if segments else []
    needs = [*ctx.needs_input_grad[:3], sinks is not None and ctx.needs_input_grad[13], *segment_needs]
    grads = iter(
        torch.ops.c2c.merged_attention_backward(
            grad_out, grad_lse, grad_mass, exact, lse, mass, query, key, value, segments, layout, attn_mask, is_causal,
            query_positions, lengths, scale, window, segment_window, softcap, sinks, strategy, needs, backend,
        )
    )  # fmt: skip
    found = [next(grads) if need else None for need in needs]
    empty_list = [] if not layout else None  # an empty int[] is taken for an empty tensor list by autograd
    return (*found[:3], found[4:], empty_list, *(None,) * 8, found[3], None, None, None, None)


implement("merged_attention", _forward)
implement("merged_attention_backward", _backward)
torch.library.register_fake("c2c::merged_attention", _fake_forward, lib=LIBRARY)
torch.library.register_fake("c2c::merged_attention_backward", _fake_backward, lib=LIBRARY)
refuse_second_derivative("merged_attention_backward")
torch.library.register_autograd("c2c::merged_attention", _autograd_backward, setup_context=_setup_context, lib=LIBRARY)
