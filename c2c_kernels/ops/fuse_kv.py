"""`fuse_kv`: the paper's fuser rewrites the receiver's cache of one layer from its own and the sharer's tokens.

A backend's module implements

    fuse_kv(backend, receiver_key, receiver_value, sharer_key, sharer_value, weights, index, residual, gates,
            key_out, value_out) -> None

with `weights` FuserWeights and the rest as `fuse_kv` below takes it; residual and gates are a pair or None, index a
tensor or None. Arguments have passed `_fuse_checks`; there is at least one token. It writes both outs, of which each
may be the receiver's tensor of its half, or its residual, or other memory. A half whose hard gate is closed is left as
it is where out is its residual (the receiver where residual is None), and is a copy of that elsewhere. On a GPU the
host reads no tensor: kernels look at `gate_logit` themselves. A module may also have

    fuse_kv_layers(backend, calls) -> None

with `calls` a list of such arguments (without `backend`): independent layers of a model, in few grouped launches; and

    spread(grad, index, stored) -> Tensor

as `reference_fuse.spread`, where that of PyTorch is not deterministic. Gradients are PyTorch's matrix products.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import Backend, choose, kernels, reference_fuse
from ..fuser_weights import FuserWeights, Pair
from ._fuse_checks import FuseTensors, check_apart, check_fuse_kv, check_fuse_values, same_memory
from ._library import LIBRARY, implement, needs_dispatcher, refuse_second_derivative, wants_grad

_REST = "Tensor[] weights, int key_count, Tensor? index, Tensor[] residual, Tensor[] gates"
_ARGUMENTS = f"Tensor receiver_key, Tensor receiver_value, Tensor sharer_key, Tensor sharer_value, {_REST}"
LIBRARY.define(f"fuse_kv({_ARGUMENTS}, str backend) -> (Tensor key, Tensor value)", tags=(torch.Tag.pt2_compliant_tag,))
# A tensor of the receiver or of the residual that is the out of its half as well is None.
LIBRARY.define(
    "fuse_kv_out(Tensor? receiver_key, Tensor? receiver_value, Tensor sharer_key, Tensor sharer_value, "
    "Tensor[] weights, int key_count, Tensor? index, Tensor? residual_key, Tensor? residual_value, Tensor[] gates, "
    "bool has_residual, Tensor(a!) key_out, Tensor(b!) value_out, str backend) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"fuse_kv_backward(Tensor grad_key, Tensor grad_value, {_ARGUMENTS}, bool[] needs, str backend) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@dataclass(frozen=True, eq=False)
class FuseCall:
    """The arguments of `fuse_kv` for one layer, for `fuse_layers`."""

    receiver_key: Tensor
    receiver_value: Tensor
    sharer_key: Tensor
    sharer_value: Tensor
    weights: FuserWeights
    index: Tensor | None = None
    residual: Pair | None = None
    gates: Pair | None = None
    out: Pair | None = None


def fuse_kv(
    receiver_key: Tensor,
    receiver_value: Tensor,
    sharer_key: Tensor,
    sharer_value: Tensor,
    weights: FuserWeights,
    *,
    index: Tensor | None = None,
    residual: Pair | None = None,
    gates: Pair | None = None,
    out: Pair | None = None,
    backend: str | None = None,
) -> Pair:
    """key' = key + gate * w * P, value' likewise: w and P of every token from both caches; see `fuser_weights`.

    Combined in float32 and rounded once. Weights, caches, residual and out each have a dtype of their own.

    Args:
        receiver_key, receiver_value: (batch, kv_heads, len, head_dim) and (..., value_dim), any strides: a range of
            tokens is a slice of a cache.
        sharer_key, sharer_value: (batch, sharer_heads, sharer_len, sharer_head_dim) and (..., sharer_value_dim).
        weights: of the layer, see `FuserWeights`.
        index: (batch, len) integers, the sharer token of every receiver token, gathered by the kernel. None: token i
            reads token i, then sharer_len is len.
        residual: (key, value) like the receiver's, what is added to; None: the receiver itself. Of several sharers
            that all read the clean cache each adds to the running sum.
        gates: (key, value), each broadcastable to (batch, kv_heads, len); None: the hard gates, gate_logit > 0. The
            half of a closed hard gate costs nothing and is the residual, bit for bit.
        out: (key, value) like the receiver's, any strides (last dimension contiguous): written in place. Each may be
            the receiver's slice of a cache, or the residual's. No autograd.
        backend: name of a backend, None for the fastest that can run the call.

    Returns:
        key and value: `out` where given, else new tensors in the dtypes of receiver_key and receiver_value.
        Differentiable in all floating-point arguments; the backward pass computes the network again, in memory
        linear in tokens.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is wanted, before anything is written. An index
            out of range is an error on the CPU; on a GPU its token reads zeros.

    Source: arXiv 2510.03215; DESIGN.md 2.3.
    """
    call = FuseTensors(receiver_key, receiver_value, sharer_key, sharer_value, weights, index, residual, gates)
    record = _check(call, out, backend)
    tensors = call.tensors
    if record.name == "reference":
        return _reference(call, out)
    if needs_dispatcher((*tensors, *(out or ()))):
        return _dispatch(call, out, record.name)
    out = _empty(call) if out is None else out
    _write(record.name, call, out)
    return out[0], out[1]


def fuse_layers(calls: Sequence[FuseCall], *, backend: str | None = None) -> list[Pair]:
    """`fuse_kv` of independent layers: on a GPU in one grouped launch per stage where the backend has that.

    All calls are checked before anything is written. No call's out may be memory that another reads or writes.

    Args:
        calls: one per layer.
        backend: name of a backend, None for the fastest that can run the calls.

    Returns:
        (key, value) of every call.

    Raises:
        ValueError, TypeError: as `fuse_kv`, with the number of the call.
    """
    described, records = _check_all(calls, backend)
    check_apart({f"calls[{number}]": touched([call]) for number, call in enumerate(calls)})
    return _run(calls, described, records)


def fuse_apart(calls: Sequence[FuseCall], backend: str | None) -> list[Pair]:
    """`fuse_layers` of calls that `check_apart` has seen."""
    return _run(calls, *_check_all(calls, backend))


def touched(calls: Sequence[FuseCall]) -> tuple[list[Tensor | None], list[Tensor]]:
    """What the calls read, weights aside, and what they write."""
    read = [
        tensor
        for c in calls
        for tensor in (
            c.receiver_key, c.receiver_value, c.sharer_key, c.sharer_value, c.index, *(c.residual or ()),
            *(c.gates or ()),
        )
    ]  # fmt: skip
    return read, [tensor for call in calls if call.out is not None for tensor in call.out]


def _run(calls: Sequence[FuseCall], described: list[FuseTensors], records: list[Backend]) -> list[Pair]:
    devices = dict.fromkeys(call.receiver_key.device for call in described)
    if len(devices) > 1:  # a launch has one
        pairs: dict[int, Pair] = {}
        for device in devices:
            there = [number for number, call in enumerate(described) if call.receiver_key.device == device]
            done = _run([calls[n] for n in there], [described[n] for n in there], [records[n] for n in there])
            pairs.update(zip(there, done, strict=True))
        return [pairs[number] for number in range(len(calls))]
    names = {record.name for record in records}
    if len(names) == 1 and "reference" not in names:
        grouped = getattr(kernels(records[0].name), "fuse_kv_layers", None)
        everything = [tensor for call, given in zip(described, calls, strict=True) for tensor in call.tensors]
        everything += [tensor for given in calls if given.out is not None for tensor in given.out]
        if grouped is not None and not needs_dispatcher(everything):
            outs = [
                _empty(call) if given.out is None else given.out for call, given in zip(described, calls, strict=True)
            ]
            busy = [(*call, *out) for call, out in zip(described, outs, strict=True) if call.receiver_key.numel()]
            if busy:
                grouped(records[0].name, busy)
            _count_writes(outs)
            return [(out[0], out[1]) for out in outs]
    return [
        fuse_kv(
            *call[:5], index=call.selected, residual=call.residual, gates=call.gates, out=given.out, backend=name.name
        )
        for call, given, name in zip(described, calls, records, strict=True)
    ]


def check_calls(calls: Sequence[FuseCall], backend: str | None = None) -> None:
    """Raises what `fuse_apart` would raise for these calls, and writes nothing."""
    _check_all(calls, backend)


def _check_all(calls: Sequence[FuseCall], backend: str | None) -> tuple[list[FuseTensors], list[Backend]]:
    described = [
        FuseTensors(
            c.receiver_key, c.receiver_value, c.sharer_key, c.sharer_value, c.weights, c.index, c.residual, c.gates
        )
        for c in calls
    ]
    records = [
        _check(call, given.out, backend, f"calls[{number}].")
        for number, (call, given) in enumerate(zip(described, calls, strict=True))
    ]
    return described, records


def _check(call: FuseTensors, out: Pair | None, backend: str | None, name: str = "") -> Backend:
    """Everything that is refused, and the backend that runs the call."""
    check_fuse_kv(call, out, name)
    if not torch.compiler.is_compiling():
        check_fuse_values(call, name)
    if out is not None and wants_grad((*call.tensors, *out)):
        raise ValueError(f"{name}out= is written in place without autograd, but a tensor of the call requires grad")
    # All weights of a half have the dtype of its first.
    first = (call.weights.key.in_weight, call.weights.value.in_weight)
    pairs = (call[:4], first, call.residual or (), call.gates or (), out or ())
    double = any(tensor.dtype == torch.float64 for pair in pairs for tensor in pair)
    refusal = "supports float32, bfloat16, float16 in all tensors; got float64" if double else ""
    own = call.receiver_key
    return choose("fuse_kv", backend, own.device, own.dtype, refusal, (own, call, out))


def _reference(call: FuseTensors, out: Pair | None) -> Pair:
    dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in call.tensors) else torch.float32
    residual, gates = call.residual or (None, None), call.gates or (None, None)
    halves = (
        (call.receiver_key, call.sharer_key, call.weights.key, residual[0], gates[0]),
        (call.receiver_value, call.sharer_value, call.weights.value, residual[1], gates[1]),
    )
    made = []
    for place, (receiver, sharer, half, base, gate) in enumerate(halves):
        source = receiver if base is None else base
        closed = gate is None and reference_fuse.known_closed(half)
        # Of what is left as it is not even the bits of a NaN change.
        fused = source if closed else reference_fuse.fuse_half(receiver, sharer, half, call.selected, base, gate, dtype)
        if out is None:
            made.append(fused.clone() if closed and fused.dtype == receiver.dtype else fused.to(receiver.dtype))
        elif not (closed and same_memory(source, out[place])):
            out[place].copy_(fused)
    return (made[0], made[1]) if out is None else (out[0], out[1])


def _dispatch(call: FuseTensors, out: Pair | None, backend: str) -> Pair:
    """Through torch's dispatcher: autograd, traces and modes see the call."""
    weights, key_count = list(call.weights.tensors), len(call.weights.key.tensors)
    gates = list(call.gates or ())
    if out is None:
        return torch.ops.c2c.fuse_kv(
            *call[:4], weights, key_count, call.selected, list(call.residual or ()), gates, backend
        )
    read = (call.receiver_key, call.receiver_value, *(call.residual or (None, None)))
    others = [
        None if tensor is None or same_memory(tensor, out[place % 2]) else tensor for place, tensor in enumerate(read)
    ]
    torch.ops.c2c.fuse_kv_out(
        *others[:2],
        *call[2:4],
        weights,
        key_count,
        call.selected,
        *others[2:],
        gates,
        call.residual is not None,
        *out,
        backend,
    )
    return out[0], out[1]


def _empty(call: FuseTensors) -> Pair:
    """New tensors for the results."""
    return (
        torch.empty_like(call.receiver_key, memory_format=torch.contiguous_format),
        torch.empty_like(call.receiver_value, memory_format=torch.contiguous_format),
    )


def _pair(tensors: Sequence[Tensor]) -> Pair | None:
    return (tensors[0], tensors[1]) if tensors else None


def _call(
    receiver_key, receiver_value, sharer_key, sharer_value, weights, key_count, index, residual, gates
) -> FuseTensors:
    return FuseTensors(
        receiver_key, receiver_value, sharer_key, sharer_value, FuserWeights.of(weights, key_count), index,
        _pair(residual), _pair(gates),
    )  # fmt: skip


def _write(backend: str, call: FuseTensors, out: Pair) -> None:
    """The kernel into tensors of the caller's, whose versions autograd keeps count of."""
    if call.receiver_key.numel():
        kernels(backend).fuse_kv(backend, *call, *out)
    _count_writes([out])


def _count_writes(outs: Sequence[Pair]) -> None:
    for out in outs:
        for tensor in out:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)


def _forward(*arguments):
    call = _call(*arguments[:-1])
    check_fuse_values(call)
    out = _empty(call)
    if call.receiver_key.numel():
        kernels(arguments[-1]).fuse_kv(arguments[-1], *call, *out)
    return out


def _forward_out(
    receiver_key, receiver_value, sharer_key, sharer_value, weights, key_count, index, residual_key, residual_value,
    gates, has_residual, key_out, value_out, backend,
) -> None:  # fmt: skip
    out = (key_out, value_out)
    given = (receiver_key, receiver_value, residual_key, residual_value)
    read = [out[place % 2] if tensor is None else tensor for place, tensor in enumerate(given)]
    residual = (read[2], read[3]) if has_residual else None
    weights = FuserWeights.of(weights, key_count)
    call = FuseTensors(read[0], read[1], sharer_key, sharer_value, weights, index, residual, _pair(gates))
    check_fuse_values(call)
    _write(backend, call, out)


def _fake_forward(*arguments):
    return _empty(_call(*arguments[:-1]))


def _inputs(call: FuseTensors) -> tuple[Tensor, ...]:
    """What may have a gradient, in the order of the operator's arguments."""
    return (*call[:4], *call.weights.tensors, *(call.residual or ()), *(call.gates or ()))


def _backward(grad_key, grad_value, *arguments):
    *described, needs, backend = arguments
    call = _call(*described)
    spread = getattr(kernels(backend), "spread", reference_fuse.spread)
    gates = call.gates or (None, None)
    found = [
        reference_fuse.half_backward(grad, receiver, sharer, half, call.selected, gate, spread)
        for grad, receiver, sharer, half, gate in (
            (grad_key, call.receiver_key, call.sharer_key, call.weights.key, gates[0]),
            (grad_value, call.receiver_value, call.sharer_value, call.weights.value, gates[1]),
        )
    ]
    grads = (grad_key.float(), grad_value.float())
    own = [half[0] if call.residual is not None else half[0] + grad for half, grad in zip(found, grads, strict=True)]
    all_grads = [*own, *(half[1] for half in found), *found[0][3], *found[1][3]]
    all_grads += grads if call.residual is not None else ()
    if call.gates is not None:
        all_grads += [half[2].sum_to_size(gate.shape) for half, gate in zip(found, call.gates, strict=True)]
    return [
        # A copy: what an operator returns may share no memory with what it is given.
        torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(grad)
        for tensor, grad, need in zip(_inputs(call), all_grads, needs, strict=True)
        if need
    ]


def _fake_backward(grad_key, grad_value, *arguments):
    *described, needs, _ = arguments
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, need in zip(_inputs(_call(*described)), needs, strict=True)
        if need
    ]


def _setup_context(ctx, inputs, output) -> None:
    *caches, weights, key_count, index, residual, gates, backend = inputs
    ctx.save_for_backward(*caches, *weights, *residual, *gates, index)
    ctx.call = (len(weights), key_count, len(residual), len(gates), backend)


def _autograd_backward(ctx, grad_key, grad_value):
    count, key_count, residuals, gates, backend = ctx.call
    *tensors, index = ctx.saved_tensors
    ends = (4, 4 + count, 4 + count + residuals, 4 + count + residuals + gates)
    needed = ctx.needs_input_grad
    needs = [*needed[:4], *needed[4], *(needed[7] if residuals else ()), *(needed[8] if gates else ())]
    parts = [list(tensors[start:end]) for start, end in itertools.pairwise(ends)]
    found = iter(
        torch.ops.c2c.fuse_kv_backward(
            grad_key, grad_value, *tensors[:4], parts[0], key_count, index, parts[1], parts[2], needs, backend
        )
    )
    grads = [next(found) if need else None for need in needs]
    split = [grads[start:end] for start, end in itertools.pairwise(ends)]
    return (*grads[:4], split[0], None, None, split[1], split[2], None)


implement("fuse_kv", _forward)
implement("fuse_kv_out", _forward_out)
implement("fuse_kv_backward", _backward)
torch.library.register_fake("c2c::fuse_kv", _fake_forward, lib=LIBRARY)
torch.library.register_fake("c2c::fuse_kv_out", lambda *arguments: None, lib=LIBRARY)
torch.library.register_fake("c2c::fuse_kv_backward", _fake_backward, lib=LIBRARY)
refuse_second_derivative("fuse_kv_backward")
torch.library.register_autograd("c2c::fuse_kv", _autograd_backward, setup_context=_setup_context, lib=LIBRARY)
