"""Which texts of Debian there are: their packages, where the files lie, and how they become documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from c2c_kernels.corpus import fortunes, html, manual
from c2c_kernels.corpus.errors import CorpusError, UnfinishedError

_MANUALS = ("usr/share/man/man[1-9]/*",)
# Conversions that run at the same time, each a process of its own.
_PAGES_AT_ONCE = 4


@dataclass(frozen=True)
class Collection:
    """One kind of text.

    Attributes:
        name: first part of its documents' names.
        what: for people.
        packages: per Debian package the patterns of its files, from the root.
        convert: from files to (name, text) pairs, in order; None for a text whose conversion did not end in time.
        check: raises where a tool is missing.
    """

    name: str
    what: str
    packages: dict[str, tuple[str, ...]]
    convert: Callable[[list[Path]], Iterable[tuple[str, str | None]]]
    check: Callable[[], None] = lambda: None


def _pages(files: list[Path]) -> Iterator[tuple[str, str]]:
    for path in files:
        yield path.name.removesuffix(".html").removesuffix(".en"), html.to_text(_utf8(path))


def _manuals(files: list[Path]) -> Iterator[tuple[str, str | None]]:
    def text_of(path: Path) -> str | None:
        try:
            return manual.to_text(path)
        except UnfinishedError:
            return None

    with ThreadPoolExecutor(_PAGES_AT_ONCE) as pool:
        for path, text in zip(files, pool.map(text_of, files), strict=True):
            yield path.name.removesuffix(".gz"), text


def _fortunes(files: list[Path]) -> Iterator[tuple[str, str]]:
    for path in files:
        if path.suffix == "":  # others are indices, and links for old encodings
            for number, text in enumerate(fortunes.to_texts(_utf8(path)), 1):
                yield f"{path.name}/{number:03d}", text


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text") from error


COLLECTIONS = {
    collection.name: collection
    for collection in (
        Collection(
            "handbook",
            "the Debian Administrator's Handbook",
            {"debian-handbook": ("usr/share/doc/debian-handbook/html/en-US/*.html",)},
            _pages,
        ),
        Collection(
            "manual",
            "manual pages of Linux: system calls, C library, files, overviews",
            {"manpages": _MANUALS, "manpages-dev": _MANUALS},
            _manuals,
            manual.check,
        ),
        Collection(
            "guides",
            "Debian's policy, reference, FAQ and guides for developers",
            {
                "debian-policy": ("usr/share/doc/debian-policy/policy.html/*.html",),
                "developers-reference": ("usr/share/developers-reference/*.html",),
                "debian-reference-en": ("usr/share/debian-reference/*.en.html",),
                "debian-faq": ("usr/share/doc/debian/FAQ/*.en.html",),
                "maint-guide": ("usr/share/doc/maint-guide/html/*.en.html",),
            },
            _pages,
        ),
        Collection(
            "fortunes",
            "sayings, jokes, quotations",
            dict.fromkeys(("fortunes", "fortunes-min"), ("usr/share/games/fortunes/*",)),
            _fortunes,
        ),
    )
}
