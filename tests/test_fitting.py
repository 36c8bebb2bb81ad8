"""Normal equations, ridge, reduced rank, the choice of groups: against direct solutions in float64."""

from __future__ import annotations

import pytest
import torch

from c2c_kernels.fitting import moments as moments_module
from c2c_kernels.fitting.moments import Moments
from c2c_kernels.fitting.ridge import GroupChoice, HeldOut, Normal, affine, choose_ridge

FEATURES, TARGETS, TOKENS = 23, 7, 400


@pytest.fixture
def data(monkeypatch):
    """(x, y) float64 with large means, and their moments, summed in uneven chunks over several blocks."""
    monkeypatch.setattr(moments_module, "BLOCK", 9)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, FEATURES, generator=generator) * torch.logspace(-2, 1, FEATURES) + 5
    y = x @ torch.randn(FEATURES, TARGETS, generator=generator) + torch.randn(TOKENS, TARGETS, generator=generator) - 30
    moments = Moments(FEATURES, TARGETS)
    for start, end in ((0, 17), (17, 18), (18, 250), (250, TOKENS)):
        moments.add(x[start:end].clone(), y[start:end].clone())
    return x.double(), y.double(), moments


def direct(x, y, ridge):
    """(weights of unit-variance features, mean, scale) by solving on the data."""
    mean, scale = x.mean(0), x.std(0, correction=0)
    z, target = (x - mean) / scale, y - y.mean(0)
    left = z.T @ z / len(z) + ridge * torch.eye(z.shape[1], dtype=torch.float64)
    return torch.linalg.solve(left, z.T @ target / len(z)), mean, scale


def test_moments_are_those_of_the_data(data):
    x, y, moments = data
    columns = torch.tensor([0, 2, 8, 9, 10, 17, 18, 22])
    torch.testing.assert_close(
        moments.covariance(columns), torch.cov(x[:, columns].T, correction=0), rtol=1e-5, atol=1e-5
    )
    cross = (x[:, columns] - x[:, columns].mean(0)).T @ (y[:, 2:5] - y[:, 2:5].mean(0)) / TOKENS
    torch.testing.assert_close(moments.cross_covariance(columns, slice(2, 5)), cross, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.means()[0], x.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.means()[1], y.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.variance_y(), y.var(0, correction=0), rtol=1e-5, atol=0)


def test_large_means_cost_no_digits():
    """Without a shift float32 products of features near 1000 would lose the variance."""
    generator = torch.Generator().manual_seed(5)
    x = 1000 + torch.randn(5000, 4, generator=generator) * 0.01
    moments = Moments(4, 1)
    for part in x.split(500):
        moments.add(part.clone(), torch.zeros(len(part), 1))
    columns = torch.arange(4)
    torch.testing.assert_close(moments.covariance(columns), torch.cov(x.double().T, correction=0), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_ridge_is_the_direct_solution(data, ridge):
    x, y, moments = data
    columns = torch.tensor([1, 4, 7, 9, 13, 20])
    found = affine(moments, columns, slice(1, 6), ridge, None)
    weights, mean, scale = direct(x[:, columns], y[:, 1:6], ridge)
    wanted = (x[:, columns] - mean) / scale @ weights + y[:, 1:6].mean(0)
    got = x[:, columns] @ found.weight.double().T + found.bias
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


def test_reduced_rank_is_the_best_of_its_rank(data):
    """Among projections of the ridge solution's fit on a plane: the singular values say the best that can be had."""
    x, y, moments = data
    columns, ridge, rank = torch.arange(FEATURES), 0.01, 3
    weights, mean, scale = direct(x, y, ridge)
    z = (x - mean) / scale
    padded = torch.cat([z / TOKENS**0.5, ridge**0.5 * torch.eye(FEATURES, dtype=torch.float64)])
    singular = torch.linalg.svdvals(padded @ weights)
    found = affine(moments, columns, slice(0, TARGETS), ridge, rank)
    outward, inward = found.weight
    assert outward.shape == (TARGETS, rank)
    assert inward.shape == (rank, FEATURES)
    reduced = (outward.double() @ inward.double()).T * scale[:, None]
    lost = (padded @ (weights - reduced)).square().sum()
    torch.testing.assert_close(lost, singular[rank:].square().sum(), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        x.mean(0) @ (outward.double() @ inward.double()).T + found.bias, y.mean(0), rtol=1e-4, atol=1e-3
    )


def test_constant_features_are_harmless():
    generator = torch.Generator().manual_seed(7)
    x = torch.cat([torch.randn(100, 2, generator=generator), torch.full((100, 1), 4.0)], dim=1)
    y = x[:, :1] * 2
    moments = Moments(3, 1)
    moments.add(x.clone(), y.clone())
    found = affine(moments, torch.arange(3), slice(0, 1), 1e-6, None)
    torch.testing.assert_close(x @ found.weight.T + found.bias, y, rtol=1e-3, atol=1e-3)
    assert found.weight[0, 2] == 0


def test_groups_that_say_something_are_chosen():
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(2000, 12, generator=generator)
    y = x[:, 3:6] @ torch.randn(3, 4, generator=generator) + 0.5 * x[:, 9:12] @ torch.randn(3, 4, generator=generator)
    moments = Moments(12, 4)
    moments.add(x[:1500].clone(), y[:1500].clone())
    held_out = HeldOut(x[1500:], y[1500:])
    groups = [torch.arange(start, start + 3) for start in range(0, 12, 3)]
    choice = GroupChoice(moments, held_out, groups)
    assert choice.choose(slice(0, 4), 1, 0.01) == [1]
    assert choice.choose(slice(0, 4), 2, 0.01) == [1, 3]
    columns = torch.cat([groups[1], groups[3]])
    ridge, error = choose_ridge(moments, held_out, columns, slice(0, 4), (1e-4, 10.0))
    assert ridge == 1e-4
    assert error < 1e-3
    normal = Normal.of(moments, columns, slice(0, 4))
    none = held_out.unexplained(moments, columns, slice(0, 4), torch.zeros(6, 4), normal.scale)
    torch.testing.assert_close(none, torch.ones(4, dtype=torch.float64))


def test_state_goes_on_to_the_same_bits(data):
    x, y, moments = data
    again = Moments(FEATURES, TARGETS)
    again.load_state({name: tensor.clone() for name, tensor in moments.state().items()})
    for one in (moments, again):
        one.add(x[:50].float(), y[:50].float())
    for name, tensor in moments.state().items():
        assert torch.equal(tensor, again.state()[name]), name
    with pytest.raises(ValueError, match="sum_x is missing or has another shape"):
        Moments(FEATURES + 1, TARGETS).load_state(moments.state())


def test_refusals():
    moments = Moments(3, 2)
    with pytest.raises(ValueError, match=r"x is torch.float64 \(4, 3\), wanted float32 \(tokens, 3\)"):
        moments.add(torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="x has 4 tokens, y has 5"):
        moments.add(torch.zeros(4, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="no tokens"):
        moments.means()
