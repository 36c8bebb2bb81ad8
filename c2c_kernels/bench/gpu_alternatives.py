"""Attention kernels of other packages, where they are installed: over the projected and concatenated cache, as SDPA.

Not run on hardware yet; the tests run the calls with stand-ins for the packages.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from c2c_kernels.bench.inputs import AttentionInputs, joined_beforehand
from c2c_kernels.bench.work import Call, LeftOutError, first_line

_HALF = (torch.bfloat16, torch.float16)


def flash_attention(inputs: AttentionInputs) -> Call:
    """flash-attn's flash_attn_func, whose causal mask is lower-right as ours (since version 2.1)."""
    package = _package("flash_attn", inputs)
    query, key, value = (tensor.transpose(1, 2).contiguous() for tensor in (inputs.query, *joined_beforehand(inputs)))

    def run() -> Tensor:
        return package.flash_attn_func(query, key, value, causal=True).transpose(1, 2)

    return run


def flashinfer(inputs: AttentionInputs) -> Call:
    """FlashInfer's kernels for a single sequence, keys as (heads, tokens, dim); prefill's mask is lower-right."""
    package = _package("flashinfer", inputs)
    batch, _, q_len, _ = inputs.query.shape
    if batch != 1:
        raise LeftOutError("its kernels for several sequences want a paged cache")
    key, value = (tensor[0].contiguous() for tensor in joined_beforehand(inputs))
    query = inputs.query[0].transpose(0, 1).contiguous()
    if q_len == 1:
        return lambda: (
            package.single_decode_with_kv_cache(query[0], key, value, kv_layout="HND").unsqueeze(1).unsqueeze(0)
        )
    return lambda: (
        package.single_prefill_with_kv_cache(query, key, value, causal=True, kv_layout="HND")
        .transpose(0, 1)
        .unsqueeze(0)
    )


def _package(name: str, inputs: AttentionInputs) -> ModuleType:
    """The package; LeftOutError where it cannot be imported, or has no kernels for these inputs."""
    if inputs.query.dtype not in _HALF:
        raise LeftOutError("16-bit dtypes only")
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise LeftOutError("not installed") from error
    except Exception as error:  # whatever a package built for another torch raises
        raise LeftOutError(f"cannot be imported: {first_line(error)}") from error
