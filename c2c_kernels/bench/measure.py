"""From a case to a line: build, check, time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from c2c_kernels.bench import attention, backward, fusing, gpu, merging, projection, reading, topology
from c2c_kernels.bench.check import WrongResultError
from c2c_kernels.bench.inputs import Device
from c2c_kernels.bench.machine import Floor, Machine
from c2c_kernels.bench.results import Beside, Line
from c2c_kernels.bench.shapes import DTYPES, Case
from c2c_kernels.bench.timing import Effort, Timing, alternate
from c2c_kernels.bench.work import Call, Cost, LeftOutError, Work, first_line

QUICK = Effort(seconds=0.1, least=4, most=60)
FULL = Effort(seconds=0.3, least=5, most=200)
_NO_MEMORY = "can't allocate memory"  # in the RuntimeError of torch's allocator
_UNSUPPORTED = " on triton supports "  # in the ValueError of a call that the backend asked for does not run
_COPIES = 4  # of a case's tensors that are in memory at once: drawn, projected, joined, for the check


def build(case: Case, device: Device = "cpu") -> Work:
    """The case's work, its tensors on `device`."""
    builders: dict[str, Callable[[Case, Device], Work]] = {
        "backward": backward.build,
        "project": projection.build,
        "merge": merging.build,
        "fuse": fusing.build,
    }
    return builders.get(case.family.partition("-")[0], attention.build)(case, device)


def checked(case: Case, device: Device = "cpu") -> Work:
    """The case's work, whose result has been compared with the reference.

    Raises:
        WrongResultError: our result does not match, or our call raises.
        LeftOutError: the memory is too small, or the alternatives that the check needs cannot run.
    """
    missing = _missing_memory(case, torch.device(device))
    if missing:
        raise LeftOutError(missing)
    try:
        with torch.no_grad():
            work = build(case, device)
        with torch.set_grad_enabled(case.gradients):
            problem = _raised(work.ours) or work.problem()
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise LeftOutError(f"{type(error).__name__}: {first_line(error)}") from error
    if problem:
        raise WrongResultError(problem)
    return work


def measure(case: Case, machine: Machine, effort: Effort) -> Line:
    """One line of the table.

    Args:
        case: what to measure, with torch's number of threads as it is.
        machine: its limits, for the floor.
        effort: how long.
    """
    try:
        work = checked(case, machine.device)
    except WrongResultError as error:
        return Line(case.family, case.label, case.dtype, "wrong", str(error))
    except LeftOutError as error:
        return Line(case.family, case.label, case.dtype, "left out", str(error))
    cost, floor = _cheapest(case, work, machine)
    if floor.bound == "memory" and machine.device == "cpu":
        work.alternatives[reading.NAME] = partial(reading.plain, cost.bytes, machine)
    with torch.set_grad_enabled(case.gradients):
        timings, beside = _timed(work, machine, effort)
    ours = timings.pop("ours")
    beside |= {name: Beside(timing, timing.median / ours.median) for name, timing in timings.items()}
    return Line(
        case.family,
        case.label,
        case.dtype,
        timing=ours,
        beside={name: beside[name] for name in work.alternatives},
        **costs(case, work, machine, ours.median),
    )


def _cheapest(case: Case, work: Work, machine: Machine) -> tuple[Cost, Floor]:
    found = ((cost, machine.floor(cost.bytes, cost.flops, work.touched, case.dtype)) for cost in work.costs)
    return min(found, key=lambda pair: pair[1].seconds)


def costs(case: Case, work: Work, machine: Machine, seconds: float) -> dict[str, Any]:
    """bytes, flops, floor, bound and fraction of a line (see Line) that took `seconds`."""
    cost, floor = _cheapest(case, work, machine)
    return {
        "bytes": cost.bytes,
        "flops": cost.flops,
        "floor": floor.seconds,
        "bound": floor.bound,
        "fraction": floor.seconds / seconds,
    }


def _raised(ours: Call) -> str:
    """What our own call raises, in one line, which is no right result; "" where it returns. Want of memory
    and what the backend refuses pass."""
    try:
        ours()
    except (RuntimeError, ValueError, TypeError) as error:
        if _NO_MEMORY in str(error) or _UNSUPPORTED in str(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def _timed(work: Work, machine: Machine, effort: Effort) -> tuple[dict[str, Timing], dict[str, Beside]]:
    """Timings of ours and of the alternatives that run here, and the others with the reason."""
    contenders: dict[str, Call] = {"ours": work.ours}
    left_out: dict[str, Beside] = {}
    for name, make in work.alternatives.items():
        try:
            call = make()
            call()
        except LeftOutError as error:
            left_out[name] = Beside(left_out=str(error))
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            left_out[name] = Beside(left_out=f"{type(error).__name__}: {first_line(error)}")
        else:
            contenders[name] = call
    once = None if machine.device == "cpu" else gpu.stopwatch(torch.device(machine.device))
    return alternate(contenders, effort, warm=work.touched <= machine.cache_bytes, once=once), left_out


def _missing_memory(case: Case, device: torch.device) -> str:
    """Why the case does not fit into memory, "" where it does."""
    receiver = case.receiver
    tokens = case.own + case.shared
    numbers = 2 * case.batch * receiver.kv_heads * tokens * receiver.head_dim * case.layers
    wanted, room = _COPIES * numbers * DTYPES[case.dtype].itemsize, _free(device)
    if case.family.startswith("fuse"):
        wanted += fusing.weight_bytes(case)
    if room is None or wanted <= room:
        return ""
    return f"needs {wanted / 1e9:.1f} GB of memory, {room / 1e9:.1f} GB are there"


def _free(device: torch.device) -> int | None:
    """Bytes that there is room for, None where that is not known."""
    return gpu.free_bytes(device) if device.type == "cuda" else topology.available_memory()
