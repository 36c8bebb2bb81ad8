"""Windows of a corpus: which texts are fitted, which are held out, and their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Window:
    """A piece of a document of about as many receiver tokens as both models read at once.

    Attributes:
        text: the piece.
        tokens: receiver tokens it was cut for.
        held_out: whether it is kept from the fit, to choose layers and the ridge on.
    """

    text: str
    tokens: int
    held_out: bool


@dataclass(frozen=True)
class Corpus:
    """The windows of a corpus, in the order in which they are read.

    Attributes:
        windows: those to fit, documents taking turns so that every stretch is mixed.
        held_out: those kept from the fit.
        documents: how many documents there are.
        sha256: of the documents' texts in order, and of nothing else.
    """

    windows: tuple[Window, ...]
    held_out: tuple[Window, ...]
    documents: int
    sha256: str

    @property
    def tokens(self) -> int:
        """Receiver tokens to fit."""
        return sum(window.tokens for window in self.windows)


def text_hashes(texts: Iterable[str]) -> list[str]:
    """SHA-256 of every text in UTF-8, in hexadecimal digits."""
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def corpus_hash(texts: Iterable[str]) -> str:
    """SHA-256 of the texts' SHA-256s in order."""
    return hashlib.sha256("\n".join(text_hashes(texts)).encode()).hexdigest()


def cut(
    texts: Sequence[str], tokenizer: Any, *, size: int, held_out: int, held_out_tokens: int, most: int | None
) -> Corpus:
    """Cuts documents into windows of `size` tokens of `tokenizer`; shorter rests of half a window are kept.

    Args:
        texts: documents.
        tokenizer: the receiver's, fast.
        size: tokens of a window.
        held_out: one document in so many is kept from the fit, at least one: those with the smallest hashes.
        held_out_tokens: how many tokens of those are read, to the end of the window that reaches them.
        most: the same for tokens to fit, None for all: first windows of documents come first, documents by hash.

    Raises:
        ValueError: for an empty document list, documents without text, and a corpus that leaves nothing to fit or to
            hold out.
    """
    if not texts:
        raise ValueError("texts is empty: documents to fit on are wanted")
    fitted: list[list[Window]] = []
    kept: list[list[Window]] = []
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"texts[{number}] is empty: a document is wanted")
    hashes = text_hashes(texts)
    last = sorted(hashes)[max(len(texts) // held_out, 1) - 1]
    # By hash, so that a limit leaves a sample of all documents, not the first of a sorted list.
    for digest, text in sorted(zip(hashes, texts, strict=True)):
        apart = digest <= last
        (kept if apart else fitted).append(list(_windows(text, tokenizer, size, apart)))
    windows = _take(_in_turn(fitted), most)
    apart_windows = _take(_in_turn(kept), held_out_tokens)
    if not windows or not apart_windows:
        what = "fit" if not windows else f"hold out (one document in {held_out})"
        raise ValueError(
            f"texts: {len(texts)} documents leave nothing to {what}; more documents of at least {size // 2} tokens are "
            "wanted"
        )
    return Corpus(tuple(windows), tuple(apart_windows), len(texts), corpus_hash(texts))


def _windows(text: str, tokenizer: Any, size: int, held_out: bool) -> Iterator[Window]:
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for start in range(0, len(offsets), size):
        end = min(start + size, len(offsets))
        piece = text[offsets[start][0] : offsets[end - 1][1]]
        if end - start >= size // 2 and piece.strip():
            yield Window(piece, end - start, held_out)


def _in_turn(documents: list[list[Window]]) -> Iterator[Window]:
    """The first windows of all documents, then the second ones, and so on."""
    longest = max((len(windows) for windows in documents), default=0)
    for number in range(longest):
        yield from (windows[number] for windows in documents if number < len(windows))


def _take(windows: Iterator[Window], most: int | None) -> list[Window]:
    taken: list[Window] = []
    total = 0
    for window in windows:
        if most is not None and total >= most:
            break
        taken.append(window)
        total += window.tokens
    return taken
