from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parent))

import tiny_models
from threads import torch_threads

import c2c_kernels as c2c

_ON_CPU = [b.name for b in c2c.backends() if b.available and ("cpu" in b.devices or "any" in b.devices)]


@pytest.fixture(params=list(tiny_models.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=_ON_CPU)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models gain nothing from threads, and lose much where the machine is shared."""
    with torch_threads(1):
        yield
