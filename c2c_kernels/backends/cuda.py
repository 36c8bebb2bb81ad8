"""The CUDA backend: hands pointers, strides and sizes to the kernels of `csrc/cuda`, with the same names as `native`.

What it does not take says `refusal`, which the choice of a backend asks. Gradients are computed by the Triton backend.
The values of `lengths`, gates and indices are not looked at by the host, which would have to wait for them: lengths are
cut to the tensor, an index outside of it reads zeros, a gate that is not above 0 closes its token.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from ..segment import Rope, SegmentTensors
from . import Backend, cost, cuda_fuse, kernels, logger, native, reference_fuse, triton_record

try:
    from .. import _cuda
except ImportError as error:
    _cuda, _why_not = None, f"the compiled extension c2c_kernels._cuda cannot be imported: {error}"
else:
    _why_not = ""

DTYPES = (torch.bfloat16, torch.float16)
QUANTISED = (torch.int8, torch.float8_e4m3fn)
_VERIFIED = "the PTX for sm_80 and sm_90 run in a simulator; not run on hardware"
_UNSUPPORTED, _CUDA_ERROR = 8, 9
_LARGEST_DIM, _MOST_SEGMENTS, _MOST_STATES = (
    (0, 0, 0) if _cuda is None else (_cuda.largest_dim, _cuda.most_segments, _cuda.most_states)
)
_LARGEST_WIDTH, _RAW_PAD, _MOST_DECODED = (
    (0, 1, 0) if _cuda is None else (_cuda.largest_width, _cuda.raw_pad, _cuda.most_decoded)
)
_MOST_FUSER_BLOCKS = 0 if _cuda is None else _cuda.most_fuser_blocks


class TileMap(NamedTuple):
    """A tensor map that belongs into a launch's parameters: 16-bit numbers in boxes of `tokens` rows of 64 columns.

    Attributes:
        at: where in the parameters, bytes; a CUtensorMap takes 128.
        data: address of the tensor.
        size: numbers of a row, rows, heads, batch.
        stride: bytes from a row, a head, a batch row to the next.
        tokens: rows of a box.
    """

    at: int
    data: int
    size: tuple[int, int, int, int]
    stride: tuple[int, int, int]
    tokens: int


class Launch(NamedTuple):
    """One kernel launch, before it happens: the kernel's name in PTX and its one parameter, a struct.

    `maps` are missing in the struct; `unmapped` is the struct where the driver makes none. `tensors` are those that it
    points into.
    """

    kernel: str
    grid: int
    block: int
    shared: int
    params: bytes
    maps: tuple[TileMap, ...]
    unmapped: bytes
    tensors: tuple[Tensor, ...]


Executor = Callable[[Launch], None]
_taken_over: ContextVar[tuple[int, Executor] | None] = ContextVar("c2c_cuda_executor", default=None)


@contextlib.contextmanager
def executed_by(capability: int, executor: Executor) -> Iterator[None]:
    """Hands every launch of the block to `executor`, as for a device of this compute capability (80 for 8.0)."""
    token = _taken_over.set((capability, executor))
    try:
        yield
    finally:
        _taken_over.reset(token)


def cuda_record() -> Backend:
    """The record of the `cuda` backend."""

    def record(reason: str, isa: str = "") -> Backend:
        names = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return Backend("cuda", not reason, reason, ("cuda",), names, isa, (), _VERIFIED, 8)

    if _cuda is None:
        return record(_why_not)
    if torch.version.hip or not torch.cuda.is_available():
        return record("torch finds no NVIDIA GPU")
    return record("", "sm_" + _cuda.archs.replace(",", ", sm_"))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_receiver_space(segment: SegmentTensors) -> bool:
    """Whether attention can read the segment as it is stored: scales, index and float8 included."""
    parts = (segment.key_proj, segment.value_proj, segment.key_bias, segment.value_bias)
    return all(part is None for part in parts)


def _can_absorb(segment: SegmentTensors) -> bool:
    """Whether there is something to absorb."""
    return segment.key_proj is not None and segment.value_proj is not None and segment.length > 0


def _absorb_refusal(segment: SegmentTensors, number: int, query: Tensor) -> str:
    """Why the kernels do not absorb the projectors of segments[number], which can be; "" where they do."""
    name = f"segments[{number}]"
    if segment.key_proj_in is not None or segment.value_proj_in is not None:
        return f"absorbs full-rank projectors; {name} has one of low rank"
    raw, projectors = (segment.key.dtype, segment.value.dtype), (segment.key_proj.dtype, segment.value_proj.dtype)
    quantised = all(dtype in QUANTISED for dtype in raw)
    if any(dtype != query.dtype for dtype in (*projectors, *(() if quantised else raw))):
        return (
            f"absorbs projectors of the query's dtype and tokens of it, or of int8 or float8_e4m3fn in key and value; "
            f"{name} has projectors of {', '.join(map(_dtype_name, projectors))} and tokens of "
            f"{', '.join(map(_dtype_name, raw))}, query {_dtype_name(query.dtype)}"
        )
    if not quantised and not (segment.key_scale is None and segment.value_scale is None):
        return f"absorbs tokens with scales in int8 or float8_e4m3fn; {name} has scales and {_dtype_name(raw[0])}"
    _, q_heads, q_len, _ = query.shape
    rows = q_heads * q_len // segment.key_proj.shape[0]
    padded = max(x.shape[1] * -(-x.shape[3] // _RAW_PAD) * _RAW_PAD for x in (segment.key, segment.value))
    if padded > _LARGEST_WIDTH or rows > _MOST_DECODED:
        return (
            f"absorbs a sharer's width (heads x dim, to {_RAW_PAD}) up to {_LARGEST_WIDTH} for queries x heads of a KV "
            f"head up to {_MOST_DECODED}; {name} has width {padded}, query {q_len} x {rows // max(q_len, 1)}"
        )
    return ""


def _absorbs(segment: SegmentTensors, number: int, query: Tensor, value_dim: int, strategy: str) -> bool:
    """Whether the segment's projectors are absorbed, of a call that is not refused."""
    if strategy == "materialize" or not _can_absorb(segment):
        return False
    if strategy == "absorb":
        return True
    return _absorbing_pays(segment, query, value_dim) and not _absorb_refusal(segment, number, query)


def _segment_refusal(segment: SegmentTensors, number: int, query: Tensor, strategy: str) -> str:
    name = f"segments[{number}]"
    if not _in_receiver_space(segment):
        if strategy == "absorb" and _can_absorb(segment):
            reason = _absorb_refusal(segment, number, query)
            return f'{reason}: use strategy "auto" or "materialize"' if reason else ""
        reason = _projection_refusal(segment, False)
        return f"{reason} in {name}" if reason else ""
    found = (segment.key.dtype, segment.value.dtype)
    if any(dtype != query.dtype for dtype in found) and not all(dtype in QUANTISED for dtype in found):
        return (
            f"takes segments of the query's dtype, or of int8 or float8_e4m3fn in key and value; {name} has "
            f"{_dtype_name(found[0])} and {_dtype_name(found[1])}, query {_dtype_name(query.dtype)}"
        )
    return ""


def _recorded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _absorbing_pays(segment: SegmentTensors, query: Tensor, value_dim: int) -> bool:
    """Whether a backend that absorbs the segment's projectors is the faster one, by the cost model."""
    if not _can_absorb(segment):
        return False
    _, q_heads, q_len, head_dim = query.shape
    return cost.segment_cost(segment, q_heads, q_len, head_dim, value_dim, cost.GPU).strategy == "absorb"


def refusal(operator: str, named: bool, *call) -> str:
    """Why this backend does not take a call of an operator; "" where it does. `call` as its `_refusal` function has it.

    `named`: it was asked for by name, so that being slower than another is no reason.
    Asked with tensors of a device at hand, so that looking for the driver starts nothing that was not running.
    """
    if _cuda is None:
        return _why_not
    function = _REFUSALS.get(operator)
    if function is None:
        return f"has no kernel for {operator}"
    if not torch.compiler.is_compiling() and _taken_over.get() is None:
        subject = call[0] if isinstance(call[0], Tensor) else call[0].key
        with torch.cuda.device(subject.device) if subject.is_cuda else contextlib.nullcontext():
            reason = _cuda.unavailable()
        if reason:
            return reason
    reason = function(*call)
    if reason or named or operator != "merged_attention" or not triton_record().available:
        return reason
    query, value, segments, strategy, everything, *_ = call
    if strategy != "auto" or _recorded(everything):
        return ""
    for number, segment in enumerate(segments):
        if _absorbing_pays(segment, query, value.shape[3]) and (why := _absorb_refusal(segment, number, query)):
            return f"{why}, and absorbing it is faster"
    return ""


def _attention_refusal(
    query: Tensor, value: Tensor, segments: list[SegmentTensors], strategy: str, everything: Sequence[Tensor | None],
    *options: object,
) -> str:  # fmt: skip
    if _recorded(everything) and not triton_record().available:
        return f"gradients are triton's: {triton_record().reason}"
    for name, dim in (("head_dim", query.shape[3]), ("value_dim", value.shape[3])):
        if dim > _LARGEST_DIM:
            return f"supports {name} up to {_LARGEST_DIM}; got {dim}"
    if len(segments) > _MOST_SEGMENTS:
        return f"supports up to {_MOST_SEGMENTS} segments; got {len(segments)}"
    for number, segment in enumerate(segments):
        if reason := _segment_refusal(segment, number, query, strategy):
            return reason
    return ""


def _projection_refusal(segment: SegmentTensors, for_backward: bool) -> str:
    if for_backward and not triton_record().available:
        return f"gradients are triton's: {triton_record().reason}"
    projectors = (segment.key_proj, segment.key_proj_in, segment.value_proj, segment.value_proj_in)
    dtypes = {projector.dtype for projector in projectors if projector is not None}
    if len(dtypes) > 1 or not dtypes.issubset(DTYPES):
        found = ", ".join(sorted(_dtype_name(dtype) for dtype in dtypes))
        return f"takes projectors of one dtype, bfloat16 or float16; got {found}"
    for name, raw, proj in (("key", segment.key, segment.key_proj), ("value", segment.value, segment.value_proj)):
        if proj is not None and raw.dtype != proj.dtype and raw.dtype not in QUANTISED:
            wanted = _dtype_name(proj.dtype)
            return f"multiplies {name} of its projector's dtype, {wanted}, or quantised; got {_dtype_name(raw.dtype)}"
        if raw.dtype == torch.float64:
            return f"takes no {name} of float64"
    return ""


def _fuse_refusal(receiver_key: Tensor, call: tuple, out: tuple | None) -> str:
    _, *others, weights, _, residual, _ = call
    return cuda_fuse.refusal(receiver_key, others, weights, residual, out, _MOST_FUSER_BLOCKS)


def _row_refusal(x: Tensor, count: int = 1) -> str:
    if x.shape[3] > _LARGEST_DIM:
        return f"supports head_dim up to {_LARGEST_DIM}; got {x.shape[3]}"
    return f"supports up to {_MOST_STATES} states; got {count}" if count > _MOST_STATES else ""


_REFUSALS: dict[str, Callable[..., str]] = {
    "fuse_kv": _fuse_refusal,
    "merged_attention": _attention_refusal,
    "project_kv": _projection_refusal,
    "merge_states": _row_refusal,
    "quantize_kv": _row_refusal,
}


@functools.cache
def _tell_unmapped() -> None:
    """Says so once: results are the same, copies are slower."""
    logger.debug("cuda: the driver makes no tensor map of some keys and values, which warps copy instead")


def _run(operator: str, subject: Tensor, size: int, launches, run, tensors: list[Tensor | None]) -> None:
    """Workspace, device guard and current stream for one operator; its status as an exception that names `subject`.

    `launches(workspace, capability, function)` tells what `run(workspace, stream)` does. `tensors`: what it works on.
    """
    device = subject.device
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    taken = _taken_over.get()
    if taken is not None:
        capability, executor = taken
        present = (workspace, *(tensor for tensor in tensors if tensor is not None))

        def tell(name: str, grid: int, block: int, shared: int, params: bytes, maps: tuple, unmapped: bytes) -> None:
            executor(Launch(name, grid, block, shared, params, tuple(map(TileMap._make, maps)), unmapped, present))

        status = launches(workspace.data_ptr(), capability, tell)
    else:
        with torch.cuda.device(device):
            status = run(workspace.data_ptr(), torch.cuda.current_stream(device).cuda_stream)
        if _cuda.unmapped():
            _tell_unmapped()
    code = status & 0xFF
    if code == _CUDA_ERROR:
        raise RuntimeError(f"{operator} on cuda: {_cuda.error()}; tensor {tuple(subject.shape)} on {device}")
    if code:
        reason = _cuda.error() if code == _UNSUPPORTED and taken is None else ""
        what = reason or native.status_text(code)
        raise ValueError(f"{operator} on cuda: {what}; tensor {tuple(subject.shape)} on {device}")


def merged_attention(
    backend: str, query, key, value, segments, attn_mask, is_causal, query_positions, lengths, scale, window,
    segment_window, softcap, sinks, strategy, return_mass, return_lse, out_dtype=None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Forward kernels; lse and mass are computed where asked for (an empty mass otherwise)."""
    if reason := _attention_refusal(query, value, segments, strategy, ()):
        raise ValueError(f"merged_attention on cuda {reason}")
    batch, q_heads, q_len, _ = query.shape
    segments = [
        segment if _in_receiver_space(segment) or _absorbs(segment, number, query, value.shape[3], strategy)
        else native.materialized("cuda", segment, (query.dtype,) * 2, project_kv, f"segments[{number}]")
        for number, segment in enumerate(segments)
    ]  # fmt: skip
    out = query.new_empty((batch, q_heads, q_len, value.shape[3]), dtype=out_dtype or query.dtype)
    lse = query.new_empty((batch, q_heads, q_len), dtype=torch.float32) if return_lse else None
    mass_shape = (batch, q_heads, q_len, 1 + len(segments)) if return_mass else (0,)
    mass = query.new_empty(mass_shape, dtype=torch.float32) if return_mass or return_lse else None
    keep: list[Tensor] = []
    numbers = native.attention_numbers(
        query, key, value, segments, [False] * len(segments), attn_mask, is_causal, query_positions, lengths, window,
        segment_window, sinks, out, lse, mass if return_mass else None, keep,
    )  # fmt: skip
    factors = (scale, softcap or 0.0)
    _run(
        "merged_attention", query, _cuda.attention_workspace(numbers),
        lambda *where: _cuda.attention_launches(numbers, *factors, *where),
        lambda *where: _cuda.merged_attention(numbers, *factors, *where),
        [query, key, value, attn_mask, query_positions, lengths, sinks, out, lse, mass, *keep,
         *(tensor for segment in segments for tensor in segment.tensors)],
    )  # fmt: skip
    return out, lse, mass


def merged_attention_backward(backend: str, *call) -> list[Tensor]:
    """Gradients, by the Triton backend."""
    return kernels("triton").merged_attention_backward("triton", *call)


def project_kv(
    backend: str, segment: SegmentTensors, rope: Rope | None, key_out: Tensor, value_out: Tensor, name: str = "segment"
) -> None:
    """Forward kernels, written to key_out and value_out."""
    if reason := _projection_refusal(segment, False):
        raise ValueError(f"project_kv on cuda {reason}")
    keep: list[Tensor] = []
    numbers = native.projection_numbers(segment, rope, key_out, value_out, keep)
    tables = () if rope is None else (*(rope.remove or ()), *(rope.apply or ()))
    _run(
        "project_kv", segment.key, _cuda.project_workspace(numbers),
        lambda *where: _cuda.project_launches(numbers, *where), lambda *where: _cuda.project_kv(numbers, *where),
        [*segment.tensors, *tables, key_out, value_out, *keep],
    )  # fmt: skip


def project_kv_backward(backend: str, *call) -> list[Tensor | None]:
    """Gradients, by the Triton backend."""
    return kernels("triton").project_kv_backward("triton", *call)


def fuse_kv(backend: str, *call) -> None:
    """Both halves of one layer."""
    fuse_kv_layers(backend, [call])


def fuse_kv_layers(backend: str, calls: Sequence[tuple]) -> None:
    """Independent layers, each as the arguments of `fuse_kv` without the backend; those alike in one launch."""
    cuda_fuse.fuse(calls, _cuda, _run)


def spread(grad: Tensor, index: Tensor, stored: int) -> Tensor:
    """Of the gradients of `fuse_kv`, by the Triton backend where there is one."""
    if triton_record().available:
        return kernels("triton").spread(grad, index, stored)
    return reference_fuse.spread(grad, index, stored)


def merge_states(backend: str, outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Forward kernel."""
    keep: list[Tensor] = []
    numbers, out, lse = native.merge_numbers(outs, lses, keep)
    _run(
        "merge_states", out, 0, lambda _workspace, _capability, tell: _cuda.merge_launches(numbers, tell),
        lambda _workspace, stream: _cuda.merge_states(numbers, stream), [out, lse, *keep],
    )  # fmt: skip
    return out, lse


def quantize(backend: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Forward kernel."""
    numbers, x, out, scale = native.quantize_numbers(x)
    _run(
        "quantize_kv", x, 0, lambda _workspace, _capability, tell: _cuda.quantize_launches(numbers, tell),
        lambda _workspace, stream: _cuda.quantize(numbers, stream), [x, out, scale],
    )  # fmt: skip
    return out, scale
