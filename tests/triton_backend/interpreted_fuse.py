"""`fuse_kv` on Triton in the interpreter, or on a GPU (C2C_TRITON_DEVICE), against the reference in float64."""

from __future__ import annotations

import dataclasses

import pytest
import test_fuse_kv
import torch
from error_rule import GRADIENT_ULPS, assert_as_exact
from fuse_cases import FusePlan, build, floats, mapped
from hypothesis import given, settings
from test_fuse_kv import oracle_of, plans, seeds, torchs
from triton_device import ON_GPU, examples, here, there

import c2c_kernels as c2c
from c2c_kernels.backends.triton import fusing


def run(call: c2c.FuseCall, out=None):
    """On the device; results on the CPU."""
    return here(test_fuse_kv.run(there(call), "triton", there(out)))


@given(plans(), seeds)
@settings(max_examples=examples(10))
def test_matches_the_reference_in_float64(plan, seed):
    call = build(plan, seed)
    exact, theirs = oracle_of(call), torchs(call, call.receiver_key)
    out = there((test_fuse_kv.like(call.receiver_key), test_fuse_kv.like(call.receiver_value)))
    test_fuse_kv.run(there(call), "triton", out)
    for ours in (run(call), here(out)):
        for slot, mine, torchs_own, oracle in zip(("key", "value"), ours, theirs, exact, strict=True):
            assert_as_exact(slot, mine, torchs_own.to(plan.receiver), oracle)


@given(plans(), seeds)
@settings(max_examples=examples(4))
def test_in_place_is_the_same_and_touches_nothing_else(plan, seed):
    call = build(plan, seed)
    wanted = run(call)
    sources = call.residual or (call.receiver_key, call.receiver_value)
    wholes = [torch.randn(plan.batch, plan.kv_heads + 1, plan.length + 4, x.shape[3]).to(x.dtype) for x in sources]
    for whole, source in zip(wholes, sources, strict=True):
        whole[:, :-1, 3:-1] = source
    before = [whole.clone() for whole in wholes]
    wholes = there(wholes)
    pair = (wholes[0][:, :-1, 3:-1], wholes[1][:, :-1, 3:-1])
    changed = {"residual": pair} if plan.residual else {"receiver_key": pair[0], "receiver_value": pair[1]}
    test_fuse_kv.run(dataclasses.replace(there(call), **changed), "triton", pair)
    for slot, whole, old, result in zip(("key", "value"), here(wholes), before, wanted, strict=True):
        assert torch.equal(whole[:, :-1, 3:-1], result)
        if slot in plan.closed and not plan.gates:
            assert torch.equal(whole, old)
        whole[:, :-1, 3:-1] = old[:, :-1, 3:-1]
        assert torch.equal(whole, old)


@pytest.mark.parametrize("residual", [False, True])
def test_a_closed_half_is_left_as_it_is_whatever_it_holds(residual):
    call = build(FusePlan(closed=("key", "value"), residual=residual, receiver=torch.bfloat16), 3)
    sources = call.residual or (call.receiver_key, call.receiver_value)
    for tensor in (call.sharer_key, call.sharer_value, *sources):
        tensor[:, :, 1], tensor[:, :, 2], tensor[:, :, 3] = torch.nan, torch.inf, -0.0
    for mine, source in zip(run(call), sources, strict=True):
        assert torch.equal(mine.view(torch.int16), source.contiguous().view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_does_not_depend_on_its_batch_or_length(dtype):
    call = build(FusePlan(dtype, dtype, dtype, batch=2, length=66, hidden=40, strided=False), 5)
    whole = run(call)
    caches = call.receiver_key, call.receiver_value, call.sharer_key, call.sharer_value
    for row, start, stop in ((0, 0, 66), (1, 63, 66)):
        part = c2c.FuseCall(*(cache[row : row + 1, :, start:stop] for cache in caches), call.weights)
        for alone, together in zip(run(part), whole, strict=True):
            assert torch.equal(alone, together[row : row + 1, :, start:stop])


def test_layers_of_any_kind_are_those_of_single_calls():
    plans_of = [FusePlan(length=9), FusePlan(length=9, closed=("key",)), FusePlan(length=9, hidden=24, blocks=2)]
    plans_of += [FusePlan(torch.bfloat16, length=9), FusePlan(length=9, index=True), FusePlan(length=7, gates=True)]
    calls = [build(plan, 2 * number) for number, plan in enumerate(plans_of)]
    for call, made in zip(calls, here(c2c.fuse_layers(there(calls), backend="triton")), strict=True):
        for mine, wanted in zip(made, run(call), strict=True):
            assert torch.equal(mine, wanted)


def test_scratch_is_bounded(monkeypatch):
    """Many tokens of many layers take several launches: parts of layers, or of a layer's tokens."""
    call = build(FusePlan(batch=1, length=150, index=True), 4)
    wanted, launches, launch = run(call), [], fusing.run
    monkeypatch.setattr(fusing, "run", lambda *arguments: (launches.append(arguments[0]), launch(*arguments)))
    for limit, count in ((0, 3), (200_000, 2)):  # 64 tokens take 97 KiB; keys and values are not alike
        monkeypatch.setattr(fusing, "_SCRATCH", limit)
        launches.clear()
        for mine, theirs in zip(run(call), wanted, strict=True):
            assert torch.equal(mine, theirs)
        assert len(launches) == 2 * count


def test_an_index_outside_of_the_sharer_reads_zeros():
    """On a device the host does not look at it."""
    call = build(FusePlan(length=5, index=True), 2)
    index = call.index.clone()
    index[0, 1], index[1, 3] = -1, call.sharer_key.shape[2]
    out = torch.empty_like(call.receiver_key)
    made = there(fusing.Half(call.receiver_key, call.sharer_key, call.weights.key, index, None, None, out))
    fusing.fuse([made])
    padded = torch.cat([call.sharer_key, torch.zeros_like(call.sharer_key[:, :, :1])], 2)
    index[0, 1] = index[1, 3] = padded.shape[2] - 1
    wanted = fusing.Half(call.receiver_key, padded, call.weights.key, index, None, None, torch.empty_like(out))
    fusing.fuse([there(wanted)])
    if not ON_GPU:
        assert torch.equal(out, wanted.out)


@given(plans(), seeds)
@settings(max_examples=examples(3))
def test_gradients(plan, seed):
    call = build(plan, seed)
    cotangents = [torch.randn(own.shape).to(plan.receiver) for own in (call.receiver_key, call.receiver_value)]

    def leaves(dtype=None):
        return mapped(call, lambda tensor: tensor.detach().to(dtype or tensor.dtype).requires_grad_())

    ours = here(test_fuse_kv.gradients(there(leaves()) if ON_GPU else leaves(), "triton", there(cotangents)))
    exact = test_fuse_kv.gradients(leaves(torch.float64), "reference", cotangents)
    theirs = test_fuse_kv.gradients(leaves(), "reference", cotangents)
    for number, (mine, torchs_own, oracle) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_as_exact(f"gradient {number}", mine, torchs_own, oracle, GRADIENT_ULPS)


@pytest.mark.skipif(ON_GPU, reason="on CPU tensors")
def test_as_an_operator_of_torch():
    test_fuse_kv.test_opcheck("triton", False, {"index": True, "residual": True, "gates": True})
    test_fuse_kv.test_compiled_in_place_and_with_gradients("triton")
    test_fuse_kv.test_what_happens_in_place_is_seen_by_autograd("triton")


def test_what_is_not_supported_is_refused_before_anything_is_compiled():
    call = build(FusePlan(), 1)
    huge = dataclasses.replace(call.weights.key, in_weight=torch.empty(2**31, 1, device="meta"))
    with pytest.raises(ValueError, match=r"supports weights of fewer than 2\*\*31 numbers; got \(2147483648, 1\)"):
        fusing.fuse([fusing.Half(call.receiver_key, call.sharer_key, huge, None, None, None, call.receiver_key)])
    gate = torch.ones(1, dtype=torch.float64)
    with pytest.raises(TypeError, match="supports gate of float32, bfloat16 or float16; got float64"):
        fusing.fuse(
            [fusing.Half(call.receiver_key, call.sharer_key, call.weights.key, None, None, gate, call.receiver_key)]
        )


def test_float64_is_refused():
    call = mapped(build(FusePlan(), 1), torch.Tensor.double)
    with pytest.raises(ValueError, match="triton: supports bfloat16, float16, float32; got float64"):
        run(call)
    call = mapped(build(FusePlan(), 1), lambda tensor: tensor.double() if tensor.dim() < 4 else tensor)
    assert all(tensor.dtype == torch.float64 for tensor in floats(call)[4:])
    with pytest.raises(ValueError, match="float16 in all tensors; got float64"):
        run(call)


def test_weights_that_lie_otherwise_at_the_same_address_are_looked_at_again():
    half = build(FusePlan(inner=16), 1).weights.key
    known = fusing._weights_of(half)
    assert fusing._weights_of(half) is known
    square = half.embed.w1
    square.data = square.data.t()
    found = fusing._weights_of(half)
    address = found.blocks[1]
    assert address != known.blocks[1] == square.data_ptr()
    (copy,) = (tensor for tensor in found.tensors if tensor.data_ptr() == address)
    assert torch.equal(copy, square)
    square.data = square.data.t()[:8]
    assert fusing._weights_of(half).sizes == (16, 8, *known.sizes[2:])
