"""The Triton backend's tests, each file in a process of its own: in one process kernels are interpreted or compiled.

TRITON_INTERPRET is read when triton is imported. A file's own report is the message where it fails. On a GPU
(`pytest -m gpu`) the interpreter's cases run on device tensors, and those of gpu_*.py, which need one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import c2c_kernels

HERE = Path(__file__).parent
INSTALLED = Path(c2c_kernels.__file__).parents[1]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_file(name: str, *options: str, **environment) -> None:
    check(name, finished(name, *options, **environment))


def finished(name: str, *options: str, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *options, str(HERE / name)]
    paths = [str(INSTALLED), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        command,
        cwd=HERE,  # not the checkout: its package goes before the installed one there
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTEST_ADDOPTS": "", **environment},
        capture_output=True,
        text=True,
    )


def check(name: str, result: subprocess.CompletedProcess) -> None:
    if result.returncode in (0, 5) and " passed" not in result.stdout:  # 5: the whole file is skipped
        reasons = [line for line in result.stdout.splitlines() if line.startswith("SKIPPED")]
        assert reasons, f"{name} has run nothing:\n{result.stdout[-4000:]}{result.stderr[-4000:]}"
        pytest.skip("; ".join(reasons))
    assert result.returncode == 0, f"{name}:\n{result.stdout[-20000:]}{result.stderr[-4000:]}"


def without_gpu(name: str) -> subprocess.CompletedProcess:
    return finished(name, TRITON_INTERPRET=str(int(name.startswith("interpreted"))))


@pytest.fixture(scope="module")
def running(request):
    """Every chosen file's run, as many at once as there are cores; with pytest-xdist that is its processes' affair."""
    items = [item for item in request.session.items if item.name.startswith("test_without_gpu[")]
    chosen = [] if "PYTEST_XDIST_WORKER" in os.environ else [item.callspec.params["name"] for item in items]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield {name: pool.submit(without_gpu, name) for name in chosen}


# The longest before the others.
_LONG = ("interpreted_forward.py", "interpreted_demo.py", "interpreted_invariance.py", "compiled_targets.py")
_FILES = sorted(
    (path.name for start in ("interpreted", "compiled") for path in HERE.glob(f"{start}_*.py")),
    key=lambda name: (_LONG.index(name) if name in _LONG else len(_LONG), name),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", _FILES)
def test_without_gpu(name, running):
    check(name, running[name].result() if name in running else without_gpu(name))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize(
    "name", sorted(path.name for start in ("interpreted", "gpu") for path in HERE.glob(f"{start}_*.py"))
)
def test_on_gpu(name):
    """Compiling takes most of the time: with pytest-xdist on several cores."""
    spread = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    run_file(name, *spread, TRITON_INTERPRET="0", C2C_TRITON_DEVICE="cuda")
