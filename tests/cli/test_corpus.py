from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from c2c_kernels import corpus
from c2c_kernels.cli import main, texts
from c2c_kernels.cli.errors import CommandError


@pytest.fixture
def made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collections of two documents each instead of Debian's; the names of those that were made, as they are made."""
    names: list[str] = []

    def build(collection: corpus.Collection, folder: Path, update) -> corpus.Build:
        update("download")
        names.append(collection.name)
        if collection.name == "guides":
            raise corpus.CorpusError("no such package")
        folder.mkdir(parents=True, exist_ok=True)
        documents = tuple(corpus.Document(f"{collection.name}/{s}", f"text {s}", collection.name, s) for s in SPLITS)
        path = folder / f"{collection.name}.jsonl"
        sha256 = corpus.write(documents, path)
        record = {"format": corpus.debian.FORMAT, "packages": [PACKAGE], "sha256": sha256}
        path.with_suffix(".json").write_text(json.dumps(record))
        return corpus.Build(collection.name, path, (corpus.Package(**PACKAGE),), documents)

    monkeypatch.setattr(corpus, "build", build)
    return names


SPLITS = ("fit", "held-out")
PACKAGE = {"name": "p", "version": "1", "sha256": "00"}


def test_collections_are_made_once_and_again_where_damaged(made: list[str], cache: Path, capsys):
    assert main(["corpus", "--collection", "handbook", "--collection", "fortunes"]) == 0
    assert made == ["handbook", "fortunes"]
    assert "handbook: fit 1 documents" in capsys.readouterr().out
    assert main(["corpus", "--collection", "handbook", "--json"]) == 0
    assert made == ["handbook", "fortunes"]
    [record] = json.loads(capsys.readouterr().out)
    assert record["packages"] == [PACKAGE] and record["splits"]["fit"]["documents"] == 1
    (cache / "corpus" / "handbook.jsonl").write_text("{")
    assert main(["corpus", "--collection", "handbook"]) == 0
    assert made == ["handbook", "fortunes", "handbook"] and "is damaged" in capsys.readouterr().err
    assert main(["corpus", "--collection", "handbook", "--again"]) == 0
    assert len(made) == 4


def test_what_was_left_out_is_said_when_it_is_made_and_whenever_it_is_listed(made: list[str], monkeypatch, capsys):
    whole = corpus.build

    def build(collection: corpus.Collection, folder: Path, update) -> corpus.Build:
        found = replace(whole(collection, folder, update), left_out=("manual/a.3", "manual/b.3"))
        record = json.loads(found.path.with_suffix(".json").read_text())
        found.path.with_suffix(".json").write_text(json.dumps({**record, "left_out": found.left_out}))
        return found

    monkeypatch.setattr(corpus, "build", build)
    assert main(["corpus", "--collection", "manual"]) == 0
    came = capsys.readouterr()
    assert "2 of the manual texts left out, whose conversion did not end in time: manual/a.3, manual/b.3" in came.err
    assert "left out, not converted in time: manual/a.3, manual/b.3" in came.out
    assert main(["corpus", "--collection", "manual", "--json"]) == 0
    came = capsys.readouterr()
    assert json.loads(came.out)[0]["left_out"] == ["manual/a.3", "manual/b.3"] and "left out" not in came.err


def test_output_takes_one_split(made: list[str], tmp_path: Path):
    out = tmp_path / "out.jsonl"
    assert main(["corpus", "--collection", "handbook", "--output", str(out), "--split", "held-out"]) == 0
    assert [document.name for document in corpus.read(out)] == ["handbook/held-out"]


def test_an_output_that_cannot_be_written_is_refused_first(made: list[str], tmp_path: Path, capsys):
    assert main(["corpus", "--output", str(tmp_path / "out.txt")]) == 1
    assert main(["corpus", "--output", str(tmp_path / "none" / "out.jsonl")]) == 1
    assert made == []
    assert "a file name that ends in .jsonl is wanted" in capsys.readouterr().err


def test_specs_name_debian_collections_or_files(made: list[str], tmp_path: Path):
    assert [d.name for d in texts.documents("debian:handbook, manual", "fit")] == ["handbook/fit", "manual/fit"]
    (tmp_path / "own.txt").write_text("own words")
    assert [d.text for d in texts.documents(str(tmp_path / "own.txt"), None)] == ["own words"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("debian:handbok", "no collection 'handbok': one of handbook, "),
        ("debian:guides", "the guides texts cannot be had: no such package"),
        ("nowhere.jsonl", "--corpus nowhere.jsonl: nowhere.jsonl cannot be read"),
    ],
)
def test_bad_specs_are_named(made: list[str], spec: str, message: str):
    with pytest.raises(CommandError, match=message):
        texts.documents(spec, "fit")


def test_questions_are_written_as_asked(tmp_path: Path, capsys):
    out = tmp_path / "q.jsonl"
    command = ["questions", "--output", str(out), "--count", "40", "--split", "held-out", "--seed", "7"]
    assert main([*command, "--facts", "8", "--per-text", "4"]) == 0
    assert corpus.read_questions(out) == corpus.made_up(40, seed=7, split="held-out", facts=8, per_text=4)
    assert "40 questions about 10 texts: " in capsys.readouterr().out


def test_questions_about_documents(tmp_path: Path):
    (tmp_path / "a.txt").write_text("The Free Software Foundation (FSF) is there.")
    command = ["questions", "--output", str(tmp_path / "q.jsonl"), "--corpus", str(tmp_path / "a.txt")]
    assert main(command) == 0
    assert [q.answer for q in corpus.read_questions(tmp_path / "q.jsonl")] == ["FSF"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--count", "0"], "--count must be at least 1, got 0"),
        (["--facts", "1"], "per_text must be at most facts (1), got 3"),
    ],
)
def test_bad_numbers_of_questions_are_refused(tmp_path: Path, capsys, extra: list[str], message: str):
    assert main(["questions", "--output", str(tmp_path / "q.jsonl"), *extra]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
