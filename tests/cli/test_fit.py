"""The command `fit`, on tiny models."""

from __future__ import annotations

import json
import random
import re

import pytest
import tiny_gguf

import c2c_kernels as c2c
from c2c_kernels.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(tiny_gguf.write(folder / f"{name}.gguf", seed=seed)) for name, seed in (("a", 1), ("b", 2))]


@pytest.fixture
def corpus(tmp_path):
    draw = random.Random(4)
    words = ["the", "cat", "reads", "a", "book", "about", "boats", "and", "bees", "in", "rain"]
    path = tmp_path / "texts.jsonl"
    lines = [{"text": " ".join(draw.choice(words) for _ in range(150)), "split": "fit"} for _ in range(40)]
    path.write_text("\n".join(map(json.dumps, [*lines, {"text": "held out " * 50, "split": "held-out"}])))
    return path


def _arguments(models, corpus, output, *more):
    pair = ["--sharer", models[0], "--receiver", models[1]]
    return ["fit", *pair, "--corpus", str(corpus), "--output", str(output), "--window", "64", "--layers", "1", *more]


def test_makes_a_projector(models, corpus, tmp_path, capsys):
    output = tmp_path / "p.safetensors"
    assert main(_arguments(models, corpus, output, "--json", "--rank", "3", "--segment", "sharer")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bytes"] == output.stat().st_size
    projector = c2c.CacheProjector.load(output)
    assert projector.rank == 3
    assert projector.tokens == "sharer"
    assert printed["corpus"] == projector.facts["corpus"]
    assert projector.facts["corpus"]["documents"] == 40
    assert {path.name for path in tmp_path.iterdir()} == {"texts.jsonl", "p.safetensors"}


def test_says_what_it_made(models, corpus, tmp_path, capsys):
    output = tmp_path / "p.safetensors"
    assert main(_arguments(models, corpus, output)) == 0
    line = capsys.readouterr().out
    assert "p.safetensors: 0." in line
    assert "of 40 documents" in line
    assert "unexplained on held-out text: keys" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--corpus": "{tmp}/none.jsonl"}, "--corpus .*none.jsonl"),
        ({"--output": "{tmp}/p.bin"}, r"a file name that ends in \.safetensors is wanted"),
        ({"--output": "{tmp}/no/p.safetensors"}, "there is no folder"),
        ({"--sharer": "{tmp}/none.gguf"}, "does not exist"),
        ({"--layers": "99"}, r"layers_read must be in 1\.\."),
        ({"--window": "4000"}, "window is 4000 tokens, the sharer's context 4096"),
        ({"--rank": "4000"}, r"rank must be in 1\.\."),
    ],
)
def test_what_cannot_be(models, corpus, tmp_path, capsys, change, message):
    arguments = _arguments(models, corpus, tmp_path / "p.safetensors")
    for name, value in change.items():
        value = value.format(tmp=tmp_path)
        if name in arguments:
            arguments[arguments.index(name) + 1] = value
        else:
            arguments += [name, value]
    assert main(arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("c2c-kernels: ")
    assert re.search(message, line), line
    assert not (tmp_path / "p.safetensors").exists()
