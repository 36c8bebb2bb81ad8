"""Medians of alternating runs: ours, alternative, ours, ... so that a machine that drifts drifts for all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_SHORT = 1e-3  # seconds; shorter calls are timed several at a time, each for itself
_BLOCK = 5


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds for each contender, and at least and at most how many runs."""

    seconds: float
    least: int
    most: int


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: median, quartiles, shortest, and of how many runs."""

    median: float
    low: float
    high: float
    shortest: float
    runs: int


def alternate(
    contenders: Mapping[str, Callable[[], Any]],
    effort: Effort,
    *,
    warm: bool,
    once: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, Timing]:
    """Times the contenders in turn.

    Args:
        contenders: calls by name; each has been made once before.
        effort: a contender whose single run takes long is run `effort.least` times all the same.
        warm: an untimed call goes before every timed block, so that a contender finds in the caches what its own
            last call left there, not another's.
        once: makes a call and returns its seconds; by the host's clock where it is None.
    """
    once = once or _once
    estimates = {name: once(call) for name, call in contenders.items()}
    wanted = {
        name: int(min(max(effort.seconds / max(estimate, 1e-9), effort.least), effort.most))
        for name, estimate in estimates.items()
    }
    blocks = {name: _BLOCK if estimate < _SHORT else 1 for name, estimate in estimates.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    collecting = gc.isenabled()
    gc.disable()
    try:
        while True:
            name = min(wanted, key=lambda n: len(times[n]) / wanted[n])
            if len(times[name]) >= wanted[name]:
                break
            call = contenders[name]
            if warm:
                call()
            times[name] += [once(call) for _ in range(blocks[name])]
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(found) for name, found in times.items()}


def _once(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _summary(times: list[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, low, high, min(times), len(times))
