"""Which sharer layer every receiver layer reads, by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LayerMap = str | Mapping[int, int] | Sequence[int | None]
NAMES = ("last_aligned", "k_nearest")


def last_aligned(receiver_layers: int, sharer_layers: int) -> dict[int, int]:
    """The last layers meet, and so on towards the front; receiver layers without a partner read sharer layer 0."""
    shift = sharer_layers - receiver_layers
    return {layer: max(0, layer + shift) for layer in range(receiver_layers)}


def k_nearest(receiver_layers: int, sharer_layers: int) -> dict[int, int]:
    """The layer at the nearest relative depth, both models' layers laid evenly on 0..1; the lower of two as near.

    The reference implementation lists the k nearest and uses the first.
    """

    def depth(layer: int, layers: int) -> float:
        return layer / (layers - 1) if layers > 1 else 0.0

    return {
        layer: min(
            range(sharer_layers), key=lambda other: abs(depth(other, sharer_layers) - depth(layer, receiver_layers))
        )
        for layer in range(receiver_layers)
    }


def resolve(layer_map: LayerMap, receiver_layers: int, sharer_layers: int) -> dict[int, int]:
    """{receiver layer: sharer layer}, in order, from a name, a mapping, or a list over receiver layers (None: none).

    Raises:
        ValueError: for an unknown name, and for layers that the models do not have.
    """
    if isinstance(layer_map, str):
        if layer_map not in NAMES:
            raise ValueError(f"layer_map must be one of {', '.join(NAMES)}, a mapping or a list; got {layer_map!r}")
        return (last_aligned if layer_map == "last_aligned" else k_nearest)(receiver_layers, sharer_layers)
    pairs = layer_map.items() if isinstance(layer_map, Mapping) else enumerate(layer_map)
    found = {layer: source for layer, source in sorted(pairs) if source is not None}
    check_layers("layer_map", found, receiver_layers, sharer_layers)
    return found


def check_layers(
    name: str, layer_map: Mapping[int, int], receiver_layers: int | None, sharer_layers: int | None
) -> None:
    """ValueError unless both models have the layers of a map; None: their number is not known."""
    for role, layers in (("receiver", receiver_layers), ("sharer", sharer_layers)):
        if layers is not None and (type(layers) is not int or layers < 1):
            raise ValueError(f"{role}_layers must be an integer of at least 1 or None, got {layers!r}")
    for layer, source in layer_map.items():
        pair = f"{name} maps receiver layer {layer!r} to sharer layer {source!r}"
        for role, number, layers in (("receiver", layer, receiver_layers), ("sharer", source, sharer_layers)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"{pair}: wanted integers of at least 0")
            if layers is not None and number >= layers:
                raise ValueError(f"{pair}: the {role} has layers 0..{layers - 1}")
