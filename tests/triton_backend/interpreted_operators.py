"""The Triton backend behind PyTorch's operators: opcheck, torch.compile, export, autograd; in the interpreter."""

from __future__ import annotations

import pytest
import test_operators
import torch
import torch._dynamo.testing
from test_operators import PLANS, step_inputs

import c2c_kernels as c2c


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_merged_attention(name, requires_grad, monkeypatch):
    monkeypatch.setattr(test_operators, "BACKEND", "triton")
    test_operators.test_opcheck_merged_attention(name, requires_grad)


def test_opcheck_project_kv(monkeypatch):
    monkeypatch.setattr(test_operators, "BACKEND", "triton")
    test_operators.test_opcheck_project_kv()


def test_opcheck_merge_states(monkeypatch):
    monkeypatch.setattr(test_operators, "BACKEND", "triton")
    test_operators.test_opcheck_merge_states()


@pytest.fixture
def by_environment(monkeypatch):
    """Every operator of the block on triton."""
    monkeypatch.setenv("C2C_BACKEND", "triton")
    torch._dynamo.reset()


def test_compile_does_not_recompile_when_lengths_change(by_environment):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    counted = torch.compile(test_operators.step, fullgraph=True, dynamic=True, backend=counter)
    for length, sharer in ((9, 5), (12, 6), (31, 70)):
        inputs = step_inputs(length, sharer)
        assert torch.equal(counted(*inputs), test_operators.step(*inputs))
    assert counter.frame_count == 1
    assert {
        str(node.target): node.args[-1] for node in counter.graphs[0].graph.nodes if "c2c" in str(node.target)
    } == dict.fromkeys(("c2c.merged_attention", "c2c.project_kv", "c2c.merge_states"), "triton")


def test_compiled_gradients_are_those_of_eager_calls(by_environment):
    inputs = [t.requires_grad_() if t.dtype.is_floating_point else t for t in step_inputs(9, 5)]
    compiled = torch.compile(test_operators.step, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(test_operators.step(*inputs).square().sum(), inputs[:6])
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs[:6])
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_export(by_environment):
    test_operators.test_export()


def test_what_happens_in_place_is_seen_by_autograd():
    raw, weight = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 16, requires_grad=True)
    out = torch.empty(1, 1, 4, 16), torch.empty(1, 1, 4, 16)
    c2c.project_kv(c2c.SharerSegment(raw, raw), out=out, backend="triton")
    loss = (weight * out[0]).sum()
    c2c.project_kv(c2c.SharerSegment(raw * 5, raw), out=out, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_attention_that_nobody_differentiates_keeps_nothing():
    """Without a gradient to compute, the call neither goes through autograd nor keeps lse."""
    query, key = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 5, 16)
    assert c2c.merged_attention(query, key, key, backend="triton").grad_fn is None
    query.requires_grad_()
    with torch.no_grad():
        assert c2c.merged_attention(query, key, key, backend="triton").grad_fn is None
    assert c2c.merged_attention(query, key, key, backend="triton").grad_fn is not None
