"""Made-up texts that state facts, and questions about them, as many as are wanted.

    questions = corpus.made_up(20_000, seed=0, split="fit")

No model can know the answers: they are drawn. A text states several facts, some of the same relation about other
subjects, so that an answer has to be found and not only recognised as a name or a number. Every answer occurs once in
its text. Held-out texts share no phrasing, no subject and no answer with those of the split "fit".
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice

from c2c_kernels.corpus.documents import SPLITS
from c2c_kernels.corpus.errors import CorpusError
from c2c_kernels.corpus.fillers import fill
from c2c_kernels.corpus.questions import Question, normal
from c2c_kernels.corpus.relations import of_split

# Relations per text; with fewer than facts, some come more than once.
_RELATIONS = 4


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
    for name, value in (("count", count), ("facts", facts), ("per_text", per_text)):
        if value < 1:
            raise CorpusError(f"{name} must be at least 1, got {value}")
    if per_text > facts:
        raise CorpusError(f"per_text must be at most facts ({facts}), got {per_text}")
    if split not in SPLITS:
        raise CorpusError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    draw = random.Random(f"{split}/{seed}")
    return list(islice(_stream(draw, split, facts, per_text, between), count))


def _stream(draw: random.Random, split: str, facts: int, per_text: int, between: Sequence[str]) -> Iterator[Question]:
    while True:
        text, questions = _text(draw, split, facts)
        if between:
            text = "\n\n".join((draw.choice(between), text, draw.choice(between)))
        asked = [q for q in questions if f" {normal(text)} ".count(f" {normal(q.answer)} ") == 1]
        draw.shuffle(asked)
        for question in asked[:per_text]:
            yield Question(text, question.question, question.answer, question.kind, question.template)


def _text(draw: random.Random, split: str, facts: int) -> tuple[str, list[Question]]:
    """A paragraph of facts, and one question for each."""
    relations = of_split(split)
    relations = draw.sample(relations, min(_RELATIONS, len(relations)))
    taken: set[str] = set()
    sentences, questions = [], []
    for number in range(facts):
        relation, statements, asked = relations[number % len(relations)]
        subject, answer = (_unused(kind, split, draw, taken) for kind in (relation.subject, relation.answer))
        statement, question = draw.choice(statements), draw.choice(asked)
        sentences.append(_sentence(relation.statements[statement].format(x=subject, a=answer)))
        questions.append(
            Question(
                "",
                relation.questions[question].format(x=subject),
                answer,
                relation.answer,
                f"{relation.name}/{statement}/{question}",
            )
        )
    draw.shuffle(sentences)
    return " ".join(sentences), questions


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
