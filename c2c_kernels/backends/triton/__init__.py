"""The Triton backend: the functions that operators call, with the same names as in `native`.

Importing this package imports triton; `backends.triton_record` tells without it whether that is worth while. On a
device the values of `lengths`, gates and indices are not looked at by the host, which would have to wait for them:
lengths are cut to the tensor, an index outside of it reads zeros, a gate that is not above 0 closes its token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops._checks import check_lengths, check_segment_values
from ...segment import Rope, SegmentTensors
from .. import cost, native, projection_gradients
from . import attention, fusing, gradients, projection, quantise, scatter, states, tiles_table
from .scatter import spread as spread
from .softmax import LOG2E, LOWEST
from .supported import LARGEST_DIM, LARGEST_ROW, check_dims, check_dtype


def _check_values(segments: list[SegmentTensors], name: str, lengths: Tensor | None = None, length: int = 0) -> None:
    """What the other backends refuse by value, where looking costs nothing: on CPU tensors."""
    check_lengths("lengths", lengths if lengths is not None and lengths.device.type == "cpu" else None, length)
    for number, segment in enumerate(segments):
        if segment.key.device.type == "cpu":
            check_segment_values(f"{name}[{number}]" if name == "segments" else name, segment)


def _in_receiver_space(segment: SegmentTensors) -> bool:
    """Whether attention can read the segment as it is stored: scales, index and float8 included."""
    parts = (segment.key_proj, segment.value_proj, segment.key_bias, segment.value_bias)
    return all(part is None for part in parts)


def _materialized(segment: SegmentTensors, dtype: torch.dtype) -> SegmentTensors:
    """The segment in receiver space, projected by the kernel, in the dtype of the queries."""

    def target(raw: Tensor, proj: Tensor | None) -> Tensor:
        heads, dim = (raw.shape[1], raw.shape[3]) if proj is None else (proj.shape[0], proj.shape[1])
        return raw.new_empty((raw.shape[0], heads, segment.length, dim), dtype=dtype)

    key, value = target(segment.key, segment.key_proj), target(segment.value, segment.value_proj)
    projection.project(segment, None, key, value)
    empty = dict.fromkeys(("key_proj", "key_proj_in", "value_proj", "value_proj_in", "key_bias", "value_bias"))
    return segment._replace(key=key, value=value, key_scale=None, value_scale=None, selected=None, **empty)


def _absorbs(segment: SegmentTensors, number: int, strategy: str, query: Tensor, value_dim: int) -> bool:
    """Whether the segment's projectors are absorbed; an error where that was asked for and cannot be."""
    if strategy == "materialize" or segment.key_proj is None or segment.value_proj is None or not segment.length:
        return False
    _, q_heads, q_len, head_dim = query.shape
    rows, width = q_heads * q_len, attention.segment_width(segment)
    single = attention.absorbs_wide(segment, query)
    limit, area, most = (
        table[single] for table in (tiles_table.ABSORBED_WIDTH, tiles_table.ABSORBED_AREA, tiles_table.ABSORBED_ROWS)
    )
    # The same launch takes the runs in receiver space, split over tokens.
    group, block_dim = rows // segment.key_proj.shape[0], max(map(attention.block_of, (head_dim, value_dim)))
    of_head = tiles_table.decode_rows(single, block_dim)
    fits = width <= limit and rows <= min(most, area // width) and group <= of_head
    if strategy == "absorb":
        if not fits:
            raise ValueError(
                f"merged_attention on triton absorbs a sharer's width (heads x dim, to a power of 2) up to {limit} for "
                f"query heads x queries up to {most}, {of_head} of a KV head, and a product of "
                f"width and query heads x queries up to {area}; segments[{number}] has width {width}, query "
                f'{q_heads} x {q_len}: use strategy "auto" or "materialize"'
            )
        return True
    if not fits or segment.key_proj_in is not None or segment.value_proj_in is not None:
        return False
    return cost.segment_cost(segment, q_heads, q_len, head_dim, value_dim, cost.GPU).strategy == "absorb"


def _check_receiver(operator: str, query: Tensor, value: Tensor) -> None:
    check_dims(operator, LARGEST_DIM, head_dim=query.shape[3], value_dim=value.shape[3])
    check_dtype(operator, "query", query)


def merged_attention(
    backend: str, query, key, value, segments, attn_mask, is_causal, query_positions, lengths, scale, window,
    segment_window, softcap, sinks, strategy, return_mass, return_lse, out_dtype=None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Forward kernels; lse and mass are computed where asked for (an empty mass otherwise)."""
    _check_receiver("merged_attention", query, value)
    absorbs = tuple(_absorbs(s, number, strategy, query, value.shape[3]) for number, s in enumerate(segments))
    _check_values(segments, "segments", lengths, key.shape[2])
    direct = [
        s if absorbed or _in_receiver_space(s) else _materialized(s, query.dtype)
        for s, absorbed in zip(segments, absorbs, strict=True)
    ]
    out, lse, mass = attention.attend(
        query, key, value, direct, attn_mask, is_causal, query_positions, lengths, scale, window, segment_window,
        softcap, sinks, return_mass, return_lse, out_dtype or query.dtype, absorbs,
    )  # fmt: skip
    if mass is None and return_lse:
        mass = query.new_empty((0,), dtype=torch.float32)
    return out, lse, mass


def merged_attention_backward(
    backend: str, grad_out, grad_lse, grad_mass, exact, lse, mass, query, key, value, segments, attn_mask, is_causal,
    query_positions, lengths, scale, window, segment_window, softcap, sinks, strategy, needs,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the inputs that `needs` marks: query, key, value, sinks, then the segments' tensors in order.

    Segments that are not plain are brought into receiver space, differentiated there, and their gradients taken back
    through the projector. `exact` is the forward's out in float32.
    """
    _check_receiver("merged_attention_backward", query, value)
    direct = [s if s.plain else _materialized(s, query.dtype) for s in segments]
    if any(not s.plain and (strategy == "absorb" or _in_receiver_space(s)) for s in segments):
        # Weights are exp(score - lse): both have to come from the same keys, to the last bit.
        exact, lse, _ = attention.attend(
            query, key, value, direct, attn_mask, is_causal, query_positions, lengths, scale, window, segment_window,
            softcap, sinks, False, True, torch.float32,
        )  # fmt: skip
    delta = native.score_delta(grad_out, grad_lse, grad_mass, exact, mass, 1 + len(segments))
    grad_query, found, (base, rest) = gradients.gradients(
        grad_out, lse, delta, query, key, value, direct, native.gate_needs(segments, needs), attn_mask, is_causal,
        query_positions, lengths, scale, window, segment_window, softcap, sinks,
    )  # fmt: skip
    grad_sinks = None
    if sinks is not None:
        held = sinks.float()
        held = torch.where(held > -torch.inf, (held * LOG2E.value).clamp_min(LOWEST.value), held)
        share = torch.exp2((held[None, :, None] - base) - rest)
        grad_sinks = -(share * native.sink_delta(delta, grad_mass)).sum((0, 2))
    own, *rest = found

    def through_projector(grad_key, grad_value, segment: SegmentTensors, wants: list[bool]) -> list[Tensor | None]:
        return project_kv_backward("triton", grad_key, grad_value, segment, None, wants)

    return native.in_order(
        (query, key, value, sinks), (grad_query, own.key, own.value, grad_sinks), segments, rest, needs,
        through_projector,
    )  # fmt: skip


def project_kv(
    backend: str, segment: SegmentTensors, rope: Rope | None, key_out: Tensor, value_out: Tensor, name: str = "segment"
) -> None:
    """Forward kernel, written to key_out and value_out."""
    for half, tensor in (("key", key_out), ("value", value_out)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"out {half} has stride {tensor.stride(-1)} in its last dimension, wanted 1")
        check_dtype("project_kv", f"out {half}", tensor)
    _check_values([segment._replace(gate=None)], name)
    projection.project(segment, rope, key_out, value_out)


def project_kv_backward(
    backend: str, grad_key: Tensor, grad_value: Tensor, segment: SegmentTensors, rope: Rope | None, needs=None
) -> list[Tensor | None]:
    """Gradients by slot in float32: matrix products of PyTorch; tokens selected by an index go back by a kernel."""
    return projection_gradients.gradients(grad_key, grad_value, segment, rope, needs, spread=scatter.spread)


def merge_states(backend: str, outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Forward kernel."""
    check_dims("merge_states", LARGEST_ROW, head_dim=outs[0].shape[3])
    check_dtype("merge_states", "outs", outs[0])
    return states.merge(outs, lses)


def quantize(backend: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Forward kernel."""
    check_dims("quantize_kv", LARGEST_ROW, head_dim=x.shape[3])
    check_dtype("quantize_kv", "key and value", x)
    return quantise.quantise(x)


def fuse_kv(
    backend: str, receiver_key, receiver_value, sharer_key, sharer_value, weights, index, residual, gates, key_out,
    value_out,
) -> None:  # fmt: skip
    """Forward kernel of one layer, written to key_out and value_out."""
    call = receiver_key, receiver_value, sharer_key, sharer_value, weights, index, residual, gates, key_out, value_out
    fuse_kv_layers(backend, [call])


def fuse_kv_layers(backend: str, calls) -> None:
    """Forward kernel of independent layers: one launch where they are alike and their tokens few."""
    halves = []
    for call in calls:
        key, value, sharer_key, sharer_value, weights, index, residual, gates, key_out, value_out = call
        residuals, factors = residual or (None, None), gates or (None, None)
        halves += [
            fusing.Half(key, sharer_key, weights.key, index, residuals[0], factors[0], key_out),
            fusing.Half(value, sharer_value, weights.value, index, residuals[1], factors[1], value_out),
        ]
    fusing.fuse(halves)
