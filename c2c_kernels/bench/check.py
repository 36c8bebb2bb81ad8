"""What counts as right: DESIGN.md, style rule 9, as in tests/error_rule.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import c2c_kernels as c2c
from c2c_kernels.backends import reference
from c2c_kernels.bench.inputs import AttentionInputs
from c2c_kernels.segment import SLOTS, SegmentTensors, to_tensors

ULPS = 4
GRADIENT_ULPS = 8  # weights are recomputed from a rounded log-sum-exp
_PER_ROW = ("key", "value", "key_scale", "value_scale")  # what a segment in the bench has for each batch row
_ELSEWHERE = 4.0  # how much larger errors may be among all rows than among those with an oracle


class WrongResultError(Exception):
    """A result does not match the reference, in one line; it is not timed."""


def bound(ours: Tensor, torchs: Tensor, oracle: Tensor, ulps: int = ULPS) -> float:
    """The largest error allowed: twice that of PyTorch in the same dtype, plus a few ulp of the largest number."""
    largest = max(1.0, oracle.abs().max().item())
    return 2 * _error(torchs, oracle) + ulps * torch.finfo(ours.dtype).eps * largest


def disagreement(name: str, ours: Tensor, torchs: Tensor, oracle: Tensor, ulps: int = ULPS) -> str:
    """Why `ours` is not right, "" where it is."""
    if not ours.isfinite().all():
        return f"{name} has NaN or infinity"
    error, allowed = _error(ours, oracle), bound(ours, torchs, oracle, ulps)
    if error <= allowed:
        return ""
    return f"{name} is off by {error:.2g}; allowed is {allowed:.2g} (PyTorch is off by {_error(torchs, oracle):.2g})"


def attention_problem(inputs: AttentionInputs, ours: Tensor, torchs: Tensor) -> str:
    """Compares some rows with the reference in float64, and all of them with PyTorch's result; "" where right."""
    picked = list(_oracle_rows(inputs))
    oracle = torch.cat([row for *_, row in picked])
    mine, theirs = (torch.cat([out[b, heads, i] for b, heads, i, _ in picked]) for out in (ours, torchs))
    problem = disagreement("out", mine, theirs, oracle)
    if problem:
        return problem
    allowed = _ELSEWHERE * (bound(mine, theirs, oracle) + _error(theirs, oracle))
    difference = _error(ours, torchs)
    if difference <= allowed:
        return ""
    return f"out is {difference:.2g} from PyTorch's in a row without an oracle; expected is {allowed:.2g} at most"


def head_segment(segment: c2c.SharerSegment, row: int, kv_head: int) -> SegmentTensors:
    """What one receiver head sees of one batch row, projected by the reference in float64."""
    packed = to_tensors(segment)
    here = slice(row, row + 1)
    cut: dict[str, Any] = {name: t[here] for name in _PER_ROW if (t := getattr(packed, name)) is not None}
    for name in ("key", "value"):
        proj = getattr(packed, f"{name}_proj")
        if proj is None:
            cut[name] = cut[name][:, kv_head : kv_head + 1]
        else:
            cut[f"{name}_proj"] = proj[kv_head : kv_head + 1]
    key, value = reference.project_kv(packed._replace(**cut), None, torch.float64)
    return SegmentTensors._make((key, value, *(None,) * (len(SLOTS) - 2), False))


def _oracle_rows(inputs: AttentionInputs) -> Iterator[tuple[int, slice, int, Tensor]]:
    """(batch row, query heads, query, out of these heads) of first and last row, head and query, and one between."""
    batch, q_heads, q_len, head_dim = inputs.query.shape
    kv_heads, own = inputs.key.shape[1:3]
    group = q_heads // kv_heads
    for row, kv_head in {(0, kv_heads - 1), (batch - 1, 0)}:
        segments = [head_segment(segment, row, kv_head) for segment in inputs.segments]
        heads = slice(kv_head * group, (kv_head + 1) * group)
        for query in {0, q_len // 2, q_len - 1}:
            seen = own - q_len + query + 1
            out, *_ = reference.merged_attention(
                inputs.query[row : row + 1, heads, query : query + 1],
                inputs.key[row : row + 1, kv_head : kv_head + 1, :seen],
                inputs.value[row : row + 1, kv_head : kv_head + 1, :seen],
                segments, None, False, None, None, head_dim**-0.5, None, None, None, None, torch.float64,
            )  # fmt: skip
            yield row, heads, query, out[0, :, 0]


def _error(result: Tensor, wanted: Tensor) -> float:
    return (result.double() - wanted.double()).abs().max().item()
