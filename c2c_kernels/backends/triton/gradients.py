"""Gradients of `merged_attention` on Triton in receiver space: tensors in, tensors out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...segment import SegmentTensors
from . import arguments, tiles_table
from .attention import call_arguments
from .backward import query_gradient_kernel, token_gradient_kernel
from .launch import Launch, run


class TokenGradients(NamedTuple):
    """Of one run: float32, contiguous, like its key and value; gate (batch, q_heads, length) where asked for."""

    key: Tensor
    value: Tensor
    gate: Tensor | None


def gradients(
    grad_out: Tensor, lse: Tensor, delta: Tensor, query: Tensor, key: Tensor, value: Tensor,
    segments: list[SegmentTensors], wants_gate: list[bool], attn_mask, is_causal, query_positions, lengths, scale,
    window, segment_window, softcap, sinks,
) -> tuple[Tensor, list[TokenGradients], Tensor]:  # fmt: skip
    """d query, gradients of the own cache and each segment, and what rows are normalised by: (2, batch, q_heads,
    q_len) float32, base and rest of `normaliser`. delta: (batch, q_heads, q_len, runs) float32."""
    batch, q_heads, q_len = query.shape[:3]
    common, choice, kinds = call_arguments(
        query, key, value, segments, attn_mask, is_causal, query_positions, lengths, scale, window, segment_window,
        softcap,
    )  # fmt: skip
    grad_query = query.new_empty(query.shape, dtype=torch.float32)
    found = []
    for (its_key, its_value), wants in zip(
        [(key, value), *((s.key, s.value) for s in segments)], [False, *wants_gate], strict=True
    ):
        length = its_key.shape[2]
        gate = query.new_empty((batch, q_heads, length), dtype=torch.float32) if wants else None
        pair = (query.new_empty(t.shape, dtype=torch.float32) for t in (its_key, its_value))
        found.append(TokenGradients._make((*pair, gate)))
    grad_out = arguments.rows(grad_out)
    common |= {
        "grad_out": grad_out, "grad_out_b": grad_out.stride(0), "grad_out_h": grad_out.stride(1),
        "grad_out_t": grad_out.stride(2), "delta": delta.contiguous(),
        "bases": query.new_empty((2, batch, q_heads, q_len), dtype=torch.float32),
        "row_count": batch * q_heads * q_len,
    }  # fmt: skip
    read = [kinds[0], *(kind for kind, segment in zip(kinds[1:], segments, strict=True) if segment.length)]
    choice = choice._replace(heavy=choice.heavy or tiles_table.burdened(read, common["SOFTCAP"]))
    tile = tiles_table.backward_tile(choice)
    names = {
        "BLOCK_M": tile.rows, "BLOCK_N": tile.tokens, "STAGES": tile.stages, "PRECISION": choice.precision(64),
    }  # fmt: skip
    rows, kv_heads = choice.rows, key.shape[1]
    grid = batch * kv_heads * -(-rows // tile.rows)
    sink_tensor, sinks_h = arguments.expanded(sinks, (q_heads,))
    alone = {"lse": lse.contiguous(), "sinks": sink_tensor, "sinks_h": sinks_h, "grad_query": grad_query}
    options = {"warps": tile.warps, "stages": tile.stages, "registers": tiles_table.backward_registers(choice)}
    run(Launch(query_gradient_kernel, grid, common | names | alone, **options), query.device)
    tiles = sum(-(-g.key.shape[2] // tile.tokens) for g in found)
    names |= {"grads": tuple(found), "tiles": tiles}
    run(Launch(token_gradient_kernel, batch * kv_heads * tiles, common | names, **options), query.device)
    return grad_query, found, common["bases"]
