"""Bad input: an error that names the argument, what came and what is wanted, before anything is written."""

from __future__ import annotations

import pytest
import torch

import c2c_kernels as c2c

Q, K, V = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 24)
RAW = torch.randn(2, 3, 7, 8)
WK, WV = torch.randn(2, 16, 24), torch.randn(2, 24, 24)
NAN_GATE = torch.ones(1, 4, 7)
NAN_GATE[0, 2, 3] = torch.nan


def segment(**changes):
    return c2c.SharerSegment(**{"key": RAW, "value": RAW, "key_proj": WK, "value_proj": WV, **changes})


CALLS = {
    "query 3d": ((Q[0], K, V), {}, ValueError, r"query has shape \(4, 3, 16\), wanted \(batch, q_heads"),
    "query list": (([1], K, V), {}, TypeError, "query must be a tensor, got list"),
    "batch": ((Q[:1], K, V), {}, ValueError, r"key has shape .* batch 1"),
    "head_dim": ((Q[..., :8], K, V), {}, ValueError, "head_dim 8"),
    "heads": ((Q[:, :3], K, V), {}, ValueError, "query has 3 heads, wanted a positive multiple of the 2 heads of key"),
    "value len": ((Q, K, V[:, :, :4]), {}, ValueError, r"value has shape \(2, 2, 4, 24\)"),
    "dtype": ((Q, K.bfloat16(), V), {}, TypeError, "key has dtype torch.bfloat16, wanted torch.float32"),
    "integer query": ((Q.int(), K.int(), V.int()), {}, TypeError, "query has dtype torch.int32"),
    "device": ((Q, K.to("meta"), V), {}, ValueError, "key is on meta, wanted cpu"),
    "mask shape": ((Q, K, V), {"attn_mask": torch.ones(2, 1, 3, 4).bool()}, ValueError, "attn_mask has shape"),
    "mask dtype": ((Q, K, V), {"attn_mask": torch.ones(3, 5, dtype=torch.int32)}, TypeError, "attn_mask has dtype"),
    "positions dtype": ((Q, K, V), {"query_positions": torch.ones(3)}, TypeError, "query_positions has dtype"),
    "lengths shape": ((Q, K, V), {"lengths": torch.tensor([1])}, ValueError, r"lengths has shape \(1,\)"),
    "lengths value": ((Q, K, V), {"lengths": torch.tensor([1, 6])}, ValueError, "lengths has values outside"),
    "lengths negative": ((Q, K, V), {"lengths": torch.tensor([-1, 2])}, ValueError, "lengths has values outside"),
    "sinks": ((Q, K, V), {"sinks": torch.ones(2)}, ValueError, r"sinks has shape \(2,\), wanted \(q_heads,\) = \(4,\)"),
    "window": ((Q, K, V), {"window": 0}, ValueError, "window must be positive or None, got 0"),
    "softcap": ((Q, K, V), {"softcap": -1.0}, ValueError, "softcap must be positive or None"),
    "strategy": ((Q, K, V), {"strategy": "fast"}, ValueError, "strategy must be one of auto, absorb, materialize"),
    "backend": ((Q, K, V), {"backend": "gpu"}, ValueError, "backend must be one of .*cpu.*; got 'gpu'"),
    "backend unavailable": ((Q, K, V), {"backend": "cuda"}, ValueError, "cuda: "),
    "no segment": ((Q, K, V, [K]), {}, TypeError, r"segments\[0\] must be a SharerSegment, got Tensor"),
    "key type": ((Q, K, V, [segment(key="cache")]), {}, TypeError, r"segments\[0\].key must be a tensor, got str"),
    "segment batch": ((Q, K, V, [segment(key=RAW[:1], value=RAW[:1])]), {}, ValueError, "key has batch 1"),
    "segment len": ((Q, K, V, [segment(value=RAW[:, :, :6])]), {}, ValueError, r"segments\[0\].value has shape"),
    "no projector": ((Q, K, V, [segment(key_proj=None)]), {}, ValueError, "wanted the receiver's 2 heads x 16"),
    "projector width": ((Q, K, V, [segment(key_proj=WK[..., :23])]), {}, ValueError, "key_proj has shape"),
    "projector rank": (
        (Q, K, V, [segment(key_proj=(torch.randn(2, 16, 5), torch.randn(4, 24)))]), {}, ValueError,
        r"segments\[0\].key_proj\[0\] has shape \(2, 16, 5\)",
    ),
    "projector pair": ((Q, K, V, [segment(key_proj=[WK])]), {}, TypeError, r"segments\[0\].key_proj must be a tensor"),
    "bias": ((Q, K, V, [segment(key_bias=torch.ones(2, 15))]), {}, ValueError, r"segments\[0\].key_bias has shape"),
    "gate shape": ((Q, K, V, [segment(gate=torch.ones(3, 7))]), {}, ValueError, r"segments\[0\].gate has shape"),
    "gate negative": ((Q, K, V, [segment(gate=torch.tensor([-0.5]))]), {}, ValueError, r"segments\[0\].gate must be"),
    "gate nan": ((Q, K, V, [segment(), segment(gate=NAN_GATE)]), {}, ValueError, r"segments\[1\].gate must be"),
    "gate inf": ((Q, K, V, [segment(gate=torch.tensor([torch.inf]))]), {}, ValueError, r"segments\[0\].gate must be"),
    "segment lengths": ((Q, K, V, [segment(lengths=torch.tensor([8, 0]))]), {}, ValueError, "lengths has values"),
    "positions": ((Q, K, V, [segment(positions=torch.arange(6))]), {}, ValueError, "positions has shape"),
    "visibility": ((Q, K, V, [segment(visibility="none")]), {}, ValueError, 'visibility must be "all" or "causal"'),
    "causal": ((Q, K, V, [segment(visibility="causal")]), {}, ValueError, r"segments\[0\].positions is needed"),
    "index": ((Q, K, V, [segment(index=torch.tensor([0, 7]))]), {}, ValueError, "index has values outside"),
    "index float": ((Q, K, V, [segment(index=torch.ones(2))]), {}, TypeError, r"segments\[0\].index has dtype"),
    "quantised": ((Q, K, V, [segment(key=RAW.to(torch.int8))]), {}, ValueError, "key_scale is needed"),
    "segment device": ((Q, K, V, [segment(gate=torch.ones(1, device="meta"))]), {}, ValueError, "gate is on meta"),
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_merged_attention(name, backend):
    arguments, options, error, message = CALLS[name]
    if "backend" not in options:
        options = {**options, "backend": backend}
    with pytest.raises(error, match=message):
        c2c.merged_attention(*arguments, **options)


COS = torch.ones(1, 7, 8)
PROJECTIONS = {
    "rope type": ({"rope": COS}, TypeError, "rope must be a Rope or None, got Tensor"),
    "rope pair": ({"rope": c2c.Rope(remove=COS)}, TypeError, r"rope.remove must be a pair \(cos, sin\)"),
    "rope length": ({"rope": c2c.Rope(apply=(COS[:, :6], COS[:, :6]))}, ValueError, "rope.apply cos has shape"),
    "rope dim": ({"rope": c2c.Rope(remove=(COS[..., :7], COS[..., :7]))}, ValueError, "rotary_dim 7, wanted even"),
    "rope sin": ({"rope": c2c.Rope(remove=(COS, COS[..., :6]))}, ValueError, "cos and sin differ in shape"),
    "out type": ({"out": torch.ones(2)}, TypeError, "out must be a pair"),
    "out shape": ({"out": (torch.ones(2, 2, 7, 15), torch.ones(2, 2, 7, 24))}, ValueError, "out key has shape"),
    "out dtype": (
        {"out": (torch.ones(2, 2, 7, 16, dtype=torch.int32), torch.ones(2, 2, 7, 24))}, TypeError, "out key has dtype",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_project_kv(name, backend):
    options, error, message = PROJECTIONS[name]
    with pytest.raises(error, match=message):
        c2c.project_kv(segment(), **options, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_is_written_when_refused(backend):
    out = torch.full((2, 2, 7, 16), 3.0), torch.full((2, 2, 7, 24), 3.0)
    with pytest.raises(ValueError, match="lengths has values outside"):
        c2c.project_kv(segment(lengths=torch.tensor([3, 9])), out=out, backend=backend)
    assert (out[0] == 3).all() and (out[1] == 3).all()


@pytest.mark.parametrize("backend", [None])
def test_out_has_no_gradient(backend):
    out = torch.empty(2, 2, 7, 16), torch.empty(2, 2, 7, 24)
    with pytest.raises(ValueError, match="requires grad"):
        c2c.project_kv(segment(key_proj=WK.clone().requires_grad_()), out=out, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_merge_states(backend):
    out, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    for outs, lses, error, message in (
        ([], [], ValueError, "equally many, at least one; got 0 and 0"),
        ([out], [lse, lse], ValueError, "got 1 and 2"),
        ([out, out[..., :3]], [lse, lse], ValueError, r"outs\[1\] has shape"),
        ([out], [lse[..., :2]], ValueError, r"lses\[0\] has shape"),
        ([out, out.half()], [lse, lse], TypeError, r"outs\[1\] has dtype"),
    ):
        with pytest.raises(error, match=message):
            c2c.merge_states(outs, lses, backend=backend)


@pytest.mark.parametrize("backend", ["cpu"])
def test_mask_gradient_goes_to_the_reference(backend):
    mask = torch.zeros(3, 5, requires_grad=True)
    c2c.merged_attention(Q, K, V, attn_mask=mask).sum().backward()
    assert mask.grad.isfinite().all() and mask.grad.any()
    with pytest.raises(ValueError, match="has no gradient for attn_mask"):
        c2c.merged_attention(Q, K, V, attn_mask=mask, backend=backend)
