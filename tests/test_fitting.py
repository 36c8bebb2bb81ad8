"""Normal equations, ridge, reduced rank, the choice of groups: against direct solutions in float64."""

from __future__ import annotations

import pytest
import torch
from error_rule import assert_as_exact

from c2c_kernels.fitting import moments as moments_module
from c2c_kernels.fitting.moments import Moments
from c2c_kernels.fitting.ridge import GroupChoice, HeldOut, Normal, affine, choose_ridge
from c2c_kernels.fitting.stretch import stretched

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
    """(weights of unit-variance features, mean, scale) by solving on the data, in their dtype."""
    mean, scale = x.mean(0), x.std(0, correction=0)
    z, target = (x - mean) / scale, y - y.mean(0)
    left = z.T @ z / len(z) + ridge * torch.eye(z.shape[1], dtype=x.dtype)
    return torch.linalg.solve(left, z.T @ target / len(z)), mean, scale


def cross_covariance(x, y):
    return (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)


def test_moments_are_those_of_the_data(data):
    x, y, moments = data
    columns, targets = torch.tensor([0, 2, 8, 9, 10, 17, 18, 22]), slice(2, 5)
    found = {
        "covariance": (moments.covariance(columns), lambda x, y: torch.cov(x[:, columns].T, correction=0)),
        "cross": (
            moments.cross_covariance(columns, targets),
            lambda x, y: cross_covariance(x[:, columns], y[:, targets]),
        ),
        "mean of x": (moments.means()[0], lambda x, y: x.mean(0)),
        "mean of y": (moments.means()[1], lambda x, y: y.mean(0)),
        "variance of x": (moments.variance_x(), lambda x, y: x.var(0, correction=0)),
        "covariance between": (
            moments.covariance_between(range(3, 9), range(11, FEATURES)),
            lambda x, y: cross_covariance(x[:, 3:9], x[:, 11:]),
        ),
        "variance of y": (moments.variance_y(), lambda x, y: y.var(0, correction=0)),
    }
    for name, (ours, formula) in found.items():
        assert_as_exact(name, ours.float(), formula(x.float(), y.float()), formula(x, y))


def test_sums_stay_within_a_gigabyte_at_the_widths_of_a_pair():
    """SmolLM2-135M to Gemma 3 270M, the wider of both ways: a fit has 4 GB, most of it the models."""
    with torch.device("meta"):
        state = Moments(30 * 2 * 192, 18 * 2 * 256).state()
    assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) < 0.72e9


def test_many_chunks_cost_few_digits():
    """Totals are float32: 400 additions must leave the covariance as exact as one product does."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(8000, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 3
    moments = Moments(6, 6)
    for part in x.split(20):
        moments.add(part.clone(), part.clone())
    columns = torch.arange(6)
    wanted = torch.cov(x.double().T, correction=0)
    for found in (moments.covariance(columns), moments.cross_covariance(columns, slice(0, 6))):
        assert (found - wanted).abs().max() < 2e-6 * wanted.diagonal().max()


def test_large_means_cost_no_digits():
    """Without a shift float32 products of features near 1000 would lose the variance."""
    generator = torch.Generator().manual_seed(5)
    x = 1000 + torch.randn(5000, 4, generator=generator) * 0.01
    moments = Moments(4, 1)
    for part in x.split(500):
        moments.add(part.clone(), torch.zeros(len(part), 1))
    ours = moments.covariance(torch.arange(4)).float()
    assert_as_exact("covariance", ours, torch.cov(x.T, correction=0), torch.cov(x.double().T, correction=0))


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_ridge_is_the_direct_solution(data, ridge):
    x, y, moments = data
    columns = torch.tensor([1, 4, 7, 9, 13, 20])
    found = affine(moments, columns, slice(1, 6), ridge, None)

    def predicted(x, y):
        weights, mean, scale = direct(x, y, ridge)
        return (x - mean) / scale @ weights + y.mean(0)

    wanted, torchs = (predicted(x[:, columns].to(t), y[:, 1:6].to(t)) for t in (torch.float64, torch.float32))
    read = x[:, columns].float()
    terms = float((read.abs() @ found.weight.abs().T + found.bias.abs()).max())
    assert_as_exact("prediction", read @ found.weight.T + found.bias, torchs, wanted, scale=terms)


def test_reduced_rank_is_the_best_of_its_rank(data):
    """The ridge solution projected on the plane of targets that keeps most of its fit: the leading singular vectors."""
    x, y, moments = data
    ridge, rank = 0.01, 3

    def best(x, y, by_eigenvectors=False):
        weights, _, scale = direct(x, y, ridge)
        padded = torch.cat([(x - x.mean(0)) / scale / len(x) ** 0.5, ridge**0.5 * torch.eye(FEATURES, dtype=x.dtype)])
        fitted = padded @ weights
        leading = torch.linalg.svd(fitted)[2][:rank]
        if by_eigenvectors:
            leading = torch.linalg.eigh(fitted.T @ fitted)[1][:, -rank:].T
        return (weights / scale[:, None] @ leading.T @ leading).T

    outward, inward = affine(moments, torch.arange(FEATURES), slice(0, TARGETS), ridge, rank).weight
    assert outward.shape == (TARGETS, rank)
    assert inward.shape == (rank, FEATURES)
    terms = float((outward.abs() @ inward.abs()).max())
    low = x.float(), y.float()
    others = (best(*low, by_eigenvectors=True),)
    assert_as_exact("weights", outward @ inward, best(*low), best(x, y), others=others, scale=terms)


@pytest.mark.parametrize("rank", [None, 3])
def test_the_mean_is_mapped_to_the_mean(data, rank):
    x, y, moments = data
    found = affine(moments, torch.arange(FEATURES), slice(0, TARGETS), 0.01, rank)
    weight = found.weight if rank is None else found.weight[0] @ found.weight[1]
    mean = x.mean(0)
    terms = float((mean.abs() @ weight.double().abs().T).max())
    assert_as_exact("mean", (mean @ weight.double().T + found.bias).float(), y.float().mean(0), y.mean(0), scale=terms)


def test_constant_features_are_harmless():
    generator = torch.Generator().manual_seed(7)
    x = torch.cat([torch.randn(100, 2, generator=generator), torch.full((100, 1), 4.0)], dim=1)
    y = x[:, :1] * 2
    moments = Moments(3, 1)
    moments.add(x.clone(), y.clone())
    found = affine(moments, torch.arange(3), slice(0, 1), 1e-6, None)

    def predicted(x, y):
        weights, mean, scale = direct(x[:, :2], y, 1e-6)
        return (x[:, :2] - mean) / scale @ weights + y.mean(0)

    assert_as_exact("prediction", x @ found.weight.T + found.bias, predicted(x, y), predicted(x.double(), y.double()))
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


@pytest.mark.parametrize("left", [0.0, 1e-7])
def test_targets_that_never_change_say_nothing_about_groups(left):
    """Dimensions that a model's weights make 0, or that undoing a rotation leaves at 1e-7, have no share."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(2000, 12, generator=generator)
    y = x[:, 3:6] @ torch.randn(3, 4, generator=generator) + 0.5 * x[:, 9:12] @ torch.randn(3, 4, generator=generator)
    y = torch.cat([torch.zeros(2000, 2), y], dim=1)
    y[:, 0] = left * torch.randn(2000, generator=generator)
    moments = Moments(12, 6)
    moments.add(x[:1500].clone(), y[:1500].clone())
    held_out = HeldOut(x[1500:], y[1500:])
    groups = [torch.arange(start, start + 3) for start in range(0, 12, 3)]
    choice = GroupChoice(moments, held_out, groups)
    assert choice.choose(slice(0, 6), 2, 0.01) == [1, 3]
    columns = torch.cat([groups[1], groups[3]])
    ridge, error = choose_ridge(moments, held_out, columns, slice(0, 6), (10.0, 1e-4))
    assert ridge == 1e-4
    found = affine(moments, columns, slice(0, 6), ridge, None)
    without = affine(moments, columns, slice(2, 6), ridge, None)
    assert error == pytest.approx(held_out.left_by(found, columns, slice(0, 6)), rel=0.02)
    # what is left is a square of roundings, which products of other widths make in another order
    left = held_out.left_by(without, columns, slice(2, 6))
    assert held_out.left_by(found, columns, slice(0, 6)) == pytest.approx(left, rel=1e-3) and left < 1e-3
    assert choose_ridge(moments, held_out, columns, slice(1, 2), (10.0, 1e-4))[1] == 0


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
    moments.add(torch.ones(4, 3), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"rows range\(0, 2\) must end before columns range\(1, 3\) begin"):
        moments.covariance_between(range(2), range(1, 3))


@pytest.mark.parametrize("rank", [None, 3])
def test_stretched_maps_keep_the_mean(data, rank):
    x, y, moments = data
    found = affine(moments, torch.arange(FEATURES), slice(0, TARGETS), 0.01, rank)
    mean = moments.means()[1]
    longer = stretched(found, mean, 1.25)

    def weight(maps, dtype):
        return maps.weight[0].to(dtype) @ maps.weight[1].to(dtype) if rank else maps.weight.to(dtype)

    def apply(maps, dtype):
        return x.to(dtype) @ weight(maps, dtype).T + maps.bias.to(dtype)

    wanted = mean + 1.25 * (apply(found, torch.float64) - mean)
    plain = mean.float() + 1.25 * (apply(found, torch.float32) - mean.float())
    terms = float((x.abs() @ weight(longer, torch.float64).abs().T).max())
    assert_as_exact("stretched", apply(longer, torch.float32), plain, wanted, scale=terms)
    assert_as_exact("mean", apply(longer, torch.float32).mean(0), plain.mean(0), y.mean(0), scale=terms)
