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

from c2c_kernels.backends import ENVIRONMENT_VARIABLE, backends
from c2c_kernels.bench import end_to_end, environment, explain, gpu, machine, measure, page, shapes, table
from c2c_kernels.bench.check import WrongResultError
from c2c_kernels.bench.results import Report
from c2c_kernels.bench.timing import Effort
from c2c_kernels.bench.work import first_line
from c2c_kernels.cli import outputs
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.progress import note, stage

_SWITCHES = ("quick", "no_compile", "explain", "end_to_end")
_DRIFT = 0.1  # of a limit between start and end that is worth a line


def run(options: argparse.Namespace) -> int:
    """Measures and prints; returns the exit status, 1 where a result is wrong."""
    began = time.perf_counter()
    _check_device(options)
    _check_files(options)
    on_gpu = options.device != "cpu"
    cases = shapes.grid(quick=options.quick, dtypes=options.dtype, text=options.filter, gpu=on_gpu)
    if options.no_compile:
        cases = shapes.without_compilation(cases)
    choices = explain.grid(quick=options.quick, dtypes=options.dtype, text=options.filter) if options.explain else []
    plan = end_to_end.plan(quick=options.quick, dtypes=options.dtype)
    generations = end_to_end.lines(plan, options.filter) if options.end_to_end else []
    if not (cases or choices or generations):
        raise _nothing_left(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    report = _begin(options)
    if options.explain and not choices:
        report.notes.append("--explain leaves out everything: it has no line of those asked for")
    if options.end_to_end and not generations:
        report.notes.append("--end-to-end leaves out everything: it has no line of those asked for")
    _measure_lines(report, cases, measure.QUICK if options.quick else measure.FULL, options)
    _explain(report, choices)
    _generate(report, plan, generations)
    _close(report, options, began)
    return 1 if report.wrong else 0


def _nothing_left(options: argparse.Namespace) -> CommandError:
    """The error for a filter that no line passes."""
    chosen = [*(["--quick"] if options.quick else []), *(f"--dtype {dtype}" for dtype in options.dtype or ())]
    among = f" of {' '.join(chosen)}" if chosen else ""
    wanted = f"words of a name such as {shapes.grid()[0].name!r} are wanted; families are {', '.join(shapes.FAMILIES)}"
    later = "" if options.end_to_end else "; names that begin with generate need --end-to-end"
    return CommandError(f"--filter {options.filter!r}: no line{among} has all these words in its name; {wanted}{later}")


def _begin(options: argparse.Namespace) -> Report:
    """Measures the machine, and prints what it is."""
    try:
        found = environment.collect(torch.get_num_threads(), options.device)
    except ValueError as error:
        raise CommandError(f"{ENVIRONMENT_VARIABLE}: {error}") from error
    with stage("measure the machine"):
        limits = _limits(options.device)
    report = Report(_command(options), found, limits)
    _print(page.environment_line(report), *page.machine_lines(limits))
    if found["backend"] == "reference":
        reason = next(record.reason for record in backends() if record.name == "cpu")
        report.notes.append(f"every line is the reference's: the compiled kernels are left out{_because(reason)}")
    return report


def _because(reason: str) -> str:
    return f" ({reason})" if reason else ""


def _measure_lines(report: Report, cases: list[shapes.Case], effort: Effort, options: argparse.Namespace) -> None:
    if options.no_compile:
        report.notes.append("--no-compile leaves out flex_attention and torch.compile")
    elif options.quick and any(not case.flex for case in cases):
        where = "" if report.machine.device == "cpu" else " of most lines"
        report.notes.append(
            f"--quick leaves out flex_attention{where}, whose compilation takes seconds for every shape"
        )
    for family in dict.fromkeys(case.family for case in cases):
        group = [case for case in cases if case.family == family]
        lines = []
        with stage(f"measure {family}", len(group)) as update:
            for case in group:
                lines.append(measure.measure(case, report.machine, effort))
                update(len(lines))
        report.lines += lines
        report.wrong += [f"{line.name}: {line.reason}" for line in lines if line.status == "wrong"]
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
            except WrongResultError as error:
                report.wrong.append(f"{case.name}: {error}")
            except (RuntimeError, ValueError, MemoryError) as error:
                report.notes.append(f"{case.name} left out: {first_line(error)}")
            else:
                passed_over += choice is None
                report.choices += [] if choice is None else [choice]
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
    """Measures the machine again, writes the files, and says what was left out and what is wrong."""
    with stage("measure the machine again"):
        report.machine_after = _limits(report.machine.device, report.machine.threads)
    after = report.machine_after.limits()
    for name, before in report.machine.limits().items():
        if abs(after[name] / before - 1) > _DRIFT:
            change = f"{name} from {before / 1e9:.4g} to {after[name] / 1e9:.4g} G/s"
            report.notes.append(f"the machine changed while it was measured: {change}")
    report.seconds = time.perf_counter() - began
    unwritten = _write_files(report, options)
    _print("", *report.notes, f"in all {report.seconds:.0f} s")
    for line in report.wrong:
        note(f"WRONG, not timed: {line}")
    if unwritten is not None:
        raise unwritten


def _write_files(report: Report, options: argparse.Namespace) -> CommandError | None:
    """Writes the files asked for, each whatever becomes of the others; the first error."""
    writers = {"plot": _plot, "json": _write_json, "markdown": page.write}
    errors = []
    for name, write in writers.items():
        given = getattr(options, name)
        if given is not None:
            try:
                write(report, Path(given))
            except OSError as error:
                errors.append(outputs.unwritten(f"--{name}", Path(given), error))
    return errors[0] if errors else None


def _plot(report: Report, path: Path) -> None:
    if not any(line.timing for line in report.lines):
        report.notes.append("no plot: no line was timed")
        return
    try:
        from c2c_kernels.bench import plot
    except Exception as error:  # whatever a broken package raises
        report.notes.append(
            f"no plot: matplotlib cannot be imported ({first_line(error)}); pip install 'c2c-kernels[bench]'"
        )
        return
    with stage(f"draw {path}"):
        plot.draw(report, path)


def _write_json(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")


def _check_device(options: argparse.Namespace) -> None:
    """CommandError where there is no GPU to measure, or something is asked for that is measured on the CPU alone."""
    if options.device == "cpu":
        return
    if not torch.cuda.is_available():
        raise CommandError(f"--device {options.device}: torch finds no GPU (torch {torch.__version__})")
    for name in ("explain", "end_to_end"):
        if getattr(options, name):
            raise CommandError(
                f"--{name.replace('_', '-')} is measured on the CPU: leave out --device {options.device}"
            )


def _limits(device: str, threads: int | None = None) -> machine.Machine:
    """What the CPU, with so many threads, or the GPU reaches."""
    return machine.measure(threads) if device == "cpu" else gpu.measure(torch.device(device))


def _check_files(options: argparse.Namespace) -> None:
    """CommandError, before anything is measured, where a file could not be written."""
    for name, suffix in (("json", ""), ("plot", ".png"), ("markdown", "")):
        given = getattr(options, name)
        if given is not None:
            outputs.check(f"--{name}", Path(given), suffix)
    if options.markdown is None or not Path(options.markdown).exists():
        return
    try:
        marked = page.has_marks(Path(options.markdown))
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--markdown {options.markdown} cannot be read: {first_line(error)}") from error
    if not marked:
        raise CommandError(f"--markdown {options.markdown}: lines {page.BEGIN} and {page.END} are wanted in it")


def _command(options: argparse.Namespace) -> str:
    """The command that repeats the run, without the files it writes."""
    parts = ["c2c-kernels", "bench"]
    parts += [f"--{name.replace('_', '-')}" for name in _SWITCHES if getattr(options, name)]
    if options.device != "cpu":
        parts += ["--device", options.device]
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
