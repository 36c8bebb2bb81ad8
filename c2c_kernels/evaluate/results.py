"""What an evaluation measured, as figures with intervals and as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from c2c_kernels.evaluate.arms import ARMS
from c2c_kernels.evaluate.bootstrap import Interval, interval


@dataclass(frozen=True, eq=False)
class LossResult:
    """Losses on one kind of text.

    Attributes:
        name: of the kind.
        documents: names.
        losses: (arms, documents) float64, sums of -ln p over a document's scored tokens.
        tokens: (documents,) float64, how many were scored.
        pieces: how many contexts.
    """

    name: str
    documents: tuple[str, ...]
    losses: Tensor
    tokens: Tensor
    pieces: int

    def loss(self, arm: str) -> Interval:
        """Nats per token."""
        row = self.losses[ARMS.index(arm)]
        return interval(lambda weights: weights @ row / (weights @ self.tokens), len(self.documents))

    def recovered(self, arm: str) -> Interval:
        """Share of the loss gap between `alone` and `text` that the arm closes; 1 is all, below 0 is harm."""
        alone, text, row = (self.losses[ARMS.index(name)] for name in ("alone", "text", arm))
        return interval(lambda weights: weights @ (alone - row) / (weights @ (alone - text)), len(self.documents))

    def as_json(self) -> dict[str, Any]:
        """Plain data: nats per token, shares, and the sums by document that they come from."""
        return {
            "name": self.name,
            "documents": len(self.documents),
            "pieces": self.pieces,
            "tokens": int(self.tokens.sum()),
            "loss": {arm: asdict(self.loss(arm)) for arm in ARMS},
            "recovered": {arm: asdict(self.recovered(arm)) for arm in ARMS[2:]},
            "by_document": {
                document: {"tokens": int(self.tokens[at]), **dict(zip(ARMS, self.losses[:, at].tolist(), strict=True))}
                for at, document in enumerate(self.documents)
            },
        }


@dataclass(frozen=True, eq=False)
class AnswerResult:
    """Answers to one set of questions.

    Attributes:
        name: of the set.
        right: (arms, texts) float64, how many questions about each text were answered right.
        exact: the same for answers that are the answer and nothing else.
        asked: (texts,) float64.
        answers: per question what was asked, wanted and written in every arm.
    """

    name: str
    right: Tensor
    exact: Tensor
    asked: Tensor
    answers: tuple[dict[str, Any], ...]

    def accuracy(self, arm: str, *, exact: bool = False) -> Interval:
        """Share of questions answered right."""
        row = (self.exact if exact else self.right)[ARMS.index(arm)]
        return interval(lambda weights: weights @ row / (weights @ self.asked), len(self.asked))

    def count_right(self, arm: str) -> int:
        """How many questions were answered right."""
        return int(self.right[ARMS.index(arm)].sum())

    def relative(self, arm: str) -> Interval:
        """Accuracy over that of the receiver that has read the text; NaN where that one is never right."""
        row, text = self.right[ARMS.index(arm)], self.right[ARMS.index("text")]
        return interval(lambda weights: weights @ row / (weights @ text), len(self.asked))

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "texts": len(self.asked),
            "questions": int(self.asked.sum()),
            "accuracy": {arm: asdict(self.accuracy(arm)) for arm in ARMS},
            "exact": {arm: asdict(self.accuracy(arm, exact=True)) for arm in ARMS},
            "relative": {arm: asdict(self.relative(arm)) for arm in ARMS},
            "answers": list(self.answers),
        }


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured, and with what."""

    about: dict[str, Any]
    losses: list[LossResult] = field(default_factory=list)
    answers: list[AnswerResult] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain data, NaN as None."""
        return without_nan(
            {
                **self.about,
                "loss": [result.as_json() for result in self.losses],
                "questions": [result.as_json() for result in self.answers],
            }
        )


def without_nan(value: Any) -> Any:
    """Plain data that JSON can hold: None for NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
