"""The cost model behind strategy="auto" beside what it predicts: both strategies, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch

from c2c_kernels.backends import cost, native
from c2c_kernels.bench import alternatives, attention
from c2c_kernels.bench.check import WrongResultError, attention_problem
from c2c_kernels.bench.inputs import AttentionInputs
from c2c_kernels.bench.inputs import attention as draw
from c2c_kernels.bench.results import Choice
from c2c_kernels.bench.shapes import PAIRS, Case, matches
from c2c_kernels.bench.timing import Effort, alternate
from c2c_kernels.segment import to_tensors

STRATEGIES = ("absorb", "materialize")
_EFFORT = Effort(seconds=0.08, least=4, most=40)
_MARGIN = 1.1  # a choice is wrong where it takes this many times the other's time, and their quartiles are apart
_LONGEST = 1.0  # seconds predicted; longer calls are not measured


def grid(*, quick: bool = False, dtypes: Sequence[str] | None = None, text: str = "") -> list[Case]:
    """The shapes at which the choice is looked at, as cases of the family "explain"."""
    kinds = [name for name in ("float32", "bfloat16") if dtypes is None or name in dtypes]
    queries, tokens = ((1, 16, 128), (1024, 8192)) if quick else ((1, 8, 24, 64, 256), (256, 2048, 16384))
    cases = [
        Case("explain", receiver, dtype, sharer, q_len=q_len, own=q_len, shared=shared)
        for dtype, (receiver, sharer), q_len, shared in product(kinds[-1:] if quick else kinds, PAIRS, queries, tokens)
    ]
    return [case for case in cases if matches(case.name, text)]


def explain(case: Case) -> Choice | None:
    """What the model says about one shape and what is so; None where the calls would take long.

    Raises:
        WrongResultError: the result of a strategy does not match the reference; it is not timed.
    """
    with torch.no_grad():
        inputs = draw(replace(case, family="prefill-raw"))[0]
        predicted, chosen = _predict(case, inputs)
        if max(predicted.values()) > _LONGEST:
            return None
        calls: dict[str, Callable[[], torch.Tensor]] = {
            strategy: attention.call(inputs, strategy) for strategy in STRATEGIES
        }
        theirs = alternatives.sdpa(inputs)()
        for strategy, call in calls.items():
            problem = attention_problem(inputs, call(), theirs)
            if problem:
                raise WrongResultError(f"strategy {strategy}: {problem}")
        timings = alternate(calls, _EFFORT, warm=True)
    other = next(strategy for strategy in STRATEGIES if strategy != chosen)
    ours, theirs_timing = timings[chosen], timings[other]
    return Choice(
        label=case.label,
        predicted=predicted,
        measured={strategy: timing.median for strategy, timing in timings.items()},
        chosen=chosen,
        wrong=ours.median > _MARGIN * theirs_timing.median and ours.low > theirs_timing.high,
    )


def _predict(case: Case, inputs: AttentionInputs) -> tuple[dict[str, float], str]:
    receiver = case.receiver
    found = cost.segment_cost(
        to_tensors(inputs.segments[0]),
        receiver.q_heads,
        case.q_len,
        receiver.head_dim,
        receiver.head_dim,
        native.machine_for(to_tensors(inputs.segments[0])),
    )
    return {"absorb": found.absorb, "materialize": found.materialize}, found.strategy
