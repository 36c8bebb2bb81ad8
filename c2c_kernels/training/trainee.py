"""The loss of a batch: one sharer read, one projection, all rows of the receiver at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

import c2c_kernels as c2c
from c2c_kernels.integrations.transformers import SharedContext, enable, read_tokens
from c2c_kernels.integrations.transformers.caches import read_cache
from c2c_kernels.projectors import CacheProjector
from c2c_kernels.training.batches import NOT_SCORED, Batch
from c2c_kernels.training.head import Head, head_loss

Arm = Literal["alone", "text", "projected"]
Layers = Sequence[tuple[Tensor, Tensor]]


class Trainee(nn.Module):
    """Holds the projector as its only parameters; the models are frozen and stand beside it.

    Args:
        projector: what is trained.
        sharer, receiver: Transformers models; the receiver's body is `enable`d.
        distill, match: see `TrainOptions`.
        backend: of project_kv and merged_attention, None for the fastest.
    """

    def __init__(
        self,
        projector: CacheProjector,
        sharer: Any,
        receiver: Any,
        *,
        distill: float = 0.0,
        match: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.projector = projector
        self.distill, self.match, self.backend = distill, match, backend
        for model in (sharer, receiver):
            model.eval().requires_grad_(False)
        # No modules of this one: neither its parameters nor what DistributedDataParallel looks after.
        self._beside = {"sharer": sharer, "body": enable(receiver.base_model, backend), "head": Head(receiver)}
        self._heads: dict[tuple[int, ...], Layers] = {}

    def forward(self, batch: Batch, cache: Layers | None = None) -> tuple[Tensor, Tensor]:
        """(loss, (3,) cross-entropy, KL and match without gradient: NaN for what is not computed).

        `cache`: what the sharer keeps of the windows, where it has read them already.
        """
        projected = self._projected(batch, cache)
        teacher, own = self._teach(batch)
        hidden = self._rows(batch, self._context(batch, projected, batch.visible))
        scored = batch.targets != NOT_SCORED
        loss, terms = head_loss(self._beside["head"], hidden[scored], batch.targets[scored], teacher, self.distill)
        match = torch.full((), float("nan"))
        if self.match:
            assert own is not None
            error = self._unlike(batch, projected, own)
            loss, match = loss + self.match * error, error.detach()
        return loss, torch.cat([terms, match[None]])

    @torch.no_grad()
    def cross_entropy(self, batch: Batch, arm: Arm) -> float:
        """Sum of -ln p over the scored tokens, with what the arm puts before them; see `c2c_kernels.evaluate`."""
        if arm == "projected":
            context: SharedContext | None = self._context(batch, self._projected(batch), batch.visible)
        elif arm == "text":
            context = self._text_context(batch, self._read_text(batch))
        else:
            context = self._context(batch, None, batch.visible)
        scored = batch.targets != NOT_SCORED
        targets = batch.targets[scored]
        _, terms = head_loss(self._beside["head"], self._rows(batch, context)[scored], targets, None, 0.0)
        return float(terms[0]) * len(targets)

    @torch.no_grad()
    def read(self, batch: Batch) -> Layers:
        """What the sharer keeps of every window."""
        return read_cache(read_tokens(self._beside["sharer"], batch.sharer_ids), "sharer")

    def _projected(self, batch: Batch, cache: Layers | None = None) -> list[c2c.SharerSegment]:
        read = self.read(batch) if cache is None else cache
        return self.projector.segments(read, batch.plan, backend=self.backend)

    def _rows(self, batch: Batch, context: SharedContext | None) -> Tensor:
        """(rows, own tokens, width) last hidden states."""
        body = self._beside["body"]
        return body(input_ids=batch.own_ids, use_cache=False, c2c=context).last_hidden_state

    @torch.no_grad()
    def _read_text(self, batch: Batch) -> tuple[Tensor, Layers]:
        """The receiver reads head and text itself: hidden states (windows, tokens, width) and its cache."""
        from transformers import DynamicCache

        cache = DynamicCache()
        out = self._beside["body"](input_ids=batch.text_ids, past_key_values=cache, use_cache=True, c2c=None)
        return out.last_hidden_state, read_cache(cache, "receiver")

    @torch.no_grad()
    def _teach(self, batch: Batch) -> tuple[Tensor | None, Layers | None]:
        """The teacher's hidden states where tokens are scored, and its cache where `match` asks for it."""
        if not self.distill and not self.match:
            return None, None
        states, cache = self._read_text(batch)
        if not self.distill:
            return None, cache
        scored = batch.targets != NOT_SCORED
        if batch.inside:
            place = batch.offset[:, None] + torch.arange(batch.own_ids.shape[1])
            rows = batch.window[:, None].expand_as(place)
            return states[rows[scored], place[scored]], cache
        return self._rows(batch, self._text_context(batch, (states, cache)))[scored], cache

    def _text_context(self, batch: Batch, read: tuple[Tensor, Layers]) -> SharedContext:
        """What the receiver would have read before each row."""
        _, cache = read
        layers = []
        for key, value in cache:
            positions = torch.arange(key.shape[2]).expand(key.shape[0], -1)
            segment = c2c.SharerSegment(key, value, positions=positions)
            layers.append([_by_row(segment, batch.window, batch.offset)])
        return SharedContext(layers, batch.offset)

    def _context(
        self, batch: Batch, projected: list[c2c.SharerSegment] | None, visible: Tensor
    ) -> SharedContext | None:
        """Head and, where given, what the sharer has read, as each row sees it."""
        heads = self._head_segments(batch)
        layers = []
        for number in range(self.projector.receiver.layers):
            segments = []
            if heads is not None:
                segments.append(_by_row(heads[number], batch.window, batch.head_lengths[batch.window]))
            if projected is not None:
                segments.append(_by_row(projected[number], batch.window, visible))
            layers.append(segments)
        if not any(layers):
            return None
        return SharedContext(layers, batch.offset if projected is not None else batch.head_lengths[batch.window])

    def _head_segments(self, batch: Batch) -> list[c2c.SharerSegment] | None:
        """Per layer what the receiver keeps of every window's head; None where no head has tokens."""
        most = batch.head_ids.shape[1]
        if not most:
            return None
        caches = []
        for ids, length in zip(batch.head_ids.tolist(), batch.head_lengths.tolist(), strict=True):
            known = tuple(ids[:length])
            if known not in self._heads:
                with torch.no_grad():
                    self._heads[known] = read_cache(read_tokens(self._beside["body"], ids), "head")
            caches.append(self._heads[known])
        positions = torch.arange(most).expand(len(caches), -1)
        segments = []
        for layer in zip(*caches, strict=True):
            key, value = (torch.cat([_cut(pair[half], most) for pair in layer]) for half in (0, 1))
            segments.append(c2c.SharerSegment(key, value, positions=positions))
        return segments

    def _unlike(self, batch: Batch, projected: list[c2c.SharerSegment], own: Layers) -> Tensor:
        """Mean over layers and halves of sum (projected - own)^2 / sum (own - mean)^2, over the texts' tokens."""
        valid = torch.ones(batch.plan.index.shape, dtype=torch.bool)
        if batch.plan.lengths is not None:
            valid = torch.arange(valid.shape[1]) < batch.plan.lengths[:, None]
        places = batch.plan.positions[valid]
        windows = torch.arange(len(valid))[:, None].expand_as(valid)[valid]
        errors = []
        for segment, pair in zip(projected, own, strict=True):
            for made, stored in zip((segment.key, segment.value), pair, strict=True):
                wanted = stored[windows, :, places].float()
                got = made.transpose(1, 2)[valid].float()
                spread = (wanted - wanted.mean(dim=0)).square().sum()
                errors.append((got - wanted).square().sum() / spread)
        return torch.stack(errors).mean()


def _by_row(segment: c2c.SharerSegment, window: Tensor, lengths: Tensor) -> c2c.SharerSegment:
    """A segment with one batch row for every receiver row: a stride of 0 where all read the same window."""

    def spread(tensor: Tensor) -> Tensor:
        return tensor.expand(len(window), *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor[window]

    assert segment.positions is not None
    return c2c.SharerSegment(
        spread(segment.key),
        spread(segment.value),
        gate=segment.gate,
        lengths=lengths,
        positions=spread(segment.positions),
    )


def _cut(stored: Tensor, length: int) -> Tensor:
    """(1, heads, length, dim): longer ones cut, shorter ones padded."""
    missing = length - stored.shape[2]
    return torch.nn.functional.pad(stored, (0, 0, 0, missing)) if missing > 0 else stored[:, :, :length]
