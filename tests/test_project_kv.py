"""`project_kv`: forward and backward of the CPU kernels against the reference, and writes into caches."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Plan, SegmentPlan, build_segment
from error_rule import GRADIENT_ULPS, assert_as_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import DTYPES, seeds, segments

import c2c_kernels as c2c
from c2c_kernels.backends import reference
from c2c_kernels.segment import Rope, to_tensors


def tables(generator, batch: int, length: int, rotary_dim: int, factor: float = 1.0):
    angles = torch.rand(batch, length, rotary_dim // 2, generator=generator) * 6
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * factor, angles.sin() * factor


def build(part: SegmentPlan, dtype, batch: int, kv_heads: int, dim: int, remove: bool, apply: bool, seed: int):
    generator = torch.Generator().manual_seed(seed)
    plan = Plan(dtype, batch, kv_heads, 1, 1, 1, dim, dim)
    segment = build_segment(generator, plan, part)
    raw_length, raw_dim = segment.key.shape[2:]
    rope = Rope(
        tables(generator, 1, raw_length, raw_dim // 2 // 2 * 2, 1.3) if remove else None,
        tables(generator, batch, part.length, dim) if apply else None,
    )
    return segment, rope


def at_dtype(segment, rope, dtype, arithmetic):
    """The reference's projection of the segment cast to `dtype`."""

    def cast(t):
        keep = t is None or not t.dtype.is_floating_point or t.dtype == torch.float8_e4m3fn
        return t if keep else t.to(dtype)

    flat = to_tensors(segment)
    return reference.project_kv(type(flat)(*(cast(t) for t in flat[:-1]), flat.causal), rope, arithmetic)


@pytest.mark.sanitize
@given(
    segments(), st.sampled_from(DTYPES), st.integers(1, 3), st.integers(1, 3), st.sampled_from((16, 40, 64)),
    st.booleans(), st.booleans(), seeds,
)  # fmt: skip
@settings(max_examples=300)
def test_cpu_matches_reference(part, dtype, batch, kv_heads, dim, remove, apply, seed):
    segment, rope = build(part, dtype, batch, kv_heads, dim, remove, apply, seed)
    ours = c2c.project_kv(segment, rope=rope, backend="cpu")
    oracle = at_dtype(segment, rope, torch.float64, torch.float64)
    theirs = at_dtype(segment, rope, dtype, dtype)
    for name, mine, torchs, exact in zip(("key", "value"), ours, theirs, oracle, strict=True):
        assert mine.dtype == (torch.float32 if part.quantised and part.projector == "none" else dtype)
        assert_as_exact(name, mine, torchs, exact)


@given(segments(65), st.sampled_from(DTYPES), st.booleans(), st.booleans(), seeds)
@settings(max_examples=80)
def test_cpu_gradients_match_reference(part, dtype, remove, apply, seed):
    segment, rope = build(part, dtype, 2, 2, 16, remove, apply, seed)
    generator = torch.Generator().manual_seed(seed)

    def gradients(backend, cast):
        found, fields = {}, {}
        for name, value in vars(segment).items():
            parts = value if isinstance(value, tuple) else (value,)
            fresh = []
            for i, t in enumerate(parts):
                if isinstance(t, torch.Tensor) and t.dtype.is_floating_point and name not in ("gate", "positions"):
                    t = t.detach().to(cast or t.dtype).requires_grad_()
                    found[f"{name}{i}"] = t
                fresh.append(t)
            fields[name] = tuple(fresh) if isinstance(value, tuple) else fresh[0]
        key, value = c2c.project_kv(c2c.SharerSegment(**fields), rope=rope, backend=backend)
        generator.manual_seed(seed)
        cotangents = [torch.randn(t.shape, generator=generator).to(dtype) for t in (key, value)]
        if found:
            torch.autograd.backward((key, value), (cotangents[0].to(key.dtype), cotangents[1].to(value.dtype)))
        return {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in found.items()}

    ours, theirs = gradients("cpu", None), gradients("reference", None)
    oracle = gradients("reference", torch.float64)
    for name, gradient in ours.items():
        assert_as_exact(name, gradient, theirs[name], oracle[name], GRADIENT_ULPS)


@pytest.mark.parametrize("frozen", [(), ("key_proj",), ("value_bias",), ("key_proj", "key_bias")], ids=str)
@pytest.mark.parametrize("apply", [False, True])
@pytest.mark.parametrize("index", [False, True])
def test_gradients_of_maps_that_read_the_same_frozen_tokens(index, apply, frozen):
    """Keys and values of one tensor: one product for both projectors; gradients of what is frozen are None."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    x = random(2, 1, 19, 36)
    selected = torch.randint(19, (2, 23), generator=generator) if index else None
    length = 23 if index else 19
    lengths, rope = torch.tensor([length - 5, length]), Rope(apply=tables(generator, 1, length, 8) if apply else None)
    maps = {"key_proj": random(3, 8, 36), "value_proj": random(3, 5, 36)}
    maps |= {"key_bias": random(3, 8), "value_bias": random(3, 5)}
    cotangents = random(2, 3, length, 8), random(2, 3, length, 5)

    def gradients(backend, dtype):
        leaves = {name: t.to(dtype, copy=True).requires_grad_(name not in frozen) for name, t in maps.items()}
        tokens = x.to(dtype)
        segment = c2c.SharerSegment(tokens, tokens, **leaves, lengths=lengths, index=selected)
        made = c2c.project_kv(segment, rope=rope, backend=backend)
        sum((half * c.to(dtype)).sum() for half, c in zip(made, cotangents, strict=True)).backward()
        assert all(leaves[name].grad is None for name in frozen) and tokens.grad is None
        return {name: leaf.grad for name, leaf in leaves.items() if name not in frozen}

    ours, theirs = (gradients(backend, torch.float32) for backend in ("cpu", "reference"))
    oracle = gradients("reference", torch.float64)
    for name, gradient in ours.items():
        assert_as_exact(name, gradient, theirs[name], oracle[name], GRADIENT_ULPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 8, 9, 300])
def test_written_into_the_slice_of_a_cache_and_nowhere_else(dtype, length):
    segment = c2c.SharerSegment(
        torch.randn(2, 3, length, 24), torch.randn(2, 3, length, 24), torch.randn(2, 40, 72), torch.randn(2, 56, 72)
    )
    caches = [torch.full((2, 2, length + 11, dim), torch.nan, dtype=dtype) for dim in (40, 56)]
    views = tuple(cache[:, :, 4 : 4 + length] for cache in caches)
    result = c2c.project_kv(segment, out=views, backend="cpu")
    assert result[0] is views[0] and result[1] is views[1]
    plain = c2c.project_kv(segment, backend="reference")
    for cache, view, wanted in zip(caches, views, plain, strict=True):
        torch.testing.assert_close(view, wanted.to(dtype))
        assert cache[:, :, :4].isnan().all() and cache[:, :, 4 + length :].isnan().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_e4m3_code(backend):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(1, 1, 16, 16)
    scale = torch.full((1, 1, 16), 0.5)
    segment = c2c.SharerSegment(codes, codes, key_scale=scale, value_scale=scale)
    key, value = c2c.project_kv(segment, backend=backend)
    torch.testing.assert_close(key, codes.float() * 0.5, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(value, key, rtol=0, atol=0, equal_nan=True)


def test_rotation_is_undone_exactly():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 9, 32, generator=generator)
    cos, sin = tables(generator, 2, 9, 16, 1.7)
    turned = reference.rotate(x, cos, sin)
    key, value = c2c.project_kv(c2c.SharerSegment(turned, x), rope=Rope(remove=(cos, sin)), backend="cpu")
    torch.testing.assert_close(key, x)
    assert torch.equal(value, x)


def test_materialised_segment_attends_as_the_absorbed_one():
    raw = torch.randn(2, 2, 150, 32)
    proj = [torch.randn(3, 64, 64) / 8 for _ in range(2)]
    query, key, value = torch.randn(2, 6, 4, 64), torch.randn(2, 3, 20, 64), torch.randn(2, 3, 20, 64)
    segment = c2c.SharerSegment(raw, raw, *proj)
    kept = c2c.SharerSegment(*c2c.project_kv(segment))
    torch.testing.assert_close(
        c2c.merged_attention(query, key, value, [segment], strategy="absorb"),
        c2c.merged_attention(query, key, value, [kept]),
    )


@pytest.mark.parametrize("width", [256, 1024, 1040, 2048, 4096])
@pytest.mark.parametrize("tokens", [5, 131])
@pytest.mark.parametrize("projector", ["dense", "low_rank"])
def test_wide_sharers_are_summed_in_pieces(width, tokens, projector):
    """A sum over the sharer's width is as exact as PyTorch's, also where the segment is projected within attention."""
    generator = torch.Generator().manual_seed(width)
    raw = [torch.randn(1, 8, tokens, width // 8, generator=generator) for _ in range(2)]
    proj = torch.randn(2, 64, width, generator=generator) / width**0.5
    if projector == "low_rank":
        proj = (torch.randn(2, 64, 600, generator=generator) / 600**0.5, proj.flatten(0, 1).repeat(5, 1)[:600].clone())
    segment = c2c.SharerSegment(*raw, proj, proj)
    oracle = at_dtype(segment, None, torch.float64, torch.float64)
    theirs = at_dtype(segment, None, torch.float32, torch.float32)
    ours = c2c.project_kv(segment, backend="cpu")
    for name, mine, torchs, exact in zip(("key", "value"), ours, theirs, oracle, strict=True):
        assert_as_exact(name, mine, torchs, exact)


@pytest.mark.parametrize("spread", ["normal", "positive"])
@pytest.mark.parametrize("width", [2048, 4096])
def test_wide_bfloat16_sharers_are_summed_in_pieces(width, spread):
    """Into float32, where bfloat16 rounds nothing afterwards."""
    generator = torch.Generator().manual_seed(width)
    raw, proj = torch.randn(1, 8, 64, width // 8, generator=generator), torch.randn(2, 64, width, generator=generator)
    if spread == "positive":
        raw, proj = raw.abs(), proj.abs()
    raw, proj = raw.bfloat16(), proj.bfloat16()
    ours, _ = c2c.project_kv(
        c2c.SharerSegment(raw, raw, proj, proj),
        out=(torch.empty(1, 2, 64, 64), torch.empty(1, 2, 64, 64)),
        backend="cpu",
    )
    tokens = raw.transpose(1, 2).flatten(2)
    oracle, theirs = ((tokens.to(t) @ proj.to(t).transpose(1, 2))[None] for t in (torch.float64, torch.float32))
    assert_as_exact("key", ours, theirs, oracle)


def test_gradients_through_an_undone_rotation_round_once():
    """bfloat16 tokens are un-rotated in float32, as in the forward pass, and rounded for the product at most."""
    generator = torch.Generator().manual_seed(5)
    raw = torch.randn(2, 2, 200, 64, generator=generator).bfloat16()
    proj = torch.randn(2, 16, 128, generator=generator).bfloat16()
    rope = Rope(remove=tables(generator, 1, 200, 64, 1.3))
    cotangent = torch.randn(2, 2, 200, 16, generator=generator).bfloat16()

    def gradient(backend, dtype):
        leaf = proj.to(dtype, copy=True).requires_grad_()
        tokens = raw.to(dtype)
        key, _ = c2c.project_kv(c2c.SharerSegment(tokens, tokens, leaf, leaf), rope=rope, backend=backend)
        key.backward(cotangent.to(dtype))
        return leaf.grad

    oracle = gradient("reference", torch.float64)
    undone = reference.unrotate(raw.float(), *rope.remove).transpose(1, 2).flatten(2).flatten(0, 1)
    rows = cotangent.transpose(1, 2).flatten(2).flatten(0, 1)
    once = (rows.float().T @ undone.bfloat16().float()).bfloat16().reshape(proj.shape)
    error, rounded = (
        ((found.double() - oracle) ** 2).mean().sqrt() for found in (gradient("cpu", torch.bfloat16), once)
    )
    assert error <= 1.25 * rounded


@pytest.mark.parametrize("width", [300, 1040])
def test_a_token_among_others_projects_the_same_from_pieces(width):
    raw, proj = torch.randn(1, 1, 140, width), torch.randn(3, 24, width)
    whole, _ = c2c.project_kv(c2c.SharerSegment(raw, raw, proj, proj), backend="cpu")
    part = raw[:, :, 20:51]
    alone, _ = c2c.project_kv(c2c.SharerSegment(part, part, proj, proj), backend="cpu")
    assert torch.equal(alone, whole[:, :, 20:51])
