"""`evaluate` and `inspect` from the terminal: refusals, and the identity on a real model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from c2c_kernels import CacheProjector, corpus
from c2c_kernels.cli import main
from c2c_kernels.cli.models import DEFAULT_MODEL
from c2c_kernels.projectors import Source, wide_columns


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two texts in English that no model has read."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    texts = [
        " ".join(dict.fromkeys(q.context for q in corpus.made_up(60, seed=seed, split="held-out"))) for seed in (1, 2)
    ]
    corpus.write((corpus.Document(f"made/{n}", text, "made") for n, text in enumerate(texts)), path)
    return path


@pytest.fixture(scope="module")
def identity(smollm2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A projector from SmolLM2 to itself that changes nothing."""
    from c2c_kernels.identity import identify
    from c2c_kernels.integrations.transformers import cache_shape

    model, tokenizer = smollm2
    shape, who = cache_shape(model), identify(model, tokenizer, DEFAULT_MODEL)
    sources = [([Source("key", layer)], [Source("value", layer)]) for layer in range(shape.layers)]
    facts = {"corpus": {"texts": []}}
    projector = CacheProjector(shape, shape, sources, sharer_identity=who, receiver_identity=who, facts=facts)
    with torch.no_grad():
        for layer in projector.maps:
            for name, found in (("key", layer.key_sources), ("value", layer.value_sources)):
                proj = getattr(layer, f"{name}_proj")
                proj.copy_(torch.eye(proj.shape[2])[:, wide_columns(shape, found)].reshape(proj.shape))
    path = tmp_path_factory.mktemp("projector") / "identity.safetensors"
    projector.save(path)
    return path


@pytest.mark.slow
def test_the_identity_is_worth_as_much_as_the_text(identity: Path, documents: Path, tmp_path: Path, capsys):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    command = [
        "evaluate",
        str(identity),
        "--sharer",
        DEFAULT_MODEL,
        "--corpus",
        str(documents),
        "--most-questions",
        "4",
    ]
    command += ["--context", "100", "--continuation", "40", "--pieces", "4", "--json", str(out), "--plot", str(picture)]
    assert main(command) == 0
    found = json.loads(out.read_text())
    [loss], [questions] = found["loss"], found["questions"]
    assert (loss["documents"], loss["pieces"], loss["tokens"]) == (2, 4, 4 * 39)
    # The prefix of a fit is missing here, so that nothing but rounding differs.
    assert loss["recovered"]["projected"]["value"] == pytest.approx(1, abs=2e-3)
    assert loss["recovered"]["noise"]["value"] < 0.9 and loss["recovered"]["mismatched"]["value"] < 0.9
    assert loss["loss"]["text"]["value"] < loss["loss"]["alone"]["value"]
    assert questions["questions"] == 4 and set(questions["answers"][0]["written"]) == set(corpus_arms())
    assert picture.stat().st_size > 10_000
    assert "gap recovered 100.0% [" in capsys.readouterr().out


def corpus_arms() -> tuple[str, ...]:
    from c2c_kernels.evaluate import ARMS

    return ARMS


@pytest.mark.slow
def test_the_words_of_an_answer_are_shown(identity: Path, tmp_path: Path, capsys):
    (tmp_path / "a.txt").write_text("The mayor cut the ribbon with a fish knife, and Otto Marley laughed.")
    command = ["inspect", str(identity), "--sharer", DEFAULT_MODEL, "--document", str(tmp_path / "a.txt")]
    command += ["--question", "What did the mayor cut the ribbon with?", "--max-new-tokens", "12"]
    assert main([*command, "--png", str(tmp_path / "a.png"), "--html", str(tmp_path / "a.html")]) == 0
    said = capsys.readouterr().out
    assert re.search("^answer: .*fish knife.*$", said, flags=re.MULTILINE)
    assert not re.search("^answer: .*<", said, flags=re.MULTILINE), "a special token"
    [line] = [line for line in said.splitlines() if "' knife'" in line.partition("drew")[0]]
    assert "' knife'" in line.partition("drew most on")[2] or "' fish'" in line.partition("drew most on")[2]
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert "fish knife" not in (tmp_path / "a.html").read_text()  # word by word
    assert '" fish", " knife"' in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--pieces", "1"], "--pieces must be at least 2, got 1"),
        (["--continuation", "1"], "--continuation must be at least 2, got 1"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--json", "none/out.json"], "--json none/out.json: there is no folder none"),
        (["--plot", "out.pdf"], "--plot out.pdf: a file name that ends in .png is wanted"),
        ([], "nowhere.safetensors does not exist: a projector file is wanted"),
    ],
)
def test_what_cannot_be_is_refused_first(capsys, extra: list[str], message: str):
    assert main(["evaluate", "nowhere.safetensors", "--corpus", "nowhere.jsonl", *extra]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--corpus", "nowhere.jsonl"], "--corpus nowhere.jsonl: nowhere.jsonl cannot be read"),
        (["--corpus", "none", "--questions", "none"], "nothing is left to evaluate"),
        (
            ["--corpus", "none", "--questions", "nowhere.jsonl"],
            "--questions nowhere.jsonl: nowhere.jsonl cannot be read",
        ),
        (["--corpus", "none"], "is truncated, damaged or no safetensors file"),
    ],
)
def test_bad_texts_and_files_are_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, extra: list[str], message: str
):
    def load_model(spec: str) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("c2c_kernels.cli.models.load_model", load_model)
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"\x10\0\0\0")
    assert main(["evaluate", str(path), *extra]) == 1
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def between(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A projector between two tiny models of 4,096 tokens, and what names them."""
    from c2c_kernels.cli.models import load_model
    from c2c_kernels.identity import identify
    from c2c_kernels.integrations.transformers import cache_shape

    loaded = [load_model(spec) for spec in models]
    shapes = [cache_shape(model) for model, _ in loaded]
    who = [identify(*one, spec) for one, spec in zip(loaded, models, strict=True)]
    sources = [([Source("key", layer)], [Source("value", layer)]) for layer in range(shapes[1].layers)]
    facts = {"corpus": {"texts": []}}
    projector = CacheProjector(*shapes, sources, sharer_identity=who[0], receiver_identity=who[1], facts=facts)
    path = tmp_path_factory.mktemp("between") / "p.safetensors"
    projector.save(path)
    return [str(path), "--sharer", models[0], "--receiver", models[1]]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--context", "4097"],
            r"--context 4097, long: 4\d+ tokens; the sharer's context holds 4096: a shorter",
        ),
        (
            ["--context", "4000", "--continuation", "97"],
            r"--context 4000, long and --continuation: 4097 tokens; the receiver's context holds 4096",
        ),
        (
            ["--corpus", "none", "--questions", "{questions}"],
            r"--questions .*asked.jsonl, the context of question 2: \d+ tokens; the sharer's context holds 4096",
        ),
    ],
)
def test_what_is_longer_than_a_models_context_is_refused_before_anything_is_read(
    between: list[str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, extra: list[str], message: str
):
    def read(*_: object) -> None:
        raise AssertionError("something is read")

    monkeypatch.setattr("c2c_kernels.evaluate.Reader.read", read)
    monkeypatch.setattr("c2c_kernels.evaluate.Reader.project", read)
    long = "the cat reads a book about boats " * 400
    (tmp_path / "long.jsonl").write_text(
        "\n".join(
            json.dumps({"text": long + end, "split": "held-out", "collection": "long"}) for end in ("bees", "rain")
        )
    )
    asked = [{"context": text, "question": "What?", "answer": "bees"} for text in ("the bees", f"{long} bees")]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    arguments = [part.format(questions=tmp_path / "asked.jsonl") for part in extra]
    corpus_given = [] if "--corpus" in extra else ["--corpus", str(tmp_path / "long.jsonl"), "--questions", "none"]
    assert main(["evaluate", *between, *corpus_given, *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_other_models_and_documents_of_the_fit_are_refused(identity: Path, documents: Path, tmp_path: Path, capsys):
    projector = CacheProjector.load(identity)
    projector.facts["corpus"] = {"texts": [corpus.read(documents)[0].sha256[:16]]}
    projector.save(tmp_path / "seen.safetensors")
    assert main(["evaluate", str(tmp_path / "seen.safetensors"), "--corpus", str(documents)]) == 1
    message = "1 of 2 documents are among those that the projector was fitted or trained on (made/"
    assert message in capsys.readouterr().err
    projector.sharer_identity = type(projector.sharer_identity)("Another", "0" * 64, "0" * 64)
    projector.facts["corpus"] = {"texts": []}
    projector.save(tmp_path / "other.safetensors")
    command = ["evaluate", str(tmp_path / "other.safetensors"), "--corpus", str(documents), "--sharer", DEFAULT_MODEL]
    assert main(command) == 1
    assert "the projector was made for Another" in capsys.readouterr().err
