"""The README's Python blocks run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_gguf
import torch
from rosetta_fixtures import FOLDER, cases, model, needs_fixtures

from c2c_kernels import CacheProjector
from c2c_kernels.cli.models import load_model
from c2c_kernels.integrations.transformers import cache_shape, session
from c2c_kernels.projectors import Source

README = Path(__file__).parents[2] / "README.md"
PAIRS = README.parent / "docs" / "pairs.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@needs_fixtures
def test_fuser_block(tmp_path, monkeypatch):
    """With the tiny models and the checkpoint of the reference implementation."""
    (tmp_path / "checkpoint").symlink_to(FOLDER / "ckpt_A")
    monkeypatch.chdir(tmp_path)
    case = cases("rosetta_model.pt")["A_basic"]

    def tokenizer(text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input_ids": case["input_ids"]}

    scope = {"receiver": model("recv"), "sharer": model("shA"), "tokenizer": tokenizer}
    exec(BLOCKS[2].replace("model.generate", "written = model.generate"), scope)
    assert scope["written"][0].tolist()[: case["gen"].shape[1]] == case["gen"][0].tolist()


def test_operators_block():
    scope: dict = {}
    exec(BLOCKS[3], scope)
    assert scope["out"].shape == (1, 16, 1, 128) and scope["mass"].shape == (1, 16, 1, 2)
    assert scope["projected_key"].shape == (1, 8, 16384, 128)


def test_projector_block(tmp_path, monkeypatch):
    """With tiny models and a projector between them."""
    sharer, sharer_tokenizer = load_model(str(tiny_gguf.write(tmp_path / "a.gguf", seed=1)))
    receiver, receiver_tokenizer = load_model(str(tiny_gguf.write(tmp_path / "b.gguf", seed=2)))
    shapes = cache_shape(sharer), cache_shape(receiver)
    sources = [([Source("key", 0)], [Source("value", 0)])] * shapes[1].layers
    projector = CacheProjector(*shapes, sources, prefix=[1])
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter)
    projector.save(tmp_path / "gemma3-smollm2.safetensors")
    monkeypatch.chdir(tmp_path)
    question_ids = receiver_tokenizer("the cat", return_tensors="pt").input_ids
    alone = receiver(question_ids).logits
    scope = {
        name: value for name, value in locals().items() if name.endswith(("sharer", "receiver", "tokenizer", "ids"))
    }
    exec(BLOCKS[1], {**scope, "text": "the cat is in the rain"})
    with session(receiver, None):  # the block has enabled it
        torch.testing.assert_close(receiver(question_ids).logits, alone)


def test_exchange_block(tmp_path, monkeypatch):
    """docs/pairs.md, with tiny models: each answer depends on what the other has read."""
    [block] = re.findall(r"```python\n(.*?)```", PAIRS.read_text(encoding="utf-8"), flags=re.DOTALL)
    models = [load_model(str(tiny_gguf.write(tmp_path / f"{seed}.gguf", seed=seed))) for seed in (1, 2)]
    shapes = [cache_shape(model) for model, _ in models]
    for name, way in (("gemma3-smollm2", shapes), ("smollm2-gemma3", shapes[::-1])):
        sources = [([Source("key", 0)], [Source("value", 0)])] * way[1].layers
        projector = CacheProjector(*way, sources, prefix=[1])
        for parameter in projector.parameters():
            torch.nn.init.normal_(parameter)
        projector.save(tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    written = []
    for text_a, text_b in (("the cat", "the rain"), ("a boat in", "the rain"), ("the cat", "bees and bread")):
        questions = [tokenizer("what is", return_tensors="pt").input_ids for _, tokenizer in models]
        given = {"gemma": models[0], "smollm2": models[1], "text_a": text_a, "text_b": text_b}
        scope = {**given, "question_for_gemma": questions[0], "question_for_smollm2": questions[1]}
        exec(block, scope)
        written.append([scope["about_a"].tolist(), scope["about_b"].tolist()])
    assert written[0][0] != written[1][0], "what SmolLM2 says about A depends on A"
    assert written[0][1] != written[2][1], "what Gemma says about B depends on B"


@pytest.mark.slow
def test_transformers_block(smollm2, monkeypatch, capsys):
    """With the model from its package, where the hub cannot be reached."""
    import transformers

    model, tokenizer = smollm2
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    exec(BLOCKS[0], {})
    assert "swordfish" in capsys.readouterr().out
