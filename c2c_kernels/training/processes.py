"""The processes of a data-parallel run: one where torch.distributed is not started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed


@dataclass(frozen=True)
class Processes:
    """This process and how many there are."""

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Processes:
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    def from_first(self, value: float) -> float:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        distributed.broadcast(tensor, 0)
        return float(tensor)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over processes."""
        if self.count > 1:
            distributed.all_reduce(tensor)
            tensor /= self.count
        return tensor

    def same(self, name: str, value: Any) -> None:
        """RuntimeError where processes have been given other things."""
        if self.count > 1:
            every: list[Any] = [None] * self.count
            distributed.all_gather_object(every, value)
            if any(other != every[0] for other in every):
                raise RuntimeError(f"processes of one run must have the same {name}")
