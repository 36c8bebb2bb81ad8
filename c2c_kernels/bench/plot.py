"""The picture: every line under the machine's roofs, and how near to the floor each family comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from c2c_kernels.bench.results import Line, Report
from c2c_kernels.bench.shapes import FAMILIES
from c2c_kernels.bench.table import amount

_COLOURS = {"float32": "tab:blue", "bfloat16": "tab:orange", "float16": "tab:green"}
_THEIRS = ("sdpa", "matmul", "torch")  # the alternative drawn beside ours, whichever a line has


def draw(report: Report, path: Path) -> None:
    """Writes the picture as a PNG file."""
    lines = [line for line in report.lines if line.timing is not None]
    figure = Figure(figsize=(15, 7), layout="constrained")
    FigureCanvasAgg(figure)
    roofs, strips = figure.subplots(1, 2, width_ratios=(1, 1))
    _roofline(roofs, report, lines)
    _strips(strips, lines)
    found = report.environment
    kernels = f"threads: {report.machine.threads}, kernels: {found['backend']} {found['isa']}"
    figure.suptitle(f"c2c-kernels on {found['gpu'] or found['cpu']}, {kernels}, commit {found['commit'] or 'unknown'}")
    figure.savefig(path, dpi=120)


def _roofline(axis: Any, report: Report, lines: list[Line]) -> None:
    machine, highest = report.machine, max(report.machine.peaks.values())
    intensities = [line.flops / line.bytes for line in lines]
    low, high = min(intensities) / 2, max(max(intensities) * 2, 2 * highest / machine.memory)
    roofs = [("memory", machine.memory, "-"), ("last-level cache", machine.cache, "--")]
    for name, bandwidth, style in roofs if machine.cache_bytes else roofs[:1]:
        ends = [low, highest / bandwidth]
        label = f"{name}, {amount(bandwidth, 'B/s')}"
        axis.plot(ends, [end * bandwidth / 1e9 for end in ends], color="black", linestyle=style, label=label)
    for rate in sorted(set(machine.peaks.values())):
        label = f"multiply-add peak {', '.join(d for d, r in machine.peaks.items() if r == rate)}"
        ends = [rate / machine.cache, high]
        axis.plot(ends, [rate / 1e9] * 2, color="black", linewidth=1, label=f"{label}, {amount(rate, 'FLOP/s')}")
    for line in lines:
        x = line.flops / line.bytes
        colour = _COLOURS[line.dtype]
        axis.plot(x, line.flops / line.timing.median / 1e9, "o", color=colour, markersize=5)  # type: ignore[union-attr]
        theirs = _theirs(line)
        if theirs is not None:
            axis.plot(x, line.flops / theirs / 1e9, "o", markerfacecolor="none", color=colour, markersize=5, alpha=0.6)
    for dtype, colour in _COLOURS.items():
        axis.plot([], [], "o", color=colour, label=dtype)
    axis.plot([], [], "o", markerfacecolor="none", color="grey", label="PyTorch's SDPA or matrix product")
    axis.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOPs per byte", ylabel="GFLOP/s")
    axis.set_title("every line under the machine's roofs")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _strips(axis: Any, lines: list[Line]) -> None:
    """A row of points for each family: ours filled, PyTorch's hollow."""
    families = [family for family in FAMILIES if any(line.family == family for line in lines)]
    offsets = dict(zip(_COLOURS, (-0.22, 0.0, 0.22), strict=True))
    for line in lines:
        y = families.index(line.family) + offsets[line.dtype]
        colour = _COLOURS[line.dtype]
        axis.plot(100 * line.fraction, y, "o", color=colour, markersize=5, alpha=0.8)
        theirs = _theirs(line)
        if theirs is not None:
            axis.plot(100 * line.floor / theirs, y, "o", markerfacecolor="none", color=colour, markersize=5, alpha=0.6)
    axis.axvline(100, color="black", linewidth=1)
    axis.set_yticks(range(len(families)), families)
    axis.set_ylim(len(families) - 0.5, -0.5)
    axis.set_xlim(0, None)
    axis.set_xlabel("% of the floor, max(bytes / bandwidth, FLOPs / peak) / time")
    axis.set_title("filled: c2c-kernels; hollow: PyTorch")
    axis.grid(alpha=0.3)


def _theirs(line: Line) -> float | None:
    """Seconds of PyTorch's on this line."""
    for name in _THEIRS:
        beside = line.beside.get(name)
        if beside is not None and beside.timing is not None:
            return beside.timing.median
    return None
