"""The specification: every operator in plain PyTorch, differentiable in every input, holding the score matrices.

Arithmetic is float32, or float64 where the inputs are float64. Results of the other backends are judged against
these functions run in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..segment import Rope, SegmentTensors

# A weight of a token whose gate is 0 is 0 whatever its score; its derivative by the gate is exp(score - max), which
# overflows beyond this in float32.
_MAX_EXPONENT = 80.0


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that results are accumulated in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotate_half(x: Tensor) -> Tensor:
    """(x1, x2) -> (-x2, x1) on the halves of the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _on_rotary_dims(x: Tensor, cos: Tensor, change) -> Tensor:
    rotary = cos.shape[-1]
    if rotary == x.shape[-1]:
        return change(x)
    return torch.cat((change(x[..., :rotary]), x[..., rotary:]), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (batch, heads, len, dim) by tables (batch or 1, len, rotary_dim)."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    return _on_rotary_dims(x, cos, lambda part: part * cos + rotate_half(part) * sin)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of `rotate`, also for tables that carry an attention factor."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    norm = cos * cos + sin * sin
    return _on_rotary_dims(x, cos, lambda part: (part * cos - rotate_half(part) * sin) / norm)


def rotate_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `rotate`."""
    cos, sin = cos.to(grad.dtype).unsqueeze(1), sin.to(grad.dtype).unsqueeze(1)
    return _on_rotary_dims(grad, cos, lambda part: part * cos - rotate_half(part * sin))


def unrotate_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `unrotate`."""
    cos, sin = cos.to(grad.dtype).unsqueeze(1), sin.to(grad.dtype).unsqueeze(1)
    norm = cos * cos + sin * sin
    return _on_rotary_dims(grad, cos, lambda part: part * cos / norm + rotate_half(part * sin / norm))


def gather_tokens(x: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return x
    if index.dim() == 1 or index.shape[0] == 1:
        return x.index_select(2, index.reshape(-1).long())  # whole tokens are copied
    index = index.expand(x.shape[0], index.shape[-1]).long()
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _apply_projector(flat: Tensor, proj: Tensor, proj_in: Tensor | None) -> Tensor:
    if proj_in is not None:
        flat = flat @ proj_in.to(flat.dtype).T
    return torch.einsum("bnw,hdw->bhnd", flat, proj.to(flat.dtype))


def prepare_raw(
    x: Tensor,
    scale: Tensor | None,
    index: Tensor | None,
    remove: tuple[Tensor, Tensor] | None,
    lengths: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Raw tokens before projection: scaled, un-rotated, gathered; zero beyond `lengths`, whatever is stored there."""
    x = x.to(dtype)
    if scale is not None:
        x = x * scale.to(dtype).expand(x.shape[:3]).unsqueeze(-1)
    if remove is not None:
        x = unrotate(x, *remove)
    return zero_beyond(gather_tokens(x, index), lengths)


def zero_beyond(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (batch, heads, len, dim) with tokens at and after `lengths` (batch,) set to zero."""
    if lengths is None:
        return x
    valid = torch.arange(x.shape[2], device=x.device) < lengths[:, None]
    return x.masked_fill(~valid[:, None, :, None], 0)


def _receiver_space(x: Tensor, proj: Tensor | None, proj_in: Tensor | None, bias: Tensor | None) -> Tensor:
    if proj is not None:
        x = _apply_projector(x.transpose(1, 2).flatten(2), proj, proj_in)
    return x if bias is None else x + bias.to(x.dtype)[:, None, :]


def project_kv(segment: SegmentTensors, rope: Rope | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """u = W x + b per token (DESIGN.md 2.2): key and value (batch, kv_heads, len, dim) in `dtype`, unrounded.

    Tokens beyond `lengths` come out as zero.
    """
    remove = rope.remove if rope is not None else None
    raw_key = prepare_raw(segment.key, segment.key_scale, segment.selected, remove, segment.lengths, dtype)
    raw_value = prepare_raw(segment.value, segment.value_scale, segment.selected, None, segment.lengths, dtype)
    key = _receiver_space(raw_key, segment.key_proj, segment.key_proj_in, segment.key_bias)
    value = _receiver_space(raw_value, segment.value_proj, segment.value_proj_in, segment.value_bias)
    if rope is not None and rope.apply is not None:
        key = rotate(key, *rope.apply)
    return zero_beyond(key, segment.lengths), zero_beyond(value, segment.lengths)


def _own_visible(
    batch: int,
    q_len: int,
    length: int,
    lengths: Tensor | None,
    is_causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """(batch or 1, 1, q_len, length) boolean: own tokens that a query sees before any attention mask."""
    tokens = torch.arange(length, device=device)
    ends = torch.full((1,), length, device=device) if lengths is None else lengths.to(device).long()
    position = ends[:, None] - q_len + torch.arange(q_len, device=device)
    visible = (tokens < ends[:, None])[:, None, :].expand(-1, q_len, -1)
    if is_causal:
        visible = visible & (tokens <= position[..., None])
    if window is not None:
        visible = visible & (tokens > position[..., None] - window)
    return visible[:, None]


def _segment_visible(segment: SegmentTensors, query_positions: Tensor, window: int | None, device) -> Tensor:
    """(batch or 1, 1, q_len or 1, len) boolean: sharer tokens that a query sees; gates are not part of it."""
    length = segment.length
    visible = torch.ones(1, 1, length, dtype=torch.bool, device=device)
    if segment.lengths is not None:
        visible = (torch.arange(length, device=device) < segment.lengths[:, None])[:, None, :]
    if segment.positions is not None:
        positions = torch.atleast_2d(segment.positions)[:, None, :].long()
        if window is not None:
            visible = visible & (positions > query_positions[..., None] - window)
        if segment.causal:
            visible = visible & (positions <= query_positions[..., None])
    return visible[:, None]


def default_query_positions(batch: int, q_len: int, length: int, lengths: Tensor | None, device) -> Tensor:
    """(batch or 1, q_len): lower-right aligned positions, len - q_len + i."""
    ends = torch.full((1,), length, device=device) if lengths is None else lengths.to(device).long()
    return ends[:, None] - q_len + torch.arange(q_len, device=device)


def _scores(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    batch, q_heads, q_len, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], q_heads // key.shape[1], q_len, dim)
    scores = torch.einsum("bhgid,bhjd->bhgij", grouped * scale, key).reshape(batch, q_heads, q_len, key.shape[2])
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    batch, q_heads, q_len, length = weights.shape
    grouped = weights.reshape(batch, value.shape[1], q_heads // value.shape[1], q_len, length)
    return torch.einsum("bhgij,bhjd->bhgid", grouped, value).reshape(batch, q_heads, q_len, value.shape[3])


def _weights(scores: Tensor, gate: Tensor | None, maximum: Tensor) -> Tensor:
    """exp(score + log gate - maximum), 0 where the gate is 0, and differentiable there too."""
    if gate is None:
        return torch.exp(scores - maximum)
    open_gate = gate > 0
    log_gate = torch.log(torch.where(open_gate, gate, torch.ones_like(gate)))
    opened = torch.exp((scores + log_gate - maximum).masked_fill(~open_gate, -torch.inf))
    closed = gate * torch.exp((scores - maximum).clamp(max=_MAX_EXPONENT))
    return torch.where(open_gate, opened, closed)


def merged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: list[SegmentTensors],
    attn_mask: Tensor | None,
    is_causal: bool,
    query_positions: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    window: int | None,
    segment_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """DESIGN.md 2.1 as written. Returns out, lse and mass in the arithmetic dtype, and every run's normalised weights.

    `dtype` is the dtype of the arithmetic, float32 or float64 by default. The maximum is taken over tokens with a
    weight, and segments are summed one after another: a segment that is empty or gated to 0 leaves every bit of the
    result as it was.
    """
    dtype, device = dtype or arithmetic_dtype(query.dtype), query.device
    batch, q_heads, q_len, _ = query.shape
    query = query.to(dtype)
    own_key, own_value = key.to(dtype), value.to(dtype)
    own_key, own_value = zero_beyond(own_key, lengths), zero_beyond(own_value, lengths)
    visible = _own_visible(batch, q_len, key.shape[2], lengths, is_causal, window, device)
    scores = _scores(query, own_key, scale, softcap)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask.to(dtype)
    runs: list[tuple[Tensor, Tensor | None, Tensor]] = [(scores.masked_fill(~visible, -torch.inf), None, own_value)]
    if query_positions is None:
        query_positions = default_query_positions(batch, q_len, key.shape[2], lengths, device)
    query_positions = torch.atleast_2d(query_positions).long()
    for segment in segments:
        segment_key, segment_value = project_kv(segment, None, dtype)
        scores = _scores(query, segment_key, scale, softcap)
        visible = _segment_visible(segment, query_positions, segment_window, device)
        gate = None
        if segment.gate is not None:
            gate = segment.gate.to(dtype).expand(batch, q_heads, segment.length)[:, :, None, :]
        runs.append((scores.masked_fill(~visible, -torch.inf), gate, segment_value))

    maximum = torch.full((batch, q_heads, q_len, 1), -torch.inf, dtype=dtype, device=device)
    if sinks is not None:
        maximum = sinks.detach().to(dtype)[None, :, None, None].expand_as(maximum)
    for scores, gate, _ in runs:
        if scores.shape[3]:
            weighted = scores.detach() if gate is None else scores.detach() + torch.log(gate.detach())
            maximum = torch.maximum(maximum, weighted.amax(dim=3, keepdim=True))
    maximum = maximum.masked_fill(maximum == -torch.inf, 0)

    weights = [_weights(scores, gate, maximum) for scores, gate, _ in runs]
    sums = [run.sum(dim=3) for run in weights]
    total = sums[0] if sinks is None else sums[0] + torch.exp(sinks.to(dtype)[None, :, None] - maximum[..., 0])
    out = _weighted_values(weights[0], own_value)
    for (_, _, run_value), run_weights, run_sum in zip(runs[1:], weights[1:], sums[1:], strict=True):
        total = total + run_sum
        out = out + _weighted_values(run_weights, run_value)
    empty = total == 0
    divisor = total.masked_fill(empty, 1)
    out = (out / divisor.unsqueeze(3)).masked_fill(empty.unsqueeze(3), 0)
    lse = (maximum[..., 0] + torch.log(divisor)).masked_fill(empty, -torch.inf)
    mass = torch.stack([(run_sum / divisor).masked_fill(empty, 0) for run_sum in sums], dim=3)
    return out, lse, mass, [run / divisor.unsqueeze(3) for run in weights]


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and scale (batch, heads, len): scale = max |x| / 127, q = x / scale rounded to nearest even."""
    x = x.to(arithmetic_dtype(x.dtype))
    scale = x.abs().amax(dim=-1) / 127 if x.shape[-1] else x.sum(dim=-1)
    usable = (scale > 0) & scale.isfinite()
    inverse = torch.where(usable, 1 / scale, 0).unsqueeze(-1)
    scaled = torch.where(usable.unsqueeze(-1), x * inverse, 0)
    return scaled.round().clamp(-127, 127).to(torch.int8), scale.float()


def merge_states(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """out = sum_s exp(lse_s - lse) out_s with lse = ln sum_s exp(lse_s); states with lse = -inf are not read."""
    dtype = arithmetic_dtype(outs[0].dtype)
    stacked = torch.stack([lse.to(dtype) for lse in lses])
    maximum = stacked.detach().amax(dim=0)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0)
    weights = torch.exp(stacked - maximum)
    total = weights.sum(dim=0)
    empty = total == 0
    divisor = total.masked_fill(empty, 1)
    out = torch.zeros_like(outs[0], dtype=dtype)
    for state, lse, weight in zip(outs, lses, weights, strict=True):
        state = state.to(dtype).masked_fill((lse == -torch.inf).unsqueeze(-1), 0)
        out = out + state * (weight / divisor).unsqueeze(-1)
    return out, (maximum + torch.log(divisor)).masked_fill(empty, -torch.inf)
