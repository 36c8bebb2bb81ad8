from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parent))

import tiny_models

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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
