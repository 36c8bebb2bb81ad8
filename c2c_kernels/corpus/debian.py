"""From Debian packages to a folder of documents: one JSON lines file per collection, and a record of what they are.

    FOLDER/manual.jsonl     the documents
    FOLDER/manual.json      the packages, their versions and SHA-256, what was left out, and the SHA-256 of manual.jsonl

Versions differ from one Debian release to the next. They are recorded, not demanded: what a projector was fitted on is
told by the hashes of the documents.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from c2c_kernels.corpus import packages
from c2c_kernels.corpus.collections import Collection
from c2c_kernels.corpus.documents import Document, read, split_of, write
from c2c_kernels.corpus.errors import CorpusError
from c2c_kernels.corpus.packages import Package

# Characters below which a page is a heading, a list of contents or a pointer to another page.
_SHORTEST = 600
# Counts up with every change of what the converters make of the same package.
FORMAT = 1


@dataclass(frozen=True)
class Build:
    """A collection on the disk.

    Attributes:
        collection: its name.
        path: of the JSON lines.
        packages: what it was made from.
        documents: in order.
        left_out: names of those whose conversion did not end in time.
    """

    collection: str
    path: Path
    packages: tuple[Package, ...]
    documents: tuple[Document, ...]
    left_out: tuple[str, ...] = ()


def open_build(collection: Collection, folder: Path) -> Build | None:
    """What an earlier `build` left in `folder`; None where it is missing, damaged, or of an older format."""
    path = folder / f"{collection.name}.jsonl"
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        content = path.read_bytes()
        if record["format"] != FORMAT or record["sha256"] != hashlib.sha256(content).hexdigest():
            return None
        made_from = tuple(Package(**entry) for entry in record["packages"])
        left_out = tuple(record.get("left_out", ()))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Build(collection.name, path, made_from, tuple(read(path)), left_out)


def build(collection: Collection, folder: Path, update: Callable[[str], None] = lambda step: None) -> Build:
    """Fetches the collection's packages and writes its documents and their record into `folder`.

    Args:
        update: called with what comes next, for people.

    Raises:
        CorpusError: for a missing tool (before anything is fetched), a package that cannot be had, or one in which
            the files are not where they are expected.
    """
    packages.check()
    collection.check()
    folder.mkdir(parents=True, exist_ok=True)
    documents: dict[str, Document] = {}
    seen: set[str] = set()
    made_from = []
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(prefix=f".{collection.name}-", dir=folder) as temporary:
        for name, patterns in collection.packages.items():
            root = Path(temporary) / name
            update(f"download {name}")
            deb = packages.download(name, root / "deb", Path(temporary) / "apt")
            package = packages.unpack(deb, root / "files")
            made_from.append(package)
            update(f"convert {name}")
            for document in _documents(collection, package, root / "files", patterns, left_out):
                if document.sha256 not in seen:  # the same page under another name could fall into both splits
                    seen.add(document.sha256)
                    documents[document.name] = document
    path = folder / f"{collection.name}.jsonl"
    ordered = tuple(documents[name] for name in sorted(documents))
    record = {"format": FORMAT, "packages": [asdict(package) for package in made_from], "documents": len(ordered)}
    record["left_out"] = sorted(left_out)
    record["sha256"] = write(ordered, path)
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Build(collection.name, path, tuple(made_from), ordered, tuple(sorted(left_out)))


def _documents(
    collection: Collection, package: Package, root: Path, patterns: tuple[str, ...], left_out: list[str]
) -> Iterator[Document]:
    """The documents of a package; the names of those that did not get finished are added to `left_out`."""
    files = [file for pattern in patterns for file in sorted(root.glob(pattern)) if not file.is_symlink()]
    files = [file for file in files if file.is_file()]
    found = 0
    # The package is part of the name where a collection has several, whose pages may share names.
    place = (collection.name, package.name) if len(collection.packages) > 1 else (collection.name,)
    for name, text in collection.convert(files):
        full = "/".join((*place, name))
        if text is None:
            left_out.append(full)
        elif len(text) >= _SHORTEST:
            found += 1
            yield Document(full, text, collection.name, split_of(full), package.name, package.version)
    if not found:
        raise CorpusError(
            f"{package.name} {package.version} holds no text of at least {_SHORTEST} characters under "
            f"{', '.join(patterns)}: another version of it is wanted"
        )
