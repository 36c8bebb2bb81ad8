"""A GPU's limits, and the time of a call on it. Not run on hardware yet: what it computes with is tested on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from c2c_kernels.bench.machine import Machine
from c2c_kernels.bench.shapes import DTYPES
from c2c_kernels.bench.timing import Effort, alternate

_FLUSHED = 4  # times the L2 cache that is written before every timed call
_LEAST_FLUSH = 256 * 2**20  # bytes
_AHEAD = 1_000_000  # clock cycles that the GPU sleeps while the host enqueues the call: half a millisecond
_READ = 2 * 2**30  # bytes of the buffer that is read to measure the memory, or as many as a quarter of it has room for
_PRODUCT = {"float32": 4096, "bfloat16": 8192, "float16": 8192}  # rows and columns of torch's matrix product
_EFFORT = Effort(seconds=0.2, least=10, most=50)


class Stopwatch:
    """Seconds of one call on the GPU by CUDA events, its inputs in memory and not in the L2 cache.

    Before a call a buffer of several times the L2 cache is overwritten, and the GPU sleeps while the host enqueues the
    call: what is timed is the GPU's work, not the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = max(_LEAST_FLUSH, _FLUSHED * l2_bytes(device))
        self._flushed = torch.empty(size, dtype=torch.int8, device=device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], Any]) -> float:
        self._flushed.zero_()
        torch.cuda._sleep(_AHEAD)
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3


@cache
def stopwatch(device: torch.device) -> Stopwatch:
    """One for each device: its buffer is large."""
    return Stopwatch(device)


def l2_bytes(device: torch.device) -> int:
    """Size of the GPU's L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the GPU."""
    return torch.cuda.mem_get_info(device)[0]


def name(device: torch.device) -> str:
    """What the GPU is called."""
    return torch.cuda.get_device_name(device)


def capability(device: torch.device) -> str:
    """The architecture, as "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def measure(device: torch.device) -> Machine:
    """Read bandwidth beyond the L2 cache, and the rate of torch's matrix product for each dtype, in a few seconds.

    The bandwidth is that of a sum, or of a copy (bytes read and written), whichever is more. The cache counts for
    nothing: before every timed call it is overwritten.
    """
    watch = stopwatch(device)
    size = min(_READ, free_bytes(device) // 4) // 4
    data, target = torch.ones(size, device=device), torch.empty(size, device=device)
    moved = {"sum": 4.0 * size, "copy": 8.0 * size}
    calls: dict[str, Callable[[], Any]] = {"sum": data.sum, "copy": partial(target.copy_, data)}
    times = _shortest(calls, watch)
    memory = max(moved[way] / times[way] for way in times)
    del data, target, calls
    peaks = {dtype: _product_rate(dtype, watch) for dtype in DTYPES}
    method = f"torch: sum and copy of {4 * size / 2**30:.1f} GiB, matrix product; CUDA events"
    return Machine(0, memory, memory, peaks, 0, method, (), str(device))


def _product_rate(dtype: str, watch: Stopwatch) -> float:
    size = _PRODUCT[dtype]
    a, b, out = (torch.randn(size, size, device=watch.device).to(DTYPES[dtype]) for _ in range(3))

    def product() -> Tensor:
        return torch.mm(a, b, out=out)

    return 2 * size**3 / _shortest({"product": product}, watch)["product"]


def _shortest(calls: dict[str, Callable[[], Any]], watch: Stopwatch) -> dict[str, float]:
    """Seconds of each call at its fastest, after one that is not timed."""
    for call in calls.values():
        call()
    return {way: timing.shortest for way, timing in alternate(calls, _EFFORT, warm=False, once=watch).items()}
