"""The picture of a pair's demo: losses, right answers and attention on the projected cache, a row per direction."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from c2c_kernels.cli import pair_facts
from c2c_kernels.cli.pair_report import ARMS, HEADINGS, OWN, Direction, PairOutcome

_COLOURS = dict(zip(ARMS, ("tab:grey", "tab:green", "tab:blue", "tab:orange"), strict=True))
_MAP = "viridis"


def draw(outcome: PairOutcome, path: Path) -> None:
    """Writes a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6 * len(outcome.directions)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(outcome.directions), 3, squeeze=False)
    for axes, found in zip(grid, outcome.directions, strict=True):
        _losses(axes[0], found)
        _right(axes[1], found)
        image = _heat(axes[2], found)
        figure.colorbar(image, ax=axes[2], label="share of attention on the projected cache")
    figure.savefig(path, dpi=120)


def _losses(axis: Any, found: Direction) -> None:
    named = {**HEADINGS, "none": HEADINGS["none"] if found.own is None else OWN}
    if found.loss is None:
        axis.text(0.5, 0.5, "the document is too short to be cut", ha="center", transform=axis.transAxes)
    else:
        axis.bar(range(len(ARMS)), [found.loss.nats[arm] for arm in ARMS], color=[_COLOURS[arm] for arm in ARMS])
        axis.set_ylabel("nats per token of the document's end")
    axis.set_xticks(range(len(ARMS)), [named[arm].replace(" ", "\n") for arm in ARMS], fontsize=8)
    # parse_math: a name with dollar signs is no formula
    axis.set_title(f"{_short(found.sharer)} to {_short(found.receiver)}", fontsize=10, parse_math=False)
    axis.grid(axis="y", alpha=0.3)


def _right(axis: Any, found: Direction) -> None:
    shares = {
        f"{kind} questions": [right / of for right, of in (found.right(arm, kind) for arm in ARMS)]
        for kind in ("gist", "fact")
        if found.right("text", kind)[1]
    }
    if found.facts is not None:
        counted = pair_facts.right(found.facts)
        shares["facts of\nmade-up texts"] = [counted[arm] / len(found.facts.answers) for arm in ARMS]
    for number, heights in enumerate(shares.values()):
        for at, arm in enumerate(ARMS):
            axis.bar(number + (at - 1.5) * 0.2, heights[at], 0.2, color=_COLOURS[arm])
    if not shares:
        axis.text(0.5, 0.5, "no known answers", ha="center", transform=axis.transAxes)
    axis.set_xticks(range(len(shares)), list(shares))
    axis.set_ylim(0, 1.05)
    axis.set_title("share answered right", fontsize=10)
    axis.grid(axis="y", alpha=0.3)


def _heat(axis: Any, found: Direction) -> Any:
    share = torch.cat([row.share for row in found.questions], dim=2).mean(dim=2)
    image = axis.imshow(share.numpy(), aspect="auto", cmap=_MAP, vmin=0, vmax=1, interpolation="nearest")
    axis.set_xlabel("query head")
    axis.set_ylabel("layer")
    axis.set_xticks(range(0, share.shape[1], math.ceil(share.shape[1] / 12)))
    axis.set_title("all answers", fontsize=10)
    return image


def _short(name: str) -> str:
    return name.rstrip("/").split("/")[-1]
