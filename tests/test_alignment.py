"""Alignment of tokens by characters: the partition, the strategies and their weights, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from c2c_kernels.alignment import NO_TEXT, STRATEGIES, align, spans_from_offsets, token_spans


def spans(*offsets, length, special=()):
    return spans_from_offsets(range(len(offsets)), offsets, [i in special for i in range(len(offsets))], length)


@st.composite
def tokenizations(draw, length):
    """Offsets as tokenizers give them: pieces of a character, left-out blanks, no width, special tokens between."""
    offsets, special, at = [], [], 0
    while at < length:
        kind = draw(st.sampled_from(["token", "token", "bytes", "gap", "empty", "special", "across"]))
        if kind == "token":
            end = draw(st.integers(at + 1, min(length, at + 4)))
            offsets.append((at, end))
            at = end
        elif kind == "bytes":
            count = draw(st.integers(2, 4))
            offsets += [(at, at + 1)] * count
            at += 1
        elif kind == "across" and at + 2 <= length:  # a blank and the first bytes of the character after it
            offsets += [(at, at + 2), (at + 1, at + 2)]
            at += 2
        elif kind == "gap" and at + 1 < length:
            at += 1
            offsets.append((at, at + 1))
            at += 1
        elif kind == "empty":
            offsets.append((at, at))
        elif kind == "special":
            special.append(len(offsets))
            offsets.append((0, 0))
    return spans(*offsets, length=length, special=special) if offsets else None


@st.composite
def pairs(draw):
    length = draw(st.integers(1, 30))
    return draw(tokenizations(length)), draw(tokenizations(length))


def assert_partition(found):
    """Every character is in one group, groups follow one another, tokens run through them in order."""
    characters = [c for start, end in found.bounds for c in range(start, end)]
    assert characters == list(range(found.length))
    assert all(start < end for start, end in found.bounds)
    text = [group for group in found.group if group != NO_TEXT]
    assert text == sorted(text)
    assert sorted(set(text)) == list(range(len(found.bounds)))
    assert len(found.group) == len(found.ids)


def assert_aligned(sharer, receiver):
    """Against the definition, character by character."""
    alignment = align(sharer, receiver)
    owner = {c: g for g, (start, end) in enumerate(sharer.bounds) for c in range(start, end)}
    tokens = {}
    for token, group in enumerate(sharer.group):
        tokens.setdefault(group, []).append(token)
    got = {name: alignment.index(name).tolist() for name in STRATEGIES}
    weights = alignment.weights().to_dense()
    for token, group in enumerate(receiver.group):
        if group == NO_TEXT:
            assert all(got[name][token] == NO_TEXT for name in STRATEGIES)
            assert not weights[token].any()
            continue
        start, end = receiver.bounds[group]
        owners = [owner[c] for c in range(start, end)]
        most = max(owners.count(g) for g in owners)
        assert got["first"][token] == tokens[owners[0]][0]
        assert got["last"][token] == tokens[owners[-1]][-1]
        assert got["longest"][token] == tokens[max(g for g in owners if owners.count(g) == most)][-1]
        wanted = torch.zeros(len(sharer.ids))
        for g in owners:
            for t in tokens[g]:
                wanted[t] += 1 / len(owners) / len(tokens[g])
        torch.testing.assert_close(weights[token], wanted)
    for name in STRATEGIES:
        text = [t for t in got[name] if t != NO_TEXT]
        assert text == sorted(text), name


@given(pairs())
def test_every_character_once_and_monotone(pair):
    sharer, receiver = pair
    assert_partition(sharer)
    assert_partition(receiver)
    assert_aligned(sharer, receiver)


@given(pairs(), st.data())
def test_within_a_template(pair, data):
    sharer, _ = pair
    start = data.draw(st.integers(0, sharer.length - 1))
    end = data.draw(st.integers(start + 1, sharer.length))
    cut = [side.within(start, end) for side in pair]
    for side, whole in zip(cut, pair, strict=True):
        assert_partition(side)
        for token, group in enumerate(whole.group):
            outside = group == NO_TEXT or whole.bounds[group][1] <= start or whole.bounds[group][0] >= end
            assert (side.group[token] == NO_TEXT) == outside
    assert_aligned(*cut)


def test_by_hand():
    sharer = spans((0, 0), (0, 5), (5, 9), length=9, special=[0])  # <s> hello| you
    receiver = spans((0, 2), (2, 7), (7, 9), length=9)
    alignment = align(sharer, receiver)
    assert alignment.index("first").tolist() == [1, 1, 2]
    assert alignment.index("longest").tolist() == [1, 1, 2]
    assert alignment.index("last").tolist() == [1, 2, 2]
    wanted = torch.tensor([[0, 1, 0], [0, 0.6, 0.4], [0, 0, 1]])
    torch.testing.assert_close(alignment.weights().to_dense(), wanted)
    assert align(receiver, sharer).index("last").tolist() == [NO_TEXT, 1, 2]


def test_a_template_of_no_text():
    found = spans((0, 3), (3, 5), length=5).within(3, 3)
    assert found.bounds == ()
    assert found.group == (NO_TEXT, NO_TEXT)
    assert align(found, found).index().tolist() == [NO_TEXT, NO_TEXT]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([(0, 2), (2, 9)], r"offsets of token 1 are \(2, 9\), wanted in order within 0\.\.5"),
        ([(2, 4), (0, 5)], r"offsets of token 1 are \(0, 5\), wanted in order within 2\.\.5"),
        ([(3, 2)], r"offsets of token 0 are \(3, 2\)"),
        ([], "made no token of a text of 5 characters"),
    ],
)
def test_bad_offsets(offsets, message):
    with pytest.raises(ValueError, match=message):
        spans(*offsets, length=5)


def test_refusals():
    one, other = spans((0, 5), length=5), spans((0, 6), length=6)
    with pytest.raises(ValueError, match="sharer tokens cover 5 characters, receiver tokens 6"):
        align(one, other)
    with pytest.raises(ValueError, match="strategy must be one of first, longest, last; got 'middle'"):
        align(one, one).index("middle")
    with pytest.raises(ValueError, match=r"within 0\.\.5 and in order, got 2 and 7"):
        one.within(2, 7)


def test_tokenizers_without_offsets():
    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match=r"tokenizer \(Slow\) gives no character offsets"):
        token_spans(Slow(), "text")
    with pytest.raises(TypeError, match="returns no offset_mapping"):
        token_spans(lambda text, **_: {"input_ids": [1]}, "text")
