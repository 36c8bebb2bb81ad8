"""From a sharer's cache and what the caller says of it to one segment per receiver layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

import c2c_kernels as c2c

# Exact types: quantised and hybrid layers are subclasses of these with other contents.
_READABLE = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
_ADVICE = "capture the sharer's cache with DynamicCache() (no config, no offloading)"


class Valid(NamedTuple):
    """Which tokens of a sharer count: all, the first `lengths` (batch,) of each row, or a `mask` (batch, len)."""

    lengths: Tensor | None = None
    mask: Tensor | None = None


def read_cache(cache: Cache | Sequence[tuple[Tensor, Tensor]], name: str) -> list[tuple[Tensor, Tensor]]:
    """Per layer (key, value), each (batch, heads, len, head_dim): views of what the cache holds now.

    Raises ValueError for quantised, offloaded, truncated, linear-attention, encoder-decoder and empty caches.
    """
    if isinstance(cache, EncoderDecoderCache):
        raise ValueError(f"{name} is an EncoderDecoderCache: pass its self_attention_cache")
    if isinstance(cache, Cache):
        if cache.offloading:
            raise ValueError(f"{name} is offloaded to the CPU: {_ADVICE}")
        layers = [_layer_tensors(layer, f"{name}.layers[{index}]") for index, layer in enumerate(cache.layers)]
    elif isinstance(cache, Sequence):
        layers = [_pair(pair, f"{name}[{index}]") for index, pair in enumerate(cache)]
    else:
        raise TypeError(
            f"{name} must be a Transformers Cache or per layer a (key, value) pair, got {type(cache).__name__}"
        )
    if not layers:
        raise ValueError(f"{name} has no layers: run its model on the text first")
    first = layers[0][0]
    for index, (key, value) in enumerate(layers):
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise ValueError(
                f"{name} layer {index}: key and value must be (batch, heads, len, head_dim) with batch, heads and len "
                f"in common, got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        if (key.shape[0], key.shape[2]) != (first.shape[0], first.shape[2]):
            raise ValueError(
                f"{name} layer {index}: batch and len are {key.shape[0]} and {key.shape[2]}, "
                f"in layer 0 they are {first.shape[0]} and {first.shape[2]}"
            )
    return layers


def _layer_tensors(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    kind = type(layer)
    if kind not in _READABLE:
        raise ValueError(f"{name} is a {kind.__name__}, which does not hold plain keys and values: {_ADVICE}")
    if not layer.is_initialized:
        raise ValueError(f"{name} is empty: run its model on the text first")
    seen, held = int(layer.get_seq_length()), layer.keys.shape[2]
    if seen > held:
        raise ValueError(f"{name} is a sliding window that has dropped {seen - held} of {seen} tokens: {_ADVICE}")
    return layer.keys[:, :, :seen], layer.values[:, :, :seen]


def _pair(pair: Any, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(x, Tensor) for x in pair):
        return pair[0], pair[1]
    raise TypeError(f"{name} must be a (key, value) pair of tensors, got {type(pair).__name__}")


def per_cache(name: str, value: Any, count: int) -> list[Any]:
    """One entry per cache: from a list of them, or from one entry for all."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) == count:
        return list(value)
    if count == 1:
        return [value]
    raise ValueError(f"{name} must have one entry per cache ({count}), got {len(value)}")


def sharer_segments(
    layers: list[tuple[Tensor, Tensor]],
    where: str,
    batch: int,
    *,
    projectors: Any,
    gates: Any,
    positions: Any,
    visibility: Any,
    attention_mask: Any,
    layer_map: Any,
) -> tuple[list[c2c.SharerSegment | None], Tensor]:
    """One sharer's segment per receiver layer, and (batch,) the position after its last token."""
    if visibility not in ("all", "causal"):
        raise ValueError(f'visibility of {where} must be "all" or "causal", got {visibility!r}')
    own_batch, _, length, _ = layers[0][0].shape
    device = layers[0][0].device
    valid = _valid_tokens(attention_mask, own_batch, length, f"attention_masks of {where}")
    place = _positions(positions, valid, own_batch, length, device, f"positions of {where}")
    if visibility == "causal" and place is None:
        raise ValueError(f'visibility "causal" of {where} needs positions')
    source = _layer_map(layer_map, projectors, len(layers), f"layer_maps of {where}")
    gate_of = _gates(gates, valid, len(source), device, f"gates of {where}")

    def rows(tensor: Any) -> Any:
        return tensor if tensor is None or own_batch == batch else tensor.expand(batch, *tensor.shape[1:])

    lengths, placed = rows(valid.lengths), rows(place)
    column: list[c2c.SharerSegment | None] = []
    for layer, sharer_layer in enumerate(source):
        if sharer_layer is None:
            column.append(None)
            continue
        key, value = layers[sharer_layer]
        column.append(
            c2c.SharerSegment(
                rows(key),
                rows(value),
                *_projector(projectors, layer, f"projectors of {where}"),
                gate=_on(gate_of[layer], key.device),
                lengths=_on(lengths, key.device),
                positions=_on(placed, key.device),
                visibility=visibility,
            )
        )
    if place is None or visibility == "causal" or length == 0:
        return column, torch.zeros(batch, dtype=torch.long, device=device)
    return column, _ends(place, valid).expand(batch)


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """`tensor` on the device of its layer: a model's layers may be spread over several."""
    return None if tensor is None else tensor.to(device)


def _valid_tokens(attention_mask: Any, batch: int, length: int, name: str) -> Valid:
    """What a padding mask (batch, len) says in its cheapest form: nothing, lengths (right padding), or the mask."""
    if attention_mask is None:
        return Valid()
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"{name} must be a tensor (batch, len), got {type(attention_mask).__name__}")
    if tuple(attention_mask.shape) != (batch, length):
        raise ValueError(f"{name} must be ({batch}, {length}) like its cache, got {tuple(attention_mask.shape)}")
    mask = attention_mask != 0
    if bool(mask.all()):
        return Valid()
    lengths = mask.sum(dim=1)
    if torch.equal(mask, torch.arange(length, device=mask.device) < lengths[:, None]):
        return Valid(lengths=lengths)
    return Valid(mask=mask)


def _positions(positions: Any, valid: Valid, batch: int, length: int, device: torch.device, name: str) -> Tensor | None:
    if positions is False:
        return None
    if positions is None:
        if valid.mask is not None:
            raise ValueError(
                f"{name} are needed, as its attention mask is not plain right padding: mask.cumsum(-1) - 1 where "
                "generate read the text, arange(len) where a plain forward pass did"
            )
        return torch.arange(length, device=device).expand(batch, length)
    tensor = torch.as_tensor(positions, device=device)
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {tensor.dtype}")
    if tuple(tensor.shape) not in ((length,), (batch, length)):
        raise ValueError(f"{name} must be ({length},) or ({batch}, {length}) like its cache, got {tuple(tensor.shape)}")
    return tensor.expand(batch, length)


def _ends(place: Tensor, valid: Valid) -> Tensor:
    """(batch,) one past the last position of the tokens that count."""
    ends = place.long() + 1
    if valid.lengths is not None:
        tokens = torch.arange(place.shape[1], device=place.device)
        ends = ends.masked_fill(tokens >= valid.lengths[:, None], 0)
    elif valid.mask is not None:
        ends = ends.masked_fill(~valid.mask, 0)
    return ends.amax(dim=1)


def _layer_map(layer_map: Any, projectors: Any, sharer_layers: int, name: str) -> list[int | None]:
    """Per receiver layer the sharer layer it reads."""
    if layer_map is None:
        if isinstance(projectors, Sequence) and len(projectors) != sharer_layers:
            raise ValueError(
                f"{name} is needed: there are {len(projectors)} projectors for {sharer_layers} sharer layers"
            )
        return list(range(sharer_layers))
    for layer, source in enumerate(layer_map):
        if source is not None and not 0 <= source < sharer_layers:
            raise ValueError(f"{name}: layer {layer} reads sharer layer {source}, there are {sharer_layers}")
    return list(layer_map)


def _projector(projectors: Any, layer: int, name: str) -> tuple[Any, Any, Any, Any]:
    """(key_proj, value_proj, key_bias, value_bias) of a receiver layer."""
    if projectors is None:
        return None, None, None, None
    if not isinstance(projectors, (Sequence, Mapping)):
        raise TypeError(f"{name} must be a list or mapping over receiver layers, got {type(projectors).__name__}")
    try:
        entry = projectors[layer]
    except (IndexError, KeyError):
        raise ValueError(f"{name} has no entry for receiver layer {layer}") from None
    if entry is None:
        return None, None, None, None
    if isinstance(entry, (tuple, list)):
        if not 2 <= len(entry) <= 4:
            raise ValueError(
                f"{name}, layer {layer}: wanted (key_proj, value_proj[, key_bias[, value_bias]]), "
                f"got {len(entry)} entries"
            )
        key_proj, value_proj, key_bias, value_bias = (*entry, None, None)[:4]
        return key_proj, value_proj, key_bias, value_bias
    if not (hasattr(entry, "key_proj") and hasattr(entry, "value_proj")):
        raise TypeError(f"{name}, layer {layer}: {type(entry).__name__} has no key_proj and value_proj")
    return entry.key_proj, entry.value_proj, getattr(entry, "key_bias", None), getattr(entry, "value_bias", None)


def _gates(gates: Any, valid: Valid, layers: int, device: torch.device, name: str) -> list[Tensor | None]:
    """A gate per receiver layer; a token that a mask hides gets the gate 0, which removes it exactly."""
    if isinstance(gates, (list, tuple)):
        if len(gates) != layers:
            raise ValueError(f"{name} must have one entry per receiver layer ({layers}), got {len(gates)}")
        made = [_gate(gate, device, f"{name}, layer {layer}") for layer, gate in enumerate(gates)]
    else:
        made = [_gate(gates, device, name)] * layers
    if valid.mask is None:
        return made
    shown = valid.mask[:, None, :]
    masked: dict[int, Tensor] = {}
    for gate in made:
        if id(gate) not in masked:
            masked[id(gate)] = shown.float() if gate is None else torch.where(shown, gate, gate.new_zeros(()))
    return [masked[id(gate)] for gate in made]


def _gate(gate: Any, device: torch.device, name: str) -> Tensor | None:
    if gate is None:
        return None
    if not isinstance(gate, Tensor):
        if not isinstance(gate, (int, float)):
            raise TypeError(f"{name} must be None, a number or a tensor, got {type(gate).__name__}")
        gate = torch.tensor(float(gate), device=device)
    if not gate.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {gate.dtype}")
    if not bool(((gate.detach() >= 0) & gate.detach().isfinite()).all()):
        raise ValueError(f"{name} must be finite and >= 0 everywhere, and not NaN")
    return gate
