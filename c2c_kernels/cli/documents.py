"""What is read and what is asked: files, the default document, and how documents are given to sharers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from c2c_kernels.cli.errors import CommandError

QUESTION_FOR_ANY_TEXT = "What is this text about?"


@dataclass(frozen=True)
class Document:
    """A text and where it comes from."""

    name: str
    text: str


def default_document() -> Document:
    """The document in the package."""
    return Document("the default document", _packaged("document.txt"))


def default_questions() -> list[str]:
    """The questions that go with the default document."""
    return _packaged("questions.txt").splitlines()


def read_documents(paths: Sequence[str] | None) -> list[Document]:
    """The files at `paths`, or the default document. CommandError for what is missing, empty or no text."""
    return [_read(Path(path)) for path in paths] if paths else [default_document()]


def choose_questions(asked: Sequence[str] | None, own_document: bool) -> list[str]:
    """The questions asked, else the default document's, else one that fits any text."""
    if asked is None:
        return [QUESTION_FOR_ANY_TEXT] if own_document else default_questions()
    return [" ".join(question.split()) for question in asked]


def deal(documents: Sequence[Document], sharers: int) -> list[Document]:
    """One document for each reading.

    One sharer reads every document, each into a cache of its own. As many documents as sharers: one each. One
    document and several sharers: each reads a part, cut where a paragraph ends.
    """
    if sharers in (1, len(documents)):
        return list(documents)
    if len(documents) == 1:
        return _split(documents[0], sharers)
    raise CommandError(
        f"{sharers} sharers and {len(documents)} documents: one document (which is split), or as many as sharers"
    )


def _split(document: Document, parts: int) -> list[Document]:
    paragraphs = re.split(r"\n\s*\n", document.text)
    if len(paragraphs) < parts:
        raise CommandError(f"{document.name} has {len(paragraphs)} paragraphs, too few for {parts} sharers")
    ends = [sum(len(p) for p in paragraphs[: i + 1]) for i in range(len(paragraphs))]
    cuts = [0]
    for part in range(1, parts):
        # the paragraph end nearest to an even share that leaves at least one paragraph to every part
        candidates = range(cuts[-1] + 1, len(paragraphs) - (parts - part) + 1)
        cuts.append(min(candidates, key=lambda i: abs(ends[i - 1] - ends[-1] * part / parts)))
    cuts.append(len(paragraphs))
    return [
        Document(f"{document.name}, part {i + 1} of {parts}", "\n\n".join(paragraphs[cuts[i] : cuts[i + 1]]))
        for i in range(parts)
    ]


def _read(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise CommandError(f"--document {path} is not UTF-8 text") from error
    except OSError as error:
        raise CommandError(f"--document {path} cannot be read: {error.strerror}") from error
    if not text:
        raise CommandError(f"--document {path} is empty: a text is wanted")
    return Document(path.name, text)


def _packaged(name: str) -> str:
    return (resources.files("c2c_kernels") / "data" / name).read_text(encoding="utf-8").strip()
