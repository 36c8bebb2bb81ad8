"""`c2c-kernels bench`: what it prints, writes and refuses, and that it goes on without what is missing."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import c2c_kernels as c2c
from c2c_kernels.bench import environment, machine, measure, page, shapes, table, timing
from c2c_kernels.bench.results import Beside, Line
from c2c_kernels.cli import main
from c2c_kernels.cli.models import Source

ROOT = Path(__file__).resolve().parents[2]
MERGE = ("--quick", "--filter", "merge smollm2")
DECODE = ("--quick", "--filter", "decode smollm2 float32 own=4096")
TIMING = {"median", "low", "high", "shortest", "runs"}


def _bench(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[str, str]:
    """(standard output, standard error) of the command."""
    assert main(["bench", *arguments]) == status
    said = capsys.readouterr()
    return said.out, said.err


def _json(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str, status: int = 0) -> dict:
    _bench(capsys, *arguments, "--json", str(folder / "bench.json"), status=status)
    return json.loads((folder / "bench.json").read_text())


# what it prints and writes


def test_json_has_everything(quickly, tmp_path, capsys):
    found = _json(capsys, tmp_path, *DECODE, "--threads", "2")
    assert torch.get_num_threads() == 2
    assert set(found) == {
        "schema", "command", "environment", "machine", "machine_after", "lines", "choices", "generations", "wrong",
        "notes", "seconds",
    }  # fmt: skip
    assert found["schema"] == 1
    assert found["command"] == "c2c-kernels bench --quick --filter 'decode smollm2 float32 own=4096' --threads 2"
    assert set(found["machine"]) == {"threads", "memory", "cache", "peaks", "cache_bytes", "method", "notes", "device"}
    assert found["machine"] == found["machine_after"]
    (line,) = found["lines"]
    assert (line["family"], line["label"], line["dtype"]) == ("decode", "SmolLM2-135M float32 own=4096", "float32")
    assert (line["status"], line["reason"]) == ("ok", "")
    assert set(line["timing"]) == TIMING
    assert line["timing"]["low"] <= line["timing"]["median"] <= line["timing"]["high"]
    assert line["fraction"] == pytest.approx(line["floor"] / line["timing"]["median"])
    assert set(line["beside"]) == {"sdpa", "reference"}
    for beside in line["beside"].values():
        assert beside["ratio"] == pytest.approx(beside["timing"]["median"] / line["timing"]["median"])


def test_json_says_on_what(quickly, tmp_path, capsys):
    found = _json(capsys, tmp_path, *MERGE)["environment"]
    record = next(record for record in c2c.backends() if record.name == found["backend"])
    assert found["device"] == "cpu"
    assert found["cpu"]
    assert found["isa"] == record.isa
    assert found["cores"] >= 1
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["c2c-kernels"] == c2c.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])


def test_json_has_the_commit(quickly, monkeypatch, tmp_path, capsys):
    """Of the checkout that the package is in, with a word for changes; of none outside of one."""
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    assert _json(capsys, tmp_path, *MERGE)["environment"]["commit"] is None
    header = tmp_path / "csrc" / "include" / "c2c.h"
    header.parent.mkdir(parents=True)
    header.write_text("one\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    for command in (("init", "-q"), ("add", "csrc"), ("commit", "-q", "-m", "one")):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert _json(capsys, tmp_path, *MERGE)["environment"]["commit"] == head[:12]
    header.write_text("two\n")
    assert _json(capsys, tmp_path, *MERGE)["environment"]["commit"] == f"{head[:12]}-dirty"


def test_the_table_has_every_column(quickly, capsys):
    out, _ = _bench(capsys, *DECODE)
    title, headings, row = out[out.index("decode: one token") :].splitlines()[:3]
    assert title == "decode: one token, own cache alone"
    assert re.split(r"\s{2,}", headings.strip()) == [
        "time", "of the floor", "bound by", "sdpa takes", "reference takes", "bytes", "FLOPs", "read", "computed",
    ]  # fmt: skip
    wanted = (
        r"SmolLM2-135M float32 own=4096\s+[\d.]+ [mµ]?s\s+\d+%\s+cache\s+[\d.]+x\s+[\d.]+x\s+6\.30 MB\s+9\.44 MFLOP"
        r"\s+[\d.]+ [MG]B/s\s+[\d.]+ [MG]FLOP/s"
    )
    assert re.fullmatch(wanted, row)


def test_the_figures_of_a_row():
    ours, theirs = (timing.Timing(s, s, s, s, 5) for s in (2e-3, 6e-3))
    line = Line(
        "merge", "here", "float32", timing=ours, bytes=4e6, flops=8e9, floor=1e-3, bound="memory", fraction=0.5,
        beside={"torch": Beside(theirs, 3.0), "reference": Beside(left_out="small shapes only")},
    )  # fmt: skip
    made = table.family_table("merge", [line])
    assert made.rows == [
        ["here", "2.00 ms", "50%", "memory", "3.00x", "–", "4.00 MB", "8.00 GFLOP", "2.00 GB/s", "4.00 TFLOP/s"]
    ]
    assert made.below == ["reference left out of 1 of 1 lines: small shapes only"]
    assert made.headings[4:6] == ["torch takes", "reference takes"]


def test_the_plot_is_a_picture(quickly, tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "bench.png"
    _bench(capsys, *MERGE, "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = image.imread(path)
    assert min(picture.shape[:2]) > 400
    assert picture.std() > 0.05  # something is drawn


def test_markdown_goes_between_the_marks(quickly, tmp_path, capsys):
    path = tmp_path / "page.md"
    path.write_text(f"above\n{page.BEGIN}\nold\n{page.END}\nbelow\n")
    for _ in range(2):
        _bench(capsys, *MERGE, "--markdown", str(path))
    head, _, rest = path.read_text().partition(page.BEGIN)
    figures, _, tail = rest.partition(page.END)
    assert (head, tail) == ("above\n", "\nbelow\n")
    assert "old" not in figures
    assert figures.count("| SmolLM2-135M float32 q_len=512 states=2 |") == 1
    assert "    c2c-kernels bench --quick --filter 'merge smollm2' --threads" in figures


def test_the_page_has_the_marks():
    assert page.has_marks(ROOT / "bench" / "README.md")


def test_the_quick_run_measures_the_machine(small_machine, tmp_path, capsys):
    found = _json(capsys, tmp_path, *MERGE)
    assert [line["status"] for line in found["lines"]] == ["ok"]
    for limits in (found["machine"], found["machine_after"]):
        assert min(limits["memory"], limits["cache"], *limits["peaks"].values()) > 1e6
        assert limits["peaks"]["float32"] <= min(limits["peaks"].values())
    assert "--quick leaves out flex_attention, whose compilation takes seconds for every shape" in found["notes"]


def test_without_compilation_nothing_is_compiled(quickly, tmp_path, capsys):
    found = _json(capsys, tmp_path, "--no-compile", "--filter", "decode smollm2 float32 own=256", "--dtype", "float32")
    assert [list(line["beside"]) for line in found["lines"]] == [["sdpa", "reference"]]
    assert "--no-compile leaves out flex_attention and torch.compile" in found["notes"]
    assert "--no-compile" in found["command"]


# wrong results


def _perturbed(name: str, size: float, place: tuple[int, ...]):
    """The operator, one element of whose (first) result is off."""
    right = getattr(c2c, name)

    def run(*arguments, **options):
        result = right(*arguments, **options)
        with torch.no_grad():
            first = (result if isinstance(result, torch.Tensor) else result[0]).detach()
            first[place] += size
        return result

    return run


@pytest.mark.parametrize(
    ("operator", "words", "size", "place"),
    [
        ("merged_attention", "decode smollm2 float32 own=4096", 1e-2, (0, 0, 0, 0)),
        ("merged_attention", "decode smollm2 float32 own=4096", float("nan"), (0, -1, 0, -1)),
        ("merged_attention", "decode-absorbed smollm2", 0.2, (0, -1, 0, 3)),
        ("merged_attention", "prefill smollm2 float32", 1e-2, (0, 4, 17, 5)),  # a row without an oracle
        ("project_kv", "project smollm2 shared=512", 0.5, (0, 2, 0, 0)),
        ("merge_states", "merge smollm2", 1e-2, (0, -1, -1, 0)),
    ],
)
def test_a_wrong_result_is_not_timed(operator, words, size, place, quickly, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(c2c, operator, _perturbed(operator, size, place))
    monkeypatch.setattr(measure, "alternate", lambda *_, **__: pytest.fail("timed"))
    path = tmp_path / "bench.json"
    out, err = _bench(capsys, "--quick", "--filter", words, "--json", str(path), status=1)
    line, *others = json.loads(path.read_text())["lines"]
    assert (line["status"], line["timing"], line["beside"]) == ("wrong", None, {})
    assert all(other["status"] == "wrong" for other in others)
    assert f"WRONG, not timed: {line['family']} {line['label']}: {line['reason']}" in err
    assert re.search(rf"{re.escape(line['label'])}\s+WRONG\s+–", out)
    assert f"WRONG, not timed: {line['label']}: {line['reason']}" in out


def test_wrong_gradients_are_not_timed(quickly, monkeypatch, capsys):
    right = c2c.merged_attention

    def run(query, *arguments, **options):
        return right(query * 1.001 - query.detach() * 0.001, *arguments, **options)  # the result is right

    monkeypatch.setattr(c2c, "merged_attention", run)
    monkeypatch.setattr(measure, "alternate", lambda *_, **__: pytest.fail("timed"))
    _, err = _bench(capsys, "--quick", "--filter", "backward smollm2 float32", status=1)
    assert "WRONG, not timed: backward SmolLM2-135M float32 q_len=512 own=512: grad_query is off by" in err


def test_a_call_that_raises_is_wrong(quickly, monkeypatch, capsys):
    def refuse(*_, **__):
        raise ValueError("no such kernel\nand more")

    monkeypatch.setattr(c2c, "merge_states", refuse)
    _, err = _bench(capsys, *MERGE, status=1)
    assert "WRONG, not timed: merge SmolLM2-135M float32 q_len=512 states=2: ValueError: no such kernel\n" in err


def test_a_wrong_strategy_is_not_timed(quickly, monkeypatch, capsys):
    monkeypatch.setattr(c2c, "merged_attention", _perturbed("merged_attention", 0.2, (0, 0, 0, 0)))
    monkeypatch.setattr("c2c_kernels.bench.explain.alternate", lambda *_, **__: pytest.fail("timed"))
    words = "explain smollm2 q_len=16 shared=1024"
    _, err = _bench(capsys, "--quick", "--explain", "--filter", words, status=1)
    name = "explain SmolLM2-135M < Gemma-3-270M bfloat16 q_len=16 own=16 shared=1024"
    assert f"WRONG, not timed: {name}: strategy absorb: out is off by" in err


def test_want_of_memory_is_not_wrong(quickly, monkeypatch, capsys):
    def refuse(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")

    monkeypatch.setattr(c2c, "merge_states", refuse)
    out, _ = _bench(capsys, *MERGE)
    assert "left out: SmolLM2-135M float32 q_len=512 states=2: RuntimeError: DefaultCPUAllocator" in out


def test_little_memory_leaves_lines_out(quickly, monkeypatch, capsys):
    monkeypatch.setattr(measure.topology, "available_memory", lambda: 10_000_000)
    out, _ = _bench(capsys, "--quick", "--filter", "decode own=4096 float32")
    assert "left out: Qwen3-0.6B float32 own=4096: needs 0.1 GB of memory, 0.0 GB are there" in out


# without what is missing


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        (None, "no C compiler is installed (cc, gcc or clang)"),
        ("/nowhere/cc", "/nowhere/cc is not installed"),
        ("false", "false does not compile it"),
    ],
)
def test_without_a_compiler_torch_measures(compiler, said, small_machine, quickly_timed, monkeypatch, tmp_path, capsys):
    if compiler is None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr("shutil.which", lambda name: None)
    else:
        monkeypatch.setenv("CC", compiler)
    found = _json(capsys, tmp_path, *MERGE)
    assert [line["status"] for line in found["lines"]] == ["ok"]
    (note,) = [note for note in found["machine"]["notes"] if "torch" in note]
    assert note.startswith("limits measured with torch, which reaches less than the machine can: ")
    assert said in note
    assert found["machine"]["method"] == "torch: sum of a tensor, matrix product"


def test_on_one_core(small_machine, quickly_timed, monkeypatch, capsys):
    monkeypatch.setattr(machine.topology, "cores", lambda: [0])
    out, _ = _bench(capsys, *MERGE)
    assert "one core: nothing is measured with several threads" in out
    assert ", 1 core; kernels: " in out


@pytest.fixture
def quickly_timed(monkeypatch):
    monkeypatch.setattr(measure, "QUICK", timing.Effort(seconds=0.0, least=4, most=4))


@pytest.mark.parametrize("statement", ["raise ImportError('libpng is missing')", "raise AttributeError('old numpy')"])
def test_without_matplotlib_there_is_no_plot(statement, quickly, broken, monkeypatch, tmp_path, capsys):
    broken("matplotlib", statement)
    monkeypatch.delitem(sys.modules, "c2c_kernels.bench.plot", raising=False)
    monkeypatch.delattr("c2c_kernels.bench.plot", raising=False)
    found = _json(capsys, tmp_path, *MERGE, "--plot", str(tmp_path / "bench.png"))
    assert [line["status"] for line in found["lines"]] == ["ok"]
    reason = statement.split("'")[1]
    wanted = f"no plot: matplotlib cannot be imported ({reason}); pip install 'c2c-kernels[bench]'"
    assert wanted in found["notes"]
    assert not (tmp_path / "bench.png").exists()


@pytest.mark.parametrize("statement", ["raise ImportError('gone')", "raise AttributeError('half an installation')"])
def test_without_rich_progress_is_lines(statement, quickly, broken, capsys):
    broken("rich", statement)
    _, err = _bench(capsys, *MERGE)
    assert re.search(r"measure merge \.\.\. [\d.]+ s", err)


@pytest.mark.parametrize("statement", ["raise ImportError('gone')", "raise RuntimeError('wrong torch')"])
def test_without_transformers_nothing_is_generated(statement, quickly, broken, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("c2c_kernels.cli.models.resolve", lambda spec: Source(tmp_path, "folder"))
    broken("transformers", statement)
    found = _json(capsys, tmp_path, "--quick", "--end-to-end", "--filter", "generate context=0")
    assert [(line["context"], line["left_out"]) for line in found["generations"]] == [(0, statement.split("'")[1])]


def test_without_kernels_the_reference_is_measured(quickly, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("C2C_BACKEND", "reference")
    found = _json(capsys, tmp_path, *MERGE)
    assert found["environment"]["backend"] == "reference"
    assert [line["status"] for line in found["lines"]] == ["ok"]
    assert any(note.startswith("every line is the reference's") for note in found["notes"])


def test_a_full_disk_does_not_take_the_other_files(quickly, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("c2c_kernels.bench.plot.draw", full)
    plot = tmp_path / "bench.png"
    arguments = (*MERGE, "--json", str(tmp_path / "bench.json"), "--plot", str(plot))
    _, err = _bench(capsys, *arguments, status=1)
    assert f"c2c-kernels: --plot {plot} cannot be written: No space left on device" in err
    assert json.loads((tmp_path / "bench.json").read_text())["lines"]


def test_what_is_asked_for_and_not_there_is_said(quickly, tmp_path, capsys):
    found = _json(capsys, tmp_path, *MERGE, "--explain", "--end-to-end", "--dtype", "float32")
    for option in ("--explain", "--end-to-end"):
        assert f"{option} leaves out everything: it has no line of those asked for" in found["notes"]


def test_a_machine_that_changes_is_said(quickly, monkeypatch, limits, capsys):
    slower = machine.Machine(2, 20e9, 80e9, {**limits.peaks, "float32": 150e9}, limits.cache_bytes, "made up")
    monkeypatch.setattr(machine, "measure", lambda threads=None: slower if threads else limits)
    out, _ = _bench(capsys, *MERGE)
    assert "the machine changed while it was measured: float32 peak from 200 to 150 G/s" in out
    assert out.count("the machine changed") == 1


# wrong arguments


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr(machine, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("measured"))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8' (choose from .?float32.?, .?bfloat16.?, .?fl"),
        (("--threads", "0"), "argument --threads: a whole number from 1 to 1024 is wanted, got '0'"),
        (("--threads", "two"), "argument --threads: a whole number from 1 to 1024 is wanted, got 'two'"),
        (("--json", ""), "argument --json: it is empty"),
        (("--quick", "fast"), "unrecognized arguments: fast"),
    ],
)
def test_wrong_values_are_named(arguments, wanted, nothing_runs, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    assert re.search(wanted.replace("(", r"\("), capsys.readouterr().err)


def _failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    out, err = _bench(capsys, *arguments, status=1)
    assert out == ""
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--json", "{tmp}"), "--json {tmp} is a folder: a file name is wanted"),
        (("--json", "{tmp}/no/x.json"), "--json {tmp}/no/x.json: there is no folder {tmp}/no"),
        (("--json", "/proc/x.json"), "--json /proc/x.json cannot be written: "),
        (("--plot", "{tmp}/x.svg"), "--plot {tmp}/x.svg: a file name that ends in .png is wanted"),
        (("--plot", "{tmp}/folder.png"), "--plot {tmp}/folder.png is a folder: a file name that ends in .png is wan"),
        (("--markdown", "{tmp}/x.md"), "--markdown {tmp}/x.md: lines <!-- figures:start --> and <!-- figures:end --> "),
        (("--markdown", "{tmp}/x.bin"), "--markdown {tmp}/x.bin cannot be read: "),
    ],
)  # fmt: skip
def test_files_that_cannot_be_written_are_named(arguments, wanted, nothing_runs, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "x.md").write_text("no marks")
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\xfd")
    option, value = arguments
    line = _failure(capsys, option, value.format(tmp=tmp_path))
    assert line.startswith(f"c2c-kernels: {wanted.format(tmp=tmp_path)}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "x.bin", "x.md"]


@pytest.mark.parametrize(
    ("arguments", "among"),
    [
        ((), ""),
        (("--quick",), " of --quick"),
        (("--quick", "--dtype", "float16"), " of --quick --dtype float16"),
    ],
)
def test_a_filter_that_matches_nothing_is_named(arguments, among, nothing_runs, capsys):
    line = _failure(capsys, *arguments, "--filter", "decode bees")
    assert f"--filter 'decode bees': no line{among} has all these words in its name; words of a name such as" in line
    assert "decode Qwen3-0.6B float32 own=256" in line
    for family in shapes.FAMILIES:
        assert family in line
    assert "names that begin with generate need --end-to-end" in line


def test_a_backend_that_is_unknown_is_named(nothing_runs, monkeypatch, capsys):
    monkeypatch.setenv("C2C_BACKEND", "bees")
    line = _failure(capsys, *MERGE)
    assert "C2C_BACKEND: backend must be one of cuda, triton, flash-attn, cpu, reference; got 'bees'" in line


# bench/


def _bench_folder():
    """bench/conftest.py as a module."""
    spec = importlib.util.spec_from_file_location("bench_conftest", ROOT / "bench" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Recorder:
    """Stands for pytest-benchmark's fixture."""

    enabled = True

    def __init__(self) -> None:
        self.calls, self.extra_info = [], {}

    def __call__(self, call) -> None:
        self.calls.append(call())
        self.stats = type("Fixture", (), {"stats": type("Stats", (), {"median": 0.5})})


class _Request:
    def __init__(self, limits) -> None:
        self.limits = limits

    def getfixturevalue(self, name):
        assert name == "limits"
        return self.limits


def _measured(limits):
    return _bench_folder().measured.__wrapped__(_Request(limits))


def test_the_folder_adds_what_a_line_costs(limits):
    (case,) = shapes.grid(quick=True, text="merge smollm2")
    recorder = _Recorder()
    _measured(limits)(recorder, case, "ours")
    outs, lse = 9 * 512 * 64 * 4, 9 * 512 * 4
    cost = 3 * (outs + lse)
    assert recorder.extra_info == pytest.approx(
        {"bytes": cost, "flops": 4 * outs / 4, "floor": cost / 80e9, "bound": "cache", "fraction": cost / 80e9 / 0.5}
    )
    assert len(recorder.calls) == 1
    assert recorder.group == case.name


def test_the_folder_does_not_time_wrong_results(limits, monkeypatch):
    monkeypatch.setattr(c2c, "merge_states", _perturbed("merge_states", 1e-2, (0, 0, 0, 0)))
    (case,) = shapes.grid(quick=True, text="merge smollm2")
    recorder = _Recorder()
    with pytest.raises(pytest.fail.Exception, match="not timed: merge SmolLM2-135M .*: out is off by"):
        _measured(limits)(recorder, case, "ours")
    assert recorder.calls == []


def test_the_folder_runs(tmp_path):
    """Under pytest-benchmark, where it is installed; a plain pytest does not collect it."""
    pytest.importorskip("pytest_benchmark")
    settings = ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-q", "--benchmark-disable"]
    command = [sys.executable, "-m", "pytest", *settings, str(ROOT / "bench"), "-k", "merge and SmolLM2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)  # not by the folder without kernels
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    text = (ROOT / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in text


def test_medians_are_of_all_runs():
    times = iter([9.0, 1.0, 2.0, 30.0])
    made = timing._summary(list(times))
    assert made.median == statistics.median([9.0, 1.0, 2.0, 30.0]) == 5.5
    assert (made.shortest, made.runs) == (1.0, 4)
