"""What the other backends refuse the Triton backend refuses alike; what its kernels do not take, before any launch."""

from __future__ import annotations

import pytest
import test_bad_input
import test_quantize_kv
import test_regressions
import torch
from error_rule import GRADIENT_ULPS, assert_as_exact

import c2c_kernels as c2c
from c2c_kernels.backends import triton as backend
from c2c_kernels.backends.triton.launch import Target, executed_by
from c2c_kernels.segment import to_tensors


@pytest.fixture
def launches():
    """What is launched: nothing is run."""
    found: list = []
    with executed_by(Target("cuda", 90), found.append):
        yield found


@pytest.mark.parametrize("name", test_bad_input.CALLS)
def test_merged_attention(name, launches):
    test_bad_input.test_merged_attention(name, "triton")
    assert launches == []


@pytest.mark.parametrize(("options", "error", "message"), test_regressions.WRONG_KINDS)
def test_arguments_of_the_wrong_kind(options, error, message, launches):
    test_regressions.test_arguments_of_the_wrong_kind(options, error, message, "triton")
    assert launches == []


@pytest.mark.parametrize("name", test_bad_input.PROJECTIONS)
def test_project_kv(name, launches):
    test_bad_input.test_project_kv(name, "triton")
    assert launches == []


@pytest.mark.parametrize(
    "test",
    [
        test_bad_input.test_nothing_is_written_when_refused,
        test_bad_input.test_out_has_no_gradient,
        test_bad_input.test_merge_states,
        test_bad_input.test_mask_gradient_goes_to_the_reference,
        test_regressions.test_a_projector_of_rank_0_is_refused,
        test_regressions.test_out_that_shares_memory_is_refused,
        test_regressions.test_derivatives_that_do_not_exist_raise,
        test_regressions.test_messages_name_the_segment,
        test_quantize_kv.test_operator_and_bad_input,
    ],
    ids=lambda test: test.__name__,
)
def test_what_the_cpu_backend_refuses(test):
    test("triton")


def heads(dim: int, dtype=torch.float32, length: int = 5) -> torch.Tensor:
    return torch.randn(1, 2, length, dim).to(dtype)


@pytest.mark.parametrize("dims", [(257, 16), (16, 264), (1024, 1024)])
def test_head_dims_that_attention_does_not_take(dims, launches):
    query, key, value = heads(dims[0]), heads(dims[0]), heads(dims[1])
    name, dim = ("head_dim", dims[0]) if dims[0] > 256 else ("value_dim", dims[1])
    with pytest.raises(ValueError, match=f"merged_attention on triton supports {name} up to 256; got {dim}"):
        c2c.merged_attention(query, key, value, backend="triton")
    rows, nothing = torch.zeros(1, 2, 5), (None,) * 5
    with pytest.raises(ValueError, match=f"merged_attention_backward on triton supports {name} up to 256; got {dim}"):
        backend.merged_attention_backward(
            "triton", heads(dims[1]), None, None, value, rows, torch.empty(0), query, key, value, [], None, False,
            None, None, 0.1, *nothing[:4], "auto", [True, True, True],
        )  # fmt: skip
    with pytest.raises(ValueError, match="triton"):
        c2c.merged_attention(query.requires_grad_(), key, value, backend="triton")
    assert launches == []


def test_rows_that_are_too_long(launches):
    wide = torch.zeros(1, 1, 2, 8193)
    with pytest.raises(ValueError, match="merge_states on triton supports head_dim up to 8192; got 8193"):
        c2c.merge_states([wide], [wide[..., 0]], backend="triton")
    with pytest.raises(ValueError, match="quantize_kv on triton supports head_dim up to 8192; got 8193"):
        c2c.quantize_kv(wide, wide, backend="triton")
    assert launches == []


def test_the_longest_rows_are_taken():
    states = [torch.randn(1, 1, 2, 8192) for _ in range(2)]
    lses = [torch.randn(1, 1, 2) for _ in range(2)]
    for mine, wanted in zip(*(c2c.merge_states(states, lses, backend=b) for b in ("triton", "cpu")), strict=True):
        torch.testing.assert_close(mine, wanted)
    for mine, wanted in zip(*(c2c.quantize_kv(*states, backend=b) for b in ("triton", "cpu")), strict=True):
        assert torch.equal(mine, wanted)


def test_float64_is_refused_by_every_operator(launches):
    x = heads(16, torch.float64)
    calls = {
        "merged_attention": lambda: c2c.merged_attention(x, x, x, backend="triton"),
        "project_kv": lambda: c2c.project_kv(c2c.SharerSegment(x, x), backend="triton"),
        "merge_states": lambda: c2c.merge_states([x], [x[..., 0]], backend="triton"),
        "quantize_kv": lambda: c2c.quantize_kv(x, x, backend="triton"),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name} .* triton: supports bfloat16, float16, float32; got float64"):
            call()
    assert launches == []


def test_float64_is_refused_by_the_operators_under_their_own_names(launches):
    x = heads(16, torch.float64)
    ops, wanted = torch.ops.c2c, "supports {} of float32, bfloat16 or float16; got float64"
    with pytest.raises(TypeError, match="merged_attention on triton " + wanted.format("query")):
        ops.merged_attention(
            x, x, x, [], [], None, False, None, None, 0.1, None, None, None, None, "auto", True, False, "triton"
        )
    with pytest.raises(TypeError, match="project_kv on triton " + wanted.format("out key")):
        ops.project_kv([x, x], [3], [], False, torch.float64, "triton")
    with pytest.raises(TypeError, match="merge_states on triton " + wanted.format("outs")):
        ops.merge_states([x], [x[..., 0]], "triton")
    with pytest.raises(TypeError, match="quantize_kv on triton " + wanted.format("key and value")):
        ops.quantize(x, "triton")
    assert launches == []


def test_out_of_two_dtypes(launches):
    out = torch.full((1, 2, 5, 16), 3.0), torch.full((1, 2, 5, 16), 3.0, dtype=torch.float64)
    with pytest.raises(TypeError, match="out value of float32, bfloat16 or float16; got float64"):
        c2c.project_kv(c2c.SharerSegment(heads(16), heads(16)), out=out, backend="triton")
    apart = torch.full((1, 2, 5, 32), 3.0)[..., ::2]
    with pytest.raises(ValueError, match="out value has stride 2 in its last dimension, wanted 1"):
        c2c.project_kv(c2c.SharerSegment(heads(16), heads(16)), out=(out[0], apart), backend="triton")
    assert launches == [] and (out[0] == 3).all() and (apart == 3).all()


def test_float8_needs_scales_and_is_e4m3(launches):
    query, stored = heads(16), heads(16).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="stored as torch.float8_e4m3fn: .*key_scale is needed"):
        c2c.merged_attention(query, query, query, [c2c.SharerSegment(stored, stored)], backend="triton")
    other = heads(16).to(torch.float8_e5m2)
    with pytest.raises(TypeError, match="key has dtype torch.float8_e5m2, wanted float32, bfloat16, float16"):
        c2c.merged_attention(query, query, query, [c2c.SharerSegment(other, other)], backend="triton")
    assert launches == []


def test_the_widest_heads_are_taken():
    query, key, value = heads(256, length=2), heads(256), heads(200)
    results = (c2c.merged_attention(query, key, value, backend=name) for name in ("triton", "cpu"))
    torch.testing.assert_close(*results)


def test_tokens_wider_than_attention_takes_are_projected_both_ways():
    """A sharer's heads may have any width: gradients of selected tokens go back in parts."""
    raw, proj = torch.randn(1, 1, 6, 300), torch.randn(1, 16, 300) / 17
    found = []
    for name, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        tokens, index = raw.to(dtype, copy=True).requires_grad_(), torch.tensor([4, 0, 4])
        weights = proj.to(dtype)
        segment = c2c.SharerSegment(tokens, raw.to(dtype), weights, weights, index=index)
        key, _ = c2c.project_kv(segment, backend=name)
        key.square().sum().backward()
        found.append((key.detach(), tokens.grad))
    assert_as_exact("key", *(results[0] for results in found))
    assert_as_exact("gradient", *(results[1] for results in found), GRADIENT_ULPS)


def test_a_float64_scale_or_projector_is_taken():
    """The surface lets them pass, so they are rounded to float32 rather than fail in a kernel."""
    raw = torch.randint(-127, 128, (1, 2, 5, 16), dtype=torch.int8)
    proj, scale = torch.randn(2, 16, 32, dtype=torch.float64), torch.rand(1, 2, 5, dtype=torch.float64)
    segment = c2c.SharerSegment(raw, raw, proj, proj, key_scale=scale, value_scale=scale)
    query = heads(16)
    mine, theirs = (
        c2c.merged_attention(query, query, query, [segment], backend=name) for name in ("triton", "reference")
    )
    exact = c2c.merged_attention(*(query.double(),) * 3, [segment], backend="reference")
    assert_as_exact("out", mine, theirs, exact)
    assert to_tensors(segment).key_scale.dtype == torch.float64
