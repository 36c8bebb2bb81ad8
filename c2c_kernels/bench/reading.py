"""Reading memory and nothing else: what stands beside a line that memory bounds, in the same seconds."""

from __future__ import annotations

import math
from functools import cache
from itertools import cycle

import torch
from torch import Tensor

from c2c_kernels.bench import compiler, machine
from c2c_kernels.bench.work import Call, LeftOutError

NAME = "plain read"


def plain(size: float, limits: machine.Machine) -> Call:
    """Reads `size` bytes, to a few kilobytes, with the machine's threads, each time on from where it left off.

    Raises:
        LeftOutError: there is no compiled program that could.
    """
    try:
        program, data, (streams, ahead) = _prepared(limits.threads, limits.cache_bytes)
    except compiler.NoCompilerError as error:
        raise LeftOutError(str(error)) from error
    total = data.numel() * 4
    times = math.ceil(size / total)
    part = max(1, round(size / times / limits.threads / machine.GRAIN)) * machine.GRAIN
    starts = cycle(range(0, total - part * limits.threads + 1, part * limits.threads))

    def run() -> None:
        for _ in range(times):
            program.library.bench_read(data.data_ptr() + next(starts), part, limits.threads, streams, ahead)

    return run


@cache
def _prepared(threads: int, cache_bytes: int) -> tuple[compiler.Program, Tensor, tuple[int, int]]:
    """The program, a buffer beyond the last-level cache, and the pattern that reads it fastest."""
    program = compiler.build()
    if not program.parallel and threads > 1:
        raise compiler.NoCompilerError("the compiler has no OpenMP")
    data = torch.ones(machine.beyond_bytes(cache_bytes) // 4)
    return program, data, machine.fastest_pattern(program, threads, data)[1]
