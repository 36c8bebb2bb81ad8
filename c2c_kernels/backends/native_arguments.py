"""Tensors and statuses between PyTorch and the compiled extension.

Kernels read rows whose last dimension is contiguous; tensors that are laid out otherwise are copied first.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from .. import _cpu
except ImportError:  # native.py says so
    _cpu = None
extension = _cpu

_DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
    torch.int32: 5,
    torch.int64: 6,
    torch.bool: 7,
}
ABSENT = (0, 0, 0, 0, 0, 0)
_PADDING = ((0, 0, 0, 0), (0, 0, 0), (0, 0), (0,), ())


def tensor_numbers(tensor: Tensor | None) -> tuple[int, ...]:
    """One c2c_tensor: address, dtype, four strides."""
    if tensor is None:
        return ABSENT
    stride = tensor.stride()
    return (tensor.data_ptr(), _DTYPES[tensor.dtype], *stride, *_PADDING[len(stride)])


def readable(tensor: Tensor | None, keep: list[Tensor]) -> tuple[int, ...]:
    """The numbers of a tensor of rows; a copy is made, and kept, where rows are not contiguous or are float64."""
    if tensor is None:
        return ABSENT
    stride = tensor.stride()
    if (stride[-1] != 1 and tensor.shape[-1] > 1) or tensor.dtype == torch.float64:
        tensor = as_rows(supported(tensor))
        keep.append(tensor)
        stride = tensor.stride()
    return (tensor.data_ptr(), _DTYPES[tensor.dtype], *stride, *_PADDING[len(stride)])


def broadcast(tensor: Tensor | None, shape: tuple[int, ...], keep: list[Tensor]) -> tuple[int, ...]:
    """The numbers of a tensor expanded to `shape`."""
    if tensor is None:
        return ABSENT
    if tensor.dtype == torch.float64:
        tensor = supported(tensor)
        keep.append(tensor)
    size, stride = tensor.shape, tensor.stride()
    if size != shape:
        # What expand() would do, without making a tensor.
        stride = (
            *_PADDING[4 - len(shape) + len(size)],
            *[0 if n == 1 else s for n, s in zip(size, stride, strict=True)],
        )
    return (tensor.data_ptr(), _DTYPES[tensor.dtype], *stride, *_PADDING[len(stride)])


def as_rows(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def supported(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that kernels read: float64 weights, gates and masks become float32."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def raise_status(status: int, operator: str, segment: str = "") -> None:
    """The error of a status. `segment` names the one segment of a call; in attention the status says which."""
    code, where = status & 0xFF, (status >> 8) - 1
    name = segment or f"segments[{where}]"
    texts = {
        1: "lengths has values outside 0..len",
        2: f"{name}.lengths has values outside 0..len",
        3: f"{name}.gate must be finite and >= 0 everywhere; it has negative, infinite or NaN values",
        4: f"{name}.index has values outside 0..len - 1",
    }
    if code in texts:
        raise ValueError(texts[code])
    if code == 7:
        raise MemoryError(f"{operator}: no memory for scratch")
    raise ValueError(f"{operator}: {extension.status_text(code)}")
