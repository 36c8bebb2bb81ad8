"""Forward attention: decode and prefill, own cache and segments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

import c2c_kernels as c2c
from c2c_kernels.bench import alternatives, gpu_alternatives
from c2c_kernels.bench.check import attention_problem
from c2c_kernels.bench.inputs import AttentionInputs, Device, attention, storage_bytes
from c2c_kernels.bench.shapes import Case
from c2c_kernels.bench.work import Call, Cost, Work, in_turn

_STRATEGIES = {"decode-absorbed": "absorb", "decode-int8": "absorb"}


def build(case: Case, device: Device = "cpu") -> Work:
    """The work of a decode or prefill case."""
    sets = attention(case, device)
    raw = case.family == "prefill-raw"
    strategy = _STRATEGIES.get(case.family, "auto")
    calls = [call(inputs, strategy) for inputs in sets]
    torchs = alternatives.sdpa_raw if raw else alternatives.sdpa
    work = Work(
        ours=in_turn(calls),
        problem=lambda: attention_problem(sets[0], calls[0](), torchs(sets[0])()),
        costs=_costs(case, sets[0], strategy),
        touched=len(sets) * min(cost.bytes for cost in _costs(case, sets[0], strategy)),
    )
    beside = {"sdpa": torchs, "reference": alternatives.reference}
    if strategy == "absorb":
        beside["materialised"] = _materialised
    if sets[0].query.device.type == "cuda":
        beside |= {"flash-attn": gpu_alternatives.flash_attention, "flashinfer": gpu_alternatives.flashinfer}
    work.alternatives = {name: partial(_over_all, make, sets) for name, make in beside.items()}
    if case.flex:
        work.alternatives["flex"] = partial(alternatives.flex, sets, raw)
    return work


def call(inputs: AttentionInputs, strategy: str) -> Call:
    """The call of merged attention that is measured."""

    return lambda: inputs.merged(strategy)


def _over_all(make: Callable[[AttentionInputs], Call], sets: list[AttentionInputs]) -> Call:
    return in_turn([make(inputs) for inputs in sets])


def _materialised(inputs: AttentionInputs) -> Call:
    """Our own kernel on the segment projected beforehand."""
    segment = c2c.SharerSegment(*inputs.projected)
    return call(AttentionInputs(inputs.query, inputs.key, inputs.value, segment), "auto")


def visible_pairs(case: Case) -> float:
    """(query, token) pairs of one batch row and head: own tokens up to the query, every sharer token."""
    hidden = case.q_len * (case.q_len - 1) / 2
    return case.q_len * (case.own + case.shared) - hidden


def _costs(case: Case, inputs: AttentionInputs, strategy: str) -> list[Cost]:
    if case.sharer is None:
        return [direct_cost(case, inputs)]
    ways = {"absorb": [_absorbed_cost], "auto": [_absorbed_cost, _projected_cost]}[strategy]
    return [way(case, inputs) for way in ways]


def direct_cost(case: Case, inputs: AttentionInputs) -> Cost:
    """Attention to tokens in receiver space: 4 FLOPs for each pair and dimension."""
    receiver = case.receiver
    caches = storage_bytes(inputs.key, inputs.value)
    if inputs.segment is not None:
        caches += storage_bytes(inputs.segment.key, inputs.segment.value)
    flops = 4 * case.batch * receiver.q_heads * receiver.head_dim * visible_pairs(case)
    return Cost(caches + 2 * storage_bytes(inputs.query), flops)


def _raw_bytes(inputs: AttentionInputs) -> int:
    segment = inputs.segment
    assert segment is not None and isinstance(segment.key_proj, Tensor) and isinstance(segment.value_proj, Tensor)
    stored = (segment.key, segment.value, segment.key_scale, segment.value_scale)
    return storage_bytes(*stored, segment.key_proj, segment.value_proj)


def _absorbed_cost(case: Case, inputs: AttentionInputs) -> Cost:
    """Attention to raw tokens at the sharer's width, query and result folded through the projectors."""
    assert case.sharer is not None
    receiver, width = case.receiver, case.sharer.width
    rows = case.batch * receiver.q_heads * case.q_len
    own = _own_only(case, inputs)
    folding = 4 * rows * width * receiver.head_dim
    return Cost(own.bytes + _raw_bytes(inputs), own.flops + 4 * rows * width * case.shared + folding)


def _projected_cost(case: Case, inputs: AttentionInputs) -> Cost:
    """Projection of every token, then attention at the receiver's width; what is projected need not leave the cache."""
    assert case.sharer is not None
    receiver = case.receiver
    size = 2 * case.batch * case.shared * receiver.kv_heads * receiver.head_dim
    rows = case.batch * receiver.q_heads * case.q_len
    own = _own_only(case, inputs)
    flops = 2 * size * case.sharer.width + 4 * rows * receiver.head_dim * case.shared
    return Cost(own.bytes + _raw_bytes(inputs), own.flops + flops)


def _own_only(case: Case, inputs: AttentionInputs) -> Cost:
    receiver = case.receiver
    pairs = case.q_len * case.own - case.q_len * (case.q_len - 1) / 2
    flops = 4 * case.batch * receiver.q_heads * receiver.head_dim * pairs
    return Cost(storage_bytes(inputs.key, inputs.value, inputs.query, inputs.query), flops)
