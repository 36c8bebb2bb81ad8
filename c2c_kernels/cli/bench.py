"""`c2c-kernels bench`: what the machine can do, and how near to it the kernels come."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from c2c_kernels.bench import end_to_end, environment, explain, machine, measure, page, shapes, table
from c2c_kernels.bench.results import Report
from c2c_kernels.bench.timing import Effort
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.progress import note, stage

_DRIFT = 0.1  # of a limit between start and end that is worth a line


def run(options: argparse.Namespace) -> int:
    """Measures and prints; returns the exit status, 1 where a result is wrong."""
    began = time.perf_counter()
    _check_files(options)
    cases = shapes.grid(quick=options.quick, dtypes=options.dtype, text=options.filter)
    choices = explain.grid(quick=options.quick, dtypes=options.dtype, text=options.filter) if options.explain else []
    plan = end_to_end.plan(quick=options.quick, dtypes=options.dtype)
    generations = end_to_end.lines(plan, options.filter) if options.end_to_end else []
    if not (cases or choices or generations):
        raise CommandError(f"no line has all of {options.filter.split()} in its name")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with stage("measure the machine"):
        limits = machine.measure()
    report = Report(_command(options), environment.collect(limits.threads), limits)
    _print(page.environment_line(report), *page.machine_lines(limits))
    if report.environment["backend"] == "reference":
        report.notes.append("the compiled kernels are missing: every line is the reference's")
    _measure_lines(report, cases, measure.QUICK if options.quick else measure.FULL, options.quick)
    _explain(report, choices)
    _generate(report, plan, generations)
    _close(report, options, began)
    return 1 if report.wrong else 0


def _measure_lines(report: Report, cases: list[shapes.Case], effort: Effort, quick: bool) -> None:
    if quick and cases:
        report.notes.append("--quick leaves out flex_attention, whose compilation takes seconds for every shape")
    for family in dict.fromkeys(case.family for case in cases):
        group = [case for case in cases if case.family == family]
        lines = []
        with stage(f"measure {family}", len(group)) as update:
            for case in group:
                lines.append(measure.measure(case, report.machine, effort))
                update(len(lines))
        report.lines += lines
        _print("", table.as_text(table.family_table(family, lines)))
    if len(report.lines) > 1:
        _print("", table.as_text(table.summary_table(report.lines)))
        found = table.slower(report.lines)
        if found:
            _print("", f"ours takes longer in {len(found)} places", *(f"  {line}" for line in found))


def _explain(report: Report, cases: list[shapes.Case]) -> None:
    if not cases:
        return
    passed_over = 0
    with stage("measure both strategies", len(cases)) as update:
        for done, case in enumerate(cases, 1):
            try:
                choice = explain.explain(case)
            except (ArithmeticError, RuntimeError, MemoryError) as error:
                report.notes.append(f"{case.name} left out: {error}")
                choice = None
            else:
                passed_over += choice is None
            if choice is not None:
                report.choices.append(choice)
            update(done)
    if passed_over:
        report.notes.append(f"{passed_over} shapes of --explain left out: a strategy would take over a second")
    _print("", table.as_text(table.choice_table(report.choices)))


def _generate(report: Report, plan: end_to_end.Plan, wanted: list[tuple[str, str, int]]) -> None:
    if not wanted:
        return

    def load(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
        from c2c_kernels.cli.models import load_model

        return load_model(name, dtype)

    with stage("generate", len(wanted)) as update:
        for line in end_to_end.run(plan, wanted, load):
            report.generations.append(line)
            update(len(report.generations))
    _print("", table.as_text(table.generation_table(report.generations)))


def _close(report: Report, options: argparse.Namespace, began: float) -> None:
    """Measures the machine again, says what was left out, and writes the files."""
    with stage("measure the machine again"):
        report.machine_after = machine.measure(report.machine.threads)
    for name in ("memory", "cache", "peak"):
        before, after = getattr(report.machine, name), getattr(report.machine_after, name)
        if abs(after / before - 1) > _DRIFT:
            change = f"{name} from {before / 1e9:.4g} to {after / 1e9:.4g} G/s"
            report.notes.append(f"the machine changed while it was measured: {change}")
    report.seconds = time.perf_counter() - began
    if options.plot and report.lines:
        _plot(report, Path(options.plot))
    if options.json:
        Path(options.json).write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        page.write(report, Path(options.markdown))
    _print("", *report.notes, f"in all {report.seconds:.0f} s")
    for line in report.wrong:
        note(f"WRONG: {line.name}: {line.reason}")


def _plot(report: Report, path: Path) -> None:
    try:
        from c2c_kernels.bench import plot

        with stage(f"draw {path}"):
            plot.draw(report, path)
    except ImportError as error:
        report.notes.append(f"no plot: matplotlib cannot be imported ({error}); pip install 'c2c-kernels[bench]'")


def _check_files(options: argparse.Namespace) -> None:
    """CommandError, before anything is measured, where a file could not be written."""
    for name in ("json", "plot", "markdown"):
        given = getattr(options, name)
        if given is None:
            continue
        path = Path(given)
        if not path.absolute().parent.is_dir():
            raise CommandError(f"--{name} {path}: there is no folder {path.parent}")
        if name == "plot" and path.suffix.lower() != ".png":
            raise CommandError(f"--plot {path}: a file name that ends in .png is wanted")
        if name == "markdown" and path.exists() and not page.has_marks(path):
            raise CommandError(f"--markdown {path}: the file has no lines {page.BEGIN} and {page.END}")


def _command(options: argparse.Namespace) -> str:
    """The command that repeats the run, without the files it writes."""
    parts = ["c2c-kernels", "bench"]
    parts += [f"--{name.replace('_', '-')}" for name in ("quick", "explain", "end_to_end") if getattr(options, name)]
    if options.filter:
        parts += ["--filter", options.filter]
    for dtype in options.dtype or ():
        parts += ["--dtype", dtype]
    parts += ["--threads", str(options.threads or torch.get_num_threads())]
    return shlex.join(parts)


def _print(*lines: str) -> None:
    for line in lines:
        print(line)
    sys.stdout.flush()
