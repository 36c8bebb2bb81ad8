"""What is trained on: windows of text that the sharer reads, each with rows that the receiver continues.

All streams are functions of a seed and a number: window n is the same in every run, process and resumption.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from c2c_kernels.alignment import NO_TEXT, TokenSpans, token_spans
from c2c_kernels.training.options import TrainOptions

# How far a cut may move to a place where a token of both models begins.
_MOST_MOVES = 16
# A repetition: how many are read at once of a window, and how many tokens come before the first that is scored; so many
# tell where in the text it is.
_REPETITIONS, _TOLD = 3, 8


@dataclass(frozen=True)
class Row:
    """What the receiver reads itself.

    Attributes:
        start: receiver tokens of the window's text that come before, seen through the projector.
        ids: own tokens.
        first: the first of `ids` that is scored; at least 1.
        inside: whether `ids` are the window's own tokens from `start` on.
    """

    start: int
    ids: tuple[int, ...]
    first: int
    inside: bool


@dataclass(frozen=True)
class Window:
    """A text that the sharer reads, and what the receiver makes of it.

    Attributes:
        kind: "text", "repeats" or "questions".
        head: tokens that the receiver reads itself before the text.
        sharer, receiver: the text's tokens.
        rows: at least one.
    """

    kind: str
    head: tuple[int, ...]
    sharer: TokenSpans
    receiver: TokenSpans
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Asked:
    """A question about a text as the receiver's tokens.

    Attributes:
        context: the text.
        head: tokens before the text.
        rest: tokens after it: the question and what a prompt ends with.
        answer: tokens of the answer and of its end.
    """

    context: str
    head: tuple[int, ...]
    rest: tuple[int, ...]
    answer: tuple[int, ...]


class Stream(Protocol):
    """Windows without end."""

    kind: str

    def window(self, number: int) -> Window: ...


class Texts:
    """Windows of documents, cut elsewhere in every epoch; each continues in several places.

    A row starts where a token of both models begins, so that no sharer token that it sees has read on.

    Args:
        documents: texts.
        sharer_tokenizer, receiver_tokenizer: fast.
        head: tokens of the receiver before every window.
        options: sizes and the seed.

    Raises:
        ValueError: where no document is long enough for a window.
    """

    kind = "text"

    def __init__(
        self,
        documents: Sequence[str],
        sharer_tokenizer: Any,
        receiver_tokenizer: Any,
        head: Sequence[int],
        options: TrainOptions,
    ) -> None:
        self._tokenizers = (sharer_tokenizer, receiver_tokenizer)
        self._head, self._options = tuple(head), options
        self._seed = f"{options.seed}"
        self._least = options.least_context + max(options.continuation // 2, 2)
        self._texts: list[str] = []
        self._starts: list[list[int]] = []  # per document where its receiver tokens start, and the text's end
        for text in documents:
            encoded = receiver_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            starts = [start for start, _ in encoded["offset_mapping"]]
            if len(starts) >= self._least:
                self._texts.append(text)
                self._starts.append([*starts, len(text)])
        if not self._texts:
            raise ValueError(
                f"none of {len(documents)} documents has the {self._least} tokens that a context and its continuation "
                "take at least"
            )
        self._epochs: list[list[tuple[int, int, int]]] = []

    @property
    def tokens(self) -> int:
        """Receiver tokens of all documents that are long enough."""
        return sum(len(starts) - 1 for starts in self._starts)

    def window(self, number: int) -> Window:
        epoch, at = 0, number
        while at >= len(pieces := self._pieces(epoch)):
            at -= len(pieces)
            epoch += 1
        document, first, last = pieces[at]
        starts = self._starts[document]
        text = self._texts[document][starts[first] : starts[last]]
        sharer = token_spans(self._tokenizers[0], text)
        receiver = token_spans(self._tokenizers[1], text, add_special_tokens=False)
        draw = random.Random(f"{self._seed}/rows/{number}")
        return Window(self.kind, self._head, sharer, receiver, tuple(self._rows(sharer, receiver, draw)))

    def _pieces(self, epoch: int) -> list[tuple[int, int, int]]:
        """(document, first token, last token) of every window of an epoch, in its order."""
        while len(self._epochs) <= epoch:
            draw = random.Random(f"{self._seed}/epoch/{len(self._epochs)}")
            pieces = []
            for document, starts in enumerate(self._starts):
                length, size = len(starts) - 1, self._options.window
                shift = draw.randrange(min(size, length)) if length > size else 0
                cuts = [0, *range(shift, length, size), length] if shift else [*range(0, length, size), length]
                pieces += [(document, first, last) for first, last in pairwise(cuts) if last - first >= self._least]
            draw.shuffle(pieces)
            self._epochs.append(pieces)
        return self._epochs[epoch]

    def _rows(self, sharer: TokenSpans, receiver: TokenSpans, draw: random.Random) -> Iterator[Row]:
        """Continuations one after the other, the first after a context drawn anew."""
        options, ids = self._options, receiver.ids
        begins = {start for start, _ in sharer.bounds}
        # A place within a group of tokens that share a character is none to cut at.
        common = [
            at > 0 and group != receiver.group[at - 1] and group != NO_TEXT and receiver.bounds[group][0] in begins
            for at, group in enumerate(receiver.group)
        ]
        fewest = max(options.continuation // 2, 2)
        latest = min(len(ids) - fewest, options.context)
        at = options.least_context + draw.randrange(options.continuation)
        if at > latest:
            at = draw.randint(min(options.least_context, max(latest, 1)), max(latest, 1))
        while True:
            start = next((place for place in range(at, min(at + _MOST_MOVES, len(ids))) if common[place]), at)
            own = ids[start : start + options.continuation + 1]
            if len(own) >= 2:
                yield Row(start, own, 1, True)
            at = start + options.continuation
            if at > latest:
                return


class Repeats(Texts):
    """Windows of documents that the receiver says again: what it cannot do without finding each token in the cache.

    After the whole window it reads pieces of it, whose tokens are scored from the ninth on.

    Args:
        texts: of the same documents; they are tokenized once.
    """

    kind = "repeats"

    def __init__(self, texts: Texts) -> None:
        self.__dict__.update(vars(texts))
        self._seed, self._epochs = f"{self._options.seed}/{self.kind}", []

    def _rows(self, sharer: TokenSpans, receiver: TokenSpans, draw: random.Random) -> Iterator[Row]:
        ids = receiver.ids
        length = min(self._options.continuation + 1, len(ids))
        first = min(_TOLD, length - 1)
        for _ in range(_REPETITIONS):
            start = draw.randint(0, len(ids) - length)
            yield Row(len(ids), ids[start : start + length], first, False)


class Questions:
    """Texts with questions about them; the answers' tokens are scored.

    Args:
        asked: those about the same text are asked at once.
        sharer_tokenizer, receiver_tokenizer: fast.
        options: the seed, and how many questions of a text at once.
    """

    kind = "questions"

    def __init__(
        self, asked: Sequence[Asked], sharer_tokenizer: Any, receiver_tokenizer: Any, options: TrainOptions
    ) -> None:
        self._tokenizers, self._options = (sharer_tokenizer, receiver_tokenizer), options
        by_text: dict[tuple[str, tuple[int, ...]], list[Asked]] = {}
        for one in asked:
            by_text.setdefault((one.context, one.head), []).append(one)
        size = options.questions_per_text
        self._groups = [group[at : at + size] for group in by_text.values() for at in range(0, len(group), size)]
        if not self._groups:
            raise ValueError("there are no questions to train on")

    def window(self, number: int) -> Window:
        epoch, at = divmod(number, len(self._groups))
        order = list(range(len(self._groups)))
        random.Random(f"{self._options.seed}/questions/{epoch}").shuffle(order)
        group = self._groups[order[at]]
        sharer = token_spans(self._tokenizers[0], group[0].context)
        receiver = token_spans(self._tokenizers[1], group[0].context, add_special_tokens=False)
        start = len(receiver.ids)
        rows = tuple(Row(start, one.rest + one.answer, len(one.rest), False) for one in group)
        return Window(self.kind, group[0].head, sharer, receiver, rows)
