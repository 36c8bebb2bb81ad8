"""What static_gpu.py looks at: cases of the bench, with few enough heads and tokens for the simulator.

Heads of attention kernels do the same work each, so a few stand for all; tokens are so many that edges do not show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import c2c_kernels as c2c
from c2c_kernels.backends import reference, reference_fuse
from c2c_kernels.bench import measure, shapes
from c2c_kernels.bench.alternatives import sdpa
from c2c_kernels.bench.attention import direct_cost
from c2c_kernels.bench.check import attention_problem, disagreement
from c2c_kernels.bench.inputs import AttentionInputs, Random, storage_bytes
from c2c_kernels.bench.shapes import DTYPES, GEMMA3, LLAMA3_2, QWEN2_5, QWEN3, QWEN3_4B, SMOLLM2, Case, Receiver
from c2c_kernels.bench.work import Cost

GEMMA = Receiver("Gemma-3-270M", 4, 1, 256, 18)
HIDDEN = 1024  # of fusers, also between the two products of a block


@dataclass(frozen=True)
class Task:
    """A case made ready.

    Attributes:
        call: our call.
        problem: makes it and returns why its result is wrong, "" where it is right.
        least: bytes and FLOPs that any way to compute it needs.
        cut: what there is to do where that is less than the case, "" elsewhere.
    """

    call: Callable[[], object]
    problem: Callable[[], str]
    least: Cost
    cut: str = ""


@dataclass(frozen=True)
class StaticCase:
    """A line of the table.

    Attributes:
        shape: what it is, as in the bench.
        heads: KV heads that are simulated; 0 for all. Registers and the like are of the kernel for all of them.
        storage: "int8" or "e4m3" where the segment in receiver space is quantised, "" elsewhere.
    """

    shape: Case
    heads: int = 0
    storage: str = ""

    @property
    def name(self) -> str:
        """Family and shape, then the storage."""
        return f"{self.shape.name} {self.storage}".rstrip()

    @property
    def simulated(self) -> Case:
        """The shape with the heads that are simulated."""
        receiver = self.shape.receiver
        if not self.heads:
            return self.shape
        group = receiver.q_heads // receiver.kv_heads
        return replace(self.shape, receiver=replace(receiver, q_heads=self.heads * group, kv_heads=self.heads))


def task(case: StaticCase, shape: Case) -> Task:
    """What to run for `case` at the size of `shape`."""
    if case.shape.family == "quantise":
        return _quantising(shape)
    if case.shape.family == "fuse":
        return _fusing(shape)
    if case.storage:
        return _stored(case.storage, shape)
    work = measure.build(shape)
    least = Cost(min(cost.bytes for cost in work.costs), min(cost.flops for cost in work.costs))
    return Task(work.ours, work.problem, least)


def _stored(storage: str, shape: Case) -> Task:
    """Attention to a segment in receiver space that is quantised."""
    random, receiver = Random(shape), shape.receiver
    query, key, value, *raw = (
        random(shape.batch, heads, tokens, receiver.head_dim)
        for heads, tokens in [(receiver.q_heads, shape.q_len)]
        + [(receiver.kv_heads, shape.own)] * 2
        + [(receiver.kv_heads, shape.shared)] * 2
    )
    stored = [_quantised(tensor, storage) for tensor in raw]
    (codes_k, scale_k), (codes_v, scale_v) = stored
    segment = c2c.SharerSegment(codes_k, codes_v, key_scale=scale_k, value_scale=scale_v)
    plain = c2c.SharerSegment(
        *((codes.float() * scale.unsqueeze(3)).to(DTYPES[shape.dtype]) for codes, scale in stored)
    )
    inputs, beside = (AttentionInputs(query, key, value, each) for each in (segment, plain))
    cost = direct_cost(shape, inputs)
    least = Cost(cost.bytes + storage_bytes(scale_k, scale_v), cost.flops)
    return Task(inputs.merged, lambda: attention_problem(beside, inputs.merged(), sdpa(beside)()), least)


def _quantised(tensor: torch.Tensor, storage: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales (batch, heads, tokens)."""
    dtype, largest = {"int8": (torch.int8, 127.0), "e4m3": (torch.float8_e4m3fn, 448.0)}[storage]
    scale = tensor.float().abs().amax(dim=3) / largest
    codes = tensor.float() / scale.unsqueeze(3)
    return (codes.round() if storage == "int8" else codes).to(dtype), scale


def _quantising(shape: Case) -> Task:
    """`quantize_kv` of own keys and values."""
    random, receiver = Random(shape), shape.receiver
    key, value = (random(shape.batch, receiver.kv_heads, shape.own, receiver.head_dim) for _ in range(2))

    def call() -> tuple[torch.Tensor, ...]:
        return c2c.quantize_kv(key, value)

    def problem() -> str:
        codes_k, codes_v, scale_k, scale_v = call()
        for name, x, codes, scale in (("key", key, codes_k, scale_k), ("value", value, codes_v, scale_v)):
            if not torch.equal(scale, reference.quantize(x)[1]):
                return f"scales of {name} are not the reference's"
            off = (x.double() - codes.double() * scale.double().unsqueeze(3)).abs() / scale.double().unsqueeze(3)
            if off.max() > 0.5 + 128 * torch.finfo(torch.float32).eps:  # codes up to 127, rounded in float32
                return f"codes of {name} are off by {off.max():.6f} of a step; allowed is half a step"
        return ""

    codes, scales = key.numel() + value.numel(), 2 * key[..., 0].numel()
    return Task(call, problem, Cost(storage_bytes(key, value) + codes + 4 * scales, 0.0))


def _fusing(shape: Case) -> Task:
    """`fuse_kv` of all layers in place: one half has an open gate, the others cost nothing."""
    random, receiver, sharer = Random(shape), shape.receiver, shape.sharer
    assert sharer is not None
    opened = _fuser_half(random, receiver, sharer.width, 1.0)
    closed = replace(opened, gate_logit=-opened.gate_logit)
    caches = [
        [random(1, heads, shape.own, dim) for heads, dim in 2 * [(receiver.kv_heads, receiver.head_dim)]]
        + [random(1, heads, shape.own, dim) for heads, dim in 2 * [(sharer.heads, sharer.head_dim)]]
        for _ in range(shape.layers)
    ]
    weights = [c2c.FuserWeights(opened, closed), c2c.FuserWeights(closed, closed)]
    calls = [
        c2c.FuseCall(*layer, weights[min(number, 1)], out=(layer[0], layer[1])) for number, layer in enumerate(caches)
    ]

    def call() -> object:
        return c2c.fuse_layers(calls)

    def problem() -> str:
        before = [tensor.clone() for layer in caches for tensor in layer[:2]]
        call()
        oracle, torchs = (
            reference_fuse.fuse_half(before[0], caches[0][2], half, None, None, None, dtype)
            for half, dtype in ((_double(opened), torch.float64), (opened, DTYPES[shape.dtype]))
        )
        after = [tensor for layer in caches for tensor in layer[:2]]
        if not all(torch.equal(mine, old) for mine, old in zip(after[1:], before[1:], strict=True)):
            return "a half whose gate is closed has changed"
        return disagreement("key", after[0], torchs, oracle)

    matrices = [tensor for tensor in opened.tensors if tensor.dim() == 2]
    moved = storage_bytes(*opened.tensors, *2 * [caches[0][0]], caches[0][2])  # keys are read and written
    flops = 2.0 * shape.own * sum(matrix.numel() for matrix in matrices)
    return Task(call, problem, Cost(moved, flops), "keys of one layer")


def _fuser_half(random: Random, receiver: Receiver, sharer_width: int, logit: float) -> c2c.FuserHalf:
    width = receiver.kv_heads * receiver.head_dim

    def weight(*shape: int) -> torch.Tensor:
        return random(*shape, spread=shape[-1] ** -0.5)

    def block() -> c2c.FuserBlock:
        return c2c.FuserBlock(1 + random(HIDDEN, spread=0.2), weight(HIDDEN, HIDDEN), weight(HIDDEN, HIDDEN))

    return c2c.FuserHalf(
        weight(HIDDEN, sharer_width + width), weight(HIDDEN), block(), (block(),), weight(width, HIDDEN),
        weight(width), block(), weight(receiver.kv_heads, HIDDEN), weight(receiver.kv_heads),
        torch.full_like(random(1)[0], logit),
    )  # fmt: skip


def _double(half: c2c.FuserHalf) -> c2c.FuserHalf:
    return c2c.FuserHalf.of([tensor.double() for tensor in half.tensors])


def _case(family: str, receiver: Receiver, dtype: str = "bfloat16", **fields: object) -> Case:
    return Case(family, receiver, dtype, **fields)  # type: ignore[arg-type]


def cases() -> list[StaticCase]:
    """All lines, in the order of the table."""
    pairs = shapes.PAIRS
    found = [
        StaticCase(_case("decode", QWEN3, own=4096), 2),
        StaticCase(_case("decode", QWEN3, own=16384), 2),
        StaticCase(_case("decode", SMOLLM2, own=4096)),
        StaticCase(_case("decode", SMOLLM2, own=1000)),
        StaticCase(_case("decode", QWEN3, "float32", own=4096), 2),
        StaticCase(_case("decode-materialised", QWEN3, own=512, shared=8192), 2),
        StaticCase(_case("decode-materialised", SMOLLM2, own=512, shared=8192)),
        *(
            StaticCase(_case("decode-materialised", QWEN3, own=512, shared=8192), 2, storage)
            for storage in ("int8", "e4m3")
        ),
        *(StaticCase(_case("decode-absorbed", r, sharer=s, own=512, shared=4096)) for r, s in pairs),
        StaticCase(_case("decode-int8", QWEN3, sharer=LLAMA3_2, own=512, shared=4096)),
        StaticCase(_case("prefill", QWEN3, q_len=512, own=512), 2),
        StaticCase(_case("prefill", QWEN3, q_len=2048, own=2048), 2),
        StaticCase(_case("prefill", SMOLLM2, q_len=2048, own=2048)),
        StaticCase(_case("prefill", GEMMA, q_len=2048, own=2048)),
        StaticCase(_case("prefill", QWEN3, "float32", q_len=256, own=256), 2),
        StaticCase(_case("prefill", SMOLLM2, "float32", q_len=256, own=256)),
        StaticCase(_case("prefill-materialised", QWEN3, q_len=512, own=512, shared=1024), 2),
        StaticCase(_case("prefill-materialised", SMOLLM2, q_len=512, own=512, shared=1024)),
        *(StaticCase(_case("prefill-raw", r, sharer=s, q_len=128, own=128, shared=512)) for r, s in pairs),
        StaticCase(_case("backward", QWEN3, q_len=256, own=256), 2),
        StaticCase(_case("backward", SMOLLM2, q_len=256, own=256)),
        StaticCase(_case("backward", SMOLLM2, "float32", q_len=256, own=256)),
        StaticCase(_case("backward-raw", SMOLLM2, sharer=GEMMA3, q_len=128, own=128, shared=256)),
        *(StaticCase(_case("project", r, sharer=s, shared=512)) for r, s in pairs),
        StaticCase(_case("project", QWEN3, sharer=QWEN3_4B, shared=1)),
        StaticCase(_case("project", QWEN3, "float32", sharer=QWEN2_5, shared=512)),
        StaticCase(_case("project-int8", QWEN3, sharer=LLAMA3_2, shared=512)),
        StaticCase(_case("merge", QWEN3, "float32", q_len=512, states=2)),
        StaticCase(_case("merge", SMOLLM2, q_len=64, states=8)),
        StaticCase(_case("quantise", QWEN3, own=512)),
        StaticCase(_case("quantise", SMOLLM2, own=512)),
        StaticCase(_case("fuse", QWEN3, sharer=QWEN2_5, own=64)),
        StaticCase(_case("fuse", QWEN3, sharer=QWEN2_5, own=64, layers=28)),
    ]
    return list(dict.fromkeys(found))
