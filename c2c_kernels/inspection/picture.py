"""The record as a PNG: layers by heads, gates, layers by words, answer tokens by words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from c2c_kernels.inspection.look import Look

_MAP = "viridis"
_WORDS = 60  # columns that there is room for


def draw(look: Look, path: Path) -> None:
    """Writes the heat maps. Of a long document the 60 tokens that drew most attention are shown, in their order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    total = look.drawn_on.sum(dim=0)
    shown = total[1:].topk(min(_WORDS, len(total) - 1)).indices.add(1).sort().values if len(total) > 1 else None
    shown = torch.zeros(1, dtype=torch.long) if shown is None else shown
    figure = Figure(figsize=(17, 12), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1)
    above, below = halves
    narrow = 2 if look.gates is not None else 1
    top = above.subplots(1, narrow + 1, width_ratios=[1] * narrow + [5])
    heads, layers = look.by_head.shape[1], look.by_head.shape[0]
    image = _heat(top[0], look.by_head, "attention on the sharer")
    above.colorbar(image, ax=top[0])
    top[0].set(xlabel="query head", ylabel="layer", xticks=range(0, heads, max(1, heads // 8)))
    if look.gates is not None:
        image = _heat(top[1], look.gates, "gates", most=1.0)
        above.colorbar(image, ax=top[1])
        top[1].set(xlabel="query head", xticks=range(0, heads, max(1, heads // 8)))
    image = _heat(top[-1], look.by_word[:, shown], "attention by layer and word")
    above.colorbar(image, ax=top[-1])
    top[-1].set(ylabel="layer", yticks=range(0, layers, 5 if layers > 12 else 1))
    _label(top[-1].set_xticks, [look.words[index] for index in shown.tolist()], rotation=90)
    axis = below.subplots()
    image = _heat(axis, look.drawn_on[:, shown], "what each answer token drew on, mean over layers and heads")
    below.colorbar(image, ax=axis)
    _label(axis.set_xticks, [look.words[index] for index in shown.tolist()], rotation=90)
    _label(axis.set_yticks, list(look.answer))
    about = look.about
    figure.suptitle(
        f"{about.get('receiver', 'receiver')}, reading {about.get('sharer', 'sharer')}: {about.get('question', '')}",
        parse_math=False,
    )
    figure.savefig(path, dpi=100)


def _heat(axis: Any, values: Tensor, title: str, most: float | None = None) -> Any:
    axis.set_title(title, fontsize=10)
    return axis.imshow(values.numpy(), aspect="auto", cmap=_MAP, vmin=0, vmax=most, interpolation="nearest")


def _label(set_ticks: Any, texts: list[str], rotation: int = 0) -> None:
    for label in set_ticks(range(len(texts)), [repr(text)[1:-1] for text in texts]):
        # parse_math: a token with dollar signs is no formula
        text = label.label1
        text.set(rotation=rotation, fontsize=8, family="monospace", parse_math=False)
