"""`merged_attention` on Triton: chooses between prefill and decode, and launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ...segment import SegmentTensors
from . import arguments, tiles_table
from .decode import combine_kernel, split_kernel
from .launch import Launch, run, target_of
from .prefill import prefill_kernel


def block_of(dim: int) -> int:
    """A head dim padded to a power of two, at least 16: what a tile's side may be."""
    return max(16, 1 << (dim - 1).bit_length())


def attend(
    query: Tensor, key: Tensor, value: Tensor, segments: list[SegmentTensors], attn_mask, is_causal, query_positions,
    lengths, scale, window, segment_window, softcap, sinks, return_mass: bool, return_lse: bool, out_dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Forward over the own cache and segments in receiver space: out, lse and mass where asked for."""
    batch, q_heads, q_len, _ = query.shape
    out = query.new_empty((batch, q_heads, q_len, value.shape[3]), dtype=out_dtype)
    lse = query.new_empty((batch, q_heads, q_len), dtype=torch.float32) if return_lse else None
    mass = query.new_empty((batch, q_heads, q_len, 1 + len(segments)), dtype=torch.float32) if return_mass else None
    common, choice = call_arguments(
        query, key, value, segments, attn_mask, is_causal, query_positions, lengths, scale, window, segment_window,
        softcap,
    )  # fmt: skip
    sink_tensor, sinks_h = arguments.expanded(sinks, (q_heads,))
    results = {
        "out": out, "lse": lse, "mass": mass, "sinks": sink_tensor, "sinks_h": sinks_h,
        "BLOCK_R": 1 << (common["RUNS"] - 1).bit_length(),
    }  # fmt: skip
    rows, kv_heads = choice[3], key.shape[1]
    if rows > tiles_table.DECODE_ROWS:
        tile = tiles_table.prefill_tile(*choice)
        names = {"BLOCK_M": tile.rows, "BLOCK_N": tile.tokens, "STAGES": tile.stages}
        grid = batch * kv_heads * -(-rows // tile.rows)
        run(Launch(prefill_kernel, grid, common | results | names, tile.warps, tile.stages), query.device)
    elif rows and batch:
        _decode(common, results, tiles_table.decode_tile(*choice), batch, rows, query)
    return out, lse, mass


def call_arguments(
    query: Tensor, key: Tensor, value: Tensor, segments: list[SegmentTensors], attn_mask, is_causal, query_positions,
    lengths, scale, window, segment_window, softcap,
) -> tuple[dict, tuple]:  # fmt: skip
    """What forward and backward kernels are told alike, and what their tiles are chosen by."""
    batch, q_heads, q_len, head_dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[3]
    query = arguments.rows(query)
    own = arguments.own_run(key, value, lengths, attn_mask, (batch, q_heads, q_len))
    runs = [own, *(arguments.segment_run(segment, batch, q_heads) for segment in segments)]
    kinds = [arguments.own_kind(own, is_causal, window, None if attn_mask is None else attn_mask.dtype)]
    for segment, its_run in zip(segments, runs[1:], strict=True):
        kinds.append(arguments.segment_kind(segment, its_run, segment_window, query.dtype))
    group = q_heads // kv_heads
    block_d, block_v = block_of(head_dim), block_of(value_dim)
    target = target_of(query.device)
    rows, wide = q_len * group, any(kind.wide for kind in kinds)
    positions, positions_b, positions_t = arguments.expanded(query_positions, (batch, q_len))
    common = {
        "query_positions": positions, "query_positions_b": positions_b, "query_positions_t": positions_t,
        "query": query, "query_b": query.stride(0), "query_h": query.stride(1), "query_t": query.stride(2),
        "runs": tuple(runs), "kv_heads": kv_heads, "q_len": q_len, "own_length": key.shape[2], "scale": float(scale),
        "softcap": float(softcap or 0.0), "window": arguments.window_number(window),
        "segment_window": arguments.window_number(segment_window), "RUNS": len(runs), "KINDS": tuple(kind.code for kind in kinds),
        "GROUP": group, "SOFTCAP": softcap is not None, "DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_D": block_d,
        "BLOCK_V": block_v, "PRECISION": target.precision,
    }  # fmt: skip
    return common, (target, max(block_d, block_v), query.dtype, rows, wide)


def _decode(common: dict, results: dict, tile: tiles_table.Tile, batch: int, rows: int, query: Tensor) -> None:
    split = tiles_table.split_tokens(rows, query.dtype)
    counts = [common["own_length"], *(each.length for each in common["runs"][1:])]
    splits = sum(-(-count // split) for count in counts)
    kv_heads = common["kv_heads"]
    states = query.new_empty((batch, kv_heads * rows, splits, 2), dtype=torch.float32)
    sums = query.new_empty((batch, kv_heads * rows, splits, common["VALUE_DIM"]), dtype=torch.float32)
    names = {
        "states": states, "sums": sums, "splits": splits, "SPLIT": split, "BLOCK_M": tile.rows,
        "BLOCK_N": tile.tokens, "STAGES": tile.stages,
    }  # fmt: skip
    run(Launch(split_kernel, batch * kv_heads * splits, common | names, tile.warps, tile.stages), query.device)
    kept = ("kv_heads", "q_len", "own_length", "RUNS", "GROUP", "VALUE_DIM", "BLOCK_V")
    names = {
        "states": states, "sums": sums, "splits": splits, "SPLIT": split, "BLOCK_S": 16, "lengths": (0, *counts[1:]),
    }  # fmt: skip
    combined = {name: common[name] for name in kept} | results | names
    run(Launch(combine_kernel, batch * kv_heads * rows, combined, 4, 2), query.device)
