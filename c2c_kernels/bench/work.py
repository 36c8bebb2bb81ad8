"""What a case becomes: calls to time, a check, and what they cost at least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

Call = Callable[[], Any]


class LeftOutError(Exception):
    """Why a contender or a case is not measured, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, shortened."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:120]


@dataclass(frozen=True)
class Cost:
    """What has to be moved and computed: bytes of every input and output once, FLOPs of the formula."""

    bytes: float
    flops: float


@dataclass
class Work:
    """One case, ready to run.

    Attributes:
        ours: the call that is measured.
        alternatives: by name, what makes the call that stands beside it, or raises LeftOutError; compiling and
            preparing are done there.
        problem: runs ours and PyTorch's once; why ours is wrong, "" where it is right.
        costs: of every way to compute it; the cheapest is the floor.
        touched: bytes that are in use over all sets of inputs.
    """

    ours: Call
    problem: Callable[[], str]
    costs: Sequence[Cost]
    touched: float
    alternatives: dict[str, Callable[[], Call]] = field(default_factory=dict)


def in_turn(calls: Sequence[Call]) -> Call:
    """One call that makes the given ones one after the other, over and over."""
    if len(calls) == 1:
        return calls[0]
    endless = cycle(calls)
    return lambda: next(endless)()
