"""The projectors of a live `RosettaModel` on our kernels, found by class name and attributes: nothing is imported."""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from c2c_kernels.fuser_layers import FuserShape
from c2c_kernels.fuser_weights import FuserWeights, Pair
from c2c_kernels.integrations.rosetta.checkpoints import CLASS, check_class, tensor_names
from c2c_kernels.ops.fuse_kv import fuse_kv

Model = TypeVar("Model", bound=nn.Module)
_ATTRIBUTES = ("source_dim", "target_dim", "source_num_heads", "target_num_heads")
_SWAPPED = "_c2c_swap"
# The package accelerate puts its hook's forward into an instance, and what that wraps beside it.
_PLAIN, _HOOKED, _HOOK = "forward", "_old_forward", "_hf_hook"


class _Weights:
    """The parameters of a projector as `fuse_kv` takes them, made again when one of them is another tensor."""

    def __init__(self, projector: nn.Module, places: list[tuple[nn.Module, str]], key_count: int) -> None:
        self.places, self.key_count = places, key_count
        self.kept: tuple[list[Any], FuserWeights] | None = None

    def __call__(self) -> FuserWeights:
        tensors = [module._parameters[name] for module, name in self.places]
        if torch.compiler.is_compiling():  # a trace that has looked at `kept` is made again when they are
            return FuserWeights.of(tensors, self.key_count)  # type: ignore[arg-type]
        if self.kept is None or any(a is not b for a, b in zip(tensors, self.kept[0], strict=True)):
            self.kept = tensors, FuserWeights.of(tensors, self.key_count)  # type: ignore[arg-type]
        return self.kept[1]


class _Swap(NamedTuple):
    """What `accelerate` has put into a projector.

    Attributes:
        weights: of the projector.
        forward: ours.
        place: the attribute of the instance that it is under.
        before: what was there, None where there was nothing.
    """

    weights: _Weights
    forward: Any
    place: str
    before: Any


def accelerate(model: Model, *, backend: str | None = None) -> Model:
    """Swaps the forward of every `C2CProjector` of a RosettaModel (or of any module) for `fuse_kv`.

    Results are float32, as theirs. In training a projector runs its own forward. Hooks of the package accelerate run
    around ours, whether they were there before or come later. The attributes `last_norm_key_scalar` and the like, for
    which theirs waits for the device, are not set. Do not copy or pickle an accelerated model: `restore` it first.

    Args:
        model: changed in place; what is accelerated already is left as it is.
        backend: of `fuse_kv`.

    Returns:
        `model`.

    Raises:
        CheckpointError: for projectors of another class, naming it.
        ValueError: where there is no projector, or one that lacks parameters or has a forward of the instance that
            is no such hook's (it would be bypassed); nothing is changed then.
    """
    listed = getattr(model, "projector_list", None)
    for projector in listed if listed is not None else ():
        check_class(type(projector).__name__, "projector_list")
    found = [module for module in model.modules() if type(module).__name__ == CLASS]
    if not found:
        raise ValueError(f"{type(model).__name__} has no module of class {CLASS}")
    swaps = [(projector, _swap(projector, backend)) for projector in found if _SWAPPED not in projector.__dict__]
    for projector, swap in swaps:
        projector.__dict__[_SWAPPED] = swap
        projector.__dict__[swap.place] = swap.forward
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`; returns `model`. Hooks that came later stay, around the original."""
    for module in model.modules():
        swap = module.__dict__.pop(_SWAPPED, None)
        if swap is None:
            continue
        for place in (_PLAIN, _HOOKED):
            if module.__dict__.get(place) is not swap.forward:
                continue
            if swap.before is not None:
                module.__dict__[place] = swap.before
            elif place == _PLAIN:
                del module.__dict__[place]
            else:
                module.__dict__[place] = MethodType(type(module).forward, module)
    return model


def _swap(projector: nn.Module, backend: str | None) -> _Swap:
    """Of a projector that is as it was."""
    weights = _weights(projector)
    place = _HOOKED if _HOOK in projector.__dict__ and _HOOKED in projector.__dict__ else _PLAIN
    before = projector.__dict__.get(place)
    if place == _PLAIN and before is not None:
        raise ValueError(
            f"a {CLASS} has a forward of the instance ({getattr(before, '__qualname__', before)!s}), wanted that of "
            "its class: it would be bypassed; take it off, accelerate, and put it on again"
        )
    return _Swap(weights, MethodType(_forward(backend, before), projector), place, before)


def _forward(backend: str | None, before: Any) -> Any:
    def forward(self: Any, source_kv: Pair, target_kv: Pair, position_ids: Any = None, max_pos: Any = None) -> Pair:
        swap = self.__dict__.get(_SWAPPED)
        if self.training or swap is None:  # None: restored, and called by a hook that came later
            original = before or MethodType(type(self).forward, self)
            return original(source_kv, target_kv, position_ids, max_pos)
        weights = swap.weights()
        tensors = (*source_kv, *target_kv, *weights.tensors)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return fuse_kv(target_kv[0].float(), target_kv[1].float(), *source_kv, weights, backend=backend)
        return fuse_kv(
            *target_kv, *source_kv, weights, out=(_single(target_kv[0]), _single(target_kv[1])), backend=backend
        )

    return forward


def _single(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float32, device=like.device)


def _weights(projector: nn.Module) -> _Weights:
    """Where the parameters are; ValueError where one is missing or misshapen."""
    missing = [name for name in _ATTRIBUTES if not isinstance(getattr(projector, name, None), int)]
    if missing:
        raise ValueError(f"a {CLASS} has no {', '.join(missing)}")
    named = dict(projector.named_parameters())
    source, target, source_heads, target_heads = (int(getattr(projector, name)) for name in _ATTRIBUTES)
    blocks = 0
    while f"key_proj_mlp2.blocks.{blocks}.w1.weight" in named:
        blocks += 1
    first = "key_mlp1.blocks.0.w1.weight"
    if first not in named or not blocks:
        raise ValueError(f"a {CLASS} has no parameter {first if first not in named else 'key_proj_mlp2.blocks.0'}")
    inner, hidden = named[first].shape
    shape = FuserShape(source_heads, source, source, target_heads, target, target, hidden, inner, blocks + 2)
    sizes = dict(shape.tensors())
    places = []
    for ours, theirs in tensor_names(shape):
        if theirs not in named or tuple(named[theirs].shape) != sizes[ours]:
            came = tuple(named[theirs].shape) if theirs in named else "no such parameter"
            raise ValueError(f"{theirs} of a {CLASS}: {came}, wanted shape {sizes[ours]}")
        owner, _, name = theirs.rpartition(".")
        places.append((projector.get_submodule(owner), name))
    return _Weights(projector, places, 13 + 3 * blocks)
