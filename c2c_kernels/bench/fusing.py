"""`fuse_kv` at the shapes of the published fusers, beside a plain PyTorch module of the same mathematics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import c2c_kernels as c2c
from c2c_kernels.backends import reference_fuse
from c2c_kernels.bench.check import disagreement
from c2c_kernels.bench.inputs import Device, Random, storage_bytes
from c2c_kernels.bench.shapes import DTYPES, Case
from c2c_kernels.bench.work import Call, Cost, LeftOutError, Work, first_line, in_turn
from c2c_kernels.fuser_weights import EPSILON, FuserBlock, FuserHalf, FuserWeights

# As in the recipes of the published checkpoints.
HIDDEN = INNER = 1024
_BLOCKS = 3  # embed, project, scale
_CHECKED = 16  # tokens, from both ends
_Plain = Callable[[Tensor, Tensor, tuple[Tensor, ...]], Tensor]


def weight_bytes(case: Case) -> int:
    """Of all layers, keys and values."""
    assert case.sharer is not None, f"{case.name} has no sharer"
    width = case.receiver.kv_heads * case.receiver.head_dim
    numbers = HIDDEN * (case.sharer.width + 2 * width + case.receiver.kv_heads + _BLOCKS * 2 * INNER)
    return 2 * case.layers * numbers * DTYPES[case.dtype].itemsize


def build(case: Case, device: Device = "cpu") -> Work:
    """The work of a fusing case: `shared` tokens of every layer, one layer after the other or all in one call."""
    random = Random(case, device)
    calls = _layers(case, random)
    if case.family == "fuse-model":
        ours: Call = lambda: c2c.fuse_layers(calls)  # noqa: E731
        together = lambda runs: lambda: [run() for run in runs]  # noqa: E731
    else:
        ours, together = in_turn([partial(_single, call) for call in calls]), in_turn
    cost = _cost(calls[0])
    at_once = len(calls) if case.family == "fuse-model" else 1
    alternatives = {"torch": lambda: _turns(together, _plain, calls)}
    if case.compiled:
        alternatives["compiled"] = lambda: _turns(together, _compiled(calls[0]), calls)
    return Work(
        ours=ours,
        problem=lambda: _problem(ours, calls[0], case),
        costs=[Cost(at_once * cost.bytes, at_once * cost.flops)],
        touched=len(calls) * cost.bytes,
        alternatives=alternatives,
    )


def _layers(case: Case, random: Random) -> list[c2c.FuseCall]:
    """Calls with memory of their own; all layers have the numbers of the first, which are drawn once."""
    receiver, sharer = case.receiver, case.sharer
    assert sharer is not None, f"{case.name} has no sharer"
    own = (case.batch, receiver.kv_heads, case.shared, receiver.head_dim)
    raw = (case.batch, sharer.heads, case.shared, sharer.head_dim)
    caches = [random(*own), random(*own), random(*raw), random(*raw)]
    weights = FuserWeights(_half(case, random), _half(case, random))
    count = len(weights.key.tensors)
    calls = []
    for _ in range(case.layers):
        key, value, sharer_key, sharer_value = (cache.clone() for cache in caches)
        copy = FuserWeights.of([tensor.clone() for tensor in weights.tensors], count)
        out = (torch.empty_like(key), torch.empty_like(value))
        calls.append(c2c.FuseCall(key, value, sharer_key, sharer_value, copy, out=out))
    return calls


def _half(case: Case, random: Random) -> FuserHalf:
    assert case.sharer is not None
    width = case.receiver.kv_heads * case.receiver.head_dim

    def weight(rows: int, columns: int) -> Tensor:
        return random(rows, columns, spread=columns**-0.5)

    def block() -> FuserBlock:
        return FuserBlock(1 + random(HIDDEN, spread=0.1), weight(INNER, HIDDEN), weight(HIDDEN, INNER))

    return FuserHalf(
        weight(HIDDEN, case.sharer.width + width), random(HIDDEN), block(), (block(),), weight(width, HIDDEN),
        random(width), block(), weight(case.receiver.kv_heads, HIDDEN), random(case.receiver.kv_heads),
        torch.ones_like(random(1)[0]),
    )  # fmt: skip


def _single(call: c2c.FuseCall) -> tuple[Tensor, Tensor]:
    return c2c.fuse_kv(
        call.receiver_key, call.receiver_value, call.sharer_key, call.sharer_value, call.weights, out=call.out
    )


def _plain(receiver: Tensor, sharer: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """One half in the dtype of its tensors, as a module would compute it, its gate open."""
    half = FuserHalf.of(weights)

    def block(h: Tensor, part: FuserBlock) -> Tensor:
        normalised = F.rms_norm(h, (h.shape[-1],), part.norm, EPSILON)
        return h + F.linear(F.gelu(F.linear(normalised, part.w1)), part.w2)

    x = torch.cat([sharer.transpose(1, 2).flatten(2), receiver.transpose(1, 2).flatten(2)], dim=-1)
    hidden = block(F.linear(x, half.in_weight, half.in_bias), half.embed)
    projected = hidden
    for part in half.project:
        projected = block(projected, part)
    projected = F.linear(projected, half.out_weight, half.out_bias)
    scale = torch.sigmoid(F.linear(block(hidden, half.scale), half.scale_weight, half.scale_bias))
    added = projected.unflatten(-1, (receiver.shape[1], -1)) * scale.unsqueeze(-1)
    return receiver + added.transpose(1, 2)


def _turns(together: Callable[[list[Call]], Call], plain: _Plain, calls: list[c2c.FuseCall]) -> Call:
    return together([partial(_both, plain, call) for call in calls])


def _both(plain: _Plain, call: c2c.FuseCall) -> tuple[Tensor, Tensor]:
    key, value = call.weights.key.tensors, call.weights.value.tensors
    return plain(call.receiver_key, call.sharer_key, key), plain(call.receiver_value, call.sharer_value, value)


def _compiled(call: c2c.FuseCall) -> _Plain:
    """`_plain`, compiled here for the shape of the call; LeftOutError with the reason where that fails."""
    try:
        torch.compiler.reset()  # the number of shapes that one function is compiled for is limited
        compiled = torch.compile(_plain, dynamic=False)
        _both(compiled, call)
    except Exception as error:  # a compiler's failures have many types
        raise LeftOutError(f"does not compile: {first_line(error)}") from error
    return compiled


def _cost(call: c2c.FuseCall) -> Cost:
    """Of one layer: weights and caches once; matrices are all that counts in FLOPs."""
    matrices = sum(tensor.numel() for tensor in call.weights.tensors if tensor.dim() == 2)
    caches = (call.receiver_key, call.receiver_value, call.sharer_key, call.sharer_value, *(call.out or ()))
    rows = call.receiver_key.shape[0] * call.receiver_key.shape[2]
    return Cost(storage_bytes(*caches, *call.weights.tensors), 2 * matrices * rows)


def _problem(ours: Call, call: c2c.FuseCall, case: Case) -> str:
    """The first layer against the reference in float64: some tokens, each of which is fused by itself."""
    ours()
    assert call.out is not None
    length = case.shared
    tokens = sorted({*range(min(_CHECKED, length)), *range(max(0, length - _CHECKED), length)})
    for name, out, own, raw, half in (
        ("key", call.out[0], call.receiver_key, call.sharer_key, call.weights.key),
        ("value", call.out[1], call.receiver_value, call.sharer_value, call.weights.value),
    ):
        if not out.isfinite().all():
            return f"{name} has NaN or infinity"
        own, raw = own[:, :, tokens], raw[:, :, tokens]
        oracle = reference_fuse.fuse_half(own, raw, half, None, None, None, torch.float64)
        problem = disagreement(name, out[:, :, tokens], _plain(own, raw, half.tensors), oracle)
        if problem:
            return problem
    return ""
