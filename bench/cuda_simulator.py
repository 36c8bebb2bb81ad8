"""Kernels of csrc/cuda, compiled to PTX once per architecture and run by ptxsim on CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gpu_simulator import CHECKS, simulator

from c2c_kernels.backends import cuda

backends = importlib.import_module("c2c_kernels.backends")  # the package's attribute of this name is a function

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
ARCHS = (80, 90)
FILES = {
    "decode": "decode.cu", "combine": "decode.cu", "absorb_bf16": "absorb_bf16.cu", "absorb_f16": "absorb_f16.cu",
    "prefill": "prefill_large.cu", "prefill_small": "prefill_small.cu", "prefill_wgmma": "prefill_wgmma.cu",
    "project": "project.cu", "project_wgmma": "project_wgmma.cu",
    "fuse_table": "fuse_table.cu", "fuse_bf16": "fuse_bf16.cu", "fuse_f16": "fuse_f16.cu",
    "merge": "states.cu", "quantize": "states.cu",
}  # fmt: skip


def file_of(kernel: str) -> str:
    """The source of a kernel."""
    if kernel.endswith("_64x512"):  # of fuse_kv
        return f"{kernel.removeprefix('c2c_').removesuffix('_64x512')}_large.cu"
    first, _, rest = kernel.removeprefix("c2c_").partition("_")
    return FILES.get(f"{first}_{rest.removeprefix('combine_').partition('_')[0]}") or FILES[first]


def missing() -> str:
    """Why kernels cannot be simulated here; "" where they can."""
    if cuda._cuda is None:
        return cuda._why_not
    if simulator() is None:
        return "shared/ptxsim is not in or beside the checkout"
    if shutil.which("nvcc") is None:
        return "nvcc is not installed"
    return ""


def included(file: Path) -> set[Path]:
    """A source and all that it includes of csrc."""
    found = {file}
    for name in re.findall(r'#include "([^"]+)"', file.read_text()):
        for folder in (SOURCES, ROOT / "csrc" / "include"):
            if (folder / name).exists():
                found |= included(folder / name)
    return found


@functools.cache
def ptx(source: str, arch: int) -> Path:
    """A file with the PTX of csrc/cuda/`source` for compute capability `arch`, kept in build/ptx.

    It is made anew when something that the source includes has changed.
    """
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(included(SOURCES / source)))).hexdigest()[:16]
    kept = ROOT / "build" / "ptx" / f"{Path(source).stem}-{arch}-{digest}.ptx"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        target = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            made = os.path.join(folder, "made.ptx")
            include = str(ROOT / "csrc" / "include")
            subprocess.run(
                ["nvcc", "-ptx", "-std=c++17", f"-arch={target}", "-I", include, "-o", made, str(SOURCES / source)],
                check=True,
            )
            os.replace(made, kept)
    return kept


@functools.cache
def module(source: str, arch: int) -> Any:
    """The ptxsim module of csrc/cuda/`source`. `launch(name, grid, block, [params], dynamic_shared, ranges=tensors)`
    takes the struct of parameters as bytes or as a ctypes structure; `ranges` are the tensors that it points to."""
    return simulator().Module(ptx(source, arch).read_text())


def parameters(launch: cuda.Launch) -> bytes:
    """A launch's struct with its tensor maps, as ptxsim has them."""
    params = bytearray(launch.params)
    for tiles in launch.maps:
        numbers = np.frombuffer((ctypes.c_uint16 * 1).from_address(tiles.data), np.uint16)
        strides = [*(stride // 2 for stride in reversed(tiles.stride)), 1]
        box = (1, 1, tiles.tokens, 64)
        made = simulator().TensorMap(numbers, box, swizzle=128, shape=tiles.size[::-1], strides=strides)
        params[tiles.at : tiles.at + 128] = made.data
    return bytes(params)


class Ran(NamedTuple):
    """A launch and the simulator's counters (a `ptxsim.Result`)."""

    launch: cuda.Launch
    counters: Any


class Simulator:
    """Runs what the `cuda` backend launches from PTX for compute capability `arch`; keeps it in `ran`.

    `maps`: whether its driver makes tensor maps. `checks`: options of ptxsim's launches beside CHECKS.
    """

    def __init__(self, arch: int, *, maps: bool = True, **checks: Any) -> None:
        self.arch, self.maps = arch, maps
        self.checks = {**CHECKS, **checks}
        self.ran: list[Ran] = []

    def __call__(self, launch: cuda.Launch) -> None:
        params = parameters(launch) if self.maps else launch.unmapped
        counters = module(file_of(launch.kernel), self.arch).launch(
            launch.kernel, launch.grid, launch.block, [params], dynamic_shared=launch.shared, ranges=launch.tensors,
            **self.checks,
        )  # fmt: skip
        self.ran.append(Ran(launch, counters))

    def names(self) -> list[str]:
        """The kernels launched, in order."""
        return [ran.launch.kernel for ran in self.ran]

    @contextlib.contextmanager
    def installed(self) -> Iterator[Simulator]:
        """Operators on CPU tensors choose the `cuda` backend, and every launch of the block comes here."""
        with chosen(), cuda.executed_by(self.arch, self):
            yield self


@contextlib.contextmanager
def chosen(module: Any = cuda) -> Iterator[None]:
    """Operators on CPU tensors choose the `cuda` backend, whose functions are those of `module`."""
    kept, choices, modules = backends.backends(), dict(backends._choices), dict(backends._modules)
    ours = backends.Backend("cuda", True, "", ("cpu",), ("bfloat16", "float16"), "simulated")
    backends._records = (ours, *(record for record in kept if record.name != "cuda"))
    backends._choices.clear()
    backends._modules["cuda"] = module
    try:
        yield
    finally:
        backends._records = kept
        for dictionary, was in ((backends._choices, choices), (backends._modules, modules)):
            dictionary.clear()
            dictionary.update(was)
