"""Defects found by review: each of these was wrong once."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Plan, SegmentPlan, build, reference_call
from error_rule import assert_as_exact
from test_merged_attention import check, run
from torch.autograd import forward_ad

import c2c_kernels as c2c


@pytest.mark.sanitize
@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize(("heads", "dim"), [(4, 8), (4, 24), (4, 40), (10, 3), (8, 4), (5, 20), (1, 7)])
@pytest.mark.parametrize("strategy", ["absorb", "materialize"])
def test_sharer_heads_that_are_no_whole_vectors(heads, dim, q_len, strategy):
    segment = SegmentPlan(70, heads, dim, dim, "dense", bias=True)
    check(Plan(torch.float32, 2, 2, 1, q_len, 9, 20, 12, strategy=strategy, segments=[segment]), 1)


def test_a_nan_query_stays_in_its_row():
    proj, raw, key = torch.randn(1, 16, 160), torch.randn(1, 4, 20, 40), torch.randn(1, 1, 5, 16)
    query = torch.randn(1, 3, 1, 16)
    query[:, 1] = torch.nan
    segments = [c2c.SharerSegment(raw, raw, proj, proj)]
    for _ in range(2):
        out = c2c.merged_attention(query, key, key, segments, strategy="absorb", backend="cpu")
        assert out.isnan().flatten(2).all(-1).tolist() == [[False, True, False]]
    assert c2c.merged_attention(query[:, :1], key, key, segments, strategy="absorb", backend="cpu").isfinite().all()


@pytest.mark.parametrize("gates", [[0.0, 1.0], [0.0], [1e-40, 1.0], [3e38, 1.0]])
def test_gradients_where_a_gate_meets_a_large_score(gates):
    own, raw = torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 2, 16)
    raw[0, 0, 0] = 30
    values = torch.randn(1, 1, 3, 16), torch.randn(1, 1, 2, 16)

    def gradient(backend, dtype, gate_grad):
        query = torch.ones(1, 1, 1, 16, dtype=dtype, requires_grad=True)
        gate = torch.tensor(gates, dtype=dtype, requires_grad=gate_grad)
        segment = c2c.SharerSegment(raw.to(dtype), values[1].to(dtype), gate=gate)
        out = c2c.merged_attention(query, own.to(dtype), values[0].to(dtype), [segment], backend=backend)
        out.square().sum().backward()
        return query.grad.double()

    for gate_grad in (False, True):
        exact = gradient("reference", torch.float64, gate_grad)
        torch.testing.assert_close(gradient("cpu", torch.float32, gate_grad), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offset", [3_000_000_000, -3_000_000_000, 2**40])
@pytest.mark.parametrize("q_len", [1, 30])
def test_positions_beyond_32_bits(offset, q_len):
    plan = Plan(torch.float32, 1, 2, 1, q_len, 7, 16, 16, segment_window=4, query_positions=True)
    plan.segments = [SegmentPlan(20, positions="shared", visibility="causal")]
    call = build(plan, 2)
    near = run(call)
    call["query_positions"] = call["query_positions"] + offset
    fields = vars(call["segments"][0])
    call["segments"] = [c2c.SharerSegment(**{**fields, "positions": fields["positions"] + offset})]
    for far, close in zip(run(call), near, strict=True):
        assert torch.equal(far, close)


def test_windows_cut_sorted_positions_beyond_the_first_blocks():
    part = SegmentPlan(900, 2, 16, 16, "dense", positions="shared", visibility="causal")
    plan = Plan(torch.float32, 1, 2, 2, 40, 300, 32, 32, is_causal=True, window=150, query_positions=True)
    plan.segments = [part]
    call = build(plan, 3)
    call["query_positions"] = torch.arange(640, 680)
    call["segments"] = [c2c.SharerSegment(**{**vars(call["segments"][0]), "positions": torch.arange(900)})]
    for rows in (slice(None), slice(0, 1)):
        some = {**call, "query": call["query"][:, :, rows], "query_positions": call["query_positions"][rows]}
        oracle, theirs = reference_call(some, torch.float64), reference_call(some, torch.float32)
        for name, mine, torchs, exact in zip(("out", "lse", "mass"), run(some), theirs, oracle, strict=True):
            assert_as_exact(name, mine, torchs, exact)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_projector_of_rank_0_is_refused(backend):
    pair = (torch.empty(4, 40, 0), torch.empty(0, 32))
    raw = torch.randn(2, 2, 9, 16)
    with pytest.raises(ValueError, match="rank 0"):
        c2c.project_kv(c2c.SharerSegment(raw, raw, pair, pair), backend=backend)


def test_autograd_notices_that_out_was_overwritten():
    raw, weight = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 16, requires_grad=True)
    out = torch.empty(1, 1, 4, 16), torch.empty(1, 1, 4, 16)
    c2c.project_kv(c2c.SharerSegment(raw, raw), out=out)
    loss = (weight * out[0]).sum()
    c2c.project_kv(c2c.SharerSegment(raw * 5, raw), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        c2c.project_kv(c2c.SharerSegment(raw, raw), out=(torch.empty(1, 1, 4, 16), torch.empty(1, 1, 4, 16)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_out_that_shares_memory_is_refused(backend):
    raw, proj = torch.randn(1, 2, 9, 16), torch.randn(2, 16, 32)
    segment, other = c2c.SharerSegment(raw, raw.clone(), proj, proj), torch.empty(1, 2, 9, 16)
    for out, message in (
        ((raw, other), "out key shares memory with the segment"),
        ((other, other), "same memory"),
        ((torch.empty(1, 1, 9, 16).expand(1, 2, 9, 16), other), "stride 0"),
    ):
        with pytest.raises(ValueError, match=message):
            c2c.project_kv(segment, out=out, backend=backend)


@pytest.mark.parametrize("backend", ["cpu"])
def test_derivatives_that_do_not_exist_raise(backend):
    query, key = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(1, 2, 5, 8)
    (gradient,) = torch.autograd.grad(
        c2c.merged_attention(query, key, key, backend=backend).sum(), query, create_graph=True
    )
    with pytest.raises(RuntimeError, match="backend='reference'"):
        gradient.sum().backward()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query.detach(), torch.ones_like(query))
        with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            c2c.merged_attention(dual, key, key, backend=backend)
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jvp(
            lambda q: c2c.merged_attention(q, key, key, backend=backend), (query.detach(),), (query.detach(),)
        )
    cos = torch.rand(1, 5, 8, requires_grad=True)
    with pytest.raises(ValueError, match="has no gradient for rope tables"):
        c2c.project_kv(c2c.SharerSegment(key, key), rope=c2c.Rope(apply=(cos, cos)), backend=backend)


def test_sink_gradient_of_rows_that_see_nothing():
    query, key = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(1, 2, 5, 8)
    sinks = torch.tensor([-torch.inf, 0.0], requires_grad=True)
    c2c.merged_attention(query, key, key, sinks=sinks, lengths=torch.tensor([0]), backend="cpu").sum().backward()
    assert not sinks.grad.any()


def test_absorbing_a_quantised_segment_rounds_nothing_else():
    proj = (torch.randn(2, 16, 24) / 5).bfloat16()
    raw = torch.randint(-127, 128, (1, 3, 20, 8), dtype=torch.int8)
    scale = torch.rand(1, 3, 20) / 100
    segment = c2c.SharerSegment(
        raw, raw, proj, proj, key_scale=scale, value_scale=scale, index=torch.arange(20).flip(0)
    )
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 5, 16)
    absorbed = c2c.merged_attention(query, key, key, [segment], strategy="absorb")
    torch.testing.assert_close(absorbed, c2c.merged_attention(query, key, key, [segment], strategy="materialize"))


def test_negated_views_keep_their_sign():
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    assert torch.equal(c2c.merged_attention(torch._neg_view(query), key, key), c2c.merged_attention(-query, key, key))


def test_a_masked_key_may_be_nan():
    query, key, value = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    mask = torch.tensor([True, True, False, True, True])
    poisoned = key.clone()
    poisoned[:, :, 2] = torch.nan
    for rows in (query, torch.randn(1, 2, 40, 8)):
        clean = c2c.merged_attention(rows, key, value, attn_mask=mask)
        assert torch.equal(c2c.merged_attention(rows, poisoned, value, attn_mask=mask), clean)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("q_len", [5, 40])
@pytest.mark.parametrize("strategy", ["absorb", "materialize"])
@pytest.mark.parametrize("which", ["own_key", "own_value", "raw_key", "raw_value"])
def test_tokens_that_are_not_finite_and_hidden(which, bad, q_len, strategy):
    """What the docstring of merged_attention says, of a token that the first half of the rows does not see."""
    length, token = q_len + 90, 90 + q_len // 2
    query, proj = torch.randn(2, 4, q_len, 16), torch.randn(2, 16, 24)
    tensors = {name: torch.randn(2, 2, length, 16) for name in ("own_key", "own_value")}
    tensors |= {name: torch.randn(2, 1, length, 24) for name in ("raw_key", "raw_value")}

    def attend():
        raw = tensors["raw_key"], tensors["raw_value"]
        segment = c2c.SharerSegment(*raw, proj, proj, positions=torch.arange(length), visibility="causal")
        own = tensors["own_key"], tensors["own_value"]
        return c2c.merged_attention(query, *own, [segment], is_causal=True, strategy=strategy, backend="cpu")

    clean = attend()
    tensors[which][0, 0, token] = bad
    out = attend()
    heads = 2 if which.startswith("own") else 4  # that read it
    assert torch.equal(out[1], clean[1])
    assert torch.equal(out[0, heads:], clean[0, heads:])
    sees = torch.arange(90, length) >= token
    hidden, kept = out[0, :heads, ~sees], clean[0, :heads, ~sees]
    if which.endswith("key"):
        assert torch.equal(hidden, kept)
    else:
        assert torch.equal(torch.where(hidden.isnan(), kept, hidden), kept)
        assert not out[0, :heads, sees].isfinite().all(-1).any()


def test_gradients_do_not_depend_on_padding():
    query, cache = torch.randn(1, 2, 4, 16), torch.randn(1, 1, 3600, 16)

    def gradient(length):
        leaf = query.clone().requires_grad_()
        part = cache[:, :, :length]
        c2c.merged_attention(leaf, part, part, lengths=torch.tensor([600]), backend="cpu").square().sum().backward()
        return leaf.grad

    assert torch.equal(gradient(600), gradient(3600))


WRONG_KINDS = [
    ({"lengths": [3]}, TypeError, "lengths must be a tensor, got list"),
    ({"attn_mask": [True]}, TypeError, "attn_mask must be a tensor, got list"),
    ({"sinks": [1.0]}, TypeError, "sinks must be a tensor, got list"),
    ({"query_positions": [1]}, TypeError, "query_positions must be a tensor, got list"),
    ({"window": 2.5}, TypeError, "window must be an integer"),
    ({"window": 2**63}, ValueError, "window must be positive"),
    ({"softcap": "x"}, TypeError, "softcap must be a number"),
    ({"softcap": 1e-50}, ValueError, "softcap must be positive"),
    ({"softcap": float("inf")}, ValueError, "softcap must be positive"),
    ({"scale": "3"}, TypeError, "scale must be a number"),
    ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ({"is_causal": None}, TypeError, "is_causal must be a bool"),
    ({"segments": None}, TypeError, "segments must be a list or tuple"),
    ({"attn_mask": torch.ones(5).to(torch.float8_e5m2)}, TypeError, "attn_mask has dtype torch.float8_e5m2"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), WRONG_KINDS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_arguments_of_the_wrong_kind(options, error, message, backend):
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(error, match=message):
        c2c.merged_attention(query, key, key, **options, backend=backend)


@pytest.mark.parametrize("backend", ["cpu"])
def test_messages_name_the_segment(backend):
    query, key, proj = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(2, 8, 16)
    good = c2c.SharerSegment(key, key)
    for strategy in ("absorb", "materialize"):
        for fields, name in (({"lengths": torch.tensor([9])}, "lengths"), ({"index": torch.tensor([5])}, "index")):
            bad = c2c.SharerSegment(key, key, proj, proj, **fields)
            with pytest.raises(ValueError, match=rf"segments\[1\].{name} has values outside"):
                c2c.merged_attention(query, key, key, [good, bad], strategy=strategy, backend=backend)


@pytest.mark.parametrize("queries", [1, 8])
def test_scores_of_a_wide_sharer_are_not_one_chain_of_sums(queries):
    """16 rows and more over eight sharer heads of 128: log-sum-exp was off by 1e-5, out by four times SDPA's error."""
    torch.manual_seed(1)
    query, key, value = 4 * torch.randn(1, 16, queries, 128), torch.randn(1, 8, 8, 128), torch.randn(1, 8, 8, 128)
    tokens = [torch.randn(1, 8, 1024, 128) for _ in range(2)]
    projectors = [torch.randn(8, 128, 1024) / 32 for _ in range(2)]

    def attend(dtype, **call):
        segment = c2c.SharerSegment(*(t.to(dtype) for t in (*tokens, *projectors)))
        own = [t.to(dtype) for t in (query, key, value)]
        return c2c.merged_attention(*own, [segment], strategy="absorb", return_lse=True, **call)

    flat = [t.transpose(1, 2).reshape(1024, 1024) for t in tokens]
    projected = [torch.einsum("nw,hdw->hnd", t, w)[None] for t, w in zip(flat, projectors, strict=True)]
    caches = [torch.cat([shared, own], 2) for shared, own in zip(projected, (key, value), strict=True)]
    torchs = torch.nn.functional.scaled_dot_product_attention(query, *caches, enable_gqa=True)
    scores = query @ caches[0].repeat_interleave(2, 1).transpose(2, 3) * 128**-0.5
    out, lse = attend(torch.float32, backend="cpu")
    exact_out, exact_lse = attend(torch.float64, backend="reference")
    assert_as_exact("out", out, torchs, exact_out)
    assert_as_exact("lse", lse, scores.logsumexp(3), exact_lse)
