"""When the CUDA backend is chosen, what it refuses and what it leaves to others."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from attention_cases import Plan, SegmentPlan, build
from cuda_simulator import chosen

import c2c_kernels as c2c
from c2c_kernels.backends import cuda

BF16 = torch.bfloat16
built = pytest.mark.skipif(cuda._cuda is None, reason=cuda._why_not or "there is no extension")


def record() -> object:
    return next(each for each in c2c.backends() if each.name == "cuda")


def call(dtype=BF16, **fields) -> dict:
    plan = Plan(dtype, 1, 1, 2, fields.pop("q_len", 1), 20, fields.pop("dim", 16), 16, **fields)
    made = build(plan, 3)
    return {name: value for name, value in made.items() if name != "strategy"}


def attend(**arguments):
    """On CPU tensors that pass for a device's; what takes the launches is not reached by a refused call."""
    with chosen(), cuda.executed_by(80, lambda launch: None):
        return c2c.merged_attention(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_told():
    assert not record().available
    assert record().reason
    with pytest.raises(ValueError, match=f"cuda: {record().reason[:20]}"):
        c2c.merged_attention(*(torch.randn(1, 1, n, 16).to(BF16) for n in (1, 5, 5)), backend="cuda")


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_extension_says_why_it_cannot_run():
    assert "driver" in cuda._cuda.unavailable() or "device" in cuda._cuda.unavailable()
    assert "c2c_kernels._cuda" in sys.modules


def test_the_device_asked_about_is_the_tensors(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield
        entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(cuda, "_cuda", SimpleNamespace(unavailable=lambda: f"asked on {entered[-1]}"))
    segment = SimpleNamespace(key=SimpleNamespace(is_cuda=True, device="cuda:1"))
    assert cuda.refusal("project_kv", True, segment, False) == "asked on cuda:1"
    assert entered == ["cuda:1", None]


def test_a_device_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    found = dataclasses.replace(record(), available=True).refusal(torch.device("cuda:1"), BF16)
    assert found == "needs compute capability 8.0 or later; cuda:1 has 7.5"


def test_the_choice_is_remembered_for_each_device(monkeypatch):
    backends = importlib.import_module("c2c_kernels.backends")  # the package; c2c_kernels.backends is the function
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8 - device.index, 0))
    monkeypatch.setattr(cuda, "refusal", lambda *_: "")
    found = [each for each in c2c.backends() if each.name in ("cuda", "reference")]
    found = tuple(dataclasses.replace(each, available=True, reason="") for each in found)
    monkeypatch.setattr(backends, "_records", found)
    for order in ((0, 1, 0), (1, 0, 1)):
        monkeypatch.setattr(backends, "_choices", {})
        names = [
            backends.choose("merged_attention", None, torch.device("cuda", index), BF16, "", ()).name for index in order
        ]
        assert names == [("cuda", "reference")[index] for index in order]


@built
def test_the_choice_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, "c2c_kernels"):
        c2c.backends.__globals__["_said"].clear()
        attend(**call())
        attend(**call(torch.float32))
    lines = [line for line in caplog.messages if "merged_attention" in line]
    assert "runs on cuda for torch.bfloat16" in lines[0]
    assert "cuda: supports bfloat16, float16; got float32" in lines[1]


@built
@pytest.mark.parametrize(
    ("fields", "strategy", "message"),
    [
        ({"dim": 264}, "auto", "supports head_dim up to 256; got 264"),
        ({"segments": [SegmentPlan(0)] * 17}, "auto", "supports up to 16 segments; got 17"),
        ({"segments": [SegmentPlan(9, projector="low_rank")]}, "absorb", r"full-rank projectors; segments\[0\]"),
        ({"segments": [SegmentPlan(9, 9, 64, projector="dense")]}, "absorb", r"to 512 .* segments\[0\] has width 576"),
        ({"segments": [SegmentPlan(9, projector="dense")], "q_len": 17}, "absorb", r"up to 32; .* query 17 x 2: use"),
        ({"dtype": torch.float32}, "auto", "supports bfloat16, float16; got float32"),
    ],
)
def test_what_is_refused_by_name_is_left_to_others_without(fields, strategy, message):
    arguments = call(**fields)
    with pytest.raises(ValueError, match=message):
        attend(**arguments, strategy=strategy, backend="cuda")
    attend(**arguments, strategy=strategy)


@built
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_prefill_of_sm_90(capability):
    """By the device alone, and what a block may have there; its tensor maps are those of runs stored as multiplied."""
    segments = [SegmentPlan(9), SegmentPlan(0), SegmentPlan(8, quantised=True), SegmentPlan(8, index=True)]
    launched: list[cuda.Launch] = []
    arguments = call(q_len=40, segments=segments, strided=False)
    with chosen(), cuda.executed_by(capability, launched.append):
        c2c.merged_attention(**arguments)
    (launch,) = launched
    if capability != 90:
        kernel = "c2c_prefill_small_bf16_64" if capability in (86, 89, 120) else "c2c_prefill_bf16_64"
        assert (launch.kernel, launch.maps, launch.shared <= 99 * 1024) == (kernel, (), "small" in kernel)
        return
    assert (launch.kernel, launch.block) == ("c2c_prefill_wgmma_bf16_64", 384)
    plain = [arguments["key"], arguments["value"], arguments["segments"][0].key, arguments["segments"][0].value]
    places = [launch.maps[0].at + 128 * number for number in range(4)]
    assert launch.maps == tuple(
        cuda.TileMap(at, x.data_ptr(), (16, x.shape[2], 1, 1), (32, 32 * x.shape[2], 32 * x.shape[2]), 64)
        for at, x in zip(places, plain, strict=True)
    )


@built
def test_segments_of_another_dtype():
    arguments = call(segments=[SegmentPlan(9)])
    segment = arguments["segments"][0]
    segment.key, segment.value = segment.key.half(), segment.value.half()
    with pytest.raises(ValueError, match=r"segments\[0\] has float16 and float16, query bfloat16"):
        attend(**arguments, backend="cuda")


@built
@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        ("merge_states", ([torch.zeros(1, 1, 1, 264).to(BF16)], [torch.zeros(1, 1, 1)]), "head_dim up to 256; got 264"),
        ("merge_states", ([torch.zeros(1, 1, 1, 8).to(BF16)] * 33, [torch.zeros(1, 1, 1)] * 33), "32 states; got 33"),
        ("quantize_kv", [torch.zeros(1, 1, 1, dim).to(BF16) for dim in (8, 264)], "head_dim up to 256; got 264"),
        ("quantize_kv", [torch.zeros(1, 1, 1, 8)] * 2, "supports bfloat16, float16; got float32"),
    ],
)
def test_rows_and_states_that_are_too_many(operator, arguments, message):
    with chosen(), cuda.executed_by(80, lambda launch: None):
        with pytest.raises(ValueError, match=f"cuda: .*{message}"):
            getattr(c2c, operator)(*arguments, backend="cuda")
        getattr(c2c, operator)(*arguments)


@built
def test_an_error_names_the_operator_and_the_shape():
    """A status that `refusal` does not foresee: more rows than 32 bits count."""
    wide = torch.randn(1, 1, 1, 16).to(BF16)
    query = wide.expand(1, 2**20, 2**12, 16)
    with pytest.raises(ValueError, match=r"merged_attention on cuda: .*tensor \(1, 1048576, 4096, 16\) on cpu"):
        native_run(query, wide)


def native_run(query, cache):
    """The launch alone: the output of this call would not fit in memory."""
    from c2c_kernels.backends import native

    numbers = native.attention_numbers(
        query, cache, cache, [], [], None, False, None, None, None, None, None, query, None, None, []
    )
    with cuda.executed_by(80, lambda launch: None):
        cuda._run(
            "merged_attention", query, cuda._cuda.attention_workspace(numbers),
            lambda *where: cuda._cuda.attention_launches(numbers, 1.0, 0.0, *where), None, [query, cache],
        )  # fmt: skip
