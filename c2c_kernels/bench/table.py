"""Lines as tables: aligned text for a terminal, Markdown for a page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from c2c_kernels.bench import reading
from c2c_kernels.bench.results import Choice, Generation, Line
from c2c_kernels.bench.shapes import FAMILIES

_NONE = "–"
_NO_RIVALS = ("materialised", reading.NAME)  # our own kernel, and no attention at all


class Table(NamedTuple):
    """A title, headings, rows of text, and lines below."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    below: list[str]


def seconds(value: float) -> str:
    """A time in a unit that leaves three digits or so."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.{_places(value / size)}f} {unit}"
    return f"{value * 1e9:.0f} ns"


def amount(value: float, unit: str) -> str:
    """A number of bytes, FLOPs or the like with a decimal prefix."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.{_places(value / size)}f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def ratio(value: float) -> str:
    """How many times."""
    return f"{value:.{_places(value)}f}x"


def _places(value: float) -> int:
    return 0 if value >= 100 else 1 if value >= 10 else 2


def family_table(family: str, lines: Sequence[Line]) -> Table:
    """The lines of one family: what the issue asks for on every line."""
    names = list(dict.fromkeys(name for line in lines for name in line.beside))
    rows, below = [], []
    for line in lines:
        if line.timing is None:
            rows.append([line.label, "WRONG" if line.status == "wrong" else "left out", *[_NONE] * (6 + len(names))])
            below.append(f"{'WRONG, not timed' if line.status == 'wrong' else 'left out'}: {line.label}: {line.reason}")
            continue
        beside = [line.beside.get(name) for name in names]
        rows.append(
            [
                line.label,
                seconds(line.timing.median),
                f"{line.fraction:.0%}",
                line.bound,
                *(_NONE if b is None or b.ratio is None else ratio(b.ratio) for b in beside),
                amount(line.bytes, "B"),
                amount(line.flops, "FLOP"),
                amount(line.bytes / line.timing.median, "B/s"),
                amount(line.flops / line.timing.median, "FLOP/s"),
            ]
        )
    below += _reasons(lines, names)
    headings = [
        "",
        "time",
        "of the floor",
        "bound by",
        *(f"{name} takes" for name in names),
        "bytes",
        "FLOPs",
        "read",
        "computed",
    ]
    return Table(f"{family}: {FAMILIES[family]}", headings, rows, below)


def _reasons(lines: Sequence[Line], names: Sequence[str]) -> list[str]:
    """One line for each reason for which an alternative is left out."""
    found: dict[tuple[str, str], int] = {}
    for line in lines:
        for name in names:
            beside = line.beside.get(name)
            if beside is not None and beside.left_out:
                found[name, beside.left_out] = found.get((name, beside.left_out), 0) + 1
    return [f"{name} left out of {count} of {len(lines)} lines: {reason}" for (name, reason), count in found.items()]


def summary_table(lines: Sequence[Line]) -> Table:
    """For each family and dtype how near to the floor, and how many times ours the alternatives take."""
    names = list(dict.fromkeys(name for line in lines for name in line.beside))
    rows = []
    for family, dtype in dict.fromkeys((line.family, line.dtype) for line in lines):
        group = [line for line in lines if (line.family, line.dtype) == (family, dtype) and line.timing is not None]
        if not group:
            continue
        fractions = [line.fraction for line in group]
        ratios = [[b.ratio for line in group if (b := line.beside.get(name)) and b.ratio] for name in names]
        rows.append(
            [
                f"{family} {dtype}",
                str(len(group)),
                f"{min(fractions):.0%}",
                f"{statistics.median(fractions):.0%}",
                f"{max(fractions):.0%}",
                *(f"{ratio(min(found))} to {ratio(max(found))}" if found else _NONE for found in ratios),
            ]
        )
    headings = ["", "lines", "of the floor: least", "median", "most", *(f"{name} takes" for name in names)]
    return Table("summary", headings, rows, [])


def slower(lines: Sequence[Line]) -> list[str]:
    """Where ours takes longer than another way to the same result."""
    return [
        f"{line.name}: {name} takes {ratio(beside.ratio)}"
        for line in lines
        for name, beside in line.beside.items()
        if name not in _NO_RIVALS and beside.ratio is not None and beside.ratio < 1
    ]


def choice_table(choices: Sequence[Choice]) -> Table:
    """Predictions of the cost model beside measured times."""
    rows = []
    for choice in choices:
        times = [seconds(part[way]) for part in (choice.predicted, choice.measured) for way in choice.predicted]
        best = min(choice.measured.values())
        loss = choice.measured[choice.chosen] / best
        rows.append([choice.label, *times, choice.chosen, f"WRONG, {ratio(loss)}" if choice.wrong else "yes"])
    headings = [
        "", "absorb, predicted", "materialize, predicted", "absorb, measured", "materialize, measured", "chosen", "best"
    ]  # fmt: skip
    wrong = sum(choice.wrong for choice in choices)
    below = [f"{wrong} of {len(choices)} choices are wrong; measured is the whole call, own tokens included"]
    return Table('strategy="auto": the cost model', headings, rows, below)


def generation_table(generations: Sequence[Generation]) -> Table:
    """Tokens per second and time to the first token, both ways."""
    rows, below = [], []
    for line in generations:
        if line.left_out:
            below.append(f"left out: {line.label}: {line.left_out}")
            continue
        rate, first = line.tokens_per_second, line.first_token
        rows.append(
            [
                f"{line.model.rpartition('/')[2]} {line.dtype}",
                str(line.context),
                f"{rate['sdpa']:.1f}",
                f"{rate['c2c']:.1f}",
                ratio(rate["c2c"] / rate["sdpa"]),
                seconds(first["sdpa"]),
                seconds(first["c2c"]),
                f"{line.same_tokens} of {line.new_tokens}",
            ]
        )
    headings = [
        "", "context tokens", "tokens/s, SDPA", "tokens/s, ours", "ratio", "first token, SDPA", "first token, ours",
        "same tokens",
    ]  # fmt: skip
    below.append("context: text in the prompt for SDPA, shared context for ours (the sharer's reading not counted)")
    return Table("generate", headings, rows, below)


def as_text(table: Table) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (table.headings, *table.rows)) for i in range(len(table.headings))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

    return "\n".join(
        [table.title, line(table.headings), *map(line, table.rows), *(f"  {text}" for text in table.below)]
    )


def as_markdown(table: Table) -> str:
    """A Markdown table with its title in bold."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

    rule = line(["---", *["---:"] * (len(table.headings) - 1)])
    below = [f"- {text}" for text in table.below]
    parts = [f"**{table.title}**", "", line(table.headings), rule, *map(line, table.rows)]
    return "\n".join([*parts, *(["", *below] if below else [])])
