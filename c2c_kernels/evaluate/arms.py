"""The five arms as contexts for the receiver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import c2c_kernels as c2c
from c2c_kernels.backends import reference
from c2c_kernels.fitting.reading import unrotated
from c2c_kernels.integrations.transformers import SharedContext, project_text, read_tokens
from c2c_kernels.projectors import CacheProjector, CacheShape

# Texts whose projected caches give the noise its statistics, before anything is scored.
_FOR_STATISTICS = 12
ARMS = ("alone", "text", "projected", "mismatched", "noise")


@dataclass(frozen=True, eq=False)
class Reader:
    """The two models and the projector between them.

    Attributes:
        sharer, receiver: models, the receiver one that `enable` has patched.
        sharer_tokenizer, receiver_tokenizer: fast tokenizers.
        projector: from the sharer's cache to the receiver's.
        backend: of its kernels; None for the fastest.
    """

    sharer: Any
    receiver: Any
    sharer_tokenizer: Any
    receiver_tokenizer: Any
    projector: CacheProjector
    backend: str | None = None

    def read(self, ids: Sequence[int]) -> SharedContext:
        """What the receiver has read itself."""
        return SharedContext.from_caches(read_tokens(self.receiver, ids))

    def project(self, text: str, head: Sequence[int]) -> SharedContext:
        """What the sharer has read of `text`, in the receiver's space, after the receiver's own `head`."""
        ours = (self.receiver, self.receiver_tokenizer)
        theirs = (self.sharer, self.sharer_tokenizer)
        return project_text(self.projector, text, theirs, ours, head=head, backend=self.backend)


class Projections:
    """Projected contexts of texts, those that gave the noise its statistics kept until they are asked for.

    So no text is projected twice: 265 MB for 12 contexts of 480 tokens in SmolLM2-135M's space.

    Args:
        reader: the models.
        texts: in the order in which they are asked for.
        head: ids that the receiver reads before each.

    Attributes:
        statistics: of the projections of some texts, spread over all.
        last: the context of the last text.
    """

    def __init__(self, reader: Reader, texts: Sequence[str], head: Sequence[int]) -> None:
        self._reader, self._texts, self._head = reader, texts, head
        step = max(1, len(texts) // _FOR_STATISTICS)
        chosen = range(0, len(texts), step)[:_FOR_STATISTICS]
        self.statistics = Statistics(reader.projector.receiver)
        self._kept: dict[int, SharedContext] = {}
        for at in chosen:
            self._kept[at] = reader.project(texts[at], head)
            self.statistics.add(self._kept[at])
        self.last = self.take(len(texts) - 1)
        self._kept[len(texts) - 1] = self.last

    def take(self, at: int) -> SharedContext:
        """The context of text number `at`; asked for once."""
        if at in self._kept:
            return self._kept.pop(at)
        return self._reader.project(self._texts[at], self._head)


class Statistics:
    """Mean and deviation of projected keys (rotation removed) and values, per layer, head and dimension.

    Sums are float64. Every projected context is added once; `noise` then draws from what came together.
    """

    def __init__(self, shape: CacheShape) -> None:
        self._shape = shape
        self._sums: list[list[Tensor]] = []  # per layer: of keys and values, of their squares
        self.tokens = 0

    def add(self, context: SharedContext) -> None:
        """Adds the projected segment, the last one, of every layer."""
        rows = []
        for layer, segments in enumerate(context.layers):
            key, value = self._plain(layer, segments[-1])
            rows.append([part for half in (key, value) for part in (half.sum(dim=1), half.square().sum(dim=1))])
        self._sums = (
            rows
            if not self._sums
            else [
                [total + part for total, part in zip(*pair, strict=True)] for pair in zip(self._sums, rows, strict=True)
            ]
        )
        self.tokens += context.layers[0][-1].key.shape[2]

    def noise(self, context: SharedContext, generator: torch.Generator) -> SharedContext:
        """`context` with its projected segments replaced by noise at the same positions.

        Raises:
            ValueError: before two tokens were added.
        """
        if self.tokens < 2:
            raise ValueError("noise needs the statistics of at least two tokens")
        layers = []
        for layer, segments in enumerate(context.layers):
            last = segments[-1]
            key, value = (
                self._draw(layer, 2 * half, stored, generator) for half, stored in enumerate((last.key, last.value))
            )
            if self._turns(layer):
                key = reference.rotate(key, *self._shape.table([layer], _positions(last)[None]))
            made = c2c.SharerSegment(
                key.to(last.key.dtype),
                value.to(last.value.dtype),
                gate=last.gate,
                lengths=last.lengths,
                positions=last.positions,
                visibility=last.visibility,
            )
            layers.append([*segments[:-1], made])
        return SharedContext(layers, context.position_offset)

    def _draw(self, layer: int, at: int, like: Tensor, generator: torch.Generator) -> Tensor:
        total, squares = self._sums[layer][at : at + 2]
        mean = total / self.tokens
        deviation = (squares / self.tokens - mean.square()).clamp(min=0).sqrt()
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32)
        return drawn * deviation[:, None].float() + mean[:, None].float()

    def _plain(self, layer: int, segment: c2c.SharerSegment) -> tuple[Tensor, Tensor]:
        """(heads, len, dim) keys without rotation and values, float64."""
        key = segment.key
        if self._turns(layer):
            key = unrotated(self._shape, layer, key, _positions(segment))
        return key[0].double(), segment.value[0].double()

    def _turns(self, layer: int) -> bool:
        return bool(self._shape.frequencies[self._shape.layer_frequencies[layer]])


def _positions(segment: c2c.SharerSegment) -> Tensor:
    assert segment.positions is not None  # a projected segment has them
    return segment.positions[0]
