"""Gradients: the reference by finite differences, the CPU kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Plan, SegmentPlan, build
from error_rule import GRADIENT_ULPS, assert_as_exact
from hypothesis import given, settings
from plans import plans, seeds
from torch_backward import fused_gradients, leaves, operator_gradients

import c2c_kernels as c2c


def cotangents(plan: Plan, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    rows = (plan.batch, plan.kv_heads * plan.group, plan.q_len)
    out = torch.randn(*rows, plan.value_dim, generator=generator).to(plan.dtype)
    lse, mass = torch.randn(rows, generator=generator), torch.randn(*rows, 1 + len(plan.segments), generator=generator)
    return out.double(), lse.double(), mass.double()


def on_cpu(call: dict, wanted: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    return operator_gradients(call, wanted, "cpu")


def check(plan: Plan, seed: int, ours_of=on_cpu) -> None:
    call, wanted = build(plan, seed), cotangents(plan, seed)
    ours = ours_of(call, wanted)
    oracle = operator_gradients(call, wanted, "reference", torch.float64)
    fused, _ = fused_gradients(call, wanted, plan.dtype)
    _, sizes = fused_gradients(call, wanted, torch.float64)
    eager = operator_gradients(call, wanted, "reference")
    assert ours.keys() == oracle.keys() == fused.keys()
    for name, gradient in ours.items():
        theirs = fused[name].to(gradient.dtype)
        assert_as_exact(
            name, gradient, theirs, oracle[name], GRADIENT_ULPS, others=(eager[name],), scale=max(1, sizes.get(name, 1))
        )  # fmt: skip


@pytest.mark.sanitize
@given(plans(max_length=130), seeds)
@settings(max_examples=200)
def test_cpu_gradients_match_reference(plan, seed):
    check(plan, seed)


def test_gradients_of_scales_are_not_of_rounded_keys():
    """A call whose projected keys, rounded to bfloat16, made its scales' gradients twice as coarse as PyTorch's."""
    segment = SegmentPlan(
        length=64, heads=1, key_dim=64, value_dim=8, projector="low_rank", bias=True, lengths=True, quantised=True
    )
    empty = SegmentPlan(length=0, heads=1)
    plan = Plan(
        torch.bfloat16, 1, 2, 1, 1, 1, 8, 64, is_causal=False, softcap=2.0, lengths=True, strided=True,
        segments=[segment, empty],
    )  # fmt: skip
    check(plan, 0)


@given(plans(max_length=64, max_queries=5), seeds)
@settings(max_examples=25)
def test_fused_formulas_are_the_gradient(plan, seed):
    """The yardstick itself: what rule 9 compares with agrees with autograd of the reference in float64."""
    call, wanted = build(plan, seed), cotangents(plan, seed)
    exact = operator_gradients(call, wanted, "reference", torch.float64)
    for name, gradient in fused_gradients(call, wanted, torch.float64)[0].items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-7, atol=1e-7)


GRADCHECK_PLANS = {
    "plain": Plan(is_causal=True),
    "window_softcap_sinks": Plan(is_causal=True, window=3, softcap=2.0, sinks=True, lengths=True),
    "masks": Plan(mask="additive", query_positions=True),
    "dense": Plan(segments=[SegmentPlan(4, 2, 8, 8, "dense", bias=True, gate="some_zero", lengths=True)]),
    "low_rank": Plan(sinks=True, segments=[SegmentPlan(4, 2, 8, 8, "low_rank", gate="head", positions="shuffled")]),
    "closed": Plan(segments=[SegmentPlan(3, gate="zero"), SegmentPlan(3, 2, 8, 8, "dense", gate="full")]),
    "selected": Plan(segments=[SegmentPlan(3, 2, 8, 8, "dense", index=True, bias=True)]),
}


@pytest.mark.parametrize("name", GRADCHECK_PLANS)
def test_reference_gradcheck(name):
    plan = GRADCHECK_PLANS[name]
    plan.head_dim = plan.value_dim = 4
    plan.q_len, plan.length, plan.batch = 2, 5, 1
    call = build(plan, 11)
    call["attn_mask"] = None if call["attn_mask"] is None else call["attn_mask"].clamp(min=-3).double()
    fresh, found = leaves(call, torch.float64)
    names = list(found)

    def function(*tensors):
        table = dict(zip(names, tensors, strict=True))

        def swap(name, value):
            if isinstance(value, tuple):
                return tuple(table[f"{name}[{i}]"] for i in range(2))
            return table.get(name, value)

        segments = [
            c2c.SharerSegment(**{field: swap(f"{number}.{field}", value) for field, value in vars(part).items()})
            for number, part in enumerate(fresh["segments"])
        ]
        rest = {k: v for k, v in fresh.items() if k not in ("query", "key", "value", "segments", "sinks")}
        out, lse, mass = c2c.merged_attention(
            table["query"], table["key"], table["value"], segments, sinks=table.get("sinks"), **rest,
            return_lse=True, return_mass=True, backend="reference",
        )  # fmt: skip
        return out, lse, mass

    # A gate of 0 is at the edge of its range: move every gate inside; the derivative at 0 has a test of its own.
    tensors = [t.detach().clamp(min=0.1).requires_grad_() if "gate" in n else t for n, t in found.items()]
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_backward_is_split_over_tokens(dtype):
    """One KV head and over a thousand tokens: several parts, each with its share of the queries' gradients."""
    part = SegmentPlan(700, 2, 16, 16, "dense", gate="full", lengths=True)
    check(Plan(dtype, 1, 1, 2, 90, 1100, 32, 24, is_causal=True, lengths=True, segments=[part]), 7)


def test_gradient_of_a_closed_gate():
    """d out / d g at g = 0 by a one-sided difference."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, 2, 3, 16, generator=generator) for _ in range(3))
    other = [torch.randn(1, 2, 4, 16, generator=generator) for _ in range(2)]

    def total(gate, dtype=torch.float32, backend="cpu"):
        segment = c2c.SharerSegment(*(t.to(dtype) for t in other), gate=gate)
        return c2c.merged_attention(
            query.to(dtype), key.to(dtype), value.to(dtype), [segment], backend=backend
        ).square().sum()  # fmt: skip

    gate = torch.zeros(1, 2, 4, requires_grad=True)
    total(gate).backward()
    step = 1e-6
    for h in range(2):
        for j in range(4):
            moved = torch.zeros(1, 2, 4, dtype=torch.float64)
            moved[0, h, j] = step
            low = total(torch.zeros(1, dtype=torch.float64), torch.float64, "reference")
            slope = (total(moved, torch.float64, "reference") - low) / step
            assert abs(slope.item() - gate.grad[0, h, j].item()) < 1e-4 * max(1, abs(slope.item()))


def test_memory_of_backward_is_linear_in_length():
    """No score matrix: 8k x 8k scores of one head alone would take 256 MB."""
    length = 8192
    query, key, value = (torch.randn(1, 1, length, 32, requires_grad=True) for _ in range(3))
    high_water = "VmHWM"

    def peak() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(high_water)) * 1024

    c2c.merged_attention(query[:, :, :64], key[:, :, :64], value[:, :, :64], backend="cpu").sum().backward()
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = peak()
    c2c.merged_attention(query, key, value, is_causal=True, backend="cpu").sum().backward()
    assert peak() - before < 64 * 2**20
    assert key.grad.isfinite().all()


@pytest.mark.parametrize("same", [False, True], ids=["two tensors", "one tensor"])
@pytest.mark.parametrize(
    ("wanted", "products"),
    [("query", 0), ("key_bias", 0), ("gate", 0), ("value_proj", 1), ("key", 1)],
)
def test_what_is_frozen_costs_no_product(wanted, products, same):
    """Of tokens and projectors with a gradient one product each, of the others none."""
    query, own = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 12, 16)
    key, value = torch.randn(1, 2, 21, 8), torch.randn(1, 2, 21, 8)
    fields = {"key": key, "value": key if same and wanted != "key" else value}
    fields |= {"key_proj": torch.randn(2, 16, 16), "value_proj": torch.randn(2, 16, 16)}
    fields |= {"key_bias": torch.randn(2, 16), "gate": torch.rand(1, 4, 21)}
    leaf = (query if wanted == "query" else fields[wanted]).requires_grad_()
    out = c2c.merged_attention(query, own, own, [c2c.SharerSegment(**fields)], strategy="materialize", backend="cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out.sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().max() > 0
    found = {event.key: event.count for event in profile.key_averages()}
    assert found.get("aten::mm", 0) == products
