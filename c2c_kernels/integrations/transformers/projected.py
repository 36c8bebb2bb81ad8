"""From what a sharer of another kind has read to a context for the receiver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

import c2c_kernels as c2c
from c2c_kernels.alignment import TokenSpans, check_offsets, token_spans
from c2c_kernels.backends import reference
from c2c_kernels.integrations.transformers.caches import read_cache
from c2c_kernels.integrations.transformers.context import SharedContext
from c2c_kernels.projectors import CacheProjector, CacheShape

_PROBE_POSITION = 19
# Of the largest key; with a wrong frequency or layout the error is of the size of the key itself.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}


def read_tokens(model: PreTrainedModel, ids: Sequence[int] | Tensor, start: int = 0) -> DynamicCache:
    """What `model` keeps of the tokens `ids`, read at positions start, start + 1, ... without logits.

    ids: (len,) or (batch, len) integers. Gradients as the caller has them enabled.
    """
    tokens = torch.as_tensor(ids, device=model.device)
    tokens = tokens[None] if tokens.dim() == 1 else tokens
    if tokens.shape[1] == 0:
        raise ValueError("ids is empty: at least one token is wanted")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and start + tokens.shape[1] > longest:
        raise ValueError(f"ids reach position {start + tokens.shape[1]}, the model's context is {longest} tokens long")
    cache = DynamicCache()  # without a config: one would cut sliding layers down to their window
    positions = torch.arange(start, start + tokens.shape[1], device=model.device)[None]
    model.base_model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def cache_shape(model: PreTrainedModel) -> CacheShape:
    """The shape of a model's cache and its rotary embedding, tried out on one token at two positions.

    A token that is read alone attends to itself only: wherever it stands its keys differ by the rotation alone.

    Raises:
        ValueError: where layers differ in heads or dimensions, or the rotation is not the one that the model's inverse
            frequencies say (other layouts, positions that act in other ways).
    """
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        raise ValueError(f"{type(model).__name__} has no rotary embedding at base_model.rotary_emb: not supported")
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    names = sorted(set(kinds))
    common = getattr(rotary, "inv_freq", None)
    tables = [getattr(rotary, f"{name}_inv_freq", common) for name in names]
    if any(table is None for table in tables):
        raise ValueError(f"{type(rotary).__name__} has no inverse frequencies (inv_freq): not supported")
    frequencies = tuple(tuple(table.float().tolist()) for table in tables if table is not None)
    scales = {
        float(getattr(rotary, "attention_scaling", getattr(rotary, f"{n}_attention_scaling", 1.0))) for n in names
    }
    if len(scales) > 1:
        raise ValueError(f"layers scale their rotary embedding differently ({sorted(scales)}): not supported")
    token = [int(model.config.bos_token_id or 0)]
    still, moved = (read_cache(read_tokens(model, token, start), "probe") for start in (0, _PROBE_POSITION))
    sizes = {(*key.shape[1::2], value.shape[3]) for key, value in still}
    if len(sizes) > 1:
        raise ValueError(f"layers differ in (kv_heads, head_dim, value_dim): {sorted(sizes)}: not supported")
    heads, dim, value_dim = sizes.pop()
    frequencies = (*frequencies, ())  # for layers without a rotary embedding
    shape = CacheShape(
        layers=len(still),
        kv_heads=heads,
        head_dim=dim,
        value_dim=value_dim,
        frequencies=frequencies,
        layer_frequencies=tuple(names.index(kind) for kind in kinds),
        rotary_scale=scales.pop(),
    )
    which: list[int] = []
    for layer, ((before, _), (after, _)) in enumerate(zip(still, moved, strict=True)):
        position = torch.tensor([_PROBE_POSITION], device=before.device)
        turned = reference.rotate(before.float() / shape.rotary_scale, *shape.table([layer], position[None]))
        bound = _TOLERANCE[before.dtype] * before.abs().max()
        if (turned - after.float()).abs().max() <= bound:
            which.append(shape.layer_frequencies[layer])
        elif (before - after).abs().max() <= bound:
            which.append(len(frequencies) - 1)
        else:
            raise ValueError(
                f"{type(model).__name__}, layer {layer}: keys do not turn with the position as the model's inverse "
                "frequencies say (half-rotation layout): not supported"
            )
    return replace(shape, layer_frequencies=tuple(which))


def projected_context(
    projector: CacheProjector,
    sharer_cache: Cache | Sequence[tuple[Tensor, Tensor]],
    sharer_spans: TokenSpans,
    receiver_spans: TokenSpans,
    *,
    prefix: Cache | Sequence[tuple[Tensor, Tensor]] | None = None,
    visibility: Literal["all", "causal"] = "all",
    backend: str | None = None,
) -> SharedContext:
    """A context that stands for a text that only the sharer has read, in the receiver's space.

    Args:
        projector: made for these two models (`c2c_kernels.identity.check_identity`).
        sharer_cache: what the sharer keeps of the text, batch 1: `read_tokens(sharer, sharer_spans.ids)`.
        sharer_spans, receiver_spans: the text's tokens on both sides (`c2c_kernels.alignment.token_spans`).
        prefix: what the receiver keeps of the tokens that it reads itself before the text:
            `read_tokens(receiver, projector.prefix)`, or the head of a chat template. A segment of its own. None: the
            text comes first.
        visibility: see `SharerSegment`.
        backend: of `project_kv`.

    Returns:
        a context whose segments lie at the positions that the text would have; the receiver's own tokens follow.

    Raises:
        ValueError: for caches that do not fit the projector or the tokens.
    """
    layers = read_cache(sharer_cache, "sharer_cache")
    length = layers[0][0].shape[2]
    if length != len(sharer_spans.ids):
        raise ValueError(f"sharer_cache holds {length} tokens, sharer_spans has {len(sharer_spans.ids)}")
    start = 0
    before: list[list[c2c.SharerSegment]] = [[] for _ in range(projector.receiver.layers)]
    if prefix is not None:
        own = read_cache(prefix, "prefix")
        if len(own) != projector.receiver.layers:
            raise ValueError(f"prefix has {len(own)} layers, the projector's receiver has {projector.receiver.layers}")
        start = own[0][0].shape[2]
        places = torch.arange(start, device=own[0][0].device).expand(own[0][0].shape[0], -1)
        before = [[c2c.SharerSegment(key, value, positions=places)] for key, value in own]
    plan = projector.plan(sharer_spans, receiver_spans, start=start)
    segments = projector.segments(layers, plan, visibility=visibility, backend=backend)
    return SharedContext([[*first, segment] for first, segment in zip(before, segments, strict=True)], plan.end)


def project_text(
    projector: CacheProjector,
    text: str,
    sharer: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    receiver: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    *,
    head: Sequence[int] | None = None,
    visibility: Literal["all", "causal"] = "all",
    backend: str | None = None,
) -> SharedContext:
    """The sharer reads `text`; the context that stands for it in the receiver, which does not.

    Args:
        projector: made for these two models (`c2c_kernels.identity.check_identity`).
        text: what is read.
        sharer, receiver: (model, fast tokenizer) each.
        head: ids that the receiver reads itself before the text: a chat template's head, a document of its own.
            None: the projector's prefix.
        visibility, backend: see `projected_context`.

    Returns:
        see `projected_context`.

    Raises:
        ValueError: for a text that is empty or longer than the sharer's context.
        TypeError: for tokenizers without offsets.
    """
    if not text:
        raise ValueError("text is empty: something to read is wanted")
    check_offsets(sharer[1], "the sharer's tokenizer")
    check_offsets(receiver[1], "the receiver's tokenizer")
    theirs = token_spans(sharer[1], text)
    ours = token_spans(receiver[1], text, add_special_tokens=False)
    before = projector.prefix if head is None else head
    prefix = read_tokens(receiver[0], before) if len(before) else None
    cache = read_tokens(sharer[0], theirs.ids)
    return projected_context(projector, cache, theirs, ours, prefix=prefix, visibility=visibility, backend=backend)
