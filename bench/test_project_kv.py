"""`project_kv` beside matrix products of the same dtype."""

from __future__ import annotations

FAMILIES = ("project", "project-int8")
CONTENDERS = ("matmul",)


def test_project_kv(benchmark, measured, case, contender):
    measured(benchmark, case, contender)
