"""The `c2c::` operator namespace and the question whether a call has to pass through the dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("c2c", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)


def implement(name: str, function) -> None:
    """Registers one Python implementation for every device; it finds the kernels of the backend it is told."""
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")


def wants_grad(tensors) -> bool:
    """Whether autograd records this call."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def needs_dispatcher(tensors) -> bool:
    """Whether something besides the kernel has to see this call: autograd, a trace, a mode or a tensor subclass.

    Everything else goes straight to the kernel, which saves the dispatcher's overhead on every decode step.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return True
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and ((grad and tensor.requires_grad) or type(tensor) not in _PLAIN):
            return True
    return False
