"""The machine's limits: read bandwidth beyond and inside the last-level cache, and the rate of multiply-adds."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from c2c_kernels.bench import compiler, topology

_GRAIN = 16384  # bytes; what a thread reads is a multiple of it
_BEYOND = 256 * 2**20  # at least, and eight times the last-level cache
_PATTERNS = [(streams, ahead) for streams in (1, 2, 4) for ahead in (0, 4096)]
_RUNS, _SECONDS = 15, 0.2  # at least, for each pattern
_ROUNDS = 200_000  # of multiply-adds: 0.3 ms and more
_SHARE_ALONE = 0.5  # of the threads' rate if each were alone; less is not explained by clock rates


@dataclass(frozen=True)
class Floor:
    """The shortest time that the machine's limits allow. `bound` is "memory", "cache" or "compute"."""

    seconds: float
    bound: str


@dataclass(frozen=True)
class Machine:
    """What the machine reaches with `threads` threads.

    Attributes:
        threads: in use for all figures.
        memory: bytes/s read out of memory.
        cache: bytes/s read out of the last-level cache.
        peak: FLOP/s in float32, a multiply-add counted as two.
        cache_bytes: size of the last-level cache.
        method: how each was measured.
        notes: what was left out and why.
    """

    threads: int
    memory: float
    cache: float
    peak: float
    cache_bytes: int
    method: str
    notes: tuple[str, ...] = ()

    def floor(self, bytes_moved: float, flops: float, touched: float) -> Floor:
        """max(bytes / bandwidth, FLOPs / peak); the bandwidth is the cache's where all that is `touched` fits."""
        inside = touched <= self.cache_bytes
        reading = bytes_moved / (self.cache if inside else self.memory)
        computing = flops / self.peak
        if computing > reading:
            return Floor(computing, "compute")
        return Floor(reading, "cache" if inside else "memory")


def measure(threads: int | None = None) -> Machine:
    """Measures this machine with `threads` threads (torch's number by default), in three to six seconds.

    A C program compiled here does it, with the widest vectors and the access pattern that reads fastest; without a
    compiler torch does (the sum of a large tensor, a matrix product), which reaches less.
    """
    threads = threads or torch.get_num_threads()
    cache_bytes, origin = topology.last_level_cache(threads)
    inside = torch.ones(cache_bytes // 2 // 4)
    beyond = torch.ones(_beyond_bytes(cache_bytes) // 4)
    notes = [f"size of the last-level cache {origin}"] if origin.startswith("assumed") else []
    if len(topology.cores()) == 1:
        notes.append("one core: nothing is measured with several threads")
    try:
        program = compiler.build()
    except compiler.NoCompilerError as error:
        notes.append(f"limits measured with torch, which reaches less than the machine can: {error}")
        limits = _with_torch(threads, inside, beyond)
    else:
        if not program.parallel and threads > 1:
            notes.append("the compiler has no OpenMP: limits of one thread, times the number of threads")
        limits = _with_program(program, threads, inside, beyond)
        alone = _multiply_adds(program.library, 1)
        if limits.peak < _SHARE_ALONE * threads * alone:
            notes.append(
                f"other processes are busy: {threads} threads reach {limits.peak / alone:.1f} times the rate of one; "
                "limits and times are not to be relied on"
            )
    return replace(limits, cache_bytes=cache_bytes, notes=tuple(notes))


def _beyond_bytes(cache_bytes: int) -> int:
    wanted, room = max(_BEYOND, 8 * cache_bytes), topology.available_memory()
    return wanted if room is None else min(wanted, room // 4)


def _with_program(program: compiler.Program, threads: int, inside: torch.Tensor, beyond: torch.Tensor) -> Machine:
    library, used = program.library, threads if program.parallel else 1
    scale = threads / used

    def bandwidth(data: torch.Tensor) -> float:
        part = data.numel() * 4 // used // _GRAIN * _GRAIN
        times = [
            _best(lambda s=streams, a=ahead: library.bench_read(data.data_ptr(), part, used, s, a))  # type: ignore[misc]
            for streams, ahead in _PATTERNS
        ]
        return scale * used * part / min(times)

    peak = scale * _multiply_adds(library, used)
    method = f"C program, {program.bits}-bit vectors, {program.compiler}"
    return Machine(threads, bandwidth(beyond), bandwidth(inside), peak, 0, method)


def _multiply_adds(library: ctypes.CDLL, threads: int) -> float:
    flops = _ROUNDS * library.bench_flops_per_round() * threads
    return flops / _best(lambda: library.bench_multiply_add(_ROUNDS, threads))


def _with_torch(threads: int, inside: torch.Tensor, beyond: torch.Tensor) -> Machine:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        size = 1536
        a, b, out = (torch.ones(size, size) for _ in range(3))
        peak = 2 * size**3 / _best(lambda: torch.mm(a, b, out=out))
        memory, cache = (data.numel() * 4 / _best(data.sum) for data in (beyond, inside))
    finally:
        torch.set_num_threads(before)
    return Machine(threads, memory, cache, peak, 0, "torch: sum of a tensor, matrix product")


def _best(run: Callable[[], object]) -> float:
    """Seconds of the shortest run: a limit is what the machine can do, and other processes only take from it."""
    run()
    times: list[float] = []
    while len(times) < _RUNS or sum(times) < _SECONDS:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)
