"""Kernels of csrc/cuda, compiled to PTX once per architecture and run by ptxsim on CPU tensors."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from gpu_simulator import CHECKS, simulator

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
ARCHS = (80, 90)


def missing() -> str:
    """Why kernels cannot be simulated here; "" where they can."""
    if simulator() is None:
        return "shared/ptxsim is not in or beside the checkout"
    if shutil.which("nvcc") is None:
        return "nvcc is not installed"
    return ""


@functools.cache
def ptx(source: str, arch: int) -> str:
    """The PTX of csrc/cuda/`source` for compute capability `arch`, kept in build/ptx until a source changes."""
    files = sorted((*SOURCES.glob("*"), *(ROOT / "csrc" / "include").glob("*")))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
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
    return kept.read_text()


@functools.cache
def module(source: str, arch: int) -> Any:
    """The ptxsim module of csrc/cuda/`source`. `launch(name, grid, block, [params], dynamic_shared, ranges=tensors)`
    takes the struct of parameters as bytes or as a ctypes structure; `ranges` are the tensors that it points to."""
    return simulator().Module(ptx(source, arch), **CHECKS)
