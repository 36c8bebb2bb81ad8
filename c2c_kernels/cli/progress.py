"""Progress on standard error: a bar, or a running clock where the amount of work is not known."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stage(
    label: str, total: int | None = None, *, in_bytes: bool = False, beside: Callable[[], str] = lambda: ""
) -> Iterator[Callable[[int], None]]:
    """Shows `label` while the block runs and how long it took; yields `update(completed)`.

    `beside` is asked at every update for what stands after the label.
    Without rich, or where standard error is no terminal, it is one line: the label, at the end the seconds.
    """
    try:
        from rich import console, progress
    except Exception:  # whatever a broken package raises
        terminal = None
    else:
        # sys.stderr as it is now: what the block prints there may be turned away
        terminal = console.Console(file=sys.stderr)
    if terminal is None or not terminal.is_terminal:
        with _line(label):
            yield lambda completed: None
        return
    amount = [progress.DownloadColumn() if in_bytes else progress.MofNCompleteColumn()] if total else []
    columns = [progress.TextColumn("{task.description:<36}", markup=False), progress.BarColumn(30), *amount]
    with progress.Progress(*columns, progress.TimeElapsedColumn(), console=terminal) as bars:
        task = bars.add_task(label, total=total)
        yield lambda completed: bars.update(task, completed=completed, description=f"{label} {beside()}".rstrip())
        bars.update(task, total=total or 1, completed=total or 1)


@contextmanager
def watch(label: str, total: int | None) -> Iterator[Callable[[int, str, str], None]]:
    """Shows long work: yields `show(completed, beside, line)`; `beside` stands at the bar, a `line` stays.

    Without rich, or where standard error is no terminal, lines are written, and one at every twentieth of `total`.
    None: nothing is shown.
    """
    if total is None:
        yield lambda completed, beside, line: None
        return
    if not sys.stderr.isatty():
        shown = -1

        def write(completed: int, beside: str, line: str) -> None:
            nonlocal shown
            part = 20 * completed // total
            if line or part > shown:
                note(f"{label} {completed / total:.0%}: {', '.join(text for text in (beside, line) if text)}")
            shown = max(shown, part)

        yield write
        return
    beside_bar: list[str] = []
    with stage(label, total, beside=lambda: " ".join(beside_bar)) as move:

        def show(completed: int, beside: str, line: str) -> None:
            beside_bar[:] = [beside]
            move(completed)
            if line:
                note(line)

        yield show


@contextmanager
def _line(label: str) -> Iterator[None]:
    began, file = time.perf_counter(), sys.stderr
    print(f"{label} ...", end="", file=file, flush=True)
    try:
        yield
    finally:
        print(f" {time.perf_counter() - began:.1f} s", file=file, flush=True)


def note(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)
