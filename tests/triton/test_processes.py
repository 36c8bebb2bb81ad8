"""The Triton backend's tests, each file in a process of its own: in one process kernels are interpreted or compiled.

TRITON_INTERPRET is read when triton is imported. A file's own report is the message where it fails.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import c2c_kernels

HERE = Path(__file__).parent
INSTALLED = Path(c2c_kernels.__file__).parents[1]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_file(name: str, tmp_path, **environment) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", str(HERE / name)]
    paths = [str(INSTALLED), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        command,
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTEST_ADDOPTS": "", **environment},
        capture_output=True,
        text=True,
    )
    if result.returncode in (0, 5) and " passed" not in result.stdout:  # 5: the whole file is skipped
        reasons = [line for line in result.stdout.splitlines() if line.startswith("SKIPPED")]
        assert reasons, f"{name} has run nothing:\n{result.stdout[-4000:]}{result.stderr[-4000:]}"
        pytest.skip("; ".join(reasons))
    assert result.returncode == 0, f"{name}:\n{result.stdout[-20000:]}{result.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("interpreted_*.py")))
def test_interpreted(name, tmp_path):
    run_file(name, tmp_path, TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("compiled_*.py")))
def test_compiled(name, tmp_path):
    run_file(name, tmp_path, TRITON_INTERPRET="0")
