"""From a case to a line: build, check, time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from c2c_kernels.bench import attention, backward, merging, projection, topology
from c2c_kernels.bench.machine import Machine
from c2c_kernels.bench.results import Beside, Line
from c2c_kernels.bench.shapes import DTYPES, Case
from c2c_kernels.bench.timing import Effort, alternate
from c2c_kernels.bench.work import Call, LeftOutError, Work, first_line

QUICK = Effort(seconds=0.1, least=4, most=60)
FULL = Effort(seconds=0.3, least=5, most=200)
_NO_MEMORY = "can't allocate memory"  # in the RuntimeError of torch's allocator
_COPIES = 4  # of a case's tensors that are in memory at once: drawn, projected, joined, for the check


def build(case: Case) -> Work:
    """The case's work."""
    builders: dict[str, Callable[[Case], Work]] = {
        "backward": backward.build,
        "project": projection.build,
        "merge": merging.build,
    }
    return builders.get(case.family.partition("-")[0], attention.build)(case)


def measure(case: Case, machine: Machine, effort: Effort) -> Line:
    """One line of the table.

    Args:
        case: what to measure, with torch's number of threads as it is.
        machine: its limits, for the floor.
        effort: how long.
    """
    line = _unmeasured(case)
    missing = _missing_memory(case)
    if missing:
        return line("left out", missing)
    try:
        with torch.no_grad():
            work = build(case)
        with torch.set_grad_enabled(case.family.startswith("backward")):
            problem = _raised(work.ours) or work.problem()
            if problem:
                return line("wrong", problem)
            return _timed(case, work, machine, effort)
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        return line("left out", f"{type(error).__name__}: {first_line(error)}")


def _raised(ours: Call) -> str:
    """What our own call raises, in one line, which is no right result; "" where it returns. Want of memory passes."""
    try:
        ours()
    except (RuntimeError, ValueError, TypeError) as error:
        if _NO_MEMORY in str(error):
            raise
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def _unmeasured(case: Case) -> Callable[[str, str], Line]:
    return lambda status, reason: Line(case.family, case.label, case.dtype, status, reason)


def _timed(case: Case, work: Work, machine: Machine, effort: Effort) -> Line:
    cost, floor = min(
        ((cost, machine.floor(cost.bytes, cost.flops, work.touched, case.dtype)) for cost in work.costs),
        key=lambda pair: pair[1].seconds,
    )
    contenders: dict[str, Call] = {"ours": work.ours}
    beside: dict[str, Beside] = {}
    for name, make in work.alternatives.items():
        try:
            call = make()
            call()
        except LeftOutError as error:
            beside[name] = Beside(left_out=str(error))
        except (RuntimeError, MemoryError) as error:
            beside[name] = Beside(left_out=first_line(error))
        else:
            contenders[name] = call
    timings = alternate(contenders, effort, warm=work.touched <= machine.cache_bytes)
    ours = timings.pop("ours")
    beside |= {name: Beside(timing, timing.median / ours.median) for name, timing in timings.items()}
    beside = {name: beside[name] for name in work.alternatives if name in beside}
    return Line(
        case.family, case.label, case.dtype, timing=ours, bytes=cost.bytes, flops=cost.flops, floor=floor.seconds,
        bound=floor.bound, fraction=floor.seconds / ours.median, beside=beside,
    )  # fmt: skip


def _missing_memory(case: Case) -> str:
    """Why the case does not fit into memory, "" where it does."""
    receiver = case.receiver
    tokens = case.own + case.shared
    numbers = 2 * case.batch * receiver.kv_heads * tokens * receiver.head_dim * case.layers
    wanted, room = _COPIES * numbers * DTYPES[case.dtype].itemsize, topology.available_memory()
    if room is None or wanted <= room:
        return ""
    return f"needs {wanted / 1e9:.1f} GB of memory, {room / 1e9:.1f} GB are there"
