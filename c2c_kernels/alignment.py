"""Which tokens of two tokenizers cover the same characters.

    sharer, receiver = token_spans(sharer_tokenizer, text), token_spans(receiver_tokenizer, text)
    index = align(sharer, receiver).index("last")    # per receiver token the sharer token that completes it

Tokenizers are taken as they are: callables that return `input_ids`, `offset_mapping` (in characters of the text) and
`special_tokens_mask`, as every fast tokenizer of Transformers does. Source: character alignment as in arXiv 2510.03215.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Strategy = Literal["first", "longest", "last"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
NO_TEXT = -1  # the group of a special token, and what a special receiver token is aligned to


@dataclass(frozen=True)
class TokenSpans:
    """The characters of a text that each token covers, as a partition.

    Tokens that share a character (the bytes of an emoji) form one group; every character belongs to exactly one group,
    and groups follow one another without gaps. White space that a tokenizer leaves out of its offsets belongs to the
    token after it, at the end of the text to the last token. A token of no width joins the group after it.

    Attributes:
        ids: per token its id, special tokens included.
        group: per token the number of its group, NO_TEXT for special tokens. Never decreases over the other tokens.
        bounds: per group (start, end) in characters; `start` is the `end` of the group before.
        length: characters of the text.
    """

    ids: tuple[int, ...]
    group: tuple[int, ...]
    bounds: tuple[tuple[int, int], ...]
    length: int

    def within(self, start: int, end: int) -> TokenSpans:
        """The same tokens over the characters start .. end alone, counted from `start`.

        For a text inside a chat template: tokens outside become special, one that reaches over an edge is cut there.
        """
        if not 0 <= start <= end <= self.length:
            raise ValueError(f"start and end must be within 0..{self.length} and in order, got {start} and {end}")
        kept: dict[int, int] = {}
        bounds: list[tuple[int, int]] = []
        for number, (first, last) in enumerate(self.bounds):
            first, last = max(first, start) - start, min(last, end) - start
            if first < last:
                kept[number] = len(bounds)
                bounds.append((first, last))
        group = tuple(kept.get(number, NO_TEXT) for number in self.group)
        return TokenSpans(self.ids, group, tuple(bounds), end - start)


@dataclass(frozen=True)
class Alignment:
    """For every receiver token the sharer tokens that cover its characters. Made by `align`.

    Attributes:
        sharer, receiver: the tokens of both sides.
        members: per sharer group (first token, last token).
        cover: per receiver group the (sharer group, characters in common) that cover it, in order, at least one.
    """

    sharer: TokenSpans
    receiver: TokenSpans
    members: tuple[tuple[int, int], ...]
    cover: tuple[tuple[tuple[int, int], ...], ...]

    def index(self, strategy: Strategy = "last") -> Tensor:
        """(receiver tokens,) int64: one sharer token for each receiver token, NO_TEXT for special receiver tokens.

        "first": the first token that covers a character of it. "last": the one that completes it, which alone has read
        all of it. "longest": the last token of the group with most characters in common, the later one of equals.
        Monotone in all strategies.
        """
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")
        chosen: list[int] = []
        for groups in self.cover:
            if strategy == "first":
                chosen.append(self.members[groups[0][0]][0])
            elif strategy == "last":
                chosen.append(self.members[groups[-1][0]][1])
            else:
                longest = max(groups, key=lambda pair: (pair[1], pair[0]))
                chosen.append(self.members[longest[0]][1])
        return torch.tensor([NO_TEXT if g == NO_TEXT else chosen[g] for g in self.receiver.group], dtype=torch.long)

    def weights(self) -> Tensor:
        """(receiver tokens, sharer tokens) float32 sparse COO: which share of its characters each sharer token covers.

        Rows of text sum to 1, rows of special tokens are empty. Tokens of one sharer group share its part equally.
        """
        rows, columns, values = [], [], []
        tokens: dict[int, list[int]] = {}
        for token, group in enumerate(self.sharer.group):
            tokens.setdefault(group, []).append(token)
        for row, group in enumerate(self.receiver.group):
            if group == NO_TEXT:
                continue
            start, end = self.receiver.bounds[group]
            for other, common in self.cover[group]:
                for column in tokens[other]:
                    rows.append(row)
                    columns.append(column)
                    values.append(common / (end - start) / len(tokens[other]))
        size = (len(self.receiver.ids), len(self.sharer.ids))
        where = torch.tensor([rows, columns], dtype=torch.long).reshape(2, -1)
        return torch.sparse_coo_tensor(where, torch.tensor(values), size, is_coalesced=True, check_invariants=False)


def token_spans(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> TokenSpans:
    """The tokens of `text` and the characters that each covers.

    Args:
        tokenizer: a fast tokenizer of Transformers, or anything that is called and answers like one.
        text: what is tokenized; for a chat the rendered template, whose text is then cut out by `TokenSpans.within`.
        add_special_tokens: as the tokenizer takes it. False for a rendered chat template.

    Raises:
        TypeError: where the tokenizer gives no offsets (slow tokenizers).
        ValueError: for offsets that are outside the text or run backwards.
    """
    check_offsets(tokenizer)
    encoded = tokenizer(
        text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, return_special_tokens_mask=True
    )
    for name in ("input_ids", "offset_mapping", "special_tokens_mask"):
        if name not in encoded:
            raise TypeError(f"tokenizer ({type(tokenizer).__name__}) returns no {name}: a fast tokenizer is wanted")
    # The mask marks what the tokenizer added. A special token that is written in the text has characters.
    marks, offsets = encoded["special_tokens_mask"], [tuple(pair) for pair in encoded["offset_mapping"]]
    added = [bool(mark) and start == end for mark, (start, end) in zip(marks, offsets, strict=True)]
    return spans_from_offsets(encoded["input_ids"], offsets, added, len(text))


def check_offsets(tokenizer: Any, name: str = "tokenizer") -> None:
    """TypeError for a tokenizer that says itself that it gives no offsets."""
    if getattr(tokenizer, "is_fast", True) is False:
        raise TypeError(f"{name} ({type(tokenizer).__name__}) gives no character offsets: a fast tokenizer is wanted")


def spans_from_offsets(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], special: Sequence[bool], length: int
) -> TokenSpans:
    """Groups tokens by the characters they share and closes the gaps between groups; see `TokenSpans`.

    Args:
        ids: per token its id.
        offsets: per token (start, end) in characters, ordered, as the tokenizer gives them.
        special: per token whether it stands for no characters.
        length: characters of the text.

    Raises:
        ValueError: for offsets that are outside the text or run backwards, and for a text without tokens.
    """
    group: list[int] = []
    ends: list[int] = []
    open_start, open_end = 0, 0  # of the group that tokens may still join
    for token, ((start, end), skip) in enumerate(zip(offsets, special, strict=True)):
        if skip:
            group.append(NO_TEXT)
            continue
        if not open_start <= start <= end <= length:
            raise ValueError(
                f"offsets of token {token} are ({start}, {end}), wanted in order within {open_start}..{length}"
            )
        joins = bool(ends) and (start < open_end or ends[-1] == (ends[-2] if len(ends) > 1 else 0))
        if joins:
            ends[-1] = max(ends[-1], end)
        else:
            ends.append(end)
            open_start = start
        open_end = ends[-1]
        group.append(len(ends) - 1)
    if ends and ends[-1] == (ends[-2] if len(ends) > 1 else 0) and len(ends) > 1:
        # tokens of no width at the end of the text join the last group
        ends.pop()
        group = [min(number, len(ends) - 1) for number in group]
    if not ends and length:
        raise ValueError(f"the tokenizer made no token of a text of {length} characters")
    if ends:
        ends[-1] = length
    if length == 0:
        return TokenSpans(tuple(ids), (NO_TEXT,) * len(group), (), 0)
    bounds = tuple(zip([0, *ends[:-1]], ends, strict=True))
    return TokenSpans(tuple(ids), tuple(group), bounds, length)


def align(sharer: TokenSpans, receiver: TokenSpans) -> Alignment:
    """For every receiver token the sharer tokens that cover it. ValueError where the texts differ in length."""
    if sharer.length != receiver.length:
        raise ValueError(
            f"sharer tokens cover {sharer.length} characters, receiver tokens {receiver.length}: one text is wanted"
        )
    members: dict[int, tuple[int, int]] = {}
    for token, group in enumerate(sharer.group):
        if group != NO_TEXT:
            members[group] = (members.get(group, (token, token))[0], token)
    cover: list[tuple[tuple[int, int], ...]] = []
    at = 0
    for start, end in receiver.bounds:
        while sharer.bounds[at][1] <= start:
            at += 1
        groups, other = [], at
        while other < len(sharer.bounds) and sharer.bounds[other][0] < end:
            first, last = sharer.bounds[other]
            groups.append((other, min(last, end) - max(first, start)))
            other += 1
        cover.append(tuple(groups))
    return Alignment(sharer, receiver, tuple(members[g] for g in range(len(sharer.bounds))), tuple(cover))
