"""`fuse_kv` beside a plain PyTorch module of the same mathematics."""

from __future__ import annotations

FAMILIES = ("fuse", "fuse-model")
CONTENDERS = ("torch",)


def test_fuse_kv(benchmark, measured, case, contender):
    measured(benchmark, case, contender)
