"""`c2c-kernels bench --device cuda` without a GPU: where tensors go, what is timed, what stands beside."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from c2c_kernels.bench import alternatives, check, gpu, gpu_alternatives, inputs, measure, shapes, timing
from c2c_kernels.bench.machine import Machine
from c2c_kernels.bench.work import LeftOutError

CASE = shapes.Case("prefill", shapes.SMOLLM2, "bfloat16", q_len=5, own=40)


@pytest.fixture
def clock(monkeypatch):
    """CUDA's events and sleep, on a clock of our own; the order in which things happen."""
    happened, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("record")
            self.at = now[0]

        def synchronize(self):
            happened.append("wait")

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    def sleep(cycles):
        happened.append("sleep")
        now[0] += 100.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(gpu, "_LEAST_FLUSH", 1024)
    monkeypatch.setattr(gpu, "l2_bytes", lambda device: 4096)
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 2**16)
    return SimpleNamespace(happened=happened, now=now)


def test_a_call_is_timed_behind_a_flush_and_a_sleep(clock):
    watch = gpu.Stopwatch(torch.device("cpu"))
    assert watch._flushed.numel() == 4 * 4096
    watch._flushed.fill_(1)

    def call():
        assert not watch._flushed.any()
        clock.happened.append("call")
        clock.now[0] += 0.25

    assert watch(call) == 0.25
    assert clock.happened == ["sleep", "record", "call", "record", "wait"]


def test_contenders_alternate_on_the_stopwatch(clock):
    watch, order = gpu.Stopwatch(torch.device("cpu")), []

    def contender(name, seconds):
        def run():
            order.append(name)
            clock.now[0] += seconds

        return run

    found = timing.alternate(
        {"a": contender("a", 1.0), "b": contender("b", 3.0)}, timing.Effort(0.0, 4, 4), warm=False, once=watch
    )
    assert "".join(order) == "ab" + "ab" * 4
    assert (found["a"].median, found["b"].median, found["a"].runs) == (1.0, 3.0, 4)


def test_limits_are_work_over_time(clock, monkeypatch):
    """The sum takes 1 s, the copy 1.5 s and a product 2 s each."""
    monkeypatch.setattr(gpu, "_PRODUCT", {"float32": 8, "bfloat16": 16, "float16": 16})
    gpu.stopwatch.cache_clear()
    seconds = {"sum": 1.0, "copy": 1.5, "product": 2.0}

    def alternate(calls, effort, *, warm, once):
        assert not warm and isinstance(once, gpu.Stopwatch)
        return {name: timing.Timing(9.0, 9.0, 9.0, seconds[name], 1) for name in calls}

    monkeypatch.setattr(gpu, "alternate", alternate)
    found = gpu.measure(torch.device("cpu"))
    gpu.stopwatch.cache_clear()
    assert found.memory == max(2**14, 2 * 2**14 / 1.5)
    assert found.peaks == {"float32": 8**3, "bfloat16": 16**3, "float16": 16**3}
    assert found.floor(found.memory, 0, 10, "float32").bound == "memory"  # however little is touched
    assert "memory bandwidth" in found.limits() and "cache bandwidth" not in found.limits()


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_every_tensor_of_a_case_is_on_the_device(family):
    """On the meta device: what is computed of tensors there is there too."""
    case = next(case for case in shapes.grid(quick=True) if case.family == family)
    sizes = {name: min(getattr(case, name), 20) for name in ("q_len", "own", "shared")}
    case = replace(case, batch=1, layers=1, **sizes)
    work = measure.build(case, "meta")
    assert work.touched > 0
    if family == "merge" or family == "fuse":
        results = list(work.alternatives["torch"]()())
    elif family == "fuse-model":
        results = [tensor for pair in work.alternatives["torch"]()() for tensor in pair]
    elif family.startswith("project"):
        results = list(inputs.project_with_torch(inputs.raw_segment(case, inputs.Random(case, "meta")), torch.bfloat16))
        work.alternatives["matmul"]()()
    else:
        (made,) = inputs.attention(case, "meta")
        results = [made.query, alternatives.sdpa_raw(made)(), *(m for m in [alternatives.mask(made)] if m is not None)]
    assert {result.device.type for result in results} == {"meta"}


def lower_right(query, key, value):
    """What both packages compute, (batch, heads, tokens, dim), tokens of a shorter query at the end."""
    q_len, tokens = query.shape[2], key.shape[2]
    seen = torch.ones(q_len, tokens, dtype=torch.bool).tril(tokens - q_len)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)


def flash_attn_func(query, key, value, causal):
    assert causal and all(tensor.is_contiguous() for tensor in (query, key, value))
    return lower_right(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2)


def single_prefill_with_kv_cache(query, key, value, causal, kv_layout):
    assert causal and kv_layout == "HND"
    return lower_right(query.transpose(0, 1)[None], key[None], value[None])[0].transpose(0, 1)


def single_decode_with_kv_cache(query, key, value, kv_layout):
    assert kv_layout == "HND" and query.dim() == 2
    return lower_right(query[None, :, None], key[None], value[None])[0, :, 0]


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins with the packages' layouts."""
    infer = SimpleNamespace(
        single_prefill_with_kv_cache=single_prefill_with_kv_cache,
        single_decode_with_kv_cache=single_decode_with_kv_cache,
    )
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setitem(sys.modules, "flashinfer", infer)


@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("family", ["prefill", "prefill-materialised", "decode-absorbed"])
def test_other_packages_see_the_same(family, q_len, packages):
    sharer = shapes.GEMMA3 if family == "decode-absorbed" else None
    shared = 0 if family == "prefill" else 30
    (made,) = inputs.attention(replace(CASE, family=family, sharer=sharer, q_len=q_len, shared=shared))
    with torch.no_grad():
        wanted = made.merged()
        for make in (gpu_alternatives.flash_attention, gpu_alternatives.flashinfer):
            assert not check.attention_problem(made, make(made)(), wanted)


def test_packages_that_cannot_be_used_say_why(monkeypatch, packages):
    (made,) = inputs.attention(replace(CASE, batch=2))
    with pytest.raises(LeftOutError, match="paged cache"):
        gpu_alternatives.flashinfer(made)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(LeftOutError, match="not installed"):
        gpu_alternatives.flash_attention(made)
    (made,) = inputs.attention(replace(CASE, dtype="float32"))
    with pytest.raises(LeftOutError, match="16-bit"):
        gpu_alternatives.flash_attention(made)


def test_what_the_backend_refuses_is_left_out(limits, monkeypatch):
    def refuse(*_, **__):
        raise ValueError('merged_attention on triton supports strategy "auto"; got "absorb"')

    monkeypatch.setattr(inputs.AttentionInputs, "merged", refuse)
    line = measure.measure(CASE, limits, timing.Effort(0.0, 4, 4))
    assert line.status == "left out" and 'got "absorb"' in line.reason


def test_lines_are_timed_on_the_machines_device(monkeypatch):
    """A machine that says "cuda:0": its cases are built there and timed by its stopwatch."""
    built, timed = [], []

    def watch(call):
        call()
        timed.append(call)
        return 0.5

    monkeypatch.setattr(measure, "checked", lambda case, device: built.append(device) or measure.build(case))
    monkeypatch.setattr(gpu, "stopwatch", lambda device: watch)
    machine = Machine(0, 1e12, 1e12, {"bfloat16": 1e15}, 0, "made up", (), "cuda:0")
    line = measure.measure(CASE, machine, timing.Effort(0.0, 4, 4))
    assert built == ["cuda:0"] and len(timed) >= 8 and line.timing.median == 0.5
    assert line.bound == "memory" and "plain read" not in line.beside


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    from c2c_kernels.cli.main import main

    assert main(["bench", "--device", "cuda", "--quick"]) == 1
    assert "--device cuda: torch finds no GPU" in capsys.readouterr().err


def test_what_is_measured_on_the_cpu_alone_is_refused(capsys, monkeypatch):
    from c2c_kernels.cli.main import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["bench", "--device", "cuda", "--explain"]) == 1
    assert "--explain is measured on the CPU" in capsys.readouterr().err


def test_the_short_list_has_flex_attention_on_a_gpu():
    """In a few lines: compiling takes seconds for each."""
    plain, on_gpu = shapes.grid(quick=True), shapes.grid(quick=True, gpu=True)
    assert [case.name for case in plain] == [case.name for case in on_gpu] and not any(case.flex for case in plain)
    with_flex = [case for case in on_gpu if case.flex]
    assert {case.family for case in with_flex} == {"decode", "prefill"}
    assert {case.dtype for case in with_flex} == {"bfloat16"} and len(with_flex) <= 10
    assert shapes.grid(gpu=True) == shapes.grid()
