"""Intervals by resampling documents: tokens and questions of one document are not independent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_RESAMPLES = 10_000
_LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its 95% interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def interval(figure: Callable[[Tensor], Tensor], units: int, seed: int = 0) -> Interval:
    """The figure on all units, and the percentile interval of 10,000 resamples of them.

    Args:
        figure: from weights (resamples, units) float64, how often each unit was drawn, to (resamples,) values.
            Sums over units weighted by them are the sums over the resample; ratios of such sums are ratios of means.
        units: documents.
        seed: of the draws; the same seed draws the same documents for every figure.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(units, (_RESAMPLES, units), generator=generator)
    weights = torch.zeros(_RESAMPLES, units, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
    whole = float(figure(torch.ones(1, units, dtype=torch.float64))[0])
    values = figure(weights)
    values = values[values.isfinite()]  # a resample in which nothing can be said divides by 0
    if not len(values):
        return Interval(whole, float("nan"), float("nan"))
    tail = (1 - _LEVEL) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(whole, low, high)
