"""The figures of one case of the CUDA kernels on one architecture: ptxas's reports, machine code, simulator's counters.

What Triton's kernels do stands in the same table: static_gpu.py.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import sass
import static_cases
import torch
from cuda_simulator import Ran, Simulator, file_of, ptx
from static_records import Figures, Kernel, products

from c2c_kernels.backends import ENVIRONMENT_VARIABLE

SECTOR = 32  # bytes
REGISTERS, WARPS_OF_SM = 65536, 64
SHARED_OF_SM = {80: 164 * 1024, 90: 228 * 1024}
UNCHECKED = {"race": False, "uninit": "off", "global_race": False}  # the tests run the checks


class Usage(NamedTuple):
    """What ptxas says of a kernel, and its other instructions per matrix instruction (0 where nobody can tell)."""

    registers: int
    spills: int
    shared: int
    others: float


@functools.cache
def usage(source: str, arch: int) -> dict[str, Usage]:
    """Of every kernel of csrc/cuda/`source`.

    Raises:
        RuntimeError: ptxas waits after each wgmma of a kernel, since it finds registers of products in flight touched.
    """
    target, program = f"sm_{arch}a" if arch == 90 else f"sm_{arch}", sass.disassembler()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ["ptxas", "-v", f"-arch={target}", "-o", str(cubin), str(ptx(source, arch))]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        code = sass.disassembled(cubin, program) if program else {}
    if told := re.search(r".*wgmma.*serialized.*", text):
        raise RuntimeError(f"{source}: {told[0]}")
    found = {}
    for name, report in re.findall(r"entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", text, re.DOTALL):
        number = [
            re.search(pattern, report) for pattern in (r"Used (\d+)", r"(\d+) bytes spill stores", r"(\d+) bytes smem")
        ]
        others = sass.others_per_product(code[name]) if name in code else 0.0
        found[name] = Usage(*(int(match.group(1)) if match else 0 for match in number), others)
    return found


def kernel(ran: Ran, arch: int) -> Kernel:
    """A launch's figures."""
    launch, counters = ran
    used, warps = usage(file_of(launch.kernel), arch)[launch.kernel], launch.block // 32
    shared = used.shared + launch.shared
    blocks = min(
        REGISTERS // (-(-used.registers // 8) * 8 * 32 * warps),
        SHARED_OF_SM[arch] // (shared + 1024),
        WARPS_OF_SM // warps,
    )
    sectors, asked = (
        sum(counters[f"global_{way}_{what}"] for way in ("load", "store")) for what in ("sectors", "bytes")
    )
    requests = counters["global_load_requests"] + counters["global_store_requests"]
    passes = counters["shared_load_requests"] + counters["shared_store_requests"]
    return Kernel(
        launch.kernel, launch.grid, warps, used.registers, used.spills, shared, blocks * warps, sectors,
        round(sectors / requests, 2), round(asked / (SECTOR * sectors), 4),
        round(counters.bank_conflicts / passes, 4) if passes else 0.0,
        products(counters.ops), counters["mma_flops"], used.others,
    )  # fmt: skip


def takes(case: static_cases.StaticCase) -> bool:
    """Whether the case is one for these kernels; others are Triton's alone."""
    return case.shape.dtype == "bfloat16" and not case.shape.gradients


def figures(case: static_cases.StaticCase, arch: int) -> Figures:
    """Simulates a case, compares the result with the reference, and counts.

    A case that the backend refuses, or whose result is wrong, has a problem in place of figures.
    """
    made = static_cases.task(case, case.simulated)
    by_name = mock.patch.dict(os.environ, {ENVIRONMENT_VARIABLE: "cuda"})  # so that none goes to another backend
    try:
        with by_name, torch.no_grad(), Simulator(arch, **UNCHECKED).installed() as simulated:
            problem = made.problem()
    except ValueError as error:
        if "backend asked for. cuda: " not in str(error):
            raise
        return Figures(case.name, arch, problem=f"refused: {error}", backend="cuda")
    if problem:
        return Figures(case.name, arch, problem=f"wrong: {problem}", backend="cuda")
    kernels = tuple(kernel(ran, arch) for ran in simulated.ran)
    moved = sum(each.sectors for each in kernels) * SECTOR
    flops = sum(each.flops for each in kernels)
    cut = f"{case.heads} of {case.shape.receiver.kv_heads} KV heads" if case.heads else made.cut
    over = round(moved / made.least.bytes, 4), round(flops / made.least.flops, 4) if made.least.flops else 0.0
    return Figures(case.name, arch, cut, "", kernels, *over, backend="cuda")
