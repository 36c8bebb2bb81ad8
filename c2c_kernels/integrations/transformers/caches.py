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

_RECAPTURE = "capture the sharer's cache with DynamicCache() (no config, no offloading)"


class Tokens(NamedTuple):
    """Which tokens of a sharer count: all, the first `lengths` (batch,) of each row, or a `mask` (batch, len)."""

    lengths: Tensor | None = None
    mask: Tensor | None = None


def _layer_tensors(layer: object, name: str) -> tuple[Tensor, Tensor]:
    # Exact types: quantised and hybrid layers are subclasses of these, with other contents.
    kind = type(layer)
    if kind not in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer):
        raise ValueError(
            f"{name} is a {kind.__name__}, whose keys and values cannot be read as they are; {_RECAPTURE}"
        )
    if not layer.is_initialized:
        raise ValueError(f"{name} is empty: run the sharer on its text first")
    held = layer.keys.shape[2]
    seen = int(layer.get_seq_length())
    if seen > held or (kind is DynamicSlidingWindowLayer and seen != held):
        raise ValueError(
            f"{name} is a sliding window that has dropped {seen - held} of {seen} tokens; {_RECAPTURE}"
        )
    return layer.keys[:, :, :seen], layer.values[:, :, :seen]


def read_cache(cache: Cache | Sequence[tuple[Tensor, Tensor]], name: str) -> list[tuple[Tensor, Tensor]]:
    """Per layer (key, value), each (batch, heads, len, head_dim): views of what the cache holds now.

    Raises ValueError for quantised, offloaded, truncated, linear-attention, encoder-decoder and empty caches.
    """
    if isinstance(cache, EncoderDecoderCache):
        raise ValueError(f"{name} is an EncoderDecoderCache; pass its self_attention_cache")
    if isinstance(cache, Cache):
        if cache.offloading:
            raise ValueError(f"{name} is offloaded to the CPU; {_RECAPTURE}")
        layers = [
            _layer_tensors(layer, f"{name}.layers[{index}]") for index, layer in enumerate(cache.layers)
        ]
    elif isinstance(cache, Sequence):
        layers = []
        for index, pair in enumerate(cache):
            if not (
                isinstance(pair, (tuple, list))
                and len(pair) == 2
                and all(isinstance(x, Tensor) for x in pair)
            ):
                raise TypeError(
                    f"{name}[{index}] must be a (key, value) pair of tensors, got {type(pair).__name__}"
                )
            layers.append((pair[0], pair[1]))
    else:
        raise TypeError(
            f"{name} must be a Transformers Cache or a list of (key, value) pairs per layer, got {type(cache).__name__}"
        )
    if not layers:
        raise ValueError(f"{name} has no layers: run the sharer on its text first")
    _check_layers(layers, name)
    return layers


def _check_layers(layers: list[tuple[Tensor, Tensor]], name: str) -> None:
    first = layers[0][0]
    for index, (key, value) in enumerate(layers):
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise ValueError(
                f"{name} layer {index}: key and value must be (batch, heads, len, head_dim) with the same batch, heads "
                f"and len, got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        if (key.shape[0], key.shape[2]) != (first.shape[0], first.shape[2]):
            raise ValueError(
                f"{name} layer {index}: batch and len are {key.shape[0]} and {key.shape[2]}, "
                f"in layer 0 they are {first.shape[0]} and {first.shape[2]}"
            )


def valid_tokens(attention_mask: Tensor | None, batch: int, length: int, name: str) -> Tokens:
    """What a padding mask (batch, len) says, in its cheapest form: nothing, lengths (right padding), or the mask."""
    if attention_mask is None:
        return Tokens()
    if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != (batch, length):
        got = (
            tuple(attention_mask.shape)
            if isinstance(attention_mask, Tensor)
            else type(attention_mask).__name__
        )
        raise ValueError(
            f"{name} must be a tensor (batch, len) = ({batch}, {length}) like its cache, got {got}"
        )
    mask = attention_mask != 0
    if bool(mask.all()):
        return Tokens()
    lengths = mask.sum(dim=1)
    if torch.equal(mask, torch.arange(length, device=mask.device) < lengths[:, None]):
        return Tokens(lengths=lengths)
    return Tokens(mask=mask)


def per_cache(name: str, value: Any, count: int) -> list[Any]:
    """One entry per cache, from a list of them or from one entry meant for all."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) == count:
        return list(value)
    if count == 1:
        return [value]
    raise ValueError(f"{name} must have one entry per cache ({count}), got {len(value)}")


def sharer_segments(
    layers: list[tuple[Tensor, Tensor]],
    index: int,
    batch: int,
    *,
    projectors: Any,
    gates: Any,
    positions: Any,
    visibility: str,
    attention_masks: Tensor | None,
    layer_maps: Sequence[int | None] | None,
) -> tuple[list[c2c.SharerSegment | None], Tensor]:
    """One sharer's segment per receiver layer, and per row (batch,) the position after its last token."""
    where = f"caches[{index}]"
    if visibility not in ("all", "causal"):
        raise ValueError(f'visibility of {where} must be "all" or "causal", got {visibility!r}')
    own_batch, _, length, _ = layers[0][0].shape
    device = layers[0][0].device
    tokens = valid_tokens(attention_masks, own_batch, length, f"attention_masks of {where}")
    place = _positions(positions, tokens, own_batch, length, device, where)
    if visibility == "causal" and place is None:
        raise ValueError(f'visibility "causal" of {where} needs positions')
    source = _layer_map(layer_maps, projectors, len(layers), where)
    gate_of = _gates(gates, tokens, len(source), device, where)

    def rows(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or own_batch == batch else tensor.expand(batch, *tensor.shape[1:])

    lengths = rows(tokens.lengths)
    placed = rows(place)
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
                *_projector(projectors, layer, where),
                gate=gate_of[layer],
                lengths=lengths,
                positions=placed,
                visibility=visibility,
            )
        )
    if place is None or visibility == "causal" or length == 0:
        return column, torch.zeros(batch, dtype=torch.long, device=device)
    valid = tokens.mask
    if tokens.lengths is not None:
        valid = torch.arange(length, device=device) < tokens.lengths[:, None]
    ends = place + 1 if valid is None else (place + 1).masked_fill(~valid, 0)
    return column, ends.amax(dim=1).long().expand(batch)


def _positions(
    positions: Any, tokens: Tokens, batch: int, length: int, device: torch.device, where: str
) -> Tensor | None:
    if positions is False:
        return None
    if positions is None:
        if tokens.mask is not None:
            raise ValueError(
                f"positions of {where} are needed, as its attention mask is not plain right padding: "
                "mask.cumsum(-1) - 1 where generate read the text, arange(len) where a plain forward did"
            )
        return torch.arange(length, device=device).expand(batch, length)
    tensor = torch.as_tensor(positions, device=device)
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise TypeError(f"positions of {where} must be integers, got {tensor.dtype}")
    if tuple(tensor.shape) not in ((length,), (batch, length)):
        raise ValueError(
            f"positions of {where} must be ({length},) or ({batch}, {length}) like its cache, got {tuple(tensor.shape)}"
        )
    return tensor.expand(batch, length)


def _layer_map(layer_map: Any, projectors: Any, sharer_layers: int, where: str) -> list[int | None]:
    if layer_map is None:
        if isinstance(projectors, Sequence) and len(projectors) != sharer_layers:
            raise ValueError(
                f"layer_maps of {where} is needed: {len(projectors)} projectors for {sharer_layers} sharer layers"
            )
        return list(range(sharer_layers))
    for layer, source in enumerate(layer_map):
        if source is not None and not 0 <= source < sharer_layers:
            raise ValueError(
                f"layer_maps of {where}: layer {layer} reads sharer layer {source}, there are {sharer_layers}"
            )
    return list(layer_map)


def _projector(projectors: Any, layer: int, where: str) -> tuple[Any, Any, Any, Any]:
    """(key_proj, value_proj, key_bias, value_bias) of a receiver layer."""
    if projectors is None:
        return None, None, None, None
    if not isinstance(projectors, (Sequence, Mapping)):
        raise TypeError(
            f"projectors of {where} must be a list or mapping over receiver layers, got {type(projectors).__name__}"
        )
    try:
        entry = projectors[layer]
    except (IndexError, KeyError):
        raise ValueError(f"projectors of {where} has no entry for receiver layer {layer}") from None
    if entry is None:
        return None, None, None, None
    if isinstance(entry, (tuple, list)):
        if not 2 <= len(entry) <= 4:
            raise ValueError(
                f"projectors of {where}, layer {layer}: want (key_proj, value_proj[, key_bias[, value_bias]]), "
                f"got {len(entry)} entries"
            )
        key_proj, value_proj, key_bias, value_bias = (*entry, None, None)[:4]
        return key_proj, value_proj, key_bias, value_bias
    if not hasattr(entry, "key_proj") or not hasattr(entry, "value_proj"):
        raise TypeError(
            f"projectors of {where}, layer {layer}: {type(entry).__name__} has no key_proj and value_proj"
        )
    return (
        entry.key_proj,
        entry.value_proj,
        getattr(entry, "key_bias", None),
        getattr(entry, "value_bias", None),
    )


def _gates(gates: Any, tokens: Tokens, layers: int, device: torch.device, where: str) -> list[Tensor | None]:
    """A gate per receiver layer; tokens that an attention mask hides get the gate 0, which removes them exactly."""
    if isinstance(gates, (list, tuple)):
        if len(gates) != layers:
            raise ValueError(
                f"gates of {where} must have one entry per receiver layer ({layers}), got {len(gates)}"
            )
        made = [_gate(gate, device, f"gates of {where}, layer {layer}") for layer, gate in enumerate(gates)]
    else:
        made = [_gate(gates, device, f"gates of {where}")] * layers
    if tokens.mask is None:
        return made
    hidden = tokens.mask[:, None, :]
    masked: dict[int, Tensor] = {}
    for gate in made:
        if id(gate) not in masked:
            masked[id(gate)] = (
                hidden.float() if gate is None else torch.where(hidden, gate, gate.new_zeros(()))
            )
    return [masked[id(gate)] for gate in made]


def _gate(gate: Any, device: torch.device, name: str) -> Tensor | None:
    if gate is None:
        return None
    if not isinstance(gate, Tensor):
        if not isinstance(gate, (int, float)):
            raise TypeError(f"{name} must be None, a number or a tensor, got {type(gate).__name__}")
        gate = torch.tensor(float(gate), device=device)
    if not gate.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {gate.dtype}")
    if not bool((gate.detach() >= 0).all()):
        raise ValueError(f"{name} must be >= 0 and not NaN")
    return gate
