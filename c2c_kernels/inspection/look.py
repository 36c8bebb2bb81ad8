"""The record of one answer's attention, from the weights that the reference backend gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from c2c_kernels.integrations.transformers import SharedContext


@dataclass(frozen=True, eq=False)
class Look:
    """Attention while an answer was written.

    Attributes:
        words: text of every sharer token, in order.
        answer: text of every answer token.
        weights: (layers, q_heads, answer tokens, sharer tokens) float32, the share of a query's attention that goes
            to each token.
        gates: (layers, q_heads) float32, None where all are 1.
        about: names and texts for the reader: receiver, sharer, document, question.
    """

    words: tuple[str, ...]
    answer: tuple[str, ...]
    weights: Tensor
    gates: Tensor | None
    about: dict[str, str]

    @property
    def by_head(self) -> Tensor:
        """(layers, q_heads) share of attention on the sharer, mean over the answer's tokens."""
        return self.weights.sum(dim=3).mean(dim=2)

    @property
    def by_word(self) -> Tensor:
        """(layers, sharer tokens) share of attention, mean over heads and the answer's tokens."""
        return self.weights.mean(dim=(1, 2))

    @property
    def drawn_on(self) -> Tensor:
        """(answer tokens, sharer tokens) share of attention, mean over layers and heads."""
        return self.weights.mean(dim=(0, 1))

    def strongest(self, count: int) -> list[list[int]]:
        """Per answer token the sharer tokens it drew on most, strongest first, `count` at most.

        The first token is left out: it gathers the attention that looks for nothing (the attention sink).
        """
        most = min(count, len(self.words) - 1)
        if most < 1:
            return [[] for _ in self.answer]
        return [[index + 1 for index in row] for row in self.drawn_on[:, 1:].topk(most, dim=1).indices.tolist()]


@torch.inference_mode()
def look(
    model: Any,
    context: SharedContext,
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    words: Sequence[str],
    pieces: Sequence[str],
    gates: Tensor | None = None,
    about: dict[str, str] | None = None,
) -> Look:
    """Reads prompt and answer once more, through the reference path, and keeps the weights on the sharer's tokens.

    Args:
        model: the receiver, patched by `enable`.
        context: of batch 1; the last segment of every layer is the one that is looked at.
        prompt: ids that the receiver read itself.
        answer: ids that it wrote.
        words: text of every token of the last segment.
        pieces: text of every answer token.
        gates: see `Look`.
        about: see `Look`.

    Raises:
        ValueError: for an empty answer, and where `words` or `pieces` are not as many as the tokens.
    """
    if not answer:
        raise ValueError("answer is empty: at least one token is wanted")
    if len(pieces) != len(answer):
        raise ValueError(f"pieces has {len(pieces)} entries, answer {len(answer)} tokens")
    lengths = {segments[-1].key.shape[2] for segments in context.layers if segments}
    if lengths != {len(words)}:
        raise ValueError(f"words has {len(words)} entries, the context's last segment {sorted(lengths)} tokens")
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    given = model(ids, c2c=context, output_attentions=True, use_cache=False).attentions
    # A query that stands before an answer token writes it; own tokens come first, then the segments' in order.
    kept = [layer[0, :, -len(answer) :, -len(words) :].float() for layer in given]
    return Look(tuple(words), tuple(pieces), torch.stack(kept), gates, dict(about or {}))
