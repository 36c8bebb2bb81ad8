"""Maps in units of what they read and write.

Columns of a fitted map belong to features whose standard deviations differ by orders of magnitude, rows to targets that
do as well. Adam moves every weight by about the learning rate, whatever its gradient. So what is trained is

    W' = W * deviation(feature) / deviation(target),   b' = b / deviation(target)

where one step means the same for all; a pair W = U A is taken apart at its inner activations likewise. Deviations are
measured over some windows before the first step and stay.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from c2c_kernels.projectors import CacheProjector, Layers, LinearProjector, TokenPlan


class Units(nn.Module):
    """W = W' * factor; factor: broadcastable to W."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor: Tensor
        self.register_buffer("factor", factor)

    def forward(self, inner: Tensor) -> Tensor:
        return inner * self.factor

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.factor


class Deviations:
    """Standard deviations of what the maps of a projector read and write, over tokens that are added."""

    def __init__(self, projector: CacheProjector) -> None:
        self._projector = projector
        self._count = 0
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def none(cls, projector: CacheProjector) -> Deviations:
        """All 1, to be overwritten by those of a checkpoint."""
        made = cls(projector)
        made._count = 1
        for number, layer in enumerate(projector.maps):
            for half in ("key", "value"):
                outward, into, bias = _parts(layer, half)
                sizes = {"y": bias.numel(), "x": outward.shape[2] if into is None else into.shape[1]}
                if into is not None:
                    sizes["inner"] = into.shape[0]
                for name, size in sizes.items():
                    zeros = torch.zeros(size, dtype=torch.float64)
                    made._sums[f"{number}.{half}.{name}"] = (zeros, zeros + 1)
        return made

    @torch.no_grad()
    def add(self, cache: Layers, plan: TokenPlan) -> None:
        """Adds the tokens of a batch; see `CacheProjector.segments`."""
        for number, (key, value) in enumerate(self._projector.features(cache, plan)):
            for half, x in (("key", key), ("value", value)):
                outward, into, bias = _parts(self._projector.maps[number], half)
                self._sum(f"{number}.{half}.x", x)
                if into is not None:
                    x = x @ into.T
                    self._sum(f"{number}.{half}.inner", x)
                self._sum(f"{number}.{half}.y", x @ outward.flatten(0, 1).T + bias.flatten())
        self._count += len(key)

    def _sum(self, name: str, rows: Tensor) -> None:
        total, squares = rows.sum(0, dtype=torch.float64), rows.double().square().sum(0)
        if name in self._sums:
            total, squares = total + self._sums[name][0], squares + self._sums[name][1]
        self._sums[name] = (total, squares)

    def of(self, name: str) -> Tensor:
        """(n,) float32; what never changes gets the mean of the others, or 1."""
        total, squares = self._sums[name]
        deviation = (squares / self._count - (total / self._count).square()).clamp(min=0).sqrt()
        still = deviation <= 1e-7 * deviation.max()
        moving = deviation[~still]
        return torch.where(still, moving.mean() if len(moving) else 1.0, deviation).float()


def use_units(projector: CacheProjector, deviations: Deviations) -> None:
    """Replaces the parameters of all maps by those in units of the deviations; `projector` computes what it did."""
    for number, layer in enumerate(projector.maps):
        for half in ("key", "value"):
            outward, into, _ = _parts(layer, half)
            x, y = deviations.of(f"{number}.{half}.x"), deviations.of(f"{number}.{half}.y")
            y = y.reshape(outward.shape[0], outward.shape[1], 1)
            read = x
            if into is not None:
                read = deviations.of(f"{number}.{half}.inner")
                _register(layer, f"{half}_proj_in", read[:, None] / x)
            _register(layer, f"{half}_proj", y / read)
            _register(layer, f"{half}_bias", y[..., 0])


def drop_units(projector: CacheProjector) -> None:
    """Gives the maps their plain parameters back."""
    for layer in projector.maps:
        for name in list(getattr(layer, "parametrizations", {})):
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)


def factors(projector: CacheProjector) -> Iterable[tuple[str, Tensor]]:
    """(name, factor) of every parameter in units."""
    return projector.named_buffers()


def _register(layer: nn.Module, name: str, factor: Tensor) -> None:
    parametrize.register_parametrization(layer, name, Units(factor))


def _parts(layer: LinearProjector, half: str) -> tuple[Tensor, Tensor | None, Tensor]:
    return getattr(layer, f"{half}_proj"), getattr(layer, f"{half}_proj_in"), getattr(layer, f"{half}_bias")
