"""From a window of text to rows of the regression: what both models keep of it, rotary embedding removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from c2c_kernels.alignment import token_spans
from c2c_kernels.backends import reference
from c2c_kernels.integrations.transformers.caches import read_cache
from c2c_kernels.integrations.transformers.projected import read_tokens
from c2c_kernels.projectors import CacheProjector, CacheShape, Source, shifted


@dataclass(frozen=True, eq=False)
class Pair:
    """The two models and how their tokens meet.

    Attributes:
        sharer, receiver: models, in evaluation mode.
        sharer_tokenizer, receiver_tokenizer: fast tokenizers.
        sharer_shape, receiver_shape: of their caches.
        plan: an (empty) projector whose `plan` says which tokens meet, and whose prefix the receiver reads first.
    """

    sharer: Any
    receiver: Any
    sharer_tokenizer: Any
    receiver_tokenizer: Any
    sharer_shape: CacheShape
    receiver_shape: CacheShape
    plan: CacheProjector

    @torch.no_grad()
    def rows(self, text: str, sources: Sequence[Source]) -> tuple[Tensor, Tensor]:
        """(features, targets) of a text: float32 (n, sum of source widths) and (n, receiver layers * (key + value)).

        A target row is, layer by layer, [keys before rotation | values], flattened (head, dim).
        """
        sharer_spans = token_spans(self.sharer_tokenizer, text)
        receiver_spans = token_spans(self.receiver_tokenizer, text, add_special_tokens=False)
        plan = self.plan.plan(sharer_spans, receiver_spans)
        theirs = read_cache(read_tokens(self.sharer, sharer_spans.ids), "sharer")
        ours = read_cache(read_tokens(self.receiver, [*self.plan.prefix, *receiver_spans.ids]), "receiver")
        at = torch.arange(len(sharer_spans.ids))
        features = [self._feature(theirs, source, at)[plan.index] for source in sources]
        rows = plan.positions  # of the receiver's sequence, its prefix included
        where = torch.arange(ours[0][0].shape[2])
        targets = []
        for layer, (key, value) in enumerate(ours):
            targets.append(_flat(unrotated(self.receiver_shape, layer, key, where))[rows])
            targets.append(_flat(value)[rows])
        return torch.cat(features, dim=1), torch.cat(targets, dim=1)

    def _feature(self, cache: Sequence[tuple[Tensor, Tensor]], source: Source, at: Tensor) -> Tensor:
        """(sharer tokens, width) of a source, as `CacheProjector.segments` gives it to the kernel."""
        key, value = cache[source.layer]
        stored = key if source.kind == "key" else value
        stored = shifted(stored, source.offset)
        if source.kind == "key":
            stored = unrotated(self.sharer_shape, source.layer, stored, at)
        return _flat(stored)


def unrotated(shape: CacheShape, layer: int, key: Tensor, positions: Tensor) -> Tensor:
    """Keys (batch, heads, len, head_dim) without the rotation that they carry, float32."""
    if not shape.frequencies[shape.layer_frequencies[layer]]:
        return key.float()
    return reference.unrotate(key.float(), *shape.table([layer], positions[None]))


def _flat(stored: Tensor) -> Tensor:
    """(1, heads, len, dim) as (len, heads * dim), float32."""
    return stored[0].transpose(0, 1).flatten(1).float()
