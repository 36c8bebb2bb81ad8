"""Projectors between models: exact where an exact map exists, files, refusals, gradients."""

from __future__ import annotations

import json

import pytest
import torch
from error_rule import assert_as_exact
from tiny_models import build
from tiny_tokenizers import build_tokenizer

import c2c_kernels as c2c
from c2c_kernels.alignment import token_spans
from c2c_kernels.identity import check_identity, identify, model_hash, tokenizer_hash
from c2c_kernels.integrations.transformers import (
    SharedContext,
    cache_shape,
    enable,
    projected_context,
    read_tokens,
    session,
)
from c2c_kernels.projector_file import ProjectorFileError
from c2c_kernels.projectors import CacheShape, Source, TokenPlan, wide_columns

TEXT = "afbg a cedi\nhgfe aff djp."
QUESTION = torch.tensor([[5, 9, 3, 7, 4]])


def random_projector(sharer, receiver, *, rank=None, seed=0, **settings):
    """Maps with random weights from two layers, keys and values mixed, tokens before as well."""
    shapes = cache_shape(sharer), cache_shape(receiver)
    depth = shapes[0].layers
    sources = [
        (
            [Source("key", n % depth), Source("value", (n + 1) % depth, -1), Source("key", (n + 1) % depth, -2)],
            [Source("value", n % depth), Source("key", n % depth)],
        )
        for n in range(shapes[1].layers)
    ]
    projector = c2c.CacheProjector(*shapes, sources, rank=rank, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return projector


def identity_projector(model, **settings):
    """Every layer reads the same layer, as it is."""
    shape = cache_shape(model)
    sources = [([Source("key", n)], [Source("value", n)]) for n in range(shape.layers)]
    projector = c2c.CacheProjector(shape, shape, sources, **settings)
    with torch.no_grad():
        for layer in projector.maps:
            for half, found in (("key", layer.key_sources), ("value", layer.value_sources)):
                proj = getattr(layer, f"{half}_proj")
                proj.copy_(torch.eye(proj.shape[2])[:, wide_columns(shape, found)].reshape(proj.shape))
    return projector


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["receiver", "sharer"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3", "gpt_oss"])
def test_the_identity_is_the_cache_itself(family, tokens):
    """Un-rotated, mapped by the identity and rotated again: as the sharer's cache without a projector."""
    model, tokenizer = enable(build(family)), build_tokenizer(8)
    spans = token_spans(tokenizer, TEXT)
    cache = read_tokens(model, spans.ids)
    got = model(QUESTION, c2c=identity_projector(model, tokens=tokens).context(cache, spans, spans)).logits
    wanted = model(QUESTION, c2c=SharedContext.from_caches(cache)).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, model(QUESTION).logits, atol=1e-2)


@torch.no_grad()
def test_a_prefix_of_the_receivers_own():
    """Prefix, projected text and question stand where they stand in one prompt."""
    model, tokenizer = enable(build("llama")), build_tokenizer(8)
    spans = token_spans(tokenizer, TEXT)
    whole = read_tokens(model, [1, 6, *spans.ids])
    text = [(layer.keys[:, :, 2:], layer.values[:, :, 2:]) for layer in whole.layers]
    projector = identity_projector(model)
    plan = projector.plan(spans, spans, start=2)
    # read at positions 2, 3, ... inside the prompt
    segments = projector.segments(text, plan, sharer_positions=torch.arange(2, 2 + len(spans.ids)))
    prefix = SharedContext.from_caches(read_tokens(model, [1, 6]))
    context = SharedContext([[*a, b] for a, b in zip(prefix.layers, segments, strict=True)], plan.end)
    wanted = model(torch.cat([torch.tensor([[1, 6, *spans.ids]]), QUESTION], dim=1)).logits[:, -5:]
    torch.testing.assert_close(model(QUESTION, c2c=context).logits, wanted, rtol=1e-4, atol=1e-4)
    # the same through projected_context, for a text read on its own
    alone = read_tokens(model, spans.ids)
    through = projected_context(projector, alone, spans, spans, prefix=read_tokens(model, [1, 6]))
    assert [len(layer) for layer in through.layers] == [2] * 4
    assert through.position_offset.tolist() == [2 + len(spans.ids)]
    assert through.layers[0][1].positions.tolist() == [list(range(2, 2 + len(spans.ids)))]
    torch.testing.assert_close(through.layers[0][1].value, segments[0].value)  # layer 0 knows no context
    torch.testing.assert_close(through.layers[0][1].key, segments[0].key, rtol=1e-4, atol=1e-4)


def by_hand(projector, cache, plan, dtype=torch.float64):
    """The maps' definition, source by source."""
    shape, receiver = projector.sharer, projector.receiver

    def turn(x, layer, space, positions, inverse):
        angle = space.angles(layer, positions).to(dtype)
        half = angle.shape[-1]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        sin = -angle.sin() if inverse else angle.sin()
        return torch.cat([a * angle.cos() - b * sin, b * angle.cos() + a * sin, rest], -1)

    def weights(layer, half):
        found = layer.weights(half)
        weight = found if isinstance(found, torch.Tensor) else found[0] @ found[1]
        return weight.to(dtype)

    result = []
    for number, layer in enumerate(projector.maps):
        halves = []
        for half, sources in (("key", layer.key_sources), ("value", layer.value_sources)):
            parts = []
            for source in sources:
                stored = cache[source.layer][source.kind == "value"][0].to(dtype)
                here = torch.arange(stored.shape[1])
                stored = stored[:, (here + source.offset).clamp(min=0)]
                if source.kind == "key":  # turned back by the angle of the token that reads it
                    stored = turn(stored, source.layer, shape, here, True)
                parts.append(stored.transpose(0, 1).flatten(1))
            x = torch.cat(parts, 1)[plan.index]
            natural = torch.empty_like(weights(layer, half))
            natural[..., wide_columns(shape, sources)] = weights(layer, half)
            y = torch.einsum("hdw,nw->hnd", natural, x) + getattr(layer, f"{half}_bias").to(dtype)[:, None]
            halves.append(turn(y, number, receiver, plan.positions, False) if half == "key" else y)
        result.append(halves)
    return result


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("tokens", ["receiver", "sharer"])
def test_segments_are_the_definition(tokens, rank, backend):
    sharer, receiver = build("gemma3", num_key_value_heads=3), build("llama", num_hidden_layers=6, head_dim=24)
    projector = random_projector(sharer, receiver, rank=rank, tokens=tokens, prefix=[1])
    spans = token_spans(build_tokenizer(25, bos=True), TEXT), token_spans(build_tokenizer(4), TEXT)
    cache = [(layer.keys, layer.values) for layer in read_tokens(sharer, spans[0].ids).layers]
    plan = projector.plan(*spans)
    segments = projector.segments(cache, plan, backend=backend)
    assert len(segments) == 6
    exact, torchs = (by_hand(projector, cache, plan, dtype) for dtype in (torch.float64, torch.float32))
    for segment, wanted, theirs in zip(segments, exact, torchs, strict=True):
        assert_as_exact("key", segment.key[0], theirs[0], wanted[0])
        assert_as_exact("value", segment.value[0], theirs[1], wanted[1])


def test_plans():
    shape = CacheShape(1, 1, 4, 4, ((1.0, 0.5),), (0,))
    sources = [([Source("key", 0)], [Source("value", 0)])]
    sharer, receiver = token_spans(build_tokenizer(25, bos=True), "afbga"), token_spans(build_tokenizer(0), "afbga")
    plan = c2c.CacheProjector(shape, shape, sources, prefix=[1, 2]).plan(sharer, receiver)
    assert plan.index.tolist() == [1, 1, 2, 2, 3]
    assert plan.positions.tolist() == [2, 3, 4, 5, 6]
    assert plan.end == 7
    plan = c2c.CacheProjector(shape, shape, sources, tokens="sharer").plan(sharer, receiver, start=4)
    assert plan.index.tolist() == [1, 2, 3]
    assert plan.positions.tolist() == [5, 7, 8]
    assert plan.end == 9


def test_batches_and_padding():
    """Rows of a padded batch are what they are alone."""
    sharer, receiver = build("gemma3"), build("llama")
    projector = random_projector(sharer, receiver)
    index, positions = torch.tensor([[1, 2, 4, 4], [0, 3, 0, 0]]), torch.tensor([[2, 3, 4, 5], [7, 8, 0, 0]])
    ids = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad():
        cache = [(layer.keys, layer.values) for layer in read_tokens(sharer, ids).layers]
        both = projector.segments(cache, TokenPlan(index, positions, 9, torch.tensor([4, 2])))
        for row, length in ((0, 4), (1, 2)):
            plan = TokenPlan(index[row, :length], positions[row, :length], 9)
            alone = projector.segments([(k[row : row + 1], v[row : row + 1]) for k, v in cache], plan)
            for together, single in zip(both, alone, strict=True):
                assert torch.equal(together.key[row, :, :length], single.key[0])
                assert torch.equal(together.value[row, :, :length], single.value[0])
                assert not together.key[row, :, length:].any()


def test_gradients_reach_maps_and_gates():
    sharer, receiver = build("gemma3"), enable(build("llama"))
    projector = random_projector(sharer, receiver, rank=4)
    assert projector.gates() is None
    gates = projector.add_gates(receiver.config.num_attention_heads, logit=0.5)
    assert torch.equal(projector.gates(), torch.sigmoid(torch.full((4, 6), 0.5)))
    receiver.requires_grad_(False)
    spans = token_spans(build_tokenizer(25, bos=True), TEXT), token_spans(build_tokenizer(4), TEXT)
    with torch.no_grad():
        cache = read_tokens(sharer, spans[0].ids)

    def loss():
        return receiver(QUESTION, c2c=projector.context(cache, *spans), labels=QUESTION).loss

    loss().backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    # against differences, along the gradient itself
    for parameter in (gates, projector.maps[1].key_proj, projector.maps[2].value_proj_in):
        direction = parameter.grad / parameter.grad.norm()
        ends = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                ends.append(loss())
                parameter.sub_(direction, alpha=step)
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-2, parameter.grad.norm(), rtol=0.03, atol=1e-4)


@torch.no_grad()
def test_bfloat16():
    sharer, receiver = build("gemma3"), build("llama")
    projector = random_projector(sharer, receiver)
    spans = token_spans(build_tokenizer(25, bos=True), TEXT), token_spans(build_tokenizer(4), TEXT)
    cache = [(layer.keys, layer.values) for layer in read_tokens(sharer, spans[0].ids).layers]
    plan = projector.plan(*spans)
    wanted = projector.segments(cache, plan)
    half = [(key.bfloat16(), value.bfloat16()) for key, value in cache]
    for got, exact in zip(projector.bfloat16().segments(half, plan), wanted, strict=True):
        assert got.key.dtype == torch.bfloat16
        assert (got.key - exact.key).abs().max() < 0.03 * exact.key.abs().max()
        assert (got.value - exact.value).abs().max() < 0.03 * exact.value.abs().max()


@torch.no_grad()
def test_two_models_answer_from_each_other():
    """Projectors in both directions at once, and generation through a session."""
    models = {"gemma3": enable(build("gemma3")), "llama": enable(build("llama"))}
    tokenizers = {"gemma3": build_tokenizer(25, bos=True), "llama": build_tokenizer(4)}
    for sharer, receiver in (("gemma3", "llama"), ("llama", "gemma3")):
        projector = random_projector(models[sharer], models[receiver])
        spans = [token_spans(tokenizers[name], TEXT) for name in (sharer, receiver)]
        context = projector.context(read_tokens(models[sharer], spans[0].ids), *spans)
        with session(models[receiver], context):
            ids = models[receiver].generate(QUESTION, max_new_tokens=4, do_sample=False)
        step = models[receiver](ids[:, :-1], c2c=context).logits[:, -4:].argmax(-1)
        assert torch.equal(step, ids[:, -4:])


class TestFile:
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("rank", [None, 3])
    def test_comes_back(self, tmp_path, rank, gated):
        path = tmp_path / "p.safetensors"
        models = build("gemma3"), build("llama")
        projector = random_projector(*models, rank=rank, tokens="sharer", strategy="first", prefix=[1, 4])
        projector.facts = {"corpus": {"sha256": "ab"}, "é": [1, 2.5, None]}
        projector.sharer_identity = identify(models[0], build_tokenizer(3), "tiny")
        if gated:
            projector.add_gates(6, 0.25)
            projector.gate_temperature = 0.5
        projector.save(path)
        again = c2c.CacheProjector.load(path)
        state = projector.state_dict()
        assert state.keys() == again.state_dict().keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
        for name in ("sharer", "receiver", "rank", "tokens", "strategy", "prefix", "facts", "sharer_identity"):
            assert getattr(again, name) == getattr(projector, name), name
        assert again.gate_temperature == projector.gate_temperature
        assert [m.key_sources for m in again.maps] == [m.key_sources for m in projector.maps]

    @pytest.mark.parametrize(("storage", "bits", "bound"), [("bfloat16", 16, 2**-8), ("int8", 8, 1 / 250)])
    def test_storages(self, tmp_path, storage, bits, bound):
        """Weights of very different columns, as those of un-normalised values are: the error is that of each column."""
        path = tmp_path / "p.safetensors"
        projector = random_projector(build("gemma3"), build("llama", head_dim=64))
        with torch.no_grad():
            for layer in projector.maps:
                layer.value_proj *= torch.logspace(-3, 3, layer.value_proj.shape[2])
        projector.save(path, storage=storage)
        again = c2c.CacheProjector.load(path)
        numbers = sum(p.numel() for p in projector.parameters())
        assert path.stat().st_size < numbers * bits / 8 * 1.25 + 10_000
        for name, tensor in projector.named_parameters():
            column = tensor.abs().amax(dim=(0, 1)) if tensor.dim() == 3 else tensor.abs().amax(dim=0)
            error = (again.get_parameter(name) - tensor).abs()
            assert (error <= bound * column).all(), name

    def test_damage_is_named(self, tmp_path):
        path = tmp_path / "p.safetensors"
        random_projector(build("gemma3"), build("llama")).save(path)
        whole = path.read_bytes()
        for size in (0, 5, 1000, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ProjectorFileError, match=r"p\.safetensors is truncated, damaged or no safetensors"):
                c2c.CacheProjector.load(path)
        with pytest.raises(FileNotFoundError, match="a projector file is wanted"):
            c2c.CacheProjector.load(tmp_path / "none")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "other"}, "is 'other' version 1, wanted"),
            ({"version": 99}, "version 99, wanted .* version 1"),
            ({"rank": 2}, r"layers\.0\.key_proj has shape \(2, 16, 96\), wanted \(2, 16, 2\)"),
            ({"tokens": "words"}, "damaged header"),
            ({"sources": []}, "damaged header"),
            (None, "without the header of a projector"),
        ],
    )
    def test_headers_are_checked(self, tmp_path, change, message):
        from safetensors import safe_open
        from safetensors.torch import save_file

        path = tmp_path / "p.safetensors"
        random_projector(build("gemma3"), build("llama")).save(path)
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["c2c"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        metadata = None if change is None else {"c2c": json.dumps({**header, **change})}
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ProjectorFileError, match=message):
            c2c.CacheProjector.load(path)

    def test_values_are_checked(self, tmp_path):
        path = tmp_path / "p.safetensors"
        projector = random_projector(build("gemma3"), build("llama"))
        with torch.no_grad():
            projector.maps[2].key_bias[0, 3] = torch.nan
        projector.save(path)
        with pytest.raises(ProjectorFileError, match=r"layers\.2\.key_bias has infinite or NaN"):
            c2c.CacheProjector.load(path)

    def test_an_unknown_storage(self, tmp_path):
        with pytest.raises(ValueError, match="storage must be one of float32, bfloat16, int8; got 'int4'"):
            random_projector(build("gemma3"), build("llama")).save(tmp_path / "p", storage="int4")
        assert not list(tmp_path.iterdir())


def test_identities():
    model, tokenizer = build("gemma3"), build_tokenizer(3)
    wanted = identify(model, tokenizer, "mine")
    check_identity("sharer", wanted, identify(build("gemma3"), build_tokenizer(3)))
    assert model_hash(build("gemma3").bfloat16()) == wanted.model
    enable(model)
    assert model_hash(model) == wanted.model
    with pytest.raises(ValueError, match="the sharer's model other has SHA-256 .* made for mine"):
        check_identity("sharer", wanted, identify(build("gemma3", seed=1), tokenizer, "other"))
    with pytest.raises(ValueError, match="the receiver's tokenizer"):
        check_identity("receiver", wanted, identify(model, build_tokenizer(4)))
    assert tokenizer_hash(build_tokenizer(3)) == wanted.tokenizer
    assert model_hash(build("gemma3", rope_parameters=None, sliding_window=9)) != wanted.model


def test_refusals():
    sharer, receiver = build("gemma3"), build("llama")
    projector = random_projector(sharer, receiver)
    spans = token_spans(build_tokenizer(25), TEXT), token_spans(build_tokenizer(4), TEXT)
    with torch.no_grad():
        cache, other = read_tokens(sharer, spans[0].ids), read_tokens(build("llama", num_hidden_layers=3), [3, 4])
    with pytest.raises(ValueError, match=f"holds {len(spans[0].ids)} tokens, sharer_spans has {len(spans[1].ids)}"):
        projector.context(cache, spans[1], spans[1])
    with pytest.raises(ValueError, match="prefix has 3 layers, the projector's receiver has 4"):
        projector.context(cache, *spans, prefix=other)
    with pytest.raises(ValueError, match="cache has 3 layers, the projector's sharer has 4"):
        projector.segments([(layer.keys, layer.values) for layer in other.layers], projector.plan(*spans))
    wide = [(layer.keys[..., :8], layer.values) for layer in cache.layers]
    with pytest.raises(ValueError, match=r"cache layer 0: .* wanted \(batch, 2, len, 16\)"):
        projector.segments(wide, projector.plan(*spans))
    with pytest.raises(ValueError, match="ids reach position 513, the model's context is 512"):
        read_tokens(sharer, torch.zeros(1, 513, dtype=torch.long))
    with pytest.raises(ValueError, match="ids is empty"):
        read_tokens(sharer, [])
    shape = cache_shape(sharer)
    with pytest.raises(ValueError, match="sources has 0 entries, wanted one per receiver layer"):
        c2c.CacheProjector(shape, shape, [])
    with pytest.raises(ValueError, match=r"value_sources has \('value', 4, 0\), wanted"):
        c2c.CacheProjector(shape, shape, [([Source("key", 0)], [Source("value", 4)])] * 4)
    with pytest.raises(ValueError, match="key_sources is empty"):
        c2c.CacheProjector(shape, shape, [([], [Source("value", 0)])] * 4)
