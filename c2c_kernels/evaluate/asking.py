"""Questions whose answer stands in a text, answered in five arms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from c2c_kernels.corpus import Question, is_exact, is_right
from c2c_kernels.evaluate.arms import ARMS, Projections, Reader
from c2c_kernels.evaluate.results import AnswerResult
from c2c_kernels.integrations.transformers import SharedContext, session


class Prompt(Protocol):
    """Token ids: `head` before the text, the text, `rest` after it; `bare` is the question alone."""

    @property
    def head(self) -> list[int]: ...
    @property
    def rest(self) -> list[int]: ...
    @property
    def bare(self) -> list[int]: ...


Generate = Callable[[list[int]], str]  # from a prompt to the receiver's answer


@torch.inference_mode()
def ask(
    reader: Reader,
    questions: Sequence[Question],
    prompt: Callable[[str, str], Prompt],
    generate: Generate,
    *,
    name: str = "",
    seed: int = 0,
    update: Callable[[int], None] = lambda done: None,
) -> AnswerResult:
    """The answer to every question in every arm.

    Args:
        questions: those about the same text follow one another.
        prompt: from text and question to token ids; the same `head` for all.
        generate: greedy answers of the receiver, which reads the context of the open session.
        name: of the set.
        seed: of the noise.
        update: called with how many questions are done.

    Raises:
        ValueError: for questions about one text alone.
    """
    texts = list(dict.fromkeys(question.context for question in questions))
    if len(texts) < 2:
        raise ValueError(f"questions are about {len(texts)} text, at least 2 are wanted: another one is the mismatched")
    head = prompt(texts[0], questions[0].question).head
    projections = Projections(reader, texts, head)
    generator = torch.Generator().manual_seed(seed)
    right, exact = (torch.zeros(len(ARMS), len(texts), dtype=torch.float64) for _ in range(2))
    asked = torch.zeros(len(texts), dtype=torch.float64)
    answers: list[dict[str, Any]] = []
    other = projections.last
    for column, text in enumerate(texts):
        projected = projections.take(column)
        tokens = reader.receiver_tokenizer(text, add_special_tokens=False)["input_ids"]
        contexts: dict[str, SharedContext] = {
            "text": reader.read([*head, *tokens]),
            "projected": projected,
            "mismatched": other,
            "noise": projections.statistics.noise(projected, generator),
        }
        for question in (q for q in questions if q.context == text):
            given = prompt(text, question.question)
            written = {"alone": generate(given.bare)}
            for arm, context in contexts.items():
                with session(reader.receiver, context):
                    written[arm] = generate(given.rest)
            for row, arm in enumerate(ARMS):
                right[row, column] += is_right(written[arm], question.answer)
                exact[row, column] += is_exact(written[arm], question.answer)
            asked[column] += 1
            record = {"question": question.question, "answer": question.answer, "kind": question.kind}
            answers.append({**record, "written": written})
            update(len(answers))
        other = projected
    return AnswerResult(name, right, exact, asked, tuple(answers))
