"""The operators as PyTorch operators: opcheck, torch.compile, export, dispatch cost, backends by name."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Plan, SegmentPlan, build

import c2c_kernels as c2c
from c2c_kernels.backends import native
from c2c_kernels.segment import pack, to_tensors

BACKEND = "cpu"  # of opcheck; the Triton backend's tests put theirs here

PLANS = {
    "plain": Plan(is_causal=True),
    "everything": Plan(
        window=9, softcap=5.0, sinks=True, mask="bool", lengths=True, query_positions=True, strided=False,
        segments=[
            SegmentPlan(6, 2, 8, 8, "low_rank", bias=True, gate="full", lengths=True, positions="shuffled"),
            SegmentPlan(4, 2, 8, 8, "dense", gate="head"),
        ],
    ),
}  # fmt: skip


def operator_arguments(plan: Plan, requires_grad: bool):
    call = build(plan, 1)
    segments = [to_tensors(part) for part in call["segments"]]
    for tensor in (call["query"], call["key"], call["value"]):
        tensor.requires_grad_(requires_grad)
    tensors, layout = pack(segments)
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            tensor.requires_grad_(requires_grad)
    return (
        call["query"], call["key"], call["value"], tensors, layout, call["attn_mask"], call["is_causal"],
        call["query_positions"], call["lengths"], 0.25, call["window"], call["window"], call["softcap"], call["sinks"],
        call["strategy"],
    )  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_merged_attention(name, requires_grad):
    PLANS[name].lengths = False  # padding is NaN there, and NaN differ from themselves in opcheck's comparison
    for part in PLANS[name].segments:
        part.lengths = False
    arguments = (*operator_arguments(PLANS[name], requires_grad), True, requires_grad, BACKEND)
    torch.library.opcheck(torch.ops.c2c.merged_attention.default, arguments)


def test_opcheck_project_kv():
    part = SegmentPlan(5, 2, 8, 8, "dense", bias=True)
    for requires_grad in (False, True):
        tensors, layout = pack([to_tensors(build(Plan(segments=[part], strided=False), 2)["segments"][0])])
        for tensor in tensors:
            tensor.requires_grad_(requires_grad)
        cos = torch.rand(1, 5, 8)
        arguments = (tensors, layout, [cos, cos], True, torch.float32, BACKEND)
        torch.library.opcheck(torch.ops.c2c.project_kv.default, arguments)
    key, value = torch.empty(2, 2, 5, 16), torch.empty(2, 2, 5, 16)
    detached = [tensor.detach() for tensor in tensors]
    torch.library.opcheck(torch.ops.c2c.project_kv_out.default, (detached, layout, [], False, key, value, BACKEND))


def test_opcheck_merge_states():
    outs = [torch.randn(1, 2, 3, 8, requires_grad=True) for _ in range(2)]
    lses = [torch.randn(1, 2, 3, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(torch.ops.c2c.merge_states.default, (outs, lses, BACKEND))


def step(query, key, value, raw, proj, gate, positions):
    segment = c2c.SharerSegment(raw, raw, proj, proj, gate=gate, positions=positions)
    kept = c2c.project_kv(segment)
    out, lse, mass = c2c.merged_attention(
        query, key, value, [segment, c2c.SharerSegment(*kept)], is_causal=True, return_lse=True, return_mass=True
    )
    return c2c.merge_states([out, out], [lse, lse])[0] + mass.sum(-1, keepdim=True)


def step_inputs(length: int, sharer: int):
    return (
        torch.randn(1, 4, 3, 16), torch.randn(1, 2, length, 16), torch.randn(1, 2, length, 16),
        torch.randn(1, 3, sharer, 8), torch.randn(2, 16, 24), torch.rand(1, 4, sharer), torch.arange(sharer),
    )  # fmt: skip


def test_compile_does_not_recompile_when_lengths_change():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    counted = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for length, sharer in ((9, 5), (12, 6), (31, 70), (200, 8)):
        inputs = step_inputs(length, sharer)
        torch.testing.assert_close(counted(*inputs), step(*inputs))
    assert counter.frame_count == 1


def test_first_call_may_be_a_compiled_one(tmp_path):
    """With inductor, in a process of its own: it imports setuptools, which other tests have brought in another way."""
    code = """
import torch, c2c_kernels as c2c
call = torch.compile(lambda q: c2c.merged_attention(q, q, q) * 2, fullgraph=True)
q = torch.randn(1, 2, 3, 8)
assert torch.equal(call(q), c2c.merged_attention(q, q, q) * 2)
torch._dynamo.config.error_on_recompile = True
call(q)
"""
    installed = str(Path(c2c.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": installed})


def test_compiled_gradients():
    torch._dynamo.reset()
    inputs = [t.requires_grad_() if t.dtype.is_floating_point else t for t in step_inputs(9, 5)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(step(*inputs).square().sum(), inputs[:6])
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs[:6])
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_export():
    class Step(torch.nn.Module):
        def forward(self, *inputs):
            return step(*inputs)

    inputs = step_inputs(9, 5)
    program = torch.export.export(Step(), inputs)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"c2c.merged_attention.default", "c2c.project_kv.default", "c2c.merge_states.default"} <= names
    torch.testing.assert_close(program.module()(*inputs), step(*inputs))


def test_dispatch_modes_see_the_operators():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        c2c.merged_attention(*(torch.randn(1, 2, 3, 8) for _ in range(3)))
    assert "c2c.merged_attention.default" in seen


@pytest.mark.parametrize("segments", [0, 1])
def test_dispatch_overhead(segments):
    """What a call costs beyond its kernel, gradient not asked for: under 20 microseconds."""
    query, key = torch.randn(1, 9, 1, 64), torch.randn(1, 3, 8, 64)
    parts = [c2c.SharerSegment(key, key, gate=torch.ones(1, 9, 1))] * segments
    out, keep = torch.empty_like(query), []
    numbers = native.attention_numbers(
        query, key, key, [to_tensors(s) for s in parts], [False] * segments, None, False, None, None, None, None, None,
        out, None, None, keep,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def seconds(function, repeats=200):
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - start) / repeats

    try:
        whole, kernel, yardstick = [], [], []
        for _ in range(15):
            whole.append(seconds(lambda: c2c.merged_attention(query, key, key, parts)))
            kernel.append(seconds(lambda: native._cpu.merged_attention(numbers, 0.125, 0.0)))
            yardstick.append(seconds(lambda: F.scaled_dot_product_attention(query, key, key, enable_gqa=True)))
    finally:
        torch.set_num_threads(threads)
    # The least of many runs: other processes only ever add.
    overhead = min(whole) - min(kernel)
    if overhead >= 20e-6 and min(yardstick) > 5e-6:
        pytest.skip(
            f"{overhead * 1e6:.1f} us; the bound is for machines whose interpreter calls scaled_dot_product_attention "
            f"in at most 5 us, this one takes {min(yardstick) * 1e6:.1f}"
        )
    assert overhead < 20e-6, f"{statistics.median(whole) * 1e6:.1f} us a call"


def test_backend_choice_is_logged_once(caplog):
    backends = importlib.import_module("c2c_kernels.backends")  # the package; c2c_kernels.backends is the function
    backends._said.clear()
    backends._choices.clear()
    with caplog.at_level(logging.DEBUG, logger="c2c_kernels"):
        for _ in range(3):
            c2c.merged_attention(*(torch.randn(1, 2, 3, 8) for _ in range(3)))
    assert [r.message.startswith("merged_attention runs on cpu") for r in caplog.records] == [True]


def test_environment_forces_a_backend(monkeypatch):
    inputs = [torch.randn(1, 2, 3, 8) for _ in range(3)]
    monkeypatch.setenv("C2C_BACKEND", "triton")
    with pytest.raises(ValueError, match="triton: "):
        c2c.merged_attention(*inputs)
    monkeypatch.setenv("C2C_BACKEND", "reference")
    plain = c2c.merged_attention(*inputs)
    assert torch.equal(plain, c2c.merged_attention(*inputs, backend="reference"))


def test_float64_runs_on_the_reference():
    inputs = [torch.randn(1, 2, 3, 8, dtype=torch.float64) for _ in range(3)]
    assert c2c.merged_attention(*inputs).dtype == torch.float64
    with pytest.raises(ValueError, match="cpu: supports float32, bfloat16, float16; got float64"):
        c2c.merged_attention(*inputs, backend="cpu")


def test_records():
    records = {record.name: record for record in c2c.backends()}
    assert set(records) == {"reference", "cpu", "triton", "flash-attn", "cuda"}
    sets = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "baseline", "neon")
    assert records["cpu"].available and records["cpu"].isa in sets
    assert all(record.available or record.reason for record in records.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_call_is_checked_and_exact(dtype):
    """A call whose sizes were seen before skips the checks: other tensors and options must not be mixed up with it."""
    for turn in range(3):
        query, key, value = (torch.randn(2, heads, 5 + 4 * (heads == 2), 24).to(dtype) for heads in (4, 2, 2))
        for options in ({"is_causal": True}, {"window": 3}, {"softcap": 2.0}, {"scale": 0.3}, {}):
            found = c2c.merged_attention(query, key, value, **options)
            wanted, _ = c2c.merged_attention(query, key, value, return_lse=True, **options)
            assert torch.equal(found, wanted), (turn, options)
        cut = key[..., ::2].repeat(1, 1, 1, 2)[..., ::2]  # another layout, copied by the kernels' caller
        assert torch.equal(
            c2c.merged_attention(query[..., :12], cut, cut),
            c2c.merged_attention(query[..., :12].clone(), cut.clone(), cut.clone()),
        )
    for wrong in (
        {"is_causal": 1},
        {"window": True},
        {"window": [3]},
        {"scale": "1"},
        {"segments": 0},
        {"segments": torch.ones(2)},
        {"backend": ""},
    ):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            c2c.merged_attention(query, key, value, **wrong)
    with pytest.raises(ValueError, match="triton"):
        c2c.merged_attention(query, key, value, is_causal=True, backend="triton")
    query.requires_grad_()
    assert c2c.merged_attention(query, key, value, is_causal=True).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_projection_is_checked_and_exact(dtype):
    """The same for `project_kv`, which writes to the caller's memory."""

    def segment(scaled=False, biased=False):
        def raw():
            x = torch.randn(2, 2, 5, 12)
            return (x * 40).to(torch.int8) if scaled else x.to(dtype)

        found = c2c.SharerSegment(raw(), raw(), torch.randn(3, 8, 24).to(dtype), torch.randn(3, 6, 24).to(dtype))
        if scaled:
            found.key_scale, found.value_scale = torch.rand(2, 2, 5), torch.rand(2, 1, 5)
        if biased:
            found.key_bias = torch.randn(3, 8).to(dtype)
        return found

    def checked(given):
        """By a call that is never repeated: `lengths` that hide nothing."""
        return c2c.project_kv(dataclasses.replace(given, lengths=torch.tensor([5, 5])))

    cache = torch.zeros(2, 3, 9, 8, dtype=dtype), torch.zeros(2, 3, 9, 6, dtype=dtype)
    for _ in range(3):
        for options in ({}, {"scaled": True}, {"biased": True}, {"scaled": True, "biased": True}):
            given = segment(**options)
            wanted = checked(given)
            fresh = tuple(torch.full_like(t, torch.nan) for t in wanted)
            for found in (c2c.project_kv(given), c2c.project_kv(given, out=fresh)):
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), options
            versions = [t._version for t in cache]
            slices = tuple(t[:, :, 2:7] for t in cache)
            assert c2c.project_kv(given, out=slices)[0] is slices[0]
            assert all(torch.equal(a, b) for a, b in zip(slices, wanted, strict=True)), options
            assert all(t._version > v for t, v in zip(cache, versions, strict=True))
            assert not any(t[:, :, :2].any() or t[:, :, 7:].any() for t in cache)
    given = segment()
    out = torch.empty(2, 3, 5, 8, dtype=dtype), torch.empty(2, 3, 5, 6, dtype=dtype)
    c2c.project_kv(given, out=out)
    shared = torch.empty(2000, dtype=dtype)
    inside = c2c.SharerSegment(
        shared[100:340].view(2, 2, 5, 12), given.value, given.key_proj, given.value_proj
    )  # laid out alike, but the result lies within the source
    with pytest.raises(ValueError, match="out key shares memory with the segment"):
        c2c.project_kv(inside, out=(shared[200:440].view(2, 3, 5, 8), out[1]))
    narrow = dataclasses.replace(given, value_proj=torch.randn(3, 8, 24).to(dtype))
    c2c.project_kv(narrow, out=(out[0], torch.empty_like(out[0])))
    with pytest.raises(ValueError, match="same memory"):
        c2c.project_kv(narrow, out=(out[0], out[0]))
    with pytest.raises(ValueError, match="triton"):
        c2c.project_kv(given, backend="triton")
    with pytest.raises(ValueError, match="backend"):
        c2c.project_kv(given, backend="")
    given.key_proj.requires_grad_()
    assert c2c.project_kv(given)[0].requires_grad
    with pytest.raises(ValueError, match="out= is written in place without autograd"):
        c2c.project_kv(given, out=out)
