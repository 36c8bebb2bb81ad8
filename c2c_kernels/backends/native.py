"""The compiled backends: hands pointers, strides and sizes to the kernels of `csrc` and turns statuses into errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..segment import SLOTS, Rope, SegmentTensors
from . import Backend, cost, projection_gradients
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


def _has_matrix_tiles() -> bool:
    """Whether the cpu backend multiplies bfloat16 as it is (csrc/cpu/matrix_tiles.h)."""
    return _cpu.isa() in ("amx_bf16", "avx512_bf16")


def _staged_dtypes(segment: SegmentTensors, query: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What the forward pass keeps keys and values in that it projects on the way (staged_dtype of stage.h)."""

    def of(half: str) -> torch.dtype:
        raw, proj, proj_in, bias, scale = (
            getattr(segment, f"{half}{end}") for end in ("", "_proj", "_proj_in", "_bias", "_scale")
        )
        if not _has_matrix_tiles() or query.dtype != torch.bfloat16:
            return torch.float32
        if proj is None:
            unchanged = bias is None and scale is None and raw.dtype == torch.bfloat16
            return torch.bfloat16 if unchanged else torch.float32
        weights = {proj.dtype} if proj_in is None else {proj.dtype, proj_in.dtype}
        tiled = weights == {torch.bfloat16} and raw.dtype in projection_gradients.NARROW
        return torch.bfloat16 if tiled else torch.float32

    return of("key"), of("value")


def materialized(
    backend: str,
    segment: SegmentTensors,
    dtypes: tuple[torch.dtype, torch.dtype],
    project: Callable[..., None],
    name: str,
) -> SegmentTensors:
    """The segment's keys and values in receiver space in these dtypes, by a backend's `project_kv`.

    Errors call the segment `name`.
    """

    def target(raw: Tensor, proj: Tensor | None, dtype: torch.dtype) -> Tensor:
        heads, dim = (raw.shape[1], raw.shape[3]) if proj is None else (proj.shape[0], proj.shape[1])
        return raw.new_empty((raw.shape[0], heads, segment.length, dim), dtype=dtype)

    key = target(segment.key, segment.key_proj, dtypes[0])
    value = target(segment.value, segment.value_proj, dtypes[1])
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
    if not (_has_matrix_tiles() and raw in projection_gradients.NARROW):
        return cost.CPU
    return cost.CPU_TILES if isa == "amx_bf16" else cost.CPU_BFLOAT16


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

    `exact` is the forward's out in float32. Projected segments are materialised as the forward pass has read them,
    differentiated in receiver space, and their gradients taken back through the projector: memory stays linear in
    length. Where gradients of their gates or scales are asked for they are materialised in float32, and read once more:
    a gate of 0 has a gradient of exp(score - lse), in which a rounded key's error grows with the score.
    """
    batch, q_heads = query.shape[:2]
    wants = wanted(segments, needs)
    dtypes = [(torch.float32,) * 2 if s.plain else _staged_dtypes(s, query) for s in segments]
    careful = any(
        torch.bfloat16 in dtype and any(asked.get(name) for name in ("gate", "key_scale", "value_scale"))
        for dtype, asked in zip(dtypes, wants, strict=True)
    )
    if careful:
        dtypes = [(torch.float32,) * 2] * len(segments)
    direct = [
        s if s.plain else materialized(backend, s, dtype, project_kv, f"segments[{number}]")
        for number, (s, dtype) in enumerate(zip(segments, dtypes, strict=True))
    ]
    if careful or (strategy == "absorb" and any(_can_absorb(s) for s in segments)):
        # Weights are exp(score - lse): both have to come from the same keys, to the last bit.
        own = (query.float(), key.float(), value.float()) if careful else (query, key, value)
        exact, lse, _ = merged_attention(
            backend, *own, direct, attn_mask, is_causal, query_positions, lengths, scale, window, segment_window,
            softcap, sinks, strategy, False, True, torch.float32,
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
    for segment, asked in zip(direct, wants, strict=True):
        gate = None
        if asked.get("gate"):
            gate = query.new_empty((batch, q_heads, segment.length), dtype=torch.float32)
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
    narrow = _has_matrix_tiles() and query.dtype == torch.bfloat16

    def through_projector(grad_key, grad_value, segment: SegmentTensors, wants: list[bool]) -> list[Tensor | None]:
        return projection_gradients.gradients(grad_key, grad_value, segment, None, wants, narrow=narrow)

    return in_order((query, key, value, sinks), (*grads, grad_sinks), segments, segment_grads, needs, through_projector)


def in_order(inputs, grads, segments, segment_grads, needs, through_projector) -> list[Tensor]:
    """Gradients of the inputs that `needs` marks, in the inputs' dtypes, segments' tensors after `inputs`.

    `segment_grads`: for each segment those of its keys and values in receiver space, and of its gate or None.
    `through_projector(grad_key, grad_value, segment, needs)`: those of a projected segment's tensors, by slot.
    """
    tensors, found = list(inputs), list(grads)
    for segment, asked, (grad_key, grad_value, grad_gate) in zip(
        segments, wanted(segments, needs), segment_grads, strict=True
    ):
        flat = _segment_grads(segment, grad_key, grad_value, grad_gate, list(asked.values()), through_projector)
        for tensor, grad in zip(segment.tensors, flat, strict=True):
            if tensor is not None:
                tensors.append(tensor)
                found.append(grad)
    return [
        torch.zeros(t.shape, dtype=t.dtype, device=t.device) if grad is None else grad.to(t.dtype).contiguous()
        for t, grad, need in zip(tensors, found, needs, strict=True)
        if need
    ]


def wanted(segments: list[SegmentTensors], needs: list[bool]) -> list[dict[str, bool]]:
    """Which of each segment's tensors, by slot, have a gradient asked for, out of the flags of all tensors in order."""
    flags = iter(needs[4:])
    return [
        {slot: next(flags) for slot, t in zip(SLOTS, segment.tensors, strict=True) if t is not None}
        for segment in segments
    ]


def gate_needs(segments: list[SegmentTensors], needs: list[bool]) -> list[bool]:
    """Whether each segment's gate has a gradient asked for."""
    return [by_slot.get("gate", False) for by_slot in wanted(segments, needs)]


def sink_delta(delta: Tensor, grad_mass: Tensor | None) -> Tensor:
    """delta without the term of a run of its own: a sink holds mass that no output reports."""
    return delta[..., 0] if grad_mass is None else delta[..., 0] + grad_mass[..., 0]


def _segment_grads(
    segment: SegmentTensors, grad_key: Tensor, grad_value: Tensor, grad_gate: Tensor | None, wants, through_projector
) -> list[Tensor | None]:
    if segment.plain:
        flat: list[Tensor | None] = [None] * len(SLOTS)
        flat[0], flat[1] = grad_key, grad_value
    else:
        flat = through_projector(grad_key, grad_value, segment, wants)
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
    backend: str, grad_key: Tensor, grad_value: Tensor, segment: SegmentTensors, rope: Rope | None, needs=None
) -> list[Tensor | None]:
    """Gradients by slot: matrix products of PyTorch."""
    narrow = _has_matrix_tiles() and grad_key.dtype == grad_value.dtype == torch.bfloat16
    return projection_gradients.gradients(grad_key, grad_value, segment, rope, needs, narrow=narrow)


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
