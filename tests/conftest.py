"""Settings for the whole suite: fixed examples by default, fresh ones with C2C_FRESH_EXAMPLES=1."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("fixed", derandomize=True, database=None, **_COMMON)
settings.register_profile("fresh", **_COMMON)
settings.load_profile("fresh" if os.environ.get("C2C_FRESH_EXAMPLES") == "1" else "fixed")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """For pytest-xdist's `--dist loadgroup`: a file's tests share a process, and so its fixtures, if not said else."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1234)
