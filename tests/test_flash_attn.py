"""The `flash-attn` backend: its calls with a stand-in for the package, and on a GPU that has it (`pytest -m gpu`)."""

from __future__ import annotations

import importlib
import logging
import sys
from dataclasses import replace

import flash_attn_stand_in as stand_in
import pytest
import torch
from attention_cases import Plan, SegmentPlan, build, reference_call
from error_rule import assert_as_exact
from triton_device import here, there

import c2c_kernels as c2c
from c2c_kernels.backends import flash_attn

backends = importlib.import_module("c2c_kernels.backends")  # the package's attribute of this name is a function
BF16, F16 = torch.bfloat16, torch.float16

PLANS = {
    "decode": Plan(BF16, 2, 2, 4, 1, 165, 64, 64, is_causal=True, segments=[SegmentPlan(70)]),
    "prefill": Plan(F16, 1, 2, 3, 20, 45, 128, 128, is_causal=True, window=9, segments=[
        SegmentPlan(30, gate="head"), SegmentPlan(0), SegmentPlan(17, gate="zero", lengths=True)]),
    "padded": Plan(BF16, 3, 2, 2, 5, 33, 72, 72, is_causal=True, lengths=True, softcap=5.0, segments=[
        SegmentPlan(21, lengths=True, positions="shared"), SegmentPlan(12, gate="scalar")]),
    "more queries than tokens": Plan(F16, 1, 1, 2, 9, 5, 40, 40, is_causal=True, segments=[SegmentPlan(6)]),
    "rows that see nothing": Plan(F16, 1, 1, 2, 9, 5, 40, 40, is_causal=True, segments=[SegmentPlan(6, gate="zero")]),
    "projected": Plan(BF16, 2, 2, 2, 3, 20, 64, 64, is_causal=True, segments=[
        SegmentPlan(33, 2, 24, 24, "dense", bias=True), SegmentPlan(9, quantised=True, index=True)]),
    "nothing of its own": Plan(F16, 2, 1, 2, 3, 0, 16, 16, segments=[SegmentPlan(4, lengths=True)]),
    "nothing at all": Plan(F16, 1, 1, 2, 3, 0, 16, 16, segments=[SegmentPlan(0)]),
    "no queries": Plan(F16, 1, 1, 2, 0, 5, 16, 16),
    "odd dim": Plan(BF16, 1, 2, 1, 2, 7, 13, 13, segments=[SegmentPlan(4)]),
}  # fmt: skip


@pytest.fixture
def package(monkeypatch):
    """The stand-in, as though CPU tensors were a device's; the calls made."""
    names = ("bfloat16", "float16")
    ours = backends.Backend("flash-attn", True, "", ("cpu",), names, "stand-in")
    kept = (record for record in c2c.backends() if record.name != "flash-attn")
    monkeypatch.setattr(backends, "_records", (*kept, ours))
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    flash_attn._package.cache_clear()
    stand_in.calls.clear()
    yield stand_in.calls
    flash_attn._package.cache_clear()


def check(plan: Plan, seed: int, found) -> None:
    call = build(plan, seed)
    exact, theirs = reference_call(call, torch.float64), reference_call(call, plan.dtype, plan.dtype)
    for name, ours, torchs, oracle in zip(("out", "lse", "mass"), found, theirs, exact, strict=True):
        assert_as_exact(name, ours, torchs, oracle)


def attend(call: dict, **options):
    return c2c.merged_attention(**call, return_lse=True, return_mass=True, backend="flash-attn", **options)


@pytest.mark.parametrize("name", PLANS)
def test_calls_of_the_package(name, package):
    plan = PLANS[name]
    check(plan, 3, attend(build(plan, 3)))
    runs = [plan.lengths] * (plan.length > 0) + [part.lengths for part in plan.segments if part.length]
    wanted = ["flash_attn_with_kvcache" if padded else "flash_attn_func" for padded in runs]
    assert package == (wanted if plan.q_len else [])


def test_by_environment_steps_run_elsewhere(package, monkeypatch):
    """project_kv and merge_states of a call are other backends', whatever C2C_BACKEND says."""
    monkeypatch.setenv("C2C_BACKEND", "flash-attn")
    check(PLANS["projected"], 3, attend(build(PLANS["projected"], 3)))
    with pytest.raises(ValueError, match="flash-attn: has no kernel for quantize_kv"):
        c2c.quantize_kv(torch.ones(1, 1, 1, 8, dtype=BF16), torch.ones(1, 1, 1, 8, dtype=BF16))


def test_compiled_call(package):
    call = build(replace(PLANS["prefill"], segments=[SegmentPlan(30)]), 3)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(call), attend(call), strict=True):
        assert torch.equal(one, other)


def test_lengths_outside_of_the_tensor_are_cut_to_it(package):
    call = build(Plan(BF16, 3, 1, 1, 2, 8, 16, 16, strided=False), 3)
    outside, cut = (attend(call | {"lengths": torch.tensor(lengths)}) for lengths in ([99, -1, 5], [8, 0, 5]))
    assert all(torch.equal(one, other) for one, other in zip(outside, cut, strict=True))


def test_nan_reaches_the_rows_that_see_it(package):
    call = build(Plan(BF16, 1, 1, 1, 4, 8, 16, 16, is_causal=True, strided=False), 3)
    call["key"][0, 0, 6, 0] = torch.nan  # seen by the last two of four queries
    out, lse, _ = attend(call)
    assert out.isnan().all(-1).flatten().tolist() == lse.isnan().flatten().tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"dtype": torch.float32}, {}, "supports bfloat16, float16; got float32"),
        ({"head_dim": 264, "value_dim": 264}, {}, "supports head_dim up to 256; got 264"),
        ({"value_dim": 24}, {}, "wants value_dim = head_dim; got 24 and 16"),
        ({"mask": "bool"}, {}, "takes no attn_mask"),
        ({"sinks": True}, {}, "takes no sinks"),
        ({"segments": [SegmentPlan(5, gate="token")]}, {}, r"gates that differ by token, which segments\[0\] has"),
        ({"segments": [SegmentPlan(5, positions="shared", visibility="causal")]}, {}, "hides no tokens by their posit"),
        ({"segments": [SegmentPlan(5, positions="shared")], "window": 3}, {}, "hides no tokens by their positions"),
        ({"segments": [SegmentPlan(5, projector="dense")]}, {"strategy": "absorb"}, "absorbs no projector"),
    ],
)
def test_what_is_refused_by_name_is_left_to_others_without(fields, options, message, package):
    call = build(replace(Plan(BF16, 1, 1, 2, 3, 9, 16, 16), **fields), 3) | options
    with pytest.raises(ValueError, match=f"flash-attn: .*{message}"):
        c2c.merged_attention(**call, backend="flash-attn")
    c2c.merged_attention(**call)
    assert not package


def test_a_segment_of_another_dtype(package):
    call = build(Plan(BF16, 1, 1, 2, 3, 9, 16, 16, segments=[SegmentPlan(5)]), 3)
    for half in ("key", "value"):
        setattr(call["segments"][0], half, getattr(call["segments"][0], half).half())
    with pytest.raises(ValueError, match=r"another dtype than the query's, which segments\[0\] has"):
        attend(call)


def test_gradients_are_left_to_others(package):
    call = build(PLANS["decode"], 3)
    call["query"].requires_grad_()
    with pytest.raises(ValueError, match="flash-attn: computes no gradients"):
        attend(call)
    c2c.merged_attention(**call).sum().backward()
    with torch.no_grad():
        attend(call)


def test_its_place_among_the_backends(package, monkeypatch, caplog):
    """After cuda and triton, before the reference; a call that it refuses does not keep the next from it."""
    assert [record.name for record in backends._records if record.name != "flash-attn"] == [
        "cuda", "triton", "cpu", "reference",
    ]  # fmt: skip
    first, *rest = (record for record in backends._records if record.name in ("flash-attn", "reference"))
    monkeypatch.setattr(backends, "_records", (*rest, first) if rest[0].name == "flash-attn" else (first, *rest))
    plan = Plan(BF16, 1, 1, 2, 3, 9, 16, 16)
    with caplog.at_level(logging.DEBUG, "c2c_kernels"):
        backends._said.clear()
        c2c.merged_attention(**build(replace(plan, sinks=True), 3))
        c2c.merged_attention(**build(plan, 3))
        c2c.merged_attention(**build(plan, 3))
    assert package == ["flash_attn_func"] * 2
    assert any("flash-attn: takes no sinks" in line for line in caplog.messages)


def test_the_record_says_why(monkeypatch):
    def reason(version: str | None, spec: object) -> str:
        def find(name):
            if version is None:
                raise flash_attn.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(flash_attn.importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr(flash_attn.metadata, "version", find)
        return flash_attn.flash_attn_record().reason

    assert "not installed" in reason(None, None)
    assert "no package flash-attn 2" in reason(None, object())
    assert "2.6 or later is wanted, found 2.5.9.post1" in reason("2.5.9.post1", object())
    assert reason("2.8.3", object()) == ("" if torch.cuda.is_available() else "torch finds no GPU")


def test_a_package_that_cannot_be_imported(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash_attn._package.cache_clear()
    with pytest.raises(ValueError, match="flash-attn cannot be imported: "):
        attend(build(PLANS["decode"], 3))


@pytest.mark.gpu
@pytest.mark.skipif(not flash_attn.flash_attn_record().available, reason=flash_attn.flash_attn_record().reason)
@pytest.mark.parametrize("name", PLANS)
def test_the_package_on_a_gpu(name):
    """Not run on hardware yet."""
    plan = PLANS[name]
    check(plan, 3, here(attend(there(build(plan, 3), torch.device("cuda")))))
