"""`project_kv` on Triton: one launch for keys and values; low-rank projectors take one more for W = U A."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...segment import Rope, SegmentTensors
from . import arguments
from .arguments import half_of, rotation_of, wide_half
from .launch import Launch, run, target_of
from .project import project_kernel

_BLOCK_TOKENS = 64


def project(segment: SegmentTensors, rope: Rope | None, key_out: Tensor, value_out: Tensor) -> None:
    """Writes the segment in receiver space to key_out and value_out, (batch, kv_heads, len, dim) of any strides."""
    remove = rope.remove if rope is not None else None
    apply = rope.apply if rope is not None else None
    low_rank = segment.key_proj_in is not None or segment.value_proj_in is not None
    both = segment.key_proj is None and remove is not None and apply is not None
    if low_rank or (both and remove[0].shape[2] != apply[0].shape[2]):
        # Into what the second launch starts from: A x per token, or keys without their rotation.
        segment, remove = _first_stage(segment, remove), None
    _launch(segment, remove, apply, key_out, value_out)


def _first_stage(segment: SegmentTensors, remove) -> SegmentTensors:
    """A x of halves whose projector is U A; other halves with scales, index and rotation taken care of."""
    fields: dict[str, Any] = {}
    halves = []
    for name in ("key", "value"):
        raw, proj, inner = (getattr(segment, f"{name}{end}") for end in ("", "_proj", "_proj_in"))
        like = raw if proj is None else proj
        dtype = torch.float32 if like.dtype in (torch.int8, torch.float8_e4m3fn, torch.float64) else like.dtype
        heads, dim = (raw.shape[1], raw.shape[3]) if inner is None else (1, inner.shape[0])
        # Rows start at multiples of 16 bytes, whatever the rank.
        out = raw.new_empty((raw.shape[0], heads, segment.length, -(-dim // 8) * 8), dtype=dtype)[..., :dim]
        halves.append((None if inner is None else inner.unsqueeze(0), out))
        fields |= {name: out, f"{name}_proj_in": None, f"{name}_scale": None}
    stage = segment._replace(key_bias=None, value_bias=None)
    if halves[0][1].shape[1] == halves[1][1].shape[1]:
        stage = stage._replace(key_proj=halves[0][0], value_proj=halves[1][0])
        _launch(stage, remove, None, halves[0][1], halves[1][1])
    else:  # one half has a full-rank projector and keeps its heads: each in a launch of its own
        for name, (proj, out), rotation in zip(("key", "value"), halves, (remove, None), strict=True):
            raw, scale = getattr(segment, name), getattr(segment, f"{name}_scale")
            one = stage._replace(key=raw, value=raw, key_scale=scale, value_scale=scale, key_proj=proj, value_proj=proj)
            _launch(one, rotation, None, out, None)
    return segment._replace(selected=None, **fields)


def _launch(segment: SegmentTensors, remove, apply, key_out: Tensor, value_out: Tensor | None) -> None:
    """One launch with projectors of full rank. value_out None: keys alone."""
    key = half_of(segment.key, segment.key_scale, segment.key_proj, segment.key_bias, key_out)
    values = key_out[..., :0] if value_out is None else value_out
    value = half_of(segment.value, segment.value_scale, segment.value_proj, segment.value_bias, values)
    batch, kv_heads, length, _ = key_out.shape
    target = target_of(key_out.device)
    lengths = arguments.contiguous(segment.lengths)
    index = arguments.expanded(segment.selected, (batch, length))
    block_pairs = min(64, max(16, 1 << ((max(key.dim, value.dim) + 1) // 2 - 1).bit_length()))
    wide = wide_half(segment.key, segment.key_proj), wide_half(segment.value, segment.value_proj)
    tiles = sum(-(-((dim + 1) // 2) // block_pairs) for dim in (key.dim, value.dim))
    # Numbers of a token that one product takes; more of them in float32 spill registers on sm_80.
    exact = segment.key.dtype == segment.value.dtype and segment.key.dtype in (torch.bfloat16, torch.float16)
    block_width = 16 if any(wide) or torch.float32 in (segment.key.dtype, segment.value.dtype) else 32
    # One stage of int8 and float8: two take too many registers, and on sm_90 factors that are made in registers are
    # overwritten by the next stage while wgmma reads them (triton 3.7.1).
    stages = 2 if exact or block_width == 16 else 1
    names = {
        "key": key, "value": value, "rotation": rotation_of(remove, apply),
        "selection": arguments.Selection._make((lengths, *index, segment.key.shape[2])), "kv_heads": kv_heads,
        "length": length, "KEY_E4M3": segment.key.dtype == torch.float8_e4m3fn,
        "VALUE_E4M3": segment.value.dtype == torch.float8_e4m3fn, "REMOVES": remove is not None,
        "APPLIES": apply is not None, "KEY_WIDE": wide[0], "VALUE_WIDE": wide[1], "BLOCK_M": _BLOCK_TOKENS,
        "BLOCK_P": block_pairs, "BLOCK_K": block_width, "STAGES": stages,
        "PRECISION": "tf32x3" if target.backend == "cuda" else "ieee",
    }  # fmt: skip
    grid = batch * kv_heads * -(-length // _BLOCK_TOKENS) * tiles
    run(Launch(project_kernel, grid, names, 4, stages), key_out.device)
