from __future__ import annotations

import json
from pathlib import Path

import pytest

from c2c_kernels import corpus


def _documents() -> list[corpus.Document]:
    return [
        corpus.Document(f"kind/{i}", f"text {i}\u2028 of é 🙂\n\nend", "kind", corpus.split_of(f"kind/{i}"), "p", "1")
        for i in range(50)
    ]


def test_written_documents_come_back_as_they_were(tmp_path: Path):
    path = tmp_path / "d.jsonl"
    corpus.write(_documents(), path)
    assert corpus.read(path) == _documents()
    assert [file.name for file in tmp_path.iterdir()] == ["d.jsonl"]


def test_the_split_depends_on_the_name_alone_and_holds_out_about_a_fifth():
    names = [f"a/{i}" for i in range(2000)]
    held_out = [name for name in names if corpus.split_of(name) == "held-out"]
    assert 340 < len(held_out) < 460  # 3.4 standard deviations around 400
    # pinned: a projector that was fitted by an earlier version must not be evaluated on what it was fitted on
    assert [i for i in range(20) if corpus.split_of(f"handbook/{i}") == "held-out"] == [1, 8, 10, 12, 19]


def test_digest_depends_on_the_texts_and_not_on_their_order():
    documents = _documents()
    assert corpus.digest(documents) == corpus.digest(documents[::-1])
    assert corpus.digest(documents) != corpus.digest(documents[1:])


def test_select_takes_splits_and_collections_apart():
    documents = [*_documents(), corpus.Document("other/1", "x", "other", "fit")]
    fit, held_out = (corpus.select(documents, split=split) for split in ("fit", "held-out"))
    assert len(fit) + len(held_out) == 51 and not {d.name for d in fit} & {d.name for d in held_out}
    assert [d.name for d in corpus.select(documents, collections=["other"])] == ["other/1"]
    with pytest.raises(corpus.CorpusError, match="collection 'none' is not in the corpus"):
        corpus.select(documents, collections=["none"])
    with pytest.raises(corpus.CorpusError, match="no document is left"):
        corpus.select(documents, split="held-out", collections=["other"])
    with pytest.raises(corpus.CorpusError, match="split must be one of"):
        corpus.select(documents, split="train")


def test_documents_without_a_split_serve_as_either():
    document = corpus.Document("own", "text")
    assert corpus.select([document], split="fit") == corpus.select([document], split="held-out") == [document]


def test_text_files_and_folders_are_documents(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text(" one \n")
    (tmp_path / "b.md").write_text("two")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "c.png").write_bytes(b"\xff")
    assert [(d.name, d.text) for d in corpus.read(tmp_path)] == [("b.md", "two"), ("sub/a.txt", "one")]
    assert [(d.name, d.text) for d in corpus.read(tmp_path / "b.md")] == [("b.md", "two")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a', "line 2: no JSON .* cut off"),
        ('["text"]', "line 2: an object with a non-empty string `text`"),
        ('{"text": "  "}', "line 2: an object with a non-empty string `text`"),
        ('{"text": 3}', "line 2: an object with a non-empty string `text`"),
        ('{"text": "a", "name": 3}', "line 2: `name` must be a string, got 3"),
        ('{"text": "a", "split": "train"}', "line 2: split of .* must be one of fit, held-out, got 'train'"),
        ('{"text": "a", "sha256": "00"}', "line 2: `sha256` is not that of `text`"),
        ('{"text": "\\ud800"}', "line 2: `text` holds half a surrogate pair"),
        ('{"text": "a", "name": "first"}', "two documents are named 'first'"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"name": "first", "text": "b"}) + "\n" + line + "\n")
    with pytest.raises(corpus.CorpusError, match=message):
        corpus.read(path)


def test_bad_files_are_named(tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in (("latin.txt", "is not UTF-8"), ("none.jsonl", "cannot be read"), ("empty.jsonl", "no text")):
        with pytest.raises(corpus.CorpusError, match=message):
            corpus.read(tmp_path / name)
