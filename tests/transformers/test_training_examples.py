"""What training deals out: windows of text, texts said again, questions; and who takes which."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from test_train import OPTIONS, QUESTIONS, SHARER_TOKENIZER, TEXTS, TOKENIZER, projector_of, streams
from tiny_models import build

from c2c_kernels.training import Examples
from c2c_kernels.training.batches import NOT_SCORED, collate
from c2c_kernels.training.course import Course
from c2c_kernels.training.examples import Repeats, Texts
from c2c_kernels.training.material import streams as all_streams


def test_windows_cover_the_texts_and_rows_leak_nothing():
    options = replace(OPTIONS, context=60, continuation=12)
    stream = Texts(TEXTS, SHARER_TOKENIZER, TOKENIZER, (1,), options)
    windows = [stream.window(n) for n in range(40)]
    again = Texts(TEXTS, SHARER_TOKENIZER, TOKENIZER, (1,), options)
    assert [again.window(n) for n in (39, 3)] == [windows[39], windows[3]]
    assert windows[0] != Texts(TEXTS, SHARER_TOKENIZER, TOKENIZER, (1,), replace(options, seed=1)).window(0)
    starts = set()
    for window in windows:
        sharer_starts = {start for start, _ in window.sharer.bounds}
        for row in window.rows:
            starts.add(row.start)
            assert row.inside and row.first == 1 and 2 <= len(row.ids) <= 13
            assert row.ids == window.receiver.ids[row.start : row.start + len(row.ids)]
            assert row.start <= options.context + 16
            assert window.receiver.bounds[window.receiver.group[row.start]][0] in sharer_starts
    assert len(starts) > 20
    first_epoch = stream._pieces(0)
    covered = sum(last - first for _, first, last in first_epoch)
    assert 0.7 * stream.tokens < covered <= stream.tokens
    spans = sorted(first_epoch)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(spans))
    assert sorted(stream._pieces(1)) != spans


def test_questions_about_a_text_share_a_read_and_only_answers_are_scored():
    projector = projector_of((build("gemma3"), build("llama")))
    stream = streams(projector)[1]
    window = stream.window(0)
    assert window.head == (1, 5) and [row.ids[-2:] for row in window.rows] == [(7, 9), (8, 9)]
    batch = collate([window], projector)
    assert batch.scored == 4 and not batch.inside
    assert batch.targets[batch.targets != NOT_SCORED].tolist() == [7, 9, 8, 9]
    assert batch.visible.tolist() == [len(window.receiver.ids)] * 2
    assert batch.offset.tolist() == [2 + len(window.receiver.ids)] * 2
    assert {stream.window(n).sharer.ids for n in range(9)} == {stream.window(n).sharer.ids for n in range(9, 18)}


def test_repetitions_are_pieces_of_the_whole_text():
    projector = projector_of((build("gemma3"), build("llama")))
    stream = Repeats(streams(projector)[0])
    window = stream.window(0)
    text, length = window.receiver.ids, OPTIONS.continuation + 1
    pieces = {text[at : at + length] for at in range(len(text) - length + 1)}
    assert len(window.rows) == 3 and all(row.ids in pieces for row in window.rows)
    assert len({row.ids for row in window.rows}) > 1
    batch = collate([window], projector)
    told = min(8, length - 1)
    assert batch.visible.tolist() == [len(text)] * 3 and not batch.inside
    assert batch.targets[:, : told - 1].eq(NOT_SCORED).all() and batch.scored == 3 * (length - told)
    assert stream.window(0) == window != stream.window(1)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_batches_are_dealt_out_to_processes(weight):
    """Two processes take together what one takes, in all kinds by the weights."""
    projector = projector_of((build("gemma3"), build("llama")))
    options = replace(OPTIONS, question_batch=3, batch=2, question_weight=0.25, repeat_weight=weight)
    tokenizers = (SHARER_TOKENIZER, TOKENIZER)
    found = all_streams(Examples(TEXTS, QUESTIONS), projector.prefix, tokenizers, options)
    one, first, second = (Course(found, options) for _ in range(3))
    for number in range(30):
        wanted = one.deal()
        parts = [course.deal(number % 2 == rank) for rank, course in enumerate((first, second))]
        assert parts[number % 2] == wanted and parts[1 - number % 2] == []
        assert len(wanted) == {"text": 2, "repeats": 2, "questions": 3}[wanted[0].kind]
        assert one.taken == first.taken == second.taken
    assert 2 <= one.taken["questions"] / 3 <= 14
    assert set(one.taken) == {"text", "questions"} if not weight else 4 <= one.taken["repeats"] / 2 <= 18
