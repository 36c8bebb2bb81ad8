"""Tiles by measurement, where it is asked for (`c2c-kernels tune`): from the shipped tile by steps to faster ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from triton import testing
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ...segment import SegmentTensors, SharerSegment, to_tensors
from . import attention, gradients, tuned
from .launch import Target, target_of
from .tile import Call, Tile, neighbours, refusal

Timer = Callable[[Callable[[], object]], float]
_FASTER = 0.97  # of the time: less is not told from noise
_KV_HEADS, _GROUP = 8, 4
# kernel: rows of its tiles that are tuned apart, 0 where they are free
ROWS = {"prefill": (0,), "decode": (16, 32, 64), "backward": (0,)}
_DOES_NOT_FIT = (OutOfResources, PTXASError, CompilationError)


@dataclass(frozen=True)
class Tuned:
    """What a tuning has found.

    Attributes:
        key: what the tile is for.
        shipped, best: tiles; equal where none was faster.
        shipped_seconds, best_seconds: time of one call with each.
        tried: how many tiles were timed.
    """

    key: tuned.Key
    shipped: Tile
    best: Tile
    shipped_seconds: float
    best_seconds: float
    tried: int


def gpu_seconds(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU, in seconds, with a cold L2 cache."""
    return testing.do_bench(call, return_mode="median") * 1e-3


def tune(
    device: torch.device, kernel: str, head_dim: int, dtype: torch.dtype, rows: int, timer: Timer, tokens: int = 4096
) -> Tuned:
    """The fastest tile that single steps from the shipped one lead to; nothing is stored.

    Args:
        kernel: a name in ROWS; rows: one of its numbers.
        head_dim: of keys and values.
        dtype: of the call, which takes `tokens` own and `tokens` sharer tokens.
        timer: how long a call takes, in seconds.

    Raises ValueError where the shipped tile does not fit on the device. A tile fits where a call with every option that
    takes it runs with it as well; calls with masks, gates per head and token, or scales keep the table's.
    """
    target, block_dim = target_of(device), attention.block_of(head_dim)
    key = tuned.key_of(kernel, block_dim, dtype, rows, False)
    timed, demanding = _call(kernel, device, head_dim, dtype, rows, tokens), None
    seconds: dict[Tile, float] = {}

    def measure(tile: Tile) -> float:
        nonlocal demanding
        if tile not in seconds:
            demanding = demanding or _demanding_call(kernel, device, head_dim, dtype, rows)
            try:
                with tuned.tried(key, tile):
                    demanding()
                    seconds[tile] = timer(timed)
            except _DOES_NOT_FIT as error:
                if tile == shipped:
                    raise ValueError(f"{key}: the shipped {tile} does not fit on {target.name}: {error}") from error
                seconds[tile] = float("inf")
        return seconds[tile]

    shipped = shipped_tile(target, key)
    best, improved = shipped, True
    measure(shipped)
    while improved:
        improved = False
        for tile in neighbours(best):
            if not refusal(tile, block_dim, dtype.itemsize, rows or None) and measure(tile) < _FASTER * seconds[best]:
                best, improved = tile, True
                break
    return Tuned(key, shipped, best, seconds[shipped], seconds[best], len(seconds))


def shipped_tile(target: Target, key: tuned.Key) -> Tile:
    """The table's tile for a key."""
    return tuned.SHIPPED[key.kernel](
        Call(target, key.block_dim, getattr(torch, key.dtype), key.rows or 128, False, False)
    )


def _tensors(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def _call(kernel: str, device: torch.device, dim: int, dtype: torch.dtype, rows: int, tokens: int):
    """What is timed: an own cache and a gated segment, without masks."""
    q_len, group = (1, rows) if kernel == "decode" else (max(1, tokens // 2), _GROUP)
    cache = (1, _KV_HEADS, tokens, dim)
    query, key, value, raw = _tensors(device, dtype, (1, _KV_HEADS * group, q_len, dim), cache, cache, cache)
    gate = torch.rand(1, _KV_HEADS * group, 1, device=device)
    return _launching(kernel, query, key, value, [to_tensors(SharerSegment(raw, raw, gate=gate))], {})


def _demanding_call(kernel: str, device: torch.device, dim: int, dtype: torch.dtype, rows: int):
    """A small call with every option that takes registers and leaves the tile tuned."""
    tokens = 256
    q_len, group = (1, rows) if kernel == "decode" else (96, _GROUP)
    heads, cache = _KV_HEADS * group, (1, _KV_HEADS, tokens, dim)
    query, key, value, raw = _tensors(device, dtype, (1, heads, q_len, dim), cache, cache, cache)
    numbers = torch.arange(tokens, device=device)
    plain = SharerSegment(
        raw, raw, gate=torch.rand(1, 1, tokens, device=device), positions=numbers, visibility="causal"
    )
    segments = [plain]
    if kernel != "backward":  # which sees segments after they were made plain
        segments.append(SharerSegment(raw, raw, index=numbers))
    options = {
        "window": 200, "softcap": 30.0, "query_positions": numbers[:q_len].reshape(1, q_len),
    }  # fmt: skip
    if kernel != "backward":
        options["sinks"] = torch.zeros(heads, device=device)
    return _launching(kernel, query, key, value, [to_tensors(segment) for segment in segments], options)


def _launching(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, segments: list[SegmentTensors], given: dict
) -> Callable[[], object]:
    names = ("attn_mask", "query_positions", "window", "softcap", "sinks")
    mask, positions, window, softcap, sinks = (given.get(name) for name in names)
    scale = query.shape[3] ** -0.5
    if kernel != "backward":
        return lambda: attention.attend(
            query, key, value, segments, mask, True, positions, None, scale, window, window, softcap, sinks, False,
            True, query.dtype,
        )  # fmt: skip
    rows = query.shape[:3]
    lse = torch.zeros(rows, device=query.device)
    delta = torch.zeros(*rows, 1 + len(segments), device=query.device)
    wants = [segment.gate is not None for segment in segments]
    return lambda: gradients.gradients(
        query, lse, delta, query, key, value, segments, wants, mask, True, positions, None, scale, window, window,
        softcap, sinks,
    )  # fmt: skip
