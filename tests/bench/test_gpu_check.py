"""`bench/gpu_check.sh` with a stand-in for Python, and the file that it writes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import gpu_results
import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu_check.sh"
REPORT = """<testsuites><testsuite tests="3">
<testcase name="test_a" /><testcase name="test_b"><skipped message="no xdist" /></testcase>
<testcase name="test_c"><failure message="short">assert 1 == 2</failure></testcase></testsuite></testsuites>"""
# Says what it is called with; `-` is the script's look for a GPU, which $LOOK answers; nothing can be imported.
PYTHON = """#!/bin/sh
if [ "$1" = - ]; then cat >/dev/null; exit "$LOOK"; fi
if [ "$1" = -c ]; then exit 1; fi
printf '%s\\n' "$*" >>"$LOG"
case "$*" in *pytest*) exit "$TESTS";; *"cli bench"*) exit "$BENCH";; esac
"""


def run(folder: Path, **outcomes: int) -> tuple[int, list[str]]:
    """Exit status of the script, and what it had Python do."""
    python, log = folder / "python", folder / "log"
    python.write_text(PYTHON)
    python.chmod(0o755)
    log.write_text("")
    given = {name: str(outcomes.get(name, 0)) for name in ("LOOK", "TESTS", "BENCH")}
    environment = {**os.environ, "PYTHON": str(python), "LOG": str(log), **given}
    result = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=60)
    return result.returncode, log.read_text().splitlines()


def test_tests_then_bench_then_one_file(tmp_path):
    status, calls = run(tmp_path)
    assert status == 0
    tests, bench, results = calls
    assert "pytest -q -m gpu" in tests and tests.endswith(
        "tests/triton_backend tests/cuda_backend tests/test_flash_attn.py"
    )
    assert "c2c_kernels.cli bench --device cuda --quick --json" in bench
    assert results.startswith("bench/gpu_results.py --tests")
    report = tests[tests.index("--junitxml") :].split()[1]
    assert f"--tests {report}" in results and f"--bench {bench.split()[-1]}" in results


@pytest.mark.parametrize("failed", ["TESTS", "BENCH"])
def test_what_fails_does_not_keep_the_rest_from_running(failed, tmp_path):
    status, calls = run(tmp_path, **{failed: 1})
    assert status == 1 and len(calls) == 3


def test_without_a_gpu_nothing_is_done(tmp_path):
    assert run(tmp_path, LOOK=1) == (2, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_script_says_what_is_missing():
    result = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "finds no GPU: nothing was done" in result.stderr or "has no " in result.stderr


def test_outcomes_of_tests(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(REPORT)
    assert gpu_results.tests(path) == {
        "passed": 1, "failed": 1, "skipped": 1,
        "problems": ["test_b: skipped: no xdist", "test_c: failure: assert 1 == 2"],
    }  # fmt: skip
    assert "did not come to an end" in gpu_results.tests(tmp_path / "none.xml")["problems"][0]


@pytest.mark.parametrize(
    ("report", "wrong", "bad"),
    [
        (REPORT, [], ["tests failed"]),
        ("<testsuite><testcase name='a' /></testsuite>", [], []),
        ("<testsuite><testcase name='a' /></testsuite>", ["decode: off by 3"], ["1 results of the bench are wrong"]),
        ("<testsuite><testcase name='a'><skipped message='no GPU' /></testcase></testsuite>", [], ["or none passed"]),
        ("<testsuite />", None, ["or none passed", "bench did not come to an end"]),
    ],
)
def test_one_file_for_a_device(report, wrong, bad, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    (tmp_path / "tests.xml").write_text(report)
    if wrong is not None:
        (tmp_path / "bench.json").write_text(json.dumps({"wrong": wrong, "lines": [1]}))
    given = ["--tests", str(tmp_path / "tests.xml"), "--bench", str(tmp_path / "bench.json"), "--seconds", "400"]
    assert gpu_results.main(given, tmp_path / "results") == (1 if bad else 0)
    data = json.loads((tmp_path / "results" / "nvidia-h100-80gb-hbm3.json").read_text())
    assert data["device"] == "NVIDIA H100 80GB HBM3" and data["seconds"] == 400
    assert (data["bench"] or {}).get("lines") == (None if wrong is None else [1])
    said = capsys.readouterr().out
    assert all(part in said for part in bad) and ("all good" in said) == (not bad)
