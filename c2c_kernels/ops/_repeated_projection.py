"""`project_kv` for sizes that were checked before: what a sharer that goes on writing asks for in every layer.

The first call is checked and its parameters for the kernel are kept; the others fill in addresses and look whether
tensors share memory, which takes a quarter of the time.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import ENVIRONMENT_VARIABLE, native
from ..segment import SegmentTensors, SharerSegment
from ._library import needs_dispatcher

Signature = tuple[object, ...]  # a call's sizes, layouts and options


class Projection(NamedTuple):
    """A `project_kv` call: what decides whether another may share its parameters, and its tensors."""

    signature: Signature
    sources: list[Tensor]
    targets: list[Tensor]  # those that the caller gave


class _Projected(NamedTuple):
    parameters: list[int]
    places: list[int]  # of the addresses of sources and targets in the parameters
    reaches: list[int]  # bytes from first to last of every source and target
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype


_LIMIT = 256  # older ones are forgotten
_known: dict[Signature, _Projected] = {}


def describe(segment: SharerSegment, out: tuple[Tensor, Tensor] | None, backend: str | None) -> Projection | None:
    """None for what is always checked: tensors that are not plain CPU tensors, and the rarer parts of a segment."""
    if type(segment) is not SharerSegment or not (out is None or (type(out) in (tuple, list) and len(out) == 2)):
        return None
    rare = (segment.gate, segment.lengths, segment.positions, segment.index)
    if segment.visibility != "all" or any(tensor is not None for tensor in rare):
        return None
    described: list[object] = [
        torch.get_num_threads(),
        type(backend),
        os.environ.get(ENVIRONMENT_VARIABLE) if backend is None else backend,
    ]
    sources: list[Tensor] = []
    targets: list[Tensor] = []
    for found, tensors in ((sources, [getattr(segment, name) for name in native.PROJECTED]), (targets, out or ())):
        for tensor in tensors:
            if tensor is None and found is sources:
                described.append(None)
                continue
            if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
                return None
            if not tensor.is_cpu:
                return None
            described += (tensor.shape, tensor.stride(), tensor.dtype)
            found.append(tensor)
    return Projection(tuple(described), sources, targets)


def run(call: Projection) -> tuple[Tensor, Tensor] | None:
    """The kernel's results where the call is known and its tensors do not meet in memory, else None."""
    try:
        known = _known.get(call.signature)
    except TypeError:  # a backend that cannot be hashed
        return None
    if known is None or needs_dispatcher((*call.sources, *call.targets)):
        return None
    addresses = [tensor.data_ptr() for tensor in call.sources]
    if call.targets:
        key, value = call.targets
        targets = key.data_ptr(), value.data_ptr()
        meet = targets[0] == targets[1]
        for address, reach in zip(targets, known.reaches[len(addresses) :], strict=True):
            for other, other_reach in zip(addresses, known.reaches, strict=False):
                meet = meet or (other < address + reach and address < other + other_reach)
        if meet:
            return None  # the checks say what is wrong
    else:
        key, value = (call.sources[0].new_empty(shape, dtype=known.dtype) for shape in known.shapes)
        targets = key.data_ptr(), value.data_ptr()
    addresses += targets
    native.run_projection(known.parameters, known.places, addresses)
    return key, value


def remember(call: Projection, segment: SegmentTensors, key: Tensor, value: Tensor) -> None:
    """Keeps the parameters of a projection that has just succeeded on the cpu backend, into `key` and `value`."""
    parameters = native.projection_parameters(segment, key, value)
    if parameters is None:
        return
    present = [name for name in native.PROJECTED if getattr(segment, name) is not None]
    reaches = [
        (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))) * t.element_size()
        if t.numel()
        else 0
        for t in (*call.sources, key, value)
    ]
    if len(_known) >= _LIMIT:
        _known.clear()
    _known[call.signature] = _Projected(
        parameters, native.projection_places(present), reaches, (tuple(key.shape), tuple(value.shape)), key.dtype
    )
