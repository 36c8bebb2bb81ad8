"""The picture: where the receiver's attention went, layer by layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from c2c_kernels.cli.report import Outcome, QuestionRow

_MAP = "viridis"


def draw(outcome: Outcome, pieces: list[list[str]], path: Path) -> None:
    """Writes heat maps of the share of attention on the sharers.

    Args:
        outcome: what was measured.
        pieces: for every question the answer's tokens as text.
        path: of the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heads = outcome.questions[0].share.shape[1]
    widths = [max(heads, 6), *(max(len(row.cache.tokens), 6) for row in outcome.questions)]
    cell = min(0.30, 24 / sum(widths))  # inches; long answers get narrow cells
    labelled = math.ceil(0.15 / cell)  # every how many tokens there is room for a label
    figure = Figure(figsize=(2.5 + cell * sum(widths) + 0.5 * len(widths), 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(widths), width_ratios=widths)
    by_head = torch.cat([row.share for row in outcome.questions], dim=2).mean(dim=2)
    image = _heat(axes[0], by_head, "all answers, by head")
    axes[0].set_xlabel("query head")
    axes[0].set_ylabel("layer")
    axes[0].set_xticks(range(0, heads, math.ceil(heads / 12)))
    for axis, row, texts in zip(axes[1:], outcome.questions, pieces, strict=True):
        _heat(axis, row.share.mean(dim=1), _title(row))
        axis.set_xticks(range(0, len(texts), labelled), [repr(text)[1:-1] for text in texts[::labelled]])
        for label in axis.get_xticklabels():
            # parse_math: a token with dollar signs is no formula
            label.set(rotation=90, fontsize=9, family="monospace", parse_math=False)
        axis.set_xlabel("answer token")
        axis.set_yticklabels([])
    figure.colorbar(image, ax=list(axes), label="share of attention on the sharer's cache", pad=0.01)
    figure.suptitle(f"{outcome.receiver}: attention on a text that only the sharer has read")
    figure.savefig(path, dpi=120)


def _heat(axis: Any, shares: torch.Tensor, title: str) -> Any:
    image = axis.imshow(shares.numpy(), aspect="auto", cmap=_MAP, vmin=0, vmax=1, interpolation="nearest")
    axis.set_yticks(range(0, shares.shape[0], 5 if shares.shape[0] > 12 else 1))
    axis.set_title(title, fontsize=10)
    return image


def _title(row: QuestionRow) -> str:
    words, lines, width = row.question.split(), [""], max(len(row.cache.tokens) * 2, 18)
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
