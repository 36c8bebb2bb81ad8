"""What our GPU kernels do on a GPU that is not there: compiler's reports and simulator's counters, against limits.

    python bench/static_gpu.py            writes bench/static_gpu.json and bench/static_gpu.md
    python bench/static_gpu.py --check    writes nothing; exit status 1 where a figure is worse than LIMITS allows
    python bench/static_gpu.py --filter decode --print    only cases with these words; prints the tables

Needs triton, and ptxsim in shared/ in or beside the checkout; for the CUDA kernels the extension c2c_kernels._cuda and
nvcc too. --check passes without, and says so. Takes two to three minutes on two cores, once the CUDA kernels' PTX is in
build/ptx.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from static_limits import HELD, NOT_REACHED, Limit, not_reached, problems, reached
from static_page import page
from static_records import Figures

HERE = Path(__file__).resolve().parent
ARCHS = (80, 90)
FILES = ("decode", "prefill", "project", ("merge", "quantise"), "fuse")  # of csrc/cuda, as names of cases begin

# Of the lines that match a figure the last one counts: first what is wanted, then where it is not reached yet, then
# what is only held. Bounds of NOT_REACHED and HELD lines are the present values, rounded up: lower them where a kernel
# gets better. Case and kernel are patterns.
LIMITS = [
    # --- targets ---
    Limit("refused", False),
    Limit("spills", 0),
    Limit("sector_use", 0.95),
    Limit("bank_conflicts", 0.05),
    Limit("resident_warps", 8),
    Limit("bytes_over_least", 1.05, "decode*"),
    Limit("flops_over_least", 1.10, "prefill *q_len=2048*"),
    Limit("products", "mma", "prefill*", "prefill_kernel", (80,)),
    Limit("products", "wgmma", "prefill*", "prefill_kernel", (90,)),
    Limit("shared", 163 * 1024, archs=(80,)),
    Limit("shared", 227 * 1024, archs=(90,)),
    Limit("launches", 2, "decode*"),
    Limit("launches", 1, "prefill*"),
    Limit("bytes_over_least", 1.10, "fuse*"),
    Limit("launches", 1, "fuse*"),
    Limit("bank_conflicts", 0.01, "decode*", backend="cuda"),
    Limit("products", "mma", "prefill*", archs=(80,), backend="cuda"),
    Limit("products", "wgmma + mma", "prefill*", archs=(90,), backend="cuda"),  # mma: sums of weights
    Limit("products", "wgmma", "project*", archs=(90,), backend="cuda"),
    Limit("products", "wgmma", "prefill-raw*", "c2c_project*", (90,), backend="cuda"),
    Limit("sector_use", 0.95, "quantise*", backend="cuda"),
    Limit("others", 1.25, "prefill*", backend="cuda"),
    Limit("others", 1.25, "project*", backend="cuda"),
    Limit("bank_conflicts", 0.01, "fuse*", backend="cuda"),
    Limit("launches", 2, "fuse*", backend="cuda"),
    # --- targets that are not reached ---
    Limit("refused", True, "decode-absorbed* < Qwen3-4B*", standing=NOT_REACHED),  # as wide as the receiver: no gain
    Limit("bank_conflicts", 0.21, "prefill SmolLM2* float32*", archs=(80,), standing=NOT_REACHED),
    Limit("bank_conflicts", 0.20, "backward * float32*", "prefill_kernel", (80,), NOT_REACHED),
    Limit("bank_conflicts", 0.13, "backward * float32*", "query_gradient_kernel", standing=NOT_REACHED),
    Limit(
        "sector_use", 0.60, "quantise*", "quantise_kernel", standing=NOT_REACHED
    ),  # a thread loads its 16 numbers in two requests
    # A tile of 64 tokens and 128 columns reads half as much of h as of weights; one of 256, for many layers, a quarter.
    Limit("bytes_over_least", 1.63, "fuse*", standing=NOT_REACHED),
    Limit("bytes_over_least", 1.41, "fuse* layers=28", standing=NOT_REACHED),
    Limit("bank_conflicts", 0.08, "fuse* own=64", archs=(80,), standing=NOT_REACHED),
    Limit("bank_conflicts", 0.22, "fuse* own=64", archs=(90,), standing=NOT_REACHED),
    # Of 1.74 the exponentials take 1.18.
    Limit("others", 1.75, "prefill* SmolLM2*", archs=(80,), standing=NOT_REACHED, backend="cuda"),
    # A warp of wgmma's has 16 rows: what it does for each tile is spread over half as many products.
    Limit("others", 1.60, "prefill* Qwen3*", archs=(90,), standing=NOT_REACHED, backend="cuda"),
    Limit("others", 3.10, "prefill* SmolLM2*", archs=(90,), standing=NOT_REACHED, backend="cuda"),
    Limit("bytes_over_least", 1.58, "fuse*", standing=NOT_REACHED, backend="cuda"),
    # 1.07 where what programs leave for each other is counted among the least.
    Limit("bytes_over_least", 1.21, "fuse* layers=28", standing=NOT_REACHED, backend="cuda"),
    Limit("launches", 2, "prefill-raw*", standing=HELD),  # one would project the segment for each tile of queries
    # --- no target, held: what several programs read counts each time ---
    Limit("bytes_over_least", 3.50, "prefill *q_len=512*", standing=HELD),
    Limit("bytes_over_least", 6.67, "prefill *q_len=256*", standing=HELD),
    Limit("bytes_over_least", 11.50, "prefill *q_len=2048*", standing=HELD),
    Limit("bytes_over_least", 26.80, "prefill Gemma*", archs=(80,), standing=HELD),
    Limit("bytes_over_least", 7.30, "prefill Gemma*", archs=(90,), standing=HELD),
    Limit("bytes_over_least", 8.50, "prefill-materialised*", standing=HELD),
    Limit("bytes_over_least", 8.12, "prefill-raw*", standing=HELD),
    Limit("bytes_over_least", 6.31, "backward *bfloat16*", standing=HELD),
    Limit("bytes_over_least", 11.82, "backward *float32*", standing=HELD),
    Limit("bytes_over_least", 8.82, "backward-raw*", standing=HELD),
    Limit("bytes_over_least", 6.25, "project* shared=512", standing=HELD),
    Limit("bytes_over_least", 1.01, "project* shared=1", standing=HELD),
    Limit("bytes_over_least", 1.14, "merge*", standing=HELD),
    Limit("bytes_over_least", 1.66, "quantise*", standing=HELD),
    Limit("sector_use", 0.88, "fuse*", "c2c_fuse_table_small", standing=HELD),  # of 2 KB
    Limit("resident_warps", 6, "decode*", standing=HELD, backend="cuda"),  # 96 KiB and more of copies hide the latency
    Limit("bytes_over_least", 1.50, "prefill *q_len=512*", archs=(80,), standing=HELD, backend="cuda"),
    Limit("bytes_over_least", 4.00, "prefill *q_len=2048*", archs=(80,), standing=HELD, backend="cuda"),
    Limit("bytes_over_least", 7.30, "prefill Gemma*", archs=(80,), standing=HELD, backend="cuda"),
    # Blocks of 128 rows, as two warp groups have, instead of 256 (at head dim 256: as many).
    Limit("bytes_over_least", 2.17, "prefill *q_len=512*", archs=(90,), standing=HELD, backend="cuda"),
    Limit("bytes_over_least", 7.40, "prefill *q_len=2048*", archs=(90,), standing=HELD, backend="cuda"),
    Limit("bytes_over_least", 3.17, "prefill-materialised*", archs=(80,), standing=HELD, backend="cuda"),
    Limit("bytes_over_least", 5.00, "prefill-raw*", archs=(80,), standing=HELD, backend="cuda"),
    Limit("bytes_over_least", 3.60, "project*", standing=HELD, backend="cuda"),
    Limit("bytes_over_least", 4.25, "project* < Qwen3-4B*", standing=HELD, backend="cuda"),
    Limit("bytes_over_least", 1.01, "project* shared=1", standing=HELD, backend="cuda"),
    # --- no target, held: decode's rows are padded to 16, a product of float32 is three ---
    Limit("flops_over_least", 8.00, "decode *bfloat16*", standing=HELD),
    Limit("flops_over_least", 8.00, "decode-materialised *bfloat16*", standing=HELD),
    Limit("flops_over_least", 24.00, "decode *float32*", standing=HELD),
    Limit("flops_over_least", 1.13, "prefill *q_len=512*", standing=HELD),
    Limit("flops_over_least", 5.05, "prefill *float32*", archs=(80,), standing=HELD),
    Limit("flops_over_least", 7.48, "prefill *float32*", archs=(90,), standing=HELD),  # six products of 16-bit parts
    Limit("flops_over_least", 1.04, "prefill-materialised*", standing=HELD),
    Limit("flops_over_least", 1.23, "prefill-raw*", standing=HELD),
    Limit("flops_over_least", 1.63, "backward *bfloat16*", standing=HELD),
    Limit("flops_over_least", 2.32, "backward Qwen3*", archs=(90,), standing=HELD),
    Limit("flops_over_least", 6.38, "backward *float32*", archs=(80,), standing=HELD),
    Limit("flops_over_least", 7.13, "backward *float32*", archs=(90,), standing=HELD),
    Limit("flops_over_least", 1.33, "backward-raw*", standing=HELD),
    Limit("flops_over_least", 1.00, "project* bfloat16 shared=512", standing=HELD),
    Limit("flops_over_least", 3.00, "project *float32*", standing=HELD),
    Limit("flops_over_least", 64.00, "project* shared=1", standing=HELD),
    Limit("flops_over_least", 1.01, "fuse*", standing=HELD),
    Limit("flops_over_least", 1.10, "prefill *q_len=512*", archs=(80,), standing=HELD, backend="cuda"),
    Limit("flops_over_least", 1.17, "prefill *q_len=512*", archs=(90,), standing=HELD, backend="cuda"),
    # Sums of weights are products with ones.
    Limit("flops_over_least", 1.10, "prefill-materialised*", standing=HELD, backend="cuda"),
    Limit("flops_over_least", 1.26, "prefill-raw*", standing=HELD, backend="cuda"),
    Limit("flops_over_least", 32.00, "project* shared=1", archs=(80,), standing=HELD, backend="cuda"),
    Limit("flops_over_least", 128.00, "project* shared=1", archs=(90,), standing=HELD, backend="cuda"),
]


def figures_of(backend: str, names: Sequence[str], arch: int) -> list[Figures]:
    """Of cases by name, in a process of their own."""
    import static_cases
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module("static_cuda" if backend == "cuda" else "static_figures")
    return [module.figures(case, arch) for case in static_cases.cases() if case.name in names]


def collect(words: str, backends: Sequence[str]) -> list[Figures]:
    """All cases whose names have all these words, on every architecture."""
    import static_cases
    import static_cuda

    from c2c_kernels.bench.shapes import matches

    cases = [case for case in static_cases.cases() if matches(case.name, words)]
    # The CUDA kernels of a file are assembled by one process, and first: these take longest.
    taken = [case.name for case in cases if static_cuda.takes(case)]
    files = [[name for name in taken if name.startswith(file)] for file in FILES]
    groups = {"triton": [[case.name] for case in cases], "cuda": [names for names in files if names]}
    wanted = [(backend, names, arch) for backend in sorted(backends) for arch in ARCHS for names in groups[backend]]
    workers = min(len(wanted), len(os.sched_getaffinity(0))) or 1
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = [each for group in pool.map(figures_of, *zip(*wanted, strict=True)) for each in group]
    return sorted(found, key=lambda figures: figures.backend == "cuda")


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
    parser = argparse.ArgumentParser(description="Static figures of the GPU kernels.")
    parser.add_argument("--check", action="store_true", help="compare with the limits, write nothing")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases with all these words; writes nothing")
    parser.add_argument("--print", action="store_true", help="print the tables")
    options = parser.parse_args(arguments)
    why = unavailable()
    if why:
        print(f"static figures skipped: {why}")
        return 0 if options.check else 1
    began = time.perf_counter()
    import cuda_simulator
    import triton

    without_cuda = cuda_simulator.missing()
    if without_cuda:
        print(f"static figures of the CUDA kernels skipped, those kept stay: {without_cuda}")
    found = collect(options.filter, ["triton"] if without_cuda else ["triton", "cuda"])
    if without_cuda and not options.filter:
        found += [each for each in kept() if each.backend == "cuda"]
    missed = not_reached(found, LIMITS)
    wrong = problems(found, LIMITS, whole=not options.filter)
    text = page(found, missed, triton.__version__)
    if options.print:
        print(text)
    if not (options.check or options.filter):
        data = {"triton": triton.__version__, "figures": [figures.as_json() for figures in found]}
        (HERE / "static_gpu.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (HERE / "static_gpu.md").write_text(text, encoding="utf-8")
    elif not options.filter and found != kept():
        print("bench/static_gpu.json is not up to date: run python bench/static_gpu.py")
    for line in reached(found, LIMITS):
        print(f"reached, the line can go: {line}")
    for line in missed:
        print(f"not reached: {line}")
    for line in wrong:
        print(f"WORSE: {line}")
    print(f"{len(found)} cases, {len(wrong)} problems, {time.perf_counter() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
