"""Documents cut into a context and the tokens that follow it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from c2c_kernels.corpus import Document

# How far the cut may move to a place where context and rest are tokenized alone as they are together.
_MOST_MOVES = 16
_FEWEST_DOCUMENTS = 2  # a mismatched cache needs another document


@dataclass(frozen=True)
class Piece:
    """A stretch of a document.

    Attributes:
        document: its name.
        context: the text that is read, or projected.
        context_ids: the receiver's tokens of it.
        continuation_ids: the receiver's tokens that follow; all but the first are scored.
    """

    document: str
    context: str
    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]


def cut(
    documents: Sequence[Document], tokenizer: Any, *, context: int, continuation: int, most: int
) -> tuple[list[Piece], int]:
    """At most `most` pieces, the first of every document, then the second ones, ...; and how many documents are short.

    Args:
        documents: in the order in which they take turns.
        tokenizer: the receiver's, fast.
        context, continuation: tokens; a context is up to 16 longer, so that it is tokenized alone as in the whole.
        most: pieces.

    Raises:
        ValueError: for numbers that are too small, and where fewer than two documents are long enough.
    """
    for name, value, least in (("context", context, 1), ("continuation", continuation, 2), ("most", most, 2)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    found = [list(_pieces(document, tokenizer, context, continuation)) for document in documents]
    long = [pieces for pieces in found if pieces]
    if len(long) < _FEWEST_DOCUMENTS:
        raise ValueError(
            f"{len(long)} of {len(documents)} documents have the {context} + {continuation} tokens that a piece takes: "
            f"at least {_FEWEST_DOCUMENTS} are wanted"
        )
    taken = [
        pieces[number] for number in range(max(map(len, long))) for pieces in long if number < len(pieces)
    ]  # in turns: an interval over documents wants many of them
    taken = taken[:most]
    order = {piece.document: number for number, piece in reversed(list(enumerate(taken)))}
    return sorted(taken, key=lambda piece: order[piece.document]), len(found) - len(long)


def first_piece(document: Document, tokenizer: Any, *, context: int, continuation: int) -> Piece | None:
    """The beginning of a document and what follows it, see `cut`; None where the document is too short."""
    return next(_pieces(document, tokenizer, context, continuation), None)


def _pieces(document: Document, tokenizer: Any, context: int, continuation: int) -> Iterator[Piece]:
    text = document.text
    start = 0
    while True:
        encoded = tokenizer(text[start:], add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        for size in range(context, context + _MOST_MOVES + 1):
            if size + continuation > len(ids):
                return
            end = start + offsets[size - 1][1]
            alone = tokenizer(text[start:end], add_special_tokens=False)["input_ids"]
            if alone == ids[:size]:
                last = size + continuation
                yield Piece(document.name, text[start:end], tuple(alone), tuple(ids[size:last]))
                start += offsets[last - 1][1]
                break
        else:
            start += offsets[context - 1][1]
