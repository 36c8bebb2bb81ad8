"""Runs the Triton backend's launches from their compiled PTX in ptxsim, on CPU tensors."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from c2c_kernels.backends.triton import launch as launching
from c2c_kernels.backends.triton.offline import Compiled, compiled

CHECKS = {"race": True, "uninit": "error", "global_race": True}


def simulator():
    """The ptxsim package, from PYTHONPATH or the folder shared/ in or beside the checkout; None where there is none."""
    root = Path(__file__).resolve().parents[1]
    for folder in (root / "shared", root.parent / "shared", Path(os.environ.get("C2C_SHARED", root / "shared"))):
        if (folder / "ptxsim").is_dir() and str(folder) not in sys.path:
            sys.path.append(str(folder))
    try:
        import ptxsim
    except ImportError:
        return None
    return ptxsim


class Simulator:
    """Compiles and simulates; keeps each launch, what it was compiled to and the simulator's counters."""

    def __init__(self, arch: int, **checks):
        self.ptxsim = simulator()
        self.target = launching.Target("cuda", arch)
        self.checks = {**CHECKS, **checks}
        self.ran: list[tuple[launching.Launch, Compiled, dict]] = []

    def __call__(self, launch: launching.Launch) -> None:
        built = compiled(launch, self.target)
        module = self.ptxsim.Module.from_triton(built.kernel)
        counters = module.launch_triton((launch.grid,), built.arguments, **self.checks)
        self.ran.append((launch, built, counters))

    @contextlib.contextmanager
    def installed(self):
        """Every launch of the block goes to the simulator."""
        with launching.executed_by(self.target, self):
            yield self

    def names(self) -> list[str]:
        """The kernels launched, in order."""
        return [launch.kernel.__name__ for launch, _, _ in self.ran]
