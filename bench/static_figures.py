"""The figures of one case on one architecture: from the compiler's reports and the simulator's counters."""

from __future__ import annotations

from typing import Any

import torch
from gpu_simulator import Ran, Simulator, taken_over
from static_cases import StaticCase, task
from static_records import Figures, Kernel, products

from c2c_kernels.backends.triton.launch import Launch
from c2c_kernels.backends.triton.offline import compiled, usage

SECTOR = 32  # bytes
# The tests run the simulator's checks; here it only counts.
_UNCHECKED = {"race": False, "uninit": "off", "global_race": False}


def figures(case: StaticCase, arch: int) -> Figures:
    """Compiles, simulates, compares the result with the reference, and counts.

    A case that the backend refuses, or whose result is wrong, has a problem in place of figures.

    Raises:
        RuntimeError: what was simulated is not compiled as the true shape is.
    """
    shape = case.simulated
    made = task(case, shape)
    try:
        with torch.set_grad_enabled(shape.gradients), Simulator(arch, **_UNCHECKED).installed() as simulated:
            problem = made.problem()
    except ValueError as error:
        if " on triton " not in str(error):
            raise
        return Figures(case.name, arch, problem=f"refused: {error}")
    if problem:
        return Figures(case.name, arch, problem=f"wrong: {problem}")
    built = [ran.built.kernel for ran in simulated.ran]
    if shape != case.shape:
        _compare(case, simulated)
    moved = sum(_sectors(ran.counters) for ran in simulated.ran) * SECTOR
    flops = sum(ran.counters["mma_flops"] for ran in simulated.ran)
    receiver = case.shape.receiver
    return Figures(
        case.name,
        arch,
        cut=f"{case.heads} of {receiver.kv_heads} KV heads" if shape != case.shape else made.cut,
        kernels=tuple(
            _kernel(ran, usage(kernel, simulated.target)) for ran, kernel in zip(simulated.ran, built, strict=True)
        ),
        bytes_over_least=round(moved / made.least.bytes, 4),
        flops_over_least=round(flops / made.least.flops, 4) if made.least.flops else 0.0,
    )


def _compare(case: StaticCase, simulated: Simulator) -> None:
    """Sees to it that the true shape launches the very code that was simulated."""
    launches: list[Launch] = []
    whole = task(case, case.shape)
    with torch.set_grad_enabled(case.shape.gradients), taken_over(simulated.target, launches.append):
        whole.call()
    true = [compiled(launch, simulated.target).kernel.hash for launch in launches]
    if true != [ran.built.kernel.hash for ran in simulated.ran]:
        raise RuntimeError(f"{case.name}: compiled otherwise than {case.heads} of its KV heads are")


def _sectors(counters: Any) -> int:
    return counters["global_load_sectors"] + counters["global_store_sectors"]


def _kernel(ran: Ran, used: Any) -> Kernel:
    counters = ran.counters
    sectors, asked = _sectors(counters), counters["global_load_bytes"] + counters["global_store_bytes"]
    requests = counters["global_load_requests"] + counters["global_store_requests"]
    shared = counters["shared_load_requests"] + counters["shared_store_requests"]
    return Kernel(
        ran.launch.kernel.__name__,
        ran.launch.grid,
        used.warps,
        used.registers,
        used.spills,
        used.shared,
        used.resident_warps,
        sectors,
        round(sectors / requests, 2),
        round(asked / (SECTOR * sectors), 4),
        round(counters.bank_conflicts / shared, 4) if shared else 0.0,
        products(counters.ops),
        counters["mma_flops"],
    )
