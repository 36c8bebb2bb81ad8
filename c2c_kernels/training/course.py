"""Which windows a step takes, and how rates and gates follow the run: functions of numbers, nothing is drawn twice."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from c2c_kernels.training.examples import Stream, Window
from c2c_kernels.training.options import TrainOptions


class Course:
    """Deals windows out to batches.

    Batch g of the run (of step s, process r, accumulation a: g = (s * accumulate + a) * processes + r) is of a kind
    drawn for g, and takes the next windows of that kind; every process counts all batches and makes its own.

    Args:
        streams: of text (and of its repetitions), of questions, or all of them.
        options: sizes, weight and seed.

    Attributes:
        taken: per kind how many windows were dealt out.
        dealt: how many batches were.
    """

    def __init__(self, streams: Sequence[Stream], options: TrainOptions) -> None:
        self._streams = {stream.kind: stream for stream in streams}
        self._options = options
        self.taken = dict.fromkeys(self._streams, 0)
        self.dealt = 0

    def deal(self, mine: bool = True) -> list[Window]:
        """The windows of the next batch, all of one kind; none where it is another process's."""
        kind = self._kind()
        first = self.taken[kind]
        count = self._options.question_batch if kind == "questions" else self._options.batch
        self.taken[kind] += count
        self.dealt += 1
        return [self._streams[kind].window(number) for number in range(first, first + count)] if mine else []

    def _kind(self) -> str:
        """Of the next batch; each of the two draws only where there is something to choose."""
        kinds, options = self._streams, self._options
        if "text" not in kinds:
            return "questions"
        if "questions" in kinds and self._draw("kind") < options.question_weight:
            return "questions"
        return "repeats" if "repeats" in kinds and self._draw("repeats") < options.repeat_weight else "text"

    def _draw(self, what: str) -> float:
        return random.Random(f"{self._options.seed}/{what}/{self.dealt}").random()


def rate(done: float, warmup: float) -> float:
    """Factor on learning rates at a share 0..1 of the run: a line up, half a cosine down to 0."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * min((done - warmup) / (1 - warmup), 1.0)))


def temperature(done: float, ends: tuple[float, float]) -> float:
    """Gate temperature at a share 0..1 of the run: from the first to the second by equal factors."""
    return ends[0] * (ends[1] / ends[0]) ** min(done, 1.0)
