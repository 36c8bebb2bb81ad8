"""What the figures stand on: limits, floors, costs, the order of runs, the shapes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from c2c_kernels.bench import (
    alternatives,
    check,
    compiler,
    end_to_end,
    inputs,
    machine,
    measure,
    reading,
    shapes,
    table,
    timing,
    topology,
)
from c2c_kernels.bench.results import Beside

CASE = shapes.Case("decode", shapes.SMOLLM2, "float32")
SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def _work(**changes):
    with torch.no_grad():
        return measure.build(replace(CASE, **changes))


# floors


@pytest.mark.parametrize(
    ("moved", "flops", "touched", "dtype", "seconds", "bound"),
    [
        (20e6, 1e3, 33e6, "float32", 1e-3, "memory"),
        (20e6, 1e3, 31e6, "float32", 0.25e-3, "cache"),
        (1e6, 1e9, 33e6, "float32", 5e-3, "compute"),
        (1e6, 1e9, 33e6, "bfloat16", 2.5e-3, "compute"),
    ],
)
def test_the_floor_is_the_larger(moved, flops, touched, dtype, seconds, bound, limits):
    found = limits.floor(moved, flops, touched, dtype)
    assert found.seconds == pytest.approx(seconds)
    assert found.bound == bound


def _pairs(q_len: int, own: int, shared: int) -> int:
    """(query, token) pairs counted one by one: own tokens up to the query's own, every sharer token."""
    return sum(shared + own - q_len + query + 1 for query in range(q_len))


@pytest.mark.parametrize(("q_len", "own", "batch"), [(1, 37, 3), (5, 5, 1), (5, 11, 2)])
@pytest.mark.parametrize("dtype", shapes.DTYPES)
def test_costs_of_the_own_cache(q_len, own, batch, dtype):
    (cost,) = _work(family="prefill", q_len=q_len, own=own, batch=batch, dtype=dtype).costs
    assert cost.flops == 2 * 2 * batch * 9 * 64 * _pairs(q_len, own, 0)
    assert cost.bytes == SIZE[dtype] * batch * 64 * (2 * 3 * own + 2 * 9 * q_len)


def test_costs_of_a_segment_in_receiver_space():
    (cost,) = _work(family="prefill-materialised", q_len=5, own=7, shared=13).costs
    assert cost.flops == 2 * 2 * 9 * 64 * _pairs(5, 7, 13)
    assert cost.bytes == 4 * 64 * (2 * 3 * (7 + 13) + 2 * 9 * 5)


@pytest.mark.parametrize("family", ["decode-absorbed", "decode-int8", "prefill-raw"])
def test_costs_of_a_raw_segment(family):
    """Raw tokens and weights once, nothing that is projected; absorbed, or where it is allowed projected."""
    costs = _work(family=family, sharer=shapes.GEMMA3, q_len=3, own=7, shared=13).costs
    width, own = 256, 2 * 2 * 9 * 64 * _pairs(3, 7, 0)
    stored = 2 * 13 * (width + 4) if family == "decode-int8" else 2 * 13 * width * 4  # int8 with a float32 scale
    moved = 4 * 64 * (2 * 3 * 7 + 2 * 9 * 3) + stored + 4 * 2 * 3 * 64 * width
    absorbed = own + 2 * 2 * 9 * 3 * width * (13 + 64)
    projected = own + 2 * 2 * 13 * 3 * 64 * width + 2 * 2 * 9 * 3 * 64 * 13
    wanted = [(moved, absorbed)] + ([(moved, projected)] if family == "prefill-raw" else [])
    assert [(cost.bytes, cost.flops) for cost in costs] == wanted


def test_costs_of_gradients():
    """Two matrix products forward, five backward; every input and gradient once."""
    (cost,) = _work(family="backward", q_len=5, own=5).costs
    assert cost.flops == 7 * 2 * 9 * 64 * _pairs(5, 5, 0)
    assert cost.bytes == 4 * 64 * (2 * (9 * 5 + 2 * 3 * 5) + 9 * 5)


def test_costs_of_gradients_through_projectors():
    costs = _work(family="backward-raw", sharer=shapes.GEMMA3, q_len=5, own=5, shared=13).costs
    width, own, rows = 256, 7 * 2 * 9 * 64 * _pairs(5, 5, 0), 9 * 5
    projected = own + 2 * 2 * 2 * 13 * width * 3 * 64 + 7 * 2 * rows * 64 * 13
    absorbed = own + 6 * 2 * rows * 64 * width + 5 * 2 * rows * width * 13
    assert [cost.flops for cost in costs] == [projected, absorbed]
    weights = 2 * 3 * 64 * width
    assert costs[0].bytes == 4 * (2 * (64 * (9 * 5 + 2 * 3 * 5) + weights) + 64 * 9 * 5 + 2 * 13 * width)


def test_costs_of_a_projection():
    (cost,) = _work(family="project", sharer=shapes.GEMMA3, shared=13, dtype="bfloat16").costs
    assert cost.flops == 2 * 2 * 13 * 256 * 3 * 64
    assert cost.bytes == 2 * (2 * 13 * 256 + 2 * 3 * 64 * 256 + 2 * 13 * 3 * 64)


def test_costs_of_the_fuser():
    """Three blocks of two matrices of 1024 x 1024, in, out and scale, for keys and for values; everything once."""
    (cost,) = _work(family="fuse", sharer=shapes.GEMMA3, shared=13).costs
    width = 3 * 64
    matrices = 2 * (1024 * (256 + width) + 6 * 1024**2 + 1024 * width + 1024 * 3)
    vectors = 2 * (1024 + 3 * 1024 + width + 3 + 1)
    assert cost.flops == 2 * 13 * matrices
    assert cost.bytes == 4 * (matrices + vectors + 2 * 13 * (256 + 2 * width))


def test_the_cheapest_way_is_the_floor(limits):
    case = replace(CASE, family="prefill-raw", sharer=shapes.GEMMA3, q_len=64, own=64, shared=512)
    work = _work(**{name: getattr(case, name) for name in ("family", "sharer", "q_len", "own", "shared")})
    found = measure.costs(case, work, limits, 1.0)
    assert found["flops"] == min(cost.flops for cost in work.costs) < max(cost.flops for cost in work.costs)


# limits


def _reader(rates):
    """A machine on which a buffer up to so many bytes is read at such a rate."""

    def read(data):
        size = data.numel() * 4
        return next(rate for limit, rate in rates if size <= limit)

    return read


@pytest.mark.parametrize(
    ("inside", "size"),
    [(64, 64), (33, 64), (31, 32), (10, 16), (4, 8)],  # MiB that the process has, and that are found, to a factor of 2
)
def test_the_cache_is_as_large_as_what_reads_fast(inside, size):
    read = _reader([(inside * 2**20, 100e9), (2**40, 20e9)])
    half = read(torch.empty(32 * 2**20 // 4))
    assert machine._inside(read, 64 * 2**20, half, 20e9) == (100e9, size * 2**20)


def test_a_cache_that_is_not_faster_keeps_its_size():
    assert machine._inside(lambda data: 21e9, 64 * 2**20, 22e9, 20e9) == (22e9, 64 * 2**20)


def test_a_cache_that_was_slow_for_a_moment_keeps_its_size():
    assert machine._inside(lambda data: 100e9, 64 * 2**20, 22e9, 20e9) == (100e9, 64 * 2**20)


def test_what_is_read_is_beyond_and_inside(small_machine, monkeypatch):
    """Half of the cache, and memory of eight times the cache at least, with the threads asked for."""
    monkeypatch.setattr(machine, "_BEYOND", 2**22)
    monkeypatch.setattr(machine, "_crowded", lambda *_: "")
    read = []

    def reader(program, threads):
        def run(data):
            read.append((data.numel() * 4, threads))
            return [1e9, 5e9, 2e9, 4e9][len(read) - 1]

        return run

    monkeypatch.setattr(machine, "_reader", reader)
    found = machine.measure(2)
    assert read == [(8 * 2**20, 2), (2**19, 2)] * 2
    assert (found.memory, found.cache, found.cache_bytes, found.threads) == (2e9, 5e9, 2**20, 2)


def test_a_crowded_machine_is_measured_again_and_named(small_machine, monkeypatch):
    """Two threads that reach what one does, until the third pass; or for ever."""
    monkeypatch.setattr(topology, "cores", lambda: [0, 1])
    monkeypatch.setattr(machine, "_reader", lambda program, threads: lambda data: 1e9)
    passes = []

    def peaks(rates):
        def run(program, threads, before):
            passes.append(threads)
            return dict.fromkeys(shapes.DTYPES, rates[min(len(passes), len(rates)) - 1])

        return run

    monkeypatch.setattr(machine, "_multiply_adds", lambda program, threads: 1e9)
    for rates, count, said in (([2e9], 2, False), ([1e9, 1e9, 2e9], 3, False), ([1e9], 6, True)):
        passes.clear()
        monkeypatch.setattr(machine, "_peaks", peaks(rates))
        notes = machine.measure(2).notes
        assert len(passes) == count
        assert any("2 threads reach 1.0 times the rate of one" in note for note in notes) == said


def test_the_program_reads_every_byte_once():
    program = compiler.build()
    data = torch.arange(2 * 16384 * 3 // 8, dtype=torch.int64)
    for threads in (1, 2):
        for streams, ahead in machine._PATTERNS:
            part = data.numel() * 8 // threads
            total = program.library.bench_read(data.data_ptr(), part, threads, streams, ahead)
            assert total == data.sum().item()


@pytest.mark.parametrize("size", [1, 100_000, 3_000_000, 10_000_000])
def test_a_plain_read_goes_on_through_the_buffer(size, limits, monkeypatch):
    """A few kilobytes more or less than asked for, never the same twice in a row, never beyond the end."""
    reads, data = [], torch.zeros(2**22 // 4)

    class Library:
        def bench_read(self, address, part, threads, streams, ahead):
            assert (threads, streams, ahead) == (2, 4, 0)
            reads.append((address - data.data_ptr(), part * threads))

    program = compiler.Program(Library(), "made up", 512, True)
    monkeypatch.setattr(reading, "_prepared", lambda threads, cache_bytes: (program, data, (4, 0)))
    call = reading.plain(size, limits)
    for _ in range(3):
        call()
    assert all(start >= 0 and start + length <= 2**22 for start, length in reads)
    assert sum(length for _, length in reads) / 3 == pytest.approx(size, abs=2 * 3 * 16384)
    assert size > 2**21 or reads[0] != reads[1]


def test_lines_that_memory_bounds_stand_beside_a_plain_read(limits):
    small = replace(limits, cache_bytes=2**16, memory=1e6)
    effort = timing.Effort(0.0, 4, 4)
    line = measure.measure(replace(CASE, own=256), small, effort)
    assert line.bound == "memory"
    assert line.beside["plain read"].ratio > 0
    assert table.slower([replace(line, beside={"plain read": Beside(line.timing, 0.5)})]) == []
    assert "plain read" not in measure.measure(replace(CASE, own=256), limits, effort).beside


def test_without_a_compiler_there_is_no_plain_read(limits, monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    small = replace(limits, cache_bytes=2**16, memory=1e6)
    line = measure.measure(replace(CASE, own=256), small, timing.Effort(0.0, 4, 4))
    assert line.beside["plain read"].left_out == "/nowhere/cc is not installed"


def test_the_program_counts_its_own_flops():
    """A vector of one chain per register: the peak of bfloat16 is of pairs, and 0 says that there is none."""
    program = compiler.build()
    each, dots = program.library.bench_flops_per_round(), program.library.bench_bfloat16_flops_per_round()
    assert each % (program.bits // 32 * 2) == 0
    assert dots in (0, 2 * each)


def test_compiler_is_called_with_the_best_instruction_set(monkeypatch):
    """A tuning that the compiler does not know is passed over for the next."""
    tried = []

    def compiles(command):
        tried.append([flag for flag in command if flag.startswith(("-march", "-mcpu", "-fopenmp"))])
        return "unknown option" if "-march=native" in command else ""

    monkeypatch.setattr(compiler, "_compile", compiles)
    monkeypatch.setattr(compiler, "_load", lambda path, command, parallel: parallel)
    assert compiler.build() is True
    assert tried == [["-fopenmp", "-march=native"], ["-fopenmp", "-mcpu=native"]]


def test_threads_beyond_the_cores_are_said(monkeypatch):
    monkeypatch.setattr(topology, "cores", lambda: [0, 1])
    assert machine._thread_notes(2) == []
    assert machine._thread_notes(1) == []
    assert machine._thread_notes(4) == ["4 threads on 2 cores"]


def _cpus(folder, caches):
    """A /sys/devices/system/cpu: (level, type, size, who shares it) of every processor."""
    for cpu, entries in caches.items():
        for index, (level, kind, size, shared) in enumerate(entries):
            place = folder / f"cpu{cpu}" / "cache" / f"index{index}"
            place.mkdir(parents=True)
            for name, value in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
                (place / name).write_text(f"{value}\n")


@pytest.mark.parametrize(("threads", "size"), [(1, 16), (2, 32), (4, 32)])
def test_the_last_level_cache_is_what_the_threads_reach(threads, size, tmp_path, monkeypatch):
    """Two processors that this process may use, each by a cache of its own; a third that it may not."""
    level_one = ("1", "Data", "32K", "0")
    caches = {
        cpu: [level_one, ("3", "Unified", "16384K", shared), ("4", "Instruction", "1M", "0")]
        for cpu, shared in ((0, "0-3"), (4, "4-7"), (8, "8-11"))
    }
    _cpus(tmp_path, caches)
    monkeypatch.setattr(topology, "_CPUS", tmp_path)
    monkeypatch.setattr(topology, "cores", lambda: [0, 4])
    assert topology.last_level_cache(threads) == (size * 2**20, "L3")


@pytest.mark.parametrize(
    ("limit", "room"), [("max", None), ("1000", 700), ("400", 100), ("100", 0)]
)  # used: 500, of which 200 for files
def test_a_containers_memory_counts(limit, room, tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text("500")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 200\n")
    monkeypatch.setattr(topology, "_CGROUP", tmp_path)
    assert topology._group_memory() == room
    found = topology.available_memory()
    assert found == room if room is not None else found is None or found > 1000


# runs


def test_runs_alternate(monkeypatch):
    """One run of each in turn; calls that are short in blocks, each after one that warms up."""
    clock, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def contender(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds

        return run

    calls = {"a": contender("a", 1.0), "b": contender("b", 3.0)}
    found = timing.alternate(calls, timing.Effort(0.0, 4, 4), warm=False)
    assert "".join(order) == "ab" + "ab" * 4
    assert (found["a"].median, found["b"].median) == (1.0, 3.0)
    assert (found["a"].runs, found["b"].runs) == (4, 4)
    order.clear()
    timing.alternate({name: contender(name, 1e-4) for name in "ab"}, timing.Effort(0.0, 10, 10), warm=True)
    assert "".join(order) == "ab" + ("a" * 6 + "b" * 6) * 2


# alternatives


@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("family", ["prefill", "prefill-materialised", "prefill-raw"])
def test_alternatives_see_the_same(family, q_len, monkeypatch):
    """SDPA with projection beforehand and in the call, flex_attention and ours, to the last row."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    sharer = shapes.GEMMA3 if family == "prefill-raw" else None
    shared = 0 if family == "prefill" else 130
    case = replace(CASE, family=family, sharer=sharer, q_len=q_len, own=140, shared=shared)
    with torch.no_grad():
        made = inputs.attention(case)
        wanted = made[0].merged()
        for call in (
            alternatives.sdpa(made[0]),
            alternatives.sdpa_raw(made[0]),
            alternatives.reference(made[0]),
            alternatives.flex(made, raw=False),
            alternatives.flex(made, raw=True),
        ):
            assert not check.attention_problem(made[0], call(), wanted)


def test_flex_that_does_not_compile_is_left_out(limits, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", fail)
    line = measure.measure(replace(CASE, own=64, flex=True), limits, timing.Effort(0.0, 4, 4))
    assert line.status == "ok"
    assert line.beside["flex"].left_out == "does not compile: no C++ compiler"
    assert list(line.beside) == ["sdpa", "reference", "flex"]


def test_a_fuser_that_does_not_compile_is_left_out(limits, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", fail)
    case = replace(CASE, family="fuse", sharer=shapes.GEMMA3, shared=2, compiled=True)
    line = measure.measure(case, limits, timing.Effort(0.0, 4, 4))
    assert line.status == "ok"
    assert line.beside["compiled"].left_out == "does not compile: no C++ compiler"


# shapes


def test_the_full_run_covers_the_shapes():
    grid = shapes.grid()
    fused = [case for case in grid if case.family.startswith("fuse")]
    pairs = {(case.receiver.name, case.sharer.name) for case in grid if case.sharer and case not in fused}
    assert pairs == {
        ("Qwen3-0.6B", "Qwen2.5-0.5B"), ("Qwen3-0.6B", "Llama-3.2-1B"), ("Qwen3-0.6B", "Qwen3-4B"),
        ("SmolLM2-135M", "Gemma-3-270M"),
    }  # fmt: skip
    for family in ("fuse", "fuse-model"):
        published = {(case.receiver.name, case.sharer.name) for case in fused if case.family == family}
        assert len(published) == 7 and ("Qwen3-8B", "Qwen2.5-7B") in published
    assert {1, 64, 512, 2048} <= {case.shared for case in fused}
    assert all(case.compiled for case in fused)
    sizes = {(s.heads, s.head_dim) for s in (shapes.QWEN2_5, shapes.LLAMA3_2, shapes.QWEN3_4B, shapes.GEMMA3)}
    assert sizes == {(2, 64), (8, 64), (8, 128), (1, 256)}
    assert {(r.q_heads, r.kv_heads, r.head_dim) for r in shapes.RECEIVERS} == {(16, 8, 128), (9, 3, 64)}
    decode = [case for case in grid if case.family.startswith("decode")]
    assert {256, 16384} <= {case.own for case in decode}
    assert {0, 32768} <= {case.shared for case in decode}
    assert {1, 4, 16} <= {case.batch for case in decode}
    assert {128, 512, 2048} <= {case.q_len for case in grid if case.family == "prefill"}
    assert {128, 512, 2048} <= {case.q_len for case in grid if case.family == "prefill-raw"}
    counts = Counter((case.family, case.dtype) for case in grid)
    for family in set(shapes.FAMILIES) - {"merge", "project-int8", "backward-raw"}:
        assert all(counts[family, dtype] for dtype in shapes.DTYPES), family
    assert all(case.flex == case.family.startswith(("decode", "prefill")) for case in grid)
    assert len({case.name for case in grid}) == len(grid)


def test_the_quick_run_covers_the_families():
    grid = shapes.grid(quick=True)
    assert {case.family for case in grid} == set(shapes.FAMILIES)
    assert len(grid) < 60
    assert not any(case.flex for case in grid)


# generate


def test_generate_both_ways(tiny):
    """Tokens through the shared context are those with the text in the prompt; both are timed."""
    from c2c_kernels.cli.models import load_model

    plan = end_to_end.Plan((str(tiny),), ("float32",), (0, 24), new_tokens=6, rounds=1)
    found = list(end_to_end.run(plan, end_to_end.lines(plan, ""), load_model))
    assert [line.left_out for line in found] == ["", ""]
    assert [line.context for line in found] == [0, 24]
    for line in found:
        assert (line.same_tokens, line.new_tokens) == (6, 6)
        assert set(line.tokens_per_second) == set(line.first_token) == {"sdpa", "c2c"}
        assert min(*line.tokens_per_second.values(), *line.first_token.values()) > 0


def test_generate_that_fails_leaves_the_line_out(tiny, monkeypatch):
    from c2c_kernels.cli.models import load_model

    def fail(*_, **__):
        raise RuntimeError("no such attention")

    monkeypatch.setattr(end_to_end, "_generate", fail)
    plan = end_to_end.Plan((str(tiny),), ("float32",), (0, 24), new_tokens=6, rounds=1)
    found = list(end_to_end.run(plan, end_to_end.lines(plan, ""), load_model))
    assert [line.left_out for line in found] == ["RuntimeError: no such attention"] * 2


def test_the_full_plan_is_the_issues():
    assert end_to_end.FULL.contexts == (0, 1024, 4096, 8192)
    assert [name.rpartition("/")[2] for name in end_to_end.FULL.models] == ["SmolLM2-135M-Instruct", "gemma-3-270m"]
