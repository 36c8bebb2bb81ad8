"""The `c2c::` operator namespace and the question whether a call has to pass through the dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("c2c", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)


def implement(name: str, function) -> None:
    """Registers one Python implementation for every device; it finds the kernels of the backend it is told."""
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")


def refuse_second_derivative(name: str) -> None:
    """Makes differentiating the backward operator `name` an error: without a formula autograd would drop it."""

    def backward(ctx, *grads):
        raise RuntimeError(f"{name} has no derivative: for second derivatives use backend='reference'")

    torch.library.register_autograd(f"c2c::{name}", backward, lib=LIBRARY)


def wants_grad(tensors) -> bool:
    """Whether autograd records this call."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _refuse_forward_mode(interpreter, tensors) -> None:
    """Forward-mode derivatives raise: the operators have no formula for them, and autograd would take them for 0."""
    by_function = interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Jvp
    if by_function or any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError("there are no forward-mode derivatives on this backend: use backend='reference'")


def needs_dispatcher(tensors) -> bool:
    """Whether something besides the kernel has to see this call: autograd, a trace, a mode or a tensor subclass.

    Everything else goes straight to the kernel, which saves the dispatcher's overhead on every decode step.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is not None or forward_ad._current_level >= 0:
        _refuse_forward_mode(interpreter, tensors)
        return True
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and ((grad and tensor.requires_grad) or type(tensor) not in _PLAIN or tensor.is_neg()):
            return True
    return False
