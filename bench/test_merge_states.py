"""`merge_states` beside the same formula in PyTorch."""

from __future__ import annotations

FAMILIES = ("merge",)
CONTENDERS = ("torch",)


def test_merge_states(benchmark, measured, case, contender):
    measured(benchmark, case, contender)
