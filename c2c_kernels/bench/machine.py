"""The machine's limits: read bandwidth beyond and inside the last-level cache, and the rate of multiply-adds."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from c2c_kernels.bench import compiler, topology
from c2c_kernels.bench.shapes import DTYPES

GRAIN = 16384  # bytes; what a thread reads is a multiple of it
_BEYOND = 256 * 2**20  # at least, and eight times the last-level cache
_SHRINK = 8  # times smaller than the system says the last-level cache may be found to be
_CACHE_GAIN = 1.5  # times the memory's rate at least, else the data is not in the cache
_PATTERNS = [(streams, ahead) for streams in (1, 2, 4) for ahead in (0, 4096)]
_PASSES, _MORE_PASSES = 2, 4  # through everything, and more where other processes seem to be at work
_RUNS, _SECONDS = 10, 0.1  # at least, for each pattern in each pass
_LONGEST = 2.0  # seconds after which there are no more runs
_ROUNDS = 200_000  # of multiply-adds: 0.3 ms and more
_PRODUCT = 1536  # rows and columns of torch's matrix product: some 30 ms on two cores
_SMALL_PRODUCT, _PROMISING = 512, 0.1  # what reaches less of the peak in a small one is not tried in the large one
_SHARE_ALONE = 0.8  # of the threads' rate if each were alone; less is not explained by clock rates

Reader = Callable[[Tensor], float]  # from a tensor to the bytes/s at which it is read


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
        peaks: FLOP/s by dtype of the factors, sums in float32; a multiply-add is counted as two.
        cache_bytes: size of the last-level cache.
        method: how each was measured.
        notes: what was left out and why.
        device: "cpu", or the torch device of a GPU: then `threads` and `cache_bytes` are 0, and the cache counts for
            nothing.
    """

    threads: int
    memory: float
    cache: float
    peaks: dict[str, float]
    cache_bytes: int
    method: str
    notes: tuple[str, ...] = ()
    device: str = "cpu"

    def floor(self, bytes_moved: float, flops: float, touched: float, dtype: str) -> Floor:
        """max(bytes / bandwidth, FLOPs / peak); the bandwidth is the cache's where all that is `touched` fits."""
        inside = touched <= self.cache_bytes
        reading = bytes_moved / (self.cache if inside else self.memory)
        computing = flops / self.peaks[dtype]
        if computing > reading:
            return Floor(computing, "compute")
        return Floor(reading, "cache" if inside else "memory")

    def limits(self) -> dict[str, float]:
        """Every rate by name."""
        peaks = {f"{dtype} peak": rate for dtype, rate in self.peaks.items()}
        cache = {"cache bandwidth": self.cache} if self.cache_bytes else {}
        return {"memory bandwidth": self.memory, **cache, **peaks}


def measure(threads: int | None = None) -> Machine:
    """Measures this machine with `threads` threads (torch's number by default), in some five seconds.

    A C program compiled here does it, with the widest vectors and the access pattern that reads fastest; without a
    compiler torch does (the sum of a large tensor, a matrix product), which reaches less. The peaks of bfloat16 and
    float16 are those of float32 unless the processor's dot products of bfloat16, or torch's matrix product, which may
    use units that the program does not know, reach more.
    """
    threads = threads or torch.get_num_threads()
    notes = _thread_notes(threads)
    program = None
    try:
        program = compiler.build()
    except compiler.NoCompilerError as error:
        notes.append(f"limits measured with torch, which reaches less than the machine can: {error}")
    with _torch_threads(threads):
        read = _torch_reader if program is None else _reader(program, threads)
        named, origin = topology.last_level_cache(threads)
        beyond, inside = torch.ones(beyond_bytes(named) // 4), torch.ones(named // 2 // 4)
        peaks, memory, cache = dict.fromkeys(DTYPES, 0.0), 0.0, 0.0
        for done in range(_PASSES + _MORE_PASSES):
            if done >= _PASSES and not _crowded(program, threads, peaks["float32"]):
                break
            peaks = _peaks(program, threads, peaks)
            memory, cache = max(memory, read(beyond)), max(cache, read(inside))
        cache, cache_bytes = _inside(read, named, cache, memory)
    if program is None:
        method = "torch: sum of a tensor, matrix product"
    else:
        method = f"C program, {program.bits}-bit vectors, {program.compiler}"
        notes += filter(None, [_crowded(program, threads, peaks["float32"])])
        if not program.parallel and threads > 1:
            notes.append("the compiler has no OpenMP: limits of one thread, times the number of threads")
    if origin.startswith("assumed"):
        notes.append(f"size of the last-level cache {origin}")
    if cache_bytes != named:
        notes.append(
            f"the system says {named / 2**20:.0f} MiB of last-level cache, of which this process gets a part: "
            f"{cache_bytes / 2**20:.0f} MiB are read faster than memory"
        )
    if cache < _CACHE_GAIN * memory:
        notes.append("the last-level cache is read hardly faster than memory")
    return Machine(threads, memory, cache, peaks, cache_bytes, method, tuple(notes))


def beyond_bytes(cache_bytes: int) -> int:
    """How much data is read to measure the memory: several times the last-level cache, as far as there is room."""
    wanted, room = max(_BEYOND, 8 * cache_bytes), topology.available_memory()
    return wanted if room is None else min(wanted, room // 4)


def _inside(read: Reader, named: int, cache: float, memory: float) -> tuple[float, int]:
    """(bytes/s, size) of the last-level cache: twice the largest buffer that is read faster than memory.

    A virtual machine is told the size of a cache that it has a part of: where half of that size is read at the rate
    `cache`, which is no faster than `memory`, smaller ones are tried.
    """
    rate, size = cache, named
    while rate < _CACHE_GAIN * memory and size > named // _SHRINK:
        size //= 2
        rate = read(torch.ones(size // 2 // 4))
    if size < named:
        cache = max(cache, read(torch.ones(named // 2 // 4)))  # again: was only the moment slow?
    return (cache, named) if rate < _CACHE_GAIN * memory or cache >= _CACHE_GAIN * memory else (rate, size)


def _peaks(program: compiler.Program | None, threads: int, before: dict[str, float]) -> dict[str, float]:
    """FLOP/s by dtype, not less than `before`."""
    if program is None:
        float32, dot_products = _product(torch.float32, before["float32"]), 0.0
    else:
        float32, dot_products = _multiply_adds(program, threads), _multiply_adds(program, threads, bfloat16=True)
    float32 = max(float32, before["float32"])
    return {
        "float32": float32,
        "bfloat16": _product(torch.bfloat16, max(before["bfloat16"], float32, dot_products)),
        "float16": _product(torch.float16, max(before["float16"], float32)),
    }


def _thread_notes(threads: int) -> list[str]:
    cores = len(topology.cores())
    if threads > cores:
        return [f"{threads} threads on {cores} core{'s' if cores > 1 else ''}"]
    return ["one core: nothing is measured with several threads"] if cores == 1 else []


def _crowded(program: compiler.Program | None, threads: int, peak: float) -> str:
    """Why several threads do not reach `peak` together that they would reach each alone; "" where they do."""
    together = min(threads, len(topology.cores()))
    if program is None or not program.parallel or together == 1:
        return ""
    alone = _multiply_adds(program, 1)
    if peak >= _SHARE_ALONE * together * alone:
        return ""
    return (
        f"{threads} threads reach {peak / alone:.1f} times the rate of one: other processes are busy, and limits and "
        "times are not to be relied on, or the threads share cores"
    )


def _reader(program: compiler.Program, threads: int) -> Reader:
    return lambda data: fastest_pattern(program, threads, data)[0]


def fastest_pattern(program: compiler.Program, threads: int, data: Tensor) -> tuple[float, tuple[int, int]]:
    """Bytes/s at which `data` is read, and with how many streams and how far ahead (arguments of bench_read)."""
    used = threads if program.parallel else 1
    part = data.numel() * 4 // used // GRAIN * GRAIN

    def seconds(pattern: tuple[int, int]) -> float:
        return _best(lambda: program.library.bench_read(data.data_ptr(), part, used, *pattern))

    shortest, pattern = min((seconds(pattern), pattern) for pattern in _PATTERNS)
    return threads * part / shortest, pattern


def _multiply_adds(program: compiler.Program, threads: int, *, bfloat16: bool = False) -> float:
    """FLOP/s of independent multiply-adds in float32, or of bfloat16 dot products; 0 where there are none."""
    library: ctypes.CDLL = program.library
    run = library.bench_bfloat16 if bfloat16 else library.bench_multiply_add
    each = library.bench_bfloat16_flops_per_round() if bfloat16 else library.bench_flops_per_round()
    if each == 0:
        return 0.0
    used = threads if program.parallel else 1
    return threads * _ROUNDS * each / _best(lambda: run(_ROUNDS, used))


def _torch_reader(data: Tensor) -> float:
    return data.numel() * 4 / _best(data.sum)


def _product(dtype: torch.dtype, least: float) -> float:
    """FLOP/s of torch's matrix product, `least` where it reaches less or has none for this dtype."""

    def rate(size: int, best: Callable[[Callable[[], object]], float]) -> float:
        a, b, out = (torch.ones(size, size, dtype=dtype) for _ in range(3))
        return 2 * size**3 / best(lambda: torch.mm(a, b, out=out))

    try:
        if rate(_SMALL_PRODUCT, _once) < _PROMISING * least:
            return least
        return max(least, rate(_PRODUCT, _best))
    except RuntimeError:
        return least


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best(run: Callable[[], object]) -> float:
    """Seconds of the shortest run: a limit is what the machine can do, and other processes only take from it."""
    run()
    times: list[float] = []
    while (len(times) < _RUNS or sum(times) < _SECONDS) and sum(times) < _LONGEST:
        times.append(_once(run))
    return min(times)


def _once(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
