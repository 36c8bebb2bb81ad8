"""What operators refuse, once for all backends. Every error names the argument, what came and what is wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..segment import SLOTS, Rope, SegmentTensors

STRATEGIES = ("auto", "absorb", "materialize")
_INTEGERS = (torch.int32, torch.int64)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_QUANTISED = (torch.int8, torch.float8_e4m3fn)
_WINDOW_LIMIT = 2**62


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def expect(name: str, tensor: Tensor, wanted: tuple, words: str) -> None:
    if tensor.shape != wanted:
        raise ValueError(f"{name} has shape {shape_of(tensor)}, wanted {words} = {tuple(wanted)}")


def expect_broadcastable(name: str, tensor: Tensor, wanted: tuple, words: str) -> None:
    shape = tensor.shape
    missing = len(wanted) - len(shape)
    fits = missing >= 0
    if fits:
        for size, full in zip(shape, wanted[missing:] if missing else wanted, strict=True):
            if size != full and size != 1:
                fits = False
    if not fits:
        raise ValueError(f"{name} has shape {shape_of(tensor)}, wanted broadcastable to {words} = {tuple(wanted)}")


def _expect_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def expect_integers(name: str, tensor: Tensor) -> None:
    _expect_tensor(name, tensor)
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name} has dtype {tensor.dtype}, wanted int32 or int64")


def expect_float(name: str, tensor: Tensor) -> None:
    _expect_tensor(name, tensor)
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} has dtype {tensor.dtype}, wanted float32, bfloat16, float16 or float64")


def expect_device(name: str, tensor: Tensor, device: torch.device, like: str = "the query") -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, wanted {device} like {like}")


def _check_low_rank(name: str, proj: Tensor, proj_in: Tensor | None, kv_heads: int, dim: int, width: int) -> None:
    expect_float(name, proj)
    if proj_in is None:
        expect(name, proj, (kv_heads, dim, width), "(kv_heads, head_dim, sharer_width)")
        return
    expect_float(f"{name}[1]", proj_in)
    if proj_in.dim() != 2 or proj_in.shape[1] != width:
        raise ValueError(f"{name}[1] has shape {shape_of(proj_in)}, wanted (rank, sharer_width) = (rank, {width})")
    if proj_in.shape[0] == 0:
        raise ValueError(f"{name}[1] has rank 0, wanted at least 1")
    expect(f"{name}[0]", proj, (kv_heads, dim, proj_in.shape[0]), "(kv_heads, head_dim, rank)")


def _check_tensors(name: str, segment: SegmentTensors, device: torch.device | None, like: str) -> None:
    """Every field is a tensor on one device, key and value always."""
    present = [tensor for tensor in segment.tensors if tensor is not None]
    if len(present) >= 2 and segment.key is not None and segment.value is not None:
        for tensor in present:
            if not isinstance(tensor, Tensor) or tensor.device != device:
                break
        else:
            return
    for slot, tensor in zip(SLOTS, segment.tensors, strict=True):
        if not isinstance(tensor, Tensor) and (tensor is not None or slot in ("key", "value")):
            raise TypeError(f"{name}.{slot} must be a tensor, got {type(tensor).__name__}")
    for slot, tensor in zip(SLOTS, segment.tensors, strict=True):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}.{slot} is on {tensor.device}, wanted {device} like {like}")


def check_raw(name: str, segment: SegmentTensors) -> None:
    """The part of a segment that does not depend on the receiver."""
    key, value = segment.key, segment.value
    for slot, tensor, scale in (("key", key, segment.key_scale), ("value", value, segment.value_scale)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name}.{slot} has shape {shape_of(tensor)}, wanted (batch, sharer_heads, len, sharer_head_dim)"
            )
        if tensor.dtype in _QUANTISED:
            if scale is None:
                raise ValueError(f"{name}.{slot} is stored as {tensor.dtype}: {name}.{slot}_scale is needed")
        elif tensor.dtype not in _FLOATS:
            expect_float(f"{name}.{slot}", tensor)
        if scale is not None:
            expect_float(f"{name}.{slot}_scale", scale)
            expect_broadcastable(f"{name}.{slot}_scale", scale, tuple(tensor.shape[:3]), "(batch, sharer_heads, len)")
    batch, heads, length, _ = key.shape
    value_shape = value.shape
    if batch != value_shape[0] or heads != value_shape[1] or length != value_shape[2]:
        raise ValueError(
            f"{name}.value has shape {shape_of(value)}, wanted batch, heads and len of {name}.key {shape_of(key)}"
        )
    if segment.selected is not None:
        expect_integers(f"{name}.index", segment.selected)
        if segment.selected.dim() not in (1, 2) or (segment.selected.dim() == 2 and segment.selected.shape[0] != batch):
            raise ValueError(
                f"{name}.index has shape {shape_of(segment.selected)}, wanted (batch, n) or (n,) with batch = {batch}"
            )
    if segment.lengths is not None:
        expect_integers(f"{name}.lengths", segment.lengths)
        expect(f"{name}.lengths", segment.lengths, (batch,), "(batch,)")
    if segment.positions is not None:
        expect_integers(f"{name}.positions", segment.positions)
        if segment.positions.dim() == 1:
            expect(f"{name}.positions", segment.positions, (segment.length,), "(len,)")
        else:
            expect(f"{name}.positions", segment.positions, (batch, segment.length), "(batch, len)")
    elif segment.causal:
        raise ValueError(f'{name}.visibility is "causal": {name}.positions is needed')


def check_segment(
    name: str, segment: SegmentTensors, batch: int, q_heads: int, kv_heads: int, head_dim: int, value_dim: int, device
) -> None:
    """A segment against the receiver that reads it."""
    _check_tensors(name, segment, device, "the query")
    check_raw(name, segment)
    key_batch, key_heads, _, key_dim = segment.key.shape
    if key_batch != batch:
        raise ValueError(f"{name}.key has batch {key_batch}, wanted {batch} like the query")
    fits = key_heads == kv_heads and key_dim == head_dim and segment.value.shape[3] == value_dim
    if not (fits and segment.plain):
        _check_halves(name, segment, kv_heads, head_dim, value_dim)
    if segment.gate is not None:
        expect_float(f"{name}.gate", segment.gate)
        expect_broadcastable(f"{name}.gate", segment.gate, (batch, q_heads, segment.length), "(batch, q_heads, len)")


def _check_halves(name: str, segment: SegmentTensors, kv_heads: int, head_dim: int, value_dim: int) -> None:
    """Keys and values with their projectors and biases against the receiver's heads."""
    for slot, raw, proj, proj_in, bias, dim in (
        ("key", segment.key, segment.key_proj, segment.key_proj_in, segment.key_bias, head_dim),
        ("value", segment.value, segment.value_proj, segment.value_proj_in, segment.value_bias, value_dim),
    ):
        if proj is None:
            if raw.shape[1] != kv_heads or raw.shape[3] != dim:
                raise ValueError(
                    f"{name}.{slot} has shape {shape_of(raw)} and no {name}.{slot}_proj: wanted the receiver's "
                    f"{kv_heads} heads x {dim}"
                )
        else:
            _check_low_rank(f"{name}.{slot}_proj", proj, proj_in, kv_heads, dim, raw.shape[1] * raw.shape[3])
        if bias is not None:
            expect_float(f"{name}.{slot}_bias", bias)
            expect(f"{name}.{slot}_bias", bias, (kv_heads, dim), "(kv_heads, head_dim)")


def check_merged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: list[SegmentTensors],
    attn_mask: Tensor | None,
    is_causal: bool,
    query_positions: Tensor | None,
    lengths: Tensor | None,
    scale: float | None,
    window: int | None,
    segment_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    strategy: str,
) -> None:
    """Shapes, dtypes and devices of a `merged_attention` call; values are checked by the backends."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        for name, tensor, words in (
            ("query", query, "(batch, q_heads, q_len, head_dim)"),
            ("key", key, "(batch, kv_heads, len, head_dim)"),
            ("value", value, "(batch, kv_heads, len, value_dim)"),
        ):
            if tensor.dim() != 4:
                raise ValueError(f"{name} has shape {shape_of(tensor)}, wanted {words}")
    batch, q_heads, q_len, head_dim = query.shape
    key_batch, kv_heads, length, key_dim = key.shape
    if key_batch != batch or key_dim != head_dim:
        raise ValueError(
            f"key has shape {shape_of(key)}, wanted (batch, kv_heads, len, head_dim) with batch {batch} and "
            f"head_dim {head_dim} of query {shape_of(query)}"
        )
    value_batch, value_heads, value_length, value_dim = value.shape
    if value_batch != batch or value_heads != kv_heads or value_length != length:
        raise ValueError(f"value has shape {shape_of(value)}, wanted batch, kv_heads and len of key {shape_of(key)}")
    if kv_heads == 0 or q_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"query has {q_heads} heads, wanted a positive multiple of the {kv_heads} heads of key")
    if head_dim == 0 or value_dim == 0:
        raise ValueError(f"head_dim must be positive, got key {shape_of(key)} and value {shape_of(value)}")
    expect_float("query", query)
    device = query.device
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, wanted {query.dtype} like the query")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, wanted {device} like the query")
    if attn_mask is not None:
        _expect_tensor("attn_mask", attn_mask)
        if attn_mask.dtype != torch.bool:
            expect_float("attn_mask", attn_mask)
        expect_device("attn_mask", attn_mask, device)
        expect_broadcastable("attn_mask", attn_mask, (batch, q_heads, q_len, length), "(batch, q_heads, q_len, len)")
    if query_positions is not None:
        expect_integers("query_positions", query_positions)
        expect_device("query_positions", query_positions, device)
        expect_broadcastable("query_positions", query_positions, (batch, q_len), "(batch, q_len)")
    if lengths is not None:
        expect_integers("lengths", lengths)
        expect_device("lengths", lengths, device)
        expect("lengths", lengths, (batch,), "(batch,)")
    if sinks is not None:
        expect_float("sinks", sinks)
        expect_device("sinks", sinks, device)
        expect("sinks", sinks, (q_heads,), "(q_heads,)")
    for name, size in (("window", window), ("segment_window", segment_window)):
        if size is None:
            continue
        if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
            raise TypeError(f"{name} must be an integer or None, got {type(size).__name__}")
        if size <= 0 or size > _WINDOW_LIMIT:
            raise ValueError(f"{name} must be positive or None, got {size}")
    for name, number in (("softcap", softcap), ("scale", scale)):
        if number is not None and not isinstance(number, (int, float, torch.SymFloat)):
            raise TypeError(f"{name} must be a number or None, got {type(number).__name__}")
    # Numbers reach the kernels as float32.
    if softcap is not None and not 1e-30 < softcap < 1e30:
        raise ValueError(f"softcap must be positive or None (within 1e-30 .. 1e30), got {softcap}")
    if scale is not None and not abs(scale) < 1e30:
        raise ValueError(f"scale must be finite (within +-1e30), got {scale}")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be a bool, got {type(is_causal).__name__}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")
    for number, segment in enumerate(segments):
        check_segment(f"segments[{number}]", segment, batch, q_heads, kv_heads, head_dim, value_dim, device)


def check_lengths(name: str, lengths: Tensor | None, limit: int) -> None:
    """Values of a lengths tensor: 0 <= lengths <= limit."""
    if lengths is not None and lengths.numel() and not bool(((lengths >= 0) & (lengths <= limit)).all()):
        raise ValueError(f"{name} has values outside 0..{limit}: {lengths.tolist()}")


def check_gate(name: str, gate: Tensor | None) -> None:
    """Values of a gate: >= 0, finite, no NaN."""
    if gate is not None and gate.numel() and not bool(((gate >= 0) & (gate < torch.inf)).all()):
        raise ValueError(f"{name} must be finite and >= 0 everywhere; it has negative, infinite or NaN values")


def check_index(name: str, index: Tensor | None, length: int) -> None:
    """Values of an index: 0 <= index < length."""
    if index is not None and index.numel() and not bool(((index >= 0) & (index < length)).all()):
        raise ValueError(f"{name} has values outside 0..{length - 1}")


def check_segment_values(name: str, segment: SegmentTensors) -> None:
    check_lengths(f"{name}.lengths", segment.lengths, segment.length)
    check_gate(f"{name}.gate", segment.gate)
    check_index(f"{name}.index", segment.selected, segment.key.shape[2])


def _check_rope(name: str, tables: tuple[Tensor, Tensor] | None, batch: int, length: int, dim: int, device) -> None:
    if tables is None:
        return
    if not isinstance(tables, (tuple, list)) or len(tables) != 2:
        raise TypeError(f"{name} must be a pair (cos, sin) of tensors, got {type(tables).__name__}")
    for part, table in zip(("cos", "sin"), tables, strict=True):
        _expect_tensor(f"{name} {part}", table)
    for part, table in zip(("cos", "sin"), tables, strict=True):
        expect_float(f"{name} {part}", table)
        expect_device(f"{name} {part}", table, device)
        if table.dim() != 3 or table.shape[0] not in (1, batch) or table.shape[1] != length:
            raise ValueError(
                f"{name} {part} has shape {shape_of(table)}, wanted (batch or 1, len, rotary_dim) = "
                f"({batch} or 1, {length}, rotary_dim)"
            )
        if table.shape[2] == 0 or table.shape[2] % 2 or table.shape[2] > dim:
            raise ValueError(f"{name} {part} has rotary_dim {table.shape[2]}, wanted even, in 2..{dim}")
    if tables[0].shape != tables[1].shape:
        raise ValueError(f"{name} cos and sin differ in shape: {shape_of(tables[0])} and {shape_of(tables[1])}")


def check_project_kv(
    segment: SegmentTensors, rope: Rope | None, out: tuple[Tensor, Tensor] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes, dtypes and devices of a `project_kv` call; returns the shapes of the projected key and value."""
    device = segment.key.device if isinstance(segment.key, Tensor) else None
    _check_tensors("segment", segment, device, "segment.key")
    check_raw("segment", segment)
    batch, _, raw_length, raw_dim = segment.key.shape
    shapes = []
    for slot, raw, proj, proj_in, bias in (
        ("key", segment.key, segment.key_proj, segment.key_proj_in, segment.key_bias),
        ("value", segment.value, segment.value_proj, segment.value_proj_in, segment.value_bias),
    ):
        if proj is None:
            kv_heads, dim = raw.shape[1], raw.shape[3]
        else:
            if proj.dim() != 3:
                raise ValueError(
                    f"segment.{slot}_proj has shape {shape_of(proj)}, wanted (kv_heads, head_dim, sharer_width)"
                )
            kv_heads, dim = proj.shape[0], proj.shape[1]
            _check_low_rank(f"segment.{slot}_proj", proj, proj_in, kv_heads, dim, raw.shape[1] * raw.shape[3])
        if bias is not None:
            expect_float(f"segment.{slot}_bias", bias)
            expect(f"segment.{slot}_bias", bias, (kv_heads, dim), "(kv_heads, head_dim)")
        shapes.append((batch, kv_heads, segment.length, dim))
    if shapes[0][1] != shapes[1][1]:
        raise ValueError(f"segment.value_proj gives {shapes[1][1]} heads, segment.key_proj gives {shapes[0][1]}")
    if rope is not None:
        if not isinstance(rope, Rope):
            raise TypeError(f"rope must be a Rope or None, got {type(rope).__name__}")
        _check_rope("rope.remove", rope.remove, batch, raw_length, raw_dim, device)
        _check_rope("rope.apply", rope.apply, batch, segment.length, shapes[0][3], device)
    if out is not None:
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            raise TypeError(f"out must be a pair (key, value) of tensors, got {type(out).__name__}")
        for slot, tensor, wanted in zip(("key", "value"), out, shapes, strict=True):
            expect_float(f"out {slot}", tensor)
            expect_device(f"out {slot}", tensor, device)
            expect(f"out {slot}", tensor, wanted, "(batch, kv_heads, len, head_dim)")
            if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
                raise ValueError(f"out {slot} has stride 0 {tensor.stride()}: its elements share memory")
            if may_overlap(tensor, segment.tensors):
                raise ValueError(f"out {slot} shares memory with the segment: project into other memory")
        if out[0].numel() and out[0].data_ptr() == out[1].data_ptr():
            raise ValueError("out key and out value are the same memory")
    return shapes[0], shapes[1]


def may_overlap(out: Tensor, sources: tuple[Tensor | None, ...]) -> bool:
    """Whether the addresses of a tensor meet those of another; of interleaved views of one buffer this says yes."""
    if torch.compiler.is_compiling() or out.numel() == 0 or out.device.type == "meta":
        return False

    first, last = out.data_ptr(), end_of(out)
    for source in sources:
        if source is not None and source.data_ptr() < last and source.numel() and first < end_of(source):
            return True
    return False


def end_of(tensor: Tensor) -> int:
    """The address behind the last element of a tensor that has some."""
    reach = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        reach += (size - 1) * stride
    return tensor.data_ptr() + reach * tensor.element_size()


def check_merge_states(outs: list[Tensor], lses: list[Tensor]) -> None:
    """Shapes, dtypes and devices of a `merge_states` call."""
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be equally many, at least one; got {len(outs)} and {len(lses)}")
    first = outs[0]
    if first.dim() != 4:
        raise ValueError(f"outs[0] has shape {shape_of(first)}, wanted (batch, q_heads, q_len, head_dim)")
    for number, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        expect_float(f"outs[{number}]", out)
        expect_float(f"lses[{number}]", lse)
        expect(f"outs[{number}]", out, tuple(first.shape), "the shape of outs[0]")
        expect(f"lses[{number}]", lse, tuple(first.shape[:3]), "(batch, q_heads, q_len)")
        if out.dtype != first.dtype:
            raise TypeError(f"outs[{number}] has dtype {out.dtype}, wanted {first.dtype} like outs[0]")
        expect_device(f"outs[{number}]", out, first.device)
        expect_device(f"lses[{number}]", lse, first.device)


def check_quantize_kv(key: Tensor, value: Tensor) -> None:
    """Shapes, dtypes and devices of a `quantize_kv` call."""
    for name, tensor in (("key", key), ("value", value)):
        expect_float(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {shape_of(tensor)}, wanted (batch, heads, len, head_dim)")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value has shape {shape_of(value)}, wanted batch, heads and len of key {shape_of(key)}")
    expect_device("value", value, key.device)
    if value.dtype != key.dtype:
        raise TypeError(f"value has dtype {value.dtype}, wanted {key.dtype} like key")
