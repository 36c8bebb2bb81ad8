"""Gradients of the Triton kernels in Triton's interpreter, or on a GPU: see interpreted_forward.py."""

from __future__ import annotations

import pytest
import test_far_scores
import test_gradients
import torch
from attention_cases import Plan, SegmentPlan, build
from error_rule import GRADIENT_ULPS, assert_as_exact
from hypothesis import given, settings
from plans import DTYPES, plans, seeds
from torch_backward import operator_gradients
from triton_device import DEVICE, absorbed_where_it_fits, examples, here, there

import c2c_kernels as c2c


def on_triton(call: dict, wanted: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    return absorbed_where_it_fits(lambda moved: operator_gradients(moved, there(wanted), "triton"), call)


def check(plan: Plan, seed: int) -> None:
    test_gradients.check(plan, seed, on_triton)


@given(plans(max_length=65, max_queries=17), seeds)
@settings(max_examples=examples(4))
def test_gradients_match_reference(plan, seed):
    check(plan, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_every_kind_of_input(dtype):
    parts = [
        SegmentPlan(33, 2, 24, 24, "dense", bias=True, gate="full"),
        SegmentPlan(20, gate="some_zero", positions="shuffled", visibility="causal"),
        SegmentPlan(9, 2, 8, 16, "low_rank", index=True, gate="head"),
        SegmentPlan(0),
    ]
    heads = 1 if dtype == torch.float32 else 2  # products of three parts take the interpreter three times as long
    plan = Plan(
        dtype, 2, heads, 3, 40, 90, 40, 24, is_causal=True, window=30, softcap=5.0, sinks=True, lengths=True,
        segments=parts,
    )  # fmt: skip
    check(plan, 2)


def test_gradients_are_the_same_bits_on_every_run():
    call = build(Plan(torch.float32, 1, 1, 2, 35, 70, 32, 32, segments=[SegmentPlan(40, gate="full", index=True)]), 4)
    wanted = [torch.randn(1, 2, 35, 32), torch.randn(1, 2, 35), torch.randn(1, 2, 35, 2)]
    wanted = there([w.double() for w in wanted])
    first, second = (operator_gradients(there(call), wanted, "triton") for _ in range(2))
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("q_len", [2, 37])
def test_rows_that_a_finite_mask_hides(q_len, low, sinks):
    def ours(call, attn_mask):
        return here(test_far_scores.gradients(there(call), "triton", attn_mask=there(attn_mask)))

    test_far_scores.check_hidden_rows(q_len, low, sinks, ours)


def test_gradient_of_a_closed_gate():
    query, key, value = (torch.randn(1, 2, 3, 16) for _ in range(3))
    other = [torch.randn(1, 2, 4, 16) for _ in range(2)]
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        device = DEVICE if backend == "triton" else "cpu"
        gate = torch.zeros(1, 2, 4, dtype=dtype, device=device, requires_grad=True)
        segment = c2c.SharerSegment(*(t.to(device, dtype) for t in other), gate=gate)
        inputs = (t.to(device, dtype) for t in (query, key, value))
        c2c.merged_attention(*inputs, [segment], backend=backend).square().sum().backward()
        found.append(gate.grad.cpu())
    assert_as_exact("gate", found[0], found[1], found[2], GRADIENT_ULPS)
