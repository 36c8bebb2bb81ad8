"""What `fuse_kv` refuses, once for all backends. Every error names the argument, what came and what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..fuser_weights import FuserBlock, FuserHalf, FuserWeights, Pair, lie_of
from ._checks import (
    check_index,
    end_of,
    expect,
    expect_broadcastable,
    expect_device,
    expect_float,
    expect_integers,
    may_overlap,
    shape_of,
)

_PLAIN = (Tensor, torch.nn.Parameter)
# Weights that passed, and what they were checked against.
_checked: WeakKeyDictionary[FuserWeights, tuple] = WeakKeyDictionary()


class FuseTensors(NamedTuple):
    """The arguments of one `fuse_kv` call, in the order in which kernels take them."""

    receiver_key: Tensor
    receiver_value: Tensor
    sharer_key: Tensor
    sharer_value: Tensor
    weights: FuserWeights
    selected: Tensor | None  # the index; a tuple has a method of that name
    residual: Pair | None
    gates: Pair | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        residual, gates = self.residual or (None, None), self.gates or (None, None)
        return (*self[:4], *self.weights.tensors, self.selected, *residual, *gates)


def check_fuse_kv(call: FuseTensors, out: Pair | None, name: str = "") -> None:
    """Shapes, dtypes, devices and memory of a call. `name` goes before the arguments' names: "calls[3]."."""
    _check_caches(call, name)
    receiver = call.receiver_key
    device, shape = receiver.device, tuple(receiver.shape[:3])
    _check_weights(call, name)
    if call.selected is not None:
        expect_integers(f"{name}index", call.selected)
        expect_device(f"{name}index", call.selected, device, "receiver_key")
        expect(f"{name}index", call.selected, (shape[0], shape[2]), "(batch, len)")
    for what, pair in (("residual", call.residual), ("gates", call.gates), ("out", out)):
        if pair is None:
            continue
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{name}{what} must be a pair (key, value) of tensors, got {type(pair).__name__}")
        for slot, tensor, own in zip(("key", "value"), pair, (call.receiver_key, call.receiver_value), strict=True):
            expect_float(f"{name}{what} {slot}", tensor)
            expect_device(f"{name}{what} {slot}", tensor, device, "receiver_key")
            if what == "gates":
                expect_broadcastable(f"{name}gates {slot}", tensor, shape, "(batch, kv_heads, len)")
            else:
                expect(f"{name}{what} {slot}", tensor, tuple(own.shape), "(batch, kv_heads, len, head_dim)")
    if out is not None:
        _check_memory(call, out, name)


def check_fuse_values(call: FuseTensors, name: str = "") -> None:
    """Values that the host can look at without waiting for a device."""
    if call.selected is not None and call.selected.device.type == "cpu":
        check_index(f"{name}index", call.selected, call.sharer_key.shape[2])


def same_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same elements in the same order: then one may be written while the other is read."""
    if first is second:
        return True
    if torch.compiler.is_compiling() or first.device.type == "meta":
        return False
    if first.data_ptr() != second.data_ptr() or first.dtype != second.dtype or first.shape != second.shape:
        return False
    return first.stride() == second.stride() or _steps(first) == _steps(second)


def check_apart(groups: Mapping[str, tuple[Sequence[Tensor | None], Sequence[Tensor]]]) -> None:
    """ValueError unless what each group writes is memory that no other reads or writes.

    Args:
        groups: what is done independently of each other, by name: tensors that are read, and that are written.
    """
    if torch.compiler.is_compiling() or not any(written for _, written in groups.values()):
        return
    # Of whole storages first: that they are apart is seen faster.
    if _conflict(groups, _storage_extent) is None:
        return
    conflict = _conflict(groups, _extent)
    if conflict is not None:
        writes, other = conflict
        raise ValueError(f"{writes} writes to memory that {other} reads or writes: each needs memory of its own")


def _conflict(groups: Mapping, extent: Callable[[Tensor], tuple[int, int]]) -> tuple[str, str] | None:
    """The names of a group that writes where another reads or writes."""
    found = [
        (*extent(tensor), name, writes)
        for name, group in groups.items()
        for writes, tensors in enumerate(group)
        for tensor in tensors
        if tensor is not None and tensor.device.type != "meta" and tensor.numel()
    ]
    found.sort(key=lambda entry: entry[0])
    reaching: list[tuple[int, int, str, int]] = []
    for entry in found:
        reaching = [other for other in reaching if other[1] > entry[0]]
        for other in reaching:
            if other[2] != entry[2] and (other[3] or entry[3]):
                return (entry[2], other[2]) if entry[3] else (other[2], entry[2])
        reaching.append(entry)
    return None


def _storage_extent(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _extent(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), end_of(tensor)


def _steps(tensor: Tensor) -> list[int]:
    """Strides of the dimensions that are walked along."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether a dimension's step lands within what the smaller steps reach."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _check_caches(call: FuseTensors, name: str) -> None:
    for role in ("receiver", "sharer"):
        key, value = getattr(call, f"{role}_key"), getattr(call, f"{role}_value")
        for slot, tensor in (("key", key), ("value", value)):
            expect_float(f"{name}{role}_{slot}", tensor)
            expect_device(f"{name}{role}_{slot}", tensor, call.receiver_key.device, "receiver_key")
            if tensor.dim() != 4 or tensor.shape[1] == 0 or tensor.shape[3] == 0:
                raise ValueError(
                    f"{name}{role}_{slot} has shape {shape_of(tensor)}, wanted (batch, heads, len, head_dim) with at "
                    "least one head of one number"
                )
        if key.shape[:3] != value.shape[:3]:
            raise ValueError(
                f"{name}{role}_value has shape {shape_of(value)}, wanted batch, heads and len of {role}_key "
                f"{shape_of(key)}"
            )
    own, raw = call.receiver_key, call.sharer_key
    if raw.shape[0] != own.shape[0]:
        raise ValueError(
            f"{name}sharer_key has batch {raw.shape[0]}, wanted {own.shape[0]} like receiver_key {shape_of(own)}"
        )
    if call.selected is None and raw.shape[2] != own.shape[2]:
        raise ValueError(
            f"{name}sharer_key has {raw.shape[2]} tokens and receiver_key {own.shape[2]}: without an index they must "
            "be equally many"
        )


def _check_weights(call: FuseTensors, name: str) -> None:
    """Both halves against the caches; not again for weights that lie where they lay in an earlier call.

    Looking at 46 tensors takes 70 us, more than a fuser of one token takes on a GPU.
    """
    weights = call.weights
    if not isinstance(weights, FuserWeights):
        raise TypeError(f"{name}weights must be FuserWeights, got {type(weights).__name__}")
    halves = (
        ("key", weights.key, call.receiver_key, call.sharer_key),
        ("value", weights.value, call.receiver_value, call.sharer_value),
    )
    # Asked first: what a trace looks at in a global dictionary, it is made again for.
    kept = None if torch.compiler.is_compiling() else _checked
    seen = None
    if kept is not None and weights in kept:
        seen = _seen(call)
        if kept[weights] == seen:
            return
    for slot, half, own, raw in halves:
        if not isinstance(half, FuserHalf):
            raise TypeError(f"{name}weights.{slot} must be a FuserHalf, got {type(half).__name__}")
        _check_half(f"{name}weights.{slot}", half, raw.shape[1] * raw.shape[3], own, call.receiver_key.device)
    if kept is not None and all(type(tensor) in _PLAIN for tensor in weights.tensors):
        kept[weights] = seen or _seen(call)


def _seen(call: FuseTensors) -> tuple:
    """What a check of the weights depends on: sizes of the caches, and where and how the weights lie."""
    caches = (call.receiver_key, call.receiver_value, call.sharer_key, call.sharer_value)
    sizes = tuple(tensor.shape[1::2] for tensor in caches)
    return (call.receiver_key.device, sizes, lie_of(call.weights.tensors))


def _check_half(name: str, half: FuserHalf, sharer_width: int, own: Tensor, device: torch.device) -> None:
    """Weights against both caches."""
    first = half.in_weight
    expect_float(f"{name}.in_weight", first)
    if first.dim() != 2 or first.shape[0] == 0:
        raise ValueError(
            f"{name}.in_weight has shape {shape_of(first)}, wanted (hidden, sharer_width + receiver_width)"
        )
    hidden, heads, width = first.shape[0], own.shape[1], own.shape[1] * own.shape[3]
    for field, wanted, words in (
        ("in_weight", (hidden, sharer_width + width), "(hidden, sharer_width + receiver_width)"),
        ("in_bias", (hidden,), "(hidden,)"),
        ("out_weight", (width, hidden), "(receiver_width, hidden)"),
        ("out_bias", (width,), "(receiver_width,)"),
        ("scale_weight", (heads, hidden), "(kv_heads, hidden)"),
        ("scale_bias", (heads,), "(kv_heads,)"),
        ("gate_logit", (), "()"),
    ):
        tensor = getattr(half, field)
        _expect_like(f"{name}.{field}", tensor, first, device, name)
        expect(f"{name}.{field}", tensor, wanted, words)
    if not isinstance(half.project, tuple) or not half.project:
        raise ValueError(f"{name}.project must be a tuple of at least one FuserBlock, got {half.project!r:.60}")
    blocks = [("embed", half.embed), ("scale", half.scale)]
    blocks += [(f"project[{number}]", found) for number, found in enumerate(half.project)]
    for field, found in blocks:
        if not isinstance(found, FuserBlock):
            raise TypeError(f"{name}.{field} must be a FuserBlock, got {type(found).__name__}")
        for part, tensor in zip(("norm", "w1", "w2"), found.tensors, strict=True):
            _expect_like(f"{name}.{field}.{part}", tensor, first, device, name)
        if found.w1.dim() != 2 or found.w1.shape[0] == 0:
            raise ValueError(f"{name}.{field}.w1 has shape {shape_of(found.w1)}, wanted (inner, hidden)")
        inner = found.w1.shape[0]
        expect(f"{name}.{field}.norm", found.norm, (hidden,), "(hidden,)")
        expect(f"{name}.{field}.w1", found.w1, (inner, hidden), "(inner, hidden)")
        expect(f"{name}.{field}.w2", found.w2, (hidden, inner), "(hidden, inner)")


def _expect_like(name: str, tensor: Tensor, first: Tensor, device: torch.device, half: str) -> None:
    expect_float(name, tensor)
    expect_device(name, tensor, device, "receiver_key")
    if tensor.dtype != first.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, wanted {first.dtype} like {half}.in_weight")


def _check_memory(call: FuseTensors, out: Pair, name: str) -> None:
    """`out` may be the receiver or the residual of its half, element for element; else it is memory of its own."""
    residual = call.residual or (None, None)
    read = [*call[:4], call.selected, *residual, *(call.gates or ())]
    owns = ((call.receiver_key, residual[0]), (call.receiver_value, residual[1]))
    for slot, tensor, own in zip(("key", "value"), out, owns, strict=True):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}out {slot} has stride {tensor.stride(-1)} in its last dimension, wanted 1")
        if _overlaps_itself(tensor):
            raise ValueError(
                f"{name}out {slot} has shape {shape_of(tensor)}, strides {tensor.stride()}: its elements share memory"
            )
        # No weights: nobody keeps a cache in them, and looking takes longer than all other checks.
        receiver, base = own
        others = [other for other in read if other is not receiver and other is not base]
        others += [mine for mine in own if mine is not None and not same_memory(mine, tensor)]
        if may_overlap(tensor, tuple(others)):
            raise ValueError(
                f"{name}out {slot} shares memory with another tensor of the call: it may be receiver_{slot} or the "
                f"residual {slot} itself, else it must be other memory"
            )
    if may_overlap(out[0], (out[1],)):
        raise ValueError(f"{name}out key and out value share memory")
