"""Numbers in the memory of a device that kernels find addresses in, brought there without waiting."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_KEPT = 64  # tables; one of 28 layers takes 10 KiB
_captured: list[tuple[Tensor, Tensor]] = []  # tables of CUDA graphs, which copy them at every replay


def table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """(numbers,) int64 on the device, for kernels of the current stream.

    Kept by its numbers: where the same tensors are fused again there is nothing to copy.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    if torch.cuda.is_current_stream_capturing():
        # A table of a graph is written when the graph runs: no other call may rely on it.
        _captured.append(_copied(numbers, device))
        return _captured[-1][1]
    return _kept(numbers, device, torch.cuda.current_stream(device).cuda_stream)[1]


@functools.lru_cache(maxsize=_KEPT)
def _kept(numbers: tuple[int, ...], device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    return _copied(numbers, device)


def _copied(numbers: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The table in pinned memory, which a copy without waiting needs, and on the device."""
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=True)
    return host, host.to(device, non_blocking=True)
