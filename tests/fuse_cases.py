"""Random calls of `fuse_kv`: fresh numbers at odd sizes, strided views, poisoned surroundings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from attention_cases import numbers

from c2c_kernels import FuseCall, FuserBlock, FuserHalf, FuserWeights

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class FusePlan:
    """What one call has; `closed` names the halves whose hard gate is closed."""

    weights: torch.dtype = torch.float32
    receiver: torch.dtype = torch.float32
    sharer: torch.dtype = torch.float32
    batch: int = 2
    kv_heads: int = 2
    key_dim: int = 8
    value_dim: int = 6
    length: int = 5
    sharer_heads: int = 3
    sharer_key_dim: int = 4
    sharer_value_dim: int = 5
    hidden: int = 16
    inner: int = 24
    blocks: int = 1
    index: bool = False
    residual: bool = False
    gates: bool = False
    closed: tuple[str, ...] = ()
    strided: bool = True


def _half(generator, plan: FusePlan, slot: str) -> FuserHalf:
    dim, sharer_dim = (plan.key_dim, plan.sharer_key_dim) if slot == "key" else (plan.value_dim, plan.sharer_value_dim)
    width, hidden = plan.kv_heads * dim, plan.hidden

    def weight(*shape: int) -> torch.Tensor:
        return numbers(generator, shape, plan.weights, spread=shape[-1] ** -0.5)

    def block(inner: int) -> FuserBlock:
        return FuserBlock(
            (1 + 0.2 * torch.randn(hidden, generator=generator)).to(plan.weights),
            weight(inner, hidden),
            weight(hidden, inner),
        )

    return FuserHalf(
        weight(hidden, plan.sharer_heads * sharer_dim + width), weight(hidden), block(plan.inner),
        tuple(block(plan.inner) for _ in range(plan.blocks)), weight(width, hidden), weight(width), block(hidden),
        weight(plan.kv_heads, hidden), weight(plan.kv_heads),
        torch.tensor(-0.5 if slot in plan.closed else 0.5, dtype=plan.weights),
    )  # fmt: skip


def build(plan: FusePlan, seed: int) -> FuseCall:
    """A call of the plan."""
    generator = torch.Generator().manual_seed(seed)
    own = [(plan.batch, plan.kv_heads, plan.length, dim) for dim in (plan.key_dim, plan.value_dim)]
    tokens = plan.length + 3 if plan.index else plan.length
    raw = [(plan.batch, plan.sharer_heads, tokens, dim) for dim in (plan.sharer_key_dim, plan.sharer_value_dim)]
    caches = [numbers(generator, shape, plan.receiver, plan.strided) for shape in own]
    caches += [numbers(generator, shape, plan.sharer, plan.strided) for shape in raw]
    index = residual = gates = None
    if plan.index:
        index = torch.randint(tokens, (plan.batch, plan.length), generator=generator)
        index = index.to(torch.int32 if seed % 2 else torch.int64)
    if plan.residual:
        first, second = (numbers(generator, shape, plan.receiver, plan.strided) for shape in own)
        residual = (first, second)
    if plan.gates:
        gates = (
            torch.rand(plan.batch, plan.kv_heads, plan.length, generator=generator).to(plan.weights),
            torch.rand(plan.kv_heads, 1, generator=generator).to(plan.weights),
        )
    weights = FuserWeights(_half(generator, plan, "key"), _half(generator, plan, "value"))
    return FuseCall(*caches, weights, index, residual, gates)


def mapped(call: FuseCall, change) -> FuseCall:
    """The call with every floating-point tensor changed, in the order of `floats`."""

    def pair(tensors):
        return None if tensors is None else (change(tensors[0]), change(tensors[1]))

    key_count = len(call.weights.key.tensors)
    caches = [change(x) for x in (call.receiver_key, call.receiver_value, call.sharer_key, call.sharer_value)]
    weights = FuserWeights.of([change(tensor) for tensor in call.weights.tensors], key_count)
    return FuseCall(*caches, weights, call.index, pair(call.residual), pair(call.gates))


def floats(call: FuseCall) -> list[torch.Tensor]:
    """The floating-point tensors of a call: caches, weights, residual, gates."""
    caches = (call.receiver_key, call.receiver_value, call.sharer_key, call.sharer_value)
    return [*caches, *call.weights.tensors, *(call.residual or ()), *(call.gates or ())]


def arguments(call: FuseCall) -> tuple[tuple, dict]:
    """Positional and keyword arguments of `fuse_kv`."""
    caches = (call.receiver_key, call.receiver_value, call.sharer_key, call.sharer_value)
    return (*caches, call.weights), {"index": call.index, "residual": call.residual, "gates": call.gates}


def programs_of_stages(steps: Sequence[Any], jobs: int, grid: int) -> list[int]:
    """How many of a launch's programs each stage of the network has: steps (`first`, `wait`) that wait for the same
    tiles."""
    starts = [
        step.first
        for step, before in zip(steps, (None, *steps), strict=False)
        if before is None or step.wait > before.wait
    ]
    ends = [*starts[1:], grid // jobs]
    return [(end - start) * jobs for start, end in zip(starts, ends, strict=True)]
