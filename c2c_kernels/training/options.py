"""How a projector is trained."""

from __future__ import annotations

from dataclasses import dataclass

from c2c_kernels.projectors import CacheProjector


@dataclass(frozen=True)
class TrainOptions:
    """How a projector is trained.

    Attributes:
        steps: optimiser steps; None where `minutes` is given.
        minutes: how long to train; learning rate and gates then follow the time instead of the steps.
        batch: windows of plain text that are read at once (by each process).
        question_batch: texts with questions that are read at once.
        accumulate: how many such batches a step takes (in each process).
        question_weight: share of the batches that are questions where there is both text and questions.
        repeat_weight: share of the batches of text in which the receiver says pieces of it again, instead of going on.
        context: most receiver tokens of a window that are read through the projector; what is said again stands after
            its continuation as well.
        least_context: fewest of them.
        continuation: own tokens of the receiver that follow, at most; a window gives several continuations.
        questions_per_text: how many questions about one text are asked at once, at most.
        lr: learning rate of the maps' weights, in the coordinates of `training.coordinates`.
        bias_lr: that of the biases, in standard deviations of what a map gives; 0: what a map gives at the mean of what
            it reads stays.
        gate_lr: that of the gates' logits; 0: they stay, and a projector's temperature with them.
        warmup: share of the run in which the rates rise from 0; they fall to 0 along a cosine after it.
        weight_decay: of AdamW, towards 0.
        clip: largest norm of the gradient.
        distill: w in loss = (1 - w) cross-entropy + w KL(receiver that has read the text || receiver that has not).
        match: weight of the squared error of projected keys and values, as a share of the variance of the receiver's.
        gate_temperature: at the start and at the end.
        average: share in the result of the projector that training started from. A short run on new material forgets
            some of the old; the mean of both keeps most of either.
        held_out: windows of each kind that are kept from training and looked at in between; 0: none.
        validations: how often they are looked at in a run.
        seed: of the order of the texts and of where they are cut.
        checkpoint_seconds: between two checkpoints.
    """

    steps: int | None = None
    minutes: float | None = None
    batch: int = 1
    question_batch: int = 4
    accumulate: int = 2
    question_weight: float = 0.3
    repeat_weight: float = 0.0
    context: int = 480
    least_context: int = 64
    continuation: int = 128
    questions_per_text: int = 3
    lr: float = 4e-4
    bias_lr: float = 3e-3
    gate_lr: float = 1e-2
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    distill: float = 0.8
    match: float = 0.0
    gate_temperature: tuple[float, float] = (1.0, 0.5)
    average: float = 0.0
    held_out: int = 8
    validations: int = 6
    seed: int = 0
    checkpoint_seconds: float = 120.0

    def temperatures(self, projector: CacheProjector) -> tuple[float, float]:
        """Of the projector's gates at the start and at the end."""
        return self.gate_temperature if self.gate_lr else (projector.gate_temperature,) * 2

    @property
    def window(self) -> int:
        """Receiver tokens of a window: context and the continuation after it."""
        return self.context + self.continuation

    def check(self, projector: CacheProjector | None = None) -> None:
        """ValueError naming the option that cannot be."""
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"either steps or minutes is wanted, got {self.steps} and {self.minutes}")
        for name in ("steps", "batch", "question_batch", "accumulate", "least_context", "questions_per_text"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("minutes", "lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0, got {value}")
        for name in ("bias_lr", "gate_lr", "match", "weight_decay", "held_out", "validations", "checkpoint_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("distill", "question_weight", "repeat_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be within 0..1, got {getattr(self, name)}")
        for name in ("warmup", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.continuation < 2:
            raise ValueError(f"continuation must be at least 2, got {self.continuation}")
        if self.context < self.least_context:
            raise ValueError(f"context must be at least least_context ({self.least_context}), got {self.context}")
        if len(self.gate_temperature) != 2 or not min(self.gate_temperature) > 0:
            raise ValueError(f"gate_temperature must be two numbers above 0, got {self.gate_temperature}")
        if self.match and projector is not None and projector.tokens != "receiver":
            raise ValueError(
                f'match compares with the receiver\'s own tokens: it needs tokens="receiver", not {projector.tokens!r}'
            )
