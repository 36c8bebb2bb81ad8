"""Keys that come from a regression are stretched away from their mean.

A least-squares prediction varies less than what it predicts, by what it leaves unexplained. Scores over predicted keys
then differ less between tokens than over the receiver's own, and attention is flatter than the receiver means it to be.
One factor for all layers makes up for it; it is chosen by the loss of what follows on text that is not fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from c2c_kernels.alignment import token_spans
from c2c_kernels.fitting.reading import Pair
from c2c_kernels.fitting.ridge import Affine
from c2c_kernels.integrations.transformers import disable, enable, read_tokens
from c2c_kernels.integrations.transformers.attention import PATCH
from c2c_kernels.integrations.transformers.continuation import continuation_loss
from c2c_kernels.projectors import CacheProjector

# Of a window's tokens, the last so many (at most a third) follow, the others are the context.
_CONTINUATION = 128
_LEAST_PART = 3


def stretched(found: Affine, mean: Tensor, factor: float) -> Affine:
    """m + factor (W x + b - m) for the mean m of what was fitted, (targets,) float64."""
    weight = found.weight
    longer = (factor * weight[0], weight[1]) if isinstance(weight, tuple) else factor * weight
    return Affine(longer, (factor * found.bias.double() + (1 - factor) * mean).float())


@torch.no_grad()
def choose_stretch(
    pair: Pair, texts: Iterable[str], factors: Sequence[float], projector: Callable[[float], CacheProjector]
) -> dict[float, float]:
    """Nats per token of what follows, for every factor.

    Args:
        pair: the two models; the receiver's attention runs `merged_attention` meanwhile.
        texts: windows that are not fitted.
        factors: candidates.
        projector: the projector whose keys are stretched by a factor.
    """
    model = pair.receiver
    was_enabled = PATCH in model.__dict__
    prefix = pair.plan.prefix
    head = read_tokens(model, prefix) if prefix else None
    read = []
    for text in texts:
        encoded = pair.receiver_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        following = min(_CONTINUATION, len(ids) // _LEAST_PART)
        if following < 2:
            continue
        context = text[: offsets[-following][0]]
        spans = token_spans(pair.sharer_tokenizer, context)
        own = token_spans(pair.receiver_tokenizer, context, add_special_tokens=False)
        read.append((read_tokens(pair.sharer, spans.ids), spans, own, ids[-following:]))
    tokens = sum(len(ids) - 1 for *_, ids in read)
    losses = {}
    enable(model)
    try:
        for factor in factors:
            tried = projector(factor)
            total = sum(
                float(continuation_loss(model, tried.context(cache, spans, own, prefix=head), ids))
                for cache, spans, own, ids in read
            )
            losses[factor] = total / tokens
    finally:
        if not was_enabled:
            disable(model)
    return losses
