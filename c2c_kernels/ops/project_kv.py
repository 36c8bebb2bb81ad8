"""`project_kv`: a sharer segment brought into receiver space, once, into a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose, kernels, reference
from ..segment import Rope, SegmentTensors, SharerSegment, pack, to_tensors, unpack
from . import _repeated_projection
from ._checks import check_project_kv, check_segment_values
from ._library import LIBRARY, implement, needs_dispatcher, refuse_second_derivative, wants_grad

_ARGUMENTS = "Tensor[] segment, int[] layout, Tensor[] rope, bool removes"
LIBRARY.define(
    f"project_kv({_ARGUMENTS}, ScalarType dtype, str backend) -> (Tensor key, Tensor value)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"project_kv_out({_ARGUMENTS}, Tensor(a!) key_out, Tensor(b!) value_out, str backend) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"project_kv_backward(Tensor grad_key, Tensor grad_value, {_ARGUMENTS}, bool[] needs, str backend) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def project_kv(
    segment: SharerSegment,
    *,
    rope: Rope | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """key = rotate(Wk unrotate(x) + bk), value = Wv y + bv for every token of a segment.

    De-quantised by `key_scale` and `value_scale`, gathered by `index`; gate and positions are not read. Tokens
    beyond `segment.lengths` are written as zero. A half without a projector is copied.

    Args:
        segment: what to project; see `SharerSegment` for shapes.
        rope: rotation to remove from the sharer's keys and rotation to apply to the projected ones; see `Rope`.
        out: (key, value), each (batch, kv_heads, len, dim), float32, bfloat16 or float16, any strides (last
            dimension contiguous): written in place, for example a slice of a cache. No autograd.
        backend: name of a backend, None for the fastest that can run the call.

    Returns:
        key (batch, kv_heads, len, head_dim) and value (batch, kv_heads, len, value_dim): `out` where given, else new
        tensors in the dtype of segment.key (of the projector, else float32, where the segment is quantised).

    Raises:
        ValueError, TypeError: naming the argument, what came and what is wanted, before anything is written.

    Source: DESIGN.md 2.2; rotary embedding as in arXiv 2104.09864.
    """
    call = None
    if rope is None and not torch.compiler.is_compiling():
        call = _repeated_projection.describe(segment, out, backend)
        if call is not None and (found := _repeated_projection.run(call)) is not None:
            if out is not None:
                _increment_versions(*found)
            return found
    packed = to_tensors(segment)
    key_shape, value_shape = check_project_kv(packed, rope, out)
    dtype = _result_dtype(packed)
    tables, removes = _rope_tables(rope)
    refusal = "has no gradient for rope tables" if wants_grad(tables) else ""
    call_on_cuda = (packed, wants_grad(packed.tensors))
    target = dtype if out is None else out[0].dtype
    record = choose("project_kv", backend, packed.key.device, target, refusal, call_on_cuda)
    if out is not None and wants_grad((*packed.tensors, *tables, *out)):
        raise ValueError("out= is written in place without autograd, but out or a tensor of the segment requires grad")
    if record.name == "reference":
        return _reference(packed, rope, dtype, out)
    if needs_dispatcher((*packed.tensors, *tables, *(out or ()))):
        tensors, layout = pack([packed])
        if out is not None:
            torch.ops.c2c.project_kv_out(tensors, layout, tables, removes, *out, record.name)
            return out[0], out[1]
        return torch.ops.c2c.project_kv(tensors, layout, tables, removes, dtype, record.name)
    if out is None:
        out = (packed.key.new_empty(key_shape, dtype=dtype), packed.key.new_empty(value_shape, dtype=dtype))
    _write(record.name, packed, rope, out[0], out[1])
    if call is not None and record.name == "cpu":
        _repeated_projection.remember(call, packed, out[0], out[1])
    return out[0], out[1]


def _result_dtype(segment: SegmentTensors) -> torch.dtype:
    for tensor in (segment.key, segment.key_proj, segment.value_proj):
        if tensor is not None and tensor.dtype not in (torch.int8, torch.float8_e4m3fn):
            return tensor.dtype
    return torch.float32


def _reference(segment, rope, dtype, out) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_compiling():
        check_segment_values("segment", segment)
    key, value = reference.project_kv(segment, rope, reference.arithmetic_dtype(dtype))
    if out is None:
        return key.to(dtype), value.to(dtype)
    out[0].copy_(key)
    out[1].copy_(value)
    return out[0], out[1]


def _rope_tables(rope: Rope | None) -> tuple[list[Tensor], bool]:
    if rope is None:
        return [], False
    return [*(rope.remove or ()), *(rope.apply or ())], rope.remove is not None


def _rope_from(tables: list[Tensor], removes: bool) -> Rope | None:
    if not tables:
        return None
    remove = (tables[0], tables[1]) if removes else None
    rest = tables[2:] if removes else tables
    return Rope(remove, (rest[0], rest[1]) if rest else None)


def _shapes(segment: SegmentTensors) -> tuple[tuple, tuple]:
    def shape(raw, proj):
        heads, dim = (raw.shape[1], raw.shape[3]) if proj is None else (proj.shape[0], proj.shape[1])
        return raw.shape[0], heads, segment.length, dim

    return shape(segment.key, segment.key_proj), shape(segment.value, segment.value_proj)


def _empty_results(segments, layout, rope, removes, dtype, backend) -> tuple[Tensor, Tensor]:
    key_shape, value_shape = _shapes(unpack(segments, layout)[0])
    return segments[0].new_empty(key_shape, dtype=dtype), segments[0].new_empty(value_shape, dtype=dtype)


def _forward(segments, layout, rope, removes, dtype, backend):
    key, value = _empty_results(segments, layout, rope, removes, dtype, backend)
    kernels(backend).project_kv(backend, unpack(segments, layout)[0], _rope_from(rope, removes), key, value)
    return key, value


def _forward_out(segments, layout, rope, removes, key_out, value_out, backend) -> None:
    _write(backend, unpack(segments, layout)[0], _rope_from(rope, removes), key_out, value_out)


def _write(backend, segment, rope, key_out, value_out) -> None:
    """The kernel into tensors of the caller's, whose versions autograd keeps count of."""
    kernels(backend).project_kv(backend, segment, rope, key_out, value_out)
    _increment_versions(key_out, value_out)


def _increment_versions(*tensors: Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _backward(grad_key, grad_value, segments, layout, rope, removes, needs, backend):
    grads = kernels(backend).project_kv_backward(
        backend, grad_key, grad_value, unpack(segments, layout)[0], _rope_from(rope, removes), needs
    )
    present = [grad for slot, grad in enumerate(grads) if layout[0] >> slot & 1]
    return [
        torch.zeros_like(tensor) if grad is None else grad.to(tensor.dtype).contiguous()
        for tensor, grad, need in zip(segments, present, needs, strict=True)
        if need
    ]


def _setup_context(ctx, inputs, output) -> None:
    segments, layout, rope, removes, _, backend = inputs
    ctx.save_for_backward(*segments, *rope)
    ctx.call = (len(segments), layout, removes, backend)


def _autograd_backward(ctx, grad_key, grad_value):
    count, layout, removes, backend = ctx.call
    segments, rope = list(ctx.saved_tensors[:count]), list(ctx.saved_tensors[count:])
    needs = list(ctx.needs_input_grad[0])
    grads = iter(
        torch.ops.c2c.project_kv_backward(grad_key, grad_value, segments, layout, rope, removes, needs, backend)
    )
    rope_grads: list = [None] * len(rope)
    return [next(grads) if need else None for need in needs], None, rope_grads, None, None, None


def _fake_backward(grad_key, grad_value, segments, layout, rope, removes, needs, backend):
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip(segments, needs, strict=True)
        if need
    ]


implement("project_kv", _forward)
implement("project_kv_out", _forward_out)
implement("project_kv_backward", _backward)
torch.library.register_fake("c2c::project_kv", _empty_results, lib=LIBRARY)
torch.library.register_fake("c2c::project_kv_out", lambda *arguments: None, lib=LIBRARY)
torch.library.register_fake("c2c::project_kv_backward", _fake_backward, lib=LIBRARY)
refuse_second_derivative("project_kv_backward")
torch.library.register_autograd("c2c::project_kv", _autograd_backward, setup_context=_setup_context, lib=LIBRARY)
