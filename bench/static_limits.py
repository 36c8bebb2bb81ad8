"""Thresholds over static figures: what is worse than a line of the table allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from static_records import Figures

TARGET = "target"  # what the kernels have to reach, and do
NOT_REACHED = "not reached"  # a target that they do not reach: the present value, which may not get worse
HELD = "held"  # no target: the present value, which may not get worse

# Which way a figure is better; `products` has to be the bound itself.
_AT_MOST = (
    "bytes_over_least",
    "flops_over_least",
    "registers",
    "spills",
    "shared",
    "bank_conflicts",
    "launches",
    "refused",
    "others",
)
_AT_LEAST = ("resident_warps", "sector_use")


class Limit(NamedTuple):
    """One line of the table. Of the lines that match a figure the last one counts.

    Attributes:
        figure: a field of Figures or Kernel; "launches" is their number, "refused" whether the backend refuses a case.
        bound: at most (registers, ...; refused, where False is less), at least (resident_warps, sector_use) or exactly
            this (products).
        case, kernel: patterns of names, as in a shell.
        archs: the architectures meant.
        standing: TARGET, NOT_REACHED or HELD.
        backend: a pattern too.
    """

    figure: str
    bound: float | str | bool
    case: str = "*"
    kernel: str = "*"
    archs: tuple[int, ...] = (80, 90)
    standing: str = TARGET
    backend: str = "*"

    def words(self) -> str:
        """The line as text."""
        where = [self.case, *(part for part in (self.kernel, self.backend) if part != "*")]
        archs = " and ".join(f"sm_{arch}" for arch in self.archs)
        return f"{self.figure} {self.bound} ({self.standing}) of {', '.join(where)} on {archs}"


class Found(NamedTuple):
    """A figure with its place."""

    case: str
    kernel: str
    arch: int
    backend: str
    figure: str
    value: Any


def values(figures: Figures) -> Iterator[Found]:
    """Every figure of a case that a line may bound."""
    refused = figures.problem.startswith("refused")
    call = (figures.case, "", figures.arch, figures.backend)
    yield Found(*call, "refused", refused)
    if figures.problem:
        return
    yield Found(*call, "launches", len(figures.kernels))
    for name in ("bytes_over_least", "flops_over_least"):
        yield Found(*call, name, getattr(figures, name))
    for kernel in figures.kernels:
        place = (figures.case, kernel.name, figures.arch, figures.backend)
        for name in ("registers", "spills", "shared", "resident_warps", "sector_use", "bank_conflicts", "products"):
            yield Found(*place, name, getattr(kernel, name))
        if kernel.others:
            yield Found(*place, "others", kernel.others)


def _matches(limit: Limit, found: Found) -> bool:
    return (
        limit.figure == found.figure
        and found.arch in limit.archs
        and fnmatchcase(found.case, limit.case)
        and fnmatchcase(found.kernel, limit.kernel)
        and fnmatchcase(found.backend, limit.backend)
    )


def _worse(figure: str, value: Any, bound: Any) -> bool:
    if figure in _AT_MOST:
        return value > bound
    if figure in _AT_LEAST:
        return value < bound
    return value != bound


def problems(found: Sequence[Figures], limits: Sequence[Limit], *, whole: bool = True) -> list[str]:
    """What is worse than its line allows, results that are wrong, and (of a `whole` table) lines that match nothing."""
    worse, used = [], set()
    for figures in found:
        if figures.problem.startswith("wrong"):
            worse.append(f"{figures.case} on sm_{figures.arch}: {figures.problem}")
        for value in values(figures):
            matching = [number for number, limit in enumerate(limits) if _matches(limit, value)]
            used.update(matching)
            if matching and _worse(value.figure, value.value, limits[matching[-1]].bound):
                where = f"{value.case} {value.kernel}".rstrip()
                worse.append(
                    f"{where} on sm_{value.arch}: {value.figure} is {value.value}; the table has "
                    f"{limits[matching[-1]].words()}"
                )
    unused = [limit.words() for number, limit in enumerate(limits) if whole and number not in used]
    return worse + [f"a line of the table matches no figure: {words}" for words in unused]


def not_reached(found: Sequence[Figures], limits: Sequence[Limit]) -> list[str]:
    """Figures that miss their target, in words, where the table says that they do."""
    return [
        f"{value.case} {value.kernel}".rstrip()
        + f" on sm_{value.arch}: {value.figure} {value.value}, wanted {target.bound}"
        for _, value, target in _missing(found, limits)
        if _worse(value.figure, value.value, target.bound)
    ]


def reached(found: Sequence[Figures], limits: Sequence[Limit]) -> list[str]:
    """Lines NOT_REACHED all of whose figures reach their target: they can go."""
    missing = list(_missing(found, limits))
    late = {number for number, value, target in missing if _worse(value.figure, value.value, target.bound)}
    return [limits[number].words() for number in dict.fromkeys(number for number, *_ in missing) if number not in late]


def _missing(found: Sequence[Figures], limits: Sequence[Limit]) -> Iterator[tuple[int, Found, Limit]]:
    """Figures whose line is NOT_REACHED: its number, the figure, and the target that the line stands in for."""
    for value in (value for figures in found for value in values(figures)):
        matching = [number for number, limit in enumerate(limits) if _matches(limit, value)]
        targets = [limits[number] for number in matching if limits[number].standing == TARGET]
        if matching and limits[matching[-1]].standing == NOT_REACHED and targets:
            yield matching[-1], value, targets[-1]
