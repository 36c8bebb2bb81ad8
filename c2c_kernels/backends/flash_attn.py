"""The package flash-attn (2.6 or later) as a backend for `merged_attention`: a call per run, merged by their lse.

It takes float16 and bfloat16 up to head dim 256, values as wide as keys; `lengths`, causality, a window on own tokens,
softcap; segments without projector as they are, others after `project_kv` has brought them into receiver space; gates
that are the same for all tokens of a segment. It takes no attention mask, sinks, gates per token, segments hidden by
position, and no gradients. Steps beside attention run on the fastest backend that can: `project_kv`, `merge_states`.

Every run's result is rounded to 16 bits before they are merged. Not run on hardware yet: the tests run the calls with
a stand-in for the package, and with the package on a GPU that has it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from importlib import metadata
from types import ModuleType

import torch
from torch import Tensor

from ..segment import SegmentTensors
from . import Backend, fastest, kernels, native, reference

DTYPES = (torch.bfloat16, torch.float16)
LARGEST_DIM = 256
_LEAST_VERSION = (2, 6)  # flash_attn_with_kvcache returns lse, and both kernels take softcap
_VERIFIED = "its calls run with a stand-in for the package; not run on hardware"


def flash_attn_record() -> Backend:
    """The record of the `flash-attn` backend, found without importing the package."""

    def record(reason: str, version: str = "") -> Backend:
        names = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return Backend("flash-attn", not reason, reason, ("cuda",), names, version, (), _VERIFIED, 8)

    if importlib.util.find_spec("flash_attn") is None:
        return record("flash-attn is not installed: pip install flash-attn --no-build-isolation")
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return record("there is a module flash_attn, but no package flash-attn 2")
    if tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2]) < _LEAST_VERSION:
        return record(f"flash-attn 2.6 or later is wanted, found {version}")
    if not torch.cuda.is_available():
        return record("torch finds no GPU")
    return record("", version)


@functools.cache
def _package() -> tuple[ModuleType | None, str]:
    """The package, or why it cannot be imported."""
    try:
        return importlib.import_module("flash_attn"), ""
    except Exception as error:  # whatever a package built for another torch raises
        return None, f"flash-attn cannot be imported: {str(error).splitlines()[0] if str(error) else error!r}"


def refusal(operator: str, named: bool, *call) -> str:
    """Why this backend does not take a call of an operator; "" where it does."""
    if operator != "merged_attention":
        return f"has no kernel for {operator}"
    if not torch.compiler.is_compiling() and (reason := _package()[1]):  # a trace does not import
        return reason
    return _attention_refusal(*call)


def _attention_refusal(query, value, segments, strategy, everything, attn_mask, sinks, segment_window) -> str:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in everything):
        return "computes no gradients"
    if query.shape[3] > LARGEST_DIM:
        return f"supports head_dim up to {LARGEST_DIM}; got {query.shape[3]}"
    if value.shape[3] != query.shape[3]:
        return f"wants value_dim = head_dim; got {value.shape[3]} and {query.shape[3]}"
    for name, tensor in (("attn_mask", attn_mask), ("sinks", sinks)):
        if tensor is not None:
            return f"takes no {name}"
    for number, segment in enumerate(segments):
        if reason := _segment_refusal(segment, query, strategy, segment_window):
            return f"{reason}, which segments[{number}] has"
    return ""


def _segment_refusal(segment: SegmentTensors, query: Tensor, strategy: str, segment_window: int | None) -> str:
    if segment.positions is not None and (segment.causal or segment_window):
        return "hides no tokens by their positions"
    if segment.gate is not None and not _same_for_all_tokens(segment.gate):
        return "takes no gates that differ by token"
    if strategy == "absorb" and segment.key_proj is not None and segment.value_proj is not None:
        return 'absorbs no projector (use strategy "auto" or "materialize")'
    if segment.plain and (segment.key.dtype != query.dtype or segment.value.dtype != query.dtype):
        return "takes no keys and values of another dtype than the query's"
    return ""


def _same_for_all_tokens(gate: Tensor) -> bool:
    return gate.dim() == 0 or gate.shape[-1] == 1 or gate.stride(-1) == 0


def merged_attention(
    backend: str, query, key, value, segments, attn_mask, is_causal, query_positions, lengths, scale, window,
    segment_window, softcap, sinks, strategy, return_mass, return_lse, out_dtype=None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """A call of the package per run that has tokens; lse and mass are computed where asked for (else an empty mass)."""
    batch, q_heads, q_len, _ = query.shape
    shared = {"softmax_scale": scale, "softcap": softcap or 0.0}
    window_size = (-1 if window is None else window - 1, -1)
    states = {}
    if query.numel() and key.shape[2]:
        own = {"causal": is_causal, "window_size": window_size}
        states[0] = _attend(query, key, value, lengths, **own, **shared)
    for number, segment in enumerate(segments):
        if not (query.numel() and segment.length):
            continue
        plain = segment if segment.plain else _materialized(segment, query, f"segments[{number}]")
        out, lse = _attend(query, plain.key, plain.value, plain.lengths, **shared)
        if plain.gate is not None:
            gate = plain.gate.float()
            lse = lse + torch.log(gate if gate.dim() == 0 else gate[..., :1])
        states[1 + number] = out, lse
    out, lse = _merged(query, states)
    if not return_mass:
        return out, lse, query.new_empty(0, dtype=torch.float32)
    mass = query.new_zeros((batch, q_heads, q_len, 1 + len(segments)), dtype=torch.float32)
    for number, (_, of_run) in states.items():
        mass[..., number] = torch.exp(of_run - lse).masked_fill(of_run == -torch.inf, 0)
    return out, lse, mass


def _attend(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, **options) -> tuple[Tensor, Tensor]:
    """out (batch, q_heads, q_len, head_dim) and lse (batch, q_heads, q_len) float32 of one run with tokens."""
    package, why_not = _package()
    if package is None:
        raise RuntimeError(why_not)
    query, key, value = (_readable(tensor).transpose(1, 2) for tensor in (query, key, value))
    if lengths is None:
        out, lse, _ = package.flash_attn_func(query, key, value, return_attn_probs=True, **options)
    else:
        ends = lengths.clamp(0, key.shape[1]).to(torch.int32).contiguous()
        out, lse = package.flash_attn_with_kvcache(
            query, key, value, cache_seqlens=ends, return_softmax_lse=True, **options
        )
    out = out.transpose(1, 2)
    # A row that sees nothing has lse = inf and out = 0 there, one that meets a NaN lse = inf and out = NaN.
    empty = torch.where(out[..., 0].isnan(), torch.nan, -torch.inf)
    return out, torch.where(lse == torch.inf, empty, lse)


def _readable(tensor: Tensor) -> Tensor:
    """The tensor, copied where its rows cannot be read 16 bytes at a time: the kernels read so without asking."""
    steps = [stride for size, stride in zip(tensor.shape[:3], tensor.stride(), strict=False) if size > 1]
    aligned = tensor.data_ptr() % 16 == 0 and all(step * tensor.element_size() % 16 == 0 for step in steps)
    return tensor if aligned and tensor.stride(3) == 1 else tensor.clone(memory_format=torch.contiguous_format)


def _materialized(segment: SegmentTensors, query: Tensor, name: str) -> SegmentTensors:
    """The segment in receiver space, in the query's dtype."""
    record = fastest("project_kv", query.device, query.dtype, (segment, False))
    if record.name == "reference":
        halves = reference.project_kv(segment, None, reference.arithmetic_dtype(query.dtype))
        return native.plain(segment, *(half.to(query.dtype) for half in halves))
    return native.materialized(record.name, segment, (query.dtype,) * 2, kernels(record.name).project_kv, name)


def _merged(query: Tensor, states: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The runs' states as one."""
    if not states:
        return torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    outs, lses = [out for out, _ in states.values()], [lse for _, lse in states.values()]
    if len(states) == 1:
        return outs[0], lses[0]
    record = fastest("merge_states", query.device, query.dtype, (outs[0], len(outs)))
    if record.name == "reference":
        out, lse = reference.merge_states(outs, lses)
        return out.to(query.dtype), lse
    return kernels(record.name).merge_states(record.name, outs, lses)
