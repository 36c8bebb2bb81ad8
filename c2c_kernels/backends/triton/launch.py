"""How a kernel is run: on the device of its tensors, in Triton's interpreter, or by whoever takes over (`executed_by`).

A launch is described before it happens, so that tools can compile the very kernels that a call runs, for a GPU that is
not there, and run them in a simulator.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for: backend "cuda", "hip" or "interpreter"; arch 80, 90, "gfx942", ...

    `name` is the device's own, "" where there is none; only a device with a name has tiles of its own (`tuned`).
    """

    backend: str
    arch: int | str
    name: str = ""


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: a `triton.jit` function.
        grid: how many programs.
        arguments: all arguments by name, compile-time ones too.
        warps, stages: compiler options.
        fusion: whether the compiler may make one rounding of a product and a sum.
        registers: of a thread at most, on CUDA; 0 leaves it to the compiler, which rather spills a few than take more
            than half of a multiprocessor's.
        reached: tensors that the kernel reaches by addresses in memory.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 2
    fusion: bool = True
    registers: int = 0
    reached: tuple[torch.Tensor, ...] = ()

    def options(self, backend: str) -> dict[str, Any]:
        """What the compiler is told beside the arguments."""
        found = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": self.fusion}
        return found | ({"maxnreg": self.registers} if self.registers and backend == "cuda" else {})


Executor = Callable[[Launch], None]
_taken_over: ContextVar[tuple[Target, Executor] | None] = ContextVar("c2c_triton_executor", default=None)


@contextlib.contextmanager
def executed_by(target: Target, executor: Executor) -> Iterator[None]:
    """Hands every launch of the block to `executor`, with tiles chosen for `target`."""
    token = _taken_over.set((target, executor))
    try:
        yield
    finally:
        _taken_over.reset(token)


def target_of(device: torch.device) -> Target:
    """What a launch on `device` is compiled for."""
    taken = _taken_over.get()
    if taken is not None:
        return taken[0]
    if triton.knobs.runtime.interpret:
        return Target("interpreter", 0)
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache
def _gpu(index: int) -> Target:
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Target("hip", found.gcnArchName.partition(":")[0], found.name)
    return Target("cuda", 10 * found.major + found.minor, found.name)


def run(launch: Launch, device: torch.device) -> None:
    """Launches on the current stream of `device`; a grid of no programs is no launch."""
    if launch.grid == 0:
        return
    taken = _taken_over.get()
    if taken is not None:
        taken[1](launch)
        return
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        launch.kernel[(launch.grid,)](**launch.arguments, **launch.options(target_of(device).backend))
