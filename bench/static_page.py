"""Static figures as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from static_records import Figures

from c2c_kernels.bench.table import Table, as_markdown

_HEAD = """# What the Triton and CUDA kernels do, without a GPU

Written by `python bench/static_gpu.py` (triton {triton}), checked by `.ci/run` with `--check`. **Nothing here was
measured on a GPU.** Registers, spills and shared memory are what the compiler (ptxas) reports for the kernel that the
shape launches; the rest are counters of a PTX simulator that runs that kernel, whose result is compared with the
reference before anything is counted.

- *bytes / least*: bytes of all 32-byte sectors that the call's launches load and store, over those that have to be
  moved (each cache byte and weight once, outputs once). What one launch leaves for the next counts on top. No cache
  is modelled: what several programs read (keys in prefill, weights and raw tokens in project) counts each time,
  though most of it would come from a GPU's L2.
- *FLOPs / least*: of matrix instructions, over the formula's (of prefill: the causal minimum). In decode the rows of
  a tile are padded to 16, in float32 each product is three; neither is what bounds these calls.
- *sectors*: 32-byte sectors of a warp's request; *used*: share of their bytes that was asked for (over 100% where
  lanes read the same).
- *conflicts*: passes through the shared-memory banks beyond the fewest possible, over requests.
- *warps*: of a block / resident on a multiprocessor at once, by registers and shared memory.
- *others*: instructions beside each matrix instruction in the machine code of the innermost loop (sass.py), a usual
  pass that multiplies and copies what comes next; counted of the CUDA kernels alone, whose names begin with c2c. A
  wgmma counts as the products 16 x 8 x 16 that it saves each of its four warps.
- Of *fuse* the keys of one layer have an open gate, and the least is theirs; programs of closed halves return at once.
- Where some of the KV heads were simulated the line says so: they do the same work each, and the script sees to it
  that they are compiled to the same code.
"""


def page(found: Sequence[Figures], standings: Sequence[str], triton: str) -> str:
    """The whole file. `standings`: lines that say which thresholds are not reached."""
    parts = [_HEAD.format(triton=triton)]
    for arch in dict.fromkeys(figures.arch for figures in found):
        group = [figures for figures in found if figures.arch == arch]
        parts += [f"## sm_{arch}\n", as_markdown(_calls(group)), "", as_markdown(_kernels(group)), ""]
    parts += ["## Targets that are not reached\n", *(f"- {line}" for line in standings or ["none"])]
    return "\n".join(parts) + "\n"


def _calls(group: Sequence[Figures]) -> Table:
    cuda = {each.case: each for each in group if each.backend == "cuda"}
    rows = []
    for each in group:
        if each.backend == "cuda":
            continue
        beside = cuda.get(each.case)
        ours = [_number(beside.bytes_over_least, 3), _number(beside.flops_over_least, 2)] if beside else ["–", "–"]
        if each.problem:
            rows.append([each.case, each.problem, "–", ours[0], "–", ours[1], "–"])
            continue
        launches = " + ".join(kernel.name.removesuffix("_kernel") for kernel in each.kernels)
        bytes_moved, flops = _number(each.bytes_over_least, 3), _number(each.flops_over_least, 2)
        rows.append([each.case, launches, bytes_moved, ours[0], flops, ours[1], each.cut or "all"])
    headings = ["", "launches", "bytes / least", "CUDA's", "FLOPs / least", "CUDA's", "simulated"]
    return Table("Calls", headings, rows, [])


def _number(number: float, digits: int) -> str:
    return f"{number:.{digits}f}" if number else "–"


def _kernels(group: Sequence[Figures]) -> Table:
    order = {case: number for number, case in enumerate(dict.fromkeys(each.case for each in group))}
    rows = []
    for each in sorted(group, key=lambda figures: order[figures.case]):
        for kernel in each.kernels:
            rows.append(
                [
                    f"{each.case}: {kernel.name.removesuffix('_kernel')}",
                    str(kernel.registers),
                    f"{kernel.spills} B",
                    f"{kernel.shared / 1024:.1f} KiB",
                    f"{kernel.warps} / {kernel.resident_warps}",
                    f"{kernel.sectors_per_request:.1f}",
                    f"{kernel.sector_use:.1%}",
                    f"{kernel.bank_conflicts:.1%}",
                    kernel.products or "–",
                    _number(kernel.others, 2),
                ]
            )
    headings = ["", "registers", "spills", "shared", "warps", "sectors", "used", "conflicts", "products", "others"]
    return Table("Kernels", headings, rows, [])
