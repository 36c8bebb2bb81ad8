"""What a context is worth: the loss of the tokens that follow it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from c2c_kernels.integrations.transformers.context import SharedContext


def continuation_loss(model: object, context: SharedContext | None, ids: Sequence[int]) -> Tensor:
    """() float64 sum of -ln p over all tokens but the first, nats; `model` is enabled."""
    given = torch.tensor([list(ids)])
    logits = model(given[:, :-1], c2c=context, use_cache=False).logits[0]  # type: ignore[operator]
    return F.cross_entropy(logits.float(), given[0, 1:], reduction="sum").double()
