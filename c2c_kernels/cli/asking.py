"""Questions put to a receiver in the five arms of an evaluation, in the command line's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from c2c_kernels import corpus
from c2c_kernels.cli.progress import stage

if TYPE_CHECKING:
    from c2c_kernels.evaluate import AnswerResult, Reader

ANSWER_TOKENS = 24  # of an answer at most


def ask_all(reader: Reader, questions: Sequence[corpus.Question], *, name: str, seed: int) -> AnswerResult:
    """The answers to a set of questions called `name`; `seed` is the noise's."""
    from c2c_kernels.cli.answers import answer
    from c2c_kernels.cli.prompts import split_prompt
    from c2c_kernels.evaluate import ask

    model, tokenizer = reader.receiver, reader.receiver_tokenizer
    with stage(f"questions: {name}", len(questions)) as update:
        return ask(
            reader,
            questions,
            lambda text, question: split_prompt(tokenizer, text, question),
            lambda ids: answer(model, tokenizer, ids, ANSWER_TOKENS).text,
            name=name,
            seed=seed,
            update=update,
        )
