"""Facts of several short made-up texts, put to the receiver as an evaluation puts them.

Texts and questions are of the split that neither fit nor training sees, of another seed than the evaluation's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from c2c_kernels import corpus
from c2c_kernels.cli.asking import ask_all

if TYPE_CHECKING:
    from c2c_kernels.evaluate import AnswerResult, Reader

COUNT, _SEED = 12, 1  # three questions about each of four texts
# The arms of an evaluation that the demo shows, by its own names for them.
IN_EVALUATION = {"none": "alone", "text": "text", "cache": "projected", "mismatched": "mismatched"}


def ask_facts(reader: Reader) -> AnswerResult:
    """The answers in all arms."""
    questions = corpus.made_up(COUNT, seed=_SEED, split="held-out")
    return ask_all(reader, questions, name="facts of made-up texts", seed=_SEED)


def rows(facts: AnswerResult) -> list[list[str]]:
    """Per question itself and what was written in every arm; last how many are right."""
    found = []
    for asked in facts.answers:
        written = [asked["written"][arm] for arm in IN_EVALUATION.values()]
        marked = [f"{' '.join(w.split())}{' (right)' * corpus.is_right(w, asked['answer'])}" for w in written]
        found.append([f"{asked['question']} ({asked['answer']})", *marked])
    return [*found, ["right", *(f"{count} of {len(facts.answers)}" for count in right(facts).values())]]


def right(facts: AnswerResult) -> dict[str, int]:
    """How many answers are right in every arm."""
    return {arm: facts.count_right(name) for arm, name in IN_EVALUATION.items()}
