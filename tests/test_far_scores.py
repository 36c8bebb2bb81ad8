"""Gradients of rows whose scores all lie so far from 0 that float32 cannot hold their log-sum-exp."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from error_rule import GRADIENT_ULPS, assert_as_exact

import c2c_kernels as c2c

HEADS, DIM = 4, 8


def whole_numbers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """-1, 0 and 1: float32 adds their products to a far score without rounding, in any order."""
    return torch.randint(-1, 2, shape, generator=generator).float()


def far_call(far: int, q_len: int, *, segments: bool = True, sinks: bool = True) -> dict[str, torch.Tensor]:
    """Leaves of a call whose scores are `far` plus small whole numbers: the first dimension holds the distance."""
    generator = torch.Generator().manual_seed(q_len)

    def far_keys(*shape: int) -> torch.Tensor:
        keys = whole_numbers(generator, *shape)
        keys[..., 0] = far / 1024
        return keys

    query = whole_numbers(generator, 2, HEADS, q_len, DIM)
    query[..., 0] = 1024
    call = {"query": query, "key": far_keys(2, 2, 150, DIM), "value": torch.randn(2, 2, 150, 5, generator=generator)}
    if segments:
        call |= {
            "plain key": far_keys(2, 2, 90, DIM),
            "plain value": torch.randn(2, 2, 90, 5, generator=generator),
            "gate": torch.rand(2, HEADS, 90, generator=generator).round(decimals=1),
            "raw key": whole_numbers(generator, 2, 1, 70, DIM),
            "raw value": torch.randn(2, 1, 70, DIM, generator=generator),
            "key_proj": whole_numbers(generator, 2, DIM, DIM),
            "value_proj": torch.randn(2, 5, DIM, generator=generator),
        }
        call["raw key"][..., 0] = 1
        call["key_proj"][:, 0] = 0
        call["key_proj"][:, 0, 0] = far / 1024
    if sinks:
        call["sinks"] = torch.tensor([far, far + 2, far - 1, -torch.inf])
    return call


def gradients(call: dict, backend: str, dtype: torch.dtype = torch.float32, **options) -> dict[str, torch.Tensor]:
    """Gradients of every leaf from fixed cotangents of out, lse and mass."""
    leaves = {name: t.to(dtype, copy=True).requires_grad_() for name, t in call.items()}
    segments = []
    if "plain key" in leaves:
        segments = [
            c2c.SharerSegment(leaves["plain key"], leaves["plain value"], gate=leaves["gate"]),
            c2c.SharerSegment(leaves["raw key"], leaves["raw value"], leaves["key_proj"], leaves["value_proj"]),
        ]
    results = c2c.merged_attention(
        leaves["query"], leaves["key"], leaves["value"], segments, sinks=leaves.get("sinks"), scale=1.0,
        return_lse=True, return_mass=True, backend=backend, **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).nan_to_num().sum() for t in results)
    loss.backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.sanitize
@pytest.mark.parametrize("strategy", ["absorb", "materialize"])
@pytest.mark.parametrize("q_len", [2, 37])
@pytest.mark.parametrize("far", [-(2**20), 2**20, 2**10])
def test_far_scores_that_float32_holds(far, q_len, strategy):
    call = far_call(far, q_len)
    ours = gradients(call, "cpu", is_causal=True, strategy=strategy)
    theirs = gradients(call, "reference", is_causal=True)
    for name, exact in gradients(call, "reference", torch.float64, is_causal=True).items():
        assert_as_exact(name, ours[name], theirs[name], exact, GRADIENT_ULPS)


def check_hidden_rows(q_len: int, low: float, sinks: bool, ours_of: Callable[..., dict[str, torch.Tensor]]) -> None:
    """Beside a mask of `low` no score is left: weights are alike, as they are in PyTorch's float32 softmax.

    ours_of: `gradients` of a call and `attn_mask` on a backend.
    """
    generator = torch.Generator().manual_seed(1)
    call = {
        name: torch.randn(1, 2, n, 16, generator=generator) for name, n in (("query", q_len), ("key", 8), ("value", 8))
    }
    call["query"] *= 16**-0.5  # scores of variance 1
    if sinks:
        call["sinks"] = torch.tensor([low, low])
    mask = torch.zeros(q_len, 8)
    mask[0] = low
    mask[1, :5] = low
    ours, theirs = ours_of(call, attn_mask=mask), gradients(call, "reference", attn_mask=mask)
    # float64 would still tell scores apart beside such a mask: the oracle gets the sums that float32 makes of them.
    scores, exactly = (call["query"].to(t) @ call["key"].to(t).mT for t in (torch.float32, torch.float64))
    added = (scores + mask).double() - exactly
    exact = gradients(call, "reference", torch.float64, attn_mask=added)
    for name, gradient in ours.items():
        assert_as_exact(name, gradient, theirs[name], exact[name], GRADIENT_ULPS)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("q_len", [2, 37])
def test_rows_that_a_finite_mask_hides(q_len, low, sinks):
    check_hidden_rows(q_len, low, sinks, functools.partial(gradients, backend="cpu"))


def test_the_gradient_of_a_hidden_row_is_that_of_a_mean():
    query, key, value = torch.zeros(1, 1, 2, 16), torch.randn(1, 1, 8, 16), torch.randn(1, 1, 8, 16).requires_grad_()
    mask = torch.tensor([-1e9, 0.0])[:, None].expand(2, 8)
    c2c.merged_attention(query, key, value, attn_mask=mask, backend="cpu").sum().backward()
    torch.testing.assert_close(value.grad, torch.full_like(value, 2 / 8))


def test_rows_nearby_keep_their_bits():
    """A far row in a tile changes nothing in the others."""
    generator = torch.Generator().manual_seed(2)
    call = {
        name: torch.randn(1, 2, n, 16, generator=generator) for name, n in (("query", 37), ("key", 90), ("value", 90))
    }
    masks = torch.zeros(2, 37, 90)
    masks[1, 7] = -1e9
    near, far = (gradients(call, "cpu", attn_mask=mask)["query"] for mask in masks)
    others = torch.arange(37) != 7
    assert torch.equal(near[:, :, others], far[:, :, others])


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_beyond_a_billion(dtype):
    """Half an ulp of such a score is a difference of hundreds: a score and its maximum have to be rounded alike."""
    query, key, value = (torch.randn(1, heads, n, 96).to(dtype) for heads, n in ((2, 40), (1, 77), (1, 77)))
    query, key = query * 1e5, key * 1e5
    out, lse = c2c.merged_attention(query, key, value, return_lse=True, backend="cpu")
    theirs, their_lse = c2c.merged_attention(query, key, value, return_lse=True, backend="reference")
    exact, exact_lse = c2c.merged_attention(
        query.double(), key.double(), value.double(), return_lse=True, backend="reference"
    )
    assert_as_exact("out", out, theirs, exact)
    assert_as_exact("lse", lse, their_lse, exact_lse)
