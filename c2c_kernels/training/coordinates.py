"""The coordinates in which maps are trained: inputs centred and whitened, outputs in standard deviations.

What a map reads is far from white: dimensions have means of many deviations, differ in scale by orders of magnitude,
and go together. In plain coordinates Adam moves the few directions that all of this favours, above all the mean output.
With x of mean m and covariance D (R + r I) D = L LT (D the deviations, R the correlation, r a ridge), and s the
deviations of the outputs,

    W' = diag(1/s) W L,   b' = diag(1/s) (b + W m)            y = diag(s) (W' L^-1 (x - m) + b')

are trained instead, from gradients of W and b by the chain rule; every step of Adam then means about the same for all.
A pair W = U A has A' = A L, and U in units of the deviations of A' (x - m). Moments are those of some windows before
the first step, and stay. Source: natural gradient for linear layers, Desjardins et al. 2015 (arXiv 1507.00210).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from c2c_kernels.projectors import CacheProjector, Layers, LinearProjector, Source, TokenPlan

RIDGE = 0.1  # of unit variance: directions with less than a tenth of it are not blown up


@dataclass(eq=False)
class Whitening:
    """Of what one list of sources gives: mean (width,) and L^-1 (width, width)."""

    mean: Tensor
    inverse: Tensor


class InputMoments:
    """Sums over tokens of what maps read, one set for every different list of sources."""

    def __init__(self, projector: CacheProjector) -> None:
        self._projector = projector
        self._sums: dict[tuple[Source, ...], tuple[Tensor, Tensor]] = {}
        self.tokens = 0

    @torch.no_grad()
    def add(self, cache: Layers, plan: TokenPlan) -> None:
        """Adds the tokens of a batch; see `CacheProjector.segments`."""
        seen = set()
        count = 0
        for layer, features in zip(self._projector.maps, self._projector.features(cache, plan), strict=True):
            for sources, x in zip((layer.key_sources, layer.value_sources), features, strict=True):
                if sources in seen:
                    continue
                seen.add(sources)
                x = x.double()
                total, products = x.sum(0), x.T @ x
                if sources in self._sums:
                    total, products = total + self._sums[sources][0], products + self._sums[sources][1]
                self._sums[sources] = (total, products)
                count = len(x)
        self.tokens += count

    def whitening(self, sources: tuple[Source, ...], dtype: torch.dtype = torch.float32) -> tuple[Whitening, Tensor]:
        """And the factor L itself, which is needed once; computed in float64, given as `dtype`."""
        total, products = self._sums[sources]
        mean = total / self.tokens
        covariance = products / self.tokens - torch.outer(mean, mean)
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        still = deviation <= 1e-7 * deviation.max()
        moving = deviation[~still]
        deviation = torch.where(still, moving.mean() if len(moving) else 1.0, deviation)
        regular = covariance / deviation / deviation[:, None]
        regular.diagonal().add_(RIDGE)
        factor = deviation[:, None] * torch.linalg.cholesky(regular)
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=torch.float64), upper=False)
        # one layout, one rounding
        mean, inverse, factor = (part.to(dtype).contiguous() for part in (mean, inverse, factor))
        return Whitening(mean, inverse), factor


class Coordinates:
    """The parameters that an optimiser moves, in place of a projector's maps.

    Args:
        projector: its maps get the gradients; `push` writes what they become.
        moments: of what the maps read; None: everything comes from `load_state`.

    Attributes:
        maps: per name of a projector's parameter the one that is trained in its place, in their order.
    """

    def __init__(self, projector: CacheProjector, moments: InputMoments | None) -> None:
        self._projector = projector
        self._whitenings: dict[tuple[Source, ...], Whitening] = {}
        self._scales: dict[str, Tensor] = {}  # of outputs, and of inner activations
        self.maps: dict[str, nn.Parameter] = {}
        factors: dict[tuple[Source, ...], Tensor] = {}
        for number, layer, half in self._halves():
            sources = _sources(layer, half)
            if sources not in self._whitenings:
                dtype = layer.key_bias.dtype
                if moments is None:
                    width = sum(projector.sharer.width(source) for source in sources)
                    square = torch.eye(width, dtype=dtype)
                    self._whitenings[sources], factors[sources] = Whitening(square.new_zeros(width), square), square
                else:
                    self._whitenings[sources], factors[sources] = moments.whitening(sources, dtype)
            self._enter(f"layers.{number}.{half}", layer, half, factors[sources])

    @torch.no_grad()
    def pull(self) -> None:
        """Gradients of the trained parameters from those of the projector's, which are dropped."""
        for number, layer, half in self._halves():
            name, white = f"layers.{number}.{half}", self._whitenings[_sources(layer, half)]
            outward, into, bias = _parts(layer, half)
            scale = self._scales[f"{name}.out"]
            of_weight, of_bias = _gradient(outward).flatten(0, 1), _gradient(bias).flatten()
            if into is None:
                centred = of_weight - torch.outer(of_bias, white.mean)
                self._give(f"{name}_proj", scale[:, None] * (centred @ white.inverse.T))
            else:
                inner = self._scales[f"{name}.inner"]
                centred = of_weight - torch.outer(of_bias, into @ white.mean)
                self._give(f"{name}_proj", scale[:, None] * centred / inner)
                through = _gradient(into) - torch.outer(outward.flatten(0, 1).T @ of_bias, white.mean)
                self._give(f"{name}_proj_in", through @ white.inverse.T)
                into.grad = None
            self._give(f"{name}_bias", scale * of_bias)
            outward.grad = bias.grad = None

    @torch.no_grad()
    def push(self) -> None:
        """Writes the projector's parameters."""
        for number, layer, half in self._halves():
            name, white = f"layers.{number}.{half}", self._whitenings[_sources(layer, half)]
            outward, into, bias = _parts(layer, half)
            scale = self._scales[f"{name}.out"][:, None]
            if into is None:
                weight = scale * (self.maps[f"{name}_proj"] @ white.inverse)
                at_mean = weight @ white.mean
            else:
                weight = scale * self.maps[f"{name}_proj"] / self._scales[f"{name}.inner"]
                into.copy_(self.maps[f"{name}_proj_in"] @ white.inverse)
                at_mean = weight @ (into @ white.mean)
            outward.copy_(weight.view_as(outward))
            bias.copy_((scale[:, 0] * self.maps[f"{name}_bias"] - at_mean).view_as(bias))

    def state(self) -> dict[str, Tensor]:
        """Everything but what follows from it, as tensors by name."""
        found = {f"map.{name}": parameter.detach() for name, parameter in self.maps.items()}
        found |= {f"scale.{name}": scale for name, scale in self._scales.items()}
        for number, white in enumerate(self._whitenings.values()):
            found |= {f"white.{number}.{part}": tensor for part, tensor in vars(white).items()}
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; the projector's parameters follow."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.push()

    def _halves(self) -> Iterator[tuple[int, LinearProjector, Literal["key", "value"]]]:
        for number, layer in enumerate(self._projector.maps):
            yield number, layer, "key"
            yield number, layer, "value"

    @torch.no_grad()
    def _enter(self, name: str, layer: LinearProjector, half: Literal["key", "value"], factor: Tensor) -> None:
        white = self._whitenings[_sources(layer, half)]
        outward, into, bias = _parts(layer, half)
        weight = outward.flatten(0, 1)
        if into is None:
            whole = weight @ factor
            at_mean = weight @ white.mean
        else:
            inward = into @ factor
            self.maps[f"{name}_proj_in"] = nn.Parameter(inward)
            self._scales[f"{name}.inner"] = _positive(inward.norm(dim=1))
            whole = weight @ inward
            at_mean = weight @ (into @ white.mean)
        scale = _positive(whole.norm(dim=1))  # the outputs' deviations, inputs being white
        self._scales[f"{name}.out"] = scale
        trained = whole if into is None else weight * self._scales[f"{name}.inner"]
        self.maps[f"{name}_proj"] = nn.Parameter(trained / scale[:, None])
        self.maps[f"{name}_bias"] = nn.Parameter((bias.flatten() + at_mean) / scale)

    def _give(self, name: str, gradient: Tensor) -> None:
        self.maps[name].grad = gradient


def _sources(layer: LinearProjector, half: Literal["key", "value"]) -> tuple[Source, ...]:
    return layer.key_sources if half == "key" else layer.value_sources


def _parts(layer: LinearProjector, half: str) -> tuple[nn.Parameter, nn.Parameter | None, nn.Parameter]:
    return getattr(layer, f"{half}_proj"), getattr(layer, f"{half}_proj_in"), getattr(layer, f"{half}_bias")


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _positive(scale: Tensor) -> Tensor:
    """What does not move gets the mean of the others, or 1."""
    still = scale <= 1e-7 * scale.max()
    moving = scale[~still]
    return torch.where(still, moving.mean() if len(moving) else 1.0, scale)
