"""Runs the Triton backend's launches from their compiled PTX in ptxsim, on CPU tensors: for tests and static_gpu.py."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

from shared_folder import shared_folder

from c2c_kernels.backends.triton import launch as launching
from c2c_kernels.backends.triton.offline import Compiled, compiled

backends = importlib.import_module("c2c_kernels.backends")  # the package's attribute of this name is a function
CHECKS = {"race": True, "uninit": "error", "global_race": True}


def simulator() -> ModuleType | None:
    """The ptxsim package, from PYTHONPATH or the folder shared/ in or beside the checkout; None where there is none."""
    found = shared_folder("ptxsim")
    if found is not None and str(found.parent) not in sys.path:
        sys.path.append(str(found.parent))
    try:
        import ptxsim
    except ImportError:
        return None
    return ptxsim


class Ran(NamedTuple):
    """A launch, what it was compiled to, and the simulator's counters (a `ptxsim.Result`)."""

    launch: launching.Launch
    built: Compiled
    counters: Any


class Simulator:
    """Compiles and simulates what is launched, for compute capability `arch` (80, 90); keeps it in `ran`.

    `checks`: options of ptxsim's launches beside CHECKS.
    """

    def __init__(self, arch: int, **checks: Any) -> None:
        self.ptxsim = simulator()
        if self.ptxsim is None:
            raise ImportError("ptxsim is wanted in shared/ in or beside the checkout, or on PYTHONPATH")
        self.target = launching.Target("cuda", arch)
        self.checks = {**CHECKS, **checks}
        self.ran: list[Ran] = []

    def __call__(self, launch: launching.Launch) -> None:
        built = compiled(launch, self.target)
        module = self.ptxsim.Module.from_triton(built.kernel)
        counters = module.launch_triton((launch.grid,), built.arguments, ranges=launch.reached, **self.checks)
        self.ran.append(Ran(launch, built, counters))

    @contextlib.contextmanager
    def installed(self) -> Iterator[Simulator]:
        """Operators on CPU tensors choose the Triton backend, and every launch of the block goes to the simulator."""
        with taken_over(self.target, self):
            yield self

    def names(self) -> list[str]:
        """The kernels launched, in order."""
        return [ran.launch.kernel.__name__ for ran in self.ran]


@contextlib.contextmanager
def taken_over(target: launching.Target, executor: launching.Executor) -> Iterator[None]:
    """Operators on CPU tensors choose the Triton backend, and hand their launches to `executor`."""
    kept, choices = backends.backends(), dict(backends._choices)
    ours = backends.Backend("triton", True, "", ("cpu",), ("bfloat16", "float16", "float32"), "simulated")
    backends._records = (ours, *(record for record in kept if record.name != "triton"))
    backends._choices.clear()
    try:
        with launching.executed_by(target, executor):
            yield
    finally:
        backends._records = kept
        backends._choices.clear()
        backends._choices.update(choices)
