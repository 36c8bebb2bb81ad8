"""`quantize_kv`: the stated error, the kernel against the reference, and attention over what it makes."""

from __future__ import annotations

import pytest
import torch
from attention_cases import numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import DTYPES, seeds

import c2c_kernels as c2c


@pytest.mark.sanitize
@given(
    st.integers(0, 3), st.integers(1, 3), st.sampled_from((0, 1, 7, 65)), st.sampled_from((1, 8, 20, 64, 130)),
    st.sampled_from(DTYPES), st.booleans(), seeds,
)  # fmt: skip
@settings(max_examples=80)
def test_error_and_reference(batch, heads, length, dim, dtype, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    key = numbers(generator, (batch, heads, length, dim), dtype, strided) * 3
    value = numbers(generator, (batch, heads, length, dim + 1), dtype, strided)
    results = c2c.quantize_kv(key, value, backend="cpu")
    for x, quantised, scale in ((key, results[0], results[2]), (value, results[1], results[3])):
        assert quantised.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == x.shape[:3]
        if x.numel():
            torch.testing.assert_close(scale, x.float().abs().amax(-1) / 127)
        error = (quantised.double() * scale.double().unsqueeze(-1) - x.double()).abs()
        # x / scale is at most 127 and is rounded once more in float32: 2^-17 of a step.
        assert (error <= scale.double().unsqueeze(-1) * (0.5 + 2**-16)).all()
    for mine, theirs in zip(results, c2c.quantize_kv(key, value, backend="reference"), strict=True):
        # x / scale may be a hair off a half: one step apart is right too.
        assert (mine.double() - theirs.double()).abs().le(1e-6 if mine.dtype != torch.int8 else 1).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_zeros_and_broken_tokens(backend):
    x = torch.randn(1, 1, 4, 20)
    x[0, 0, 1], x[0, 0, 2, 3], x[0, 0, 3, 4] = 0, torch.nan, torch.inf
    quantised, _, scale, _ = c2c.quantize_kv(x, x, backend=backend)
    back = quantised.float() * scale.unsqueeze(-1)
    assert not back[0, 0, 1].any() and back[0, 0, 0].isfinite().all()
    assert back[0, 0, 2:].isnan().all()


def test_attention_reads_the_quantised_segment_in_place():
    query, key = torch.randn(2, 6, 3, 32), torch.randn(2, 2, 9, 32)
    raw = torch.randn(2, 3, 200, 16), torch.randn(2, 3, 200, 16)
    proj = [torch.randn(2, 32, 48) / 7 for _ in range(2)]
    for rows in (query, query[:, :, :1], torch.randn(2, 6, 40, 32)):
        for parts, projectors in ((raw, proj), ((key.repeat(1, 1, 9, 1), key.repeat(1, 1, 9, 1)), (None, None))):
            quantised = c2c.quantize_kv(*parts)
            small = c2c.SharerSegment(
                quantised[0], quantised[1], *projectors, key_scale=quantised[2], value_scale=quantised[3]
            )
            restored = [q * s.unsqueeze(-1) for q, s in zip(quantised[:2], quantised[2:], strict=True)]
            exact = c2c.SharerSegment(*restored, *projectors)
            for strategy in ("absorb", "materialize"):
                torch.testing.assert_close(
                    c2c.merged_attention(rows, key, key, [small], strategy=strategy),
                    c2c.merged_attention(rows, key, key, [exact], strategy=strategy),
                )


@pytest.mark.parametrize("backend", ["cpu"])
def test_operator_and_bad_input(backend):
    x = torch.randn(1, 2, 3, 8)
    torch.library.opcheck(torch.ops.c2c.quantize.default, (x, backend))
    for key, value, error, message in (
        (x[0], x, ValueError, "key has shape"),
        (x, x[:, :, :2], ValueError, "value has shape"),
        (x.int(), x, TypeError, "key has dtype"),
        (x, x.half(), TypeError, "value has dtype"),
        (x.clone().requires_grad_(), x, ValueError, "requires grad"),
    ):
        with pytest.raises(error, match=message):
            c2c.quantize_kv(key, value, backend=backend)
