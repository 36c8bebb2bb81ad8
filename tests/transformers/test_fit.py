"""CacheProjector.fit on tiny models: what is exact comes out exact, interrupted fits go on, bad input is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import build
from tiny_tokenizers import build_tokenizer, random_texts

import c2c_kernels as c2c
from c2c_kernels.alignment import token_spans
from c2c_kernels.fitting import FitOptions
from c2c_kernels.fitting.texts import corpus_hash
from c2c_kernels.identity import check_identity, identify
from c2c_kernels.integrations.transformers import SharedContext, enable, read_tokens

TEXTS = random_texts(60, 120)
OPTIONS = FitOptions(layers_read=1, window=60, held_out=6, held_out_tokens=400, ridges=(1e-5, 1e-3), chunk=4)
QUESTION = torch.tensor([[5, 9, 3, 7, 4]])


def fit(sharer="gemma3", receiver="llama", texts=TEXTS, options=OPTIONS, merges=(25, 4), **keywords):
    models = [build(name) if isinstance(name, str) else name for name in (sharer, receiver)]
    tokenizers = [build_tokenizer(merges[0], bos=True), build_tokenizer(merges[1])]
    return c2c.CacheProjector.fit(
        *models, texts, sharer_tokenizer=tokenizers[0], receiver_tokenizer=tokenizers[1], options=options, **keywords
    )


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_a_model_finds_itself(family):
    """With one tokenizer and the same prefix every layer is explained by itself, and the context is the cache."""
    model, tokenizer = enable(build(family)), build_tokenizer(8, bos=True)
    projector = c2c.CacheProjector.fit(
        model, model, TEXTS, sharer_tokenizer=tokenizer, receiver_tokenizer=tokenizer, options=OPTIONS
    )
    assert projector.prefix == (1,)
    assert projector.facts["stretch"]["factor"] == 1.0  # nothing is unexplained, nothing too short
    for number, record in enumerate(projector.facts["layers"]):
        assert record["groups"] == [[number, 0]]
        assert record["key"]["ridge"] == record["value"]["ridge"] == 1e-5
        assert max(record["key"]["unexplained"], record["value"]["unexplained"]) < 1e-4
    spans = token_spans(tokenizer, TEXTS[0])
    cache = read_tokens(model, spans.ids)
    got = model(QUESTION, c2c=projector.context(cache, spans, spans, prefix=read_tokens(model, [1]))).logits
    wanted = model(QUESTION, c2c=SharedContext.from_caches(cache)).logits
    bare = model(QUESTION).logits
    assert (got - wanted).abs().mean() < 0.02 * (bare - wanted).abs().mean()


@pytest.mark.parametrize("settings", [{"rank": 7}, {"tokens": "sharer"}, {"offsets": (0, -1)}, {"strategy": "first"}])
def test_settings_reach_the_projector(settings, tmp_path):
    """The maps of a fit do on new text what its record says they do on held-out text."""
    options = replace(OPTIONS, layers_read=2, held_out=2, held_out_tokens=3000, **settings)
    projector = fit(options=options)
    for name, value in settings.items():
        if name != "offsets":
            assert getattr(projector, name) == value
    sources = projector.maps[0].key_sources
    assert len(sources) == 4 * len(options.offsets)
    projector.save(tmp_path / "p.safetensors")
    projector = c2c.CacheProjector.load(tmp_path / "p.safetensors")
    sharer, receiver = build("gemma3"), build("llama")
    got, true = [[] for _ in range(4)], [[] for _ in range(4)]
    for text in random_texts(60, 60, seed=99):
        spans = token_spans(build_tokenizer(25, bos=True), text), token_spans(build_tokenizer(4), text)
        with torch.no_grad():
            cache = read_tokens(sharer, spans[0].ids)
            ours = read_tokens(receiver, [1, *spans[1].ids])
            plan = projector.plan(*spans)
            segments = projector.segments([(layer.keys, layer.values) for layer in cache.layers], plan)
        for number, segment in enumerate(segments):
            got[number].append(segment.value[0].transpose(0, 1).flatten(1))
            true[number].append(ours.layers[number].values[0][:, plan.positions].transpose(0, 1).flatten(1))
    for number, record in enumerate(projector.facts["layers"]):
        wanted = torch.cat(true[number])
        error = (torch.cat(got[number]) - wanted).square().mean(dim=0) / wanted.var(dim=0, correction=0)
        # two samples of 3000 random tokens, of which one in 14 is hard to tell: three times 9% of noise
        assert float(error.mean()) == pytest.approx(record["value"]["unexplained"], rel=0.27, abs=1e-4), number
        assert record["value"]["unexplained"] < 0.95


def test_facts_and_identities(tmp_path):
    projector = fit()
    assert projector.facts["corpus"]["sha256"] == corpus_hash(TEXTS)
    assert projector.facts["corpus"]["documents"] == 60
    assert projector.facts["options"]["window"] == 60
    check_identity("sharer", projector.sharer_identity, identify(build("gemma3"), build_tokenizer(25, bos=True)))
    check_identity("receiver", projector.receiver_identity, identify(build("llama"), build_tokenizer(4)))
    with pytest.raises(ValueError, match="the sharer's model"):
        check_identity("sharer", projector.sharer_identity, identify(build("llama"), build_tokenizer(25, bos=True)))


def test_keys_are_stretched_by_what_is_best_on_held_out_text():
    receiver = build("llama")
    tried = (0.5, 1.0, 1.5)
    projector = fit(receiver=receiver, options=replace(OPTIONS, stretches=tried))
    assert "_c2c_patch" not in receiver.__dict__, "the receiver is left as it was"
    record = projector.facts["stretch"]
    assert sorted(record["nats"]) == [str(factor) for factor in tried]
    assert len(set(record["nats"].values())) == len(tried)
    assert record["nats"][str(record["factor"])] == min(record["nats"].values())
    alone = fit(options=replace(OPTIONS, stretches=(record["factor"],)))
    for name, tensor in projector.state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[name]), name


class InterruptedFitError(Exception):
    pass


def test_an_interrupted_fit_goes_on_to_the_same_bits(tmp_path):
    checkpoint = tmp_path / "fit.checkpoint"
    options = replace(OPTIONS, checkpoint_seconds=0.0)
    seen = []

    def stop(stage, done, of):
        seen.append((stage, done))
        if len(seen) == 4:
            raise InterruptedFitError

    whole = fit()
    with pytest.raises(InterruptedFitError):
        fit(options=options, checkpoint=checkpoint, update=stop)
    assert checkpoint.exists()
    again = []
    resumed = fit(options=options, checkpoint=checkpoint, update=lambda stage, done, of: again.append((stage, done)))
    assert again[0] == seen[2], "what was kept is not read again"
    assert not checkpoint.exists()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert resumed.facts["corpus"] == whole.facts["corpus"]


def test_a_checkpoint_of_another_fit(tmp_path):
    checkpoint = tmp_path / "fit.checkpoint"
    options = replace(OPTIONS, checkpoint_seconds=0.0)

    def stop(stage, done, of):
        if done:
            raise InterruptedFitError

    def stop_later(stage, done, of):
        if done > 700:
            raise InterruptedFitError

    with pytest.raises(InterruptedFitError):
        fit(options=options, checkpoint=checkpoint, update=stop_later)
    with pytest.raises(ValueError, match="belongs to another fit \\(other corpus, windows\\)"):
        fit(options=options, checkpoint=checkpoint, texts=TEXTS[1:])
    with pytest.raises(ValueError, match="belongs to another fit \\(other sharer\\)"):
        fit(options=options, checkpoint=checkpoint, sharer=build("gemma3", seed=4))
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged .*: remove it to start again"):
        fit(options=options, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": []}, "texts is empty"),
        ({"texts": ["abc", "  "]}, r"texts\[1\] is empty"),
        ({"texts": TEXTS[:1]}, "1 documents leave nothing to"),
        ({"texts": ["ab"] * 40}, "leave nothing to fit"),
        ({"texts": random_texts(12, 31), "options": replace(OPTIONS, window=32, layers_read=4, held_out=2)}, "too few"),
        ({"options": replace(OPTIONS, window=300)}, "window is 300 tokens, the sharer's context 512: at most 255"),
        ({"options": replace(OPTIONS, layers_read=5)}, r"layers_read must be in 1\.\.4, got 5"),
        ({"options": replace(OPTIONS, candidates=(0, 9))}, r"candidates must be different layers of 0\.\.3"),
        ({"options": replace(OPTIONS, offsets=(-1,))}, "offsets must hold 0"),
        ({"options": replace(OPTIONS, ridges=())}, "ridges must be positive"),
        ({"options": replace(OPTIONS, stretches=())}, "stretches must be positive"),
        ({"options": replace(OPTIONS, stretches=(1.0, 0.0))}, "stretches must be positive"),
        ({"options": replace(OPTIONS, rank=32)}, r"rank must be in 1\.\.31"),
        ({"options": replace(OPTIONS, chunk=0)}, "chunk is 0"),
    ],
)
def test_bad_input_is_refused_before_a_text_is_read(changes, message):
    def update(stage, done, of):
        raise AssertionError("began")

    with pytest.raises(ValueError, match=message):
        fit(update=update, **changes)


def test_slow_tokenizers_are_refused():
    class Slow:
        is_fast = False

        def __call__(self, text, **_):
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"receiver_tokenizer \(Slow\) gives no character offsets"):
        c2c.CacheProjector.fit(
            build("gemma3"),
            build("llama"),
            TEXTS,
            sharer_tokenizer=build_tokenizer(4),
            receiver_tokenizer=Slow(),
            options=OPTIONS,
        )
