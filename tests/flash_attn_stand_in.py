"""The two functions of flash-attn 2 that the backend calls, in float64, with the package's layouts and demands.

Read from flash_attn_interface.py and flash_api.cpp of version 2.8: (batch, tokens, heads, dim) in, out alike, lse
(batch, heads, q_len) float32; a row that sees nothing has out = 0 and lse = +inf; the causal mask is lower-right.
"""

from __future__ import annotations

import torch

calls: list[str] = []


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
    assert return_attn_probs and dropout_p == 0.0 and alibi_slopes is None
    calls.append("flash_attn_func")
    ends = torch.full((len(k),), k.shape[1])
    return *_attend(q, k, v, ends, softmax_scale, causal, window_size, softcap), torch.empty(0)


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, *, cache_seqlens, softmax_scale=None, causal=False,
                            window_size=(-1, -1), softcap=0.0, return_softmax_lse=False):  # fmt: skip
    assert return_softmax_lse and k is None and v is None
    assert cache_seqlens.dtype == torch.int32 and cache_seqlens.is_contiguous() and cache_seqlens.shape == (len(q),)
    assert (cache_seqlens >= 0).all() and (cache_seqlens <= k_cache.shape[1]).all()  # the kernel does not look
    calls.append("flash_attn_with_kvcache")
    return _attend(q, k_cache, v_cache, cache_seqlens, softmax_scale, causal, window_size, softcap)


def _attend(q, k, v, ends, scale, causal, window, softcap):
    batch, q_len, heads, dim = q.shape
    tokens, kv_heads = k.shape[1:3]
    assert k.shape == v.shape == (batch, tokens, kv_heads, dim) and heads % kv_heads == 0
    assert batch and q_len and tokens and dim <= 256
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    for tensor in (q, k, v):
        steps = [step for size, step in zip(tensor.shape[:3], tensor.stride(), strict=False) if size > 1]
        assert tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0
        assert dim % 8 or all(step % 8 == 0 for step in steps)  # other dims are copied by the package
    index = torch.arange(tokens)
    inside = (index < ends[:, None])[:, None, None]
    apart = index - torch.arange(q_len)[:, None] - (ends[:, None, None] - q_len)  # token minus query, lower-right
    seen = inside & torch.ones_like(apart, dtype=torch.bool)[:, None]
    if causal:
        seen = seen & (apart <= 0)[:, None]
    if window[0] >= 0:
        seen = seen & (apart >= -window[0])[:, None]
    assert window[1] < 0
    keys, values = (
        x.double().masked_fill(~inside[:, 0, 0, :, None, None], 0).repeat_interleave(heads // kv_heads, 2)
        for x in (k, v)
    )
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), keys) * scale
    scores = (softcap * torch.tanh(scores / softcap) if softcap else scores).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[..., None]).masked_fill(~seen.any(-1, keepdim=True), 0)
    out = torch.einsum("bhij,bjhd->bihd", weights, values)
    lost = ~seen.any(-1) | lse.isnan()
    return out.to(q.dtype), lse.masked_fill(lost, torch.inf).float()
