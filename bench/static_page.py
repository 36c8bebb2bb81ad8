"""Static figures as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from static_records import Figures

from c2c_kernels.bench.table import Table, as_markdown

_HEAD = """# What the Triton kernels do, without a GPU

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
    rows = []
    for each in group:
        if each.problem:
            rows.append([each.case, each.problem, "–", "–", "–"])
            continue
        launches = " + ".join(kernel.name.removesuffix("_kernel") for kernel in each.kernels)
        flops = f"{each.flops_over_least:.2f}" if each.flops_over_least else "–"
        rows.append([each.case, launches, f"{each.bytes_over_least:.3f}", flops, each.cut or "all"])
    return Table("Calls", ["", "launches", "bytes / least", "FLOPs / least", "simulated"], rows, [])


def _kernels(group: Sequence[Figures]) -> Table:
    rows = []
    for each in group:
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
                ]
            )
    headings = ["", "registers", "spills", "shared", "warps", "sectors", "used", "conflicts", "products"]
    return Table("Kernels", headings, rows, [])
