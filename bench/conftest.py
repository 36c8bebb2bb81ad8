"""pytest-benchmark over the shapes of `c2c-kernels bench`: `pytest bench/`, `--grid full` for all of them.

A case is one shape and one contender; pytest-benchmark's tables put the contenders of a shape together. They do not
take turns, so one that is a little larger than the last-level cache finds a part of itself there and may pass its
floor. Ratios and fractions are what `c2c-kernels bench` prints; this is for comparing commits (`--benchmark-compare`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from c2c_kernels.bench import machine, measure, shapes
from c2c_kernels.bench.check import WrongResultError
from c2c_kernels.bench.work import LeftOutError

OURS = "ours"


def pytest_configure() -> None:
    if find_spec("pytest_benchmark") is None:
        raise pytest.UsageError("bench/ needs pytest-benchmark: pip install 'c2c-kernels[bench]'")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--grid", choices=("quick", "full"), default="quick", help="which shapes bench/ measures")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every shape of the module's FAMILIES with ours and every one of its CONTENDERS."""
    quick = metafunc.config.getoption("--grid") == "quick"
    cases = [case for case in shapes.grid(quick=quick) if case.family in metafunc.module.FAMILIES]
    metafunc.parametrize("case", cases, ids=lambda case: case.name)
    metafunc.parametrize("contender", (OURS, *metafunc.module.CONTENDERS))


@pytest.fixture(scope="session")
def limits() -> machine.Machine:
    return machine.measure()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[Any, shapes.Case, str], None]:
    """What every benchmark does: times one contender of a shape, where our result is right, and adds the costs."""

    def run(benchmark: Any, case: shapes.Case, contender: str) -> None:
        benchmark.group = case.name
        try:
            work = measure.checked(case)
            with torch.set_grad_enabled(case.gradients):
                call = work.ours if contender == OURS else work.alternatives[contender]()
                benchmark(call)
        except WrongResultError as error:
            pytest.fail(f"not timed: {case.name}: {error}", pytrace=False)
        except LeftOutError as error:
            pytest.skip(str(error))
        if benchmark.enabled:
            limits = request.getfixturevalue("limits")
            benchmark.extra_info |= measure.costs(case, work, limits, benchmark.stats.stats.median)

    return run
