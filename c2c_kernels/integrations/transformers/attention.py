"""The attention function that Transformers calls in every layer of an enabled model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from c2c_kernels import SharerSegment, merged_attention
from c2c_kernels.backends import reference
from c2c_kernels.integrations.transformers.context import LayerSpace
from c2c_kernels.segment import to_tensors

# Names that contain "flash", "sdpa", "/" or "paged|" are dispatched specially by Transformers.
NAME = "c2c"
# Where `enable` leaves its record on the model and on every attention module.
PATCH = "_c2c_patch"

Groups = Sequence[Sequence[SharerSegment]]
_NO_SHARER: Groups = ((),)


class MassRecord:
    """What `record_mass` collects.

    Attributes:
        mass: per layer, per forward call, (batch, q_heads, q_len, 1 + segments) fp32: the share of attention that
            the own tokens (0) and each segment hold.
    """

    def __init__(self, layers: int) -> None:
        self.mass: list[list[Tensor]] = [[] for _ in range(layers)]


class Call:
    """What the pre-hook hands to the layers of one forward pass, as the keyword argument `c2c`.

    Attributes:
        layers: per receiver layer the segments, per group of rows that share a context row; None without a context.
        spaces: per receiver layer what its tensors must look like.
        positions: (batch, q_len) integers, the queries' positions; None without a context.
    """

    def __init__(self, backend: str | None, record: MassRecord | None = None, weights: bool = False) -> None:
        self.backend = backend
        self.record = record
        self.weights = weights
        self.layers: list[Any] | None = None
        self.spaces: list[LayerSpace | None] = []
        self.positions: Tensor | None = None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    c2c: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Merged attention of one layer, in the calling convention of Transformers' AttentionInterface.

    query: (batch, q_heads, q_len, head_dim); key, value: (batch, kv_heads, len, head_dim), after rotary embedding and
    cache update. attention_mask: (batch, 1, q_len, len), or None for upper-left causal. Returns (batch, q_len,
    q_heads, value_dim) contiguous, and the attention weights where the call asks for them, else None.
    """
    call = c2c if type(c2c) is Call else _unhooked(module, c2c)
    _refuse(module, dropout, is_causal, kwargs)
    q_len = query.shape[2]
    causal = attention_mask is None and q_len > 1
    if causal and key.shape[2] > q_len:
        # The prefill of an empty StaticCache: the mask is upper-left causal, what follows is not filled yet.
        key, value = key[:, :, :q_len], value[:, :, :q_len]

    layer, positions, groups = module.layer_idx, call.positions, _NO_SHARER
    if call.layers is not None and (space := call.spaces[layer]) is not None:
        groups = call.layers[layer]
        if (key.shape[1], key.shape[3], value.shape[3], key.device) != space:
            _misfit(layer, key, value, space)
        if positions is not None and positions.device != query.device:
            positions = positions.to(query.device)

    def merged(
        query: Tensor, key: Tensor, value: Tensor, mask: Any, at: Any, segments: Any
    ) -> tuple[Tensor, ...]:
        result = merged_attention(
            query,
            key,
            value,
            segments,
            attn_mask=mask,
            is_causal=causal,
            query_positions=at if segments else None,
            scale=scaling,
            segment_window=sliding_window if segments else None,
            softcap=softcap,
            sinks=s_aux,
            return_mass=call.record is not None,
            backend=call.backend,
        )
        return result if isinstance(result, tuple) else (result,)

    def explained(
        query: Tensor, key: Tensor, value: Tensor, mask: Any, at: Any, segments: Any
    ) -> tuple[Tensor, ...]:
        named = [to_tensors(segment, f"segments[{index}]") for index, segment in enumerate(segments)]
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        out, _, mass, weights = reference.merged_attention(
            query, key, value, named, mask, causal, at, None, scale, None, sliding_window, softcap, s_aux
        )
        return out.to(query.dtype), mass.float(), torch.cat(weights, dim=3).to(query.dtype)

    run = explained if call.weights else merged
    results = _each_group(run, groups, query, key, value, attention_mask, positions)
    if call.record is not None:
        call.record.mass[layer].append(results[1].detach())
    return results[0].transpose(1, 2).contiguous(), results[2] if call.weights else None


def _each_group(
    run: Callable[..., tuple[Tensor, ...]],
    groups: Groups,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, ...]:
    """`run` on every group of neighbouring rows, its results joined along the batch."""
    if len(groups) == 1:
        return run(query, key, value, mask, positions, groups[0])
    times = query.shape[0] // len(groups)
    parts = []
    for index, segments in enumerate(groups):
        rows = slice(index * times, (index + 1) * times)
        own_mask = mask if mask is None or mask.shape[0] == 1 else mask[rows]
        at = None if positions is None else positions[rows]
        parts.append(run(query[rows], key[rows], value[rows], own_mask, at, segments))
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _unhooked(module: nn.Module, given: Any) -> Call:
    """The call of a layer that the pre-hook did not reach: plain attention, unless a context would be lost."""
    if given is not None:
        raise TypeError(
            f"c2c: a layer got a {type(given).__name__} that no pre-hook has read; pass c2c= to the enabled model "
            "itself, as model(...), not to model.forward(...) or an inner module"
        )
    patch = getattr(module, PATCH, None)
    if patch is None:
        return Call(None)
    if patch.sessions:
        raise RuntimeError(
            "a session is open, but the forward pass did not go through the enabled model's __call__ (model.forward(...) "
            "or an inner module was called), so its context is not read"
        )
    return Call(patch.backend)


def _refuse(module: nn.Module, dropout: float, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"attention dropout ({dropout}) is not supported: set attention_dropout to 0, or model.eval()"
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(
            f"{type(module).__name__} is not causal: encoder and cross attention are not supported"
        )
    if kwargs.get("cache") is not None:
        raise ValueError("continuous batching (a paged cache) is not supported")
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} adds a position bias to its scores, which is not supported"
        )


def _misfit(layer: int, key: Tensor, value: Tensor, space: LayerSpace) -> None:
    own = LayerSpace(key.shape[1], key.shape[3], value.shape[3], key.device)
    differences = ", ".join(
        f"{name} {wanted} in the layer, {got} in the context"
        for name, wanted, got in zip(LayerSpace._fields, own, space, strict=True)
        if wanted != got
    )
    raise ValueError(f"c2c: the context does not fit layer {layer}: {differences}")


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
