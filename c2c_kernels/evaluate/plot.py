"""The picture: losses, recovered shares and accuracies with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from c2c_kernels.evaluate.arms import ARMS
from c2c_kernels.evaluate.bootstrap import Interval
from c2c_kernels.evaluate.results import Evaluation

_COLOURS = dict(zip(ARMS, ("tab:grey", "tab:green", "tab:blue", "tab:orange", "tab:red"), strict=True))


def draw(evaluation: Evaluation, path: Path) -> None:
    """Writes one row of panels as a PNG file: loss per token, recovered share, accuracy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[tuple[str, list[tuple[str, dict[str, Interval]]]]] = []
    if evaluation.losses:
        panels += [
            (
                "loss of the continuation, nats per token",
                [(r.name, {a: r.loss(a) for a in ARMS}) for r in evaluation.losses],
            ),
            (
                "share of the loss gap recovered",
                [(r.name, {a: r.recovered(a) for a in ARMS[2:]}) for r in evaluation.losses],
            ),
        ]
    if evaluation.answers:
        panels.append(
            ("questions answered right", [(r.name, {a: r.accuracy(a) for a in ARMS}) for r in evaluation.answers])
        )
    figure = Figure(figsize=(4.8 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, groups) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _bars(axis, title, groups)
    handles = [figure.axes[0].bar(0, 0, color=_COLOURS[arm], label=arm) for arm in ARMS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(ARMS))
    figure.suptitle(f"{evaluation.about['sharer']} to {evaluation.about['receiver']}, 95% intervals over documents")
    figure.savefig(path, dpi=120)


def _bars(axis: Any, title: str, groups: list[tuple[str, dict[str, Interval]]]) -> None:
    for number, (_, figures) in enumerate(groups):
        width = 0.8 / len(figures)
        for at, (arm, found) in enumerate(figures.items()):
            x = number + (at - (len(figures) - 1) / 2) * width
            axis.bar(x, found.value, width, color=_COLOURS[arm])
            axis.vlines(x, found.low, found.high, color="black", linewidth=1)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set_xticks(range(len(groups)), [name for name, _ in groups])
    axis.set_title(title, fontsize=10)
    axis.grid(axis="y", alpha=0.3)
