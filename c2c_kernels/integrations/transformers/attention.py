"""The attention function that Transformers calls in every layer of an enabled model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from c2c_kernels import SharerSegment, merged_attention
from c2c_kernels.backends import reference
from c2c_kernels.integrations.transformers.context import LayerSpace
from c2c_kernels.segment import to_tensors

# Transformers dispatches names with "flash", "sdpa", "/" or "paged|" in them specially.
NAME = "c2c"
# Where `enable` leaves its record on the model, and on every attention module the list of all levels' records.
PATCH = "_c2c_patch"
LEVELS = "_c2c_levels"

Groups = Sequence[Sequence[SharerSegment]]
_NO_SHARER: Groups = ((),)


class MassRecord:
    """What `record_mass` collects.

    Attributes:
        mass: per layer a list with one tensor per forward call, (batch, q_heads, q_len, 1 + segments) fp32: the
            share of attention that the own tokens (0) and each segment hold.
    """

    def __init__(self, layers: int) -> None:
        self.mass: list[list[Tensor]] = [[] for _ in range(layers)]


class Call:
    """What the pre-hook hands to the layers of one forward pass, as the keyword argument `c2c`.

    Attributes:
        layers: per receiver layer, per group of rows that read the same context row, the segments. None: no context.
        spaces: per receiver layer what its keys and values must look like.
        windows: per receiver layer the sliding window of its mask, for attention that does not name it. None: none.
        positions: (batch, q_len) integers, the queries' positions. None: no segment has positions.
        seen: the layers that ran, as they ran, until the forward pass ends. None: nobody asks.
        owner: the `Patch` that made the call.
    """

    def __init__(self, backend: str | None, record: MassRecord | None = None, weights: bool = False) -> None:
        self.backend = backend
        self.record = record
        self.weights = weights
        self.layers: list[list[list[SharerSegment]]] | None = None
        self.spaces: list[LayerSpace | None] = []
        self.windows: list[int | None] = []
        self.seen: list[int] | None = None
        self.owner: Any = None
        self.positions: Tensor | None = None


def attention_forward(
    module: Any,
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

    Args:
        query: (batch, q_heads, q_len, head_dim), after rotary embedding.
        key, value: (batch, kv_heads, len, head_dim), after rotary embedding and cache update.
        attention_mask: (batch, 1, q_len, len), boolean or additive, windows included. None: upper-left causal.
        sliding_window: acts on segments only, as the mask holds it for the own tokens.

    Returns:
        (batch, q_len, q_heads, value_dim) contiguous, and the attention weights where the call wants them, else None.
    """
    call = c2c if type(c2c) is Call else _unhooked(module, c2c)
    _refuse(module, dropout, is_causal, kwargs)
    q_len, unused = query.shape[2], 0
    causal = attention_mask is None and q_len > 1
    if causal and key.shape[2] > q_len:
        # The prefill of an empty StaticCache: what follows the first q_len tokens is not filled yet.
        unused = key.shape[2] - q_len
        key, value = key[:, :, :q_len], value[:, :, :q_len]

    if call.layers is None and call.record is None and not call.weights:
        # Own tokens alone; nothing is built that they do not need, for this runs in every layer of every step.
        out: Any = merged_attention(
            query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scaling, softcap=softcap,
            sinks=s_aux, backend=call.backend,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None

    layer, positions, groups = module.layer_idx, call.positions, _NO_SHARER
    if call.seen is not None:
        call.seen.append(layer)
    if call.layers is not None and (space := call.spaces[layer]) is not None:
        groups = call.layers[layer]
        if (key.shape[1], key.shape[3], value.shape[3], key.device) != space:
            _misfit(module, key, value, space)
        if sliding_window is None:
            sliding_window = call.windows[layer]
        if positions is not None and positions.device != key.device:
            positions = positions.to(key.device)

    options: dict[str, Any] = {"is_causal": causal, "scale": scaling, "softcap": softcap, "sinks": s_aux}
    tensors = (query, key, value, attention_mask, positions)
    if call.weights:
        out, mass, weights = _each_group(_explained, groups, tensors, options | {"window": sliding_window})
        # The own tokens come first, as many as the cache can hold.
        own = F.pad(weights[..., : key.shape[2]], (0, unused))
        weights = torch.cat([own, weights[..., key.shape[2] :]], dim=3)
    else:
        options |= {"segment_window": sliding_window, "backend": call.backend}
        options["return_mass"] = call.record is not None
        out, mass = _each_group(_merged, groups, tensors, options)
        weights = None
    if call.record is not None:
        call.record.mass[layer].append(mass.detach())
    return out.transpose(1, 2).contiguous(), weights


def _each_group(
    run: Callable[..., tuple[Any, ...]],
    groups: Groups,
    tensors: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[Any, ...]:
    """`run` on every group of neighbouring rows and its segments; results are joined along the batch."""
    if len(groups) == 1:
        return run(*tensors, groups[0], options)
    batch = tensors[0].shape[0]
    times = batch // len(groups)
    parts = []
    for index, segments in enumerate(groups):
        rows = slice(index * times, (index + 1) * times)
        own = (t[rows] if t is not None and t.shape[0] == batch else t for t in tensors)
        parts.append(run(*own, segments, options))
    return tuple(None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))


def _merged(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, positions: Any, segments: Any, options: dict[str, Any]
) -> tuple[Any, ...]:
    """(out, mass or None) by the operator."""
    result = merged_attention(
        query, key, value, segments, attn_mask=mask, query_positions=positions if segments else None, **options
    )
    return result if isinstance(result, tuple) else (result, None)


def _explained(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, positions: Any, segments: Any, options: dict[str, Any]
) -> tuple[Any, ...]:
    """(out, mass, weights over own and segment tokens) by the specification, which holds the score matrices."""
    scale = query.shape[3] ** -0.5 if options["scale"] is None else options["scale"]
    out, _, mass, weights = reference.merged_attention(
        query,
        key,
        value,
        [to_tensors(segment, f"segments[{index}]") for index, segment in enumerate(segments)],
        mask,
        options["is_causal"],
        positions,
        None,
        scale,
        None,
        options["window"],
        options["softcap"],
        options["sinks"],
    )
    return out.to(query.dtype), mass.float(), torch.cat(weights, dim=3).to(query.dtype)


def _unhooked(module: nn.Module, given: Any) -> Call:
    """The call of a layer that no pre-hook reached: plain attention, or an error where a context would be lost."""
    if given is not None:
        raise TypeError(
            f"c2c: a layer got a {type(given).__name__} that no pre-hook has read: pass c2c= to the enabled model "
            "itself, as model(...), not to model.forward(...) or an inner module"
        )
    levels = getattr(module, LEVELS, ())
    if any(patch.sessions.stack for patch in levels):
        raise RuntimeError(
            "a session is open, but its context does not reach the layers: the forward pass did not go through the "
            "enabled model's __call__ (it is model.forward(...) or an inner module that was called), or the model's "
            "decoder layers do not hand **kwargs on to their attention and cannot be served"
        )
    return Call(levels[-1].backend if levels else None)


def _refuse(module: nn.Module, dropout: float, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(f"attention dropout ({dropout}) is not supported: set it to 0, or call model.eval()")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{type(module).__name__} is not causal: encoder and cross attention are not supported")
    if kwargs.get("cache") is not None:
        raise ValueError("continuous batching (a paged cache) is not supported")
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a position bias to its scores, which is not supported")


def _misfit(module: Any, key: Tensor, value: Tensor, space: LayerSpace) -> NoReturn:
    own = LayerSpace(key.shape[1], key.shape[3], value.shape[3], key.device)
    differences = ", ".join(
        f"{name} {wanted} in the layer, {got} in the context"
        for name, wanted, got in zip(LayerSpace._fields, own, space, strict=True)
        if wanted != got
    )
    config = getattr(module, "config", None)
    expands = key.shape[1] > (getattr(config, "num_key_value_heads", None) or key.shape[1])
    hint = ""
    if expands or getattr(config, "kv_lora_rank", None):
        # Latent attention (DeepSeek), or heads repeated after the cache (JetMoE).
        hint = (
            f" ({type(module).__name__} may compute its keys and values from what its cache holds: such a cache does "
            "not hold the keys that attention reads, and cannot be read as a context without a projector)"
        )
    raise ValueError(f"c2c: the context does not fit layer {module.layer_idx}: {differences}{hint}")


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
