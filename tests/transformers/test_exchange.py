"""Two models of different kinds, both ways: sliding-window receivers, documents of their own, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_fit import OPTIONS, fit
from test_projected import QUESTION, random_projector
from tiny_models import WINDOW, build
from tiny_tokenizers import build_tokenizer, random_texts
from transformers import DynamicCache

from c2c_kernels.alignment import token_spans
from c2c_kernels.fitting.reading import unrotated
from c2c_kernels.integrations.transformers import enable, project_text, read_tokens, session

A, B = "afbg a cedi\nhgfe aff djp. bhj", "dj cie. abcde fghij\nklmn op a"
BOTH_WAYS = [("gemma3", "llama"), ("llama", "gemma3"), ("llama", "gpt_oss"), ("gemma2", "gemma3")]


def tokenizer_of(family):
    return build_tokenizer(25, bos=True) if family.startswith("gemma") else build_tokenizer(4)


def by_transformers(family, head, segments, question=QUESTION):
    """Logits of the unpatched model over one cache: what it has read of `head`, then the projected tokens."""
    model = build(family)
    own = read_tokens(model, head) if len(head) else None
    cache = DynamicCache()
    for layer, segment in enumerate(segments):
        key, value = segment.key, segment.value
        if own is not None:
            key = torch.cat([own.layers[layer].keys, key], dim=2)
            value = torch.cat([own.layers[layer].values, value], dim=2)
        cache.update(key, value, layer)
    return model(question, past_key_values=cache).logits


@torch.no_grad()
@pytest.mark.parametrize("head", [[], [1], [1, 5, 9, 3, 7, 4, 2, 2, 8, 6]])
@pytest.mark.parametrize(("sharer", "receiver"), BOTH_WAYS)
def test_the_projected_text_is_read_as_an_own_cache_would_be(sharer, receiver, head):
    """Texts of more than two windows: sliding layers see the end of the projected tokens, the others all."""
    reads, answers = build(sharer), enable(build(receiver))
    tokenizers = tokenizer_of(sharer), tokenizer_of(receiver)
    projector = random_projector(reads, answers)
    spans = token_spans(tokenizers[0], A), token_spans(tokenizers[1], A, add_special_tokens=False)
    assert len(spans[1].ids) > 2 * WINDOW
    cache = [(layer.keys, layer.values) for layer in read_tokens(reads, spans[0].ids).layers]
    segments = projector.segments(cache, projector.plan(*spans, start=len(head)))
    context = project_text(projector, A, (reads, tokenizers[0]), (answers, tokenizers[1]), head=head)
    got, wanted = answers(QUESTION, c2c=context).logits, by_transformers(receiver, head, segments)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    # the test can tell: without the first token, which the full layers of all these receivers see
    shorter = [replace(segment, key=segment.key[:, :, 1:], value=segment.value[:, :, 1:]) for segment in segments]
    assert not torch.allclose(by_transformers(receiver, head, shorter), wanted, atol=1e-2)


@torch.no_grad()
def test_two_models_exchange_what_they_have_read():
    """Each has a document of its own before the other's: both caches are read in both roles."""
    names = ("gemma3", "llama")
    models = {name: (enable(build(name)), tokenizer_of(name)) for name in names}
    texts = dict(zip(names, (A, B), strict=True))
    for receiver, sharer in (names, names[::-1]):
        projector = random_projector(models[sharer][0], models[receiver][0])
        own = models[receiver][1](texts[receiver]).input_ids
        context = project_text(projector, texts[sharer], models[sharer], models[receiver], head=own)
        with session(models[receiver][0], context):
            written = models[receiver][0].generate(QUESTION, max_new_tokens=5, do_sample=False)
        segments = [layer[-1] for layer in context.layers]
        step = by_transformers(receiver, own, segments, written[:, :-1])[:, -5:].argmax(-1)
        assert torch.equal(step, written[:, -5:])
        # what it has read itself counts, and so does the other's
        alone = models[receiver][0](QUESTION, c2c=None).logits
        assert not torch.allclose(by_transformers(receiver, own, segments), alone, atol=1e-2)
        without = project_text(projector, texts[sharer], models[sharer], models[receiver])
        with_own = models[receiver][0](QUESTION, c2c=context).logits
        assert not torch.allclose(models[receiver][0](QUESTION, c2c=without).logits, with_own, atol=1e-2)


@torch.no_grad()
def test_a_fit_for_a_sliding_window_receiver():
    """Two rotary bases and windows of 8 in texts of 60: on new text the maps do what their record says."""
    projector = fit("llama", "gemma3", options=replace(OPTIONS, layers_read=2, held_out=2, held_out_tokens=3000))
    assert projector.prefix == (1,)
    assert len(set(projector.receiver.layer_frequencies)) == 2
    sharer, receiver = build("llama"), build("gemma3")
    found, true = ({half: [[] for _ in range(4)] for half in ("key", "value")} for _ in range(2))
    for text in random_texts(60, 60, seed=98):
        spans = token_spans(build_tokenizer(25, bos=True), text), token_spans(build_tokenizer(4), text)
        cache = [(layer.keys, layer.values) for layer in read_tokens(sharer, spans[0].ids).layers]
        ours = read_tokens(receiver, [1, *spans[1].ids])
        plan = projector.plan(*spans)
        for number, segment in enumerate(projector.segments(cache, plan)):
            pairs = {
                "key": (segment.key, ours.layers[number].keys),
                "value": (segment.value, ours.layers[number].values),
            }
            for half, (got, wanted) in pairs.items():
                wanted = wanted[:, :, plan.positions]
                if half == "key":
                    got, wanted = (unrotated(projector.receiver, number, k, plan.positions) for k in (got, wanted))
                found[half][number].append(got[0].transpose(0, 1).flatten(1))
                true[half][number].append(wanted[0].transpose(0, 1).flatten(1))
    for number, record in enumerate(projector.facts["layers"]):
        for half in found:
            wanted = torch.cat(true[half][number])
            error = (torch.cat(found[half][number]) - wanted).square().mean(dim=0) / wanted.var(dim=0, correction=0)
            # as in test_fit: two samples of 3000 random tokens, three times 9% of noise
            assert float(error.mean()) == pytest.approx(record[half]["unexplained"], rel=0.27, abs=1e-4), (half, number)
            assert record[half]["unexplained"] < 0.95


@torch.no_grad()
def test_refusals():
    sharer, receiver = build("gemma3"), build("llama")
    pairs = (sharer, tokenizer_of("gemma3")), (receiver, tokenizer_of("llama"))
    projector = random_projector(sharer, receiver)
    with pytest.raises(ValueError, match="text is empty: something to read is wanted"):
        project_text(projector, "", *pairs)
    with pytest.raises(ValueError, match="ids reach position 1001, the model's context is 512"):
        project_text(projector, "a" * 1000, *pairs)
    with pytest.raises(ValueError, match="cache has 2 layers, the projector's sharer has 4"):
        project_text(projector, "abc", (build("llama", num_hidden_layers=2), pairs[1][1]), pairs[1])
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(TypeError, match=r"the sharer's tokenizer \(Slow\) gives no character offsets"):
        project_text(projector, "abc", (sharer, slow), pairs[1])
