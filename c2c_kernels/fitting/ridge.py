"""Affine maps from normal equations: ridge regression, a reduced rank, and which sources to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Moments


@dataclass(frozen=True, eq=False)
class Affine:
    """y = W x + b. weight: (targets, features) float32, or a pair (U, A); bias: (targets,) float32."""

    weight: Tensor | tuple[Tensor, Tensor]
    bias: Tensor


@dataclass(eq=False)
class Normal:
    """The normal equations of some features and some targets, features scaled to unit variance; float64.

    Attributes:
        matrix: (n, n) correlation of the features.
        cross: (n, targets) of the scaled features.
        scale: (n,) standard deviations; features that never change have scale 1 and get the weight 0.
    """

    matrix: Tensor
    cross: Tensor
    scale: Tensor

    @classmethod
    def of(cls, moments: Moments, columns: Tensor, targets: slice) -> Normal:
        """From sums over tokens; `columns` increasing."""
        matrix, cross = moments.covariance(columns), moments.cross_covariance(columns, targets)
        scale = _deviations(matrix.diagonal())
        return cls(matrix / scale / scale[:, None], cross / scale[:, None], scale)

    def solve(self, ridge: float) -> Tensor:
        """(n, targets) weights of the scaled features: (matrix + ridge I)^-1 cross."""
        regular = self.matrix.clone()
        regular.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(regular)
        if int(failed):
            raise ValueError(f"ridge {ridge:g} leaves the normal equations singular: a larger one is wanted")
        return torch.cholesky_solve(self.cross, factor)

    def reduce(self, weights: Tensor, ridge: float, rank: int) -> tuple[Tensor, Tensor]:
        """The best `weights` of this rank: (A^T (n, rank), U (targets, rank)), weights ~ A^T U^T.

        Reduced-rank regression: projects on the leading directions of the fitted targets. Source: Izenman 1975.
        """
        fitted = weights.T @ (self.matrix @ weights) + ridge * weights.T @ weights
        _, directions = torch.linalg.eigh((fitted + fitted.T) / 2)
        leading = directions[:, -rank:]
        return weights @ leading, leading


def affine(moments: Moments, columns: Tensor, targets: slice, ridge: float, rank: int | None) -> Affine:
    """The ridge solution for features `columns` (increasing) and `targets`, of full or reduced rank."""
    normal = Normal.of(moments, columns, targets)
    weights = normal.solve(ridge)
    mean_x, mean_y = moments.means()
    if rank is not None:
        inward, outward = normal.reduce(weights, ridge, rank)
        inward = inward / normal.scale[:, None]
        bias = mean_y[targets] - outward @ (inward.T @ mean_x[columns])
        return Affine((outward.float(), inward.T.float().contiguous()), bias.float())
    weights = weights / normal.scale[:, None]
    return Affine(weights.T.float().contiguous(), (mean_y[targets] - weights.T @ mean_x[columns]).float())


class HeldOut:
    """Tokens that are not fitted: their features (tokens, features) and targets (tokens, targets), float32."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def left_by(self, found: Affine, columns: Tensor, targets: slice) -> float:
        """Mean over targets of the squared error of `found` over the held-out tokens, as a share of their variance."""
        x, y = self.x[:, columns], self.y[:, targets]
        inner = x @ found.weight[1].T @ found.weight[0].T if isinstance(found.weight, tuple) else x @ found.weight.T
        error = (y - inner - found.bias).square().mean(dim=0)
        return float(_share(error, y.var(dim=0, correction=0)).mean())

    def unexplained(self, moments: Moments, columns: Tensor, targets: slice, weights: Tensor, scale: Tensor) -> Tensor:
        """(n,) squared error of scaled weights over the held-out tokens, as a share of the targets' variance.

        n: of the targets that vary, see `_share`.
        """
        mean_x, mean_y = moments.means()
        x = (self.x[:, columns] - mean_x[columns].float()) / scale.float()
        y = self.y[:, targets] - mean_y[targets].float()
        return _share((y - x @ weights.float()).square().mean(dim=0).double(), y.square().mean(dim=0))


class GroupChoice:
    """Chooses for one target after another which groups of features to read.

    Works in float32 on correlations, which are taken from the moments group by group: a matrix of all features would be
    531 MB at a width of 11,520.

    Args:
        moments: of the fitted tokens.
        held_out: tokens to compare on.
        groups: per group its columns, a run of consecutive ones; together all columns in order.
    """

    def __init__(self, moments: Moments, held_out: HeldOut, groups: Sequence[Tensor]) -> None:
        self.moments, self.held_out, self.groups = moments, held_out, groups
        self.runs = [range(int(group[0]), int(group[-1]) + 1) for group in groups]
        self.scale = _deviations(moments.variance_x().float())
        self.corners = [
            self._scaled(moments.covariance(group), run, run) for group, run in zip(groups, self.runs, strict=True)
        ]
        mean, _ = moments.means()
        self.x = (held_out.x - mean.float()) / self.scale

    def _scaled(self, covariance: Tensor, rows: range, columns: range) -> Tensor:
        scaled = covariance.float() / self.scale[columns.start : columns.stop]
        return scaled / self.scale[rows.start : rows.stop, None]

    def _between(self, first: int, second: int) -> Tensor:
        """(first group, second group) correlations of two different groups."""
        if first > second:
            return self._between(second, first).T
        rows, columns = self.runs[first], self.runs[second]
        return self._scaled(self.moments.covariance_between(rows, columns), rows, columns)

    def choose(self, targets: slice, count: int, ridge: float, update: Callable[[], None] = lambda: None) -> list[int]:
        """The `count` groups that together leave least of `targets` unexplained on held-out tokens.

        One by one, each time the one that helps most. A candidate is tried by extending the Cholesky factor of those
        chosen before (L, and z = L^-1 cross), not by solving anew.
        """
        cross = self.moments.cross_covariance(torch.arange(self.moments.features), targets).float()
        cross /= self.scale[:, None]
        y = self.held_out.y[:, targets] - self.moments.means()[1][targets].float()
        variance = y.square().mean(dim=0)
        chosen: list[int] = []
        factor, solved = cross.new_zeros(0, 0), cross.new_zeros(0, cross.shape[1])
        while len(chosen) < min(count, len(self.groups)):
            before = torch.cat([self.groups[number] for number in chosen]) if chosen else torch.arange(0)
            best: tuple[float, int, Tensor, Tensor] | None = None
            for candidate, here in enumerate(self.groups):
                if candidate in chosen:
                    continue
                corner = self.corners[candidate].clone()
                corner.diagonal().add_(ridge)
                beside = [self._between(number, candidate) for number in chosen]
                longer = _extend(factor, torch.cat(beside) if beside else corner[:0], corner)
                rest = cross[here] - longer[len(before) :, : len(before)] @ solved
                lower = longer[len(before) :, len(before) :]
                full = torch.cat([solved, torch.linalg.solve_triangular(lower, rest, upper=False)])
                weights = torch.linalg.solve_triangular(longer.T, full, upper=True)
                error = (y - self.x[:, torch.cat([before, here])] @ weights).square().mean(dim=0)
                score = float(_share(error, variance).mean())
                if best is None or score < best[0]:
                    best = (score, candidate, longer, full)
            assert best is not None
            _, candidate, factor, solved = best
            chosen.append(candidate)
            update()
        return sorted(chosen)


# Of the largest deviation. Undoing a rotation leaves 1e-7 of a key where a model's weights make a dimension 0, as in
# four layers of Gemma 3 270M; what is smaller than this decides nothing in a dot product of float32.
_STILL = 1e-5


def _share(error: Tensor, variance: Tensor) -> Tensor:
    """error / variance of the targets that vary; a single 0 where none does. Both (targets,)."""
    varies = variance > _STILL**2 * variance.max()
    return error[varies] / variance[varies] if varies.any() else error.new_zeros(1)


def _deviations(variances: Tensor) -> Tensor:
    """Standard deviations to divide by; 1 for features that never change."""
    scale = variances.clamp(min=0).sqrt()
    return torch.where(scale > 1e-7 * scale.max(), scale, torch.ones_like(scale))


def _extend(factor: Tensor, beside: Tensor, corner: Tensor) -> Tensor:
    """The Cholesky factor of [[A, beside], [besideT, corner]] from that of A."""
    size, more = factor.shape[0], corner.shape[0]
    row = torch.linalg.solve_triangular(factor, beside, upper=False).T if size else corner.new_zeros(more, 0)
    longer = corner.new_zeros(size + more, size + more)
    longer[:size, :size] = factor
    longer[size:, :size] = row
    longer[size:, size:] = torch.linalg.cholesky(corner - row @ row.T)
    return longer


def choose_ridge(
    moments: Moments, held_out: HeldOut, columns: Tensor, targets: slice, ridges: Sequence[float]
) -> tuple[float, float]:
    """(ridge, unexplained share) of the candidate that leaves least unexplained on held-out tokens."""
    normal = Normal.of(moments, columns, targets)
    scores = []
    for ridge in ridges:
        error = held_out.unexplained(moments, columns, targets, normal.solve(ridge), normal.scale)
        scores.append((float(error.mean()), ridge))
    least, best = min(scores)
    return best, least
