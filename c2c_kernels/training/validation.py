"""Windows that are kept from training, looked at in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from c2c_kernels.training.batches import Batch
from c2c_kernels.training.trainee import Arm, Trainee


class Validation:
    """Loss of held-out windows through the projector, beside the receiver alone and with the text.

    Args:
        batches: per kind those to look at.
    """

    def __init__(self, batches: Mapping[str, Sequence[Batch]]) -> None:
        self._batches = {kind: list(found) for kind, found in batches.items() if found}
        self._bounds: dict[str, dict[str, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._batches)

    def look(self, trainee: Trainee) -> dict[str, dict[str, float]]:
        """Per kind nats per token `alone`, with the `text` and `projected`, and the share of the gap `recovered`."""
        found = {}
        for kind, batches in self._batches.items():
            if kind not in self._bounds:
                arms: tuple[Arm, ...] = ("alone", "text")
                self._bounds[kind] = {arm: _loss(trainee, batches, arm) for arm in arms}
            bounds = self._bounds[kind]
            projected = _loss(trainee, batches, "projected")
            gap = bounds["alone"] - bounds["text"]
            recovered = (bounds["alone"] - projected) / gap if gap else float("nan")
            found[kind] = {**bounds, "projected": projected, "recovered": recovered}
        return found


def _loss(trainee: Trainee, batches: Sequence[Batch], arm: Arm) -> float:
    return sum(trainee.cross_entropy(batch, arm) for batch in batches) / sum(batch.scored for batch in batches)


def text_of(found: Mapping[str, Any]) -> str:
    """One line of what `look` found."""
    return "; ".join(
        f"held-out {kind}: {one['projected']:.3f} nats a token (alone {one['alone']:.3f}, text {one['text']:.3f}), "
        f"gap recovered {one['recovered']:.1%}"
        for kind, one in found.items()
    )
