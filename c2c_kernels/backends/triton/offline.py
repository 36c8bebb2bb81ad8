"""Kernels compiled for a GPU that is not there: what a launch would compile, and what the compiler says about it.

Not in a process where TRITON_INTERPRET is set: there kernels are Python functions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .launch import Launch, Target

# Bytes of shared memory that one block may have.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}
_REGISTERS, _WARPS_OF_SM = 65536, 64
_SHARED_OF_SM: dict[int | str, int] = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and the arguments left at run time, in order.

    Attributes:
        kernel: what `triton.compile` returned.
        arguments: values of the parameters that are not compiled in, tuples laid flat.
    """

    kernel: Any
    arguments: list[Any]


@dataclass(frozen=True)
class Usage:
    """What a thread and a block of a kernel take.

    Attributes:
        registers: 32-bit registers of a thread (vector registers on AMD).
        spills: bytes of stack of a thread; on AMD none where no instruction reaches it: scalar registers that are kept
            in vector registers have a place there too.
        shared: bytes of shared memory of a block.
        warps: warps of a block.
        resident_warps: warps that fit on a multiprocessor at once; 0 on AMD.
    """

    registers: int
    spills: int
    shared: int
    warps: int
    resident_warps: int


def compiled(launch: Launch, target: Target) -> Compiled:
    """Compiles what `launch` would run on `target`, specialised to its arguments as on a GPU."""
    gpu = GPUTarget(target.backend, target.arch, 32 if target.backend == "cuda" else 64)
    backend, function = make_backend(gpu), launch.kernel
    given = {**launch.arguments, **launch.options(target.backend), "debug": False}
    bound, special, found = create_function_from_signature(function.signature, function.params, backend)(**given)
    found, signature, constants, attributes = function._pack_args(backend, given, bound, special, found)
    source = ASTSource(function, signature, constants, attributes)
    kernel = triton.compile(source, target=gpu, options=found.__dict__)
    arguments: list[Any] = []
    for name, kind in signature.items():
        _flatten(kind, bound[name], arguments)
    return Compiled(kernel, arguments)


def _flatten(kind: Any, value: Any, into: list[Any]) -> None:
    if isinstance(kind, tuple):
        for each, part in zip(kind, value, strict=True):
            _flatten(each, part, into)
    elif kind != "constexpr":
        into.append(value)


def usage(kernel: Any, target: Target) -> Usage:
    """What the compiler's output says about registers, spills and shared memory."""
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        spilled = _number(r"\.private_segment_fixed_size:\s*(\d+)", text) if "scratch_store" in text else 0
        return Usage(_number(r"\.vgpr_count:\s*(\d+)", text), spilled, shared, warps, 0)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        text = _run("cuobjdump", "--dump-resource-usage", binary).stdout
    registers, stack = _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)
    blocks = min(
        _REGISTERS // (_rounded(registers, 8) * 32 * warps),
        _SHARED_OF_SM[target.arch] // (shared + 1024),
        _WARPS_OF_SM // warps,
    )
    return Usage(registers, stack, shared, warps, blocks * warps)


def serialised(kernel: Any) -> bool:
    """Whether sm_90's products wait for one another, one `wgmma` at a time.

    The assembler makes them, and says so, where it finds a product's sums read or written elsewhere while the product
    may be under way.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        report = _run("ptxas", "--verbose", "--gpu-name", "sm_90a", source, "-o", Path(folder) / "kernel.cubin").stderr
    return "are serialized" in report


def _run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs one of the CUDA tools that triton brings along."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True)


def _rounded(number: int, to: int) -> int:
    return -(-number // to) * to


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern!r}:\n{text[-2000:]}")
    return int(found.group(1))
