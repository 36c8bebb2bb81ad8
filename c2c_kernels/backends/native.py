"""The compiled backends: hands pointers, strides and sizes to the kernels of `csrc` and turns statuses into errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..segment import SLOTS, Rope, SegmentTensors
from . import Backend, cost, reference
from .native_arguments import ABSENT, as_rows, broadcast, raise_status, readable, supported, tensor_numbers
from .native_fuse import fuse_kv as fuse_kv
from .native_fuse import fuse_kv_layers as fuse_kv_layers

try:
    from .. import _cpu
except ImportError as error:
    _cpu, _why_not = None, f"the compiled extension c2c_kernels._cpu cannot be imported: {error}"
else:
    _why_not = ""

_QUERY, _KEY, _VALUE, _OUT = (place * len(ABSENT) for place in (0, 1, 2, 7))  # in an attention call's numbers
_KEY_OUT, _VALUE_OUT = (place * len(ABSENT) for place in (4, 5))  # in a projection's numbers,
_PROJECTED_SEGMENT = 6 * len(ABSENT) + 7  # where six tensors and seven sizes go before the segment
# The tensors of a segment that a repeated projection may have.
PROJECTED = ("key", "value", "key_proj", "value_proj", "key_bias", "value_bias", "key_scale", "value_scale")
_NO_OPTIONS = ABSENT * 4
_NO_PROJECTORS = ABSENT * 6
_NO_SELECTION = ABSENT * 3


def cpu_record() -> Backend:
    """The record of the `cpu` backend."""
    isa = _cpu.isa() if _cpu is not None else ""
    dtypes = ("float32", "bfloat16", "float16")
    return Backend("cpu", _cpu is not None, _why_not, ("cpu",), dtypes, isa)


def status_text(code: int) -> str:
    """A status of csrc/include/c2c.h as words."""
    return _cpu.status_text(code) if _cpu is not None else f"status {code}"


def _segment_numbers(
    segment: SegmentTensors, batch: int, q_heads: int, keep: list[Tensor], materialize: bool = False
) -> list[int]:
    """One c2c_segment; tensors made on the way are put into `keep`, which must outlive the kernel."""
    (key, value, key_proj, key_proj_in, value_proj, value_proj_in, key_bias, value_bias, gate, lengths, positions,
     key_scale, value_scale, index, causal) = segment  # fmt: skip
    _, heads, raw_length, key_dim = key.shape
    length = raw_length if index is None else index.shape[-1]
    numbers = [*readable(key, keep), *readable(value, keep)]
    if key_proj is None and value_proj is None and key_bias is None and value_bias is None:
        numbers += _NO_PROJECTORS
    else:
        for tensor in (key_proj, key_proj_in, value_proj, value_proj_in, key_bias, value_bias):
            numbers += readable(tensor, keep)
    numbers += broadcast(gate, (batch, q_heads, length), keep)
    numbers += tensor_numbers(lengths)
    numbers += broadcast(positions, (batch, length), keep)
    if key_scale is None and value_scale is None and index is None:
        numbers += _NO_SELECTION
    else:
        numbers += broadcast(key_scale, (batch, heads, raw_length), keep)
        numbers += broadcast(value_scale, (batch, heads, raw_length), keep)
        numbers += broadcast(index, (batch, length), keep)
    key_rank = 0 if key_proj_in is None else key_proj_in.shape[0]
    value_rank = 0 if value_proj_in is None else value_proj_in.shape[0]
    numbers += (heads, key_dim, value.shape[3], length, raw_length, key_rank, value_rank, int(causal), int(materialize))
    return numbers


def _can_absorb(segment: SegmentTensors) -> bool:
    return segment.key_proj is not None and segment.value_proj is not None


def _needs_preparing(segment: SegmentTensors) -> bool:
    return segment.selected is not None or torch.float8_e4m3fn in (segment.key.dtype, segment.value.dtype)


def _in_receiver_space(segment: SegmentTensors) -> bool:
    """Whether the attention kernel can read the segment as it is stored, scales included."""
    unbiased = segment.key_bias is None and segment.value_bias is None
    return segment.key_proj is None and segment.value_proj is None and unbiased and not _needs_preparing(segment)


def materialized(
    backend: str, segment: SegmentTensors, dtype: torch.dtype, project: Callable[..., None], name: str
) -> SegmentTensors:
    """The segment in receiver space in this dtype, by a backend's `project_kv`; errors call the segment `name`."""

    def target(raw: Tensor, proj: Tensor | None) -> Tensor:
        heads, dim = (raw.shape[1], raw.shape[3]) if proj is None else (proj.shape[0], proj.shape[1])
        return raw.new_empty((raw.shape[0], heads, segment.length, dim), dtype=dtype)

    key, value = target(segment.key, segment.key_proj), target(segment.value, segment.value_proj)
    project(backend, segment, None, key, value, name)
    return plain(segment, key, value)


def plain(segment: SegmentTensors, key: Tensor, value: Tensor) -> SegmentTensors:
    """The segment with these keys and values in receiver space."""
    kept = {name: getattr(segment, name) for name in ("gate", "lengths", "positions", "causal")}
    return SegmentTensors._make((*(None,) * len(SLOTS), False))._replace(key=key, value=value, **kept)


def machine_for(segment: SegmentTensors) -> cost.Machine:
    """What the cpu backend reaches with a segment that has projectors."""
    raw, weights, isa = segment.key.dtype, segment.key_proj.dtype, _cpu.isa()
    if isa == "avx2":
        return cost.CPU_AVX2
    if weights != torch.bfloat16:
        return cost.CPU
    if isa == "amx_bf16" and raw in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        return cost.CPU_TILES
    return cost.CPU_BFLOAT16 if isa == "avx512_bf16" and raw == torch.bfloat16 else cost.CPU


def _materializes(segment: SegmentTensors, strategy: str, query: Tensor, value_dim: int) -> bool:
    """Whether the kernel projects the segment on the way instead of absorbing its projectors or reading it as it is."""
    if segment.plain or _in_receiver_space(segment):
        return False
    if not (_can_absorb(segment) and segment.length) or strategy == "materialize":
        return True
    if strategy == "absorb":
        return False
    _, q_heads, q_len, head_dim = query.shape
    found = cost.segment_cost(segment, q_heads, q_len, head_dim, value_dim, machine_for(segment))
    return found.strategy == "materialize"


def attention_numbers(
    query, key, value, segments, materialize, attn_mask, is_causal, query_positions, lengths, window, segment_window,
    sinks, out, lse, mass, keep: list[Tensor],
) -> list[int]:  # fmt: skip
    batch, q_heads, q_len, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    numbers = [*readable(query, keep), *readable(key, keep), *readable(value, keep)]
    if attn_mask is None and lengths is None and query_positions is None and sinks is None:
        numbers += _NO_OPTIONS
    else:
        numbers += broadcast(attn_mask, (batch, q_heads, q_len, length), keep)
        numbers += tensor_numbers(lengths)
        numbers += broadcast(query_positions, (batch, q_len), keep)
        numbers += broadcast(sinks, (q_heads,), keep)
    numbers += (
        *tensor_numbers(out), *tensor_numbers(lse), *tensor_numbers(mass),
        batch, q_heads, kv_heads, q_len, length, head_dim, value.shape[3], window or 0, segment_window or 0,
        len(segments), int(is_causal), torch.get_num_threads(),
    )  # fmt: skip
    for segment, projects in zip(segments, materialize, strict=True):
        numbers += _segment_numbers(segment, batch, q_heads, keep, projects)
    return numbers


def plain_parameters(query, key, value, is_causal, window) -> list[int] | None:
    """The kernel's parameters for own tokens alone, of any tensors laid out alike; None where one is copied first."""
    keep: list[Tensor] = []
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    numbers = attention_numbers(
        query, key, value, [], [], None, is_causal, None, None, window, None, None, out, None, None, keep
    )
    return None if keep else numbers


def run_plain(parameters: list[int], query, key, value, out, scale: float, softcap: float) -> None:
    """Forward kernel on `plain_parameters` with these tensors' addresses."""
    numbers = parameters.copy()
    numbers[_QUERY], numbers[_KEY], numbers[_VALUE] = query.data_ptr(), key.data_ptr(), value.data_ptr()
    numbers[_OUT] = out.data_ptr()
    status = _cpu.merged_attention(numbers, scale, softcap)
    if status:
        raise_status(status, "merged_attention")


def merged_attention(
    backend: str, query, key, value, segments, attn_mask, is_causal, query_positions, lengths, scale, window,
    segment_window, softcap, sinks, strategy, return_mass, return_lse, out_dtype=None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Forward kernel; lse and mass are computed where asked for (an empty mass otherwise)."""
    batch, q_heads, q_len, _ = query.shape
    value_dim = value.shape[3]
    materialize = [_materializes(segment, strategy, query, value_dim) for segment in segments]
    out = query.new_empty((batch, q_heads, q_len, value_dim), dtype=out_dtype)
    lse = query.new_empty((batch, q_heads, q_len), dtype=torch.float32) if return_lse else None
    mass_shape = (batch, q_heads, q_len, 1 + len(segments)) if return_mass else (0,)
    mass = query.new_empty(mass_shape, dtype=torch.float32) if return_mass or return_lse else None
    keep: list[Tensor] = []
    numbers = attention_numbers(
        query, key, value, segments, materialize, attn_mask, is_causal, query_positions, lengths, window,
        segment_window, sinks, out, lse, mass if return_mass else None, keep,
    )  # fmt: skip
    status = _cpu.merged_attention(numbers, scale, softcap or 0.0)
    if status:
        raise_status(status, "merged_attention")
    return out, lse, mass


def score_delta(grad_out, grad_lse, grad_mass, exact, mass, runs: int) -> Tensor:
    """(batch, q_heads, q_len, runs) float32: what a score's gradient loses before its weight multiplies it."""
    delta = (grad_out.float() * exact).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    if grad_mass is None:
        return delta.unsqueeze(-1).expand(*delta.shape, runs).contiguous()
    delta = delta + (mass * grad_mass).sum(-1)
    return (delta.unsqueeze(-1) - grad_mass).contiguous()


def merged_attention_backward(
    backend: str, grad_out, grad_lse, grad_mass, exact, lse, mass, query, key, value, segments, attn_mask, is_causal,
    query_positions, lengths, scale, window, segment_window, softcap, sinks, strategy, needs,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the inputs that `needs` marks: query, key, value, sinks, then the segments' tensors in order.

    `exact` is the forward's out in float32. Projected segments are materialised, differentiated in receiver space, and
    their gradients taken back through the projector: memory stays linear in length.
    """
    batch, q_heads = query.shape[:2]
    direct = [  # float32, so that nothing is rounded on the way
        s if s.plain else materialized(backend, s, torch.float32, project_kv, f"segments[{number}]")
        for number, s in enumerate(segments)
    ]
    if strategy == "absorb" and any(_can_absorb(s) for s in segments):
        # Weights are exp(score - lse): both have to come from the same keys, to the last bit.
        exact, lse, _ = merged_attention(
            backend, query, key, value, direct, attn_mask, is_causal, query_positions, lengths, scale, window,
            segment_window, softcap, sinks, strategy, False, True, torch.float32,
        )  # fmt: skip
    keep: list[Tensor] = []
    numbers = attention_numbers(
        query, key, value, direct, [False] * len(direct), attn_mask, is_causal, query_positions, lengths, window,
        segment_window, sinks, exact, lse, None, keep,
    )  # fmt: skip
    delta = score_delta(grad_out, grad_lse, grad_mass, exact, mass, 1 + len(segments))
    grad_rows = as_rows(grad_out)
    grads = [query.new_empty(t.shape, dtype=torch.float32) for t in (query, key, value)]
    segment_grads = []
    for segment, wants in zip(direct, gate_needs(segments, needs), strict=True):
        gate = query.new_empty((batch, q_heads, segment.length), dtype=torch.float32) if wants else None
        pair = [t.new_empty(t.shape, dtype=torch.float32) for t in (segment.key, segment.value)]
        segment_grads.append((*pair, gate))
    sink_weight = None if sinks is None else query.new_empty(lse.shape, dtype=torch.float32)
    written = (*grads, sink_weight, *(t for group in segment_grads for t in group))
    pointers = [0 if t is None else t.data_ptr() for t in written]
    status = _cpu.merged_attention_backward(
        numbers, [*tensor_numbers(grad_rows), *tensor_numbers(delta), *pointers], scale, softcap or 0.0
    )
    if status:
        raise_status(status, "merged_attention")
    grad_sinks = None
    if sinks is not None:
        grad_sinks = -(sink_weight * sink_delta(delta, grad_mass)).sum((0, 2))
    return in_order(
        (query, key, value, sinks), (*grads, grad_sinks), segments, segment_grads, needs, project_kv_backward
    )


def in_order(inputs, grads, segments, segment_grads, needs, project_backward) -> list[Tensor]:
    """Gradients of the inputs that `needs` marks, in the inputs' dtypes, segments' tensors after `inputs`.

    `segment_grads`: for each segment those of its keys and values in receiver space, and of its gate or None.
    """
    tensors, found = list(inputs), list(grads)
    for segment, (grad_key, grad_value, grad_gate) in zip(segments, segment_grads, strict=True):
        flat = _segment_grads(segment, grad_key, grad_value, grad_gate, project_backward)
        for tensor, grad in zip(segment.tensors, flat, strict=True):
            if tensor is not None:
                tensors.append(tensor)
                found.append(grad)
    return [
        torch.zeros(t.shape, dtype=t.dtype, device=t.device) if grad is None else grad.to(t.dtype).contiguous()
        for t, grad, need in zip(tensors, found, needs, strict=True)
        if need
    ]


def gate_needs(segments: list[SegmentTensors], needs: list[bool]) -> list[bool]:
    """Whether each segment's gate has a gradient asked for, out of the flags of all tensors in order."""
    flags = iter(needs[4:])
    wants = []
    for segment in segments:
        by_slot = {slot: next(flags) for slot, t in zip(SLOTS, segment.tensors, strict=True) if t is not None}
        wants.append(by_slot.get("gate", False))
    return wants


def sink_delta(delta: Tensor, grad_mass: Tensor | None) -> Tensor:
    """delta without the term of a run of its own: a sink holds mass that no output reports."""
    return delta[..., 0] if grad_mass is None else delta[..., 0] + grad_mass[..., 0]


def _segment_grads(
    segment: SegmentTensors, grad_key: Tensor, grad_value: Tensor, grad_gate: Tensor | None, project_backward
) -> list[Tensor | None]:
    if segment.plain:
        flat: list[Tensor | None] = [None] * len(SLOTS)
        flat[0], flat[1] = grad_key, grad_value
    else:
        flat = project_backward("cpu", grad_key, grad_value, segment, None)
    if grad_gate is not None:
        flat[SLOTS.index("gate")] = grad_gate.sum_to_size(segment.gate.shape)
    return flat


def projection_numbers(
    segment: SegmentTensors, rope: Rope | None, key_out: Tensor, value_out: Tensor, keep: list[Tensor]
) -> list[int]:
    targets = []
    for half, tensor in (("key", key_out), ("value", value_out)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"out {half} has stride {tensor.stride(-1)} in its last dimension, wanted 1")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"out {half} has dtype {tensor.dtype}, wanted float32, bfloat16 or float16")
        targets.append(tensor)
    batch, kv_heads, length, head_dim = key_out.shape
    segment = segment._replace(gate=None, positions=None, causal=False)
    tables: list[Tensor | None] = [None] * 4
    if rope is not None:
        removed = (None, None) if rope.remove is None else rope.remove
        applied = (None, None) if rope.apply is None else rope.apply
        tables = [
            *(_rope_table(t, batch, segment.key.shape[2]) for t in removed),
            *(_rope_table(t, batch, length) for t in applied),
        ]
        keep += [table for table in tables if table is not None]
    return [
        *(n for t in (*tables, *targets) for n in tensor_numbers(t)),
        batch, kv_heads, head_dim, value_out.shape[3],
        0 if tables[0] is None else tables[0].shape[2],
        0 if tables[2] is None else tables[2].shape[2],
        torch.get_num_threads(),
        *_segment_numbers(segment, batch, kv_heads, keep),
    ]  # fmt: skip


def project_kv(
    backend: str, segment: SegmentTensors, rope: Rope | None, key_out: Tensor, value_out: Tensor, name: str = "segment"
) -> None:
    """Forward kernel, written to key_out and value_out; errors call the segment `name`."""
    keep: list[Tensor] = []
    status = _cpu.project_kv(projection_numbers(segment, rope, key_out, value_out, keep))
    if status:
        raise_status(status, "project_kv", name)


def projection_parameters(segment: SegmentTensors, key_out: Tensor, value_out: Tensor) -> list[int] | None:
    """The kernel's parameters without rotation, for any tensors laid out alike; None where one is copied first."""
    keep: list[Tensor] = []
    numbers = projection_numbers(segment, None, key_out, value_out, keep)
    return None if keep else numbers


def projection_places(sources: Sequence[str]) -> list[int]:
    """Where the addresses of a segment's tensors, named as in SLOTS, and of the two results lie in the parameters."""
    return [_PROJECTED_SEGMENT + SLOTS.index(name) * len(ABSENT) for name in sources] + [_KEY_OUT, _VALUE_OUT]


def run_projection(parameters: list[int], places: list[int], addresses: list[int]) -> None:
    """Forward kernel on `projection_parameters` with tensors at these addresses."""
    numbers = parameters.copy()
    for place, address in zip(places, addresses, strict=True):
        numbers[place] = address
    status = _cpu.project_kv(numbers)
    if status:
        raise_status(status, "project_kv", "segment")


def _rope_table(table: Tensor | None, batch: int, length: int) -> Tensor | None:
    return None if table is None else as_rows(supported(table)).expand(batch, length, table.shape[2])


def project_kv_backward(
    backend: str,
    grad_key: Tensor,
    grad_value: Tensor,
    segment: SegmentTensors,
    rope: Rope | None,
    needs: Sequence[bool] | None = None,
    spread: Callable[[Tensor, Tensor, int], Tensor] | None = None,
) -> list[Tensor | None]:
    """Gradients by slot in float32: plain matrix products over tokens, memory linear in length.

    `needs`: of the tensors that are there, in the order of their slots, which are wanted; None: all. What is frozen
    costs nothing: of a sharer that is not trained that is half of the products. `spread(grad, index, stored)` sums
    gradients of selected tokens (batch, heads, n, dim) where they came from; PyTorch does it by default, in an order
    that is fixed on the CPU alone.
    """
    flat: list[Tensor | None] = [None] * len(SLOTS)
    flags = iter(needs or ())
    wanted = {
        name: t is not None and (needs is None or next(flags)) for name, t in zip(SLOTS, segment.tensors, strict=True)
    }
    removed = rope.remove if rope is not None else None
    applied = rope.apply if rope is not None else None
    if removed is None and _reads_once(segment, wanted):
        return _grads_of_one_read(grad_key, grad_value, segment, applied)
    for first, grad, remove, apply in ((0, grad_key, removed, applied), (1, grad_value, None, None)):
        name = SLOTS[first]
        raw, proj, proj_in, scale = (getattr(segment, f"{name}{end}") for end in ("", "_proj", "_proj_in", "_scale"))
        grad = reference.zero_beyond(grad.float(), segment.lengths)
        if apply is not None:
            grad = reference.rotate_backward(grad, *apply)
        if wanted[f"{name}_bias"]:
            flat[SLOTS.index(f"{name}_bias")] = grad.sum((0, 2))
        wants_raw = wanted[name] or wanted[f"{name}_scale"]
        if not (wants_raw or wanted[f"{name}_proj"] or wanted[f"{name}_proj_in"]):
            continue
        x = reference.prepare_raw(raw, scale, segment.selected, remove, segment.lengths, torch.float32)
        grad_raw, grad_proj, grad_proj_in = _projector_grads(grad, x, proj, proj_in, wants_raw)
        flat[SLOTS.index(f"{name}_proj")], flat[SLOTS.index(f"{name}_proj_in")] = grad_proj, grad_proj_in
        if grad_raw is None:
            continue
        grad_raw = reference.zero_beyond(grad_raw, segment.lengths)
        if segment.selected is not None:
            index = segment.selected.expand(raw.shape[0], segment.length)
            grad_raw = (spread or _spread)(grad_raw, index, raw.shape[2])
        if remove is not None:
            grad_raw = reference.unrotate_backward(grad_raw, *remove)
        if scale is not None:
            expanded = scale.float().expand(raw.shape[:3])
            # Where a quantised or padded token is not finite it has no gradient either.
            grad_scale = (grad_raw * raw.float().masked_fill(grad_raw == 0, 0)).sum(-1)
            flat[SLOTS.index(f"{name}_scale")] = grad_scale.sum_to_size(scale.shape)
            grad_raw = grad_raw * expanded.unsqueeze(-1)
        flat[first] = grad_raw
    return flat


def _spread(grad: Tensor, index: Tensor, stored: int) -> Tensor:
    out = torch.zeros((*grad.shape[:2], stored, grad.shape[3]), dtype=torch.float32, device=grad.device)
    return out.scatter_add_(2, index.long()[:, None, :, None].expand_as(grad), grad)


def _reads_once(segment: SegmentTensors, wanted: dict[str, bool]) -> bool:
    """Whether keys and values are made of the same tokens by dense maps, and the tokens' gradient is not wanted."""
    key, value = segment.key, segment.value
    same = key.data_ptr() == value.data_ptr() and key.shape == value.shape and key.stride() == value.stride()
    dense = segment.key_proj is not None and segment.value_proj is not None
    dense = dense and segment.key_proj_in is None and segment.value_proj_in is None
    scaled = segment.key_scale is not None or segment.value_scale is not None
    return same and dense and not scaled and not (wanted["key"] or wanted["value"])


def _grads_of_one_read(
    grad_key: Tensor, grad_value: Tensor, segment: SegmentTensors, apply: tuple[Tensor, Tensor] | None
) -> list[Tensor | None]:
    """Gradients of both projectors and biases from one product over the tokens that both read."""
    grads = [reference.zero_beyond(grad.float(), segment.lengths) for grad in (grad_key, grad_value)]
    if apply is not None:
        grads[0] = reference.rotate_backward(grads[0], *apply)
    x = reference.prepare_raw(segment.key, None, segment.selected, None, segment.lengths, torch.float32)
    rows = torch.cat([grad.transpose(1, 2).flatten(2).flatten(0, 1) for grad in grads], dim=1)
    both = rows.T @ x.transpose(1, 2).flatten(2).flatten(0, 1)
    width = segment.key_proj.shape[0] * segment.key_proj.shape[1]
    flat: list[Tensor | None] = [None] * len(SLOTS)
    flat[SLOTS.index("key_proj")] = both[:width].reshape(segment.key_proj.shape)
    flat[SLOTS.index("value_proj")] = both[width:].reshape(segment.value_proj.shape)
    flat[SLOTS.index("key_bias")], flat[SLOTS.index("value_bias")] = (grad.sum((0, 2)) for grad in grads)
    return flat


def _projector_grads(grad, x, proj, proj_in, wants_raw) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of raw tokens x (batch, heads, n, dim) where wanted, of the projector and of its inner factor."""
    if proj is None:
        return grad, None, None
    tokens = x.transpose(1, 2).flatten(2).flatten(0, 1)
    rows = grad.transpose(1, 2).flatten(2).flatten(0, 1)
    weight = proj.float().flatten(0, 1)
    inner = tokens if proj_in is None else tokens @ proj_in.float().T
    grad_proj = (rows.T @ inner).reshape(proj.shape)
    if proj_in is None and not wants_raw:
        return None, grad_proj, None
    grad_inner = rows @ weight
    grad_proj_in = None
    if proj_in is not None:
        grad_proj_in = grad_inner.T @ tokens
        if not wants_raw:
            return None, grad_proj, grad_proj_in
        grad_inner = grad_inner @ proj_in.float()
    batch, heads, length, dim = x.shape
    return grad_inner.reshape(batch, length, heads, dim).transpose(1, 2), grad_proj, grad_proj_in


def merge_numbers(outs: list[Tensor], lses: list[Tensor], keep: list[Tensor]) -> tuple[list[int], Tensor, Tensor]:
    """A merge call's numbers, and the out and lse that it writes; tensors made on the way are put into `keep`."""
    outs = [as_rows(out) for out in outs]
    lses = [supported(lse) for lse in lses]
    keep += [*outs, *lses]
    out = outs[0].new_empty(outs[0].shape)
    lse = out.new_empty(out.shape[:3], dtype=torch.float32)
    numbers = [
        *tensor_numbers(out), *tensor_numbers(lse), *out.shape, len(outs), torch.get_num_threads(),
        *(n for t in (*outs, *lses) for n in tensor_numbers(t)),
    ]  # fmt: skip
    return numbers, out, lse


def merge_states(backend: str, outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Forward kernel."""
    keep: list[Tensor] = []
    numbers, out, lse = merge_numbers(outs, lses, keep)
    status = _cpu.merge_states(numbers)
    if status:
        raise_status(status, "merge_states")
    return out, lse


def quantize_numbers(x: Tensor) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """A quantise call's numbers; x as it is read, and the codes and scale that are written."""
    x = as_rows(x)
    out, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:3], dtype=torch.float32)
    numbers = [*tensor_numbers(x), *tensor_numbers(out), *tensor_numbers(scale), *x.shape, torch.get_num_threads()]
    return numbers, x, out, scale


def quantize(backend: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Forward kernel."""
    numbers, _kept, out, scale = quantize_numbers(x)
    status = _cpu.quantize(numbers)
    if status:
        raise_status(status, "quantize_kv")
    return out, scale
