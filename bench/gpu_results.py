"""Puts what gpu_check.sh found into one file, bench/results/<device>.json. Exit status 1 where that is not all good."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

RESULTS = Path(__file__).resolve().parent / "results"
_OUTCOMES = ("failure", "error", "skipped")


def tests(path: Path) -> dict[str, Any]:
    """Outcomes by pytest's JUnit report at `path`: numbers, and the text of what did not pass."""
    if not path.exists():
        return {"passed": 0, "failed": 0, "skipped": 0, "problems": ["the tests did not come to an end"]}
    counts, problems = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        outcome = next((child for child in case if child.tag in _OUTCOMES), None)
        if outcome is None:
            counts["passed"] += 1
            continue
        counts["skipped" if outcome.tag == "skipped" else "failed"] += 1
        text = (outcome.text or outcome.get("message") or "").strip()
        problems.append(f"{case.get('name')}: {outcome.tag}: {text[-4000:]}")
    if not counts["passed"] and not problems:
        problems.append("no test was run")
    return {**counts, "problems": problems}


def file_name(device: str) -> str:
    """A device's name as a file's: "NVIDIA H100 80GB HBM3" as nvidia-h100-80gb-hbm3.json."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def collect(tests_path: Path, bench_path: Path, device: str, seconds: int) -> tuple[dict[str, Any], list[str]]:
    """The file's content, and what is not good."""
    found = tests(tests_path)
    bench = json.loads(bench_path.read_text(encoding="utf-8")) if bench_path.exists() else None
    bad = [] if found["passed"] and not found["failed"] else ["tests failed, or none passed"]
    if bench is None:
        bad.append("the bench did not come to an end")
    elif bench["wrong"]:
        bad.append(f"{len(bench['wrong'])} results of the bench are wrong")
    return {"device": device, "seconds": seconds, "tests": found, "bench": bench}, bad


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS) -> int:
    """Writes the file; returns the exit status."""
    parser = argparse.ArgumentParser(description="Results of gpu_check.sh as one file.")
    parser.add_argument("--tests", type=Path, required=True, help="pytest's JUnit report")
    parser.add_argument("--bench", type=Path, required=True, help="what c2c-kernels bench --json wrote")
    parser.add_argument("--seconds", type=int, required=True, help="how long all of it took")
    options = parser.parse_args(arguments)
    import torch

    device = torch.cuda.get_device_name()
    data, bad = collect(options.tests, options.bench, device, options.seconds)
    results.mkdir(exist_ok=True)
    path = results / file_name(device)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"gpu_check: {path} after {options.seconds} s; {'; '.join(bad) or 'all good'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
