"""`quantize_kv`: a cache to int8 with a scale for every token and head, as segments are read in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose, kernels, reference
from ._checks import check_quantize_kv
from ._library import LIBRARY, implement, needs_dispatcher, wants_grad

LIBRARY.define(
    "quantize(Tensor x, str backend) -> (Tensor quantised, Tensor scale)", tags=(torch.Tag.pt2_compliant_tag,)
)


def quantize_kv(key: Tensor, value: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scale = max |x| / 127 of every token and head, q = x / scale rounded to nearest even.

    |x - q scale| <= scale / 2, that is 1/254 of the largest element of the token's head. A token that is not finite
    gets a scale that is not finite, and stays so; one of zeros gets the scale 0.

    Args:
        key, value: (batch, heads, len, head_dim) float32, bfloat16 or float16 (float64: backend "reference").
        backend: name of a backend, None for the fastest that can run the call.

    Returns:
        key and value int8 like the inputs, then key_scale and value_scale (batch, heads, len) float32: the fields of
        these names of a `SharerSegment`. No autograd.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is wanted; for inputs that require grad.
    """
    check_quantize_kv(key, value)
    if wants_grad((key, value)):
        raise ValueError("quantize_kv has no gradient, but key or value requires grad: detach it")
    widest = key if key.shape[3] > value.shape[3] else value
    record = choose("quantize_kv", backend, key.device, key.dtype, "", (widest,))
    results = []
    for x in (key, value):
        if record.name == "reference":
            results.append(reference.quantize(x))
        elif needs_dispatcher((x,)):
            results.append(torch.ops.c2c.quantize(x, record.name))
        else:
            results.append(kernels(record.name).quantize(record.name, x))
    return results[0][0], results[1][0], results[0][1], results[1][1]


def _forward(x, backend):
    return kernels(backend).quantize(backend, x)


def _fake(x, backend):
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:3], dtype=torch.float32)


implement("quantize", _forward)
torch.library.register_fake("c2c::quantize", _fake, lib=LIBRARY)
