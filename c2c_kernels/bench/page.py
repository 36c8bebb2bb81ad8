"""The generated part of bench/README.md."""

from __future__ import annotations

from pathlib import Path

from c2c_kernels.bench.machine import Machine
from c2c_kernels.bench.results import Report
from c2c_kernels.bench.shapes import FAMILIES
from c2c_kernels.bench.table import (
    Table,
    amount,
    as_markdown,
    choice_table,
    family_table,
    generation_table,
    slower,
    summary_table,
)

BEGIN, END = "<!-- figures:start -->", "<!-- figures:end -->"


def tables(report: Report) -> list[Table]:
    """One table for each family that was measured."""
    found = []
    for family in FAMILIES:
        lines = [line for line in report.lines if line.family == family]
        if lines:
            found.append(family_table(family, lines))
    return found


def machine_lines(machine: Machine) -> list[str]:
    """The limits in words."""
    peaks = ", ".join(f"{dtype} {amount(rate, 'FLOP/s')}" for dtype, rate in machine.peaks.items())
    if machine.device != "cpu":
        return [
            f"memory bandwidth {amount(machine.memory, 'B/s')}; matrix product {peaks} ({machine.method}; every call "
            "finds its inputs in memory, not in the L2 cache)",
            *machine.notes,
        ]
    return [
        f"read bandwidth {amount(machine.memory, 'B/s')} from memory, {amount(machine.cache, 'B/s')} from the "
        f"last-level cache ({machine.cache_bytes / 2**20:.0f} MiB); multiply-add peak {peaks}; "
        f"{machine.threads} thread{'s' if machine.threads > 1 else ''} ({machine.method})",
        *machine.notes,
    ]


def environment_line(report: Report) -> str:
    """Device, instruction set, versions and commit in one line."""
    found = report.environment
    versions = found["versions"]
    cores = f"{found['cores']} core{'s' if found['cores'] > 1 else ''}"
    return (
        f"{found['gpu'] or found['cpu']}, {cores}; kernels: {found['backend']} {found['isa']}; "
        f"torch {versions['torch']} ({found['torch_isa']}); "
        f"c2c-kernels {versions['c2c-kernels']} at commit {found['commit'] or 'unknown'}; "
        f"{found['date'][:10]}"
    )


def text(report: Report) -> str:
    """The figures as Markdown: machine, command, summary, then every line folded away."""
    parts = [environment_line(report), "", *(f"- {line}" for line in machine_lines(report.machine))]
    if report.machine_after is not None:
        rates = (
            f"{name} {amount(rate, 'B/s' if 'bandwidth' in name else 'FLOP/s')}"
            for name, rate in report.machine_after.limits().items()
        )
        parts.append(f"- measured again at the end: {', '.join(rates)}")
    parts += ["", f"    {report.command}", ""]
    if report.lines:
        parts += [as_markdown(summary_table(report.lines)), "", *_slower(report)]
    if report.generations:
        parts += [as_markdown(generation_table(report.generations)), ""]
    for title, group in (("Every line", tables(report)), ("The cost model", _choices(report))):
        if group:
            body = "\n\n".join(as_markdown(table) for table in group)
            parts += [f"<details><summary>{title}</summary>", "", body, "", "</details>", ""]
    parts += [f"- {note}" for note in report.notes]
    return "\n".join(parts).rstrip() + "\n"


def _slower(report: Report) -> list[str]:
    found = slower(report.lines)
    return [f"Ours takes longer in {len(found)} places:", "", *(f"- {line}" for line in found), ""] if found else []


def _choices(report: Report) -> list[Table]:
    return [choice_table(report.choices)] if report.choices else []


def has_marks(path: Path) -> bool:
    """Whether the file at `path` has a place for figures."""
    page = path.read_text(encoding="utf-8")
    return 0 <= page.find(BEGIN) < page.find(END)


def write(report: Report, path: Path) -> None:
    """Puts the figures between the marks in the file at `path`, which has them, or makes it where there is none."""
    figures = f"{BEGIN}\n\n{text(report)}\n{END}"
    page = path.read_text(encoding="utf-8") if path.exists() else f"{BEGIN}{END}\n"
    head, _, rest = page.partition(BEGIN)
    path.write_text(f"{head}{figures}{rest.partition(END)[2]}", encoding="utf-8")
