"""The command: `info`, `demo`, and what it says to wrong arguments."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from threads import torch_threads
from transformers import LlamaConfig, LlamaForCausalLM

import c2c_kernels as c2c
from c2c_kernels.cli import demo, documents, main, plot, report
from c2c_kernels.cli.answers import Answer
from c2c_kernels.cli.documents import Document
from c2c_kernels.cli.gguf_tokenizer import load_tokenizer
from c2c_kernels.cli.prompts import build_prompt

_PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _two_threads():
    with torch_threads(2):
        yield


@pytest.fixture
def note_file(tmp_path: Path) -> Path:
    path = tmp_path / "note.txt"
    path.write_text("The first paragraph is about bees.\n\nThe second one is about boats.\n\nThe third is short.\n")
    return path


def _failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says on its one line of error."""
    assert main(arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("c2c-kernels: ")
    return line


def _demo(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["demo", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


# info


def test_info_json(capsys):
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert set(info) == {"versions", "machine", "isa", "threads", "devices", "backends"}
    assert info["versions"]["c2c-kernels"] == c2c.__version__
    assert info["versions"]["torch"] == torch.__version__
    assert info["threads"] == 2
    assert [record["name"] for record in info["backends"]] == [record.name for record in c2c.backends()]
    for record in info["backends"]:
        assert set(record) == {"name", "available", "reason", "devices", "dtypes", "isa", "verified"}
        assert record["available"] != bool(record["reason"])


def test_info_needs_torch_alone():
    script = """
        import sys
        for name in ("transformers", "gguf", "rich", "matplotlib", "accelerate", "huggingface_hub"):
            sys.modules[name] = None
        from c2c_kernels.cli import main
        sys.exit(main(["info"]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout
    assert "backends, fastest first" in done.stdout


# arguments


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name in ("rich", "gguf") else True)
    assert _failure(capsys, "demo").endswith("demo needs gguf, rich: pip install 'c2c-kernels[demo]'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--document", "{tmp}/none.txt"], "none.txt cannot be read: No such file"),
        (["--document", "{tmp}/empty.txt"], "empty.txt is empty: a text is wanted"),
        (["--document", "{tmp}/binary.txt"], "binary.txt is not UTF-8 text"),
        (["--document", "{tmp}"], "cannot be read: Is a directory"),
        (["--backend", "vulkan"], "backend must be one of .*reference.*got 'vulkan'"),
        (["--backend", "cuda"], "cannot run on the backend asked for"),
        (["--plot", "map.pdf"], "ends in .png is wanted"),
        (["--plot", "{tmp}/none/map.png"], "there is no folder"),
        (["--document", "{tmp}/a.txt"] * 3 + ["--sharer", "x", "--sharer", "x"], "2 sharers and 3 documents"),
        (["--document", "{tmp}/a.txt", "--sharer", "x", "--sharer", "x"], "1 paragraphs, too few for 2 sharers"),
        (["--sharer", "gemma3-270m"], "its model_type is gemma3_text, the receiver's llama.*fitted projector"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, capsys, cache, no_network):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "a.txt").write_text("one paragraph")
    line = _failure(capsys, "demo", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert re.search(message, line), line


@pytest.mark.parametrize("arguments", [[], ["demo", "--threads", "0"], ["demo", "--max-new-tokens", "x"], ["fly"]])
def test_argparse_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: c2c-kernels" in capsys.readouterr().err


# documents and prompts


def test_documents_are_dealt():
    long = Document("d", "\n\n".join(["a" * 10, "b" * 10, "c" * 20, "d" * 40]))
    assert documents.deal([long], 1) == [long]
    assert [part.text[0] for part in documents.deal([long], 2)] == ["a", "d"]
    assert [part.text[0] for part in documents.deal([long], 4)] == ["a", "b", "c", "d"]
    assert "\n\n".join(part.text for part in documents.deal([long], 3)) == long.text
    two = [Document("x", "x"), Document("y", "y")]
    assert documents.deal(two, 1) == documents.deal(two, 2) == two


def test_questions_are_chosen():
    assert len(documents.choose_questions(None, own_document=False)) == 3
    assert documents.choose_questions(None, own_document=True) == [documents.QUESTION_FOR_ANY_TEXT]
    assert documents.choose_questions([" Who  is it? "], own_document=True) == ["Who is it?"]


def test_prompts_are_cut_between_tokens(smollm2_gguf):
    """The cut after the text falls where the tokenizer cuts anyway, and no question shows before it."""
    tokenizer = load_tokenizer(smollm2_gguf)
    text = documents.default_document().text
    prompts = [build_prompt(tokenizer, text, question) for question in documents.default_questions()]
    for prompt in prompts:
        both = prompt.prefix + prompt.rest
        assert tokenizer(tokenizer.decode(both), add_special_tokens=False).input_ids == both
        assert prompt.prefix == prompts[0].prefix
        assert len(prompt.bare) < 60


# the report


def test_bar_and_sizes():
    assert report.bar([0.0, 0.12, 0.13, 0.5, 0.999, 1.0]) == "▁▁▂▅██"
    assert [report.size(count) for count in (0, 999, 1000, 49_674_240)] == ["0 B", "999 B", "1.0 kB", "49.7 MB"]


def _row(text_tokens: list[int], cache_tokens: list[int]) -> report.QuestionRow:
    arms = [Answer("x", tokens, 5, 0.1, None) for tokens in ([1], text_tokens, cache_tokens)]
    return report.QuestionRow("Who?", *arms, torch.rand(3, 2, len(cache_tokens)))


def _outcome(rows: list[report.QuestionRow], *, same_weights: bool = True) -> report.Outcome:
    sharer = report.SharerRow("m", "d", 10, 4, 0.1, 4096, same_weights)
    return report.Outcome("m", "folder", "float32", 2, "cpu", [sharer], rows, 1.0)


@pytest.mark.parametrize(
    ("rows", "same_weights", "verdict"),
    [
        (_row([1, 2], [1, 2]), True, "yes, all 2"),
        (_row([1, 2], [1, 3]), True, "no, they part after 1 tokens"),
        (_row([1, 2, 3], [1, 2]), True, "no, they part after 2 tokens"),
        (_row([1, 2], [5]), False, "promised for one sharer"),
    ],
)
def test_the_report_says_whether_tokens_are_the_same(rows, same_weights, verdict, capsys):
    report.print_report(_outcome([rows], same_weights=same_weights))
    assert verdict in " ".join(capsys.readouterr().out.split())


def test_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [_row([1], [1, 2, 3]), _row([1], [1])]
    plot.draw(_outcome(rows), [["a", " b", "\n"], ["$x_"]], tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(_PNG)


# the demo


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, str]:
    """Tiny random models in folders with the tiny GGUF file's tokenizer; all but "wide" fit each other."""
    root, tokenizer = tmp_path_factory.mktemp("folders"), load_tokenizer(tiny)
    made = {}
    kinds = (("a", 0, 2, 2048), ("b", 1, 2, 2048), ("wide", 0, 4, 2048), ("short", 0, 2, 100))
    for name, seed, kv_heads, context in kinds:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=context,
            eos_token_id=2,
            bos_token_id=1,
            pad_token_id=2,
            initializer_range=0.3,
        )
        LlamaForCausalLM(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        made[name] = str(root / name)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_demo_with_a_tiny_model(folders, note_file, capsys, dtype):
    outcome = _demo(
        capsys, "--receiver", folders["a"], "--document", str(note_file), "--max-new-tokens", "6", "--dtype", dtype
    )
    (sharer,), (question,) = outcome["sharers"], outcome["questions"]
    assert outcome["identical_expected"]
    assert sharer["same_weights"]
    # 3 layers, keys and values, 2 heads of 8
    assert sharer["cache_bytes"] == 3 * 2 * 2 * 8 * sharer["tokens"] * (4 if dtype == "float32" else 2)
    assert sharer["document_bytes"] == len(note_file.read_text().strip())
    assert question["question"] == documents.QUESTION_FOR_ANY_TEXT
    if dtype == "float32":
        assert question["identical"]
    answers = question["answers"]
    assert answers["text"]["prompt_tokens"] == sharer["tokens"] + answers["cache"]["prompt_tokens"]
    assert len(question["attention_share"]) == 3
    assert all(0 < share < 1 for share in question["attention_share"])


def test_demo_with_a_gguf_file(tiny, note_file, capsys):
    outcome = _demo(capsys, "--receiver", str(tiny), "--document", str(note_file), "--max-new-tokens", "4")
    assert outcome["origin"] == "GGUF file"
    assert outcome["questions"][0]["identical"]


def test_demo_with_several_sharers(folders, note_file, capsys):
    outcome = _demo(
        capsys,
        *("--receiver", folders["a"], "--sharer", folders["a"], "--sharer", folders["b"]),
        *("--document", str(note_file), "--question", "Who?", "--question", "Where?", "--max-new-tokens", "4"),
    )
    assert [sharer["same_weights"] for sharer in outcome["sharers"]] == [True, False]
    assert [sharer["document"][-11:] for sharer in outcome["sharers"]] == ["part 1 of 2", "part 2 of 2"]
    assert not outcome["identical_expected"]
    assert len(outcome["questions"]) == 2


def test_one_sharer_reads_several_documents(folders, note_file, capsys):
    outcome = _demo(capsys, "--receiver", folders["a"], *("--document", str(note_file)) * 2, "--max-new-tokens", "2")
    assert len(outcome["sharers"]) == 2
    assert not outcome["identical_expected"]


def test_a_sharer_of_another_shape_is_refused(folders, note_file, capsys):
    line = _failure(
        capsys, "demo", "--receiver", folders["a"], "--sharer", folders["wide"], "--document", str(note_file)
    )
    assert "its num_key_value_heads is 4, the receiver's 2" in line
    assert "needs a fitted projector (--pair, --projector)" in line


def test_a_document_beyond_the_context_is_refused(folders, tmp_path, capsys):
    (tmp_path / "long.txt").write_text("word " * 200)
    line = _failure(capsys, "demo", "--receiver", folders["short"], "--document", str(tmp_path / "long.txt"))
    assert "the receiver's context holds 100: a shorter document is wanted" in line


def test_threads_are_set(folders, note_file, capsys):
    arguments = ("--receiver", folders["a"], "--document", str(note_file), "--max-new-tokens", "1", "--threads", "1")
    outcome = _demo(capsys, *arguments)
    assert outcome["threads"] == torch.get_num_threads() == 1
    assert outcome["questions"][0]["answers"]["cache"]["tokens_per_second"] is None


@pytest.mark.slow
def test_demo_on_the_real_model(smollm2_gguf, tmp_path, capsys):
    """The default demo: right answers with the text and through the cache, the same tokens, wrong ones without."""
    pytest.importorskip("matplotlib")
    # one thread: with several test processes side by side, more would wait for each other
    outcome = _demo(capsys, "--plot", str(tmp_path / "map.png"), "--max-new-tokens", "16", "--threads", "1")
    assert (tmp_path / "map.png").read_bytes().startswith(_PNG)
    for question, fact in zip(outcome["questions"], ("Admiral", "second of June", "fish knife"), strict=True):
        assert question["identical"], question
        assert fact in question["answers"]["cache"]["text"]
        assert fact not in question["answers"]["none"]["text"]
        assert len(question["attention_share"]) == 30
        assert max(question["attention_share"]) > 0.5
