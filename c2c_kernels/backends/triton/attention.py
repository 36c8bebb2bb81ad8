"""`merged_attention` on Triton: chooses between prefill and decode, and launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ...segment import SegmentTensors
from . import arguments, tiles_table
from .absorb import Absorbed, absorb_kernel
from .decode import combine_kernel, split_kernel
from .launch import Launch, run, target_of
from .prefill import prefill_kernel


def block_of(dim: int) -> int:
    """A head dim padded to a power of two, at least 16: what a tile's side may be."""
    return max(16, 1 << (dim - 1).bit_length())


def attend(
    query: Tensor, key: Tensor, value: Tensor, segments: list[SegmentTensors], attn_mask, is_causal, query_positions,
    lengths, scale, window, segment_window, softcap, sinks, return_mass: bool, return_lse: bool, out_dtype,
    absorbs: tuple[bool, ...] = (),
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Forward over the own cache and segments: out, lse and mass where asked for.

    `absorbs`: of every segment, whether its projectors are absorbed; the others are in receiver space.
    """
    batch, q_heads, q_len, _ = query.shape
    out = query.new_empty((batch, q_heads, q_len, value.shape[3]), dtype=out_dtype)
    lse = query.new_empty((batch, q_heads, q_len), dtype=torch.float32) if return_lse else None
    mass = query.new_empty((batch, q_heads, q_len, 1 + len(segments)), dtype=torch.float32) if return_mass else None
    common, choice = call_arguments(
        query, key, value, segments, attn_mask, is_causal, query_positions, lengths, scale, window, segment_window,
        softcap, absorbs,
    )  # fmt: skip
    sink_tensor, sinks_h = arguments.expanded(sinks, (q_heads,))
    results = {
        "out": out, "lse": lse, "mass": mass, "sinks": sink_tensor, "sinks_h": sinks_h,
        "BLOCK_R": 1 << (common["RUNS"] - 1).bit_length(),
    }  # fmt: skip
    rows, kv_heads = choice.rows, key.shape[1]
    if not any(absorbs) and not tiles_table.decodes(choice):
        tile = tiles_table.prefill_tile(choice)
        names = {"BLOCK_M": tile.rows, "BLOCK_N": tile.tokens, "STAGES": tile.stages}
        grid = batch * kv_heads * -(-rows // tile.rows)
        run(Launch(prefill_kernel, grid, common | results | names, tile.warps, tile.stages), query.device)
    elif rows and batch:
        _decode(common, results, choice, segments, absorbs, batch, query)
    return out, lse, mass


def call_arguments(
    query: Tensor, key: Tensor, value: Tensor, segments: list[SegmentTensors], attn_mask, is_causal, query_positions,
    lengths, scale, window, segment_window, softcap, absorbs: tuple[bool, ...] = (),
) -> tuple[dict, tiles_table.Call]:  # fmt: skip
    """What forward and backward kernels are told alike, and what their tiles are chosen by."""
    batch, q_heads, q_len, head_dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[3]
    query = arguments.rows(query)
    own = arguments.own_run(key, value, lengths, attn_mask, (batch, q_heads, q_len))
    runs = [own, *(arguments.segment_run(segment, batch, q_heads) for segment in segments)]
    kinds = [arguments.own_kind(own, is_causal, window, None if attn_mask is None else attn_mask.dtype)]
    for segment, its_run, absorbed in zip(segments, runs[1:], absorbs or (False,) * len(segments), strict=True):
        kinds.append(arguments.segment_kind(segment, its_run, segment_window, query.dtype, absorbed))
    group = q_heads // kv_heads
    block_d, block_v = block_of(head_dim), block_of(value_dim)
    target = target_of(query.device)
    choice = tiles_table.Call(
        target, max(block_d, block_v), query.dtype, q_len * group, any(kind.wide for kind in kinds),
        any(kind.mask or kind.gate == 3 for kind in kinds) or any(run.key_scale is not None for run in runs),
    )  # fmt: skip
    positions, positions_b, positions_t = arguments.expanded(query_positions, (batch, q_len))
    common = {
        "query_positions": positions, "query_positions_b": positions_b, "query_positions_t": positions_t,
        "query": query, "query_b": query.stride(0), "query_h": query.stride(1), "query_t": query.stride(2),
        "runs": tuple(runs), "kv_heads": kv_heads, "q_len": q_len, "own_length": key.shape[2], "scale": float(scale),
        "softcap": float(softcap or 0.0), "window": arguments.own_window_number(window),
        "segment_window": arguments.window_number(segment_window), "RUNS": len(runs),
        "KINDS": tuple(kind.code for kind in kinds),
        "GROUP": group, "SOFTCAP": softcap is not None, "DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_D": block_d,
        "BLOCK_V": block_v, "PRECISION": choice.precision(),
    }  # fmt: skip
    return common, choice


def _decode(
    common: dict,
    results: dict,
    choice: tiles_table.Call,
    segments: list[SegmentTensors],
    absorbs: tuple[bool, ...],
    batch: int,
    query: Tensor,
) -> None:
    rows, kv_heads = choice.rows, common["kv_heads"]
    size = min(each.key.element_size() for each in common["runs"])
    tile, split = tiles_table.decode_tile(choice), tiles_table.split_tokens(rows, size)
    counts = [common["own_length"], *(each.length for each in common["runs"][1:])]
    absorbs = (False, *(absorbs or (False,) * len(segments)))  # the own cache first
    splits = sum(-(-count // split) for count, raw in zip(counts, absorbs, strict=True) if not raw)
    raw_split = tiles_table.RAW_SPLIT_BYTES // size
    raw_splits = [-(-count // raw_split) * raw for count, raw in zip(counts, absorbs, strict=True)]
    absorbed: list[Absorbed | None] = [None] * len(counts)
    raws = [0, 0, 0, 0] * len(counts)
    raw_tile = None
    for number, segment in enumerate(segments, 1):
        if absorbs[number]:
            absorbed[number] = _absorbed(common, segment, query, raw_splits[number])
            raws[4 * number : 4 * number + 4] = _raw_dims(segment)
            its_call = choice._replace(rows=kv_heads * rows)
            raw_tile = tiles_table.raw_tile(its_call, segment_width(segment), raw_tile)
    states = query.new_empty((batch, kv_heads * rows, splits + sum(raw_splits), 2), dtype=torch.float32)
    sums = query.new_empty((batch, kv_heads * rows, splits, common["VALUE_DIM"]), dtype=torch.float32)
    shared = {
        "states": states, "sums": sums, "splits": splits, "raw_splits": sum(raw_splits), "SPLIT": split,
        "RAW_SPLIT": raw_split, "absorbed": tuple(absorbed), "RAWS": tuple(raws),
    }  # fmt: skip
    wider = tile if raw_tile is None else raw_tile
    names = {
        "BLOCK_M": tile.rows, "BLOCK_N": tile.tokens, "STAGES": tile.stages, "BLOCK_A": wider.rows,
        "BLOCK_T": wider.tokens,
    }  # fmt: skip
    grid = batch * (kv_heads * splits + sum(raw_splits))
    run(Launch(split_kernel, grid, common | shared | names, max(tile.warps, wider.warps), tile.stages), query.device)
    kept = ("kv_heads", "q_len", "own_length", "RUNS", "KINDS", "GROUP", "VALUE_DIM", "BLOCK_V")
    names = {"BLOCK_S": 16, "BLOCK_W": 16, "lengths": (0, *counts[1:])}
    combined = {name: common[name] for name in kept} | shared | results | names
    # One warp up to a value dim of 128: sums over splits then stay within threads.
    warps = max(1, common["BLOCK_V"] // 128)
    run(Launch(combine_kernel, batch * kv_heads * rows, combined, warps, 2), query.device)


def _raw_dims(segment: SegmentTensors) -> tuple[int, int, int, int]:
    """Dim of a sharer head and width, of keys and of values."""
    return (
        segment.key.shape[3], segment.key.shape[1] * segment.key.shape[3],
        segment.value.shape[3], segment.value.shape[1] * segment.value.shape[3],
    )  # fmt: skip


def segment_width(segment: SegmentTensors) -> int:
    """The larger width of a sharer's flattened keys and values, padded to what a tile's side may be."""
    _, key_width, _, value_width = _raw_dims(segment)
    return block_of(max(key_width, value_width))


def absorbs_wide(segment: SegmentTensors, query: Tensor) -> bool:
    """Whether an absorbed segment's products are in float32."""
    return any(t.dtype not in (query.dtype, *arguments.QUANTISED) for t in (segment.key, segment.value)) or (
        query.dtype in (torch.float32, torch.float64)
    )


def dense(proj: Tensor, proj_in: Tensor | None) -> Tensor:
    """W (kv_heads, dim, width); of a low-rank one U A, in float32."""
    return arguments.rows(proj) if proj_in is None else proj.float() @ proj_in.float()


def _absorbed(common: dict, segment: SegmentTensors, query: Tensor, its_splits: int) -> Absorbed:
    """Launches what folds the queries through the key projector; scratch for what splits find."""
    batch, q_heads, q_len, _ = query.shape
    _, width, _, value_width = _raw_dims(segment)
    proj, value_proj = dense(segment.key_proj, segment.key_proj_in), dense(segment.value_proj, segment.value_proj_in)
    folded = query.new_empty((batch, q_heads, q_len, width), dtype=common["query"].dtype)
    shift = None
    if segment.key_bias is not None:
        shift = query.new_empty((batch, q_heads, q_len), dtype=torch.float32)
    key_bias = None if segment.key_bias is None else arguments.rows(segment.key_bias)
    value_bias = None if segment.value_bias is None else arguments.rows(segment.value_bias)
    wide, rows = proj.dtype != folded.dtype, common["GROUP"] * q_len
    block_rows, block = tiles_table.folding_tile(wide or folded.dtype == torch.float32, common["BLOCK_D"], rows, width)
    names = {
        "proj": proj, "proj_h": proj.stride(0), "proj_d": proj.stride(1), "bias": key_bias,
        "bias_h": 0 if key_bias is None else key_bias.stride(0), "out": folded, "shift": shift, "WIDTH": width,
        "WIDE": wide, "BLOCK_M": block_rows, "BLOCK_W": block,
    }  # fmt: skip
    kept = ("query", "query_b", "query_h", "query_t", "kv_heads", "q_len", "GROUP", "DIM", "BLOCK_D", "PRECISION")
    grid = batch * common["kv_heads"] * -(-rows // block_rows) * -(-width // block)
    run(
        Launch(
            absorb_kernel, grid, {name: common[name] for name in kept} | names, 8 if common["BLOCK_D"] > 128 else 4, 1
        ),
        query.device,
    )
    sums = query.new_empty((batch, q_heads * q_len, its_splits, value_width), dtype=torch.float32)
    return Absorbed(
        folded, shift, sums, value_proj, value_proj.stride(0), value_proj.stride(1), value_bias,
        0 if value_bias is None else value_bias.stride(0),
    )  # fmt: skip
