"""`fuse_kv` on the CUDA backend: the halves of any number of layers in one launch, those alike in shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from types import ModuleType

import torch
from torch import Tensor

from ..fuser_weights import FuserWeights, Pair
from .native_fuse import call_numbers


def refusal(
    receiver_key: Tensor,
    others: Sequence[Tensor],
    weights: FuserWeights,
    residual: Pair | None,
    out: Pair | None,
    most_blocks: int,
) -> str:
    """Why the kernels do not take a call; "" where they do. `others`: the caches besides receiver_key."""
    dtype = receiver_key.dtype
    for name, half in (("key", weights.key), ("value", weights.value)):
        if len(half.project) > most_blocks:
            return f"takes up to {most_blocks} blocks in project; weights.{name} has {len(half.project)}"
    tensors = (*others, weights.key.in_weight, weights.value.in_weight, *(residual or ()), *(out or ()))
    found = {dtype, *(tensor.dtype for tensor in tensors)}
    if len(found) > 1 or dtype not in (torch.bfloat16, torch.float16):
        names = ", ".join(sorted(str(each).removeprefix("torch.") for each in found))
        return f"takes caches and weights of one dtype, bfloat16 or float16; got {names}"
    return ""


def fuse(calls: Sequence[tuple], extension: ModuleType, run: Callable[..., None]) -> None:
    """Independent layers, each as the arguments of `fuse_kv` without the backend. `run`: of the backend."""
    for receiver_key, *others, weights, _, residual, _, key_out, value_out in calls:
        if reason := refusal(
            receiver_key, others, weights, residual, (key_out, value_out), extension.most_fuser_blocks
        ):
            raise ValueError(f"fuse_kv on cuda {reason}")
    keep: list[Tensor] = []
    numbers = [2 * len(calls), 0, *chain.from_iterable(call_numbers(call, keep) for call in calls)]
    tensors = [tensor for call in calls for tensor in _tensors(call)]
    run(
        "fuse_kv", calls[0][0], extension.fuse_workspace(numbers),
        lambda *where: extension.fuse_launches(numbers, *where), lambda *where: extension.fuse_kv(numbers, *where),
        [*tensors, *keep],
    )  # fmt: skip


def _tensors(call: tuple) -> list[Tensor | None]:
    """All tensors of a call."""
    *caches, weights, index, residual, gates, key_out, value_out = call
    return [*caches, *weights.tensors, index, *(residual or ()), *(gates or ()), key_out, value_out]
