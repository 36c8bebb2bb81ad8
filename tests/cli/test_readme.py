"""The README's Python blocks run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_operators_block():
    scope: dict = {}
    exec(BLOCKS[1], scope)
    assert scope["out"].shape == (1, 16, 1, 128) and scope["mass"].shape == (1, 16, 1, 2)
    assert scope["projected_key"].shape == (1, 8, 16384, 128)


@pytest.mark.slow
def test_transformers_block(smollm2, monkeypatch, capsys):
    """With the model from its package, where the hub cannot be reached."""
    import transformers

    model, tokenizer = smollm2
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    exec(BLOCKS[0], {})
    assert "swordfish" in capsys.readouterr().out
