"""The device of the Triton tests: C2C_TRITON_DEVICE, or "cpu", where Triton's interpreter runs the kernels.

A test makes its inputs on the CPU and compares there; only our call is made on the device.
"""

from __future__ import annotations

import os
from dataclasses import is_dataclass
from typing import Any

import torch

DEVICE = torch.device(os.environ.get("C2C_TRITON_DEVICE", "cpu"))
ON_GPU = DEVICE.type != "cpu"


def examples(count: int) -> int:
    """How many examples hypothesis draws: on a GPU every one is compiled first."""
    return max(5, count // 4) if ON_GPU else count


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same view into a copy of the whole storage: strides, and what lies around the view, stay as they are."""
    numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = torch.as_strided(tensor.detach(), (numbers,), (1,), 0).to(device, copy=True)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def there(value: Any, device: torch.device = DEVICE) -> Any:
    """Tensors, in whatever they are, on the device of the tests; the value itself on the CPU."""
    if device.type == "cpu":
        return value
    return change_each(value, lambda tensor: copied(tensor, device))


def here(value: Any) -> Any:
    """Results on the CPU."""
    return change_each(value, torch.Tensor.cpu)


def on_triton(function: Any, *arguments: Any, **options: Any) -> Any:
    """function(..., backend="triton") on the device; results on the CPU."""
    return here(function(*there(arguments), backend="triton", **there(options)))


def absorbed_where_it_fits(function: Any, call: dict) -> Any:
    """function(call) on the device. One whose segments are too wide to absorb is refused, and then left to "auto"."""
    try:
        return here(function(there(call)))
    except ValueError as error:
        if call["strategy"] != "absorb" or "on triton absorbs" not in str(error):
            raise
        return here(function(there({**call, "strategy": "auto"})))


def change_each(value: Any, change: Any) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: change_each(part, change) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [change_each(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{name: change_each(part, change) for name, part in vars(value).items()})
    return value
