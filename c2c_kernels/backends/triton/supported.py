"""What the kernels take: asked before anything is launched or compiled, so that the error says what would do."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_DIM = 256  # head dims of attention: a tile of accumulators stays in registers
LARGEST_ROW = 8192  # head dims of what works row by row: a row stays in the registers of 4 warps


def check_dims(operator: str, largest: int, **dims: int) -> None:
    """ValueError for a head dim over `largest`."""
    for name, dim in dims.items():
        if dim > largest:
            raise ValueError(f"{operator} on triton supports {name} up to {largest}; got {dim}")


def check_dtype(operator: str, name: str, tensor: Tensor) -> None:
    """TypeError for a dtype that is not in DTYPES."""
    if tensor.dtype not in DTYPES:
        *first, last = (str(dtype).removeprefix("torch.") for dtype in DTYPES)
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{operator} on triton supports {name} of {', '.join(first)} or {last}; got {got}")
