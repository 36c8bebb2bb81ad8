"""The command `train`, on tiny models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import c2c_kernels as c2c
from c2c_kernels import corpus
from c2c_kernels.cli import main, prompts
from c2c_kernels.training import TrainOptions


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "asked.jsonl"
    corpus.write_questions(corpus.made_up(18, seed=1, split="fit", facts=2, per_text=2), path)
    return path


@pytest.fixture(scope="module")
def fitted(models, documents, tmp_path_factory):
    output = tmp_path_factory.mktemp("fit") / "fit.safetensors"
    pair = ["--sharer", models[0], "--receiver", models[1], "--corpus", str(documents), "--output", str(output)]
    assert main(["fit", *pair, "--window", "64", "--layers", "1", "--threads", "1"]) == 0
    return output


def arguments(models, fitted, output, *more):
    return [
        *("train", str(fitted), "--sharer", models[0], "--receiver", models[1], "--output", str(output)),
        *("--steps", "3", "--accumulate", "2", "--context", "80", "--continuation", "20", "--threads", "1"),
        *("--held-out", "2", "--validations", "1", *more),
    ]


def test_trains_on_text_and_questions(models, fitted, documents, questions, tmp_path, capsys):
    output = tmp_path / "p.safetensors"
    more = ["--corpus", str(documents), "--questions", str(questions), "--questions", "made-up"]
    assert main(arguments(models, fitted, output, *more, "--most-questions", "12", "--json")) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["bytes"] == output.stat().st_size and found["steps"] == 3
    assert set(found["windows"]) == {"text", "questions"}
    assert "held-out text: " in printed.err and "held-out questions: " in printed.err
    assert re.search(r"train 100%: loss \d", printed.err)
    projector = c2c.CacheProjector.load(output)
    assert found["texts"] == projector.facts["training"]["texts"]
    given = [d.sha256[:16] for d in corpus.read(documents) if d.split == "fit"]
    assert found["texts"][:20] == given
    asked = [*corpus.read_questions(questions)[:12], *corpus.made_up(12, seed=0, split="fit")]
    assert len(found["texts"]) == 20 + len({question.context for question in asked})
    assert projector.gate_logits is not None
    assert {path.name for path in tmp_path.iterdir()} == {"p.safetensors"}


def test_every_number_reaches_the_run(models, fitted, documents, tmp_path, capsys):
    """None of those that are given is the default."""
    given = {
        "batch": 2, "question_batch": 3, "accumulate": 1, "question_weight": 0.4, "repeat_weight": 0.2, "lr": 1e-3,
        "bias_lr": 2e-3, "gate_lr": 3e-3, "context": 81, "continuation": 19, "distill": 0.6, "match": 0.1,
        "average": 0.25, "held_out": 1, "validations": 2, "seed": 5, "checkpoint_seconds": 60.0,
    }  # fmt: skip
    assert all(getattr(TrainOptions, name) != value for name, value in given.items())
    more = ["--corpus", str(documents), "--questions", "made-up", "--most-questions", "12", "--json"]
    more += [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert main(arguments(models, fitted, tmp_path / "p.safetensors", *more)) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    assert {name: options[name] for name in given} == given


def test_says_what_it_did(models, fitted, documents, tmp_path, capsys):
    output = tmp_path / "p.safetensors"
    more = ["--corpus", str(documents), "--storage", "float32", "--dtype", "bfloat16", "--backend", "cpu"]
    assert main(arguments(models, fitted, output, *more)) == 0
    line = capsys.readouterr().out
    assert re.match(
        r".*p\.safetensors: \d+\.\d MB, 3 steps in \d+ s \(\d+ s of processor time\) over \d+ tokens; loss \d", line
    ), line


def test_trains_by_time(models, fitted, questions, tmp_path, capsys):
    output = tmp_path / "p.safetensors"
    command = arguments(models, fitted, output, "--questions", str(questions), "--json")
    at = command.index("--steps")
    command[at : at + 2] = ["--minutes", "0.02"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] >= 1 and found["seconds"] >= 1.2 and found["processor_seconds"] > 0


def test_goes_on_after_an_interruption(models, fitted, documents, tmp_path):
    """Control-C after a checkpoint; the same command again ends like a run that nothing interrupted.

    Every run is a process of its own, as a user's are: in one that had run other tests before, sums have once been seen
    to round otherwise.
    """
    outputs = [tmp_path / name for name in ("whole.safetensors", "p.safetensors")]
    more = ["--corpus", str(documents), "--storage", "float32", "--checkpoint-seconds", "0", "--steps", "30"]
    commands = [
        [sys.executable, "-m", "c2c_kernels.cli", *arguments(models, fitted, output, *more)] for output in outputs
    ]
    subprocess.run(commands[0], cwd=tmp_path, check=True, timeout=120)  # not the checkout, which has no kernels
    checkpoint = tmp_path / "p.safetensors.checkpoint"
    # What a shell starts in the background ignores Control-C, and so do its children unless told otherwise.
    process = subprocess.Popen(
        commands[1],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and error.endswith("c2c-kernels: interrupted\n"), error
    assert checkpoint.exists() and not outputs[1].exists()
    subprocess.run(commands[1], cwd=tmp_path, check=True, timeout=120)
    assert not checkpoint.exists()
    states = [c2c.CacheProjector.load(path).state_dict() for path in outputs]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.slow
def test_torchrun(models, fitted, documents, tmp_path):
    """Two processes: one file, one report, and no more than rounding from one process that accumulates."""
    outputs = [tmp_path / name for name in ("two.safetensors", "one.safetensors")]
    more = ["--corpus", str(documents), "--storage", "float32", "--steps", "1", "--gate-lr", "0.001"]
    one, two = arguments(models, fitted, outputs[1], *more), arguments(models, fitted, outputs[0], *more)
    two[two.index("--accumulate") + 1] = "1"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "c2c_kernels.cli", *two),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("two.safetensors: ") == 1
    assert main(one) == 0
    found, wanted = (c2c.CacheProjector.load(path) for path in outputs)
    assert found.facts["training"]["processes"] == 2
    assert found.facts["training"]["windows"] == wanted.facts["training"]["windows"] == {"text": 2}
    assert found.facts["training"]["curve"][0]["loss"] == pytest.approx(
        wanted.facts["training"]["curve"][0]["loss"], abs=2e-4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "{tmp}/none.safetensors"}, "none.safetensors does not exist: a projector file is wanted"),
        ({"--corpus": "{tmp}/none.jsonl"}, "--corpus .*none.jsonl"),
        ({"--questions": "{tmp}/none.jsonl"}, "--questions .*none.jsonl cannot be read"),
        ({"--corpus": None}, "--corpus or --questions is wanted"),
        ({"--output": "{tmp}/p.bin"}, r"a file name that ends in \.safetensors is wanted"),
        ({"--output": "{tmp}/no/p.safetensors"}, "there is no folder"),
        ({"--output": "{fitted}"}, "is the projector to start from: another file is wanted"),
        ({"--receiver": "{a}"}, "the receiver's model .* the projector was made for"),
        ({"--context": "4000"}, "context is 4000 tokens, the sharer's own 4096"),
        ({"--continuation": "1"}, "continuation must be at least 2, got 1"),
        ({"--steps": "0"}, "steps must be at least 1, got 0"),
        ({"--lr": "-1"}, "lr must be a number above 0, got -1"),
        ({"--distill": "2"}, r"distill must be within 0\.\.1, got 2"),
        ({"--threads": "0"}, "--threads must be at least 1, got 0"),
        ({"--most-questions": "0"}, "--most-questions must be at least 1, got 0"),
    ],
)
def test_what_cannot_be(models, fitted, documents, tmp_path, capsys, change, message):
    command = arguments(models, fitted, tmp_path / "p.safetensors", "--corpus", str(documents))
    for name, value in change.items():
        at = command.index(name) if name in command else len(command)
        new = [] if value is None else [name, value.format(tmp=tmp_path, fitted=fitted, a=models[0])]
        command[at : at + 2] = new
    assert main(command) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("c2c-kernels: ")
    assert re.search(message, line), line
    assert not (tmp_path / "p.safetensors").exists()


def test_a_damaged_projector(models, documents, tmp_path, capsys):
    path = tmp_path / "fit.safetensors"
    path.write_bytes(b"\x10\0\0\0")
    assert main(arguments(models, path, tmp_path / "p.safetensors", "--corpus", str(documents))) == 1
    assert "is truncated, damaged or no safetensors file" in capsys.readouterr().err


def test_an_answer_ends_as_the_template_ends_a_turn(tiny):
    """What the receiver is trained to write is what the template has after the prompt, to the first token after it."""
    from c2c_kernels.cli.models import load_model

    _, tokenizer = load_model(str(tiny))
    ids = prompts.answer_tokens(tokenizer, "on 3 May")
    assert tokenizer.decode(ids) == "on 3 May<|im_end|>"
    tokenizer.chat_template = None
    assert tokenizer.decode(prompts.answer_tokens(tokenizer, "on 3 May")) == " on 3 May<|im_end|>"
