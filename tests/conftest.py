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


_PROCESSES = "triton_backend/test_processes.py"  # a process for each of its tests, some of them minutes long


def pytest_collection_modifyitems(items):
    """The longest first: they are what a worker of pytest-xdist would be waited for at the end."""
    items.sort(key=lambda item: _PROCESSES not in item.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadfile`, in which a file's tests share a process, and so its fixtures: but for those that start one."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid if _PROCESSES in nodeid else super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1234)
