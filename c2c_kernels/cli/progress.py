"""Progress on standard error: a bar, or a running clock where the amount of work is not known."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stage(label: str, total: int | None = None, *, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Shows `label` while the block runs and how long it took; yields `update(completed)`.

    Without rich, or where standard error is no terminal, the label alone is printed.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn
    except ImportError:
        print(f"{label} ...", file=sys.stderr, flush=True)
        yield lambda completed: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"{label} ...", file=sys.stderr, flush=True)
        yield lambda completed: None
        return
    amount = [] if total is None else [DownloadColumn() if in_bytes else MofNCompleteColumn()]
    columns = [TextColumn("{task.description:<34}"), BarColumn(bar_width=30), *amount, TimeElapsedColumn()]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total)
        yield lambda completed: progress.update(task, completed=completed)
        progress.update(task, total=total or 1, completed=total or 1)


def note(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)
