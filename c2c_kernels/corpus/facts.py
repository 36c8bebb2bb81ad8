"""Made-up texts that state facts, and questions about them, as many as are wanted.

    questions = corpus.made_up(20_000, seed=0, split="fit")

No model can know the answers: they are drawn. A text states several facts, some of the same relation about other
subjects, so that an answer has to be found and not only recognised as a name or a number. Every answer occurs once in
its text. Held-out texts share no phrasing, no subject and no answer with those of the split "fit".
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from c2c_kernels.corpus.documents import SPLITS
from c2c_kernels.corpus.errors import CorpusError
from c2c_kernels.corpus.fillers import fill
from c2c_kernels.corpus.questions import Question, normal
from c2c_kernels.corpus.relations import of_split

# Relations per text; with fewer than facts, some come more than once.
_RELATIONS = 4
# Questions about each text of `recalled`.
_ABOUT_EACH = 3
# Ways to ask for a whole sentence; the last one is for held-out texts alone.
_RECALL = (
    "What does the text say about {x}?",
    "Repeat what is said about {x}.",
    "What is written about {x}?",
    "Which sentence mentions {x}?",
)


@dataclass(frozen=True)
class _Fact:
    """A sentence of a text, whom or what it is about, and the question that it answers."""

    sentence: str
    subject: str
    question: Question


def made_up(
    count: int,
    *,
    seed: int,
    split: str,
    facts: int = 6,
    per_text: int = 3,
    between: Sequence[str] = (),
) -> list[Question]:
    """`count` questions about made-up texts; the same for the same arguments.

    Args:
        count: of questions.
        seed: of all that is drawn.
        split: "fit" or "held-out".
        facts: stated in each text.
        per_text: how many of them are asked for; these questions share their text and follow one another.
        between: paragraphs of other text; every text gets one before and one after its facts. Empty: none.

    Raises:
        CorpusError: for numbers below 1 or a split there is not.
    """
    _check(count, split, facts, per_text)
    draw = random.Random(f"{split}/{seed}")
    return list(islice(_stream(draw, split, facts, per_text, between), count))


def recalled(count: int, *, seed: int, split: str, facts: int = 6) -> list[Question]:
    """`count` questions about made-up texts, three about each: of every second text two of them ask for a sentence.

    A sentence is found as its fact is, and has some 15 tokens to be scored where a fact has 3.

    Args:
        count, seed, split, facts: see `made_up`; at least 3 facts.

    Raises:
        CorpusError: as `made_up` does.
    """
    if facts < _ABOUT_EACH:
        raise CorpusError(f"facts must be at least {_ABOUT_EACH}, got {facts}")
    _check(count, split, facts, _ABOUT_EACH)
    return list(islice(_recall_stream(random.Random(f"recall/{split}/{seed}"), split, facts), count))


def _check(count: int, split: str, facts: int, per_text: int) -> None:
    for name, value in (("count", count), ("facts", facts), ("per_text", per_text)):
        if value < 1:
            raise CorpusError(f"{name} must be at least 1, got {value}")
    if per_text > facts:
        raise CorpusError(f"per_text must be at most facts ({facts}), got {per_text}")
    if split not in SPLITS:
        raise CorpusError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def _recall_stream(draw: random.Random, split: str, facts: int) -> Iterator[Question]:
    ways = _RECALL[-1:] if split == "held-out" else _RECALL[:-1]
    while True:
        for sentences in (0, _ABOUT_EACH - 1):
            text, found = _text(draw, split, facts)
            found = _answered_once(text, found)
            draw.shuffle(found)
            for number, fact in enumerate(found[:_ABOUT_EACH]):
                if number < sentences:
                    way = draw.choice(ways).format(x=fact.subject)
                    yield Question(text, way, fact.sentence, "sentence", fact.question.template)
                else:
                    yield _about(text, fact)


def _stream(draw: random.Random, split: str, facts: int, per_text: int, between: Sequence[str]) -> Iterator[Question]:
    while True:
        text, found = _text(draw, split, facts)
        if between:
            text = "\n\n".join((draw.choice(between), text, draw.choice(between)))
        asked = _answered_once(text, found)
        draw.shuffle(asked)
        for fact in asked[:per_text]:
            yield _about(text, fact)


def _answered_once(text: str, facts: Sequence[_Fact]) -> list[_Fact]:
    return [fact for fact in facts if f" {normal(text)} ".count(f" {normal(fact.question.answer)} ") == 1]


def _about(text: str, fact: _Fact) -> Question:
    asked = fact.question
    return Question(text, asked.question, asked.answer, asked.kind, asked.template)


def _text(draw: random.Random, split: str, facts: int) -> tuple[str, list[_Fact]]:
    """A paragraph of facts, and these."""
    relations = of_split(split)
    relations = draw.sample(relations, min(_RELATIONS, len(relations)))
    taken: set[str] = set()
    found = []
    for number in range(facts):
        relation, statements, asked = relations[number % len(relations)]
        subject, answer = (_unused(kind, split, draw, taken) for kind in (relation.subject, relation.answer))
        statement, question = draw.choice(statements), draw.choice(asked)
        asking = Question(
            "",
            relation.questions[question].format(x=subject),
            answer,
            relation.answer,
            f"{relation.name}/{statement}/{question}",
        )
        sentence = _sentence(relation.statements[statement].format(x=subject, a=answer))
        found.append(_Fact(sentence, subject, asking))
    sentences = [fact.sentence for fact in found]
    draw.shuffle(sentences)
    return " ".join(sentences), found


def _unused(kind: str, split: str, draw: random.Random, taken: set[str]) -> str:
    """A filler that shares no word with those of the text so far: an answer must not be told by another fact."""
    while True:
        made = fill(kind, split, draw)
        words = set(made.lower().split())
        if not words & taken:
            taken |= words
            return made


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
