"""Attention over the own cache alone, for sizes that were checked before: what a model asks for in every layer.

A decode step calls `merged_attention` once per layer with the same shapes. The first call is checked and its
parameters for the kernel are kept; the others fill in addresses, which costs half of what the checks would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import native

# A call's sizes, layouts and options, and the kernel's parameters for them.
Signature = tuple[object, ...]

_LIMIT = 256  # a generation meets a new length in every step: older ones are forgotten
_known: dict[Signature, list[int]] = {}


def signature(query: Tensor, key: Tensor, value: Tensor, *options: object) -> Signature | None:
    """What decides whether two calls may share their parameters; None for tensors that are not plain CPU tensors."""
    if not (type(query) is type(key) is type(value) is Tensor and query.is_cpu and key.is_cpu and value.is_cpu):
        return None
    return (
        query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(),
        query.dtype, key.dtype, value.dtype, torch.get_num_threads(), *options, *map(type, options),
    )  # fmt: skip


def run(
    found: Signature, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float | None
) -> Tensor | None:
    """The kernel's result where `found` is known, else None."""
    try:
        parameters = _known.get(found)
    except TypeError:  # an option that cannot be hashed is none that the checks let pass
        return None
    if parameters is None:
        return None
    batch, q_heads, q_len, head_dim = query.shape
    out = query.new_empty((batch, q_heads, q_len, value.shape[3]))
    if scale is None:
        scale = head_dim**-0.5
    native.run_plain(parameters, query, key, value, out, scale, softcap or 0.0)
    return out


def remember(found: Signature, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, window: int | None) -> None:
    """Keeps the parameters of a call that has just succeeded on the cpu backend."""
    parameters = native.plain_parameters(query, key, value, is_causal, window)
    if parameters is None:
        return
    if len(_known) >= _LIMIT:
        _known.clear()
    _known[found] = parameters
