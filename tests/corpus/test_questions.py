from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from c2c_kernels import corpus
from c2c_kernels.corpus import fillers
from c2c_kernels.corpus.questions import normal
from c2c_kernels.corpus.relations import RELATIONS, of_split


@pytest.fixture(scope="module")
def made() -> dict[str, list[corpus.Question]]:
    return {split: corpus.made_up(3000, seed=3, split=split) for split in ("fit", "held-out")}


@pytest.mark.parametrize("split", ["fit", "held-out"])
def test_every_answer_stands_in_its_text_once(made: dict[str, list[corpus.Question]], split: str):
    for question in made[split]:
        assert question.answer in question.context
        assert f" {normal(question.context)} ".count(f" {normal(question.answer)} ") == 1
        assert f" {normal(question.answer)} " not in f" {normal(question.question)} "
        assert "{" not in question.context + question.question


def test_a_subject_has_one_fact_of_a_relation_so_that_the_answer_is_the_only_one(made):
    for question in made["fit"]:
        sentences = [s for s in question.context.split(". ") if question.answer in s]
        assert len(sentences) == 1
        # the subject of the question stands in the sentence of the answer
        capitals = [word.strip("?.") for word in question.question.split()[1:] if word[0].isupper()]
        assert capitals and all(word in sentences[0] for word in capitals)


def test_the_splits_share_no_phrasing_subject_or_answer(made: dict[str, list[corpus.Question]]):
    fit, held_out = made["fit"], made["held-out"]
    for part in ("answer", "template", "question", "context"):
        assert not {getattr(q, part) for q in fit} & {getattr(q, part) for q in held_out}
    kept = {(r.name, s) for r, statements, _ in of_split("held-out") for s in statements}
    used = {(r.name, s) for r, statements, _ in of_split("fit") for s in statements}
    assert not kept & used and len(kept | used) == sum(len(r.statements) for r in RELATIONS)


def test_there_are_far_more_than_can_be_remembered(made: dict[str, list[corpus.Question]]):
    assert len({q.context for q in made["fit"]}) == 1000
    assert len({(q.question, q.answer) for q in made["fit"]}) > 2990
    assert {q.kind for q in made["fit"]} == {"name", "place", "day", "number", "year", "thing", "firm"}


def test_the_seed_and_the_split_decide_alone():
    assert corpus.made_up(30, seed=5, split="fit") == corpus.made_up(30, seed=5, split="fit")
    assert corpus.made_up(20, seed=5, split="fit") == corpus.made_up(30, seed=5, split="fit")[:20]
    assert corpus.made_up(30, seed=5, split="fit") != corpus.made_up(30, seed=6, split="fit")


@pytest.mark.parametrize("split", ["fit", "held-out"])
def test_what_is_to_be_recalled_is_a_fact_or_its_sentence(split: str):
    found = corpus.recalled(600, seed=2, split=split)
    assert found == corpus.recalled(900, seed=2, split=split)[:600] != corpus.recalled(600, seed=3, split=split)
    assert sum(q.kind == "sentence" for q in found) == 200 and len({q.context for q in found}) == 200
    for question in found:
        assert f" {normal(question.context)} ".count(f" {normal(question.answer)} ") == 1
        if question.kind == "sentence":
            subject = question.question.rstrip("?.").split(" about " if split == "fit" else " mentions ")[1]
            assert subject in question.answer and question.answer[-1] == "."
    other = corpus.recalled(600, seed=2, split="held-out" if split == "fit" else "fit")
    for part in ("answer", "question", "context"):
        assert not {getattr(q, part) for q in found} & {getattr(q, part) for q in other}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"facts": 2}, "facts must be at least 3, got 2"),
        ({"split": "test"}, "split must be one of fit, held-out, got 'test'"),
    ],
)
def test_bad_numbers_to_recall_are_named(arguments: dict, message: str):
    with pytest.raises(corpus.CorpusError, match=message):
        corpus.recalled(**{"count": 3, "seed": 0, "split": "fit", **arguments})


def test_other_text_stands_around_the_facts():
    for question in corpus.made_up(9, seed=0, split="fit", between=["Before or after."]):
        first, facts, last = question.context.split("\n\n")
        assert first == last == "Before or after." and question.answer in facts


@pytest.mark.parametrize("kind", sorted(fillers.KINDS))
def test_fillers_belong_to_one_split(kind: str):
    draw = random.Random(0)
    fit, held_out = ({fillers.fill(kind, split, draw) for _ in range(200)} for split in ("fit", "held-out"))
    assert fit and held_out and not fit & held_out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"facts": 2, "per_text": 3}, "per_text must be at most facts"),
        ({"split": "test"}, "split must be one of fit, held-out, got 'test'"),
    ],
)
def test_bad_numbers_are_named(arguments: dict, message: str):
    with pytest.raises(corpus.CorpusError, match=message):
        corpus.made_up(**{"count": 3, "seed": 0, "split": "fit", **arguments})


@pytest.mark.parametrize(
    ("written", "answer", "right", "exact"),
    [
        ("The Brass bell.", "brass bell", True, True),
        ("She won a brass bell, I think.", "brass bell", True, False),
        ("She won a brass bellows.", "brass bell", False, False),
        ("14 March", "4 March", False, False),
        ("In 1889.\nOr 1890.", "1890", False, False),
        ("", "1890", False, False),
        ("It is <wctype.h>", "wctype.h", True, False),
        ("Cafe\u0301", "café", True, True),
        ("MT-Safe", "mt-safe", True, True),
    ],
)
def test_what_is_right(written: str, answer: str, right: bool, exact: bool):
    assert corpus.is_right(written, answer) is right
    assert corpus.is_exact(written, answer) is exact


_PAGE = """NAME
iswblank - test for whitespace wide character

SYNOPSIS
#include <wctype.h>

int iswblank(wint_t wc);

DESCRIPTION
It includes nothing. #include <stdio.h> stands here."""
_PROSE = """First paragraph.

By Transmission Control Protocol (TCP) and Point-to-Point Protocol (PPP), not by Some Other Thing (XYZ).

Last paragraph, about TCP."""


def test_questions_about_real_documents_are_exact():
    documents = [corpus.Document("manual/iswblank.3", _PAGE), corpus.Document("handbook/ipv6", _PROSE)]
    found = {q.question: (q.answer, q.source) for q in corpus.about(documents)}
    assert found == {
        "Which manual page is about this: test for whitespace wide character?": ("iswblank", "manual/iswblank.3"),
        "Which header file has to be included to use iswblank?": ("wctype.h", "manual/iswblank.3"),
        "What is the abbreviation of Transmission Control Protocol?": ("TCP", "handbook/ipv6"),
    }
    assert all(q.answer in q.context for q in corpus.about(documents))


def test_the_context_is_whole_paragraphs_around_the_answer():
    filler = "\n\n".join(f"Paragraph {i}. " + "word " * 60 for i in range(20))
    [question] = corpus.about([corpus.Document("a", f"{filler}\n\n{_PROSE}\n\n{filler}")])
    assert question.answer in question.context and len(question.context) <= 1600
    paragraphs = question.context.split("\n\n")
    assert all(p.startswith(("Paragraph", "First", "By", "Last")) for p in paragraphs) and len(paragraphs) > 4


def test_documents_without_questions_are_refused():
    with pytest.raises(corpus.CorpusError, match="1 documents give no question"):
        corpus.about([corpus.Document("a", "Nothing here.")])


def test_written_questions_come_back_as_they_were(tmp_path: Path, made: dict[str, list[corpus.Question]]):
    corpus.write_questions(made["fit"][:20], tmp_path / "q.jsonl")
    assert corpus.read_questions(tmp_path / "q.jsonl") == made["fit"][:20]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": "a', "line 2: no JSON .* cut off"),
        ("[1]", "line 2: an object with context, question, answer"),
        ('{"context": "a", "question": "b"}', "line 2: `answer` must be a non-empty string"),
        ('{"context": "a", "question": "b", "answer": "a", "kind": 3}', "line 2: `kind` must be a string"),
        ('{"context": "ab c", "question": "b", "answer": "b"}', "line 2: the answer 'b' does not stand in the context"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str):
    good = json.dumps({"context": "a b", "question": "q", "answer": "b"})
    (tmp_path / "q.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(corpus.CorpusError, match=message):
        corpus.read_questions(tmp_path / "q.jsonl")
