"""Documents: names, texts, hashes, the split by name, and the files that hold them.

A JSON line is an object with `text` and, where known, `name`, `collection`, `split`, `package`, `version` and
`sha256` (of the UTF-8 text; checked when present).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from c2c_kernels.corpus.errors import CorpusError

SPLITS = ("fit", "held-out")
# One document in five is held out: 25 pages of the Debian handbook, enough for an interval over documents.
_HELD_OUT_SHARE = 5
_OPTIONAL = ("name", "collection", "split", "package", "version", "sha256")


@dataclass(frozen=True)
class Document:
    """A text and where it comes from.

    Attributes:
        name: unique within a corpus, such as "handbook/sect.apt-get".
        text: plain text.
        collection: the kind of text, such as "handbook".
        split: "fit" or "held-out"; empty: not split, it serves as either (fits record hashes, evaluation refuses them).
        package, version: of the Debian package that ships it, else empty.
    """

    name: str
    text: str
    collection: str = ""
    split: str = ""
    package: str = ""
    version: str = ""

    def __post_init__(self) -> None:
        if self.split not in ("", *SPLITS):
            raise CorpusError(f"split of {self.name} must be one of {', '.join(SPLITS)}, got {self.split!r}")

    @property
    def sha256(self) -> str:
        """Of the text in UTF-8, in hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def split_of(name: str) -> str:
    """The split of a document of this name: one in five is held out, whatever else the corpus holds."""
    return SPLITS[int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % _HELD_OUT_SHARE == 0]


def digest(documents: Iterable[Document]) -> str:
    """One SHA-256 for a set of documents, the same in whatever order they come."""
    together = "\n".join(sorted(document.sha256 for document in documents))
    return hashlib.sha256(together.encode()).hexdigest()


def select(
    documents: Iterable[Document], *, split: str | None = None, collections: Sequence[str] | None = None
) -> list[Document]:
    """The documents of one split and of the named collections, in order.

    Raises:
        CorpusError: for a split or collection that no document has.
    """
    given = list(documents)
    if split is not None and split not in SPLITS:
        raise CorpusError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    known = sorted({document.collection for document in given})
    for name in collections or ():
        if name not in known:
            raise CorpusError(f"collection {name!r} is not in the corpus, which has {', '.join(map(repr, known))}")
    found = [
        document
        for document in given
        if (split is None or document.split in ("", split))
        and (collections is None or document.collection in collections)
    ]
    if not found:
        raise CorpusError(f"no document is left of {len(given)}: split {split!r}, collections {collections}")
    return found


def write(documents: Iterable[Document], path: Path) -> str:
    """Writes JSON lines, in place at once or not at all; returns the file's SHA-256."""
    lines = [
        json.dumps(
            {
                **{key: value for key in _OPTIONAL[:-1] if (value := getattr(document, key))},
                "sha256": document.sha256,
                "text": document.text,
            },
            ensure_ascii=False,
        )
        for document in documents
    ]
    content = "".join(f"{line}\n" for line in lines).encode()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return hashlib.sha256(content).hexdigest()


def read(path: str | Path) -> list[Document]:
    """The documents of a JSON lines file (`.jsonl`), a text file, or the text files below a folder (`.txt`, `.md`).

    Raises:
        CorpusError: naming the file and line, for what is missing, no UTF-8, no such JSON, empty, twice there, or
            not what its SHA-256 says.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md") and file.is_file())
        documents = [Document(str(file.relative_to(path)), _text(file).strip()) for file in files]
        documents = [document for document in documents if document.text]
    elif path.suffix == ".jsonl":
        documents = list(_lines(path, _text(path)))
    else:
        documents = [Document(path.name, _text(path).strip())]
        documents = [document for document in documents if document.text]
    if not documents:
        raise CorpusError(f"{path} holds no text")
    names: set[str] = set()
    for document in documents:
        if document.name in names:
            raise CorpusError(f"{path}: two documents are named {document.name!r}")
        names.add(document.name)
    return documents


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error


def _lines(path: Path, content: str) -> Iterator[Document]:
    # Not splitlines: a JSON string may hold U+2028 as it is.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield _document(line, f"{path}, line {number}", f"{path.name}:{number}")


def _document(line: str, where: str, name: str) -> Document:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: no JSON ({error.msg}); is the file cut off?") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str) or not record["text"].strip():
        raise CorpusError(f"{where}: an object with a non-empty string `text` is wanted")
    for key in _OPTIONAL:
        if not isinstance(record.get(key, ""), str):
            raise CorpusError(f"{where}: `{key}` must be a string, got {record[key]!r}")
    known = {key: record[key] for key in _OPTIONAL[1:-1] if key in record}
    try:
        document = Document(record.get("name") or name, record["text"], **known)
        sha256 = document.sha256
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where}: `text` holds half a surrogate pair, which is no character") from error
    except CorpusError as error:
        raise CorpusError(f"{where}: {error}") from error
    if record.get("sha256", sha256) != sha256:
        raise CorpusError(f"{where}: `sha256` is not that of `text`, which was changed since")
    return document
