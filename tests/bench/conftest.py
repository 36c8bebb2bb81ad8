"""A machine made up, and short measurements: what is looked at here is no figure."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from threads import torch_threads

from c2c_kernels.bench import explain, machine, measure, reading
from c2c_kernels.bench.timing import Effort

PEAKS = {"float32": 200e9, "bfloat16": 400e9, "float16": 200e9}


@pytest.fixture
def limits() -> machine.Machine:
    """Round numbers: 20 GB/s, 80 GB/s inside 32 MB, 200 or 400 GFLOP/s."""
    return machine.Machine(2, 20e9, 80e9, dict(PEAKS), 32_000_000, "made up")


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch, limits: machine.Machine) -> None:
    """The machine is not measured, and lines a few times each."""
    monkeypatch.setattr(machine, "measure", lambda threads=None: limits)
    for module, name in ((measure, "QUICK"), (measure, "FULL"), (explain, "_EFFORT")):
        monkeypatch.setattr(module, name, Effort(seconds=0.0, least=4, most=4))


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is measured, with little data and few runs."""
    for name, value in (("_BEYOND", 2**24), ("_RUNS", 2), ("_SECONDS", 0.0), ("_ROUNDS", 2000), ("_PRODUCT", 64)):
        monkeypatch.setattr(machine, name, value)
    monkeypatch.setattr(machine.topology, "last_level_cache", lambda threads: (2**20, "made up"))


@pytest.fixture(autouse=True)
def _compiled_anew():
    reading._prepared.cache_clear()


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait for one another are slow on a busy machine."""
    with torch_threads(1):
        yield


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """Makes a package raise on import, with the statement given."""

    def run(package: str, statement: str) -> None:
        folder = tmp_path / "broken" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(statement + "\n")
        monkeypatch.syspath_prepend(folder.parent)
        import sys

        for name in [n for n in sys.modules if n.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GGUF model."""
    if not all(importlib.util.find_spec(package) for package in ("transformers", "gguf", "accelerate")):
        pytest.skip("needs the extra [demo]")
    import tiny_gguf

    return tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
