"""Normal equations, summed chunk by chunk: memory depends on the widths, not on the number of tokens.

Products are float32 matrix products that add to float32 totals in place: each chunk is rounded once more, so n chunks
cost about sqrt(n) roundings (7 at 100,000 tokens), far below the ridge, and half the memory of float64; sums of single
numbers are float64. Numbers are taken from a fixed shift (the means of the first chunk), so that large means do not
cost digits. Of the symmetric product only the blocks on and above the diagonal are computed and kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024  # rows of the symmetric product that are computed at a time


class Moments:
    """Sums over tokens of x xT, x yT, y y, x and y for features x and targets y.

    Args:
        features, targets: widths.

    Attributes:
        tokens: how many were added.
        flops: of the matrix products so far, a multiply-add counted as two.
    """

    def __init__(self, features: int, targets: int) -> None:
        self.features, self.targets = features, targets
        self.tokens = 0
        self.flops = 0
        self.shift_x: Tensor | None = None
        self.shift_y: Tensor | None = None
        self.sum_x = torch.zeros(features, dtype=torch.float64)
        self.sum_y = torch.zeros(targets, dtype=torch.float64)
        self.square_y = torch.zeros(targets, dtype=torch.float64)
        starts = range(0, features, BLOCK)
        self.gram = [
            torch.zeros(min(BLOCK, features - start), features - start, dtype=torch.float32) for start in starts
        ]
        self.cross = torch.zeros(features, targets, dtype=torch.float32)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds tokens: x (tokens, features), y (tokens, targets), both float32; they are shifted in place."""
        for name, tensor, width in (("x", x, self.features), ("y", y, self.targets)):
            if tensor.dtype != torch.float32 or tensor.dim() != 2 or tensor.shape[1] != width:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, wanted float32 (tokens, {width})")
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} tokens, y has {len(y)}")
        if self.shift_x is None or self.shift_y is None:
            self.shift_x, self.shift_y = x.mean(dim=0), y.mean(dim=0)
        x -= self.shift_x
        y -= self.shift_y
        self.tokens += len(x)
        self.sum_x += x.sum(dim=0, dtype=torch.float64)
        self.sum_y += y.sum(dim=0, dtype=torch.float64)
        self.square_y += y.square().sum(dim=0, dtype=torch.float64)
        for number, total in enumerate(self.gram):
            start = number * BLOCK
            total.addmm_(x[:, start : start + total.shape[0]].T, x[:, start:])
            self.flops += 2 * len(x) * total.numel()
        self.cross.addmm_(x.T, y)
        self.flops += 2 * len(x) * self.cross.numel()

    def means(self) -> tuple[Tensor, Tensor]:
        """Means of x and y, float64."""
        self._filled()
        assert self.shift_x is not None and self.shift_y is not None
        return self.shift_x + self.sum_x / self.tokens, self.shift_y + self.sum_y / self.tokens

    def variance_y(self) -> Tensor:
        """(targets,) variance of every target, float64."""
        self._filled()
        return self.square_y / self.tokens - (self.sum_y / self.tokens).square()

    def covariance(self, columns: Tensor) -> Tensor:
        """(n, n) float64 covariance of the features `columns` (increasing)."""
        self._filled()
        mean = self.sum_x[columns] / self.tokens
        result = torch.empty(len(columns), len(columns), dtype=torch.float64)
        for number, total in enumerate(self.gram):
            start = number * BLOCK
            (inside,) = torch.nonzero((columns >= start) & (columns < start + total.shape[0]), as_tuple=True)
            if not len(inside):
                continue
            first = int(inside[0])
            part = total[columns[inside] - start][:, columns[first:] - start].double() / self.tokens
            part -= torch.outer(mean[inside], mean[first:])
            result[first : first + len(inside), first:] = part
            result[first:, first : first + len(inside)] = part.T
        return result

    def covariance_between(self, rows: range, columns: range) -> Tensor:
        """(rows, columns) float64 covariance of two runs of features, `rows` wholly before `columns`."""
        self._filled()
        if rows.stop > columns.start:
            raise ValueError(f"rows {rows} must end before columns {columns} begin")
        parts = []
        for number, total in enumerate(self.gram):
            start = number * BLOCK
            first, last = max(rows.start, start), min(rows.stop, start + total.shape[0])
            if first < last:
                parts.append(total[first - start : last - start, columns.start - start : columns.stop - start])
        means = (self.sum_x[rows.start : rows.stop], self.sum_x[columns.start : columns.stop])
        return torch.cat(parts).double() / self.tokens - torch.outer(*(total / self.tokens for total in means))

    def variance_x(self) -> Tensor:
        """(features,) variance of every feature, float64."""
        self._filled()
        square = torch.cat([total.diagonal() for total in self.gram]).double()
        return square / self.tokens - (self.sum_x / self.tokens).square()

    def cross_covariance(self, columns: Tensor, targets: slice) -> Tensor:
        """(n, targets) covariance of features and targets, float64."""
        self._filled()
        part = self.cross[columns, targets].double() / self.tokens
        return part - torch.outer(self.sum_x[columns] / self.tokens, self.sum_y[targets] / self.tokens)

    def _filled(self) -> None:
        if self.tokens == 0:
            raise ValueError("no tokens have been added")

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors by name."""
        state = {
            "tokens": torch.tensor([self.tokens, self.flops]),
            "sum_x": self.sum_x,
            "sum_y": self.sum_y,
            "square_y": self.square_y,
            "cross": self.cross,
        }
        state |= {f"gram.{number}": total for number, total in enumerate(self.gram)}
        if self.shift_x is not None and self.shift_y is not None:
            state |= {"shift_x": self.shift_x, "shift_y": self.shift_y}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`; ValueError for other widths. Takes the tensors over."""
        mine = self.state()
        for name, tensor in mine.items():
            if name not in state or state[name].shape != tensor.shape:
                raise ValueError(f"the moments' {name} is missing or has another shape than {tuple(tensor.shape)}")
        self.tokens, self.flops = (int(number) for number in state["tokens"])
        self.sum_x, self.sum_y, self.square_y = state["sum_x"], state["sum_y"], state["square_y"]
        # earlier versions kept float64
        self.cross = state["cross"].float()
        self.gram = [state[f"gram.{number}"].float() for number in range(len(self.gram))]
        self.shift_x, self.shift_y = state.get("shift_x"), state.get("shift_y")
