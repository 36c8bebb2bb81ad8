"""What the Triton kernels do on a GPU that is not there: compiler's reports and simulator's counters, against limits.

    python bench/static_gpu.py            writes bench/static_gpu.json and bench/static_gpu.md
    python bench/static_gpu.py --check    writes nothing; exit status 1 where a figure is worse than LIMITS allows
    python bench/static_gpu.py --filter decode --print    only cases with these words; prints the tables

Needs triton, and ptxsim in shared/ in or beside the checkout; --check passes without, and says so. Takes two to three
minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from static_limits import HELD, NOT_REACHED, Limit, not_reached, problems
from static_page import page
from static_records import Figures

HERE = Path(__file__).resolve().parent
ARCHS = (80, 90)

# Of the lines that match a figure the last one counts. Bounds of lines that are NOT_REACHED or HELD are the present
# values, rounded up: where a kernel gets better, lower them.
LIMITS: list[Limit] = [
]


def figures_of(case: str, arch: int) -> Figures:
    """Of one case by name, in a process of its own."""
    import static_cases
    import static_figures
    import torch

    torch.set_num_threads(1)
    return static_figures.figures(next(c for c in static_cases.cases() if c.name == case), arch)


def collect(words: str) -> list[Figures]:
    """All cases whose names have all these words, on every architecture."""
    import static_cases

    from c2c_kernels.bench.shapes import matches

    wanted = [(case.name, arch) for arch in ARCHS for case in static_cases.cases() if matches(case.name, words)]
    workers = min(len(wanted), len(os.sched_getaffinity(0))) or 1
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(figures_of, *zip(*wanted, strict=True)))


def unavailable() -> str:
    """Why nothing can be looked at here, "" where it can."""
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from gpu_simulator import simulator

    return "" if simulator() else "shared/ptxsim is not in or beside the checkout"


def kept() -> list[Figures]:
    """The figures in bench/static_gpu.json."""
    data = json.loads((HERE / "static_gpu.json").read_text(encoding="utf-8"))
    return [Figures.from_json(each) for each in data["figures"]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Static figures of the Triton kernels.")
    parser.add_argument("--check", action="store_true", help="compare with the limits, write nothing")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases with all these words; writes nothing")
    parser.add_argument("--print", action="store_true", help="print the tables")
    options = parser.parse_args(arguments)
    why = unavailable()
    if why:
        print(f"static figures skipped: {why}")
        return 0 if options.check else 1
    began = time.perf_counter()
    import triton

    found = collect(options.filter)
    wrong, missed = problems(found, LIMITS, whole=not options.filter), not_reached(found, LIMITS)
    text = page(found, missed, triton.__version__)
    if options.print:
        print(text)
    if not (options.check or options.filter):
        data = {"triton": triton.__version__, "figures": [figures.as_json() for figures in found]}
        (HERE / "static_gpu.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (HERE / "static_gpu.md").write_text(text, encoding="utf-8")
    elif not options.filter and found != kept():
        print("bench/static_gpu.json is not up to date: run python bench/static_gpu.py")
    print(*(f"not reached: {line}" for line in missed), *(f"WORSE: {line}" for line in wrong), sep="\n")
    print(f"{len(found)} cases, {len(wrong)} problems, {time.perf_counter() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
