"""The coordinates in which maps are trained: the same maps, gradients by the chain rule, white inputs."""

from __future__ import annotations

import pytest
import torch

import c2c_kernels as c2c
from c2c_kernels.projectors import CacheShape, Source, TokenPlan
from c2c_kernels.training.coordinates import RIDGE, Coordinates, InputMoments

SHARER = CacheShape(2, 1, 8, 6, ((0.9, 0.4), ()), (0, 1))
RECEIVER = CacheShape(2, 2, 4, 5, ((0.7,),), (0, 0))
SOURCES = [
    ([Source("key", 0), Source("value", 0)], [Source("value", 1)]),
    ([Source("key", 1, -1)], [Source("key", 0), Source("value", 0)]),
]


def build(rank):
    generator = torch.Generator().manual_seed(5)
    projector = c2c.CacheProjector(SHARER, RECEIVER, SOURCES, rank=rank).double()
    for parameter in projector.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return projector


def moments_of(projector, tokens=900):
    """Of a cache with large means, deviations over two orders of magnitude, and correlations."""
    generator = torch.Generator().manual_seed(6)
    cache = []
    for _ in range(SHARER.layers):
        pair = []
        for dim in (SHARER.head_dim, SHARER.value_dim):
            mixed = torch.randn(1, 1, tokens, dim, generator=generator) @ torch.randn(dim, dim, generator=generator)
            pair.append(mixed * torch.logspace(-1, 1, dim) + 7)
        cache.append(tuple(pair))
    plan = TokenPlan(torch.arange(tokens), torch.arange(tokens), tokens)
    moments = InputMoments(projector)
    moments.add(cache, plan)
    return moments, [torch.cat(pair, dim=1) for pair in projector.features(cache, plan)], cache, plan


def condition(moments, sources):
    white, factor = moments.whitening(sources, torch.float64)
    return float(factor.norm() * white.inverse.norm())


@pytest.mark.parametrize("rank", [None, 3])
def test_they_are_the_same_maps(rank):
    projector = build(rank)
    before = {name: tensor.clone() for name, tensor in projector.state_dict().items()}
    moments, *_ = moments_of(projector)
    Coordinates(projector, moments).push()
    # there and back through L: its condition times the rounding of numbers of this size
    bound = max(condition(moments, layer.key_sources) for layer in projector.maps) * torch.finfo(torch.float64).eps
    for name, tensor in projector.state_dict().items():
        largest = max(float(wanted.abs().max()) for wanted in before.values())
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=bound * largest, msg=name)


@pytest.mark.parametrize("rank", [None, 3])
def test_gradients_are_the_chain_rules(rank):
    """Against differences of a function of the projector's parameters, along a random direction."""
    projector = build(rank)
    coordinates = Coordinates(projector, moments_of(projector)[0])
    generator = torch.Generator().manual_seed(7)
    factors = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in projector.parameters()]

    def value():
        return sum((factor * p.square()).sum() for factor, p in zip(factors, projector.parameters(), strict=True))

    value().backward()
    coordinates.pull()
    assert all(parameter.grad is None for parameter in projector.parameters())
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in coordinates.maps.values()]
    slope = sum((p.grad * d).sum() for p, d in zip(coordinates.maps.values(), directions, strict=True))

    def moved(step):
        with torch.no_grad():
            for parameter, direction in zip(coordinates.maps.values(), directions, strict=True):
                parameter.add_(direction, alpha=step)
            coordinates.push()
            return value()

    step = 1e-5
    ahead, behind = moved(step), moved(-2 * step)
    torch.testing.assert_close((ahead - behind) / (2 * step), slope, rtol=1e-6, atol=0)


def test_inputs_are_white():
    projector = build(None)
    moments, *_ = moments_of(projector)
    for layer in projector.maps:
        white, factor = moments.whitening(layer.key_sources, torch.float64)
        total, products = moments._sums[layer.key_sources]
        covariance = products / moments.tokens - torch.outer(total, total) / moments.tokens**2
        regular = covariance + RIDGE * torch.diag(covariance.diagonal())
        got = white.inverse @ regular @ white.inverse.T
        bound = condition(moments, layer.key_sources) ** 2 * torch.finfo(torch.float64).eps
        torch.testing.assert_close(got, torch.eye(len(got), dtype=torch.float64), rtol=0, atol=min(bound, 1e-9))
        torch.testing.assert_close(factor @ white.inverse, torch.eye(len(got), dtype=torch.float64))


@pytest.mark.parametrize("rank", [None, 3])
def test_state_gives_the_same_bits(rank):
    projector, other = build(rank).float(), build(rank).float()
    coordinates = Coordinates(projector, moments_of(projector)[0])
    with torch.no_grad():
        for parameter in coordinates.maps.values():
            parameter.mul_(1.25)
    coordinates.push()
    again = Coordinates(other, None)
    again.load_state({name: tensor.clone() for name, tensor in coordinates.state().items()})
    for name, tensor in projector.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_sources_that_never_change_stay_finite():
    projector = build(None)
    *_, cache, plan = moments_of(projector)
    still = [(torch.full_like(key, 3.0), torch.full_like(value, -2.0)) for key, value in cache]
    moments = InputMoments(projector)
    moments.add(still, plan)
    before = {name: tensor.clone() for name, tensor in projector.state_dict().items()}
    coordinates = Coordinates(projector, moments)
    coordinates.push()
    for name, tensor in projector.state_dict().items():
        torch.testing.assert_close(tensor, before[name], msg=name)
    assert all(bool(p.isfinite().all()) for p in coordinates.maps.values())
