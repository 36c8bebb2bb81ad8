"""Questions whose answer stands in a text: records, their files, and when a written answer is right.

A JSON line is an object with `context`, `question` and `answer`; further keys of ours: `kind`, `template`, `source`.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from c2c_kernels.corpus.errors import CorpusError

_WANTED = ("context", "question", "answer")
_OPTIONAL = ("kind", "template", "source")


@dataclass(frozen=True)
class Question:
    """A question, the text that answers it, and the answer as it stands in the text.

    Attributes:
        context, question, answer: not empty; the answer is a part of the context.
        kind: of the answer: "name", "place", "day", "number", ...
        template: which phrasing of which relation it was made from.
        source: the document it was taken from, empty for a made-up text.
    """

    context: str
    question: str
    answer: str
    kind: str = ""
    template: str = ""
    source: str = ""


def normal(text: str) -> str:
    """Case, accents' encoding, punctuation and space levelled; articles gone, as SQuAD's measure does."""
    words = re.findall(r"[^\W_]+(?:[.'’:-][^\W_]+)*", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def is_exact(written: str, answer: str) -> bool:
    """Whether what was written is the answer and nothing else."""
    return normal(written) == normal(answer)


def is_right(written: str, answer: str) -> bool:
    """Whether the answer stands, as whole words, in what was written up to the first line's end."""
    lines = written.strip().splitlines() or [""]
    return f" {normal(answer)} " in f" {normal(lines[0])} "


def write_questions(questions: Iterable[Question], path: Path) -> None:
    """Writes JSON lines, in place at once or not at all."""
    lines = [{key: value for key, value in asdict(question).items() if value} for question in questions]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a JSON lines file.

    Raises:
        CorpusError: naming the line, for what is missing, no such JSON, or an answer that is not in its context.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error
    questions = [
        _question(line, f"{path}, line {number}") for number, line in enumerate(content.split("\n"), 1) if line.strip()
    ]
    if not questions:
        raise CorpusError(f"{path} holds no question")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: no JSON ({error.msg}); is the file cut off?") from error
    if not isinstance(record, dict):
        raise CorpusError(f"{where}: an object with {', '.join(_WANTED)} is wanted")
    for key in (*_WANTED, *_OPTIONAL):
        value = record.get(key, "" if key in _OPTIONAL else None)
        if not isinstance(value, str) or (key in _WANTED and not value.strip()):
            raise CorpusError(f"{where}: `{key}` must be a{'' if key in _OPTIONAL else ' non-empty'} string")
    if f" {normal(record['answer'])} " not in f" {normal(record['context'])} ":
        raise CorpusError(f"{where}: the answer {record['answer']!r} does not stand in the context")
    return Question(**{key: record.get(key, "") for key in (*_WANTED, *_OPTIONAL)})
