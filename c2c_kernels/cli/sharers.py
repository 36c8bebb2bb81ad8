"""The sharers: which fit the receiver, and what they read."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.wheels import packaged

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

_CHUNK = 256  # tokens between two movements of the progress bar
# What must be equal for a sharer's keys and values to lie in the receiver's space.
_SPACE = (
    "model_type",
    "num_hidden_layers",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
    "sliding_window",
    "layer_types",
)


@dataclass(frozen=True)
class Reading:
    """What one sharer has read.

    Attributes:
        cache: its keys and values.
        start: position of its first token.
        tokens: how many it read.
        seconds: how long it took.
    """

    cache: DynamicCache
    start: int
    tokens: int
    seconds: float

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values in all layers."""
        tensors = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_known(spec: str, receiver_spec: str) -> None:
    """CommandError where both are packaged models of different architectures: said before anything is downloaded."""
    sharer, receiver = packaged(spec), packaged(receiver_spec)
    if sharer is not None and receiver is not None:
        _refuse_unless_equal(spec, "model_type", sharer.model_type, receiver.model_type)


def check_fits(sharer: PreTrainedModel, receiver: PreTrainedModel, spec: str) -> None:
    """CommandError unless the sharer's caches have the receiver's shapes and positions."""
    for name in _SPACE:
        _refuse_unless_equal(spec, name, getattr(sharer.config, name, None), getattr(receiver.config, name, None))


def _refuse_unless_equal(spec: str, name: str, came: object, wanted: object) -> None:
    if came != wanted:
        raise CommandError(
            f"the sharer {spec} does not fit the receiver: its {name} is {came}, the receiver's {wanted}. "
            "A sharer of another architecture needs a fitted projector (--pair, --projector); without one, a sharer of "
            "the receiver's own architecture is wanted"
        )


def same_weights(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    """Whether both models compute the same function: equal parameters, name by name."""
    ours, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    return ours.keys() == theirs.keys() and all(
        ours[name] is theirs[name] or torch.equal(ours[name], theirs[name]) for name in ours
    )


def second_instance(model: PreTrainedModel) -> PreTrainedModel:
    """Another instance of `model` with hooks and attention of its own, over the same weights in memory."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@torch.inference_mode()
def read(model: PreTrainedModel, tokens: list[int], start: int, update: Callable[[int], None]) -> Reading:
    """Lets `model` read `tokens` at positions `start`, `start + 1`, ... and keeps its cache."""
    from transformers import DynamicCache

    began = time.perf_counter()
    cache = DynamicCache()  # without a config: one would cut sliding layers down to their window
    for at in range(0, len(tokens), _CHUNK):
        part = torch.tensor([tokens[at : at + _CHUNK]])
        positions = torch.arange(start + at, start + at + part.shape[1])[None]
        model.base_model(input_ids=part, position_ids=positions, past_key_values=cache, use_cache=True)
        update(at + part.shape[1])
    return Reading(cache, start, len(tokens), time.perf_counter() - began)
