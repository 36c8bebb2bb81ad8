"""Few query rows over bfloat16 tokens: as many as a tile has, read in place, whatever their lengths and widths.

Up to 16 rows of a stored head go through products of pairs, of tiles or of float32 vectors, by how many they are and by
what the processor has. Every number of rows, and lengths that fill no whole tile, keep to the error rule.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import reference_call
from error_rule import assert_as_exact

import c2c_kernels as c2c

NAN = float("nan")
NAMES = "attn_mask query_positions lengths window segment_window softcap sinks"
ABSENT = {**dict.fromkeys(NAMES.split()), "is_causal": False, "strategy": "auto"}


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).bfloat16()


def check(what, tensors, segments=(), **options):
    call = {**ABSENT, **dict(zip(("query", "key", "value"), tensors, strict=True)), "segments": segments, **options}
    found = c2c.merged_attention(**call, backend="cpu", return_lse=True)
    oracle, torchs = (reference_call(call, dtype) for dtype in (torch.float64, torch.bfloat16))
    for name, out, one, other in zip(("out", "lse"), found, torchs, oracle, strict=False):
        assert_as_exact(f"{what}: {name}", out, one, other)


@pytest.mark.parametrize("rows", range(1, 18))
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (96, 40), (128, 128), (24, 264)])
def test_any_number_of_rows_and_any_length(rows, key_dim, value_dim):
    torch.manual_seed(rows)
    for length in (1, 15, 17, 63, 129, 300):
        tensors = normal(2, 2 * rows, 1, key_dim), normal(2, 2, length, key_dim), normal(2, 2, length, value_dim)
        check(f"{length} tokens", tensors, scale=key_dim**-0.5)


@pytest.mark.parametrize("rows", [1, 3, 5, 9, 14, 16, 17])
@pytest.mark.parametrize(("heads", "dim"), [(1, 256), (2, 64), (3, 48), (5, 40)])
def test_raw_tokens_of_several_heads(rows, heads, dim):
    torch.manual_seed(rows)
    width = heads * dim
    for length in (1, 31, 200):
        proj = [normal(1, 64, width, scale=width**-0.5) for _ in range(2)]
        segment = c2c.SharerSegment(
            normal(2, heads, length, dim),
            normal(2, heads, length, dim),
            *proj,
            key_bias=normal(1, 64),
            value_bias=normal(1, 64),
            gate=torch.rand(2, rows, length),
        )
        tensors = normal(2, rows, 1, 64), normal(2, 1, 70, 64), normal(2, 1, 70, 64)
        check(f"{length} tokens", tensors, [segment], strategy="absorb", scale=0.125)


@pytest.mark.parametrize("rows", [1, 8, 12, 16, 17, 40])
def test_one_raw_token_has_all_bits_of_a_folded_query(rows):
    """Where one token holds a row, log-sum-exp is its score, and shows what a folded query lost."""
    for seed in range(8):
        torch.manual_seed(seed)
        proj = [normal(1, 128, 128, scale=128**-0.5) for _ in range(2)]
        segment = c2c.SharerSegment(normal(1, 1, 1, 128), normal(1, 1, 1, 128), *proj)
        tensors = normal(1, rows, 1, 128), normal(1, 1, 1, 128), normal(1, 1, 1, 128)
        check(f"seed {seed}", tensors, [segment], strategy="absorb")


@pytest.mark.parametrize("rows", [2, 6, 16])
def test_hidden_tokens_are_not_read(rows):
    """Neither what lies beyond a row's length nor what its window has left behind."""
    torch.manual_seed(rows)
    query, key, value = normal(2, rows, 1, 64), normal(2, 1, 333, 64), normal(2, 1, 333, 64)
    lengths = torch.tensor([333, 201])
    call = {"lengths": lengths, "window": 150, "is_causal": True, "scale": 0.125, "backend": "cpu"}
    whole = c2c.merged_attention(query, key, value, **call)
    for row, length in enumerate(lengths.tolist()):
        for tensor in (key, value):
            tensor[row, :, length:] = NAN
            tensor[row, :, : (length - 150) // 128 * 128] = NAN
    assert torch.equal(c2c.merged_attention(query, key, value, **call), whole)


@pytest.mark.parametrize("rows", [4, 11, 16])
def test_strides_caps_masks_and_sinks(rows):
    torch.manual_seed(rows)
    query = normal(1, 1, rows, 64).transpose(1, 2)
    cache = normal(1, 190, 2, 3, 64)
    key, value = cache[:, :, 0, 1:2].transpose(1, 2), cache[:, :, 1, :1].transpose(1, 2)
    mask = torch.rand(1, rows, 1, 190) < 0.7
    check("capped", (query, key, value), softcap=5.0, sinks=torch.randn(rows), attn_mask=mask, scale=0.125)
