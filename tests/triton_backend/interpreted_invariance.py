"""A row's results and gradients are the same bits alone, in a batch, among longer rows, and on every run."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Plan, SegmentPlan, build
from test_invariance import row_of
from test_merged_attention import run

import c2c_kernels as c2c

SEGMENTS = [
    SegmentPlan(140, 2, 24, 24, "dense", bias=True, gate="full", lengths=True),
    SegmentPlan(97, gate="head", positions="shuffled", lengths=True, visibility="causal"),
]


def plan_of(q_len: int, dtype: torch.dtype, **changes) -> Plan:
    """Decode with one and with several queries, prefill of two tiles."""
    given = {"is_causal": True, "lengths": True, "segments": SEGMENTS, "batch": 3} | changes
    heads = 2 if q_len == 1 else 1  # many queries take the interpreter minutes
    return Plan(dtype, kv_heads=heads, group=3, q_len=q_len, length=210, head_dim=32, value_dim=24, **given)


def cut(call: dict) -> dict:
    """The call of one row with the padding of its own cache and of segments in receiver space cut off."""
    length = int(call["lengths"][0])
    call = dict(call, key=call["key"][:, :, :length], value=call["value"][:, :, :length], lengths=None)
    segments = []
    for segment in call["segments"]:
        fields, kept = dict(vars(segment)), int(segment.lengths[0])
        for name, dim in (("key", 2), ("value", 2), ("positions", 1), ("gate", 2)):
            tensor = fields[name]
            if tensor is not None and tensor.shape[dim] > 1:
                fields[name] = tensor.narrow(dim, 0, kept)
        segments.append(c2c.SharerSegment(**{**fields, "lengths": None}))
    return dict(call, segments=segments)


OPTIONS = {"window": 40, "softcap": 5.0, "sinks": True, "mask": "bool"}


@pytest.mark.parametrize(
    ("q_len", "dtype", "options"),
    [
        (1, torch.float32, {}),
        (1, torch.bfloat16, OPTIONS),
        (5, torch.bfloat16, {}),
        (50, torch.float32, OPTIONS),
        (50, torch.bfloat16, {}),
    ],
    ids=str,
)
def test_a_row_alone(q_len, dtype, options):
    call = build(plan_of(q_len, dtype, **options), 3)
    whole = run(call, "triton")
    for row in range(3):
        alone = row_of(call, row)
        calls = [alone] if "mask" in options else [alone, cut(alone)]
        for other in calls:
            for name, together, separate in zip(("out", "lse", "mass"), whole, run(other, "triton"), strict=True):
                assert torch.equal(together[row : row + 1], separate), name


@pytest.mark.parametrize(("q_len", "dtype"), [(1, torch.bfloat16), (50, torch.float32)])
def test_the_order_of_rows(q_len, dtype):
    call = build(plan_of(q_len, dtype), 4)
    whole = run(call, "triton")
    turned = [row_of(call, row) for row in (2, 0, 1)]
    joined = dict(call)
    for name in ("query", "key", "value", "lengths"):
        joined[name] = torch.cat([one[name] for one in turned])
    joined["segments"] = []
    for number, segment in enumerate(call["segments"]):
        parts = [vars(one["segments"][number]) for one in turned]
        fields = dict(vars(segment))
        for name in ("key", "value", "lengths", "positions", "gate"):
            if fields[name] is not None and fields[name].dim() and fields[name].shape[0] == 3:
                fields[name] = torch.cat([part[name] for part in parts])
        joined["segments"].append(c2c.SharerSegment(**fields))
    for before, after in zip(whole, run(joined, "triton"), strict=True):
        assert torch.equal(before[[2, 0, 1]], after)


def gradients(call: dict, cotangent: torch.Tensor) -> list[torch.Tensor]:
    """Of query, key, value and of the plain segment's key, value and gate."""
    fresh = dict(call)
    for name in ("query", "key", "value"):
        fresh[name] = call[name].detach().clone().requires_grad_()
    fields = dict(vars(call["segments"][0]))
    for name in ("key", "value", "gate"):
        fields[name] = fields[name].detach().clone().requires_grad_()
    fresh["segments"] = [c2c.SharerSegment(**fields)]
    out = run(fresh, "triton")[0]
    inputs = [
        *(fresh[name] for name in ("query", "key", "value")),
        *(fields[name] for name in ("key", "value", "gate")),
    ]
    return list(torch.autograd.grad((out.float() * cotangent).sum(), inputs))


@pytest.mark.parametrize(("q_len", "dtype"), [(1, torch.float32), (40, torch.bfloat16)])
def test_gradients_of_a_row_alone_and_on_every_run(q_len, dtype):
    call = build(plan_of(q_len, dtype, segments=[SegmentPlan(70, gate="full", lengths=True)]), 5)
    assert call["segments"][0].gate.shape[0] == 3
    cotangent = torch.randn(3, call["query"].shape[1], q_len, 24)
    whole = gradients(call, cotangent)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in whole)
    for one, other in zip(whole, gradients(call, cotangent), strict=True):
        assert torch.equal(one, other)
    for row in range(3):
        alone = gradients(row_of(call, row), cotangent[row : row + 1])
        for together, separate in zip(whole, alone, strict=True):
            assert torch.equal(together[row : row + 1], separate)


def test_projection_of_a_row_alone():
    segment = build(plan_of(1, torch.bfloat16, segments=SEGMENTS[:1]), 6)["segments"][0]
    whole = c2c.project_kv(segment, backend="triton")
    for row in range(3):
        fields = dict(vars(segment), gate=None)
        for name in ("key", "value", "lengths"):
            fields[name] = fields[name][row : row + 1]
        for together, separate in zip(
            whole, c2c.project_kv(c2c.SharerSegment(**fields), backend="triton"), strict=True
        ):
            assert torch.equal(together[row : row + 1], separate)
