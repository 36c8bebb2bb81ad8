"""What users' names, terminals, folders and files may do to the command: a right result or one line of error."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_gguf
import torch
from rich.console import Console
from threads import torch_threads

from c2c_kernels.cli import cache as cache_folder
from c2c_kernels.cli import convert, main, models, progress, prompts, report
from c2c_kernels.cli.answers import Answer
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.gguf_tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
_SYSTEM = "<|im_start|>system\nYou are a user's assistant, trained by Hugging Face<|im_end|>\n"


@pytest.fixture(autouse=True)
def _same_threads():
    with torch_threads():
        yield


@pytest.fixture
def note_file(tmp_path: Path) -> Path:
    path = tmp_path / "notes [draft].txt"
    path.write_text("The bees are in the boat.")
    return path


def _failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["demo", *arguments]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("c2c-kernels: ")
    return line


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def _outcome(name: str) -> report.Outcome:
    arms = [Answer(f"a {name}", [1, 2], 5, 0.1, 3.0) for _ in range(3)]
    row = report.QuestionRow(f"q {name}", *arms, torch.rand(3, 2, 2))
    sharer = report.SharerRow(f"s {name}", f"d {name}", 10, 4, 0.1, 4096, True)
    return report.Outcome(f"r {name}", f"o {name}", "float32", 1, "cpu", [sharer], [row], 1.0)


# prompts


@pytest.mark.parametrize("text", ["user", "Hugging Face", "S", "Question", "assistant", "\n"])
def test_a_text_that_the_template_has_too_is_cut_at_its_own_place(tiny, text):
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = _SYSTEM.replace("\n", "{{ '\\n' }}") + tiny_gguf.TEMPLATE
    prompt = prompts.build_prompt(tokenizer, text, "Who?")
    tail = "Question: Who? Answer in one short sentence.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt.prefix) == f"{_SYSTEM}<|im_start|>user\n{text}"
    assert tokenizer.decode(prompt.rest) == f"\n\n{tail}"
    assert tokenizer.decode(prompt.bare) == f"{_SYSTEM}<|im_start|>user\n{tail}"


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "{{ 'nothing' }}"])
def test_a_template_that_says_the_text_twice_or_never_is_refused(tiny, template):
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = template
    with pytest.raises(CommandError, match="does not hand the text through once"):
        prompts.build_prompt(tokenizer, "bees", "Who?")


# names and terminals


@pytest.mark.parametrize("name", ["notes [draft].txt", "[/x]", ":cat: [bold]", "end\\"])
def test_names_are_no_markup(name, capsys):
    report.print_report(_outcome(name))
    said = capsys.readouterr().out
    assert [letter for letter in "rosdq" if f"{letter} {name}" not in said] == []
    assert said.count(f"a {name}") == 3


@pytest.mark.parametrize("name", ["[draft].txt", "[/x]"])
def test_names_are_no_markup_in_a_bar(name, monkeypatch, capsys):
    monkeypatch.setattr("rich.console.Console", lambda **kinds: Console(**kinds, force_terminal=True, width=100))
    with progress.stage(f"read {name}", 3) as update:
        update(3)
    assert f"read {name}" in capsys.readouterr().err


def test_the_demo_prints_a_documents_name_whole(tiny, note_file, capsys):
    arguments = ["--receiver", str(tiny), "--document", str(note_file), "--max-new-tokens", "2", "--threads", "1"]
    assert main(["demo", *arguments]) == 0
    assert "read notes [draft].txt: " in " ".join(capsys.readouterr().out.split())


def test_an_ascii_terminal_gets_the_whole_report(tiny, note_file, cache, tmp_path):
    arguments = ["--receiver", str(tiny), "--document", str(note_file), "--question", "Où?", "--max-new-tokens", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "c2c_kernels.cli", "demo", *arguments, "--threads", "1"],
        env={**os.environ, "LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    said = done.stdout.decode("ascii")
    assert "O??" in said
    assert "in all " in said
    assert "0 to 1: ?" not in said  # digits in the place of blocks


# arguments


@pytest.mark.parametrize("option", ["--plot", "--receiver", "--document", "--sharer", "--question", "--backend"])
@pytest.mark.parametrize("value", ["", " "])
def test_empty_options_are_refused(option, value, capsys):
    assert _refused(capsys, "demo", option, value).endswith(f"argument {option}: it is empty")


@pytest.mark.parametrize("count", ["0", "1025", "100000000000000"])
@pytest.mark.parametrize("command", ["demo", "bench"])
def test_threads_have_bounds(command, count, capsys):
    assert "argument --threads: a whole number from 1 to 1024 is wanted" in _refused(
        capsys, command, "--threads", count
    )


def test_a_question_that_is_no_text_is_refused(capsys):
    assert "argument --question: text in the terminal's encoding" in _refused(capsys, "demo", "--question", "caf\udce9")


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "c2c-kernels: interrupted\n"


def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path):
    """As the installed command starts, with a torch that is interrupted on import."""
    assert 'c2c-kernels = "c2c_kernels_command:main"' in (ROOT / "pyproject.toml").read_text()
    start = "import sys; from c2c_kernels_command import main; sys.exit(main())"
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-c", start, "info"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "c2c-kernels: interrupted\n")


# folders and files


@pytest.mark.parametrize("place", ["/proc/no-such", "{tmp}/file", "{tmp}/file/below"])
def test_a_cache_folder_that_cannot_be_made(place, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("C2C_CACHE_DIR", place.format(tmp=tmp_path))
    with (
        pytest.raises(CommandError, match=r"the cache folder .* cannot be used: .*C2C_CACHE_DIR"),
        cache_folder.locked("x"),
    ):
        pass


def test_a_full_disk_while_converting(tiny, cache, monkeypatch):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(CommandError, match=r"cache folder .* cannot be used: .*No space left"):
        convert.convert(tiny, cache_folder.sha256(tiny))
    assert not list(cache.glob(".convert*[!k]"))


def test_what_a_killed_run_left_is_removed(tiny, cache):
    script = (
        "import os, sys, pathlib; from c2c_kernels.cli import convert;"
        "convert._save_weights = lambda model, folder: os._exit(9);"
        "convert.convert(pathlib.Path(sys.argv[1]), 'x')"
    )
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script, str(tiny)], env=path).returncode == 9
    assert len(list(cache.glob(".convert*/model"))) == 1
    other, left = cache / ".convert-other", cache / ".convert-left"
    for folder in (other, left):
        (folder / "model").mkdir(parents=True)
    with cache_folder.locked("other"):  # another model is being made, and a run that made a third was killed
        convert.convert(tiny, cache_folder.sha256(tiny))
    assert list(cache.glob(".convert*")) == [other]


def test_staging_starts_empty(cache):
    (cache / ".work").mkdir(parents=True)
    (cache / ".work" / "old").touch()
    with cache_folder.staging("work") as folder:
        assert list(folder.iterdir()) == []
    assert not folder.exists()


def test_a_plot_that_cannot_be_written_is_refused_before_the_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("c2c_kernels.cli.demo._load", lambda *_: pytest.fail("loaded a model"))
    (tmp_path / "folder.png").mkdir()
    assert "folder.png is a folder" in _failure(capsys, "--plot", str(tmp_path / "folder.png"))
    assert "cannot be written: " in _failure(capsys, "--plot", "/proc/map.png")


def test_a_plot_that_fails_is_one_line(tiny, note_file, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")

    def full(*_):
        assert not (tmp_path / "map.png").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("c2c_kernels.cli.plot.draw", full)
    arguments = ["--receiver", str(tiny), "--document", str(note_file), "--max-new-tokens", "1", "--threads", "1"]
    line = _failure(capsys, *arguments, "--plot", str(tmp_path / "map.png"))
    assert "map.png cannot be written: No space left" in line


def _nested() -> bytes:
    arrays = struct.pack("<IQ", 9, 1) * 5000
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9) + arrays


@pytest.mark.parametrize(
    "damage", ["tensors", "counts", "noise", "empty", "nested", "cut", "count", "id", "heads", "merge"]
)
def test_a_damaged_gguf_file_is_named(tiny, tmp_path, damage):
    good = tiny.read_bytes()
    count = len(tiny_gguf.SPECIAL) + 256 + len(tiny_gguf.MERGES)  # tokens
    made = {
        "tensors": good[:8] + struct.pack("<Q", 2**60) + good[16:],
        "counts": good[:16] + struct.pack("<Q", 2**63) + good[24:],
        "noise": good[:24] + b"\xff" * 400,
        "empty": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
        "nested": _nested(),
        "cut": good[:-5000],
        "count": good.replace(
            b"token_type" + struct.pack("<III", 9, 5, count), b"token_type" + struct.pack("<III", 9, 5, 2**31)
        ),
        "id": good.replace(b"bos_token_id" + struct.pack("<II", 4, 1), b"bos_token_id" + struct.pack("<II", 4, 99999)),
        "heads": good.replace(b"head_count" + struct.pack("<II", 4, 4), b"head_count" + struct.pack("<II", 4, 0)),
        "merge": good.replace(b"h e", b"h_e"),
    }
    path = tmp_path / "bad.gguf"
    assert made[damage] != good
    path.write_bytes(made[damage])
    with pytest.raises(CommandError, match=r"bad\.gguf (is a damaged|cannot be loaded)") as caught:
        models.load_model(str(path))
    assert "\n" not in str(caught.value)
