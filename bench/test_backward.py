"""Forward and backward attention in one call."""

from __future__ import annotations

FAMILIES = ("backward", "backward-raw")
CONTENDERS = ("sdpa",)


def test_backward(benchmark, measured, case, contender):
    measured(benchmark, case, contender)
