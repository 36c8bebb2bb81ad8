"""`project_kv`, written into a cache, beside matrix products of the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

import c2c_kernels as c2c
from c2c_kernels.backends import reference
from c2c_kernels.bench.check import disagreement
from c2c_kernels.bench.inputs import Device, Random, dequantised, project_with_torch, raw_segment, storage_bytes
from c2c_kernels.bench.shapes import DTYPES, Case
from c2c_kernels.bench.work import Call, Cost, Work, in_turn
from c2c_kernels.segment import to_tensors

_CHECKED = 64  # tokens, from both ends


def build(case: Case, device: Device = "cpu") -> Work:
    """The work of a projection case: `shared` tokens, one set of weights for every layer."""
    random, dtype = Random(case, device), DTYPES[case.dtype]
    segments = [raw_segment(case, random) for _ in range(case.layers)]
    shape = (case.batch, case.receiver.kv_heads, case.shared, case.receiver.head_dim)
    target = (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
    calls = [_ours(segment, target) for segment in segments]
    cost = _cost(case, segments[0], target)
    return Work(
        ours=in_turn(calls),
        problem=lambda: _problem(segments[0], calls[0](), dtype),
        costs=[cost],
        touched=len(segments) * cost.bytes,
        alternatives={"matmul": lambda: in_turn([_matmul(segment, dtype) for segment in segments])},
    )


def _ours(segment: c2c.SharerSegment, target: tuple[Tensor, Tensor]) -> Call:
    return lambda: c2c.project_kv(segment, out=target)


def _matmul(segment: c2c.SharerSegment, dtype: torch.dtype) -> Call:
    """Two products over flattened tokens, written into kept buffers: nothing is paid for fresh memory."""
    weights = []
    for proj in (segment.key_proj, segment.value_proj):
        assert isinstance(proj, Tensor)
        weights.append(proj.flatten(0, 1).T)
    rows = segment.key.shape[0] * segment.key.shape[2]
    buffers = [torch.empty(rows, weight.shape[1], dtype=dtype, device=weight.device) for weight in weights]

    def run() -> None:
        for raw, weight, buffer in zip(dequantised(segment, dtype), weights, buffers, strict=True):
            torch.mm(raw.transpose(1, 2).flatten(2).flatten(0, 1), weight, out=buffer)

    return run


def _cost(case: Case, segment: c2c.SharerSegment, target: tuple[Tensor, Tensor]) -> Cost:
    assert case.sharer is not None
    assert isinstance(segment.key_proj, Tensor) and isinstance(segment.value_proj, Tensor)
    read = (segment.key, segment.value, segment.key_scale, segment.value_scale, segment.key_proj, segment.value_proj)
    numbers = target[0].numel() + target[1].numel()
    return Cost(storage_bytes(*read, *target), 2 * numbers * case.sharer.width)


def _problem(segment: c2c.SharerSegment, ours: tuple[Tensor, Tensor], dtype: torch.dtype) -> str:
    length = segment.key.shape[2]
    tokens = sorted({*range(min(_CHECKED, length)), *range(max(0, length - _CHECKED), length)})
    theirs = project_with_torch(segment, dtype)
    packed = to_tensors(segment)
    parts = {
        name: tensor[:, :, tokens]
        for name in ("key", "value", "key_scale", "value_scale")
        if (tensor := getattr(packed, name)) is not None
    }
    oracle = reference.project_kv(packed._replace(**parts), None, torch.float64)
    for name, mine, other, wanted in zip(("key", "value"), ours, theirs, oracle, strict=True):
        if not mine.isfinite().all():
            return f"{name} has NaN or infinity"
        problem = disagreement(name, mine[:, :, tokens], other[:, :, tokens], wanted)
        if problem:
            return problem
    return ""
