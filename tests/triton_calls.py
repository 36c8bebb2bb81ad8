"""Calls of every operator as models make them, for tests of how they are run: captured, compiled, without waiting.

A call is (function, arguments, options), made fresh on the CPU, without `backend`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import c2c_kernels as c2c

Call = tuple[Callable[..., Any], tuple, dict[str, Any]]
_DTYPE = torch.bfloat16


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(_DTYPE)


def _attention(q_len: int, own: int, segments: list[c2c.SharerSegment]) -> Call:
    inputs = _numbers(2, 4, q_len, 64), _numbers(2, 2, own, 64), _numbers(2, 2, own, 64), segments
    lengths = torch.tensor([own, own - 9], dtype=torch.int32)
    return c2c.merged_attention, inputs, {"is_causal": True, "lengths": lengths, "return_lse": True}


def _plain(tokens: int) -> c2c.SharerSegment:
    gate = torch.rand(2, 4, tokens)
    positions = torch.arange(tokens)
    return c2c.SharerSegment(
        _numbers(2, 2, tokens, 64), _numbers(2, 2, tokens, 64), gate=gate, positions=positions,
        lengths=torch.tensor([tokens, tokens - 5]),
    )  # fmt: skip


def _raw(tokens: int) -> c2c.SharerSegment:
    weights = (torch.randn(2, 64, 96) / 96**0.5).to(_DTYPE), (torch.randn(2, 64, 96) / 96**0.5).to(_DTYPE)
    return c2c.SharerSegment(_numbers(2, 3, tokens, 32), _numbers(2, 3, tokens, 32), *weights)


def _quantised(tokens: int) -> c2c.SharerSegment:
    key, value = (torch.randint(-127, 128, (2, 2, tokens, 64), dtype=torch.int8) for _ in range(2))
    scales = [torch.rand(2, 2, tokens) * 0.02 for _ in range(2)]
    return c2c.SharerSegment(key, value, key_scale=scales[0], value_scale=scales[1])


def decode_raw(tokens: int) -> Call:
    """Decode beside a segment whose projectors may be absorbed."""
    return _attention(1, 300, [_raw(tokens)])


def _fused() -> Call:
    def half() -> c2c.FuserHalf:
        def weight(*shape: int) -> torch.Tensor:
            return _numbers(*shape) / shape[-1] ** 0.5

        blocks = [c2c.FuserBlock(_numbers(64), weight(96, 64), weight(64, 96)) for _ in range(3)]
        return c2c.FuserHalf(
            weight(64, 96 + 128), weight(64), blocks[0], (blocks[1],), weight(128, 64), weight(128), blocks[2],
            weight(2, 64), weight(2), torch.tensor(1, dtype=_DTYPE),
        )  # fmt: skip

    caches = [_numbers(2, 2, 70, 64) for _ in range(2)] + [_numbers(2, 3, 90, 32) for _ in range(2)]
    index = torch.randint(90, (2, 70))
    return c2c.fuse_kv, (*caches, c2c.FuserWeights(half(), half())), {"index": index}


CALLS: dict[str, Callable[[], Call]] = {
    "decode": lambda: _attention(1, 300, [_plain(130)]),
    "decode raw": lambda: decode_raw(130),
    "decode int8": lambda: _attention(1, 300, [_quantised(130)]),
    "prefill": lambda: _attention(100, 150, [_plain(130)]),
    "prefill raw": lambda: _attention(100, 150, [_raw(130)]),
    "project": lambda: (c2c.project_kv, (_raw(130),), {}),
    "merge": lambda: (c2c.merge_states, ([_numbers(2, 4, 9, 64)] * 2, [torch.randn(2, 4, 9) for _ in range(2)]), {}),
    "fuse": _fused,
    "quantise": lambda: (c2c.quantize_kv, (_numbers(2, 2, 70, 64), _numbers(2, 2, 70, 64)), {}),
}
