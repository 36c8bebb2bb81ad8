"""`fuse_kv` on the compiled backends. Weights are read where they lie: nothing is packed, kept or out of date."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..fuser_weights import FuserBlock, FuserHalf, FuserWeights, lie_of
from .native_arguments import broadcast, extension, raise_status, readable

# The numbers of weights, and where and how these lay: asking 19 tensors takes longer than comparing.
_known: WeakKeyDictionary[FuserHalf, tuple[tuple, list[int], list[int]]] = WeakKeyDictionary()


def fuse_kv(
    backend: str,
    receiver_key: Tensor,
    receiver_value: Tensor,
    sharer_key: Tensor,
    sharer_value: Tensor,
    weights: FuserWeights,
    index: Tensor | None,
    residual: tuple[Tensor, Tensor] | None,
    gates: tuple[Tensor, Tensor] | None,
    key_out: Tensor,
    value_out: Tensor,
) -> None:
    """Both halves of one layer."""
    call = (receiver_key, receiver_value, sharer_key, sharer_value, weights, index, residual, gates, key_out, value_out)
    fuse_kv_layers(backend, [call])


def fuse_kv_layers(backend: str, calls: Sequence[tuple]) -> None:
    """Independent layers in one call, each as the arguments of `fuse_kv` without the backend."""
    keep: list[Tensor] = []
    numbers = [2 * len(calls), torch.get_num_threads()]
    for call in calls:
        numbers += call_numbers(call, keep)
    status = extension.fuse_kv(numbers)
    if status:
        raise_status(status, "fuse_kv")


def call_numbers(call: tuple, keep: list[Tensor]) -> list[int]:
    """Both c2c_fuse_half of a layer, of the arguments of `fuse_kv`; copies that they point to are kept in `keep`."""
    receiver_key, receiver_value, sharer_key, sharer_value, weights, index, residual, gates, *outs = call
    numbers: list[int] = []
    for receiver, sharer, half, base, gate, out in zip(
        (receiver_key, receiver_value),
        (sharer_key, sharer_value),
        (weights.key, weights.value),
        residual or (receiver_key, receiver_value),
        gates or (None, None),
        outs,
        strict=True,
    ):
        numbers += _half_numbers(receiver, sharer, half, index, base, gate, out, keep)
    return numbers


def _half_numbers(
    receiver: Tensor,
    sharer: Tensor,
    half: FuserHalf,
    index: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
    out: Tensor,
    keep: list[Tensor],
) -> list[int]:
    """One c2c_fuse_half."""
    batch, heads, length, dim = receiver.shape
    numbers: list[int] = []
    for tensor in (receiver, sharer, residual, out):
        numbers += readable(tensor, keep)
    numbers += broadcast(index, (batch, length), keep)
    numbers += broadcast(gate, (batch, heads, length), keep)
    weights, blocks = _weight_numbers(half, keep)
    numbers += weights
    numbers += (batch, length, heads, dim, sharer.shape[2], sharer.shape[1], sharer.shape[3], half.in_weight.shape[0])
    numbers.append(len(half.project))
    numbers += blocks
    return numbers


def _weight_numbers(half: FuserHalf, keep: list[Tensor]) -> tuple[list[int], list[int]]:
    """Those of the tensors outside blocks, and of the blocks."""
    lie = lie_of(half.tensors)
    known = _known.get(half)
    if known is not None and known[0] == lie:
        return known[1], known[2]
    copies: list[Tensor] = []
    single = (half.in_weight, half.in_bias, half.out_weight, half.out_bias, half.scale_weight, half.scale_bias)
    weights = [number for tensor in single for number in readable(tensor, copies)]
    weights += broadcast(half.gate_logit, (), copies)
    blocks = [number for block in (half.embed, half.scale, *half.project) for number in _block_numbers(block, copies)]
    if not copies:
        _known[half] = (lie, weights, blocks)
    keep += copies
    return weights, blocks


def _block_numbers(block: FuserBlock, keep: list[Tensor]) -> list[int]:
    """One c2c_fuse_block."""
    numbers = [number for tensor in (block.norm, block.w1, block.w2) for number in readable(tensor, keep)]
    numbers.append(block.w1.shape[0])
    return numbers
