"""`merged_attention` on Triton: chooses between prefill and decode, and launches."""

from __future__ import annotations

import secrets

import torch
from torch import Tensor

from ...segment import SegmentTensors
from . import arguments, tiles_table
from .absorb import Absorbed, Folding
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
    common, choice, kinds = call_arguments(
        query, key, value, segments, attn_mask, is_causal, query_positions, lengths, scale, window, segment_window,
        softcap, absorbs,
    )  # fmt: skip
    sink_tensor, sinks_h = arguments.expanded(sinks, (q_heads,))
    results = {
        "out": out, "lse": lse, "mass": mass, "sinks": sink_tensor, "sinks_h": sinks_h,
        "BLOCK_R": 1 << (common["RUNS"] - 1).bit_length(),
    }  # fmt: skip
    rows, kv_heads = choice.rows, key.shape[1]
    choice = choice._replace(wide=False)  # or a segment that is closed would change the tiles of all
    if not any(absorbs) and not tiles_table.decodes(choice):
        tile, block_v = tiles_table.prefill_tile(choice), common["BLOCK_V"]
        tile, parts = tiles_table.relieved(choice, tile, kinds, common["SOFTCAP"], block_v)
        tokens = _tokens(tile, tiles_table.prefill_tile, choice, kinds)
        tokens = tiles_table.relieved_tokens(choice, tokens, kinds, common["SOFTCAP"])
        names = {
            "BLOCK_M": tile.rows, "BLOCK_V": block_v // parts, "PARTS": parts, "TOKENS": tokens, "STAGES": tile.stages,
            "PRECISION": tiles_table.prefill_precision(choice),
        }  # fmt: skip
        grid = batch * kv_heads * -(-rows // tile.rows) * parts
        registers = tiles_table.attention_registers(choice, tiles_table.burdened(kinds, common["SOFTCAP"]))
        run(
            Launch(prefill_kernel, grid, common | results | names, tile.warps, tile.stages, registers=registers),
            query.device,
        )
    elif rows and batch:
        _decode(common, results, choice, kinds, segments, absorbs, batch, query)
    return out, lse, mass


def call_arguments(
    query: Tensor, key: Tensor, value: Tensor, segments: list[SegmentTensors], attn_mask, is_causal, query_positions,
    lengths, scale, window, segment_window, softcap, absorbs: tuple[bool, ...] = (),
) -> tuple[dict, tiles_table.Call, list[arguments.Kind]]:  # fmt: skip
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
        target, max(block_d, block_v), query.dtype, q_len * group,
        any(kind.wide for kind, its_run in zip(kinds, runs, strict=True) if its_run.length),
        kinds[0].mask != 0,
    )  # fmt: skip
    positions, positions_b, positions_t = arguments.expanded(query_positions, (batch, q_len))
    common = {
        "query_positions": positions, "query_positions_b": positions_b, "query_positions_t": positions_t,
        "query": query, "query_b": query.stride(0), "query_h": query.stride(1), "query_t": query.stride(2),
        "runs": tuple(map(arguments.unspecialised, runs, (kind.align for kind in kinds))), "kv_heads": kv_heads,
        "q_len": q_len, "own_length": key.shape[2], "scale": float(scale),
        "softcap": float(softcap or 0.0), "window": arguments.own_window_number(window),
        "segment_window": arguments.window_number(segment_window), "RUNS": len(runs),
        "KINDS": tuple(kind.code for kind in kinds),
        "GROUP": group, "SOFTCAP": softcap is not None, "DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_D": block_d,
        "BLOCK_V": block_v, "PRECISION": choice.precision(),
    }  # fmt: skip
    return common, choice, kinds


def _tokens(tile: tiles_table.Tile, tile_of, choice: tiles_table.Call, kinds: list[arguments.Kind]) -> tuple[int, ...]:
    """Tokens of a tile for every run: fewer where a gate per head and token, or scales, are read beside them.

    Rows, warps and stages are the own cache's: a segment that is empty or closed changes no bit.
    """
    fewer = min(tile.tokens, tile_of(choice._replace(heavy=True)).tokens)
    return tuple(tiles_table.WIDE_TOKENS if kind.wide else fewer if kind.heavy else tile.tokens for kind in kinds)


def _decode(
    common: dict,
    results: dict,
    choice: tiles_table.Call,
    kinds: list[arguments.Kind],
    segments: list[SegmentTensors],
    absorbs: tuple[bool, ...],
    batch: int,
    query: Tensor,
) -> None:
    rows, kv_heads = choice.rows, common["kv_heads"]
    tile = tiles_table.decode_tile(choice)
    tokens = list(_tokens(tile, tiles_table.decode_tile, choice, kinds))
    counts = [common["own_length"], *(segment.length for segment in segments)]
    absorbs = (False, *(absorbs or (False,) * len(segments)))  # the own cache first
    all_rows = kv_heads * rows
    split_tokens = [tiles_table.split_tokens(rows, each.key.element_size()) for each in common["runs"]]
    for number, segment in enumerate(segments, 1):
        if absorbs[number]:
            single = absorbs_wide(segment, query)
            split_tokens[number] = tiles_table.raw_split_tokens(all_rows, segment.key.element_size(), single)
    numbers = [-(-count // split) for count, split in zip(counts, split_tokens, strict=True)]
    splits = sum(number for number, raw in zip(numbers, absorbs, strict=True) if not raw)
    raw_splits = sum(numbers) - splits
    absorbed: list[Absorbed | None] = [None] * len(counts)
    foldings = [Folding()] * len(counts)
    raws = [0, 0, 0, 0] * len(counts)
    folds, raw_programs, columns = 0, 0, 16
    for number, segment in enumerate(segments, 1):
        if absorbs[number]:
            absorbed[number], foldings[number], its_folds = _absorbed(common, segment, query, tile, numbers[number])
            raws[4 * number : 4 * number + 4] = _raw_dims(segment)
            tokens[number] = tiles_table.raw_tokens(segment_width(segment))
            folds += its_folds
            raw_programs += numbers[number] * -(-all_rows // foldings[number].tile)
            columns = max(
                columns, tiles_table.merged_columns(choice.target, common["BLOCK_V"], absorbed[number].value_proj)
            )
    states = query.new_empty((batch, all_rows, splits + raw_splits, 4), dtype=torch.float32)
    sums = query.new_empty((batch, all_rows, splits, common["VALUE_DIM"]), dtype=torch.float32)
    shared = {
        "states": states, "sums": sums, "splits": splits, "raw_splits": raw_splits, "BLOCK_M": tile.rows,
        "SPLITS": tuple(split_tokens), "absorbed": tuple(absorbed), "RAWS": tuple(raws), "FOLDINGS": sum(foldings, ()),
    }  # fmt: skip
    programs = folds + kv_heads * splits + raw_programs
    names = {
        "TOKENS": tokens, "STAGES": tile.stages, "folds": folds, "programs": programs,
        "call": secrets.randbits(61) << 1 | 1 << 62 if folds else 0,
    }  # fmt: skip
    registers = tiles_table.attention_registers(choice, tiles_table.burdened(kinds, common["SOFTCAP"]))
    options = {"warps": tile.warps, "stages": tile.stages, "registers": registers}
    run(Launch(split_kernel, batch * programs, common | shared | names, **options), query.device)
    kept = ("kv_heads", "q_len", "own_length", "RUNS", "KINDS", "GROUP", "VALUE_DIM", "BLOCK_V")
    merging = tiles_table.combine_tile(choice.target, tile.rows if folds else 1, common["BLOCK_V"])
    merged_rows, at_once, warps = merging
    names = {
        "BLOCK_C": merged_rows,
        "BLOCK_S": at_once,
        "BLOCK_W": columns,
        "lengths": tuple(map(arguments.odd, counts)),
    }
    combined = {name: common[name] for name in kept} | shared | results | names
    run(Launch(combine_kernel, batch * kv_heads * -(-rows // merged_rows), combined, warps, 2), query.device)


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


def _absorbed(
    common: dict, segment: SegmentTensors, query: Tensor, tile: tiles_table.Tile, its_splits: int
) -> tuple[Absorbed, Folding, int]:
    """Tensors of an absorbed segment with scratch, how its queries are folded, and how many programs of a row do."""
    batch, q_heads, q_len, _ = query.shape
    _, width, _, value_width = _raw_dims(segment)
    proj, value_proj = dense(segment.key_proj, segment.key_proj_in), dense(segment.value_proj, segment.value_proj_in)
    key_bias, value_bias = (
        None if bias is None else arguments.rows(bias) for bias in (segment.key_bias, segment.value_bias)
    )
    dtype, kv_heads = common["query"].dtype, common["kv_heads"]
    wide = proj.dtype != dtype
    block_rows, columns = tiles_table.folding_tile(wide or dtype == torch.float32, common["BLOCK_D"], tile.rows, width)
    of_head = tile.rows // block_rows * -(-width // columns)
    folding = Folding(
        block_rows, columns, int(wide), 1 << (kv_heads * of_head - 1).bit_length(),
        tiles_table.raw_rows(q_heads * q_len, segment_width(segment), tile.warps),
        int(target_of(query.device).backend == "cuda"),
    )  # fmt: skip
    single = absorbs_wide(segment, query)
    query_row = -(-width // 8) * 8

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return query.new_empty((batch, *shape), dtype=dtype)

    absorbed = Absorbed(
        proj, proj.stride(0), proj.stride(1), key_bias, 0 if key_bias is None else key_bias.stride(0),
        scratch(q_heads, q_len, query_row, dtype=dtype), query_row,
        None if key_bias is None else scratch(q_heads, q_len),
        scratch(kv_heads * of_head, dtype=torch.int64),
        scratch(q_heads * q_len, its_splits, value_width, dtype=torch.float32 if single else torch.float16),
        value_proj, value_proj.stride(0), value_proj.stride(1), value_bias,
        0 if value_bias is None else value_bias.stride(0),
    )  # fmt: skip
    return absorbed, folding, kv_heads * of_head
