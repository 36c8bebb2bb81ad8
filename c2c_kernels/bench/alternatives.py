"""PyTorch's attention over one cache, sharer tokens first: what merged attention stands beside."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from c2c_kernels.bench.check import ULPS
from c2c_kernels.bench.inputs import AttentionInputs, joined, joined_beforehand
from c2c_kernels.bench.work import Call, LeftOutError, first_line, in_turn

# The reference holds scores and caches several times in float32, and projects the segment in every call.
_REFERENCE_NUMBERS = 1 << 22
_REFERENCE_PRODUCTS = 1 << 29
_FLEX_TOLERANCE = 64 * ULPS  # of its error against SDPA, in ulp


def mask(inputs: AttentionInputs) -> Tensor | None:
    """(q_len, shared + own) additive: every sharer token, own ones up to the query; None where nothing is hidden."""
    q_len, own = inputs.query.shape[2], inputs.key.shape[2]
    shared = sum(segment.key.shape[2] for segment in inputs.segments)
    if q_len == 1:
        return None
    device = inputs.query.device
    hidden = torch.ones(q_len, own, dtype=torch.bool, device=device).triu(own - q_len + 1)
    zero = torch.zeros(q_len, shared + own, dtype=inputs.query.dtype, device=device)
    zero[:, shared:].masked_fill_(hidden, -torch.inf)
    return zero


def sdpa_options(inputs: AttentionInputs) -> dict[str, Any]:
    """Keyword arguments of scaled_dot_product_attention; is_causal where its upper-left alignment is ours."""
    if inputs.segment is None and inputs.query.shape[2] == inputs.key.shape[2]:
        return {"is_causal": inputs.query.shape[2] > 1, "enable_gqa": True}
    return {"attn_mask": mask(inputs), "enable_gqa": True}


def sdpa(inputs: AttentionInputs) -> Call:
    """scaled_dot_product_attention over the projected and concatenated cache, which is made beforehand."""
    key, value = joined_beforehand(inputs)
    options = sdpa_options(inputs)
    return lambda: F.scaled_dot_product_attention(inputs.query, key, value, **options)


def sdpa_raw(inputs: AttentionInputs) -> Call:
    """The same with projection and concatenation in the call."""
    options = sdpa_options(inputs)

    def run() -> Tensor:
        key, value = joined(inputs)
        return F.scaled_dot_product_attention(inputs.query, key, value, **options)

    return run


def reference(inputs: AttentionInputs) -> Call:
    """This package's specification; LeftOutError where it would take long."""
    batch, q_heads, q_len, head_dim = inputs.query.shape
    kv_heads = inputs.key.shape[1]
    products, tokens = 0, inputs.key.shape[2]
    for segment in inputs.segments:
        shared = segment.key.shape[2]
        tokens += shared
        if segment.key_proj is not None:
            products += batch * shared * kv_heads * head_dim * segment.key.shape[1] * segment.key.shape[3]
    numbers = batch * tokens * max(q_heads * q_len, kv_heads * head_dim)
    if numbers > _REFERENCE_NUMBERS or products > _REFERENCE_PRODUCTS:
        raise LeftOutError("small shapes only")
    return lambda: inputs.merged(backend="reference")


def flex(sets: Sequence[AttentionInputs], raw: bool) -> Call:
    """flex_attention, compiled here; LeftOutError with the reason where that fails.

    sets: alike in shape; compiled once, called in turn.
    raw: projection and concatenation are in the call, as in `sdpa_raw`.
    """
    own, q_len = sets[0].key.shape[2], sets[0].query.shape[2]
    shared = sum(segment.key.shape[2] for segment in sets[0].segments)

    def visible(batch: Tensor, head: Tensor, query: Tensor, token: Tensor) -> Tensor:
        return token - shared <= query + own - q_len

    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch.compiler.reset()  # the number of shapes that one function is compiled for is limited
        compiled = torch.compile(flex_attention, dynamic=False)
        block_mask = None
        if q_len > 1:
            block_mask = create_block_mask(visible, None, None, q_len, shared + own, device=sets[0].query.device)
        attend = partial(compiled, block_mask=block_mask, enable_gqa=True)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = attend(sets[0].query, *joined_beforehand(sets[0]))
    except Exception as error:  # a compiler's failures have many types
        raise LeftOutError(f"does not compile: {first_line(error)}") from error
    wanted = sdpa(sets[0])()
    allowed = _FLEX_TOLERANCE * torch.finfo(wanted.dtype).eps
    if (found.float() - wanted.float()).abs().max().item() > allowed:
        raise LeftOutError("its result differs from SDPA's")

    def joining(inputs: AttentionInputs) -> Tensor:
        return attend(inputs.query, *joined(inputs))

    return in_turn([partial(joining, i) if raw else partial(attend, i.query, *joined_beforehand(i)) for i in sets])
