"""Forward attention: decode and prefill, own cache and segments."""

from __future__ import annotations

from c2c_kernels.bench.shapes import FAMILIES as ALL

FAMILIES = [family for family in ALL if family.startswith(("decode", "prefill"))]
CONTENDERS = ("sdpa",)


def test_attention(benchmark, measured, case, contender):
    measured(benchmark, case, contender)
