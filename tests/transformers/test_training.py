"""Gradients through an enabled model, with and without gradient checkpointing."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_models import Float64, build, read, tokens

from c2c_kernels.integrations.transformers import SharedContext, enable, record_mass

BATCH, PREFIX, LENGTH = 2, 13, 7
FAMILY_SAMPLE = ["llama", "gemma2", "gpt_oss", "phi3"]
CHECKPOINTING = {"none": None, "not re-entrant": False, "re-entrant": True}


class Trainable:
    """A frozen receiver's trainable surroundings: a projector and gates per layer."""

    def __init__(self, cache, shared_gate):
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape, mean=0.0):
            values = mean + 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
            return values.requires_grad_()

        layers = cache.layers
        heads, dim = layers[0].keys.shape[1], layers[0].keys.shape[3]
        self.projectors = [
            (
                (parameter(heads, dim, 5), parameter(5, heads * dim)),  # low rank
                parameter(heads, dim, heads * dim),
                parameter(heads, dim),
                parameter(heads, dim),
            )
            for _ in layers
        ]
        self.logits = [parameter()] if shared_gate else [parameter(BATCH, 6, PREFIX) for _ in layers]
        gates = [torch.sigmoid(logit) for logit in self.logits]
        if shared_gate:
            gates = gates * len(layers)
        self.context = SharedContext.from_caches(cache, projectors=[self.projectors], gates=[gates])

    @property
    def parameters(self):
        pairs = [tensor for (pair, *_) in self.projectors for tensor in pair]
        return pairs + [tensor for (_, *rest) in self.projectors for tensor in rest] + self.logits


def loss_and_gradients(family, checkpointing, shared_gate, *, train_receiver=True, backend="reference"):
    model = build(family).double()
    trainable = Trainable(read(model, tokens(BATCH, PREFIX, seed=1)), shared_gate)
    enable(model, backend=backend).train()
    for parameter in model.parameters():
        parameter.requires_grad_(train_receiver)
    if CHECKPOINTING[checkpointing] is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    input_ids = tokens(BATCH, LENGTH, seed=2)
    loss = model(input_ids, labels=input_ids, use_cache=False, c2c=trainable.context).loss
    loss.backward()
    wanted = trainable.parameters + [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), [parameter.grad for parameter in wanted]


@pytest.mark.parametrize("shared_gate", [True, False])
@pytest.mark.parametrize("family", FAMILY_SAMPLE)
@pytest.mark.parametrize("train_receiver", [True, False])
def test_checkpointing_gives_the_same_gradients(family, shared_gate, train_receiver):
    loss, gradients = loss_and_gradients(family, "none", shared_gate, train_receiver=train_receiver)
    surroundings = gradients[: 5 * 4 + (1 if shared_gate else 4)]
    assert all(gradient.abs().max() > 0 for gradient in surroundings)
    for kind in ("not re-entrant", "re-entrant"):
        again, checkpointed = loss_and_gradients(family, kind, shared_gate, train_receiver=train_receiver)
        torch.testing.assert_close(again, loss, rtol=0, atol=1e-14)
        for one, other in zip(gradients, checkpointed, strict=True):
            if one is None:  # an expert that no token chose
                assert other is None
            else:
                torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", FAMILY_SAMPLE)
def test_gradients_match_finite_differences(family):
    """Along a random direction through gates and projectors at once, in float64."""
    model = build(family).double()
    trainable = Trainable(read(model, tokens(BATCH, PREFIX, seed=1)), shared_gate=False)
    enable(model, backend="reference")
    input_ids = tokens(BATCH, LENGTH, seed=2)
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trainable.parameters]

    def loss_at(step):
        with torch.no_grad():
            for parameter, direction in zip(trainable.parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
        gates = [torch.sigmoid(logit) for logit in trainable.logits]
        column = [layer[0] for layer in trainable.context.layers]
        for segment, gate in zip(column, gates, strict=True):
            segment.gate = gate
        with Float64():
            return model(input_ids, labels=input_ids, c2c=trainable.context).loss

    loss_at(0.0).backward()
    slope = sum((p.grad * d).sum() for p, d in zip(trainable.parameters, directions, strict=True))
    step = 1e-5
    with torch.no_grad():
        ahead, behind = loss_at(step), loss_at(-2 * step)
    torch.testing.assert_close((ahead - behind) / (2 * step), slope, rtol=1e-6, atol=1e-9)


def test_backends_agree_on_gradients(backend):
    """float32 against the reference in float64, gates and projectors of every layer."""
    if backend == "reference":
        pytest.skip("the reference is what others are compared with")
    _, wanted = loss_and_gradients("llama", "none", shared_gate=False, train_receiver=False)

    def in_float32(name):
        model = build("llama")
        trainable = Trainable(read(model.double(), tokens(BATCH, PREFIX, seed=1)), shared_gate=False)
        model.float()
        enable(model, backend=name).train()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        input_ids = tokens(BATCH, LENGTH, seed=2)
        layers = [[_single(segment) for segment in segments] for segments in trainable.context.layers]
        context = SharedContext(layers, trainable.context.position_offset)
        model(input_ids, labels=input_ids, use_cache=False, c2c=context).loss.backward()
        return [parameter.grad for parameter in trainable.parameters]

    for got, by_torch, exact in zip(in_float32(backend), in_float32("reference"), wanted, strict=True):
        error, allowed = (got - exact).abs().max(), (by_torch - exact).abs().max()
        assert error <= 2 * allowed + 1e-6 * exact.abs().max()


def _single(segment):
    """A float64 segment seen in float32, gradients still reaching the float64 parameters."""
    fields = dict(vars(segment))
    for name, value in fields.items():
        if isinstance(value, tuple):
            fields[name] = tuple(part.float() for part in value)
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            fields[name] = value.float()
    return type(segment)(**fields)


def test_causal_visibility_hides_the_future():
    """On aligned text, changing a sharer token moves only the logits at and after its position."""
    model = build("llama").double()
    text = tokens(1, 9, seed=4)
    changed = text.clone()
    changed[0, 6] = (text[0, 6] + 1) % 100 + 1
    sharer = build("llama", seed=5).double()
    enable(model, backend="reference")
    logits = []
    for ids in (text, changed):
        context = SharedContext.from_caches(read(sharer, ids), visibility="causal")
        assert context.position_offset is None
        with torch.no_grad():
            logits.append(model(text, c2c=context).logits)
    same = (logits[0] == logits[1]).all(dim=-1)[0]
    assert same.tolist() == [True] * 6 + [False] * 3


def test_an_optimiser_step_acts_at_once():
    model = build("llama")
    gate = torch.full((1, 6, PREFIX), 0.5, requires_grad=True)
    context = SharedContext.from_caches(read(model, tokens(1, PREFIX, seed=1)), gates=gate)
    enable(model, backend="reference")
    optimiser = torch.optim.SGD([gate], lr=0.05)
    input_ids = tokens(3, LENGTH, seed=2)
    with torch.no_grad():
        model(input_ids, c2c=context)  # leaves views behind that know no gradient
    losses = []
    for _ in range(2):
        with record_mass(model) as record:
            loss = model(input_ids, labels=input_ids, c2c=context).loss
        assert not record.mass[0][0].requires_grad
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[1] < losses[0]
