"""What kernels are told about a run of tokens: pointers, strides in elements, and how it is to be read."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...segment import SegmentTensors

_WINDOW_LIMIT = 2**40  # beyond it a window hides nothing that an integer position could tell
_OWN_WINDOW_LIMIT = 2**30  # own positions have 32 bits, and a position less the window has to fit
QUANTISED = (torch.int8, torch.float8_e4m3fn)


class Run(NamedTuple):
    """One run of keys and values in receiver space. Tensors that are absent are None, their strides 0."""

    key: Tensor  # (batch, kv_heads, stored, DIM); float8 as uint8
    key_b: int
    key_h: int
    key_n: int
    value: Tensor  # (batch, kv_heads, stored, VALUE_DIM); float8 as uint8
    value_b: int
    value_h: int
    value_n: int
    length: int | None  # tokens to attend to; None for the own cache, whose length is an argument of its own
    stored: int  # tokens of key and value; 0 without an index
    lengths: Tensor | None  # (batch,), contiguous
    gate: Tensor | None  # (batch, q_heads, length)
    gate_b: int
    gate_h: int
    gate_n: int
    positions: Tensor | None  # (batch, length)
    positions_b: int
    positions_n: int
    key_scale: Tensor | None  # (batch, kv_heads, stored)
    key_scale_b: int
    key_scale_h: int
    key_scale_n: int
    value_scale: Tensor | None  # (batch, kv_heads, stored)
    value_scale_b: int
    value_scale_h: int
    value_scale_n: int
    selected: Tensor | None  # (batch, length)
    selected_b: int
    selected_n: int
    mask: Tensor | None  # (batch, q_heads, q_len, length); boolean as uint8
    mask_b: int
    mask_h: int
    mask_q: int
    mask_n: int


def alignment(run: Run) -> int:
    """Kind.align of a run: by all strides, of which that of a token, alike in a growing cache, is the least aligned."""
    if max(run.key_n, run.value_n) >= 2**31:  # kernels then count them in 64 bits, as they come
        return 0
    return {4: 1, 8: 2, 16: 3}.get(math.gcd(16, *run[1:4], *run[5:8]), 0)


def unspecialised(run: Run, align: int) -> Run:
    """The run as kernels take it: `tiles.stride` and `step` give strides of keys and values back, `told` lengths.

    Triton compiles anew where an integer becomes 1, or a multiple of 16 or none, as these do while a cache grows: they
    are passed as odd numbers above 1.
    """
    places = (0, 2, 3, 4)[align]
    strides = ("key_b", "key_h", "key_n", "value_b", "value_h", "value_n")
    changes: dict[str, Any] = {name: odd(getattr(run, name) >> places) for name in strides}
    length = None if run.length is None else odd(run.length)
    return run._replace(length=length, stored=odd(run.stored), **changes)


def odd(number: int) -> int:
    """A number as `tiles.told` takes it."""
    return 2 * number + 3


class Kind(NamedTuple):
    """How a run is read; compiled in. Kernels take `code`, these as digits to the base 4 in order (see `kinds`)."""

    positions: int  # 0: none compared, 1: a token's index is its position, 2: Run.positions
    causal: int
    window: int  # whether there is one
    gate: int  # 0: none, 1: alike for all tokens, 2: alike for all heads, 3: per head and token
    mask: int  # 0: none, 1: boolean, 2: additive
    key_e4m3: int
    value_e4m3: int
    wide: int  # 1: products in float32, because queries and tokens differ in dtype
    absorbed: int  # 1: raw tokens of a sharer, its projectors absorbed
    scaled: int  # 1: int8 or float8 with scales, or anything else that has them
    align: int  # 0: tokens start anywhere, 1, 2, 3: strides of keys and values are multiples of 4, 8, 16 numbers

    @property
    def code(self) -> int:
        return sum(value * 4**place for place, value in enumerate(self))

    @property
    def heavy(self) -> bool:
        """Whether more than tokens is read for a tile of rows and tokens."""
        return bool(self.mask or self.scaled or self.gate == 3)


def rows(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension, float64 as float32."""
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def supported(tensor: Tensor | None) -> Tensor | None:
    """float64 as float32, bool and float8 as bytes: the dtypes that kernels load."""
    if tensor is None:
        return None
    if tensor.dtype == torch.float64:
        return tensor.float()
    return tensor.view(torch.uint8) if tensor.dtype in (torch.bool, torch.float8_e4m3fn) else tensor


def contiguous(lengths: Tensor | None) -> Tensor | None:
    """Lengths as kernels read them, without a stride."""
    return None if lengths is None else lengths.contiguous()


def expanded(tensor: Tensor | None, shape: tuple[int, ...]) -> tuple:
    """The tensor, then its strides once expanded to `shape`."""
    if tensor is None:
        return (None, *(0,) * len(shape))
    tensor = supported(tensor)
    strides = (0,) * (len(shape) - tensor.dim()) + tuple(
        0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (tensor, *strides)


def own_run(key: Tensor, value: Tensor, lengths: Tensor | None, attn_mask: Tensor | None, rows_of_mask: tuple) -> Run:
    """The receiver's own cache. `rows_of_mask`: (batch, q_heads, q_len)."""
    key, value = rows(key), rows(value)
    return Run._make((
        key, *key.stride()[:3], value, *value.stride()[:3], None, 0, contiguous(lengths), *_ABSENT_OPTIONS,
        *expanded(attn_mask, (*rows_of_mask, key.shape[2])),
    ))  # fmt: skip


_ABSENT_OPTIONS = (None, 0, 0, 0, None, 0, 0, None, 0, 0, 0, None, 0, 0, 0, None, 0, 0)


def segment_run(segment: SegmentTensors, batch: int, q_heads: int) -> Run:
    """A segment in receiver space, without projectors and biases, or raw, with projectors absorbed."""
    key, value = supported(rows(segment.key)), supported(rows(segment.value))
    tokens = (batch, segment.length)
    stored = tuple(key.shape[:3])
    reach = 0 if segment.selected is None else key.shape[2]
    return Run._make((
        key, *key.stride()[:3], value, *value.stride()[:3], segment.length, reach, contiguous(segment.lengths),
        *expanded(segment.gate, (batch, q_heads, segment.length)), *expanded(segment.positions, tokens),
        *expanded(segment.key_scale, stored), *expanded(segment.value_scale, stored),
        *expanded(segment.selected, tokens), None, 0, 0, 0, 0,
    ))  # fmt: skip


def own_kind(run: Run, is_causal: bool, window: int | None, mask_dtype: torch.dtype | None) -> Kind:
    mask = 0 if mask_dtype is None else 1 if mask_dtype == torch.bool else 2
    places = 1 if is_causal or window is not None else 0
    return Kind(places, int(is_causal), int(window is not None), 0, mask, 0, 0, 0, 0, 0, alignment(run))


def segment_kind(segment: SegmentTensors, run: Run, window: int | None, dtype: torch.dtype, absorbed: bool) -> Kind:
    """`dtype`: that of the queries."""
    gate = 0
    if run.gate is not None:
        gate = 1 if run.gate_n == 0 else 2 if run.gate_h == 0 else 3
    placed = segment.positions is not None and (segment.causal or window is not None)
    wide = any(t.dtype not in (dtype, *QUANTISED) for t in (segment.key, segment.value))
    return Kind(
        2 if placed else 0, int(placed and segment.causal), int(placed and window is not None), gate, 0,
        int(segment.key.dtype == torch.float8_e4m3fn), int(segment.value.dtype == torch.float8_e4m3fn), int(wide),
        int(absorbed), int(segment.key_scale is not None or segment.value_scale is not None), alignment(run),
    )  # fmt: skip


def window_number(window: int | None) -> int:
    """A window as kernels take it; Kind.window says whether there is one."""
    return 0 if window is None else min(window, _WINDOW_LIMIT)


def own_window_number(window: int | None) -> int:
    """As `window_number`, of the own cache."""
    return 0 if window is None else min(window, _OWN_WINDOW_LIMIT)


class Half(NamedTuple):
    """Keys or values of a segment and where they go."""

    raw: Tensor  # (batch, heads, stored, raw_dim); float8 as uint8
    raw_b: int
    raw_h: int
    raw_n: int
    heads: int
    raw_dim: int
    scale: Tensor | None  # (batch, heads, stored)
    scale_b: int
    scale_h: int
    scale_n: int
    proj: Tensor | None  # (kv_heads, dim, heads * raw_dim)
    proj_h: int
    proj_d: int
    bias: Tensor | None  # (kv_heads, dim)
    bias_h: int
    out: Tensor  # (batch, kv_heads, length, dim)
    out_b: int
    out_h: int
    out_n: int
    dim: int


class Rotation(NamedTuple):
    """Rotary tables of keys, (batch or 1, tokens, rotary dim)."""

    remove_cos: Tensor | None
    remove_sin: Tensor | None
    remove_b: int
    remove_n: int
    remove_dim: int
    apply_cos: Tensor | None
    apply_sin: Tensor | None
    apply_b: int
    apply_n: int
    apply_dim: int


class Selection(NamedTuple):
    """Which tokens of a segment are meant."""

    lengths: Tensor | None  # (batch,), contiguous
    selected: Tensor | None  # (batch, length)
    selected_b: int
    selected_n: int
    stored: int


def half_of(raw: Tensor, scale: Tensor | None, proj: Tensor | None, bias: Tensor | None, out: Tensor) -> Half:
    """`proj`: (kv_heads, dim, width), of full rank; None copies."""
    raw = supported(rows(raw))
    proj, bias = None if proj is None else rows(proj), None if bias is None else rows(bias)
    return Half._make((
        raw, *raw.stride()[:3], raw.shape[1], raw.shape[3], *expanded(scale, tuple(raw.shape[:3])),
        proj, *((0, 0) if proj is None else proj.stride()[:2]), bias, 0 if bias is None else bias.stride(0),
        out, *out.stride()[:3], out.shape[3],
    ))  # fmt: skip


def wide_half(raw: Tensor, proj: Tensor | None) -> bool:
    """Whether products are formed in float32 because tokens and weights differ in dtype."""
    return proj is not None and raw.dtype not in (proj.dtype, *QUANTISED)


def rotation_of(remove: tuple[Tensor, Tensor] | None, apply: tuple[Tensor, Tensor] | None) -> Rotation:
    def flat(tables: tuple[Tensor, Tensor] | None) -> tuple:
        if tables is None:
            return None, None, 0, 0, 0
        cos, sin = (rows(table) for table in tables)
        if sin.stride() != cos.stride() or sin.dtype != cos.dtype:
            cos, sin = cos.float().contiguous(), sin.float().contiguous()
        return cos, sin, 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1), cos.shape[2]

    return Rotation(*flat(remove), *flat(apply))
