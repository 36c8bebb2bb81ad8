"""`merge_states`: attention results over disjoint sets of tokens, merged exactly by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import choose, kernels, reference
from ._checks import check_merge_states
from ._library import LIBRARY, implement, needs_dispatcher

LIBRARY.define(
    "merge_states(Tensor[] outs, Tensor[] lses, str backend) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def merge_states(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """out = sum_s exp(lse_s - lse) out_s with lse = ln sum_s exp(lse_s).

    Args:
        outs: at least one, each (batch, q_heads, q_len, head_dim), one dtype: attention results.
        lses: as many, each (batch, q_heads, q_len): their log-sum-exp, natural logarithm. A state with lse = -inf
            is neutral and its out is not read.
        backend: name of a backend, None for the fastest that can run the call.

    Returns:
        out like outs[0] and lse (batch, q_heads, q_len) float32 (float64 where outs are); 0 and -inf where every
        state is empty.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is wanted.

    Source: FlashInfer (arXiv 2501.01005), section on composable attention states.
    """
    outs, lses = list(outs), list(lses)
    check_merge_states(outs, lses)
    record = choose("merge_states", backend, outs[0].device, outs[0].dtype, "", (outs[0], len(outs)))
    if record.name == "reference":
        out, lse = reference.merge_states(outs, lses)
        return out.to(outs[0].dtype), lse
    if needs_dispatcher((*outs, *lses)):
        return torch.ops.c2c.merge_states(outs, lses, record.name)
    return kernels(record.name).merge_states(record.name, outs, lses)


def _forward(outs, lses, backend):
    return kernels(backend).merge_states(backend, outs, lses)


def _fake(outs, lses, backend):
    return outs[0].new_empty(outs[0].shape), outs[0].new_empty(outs[0].shape[:3], dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    outs, lses, _ = inputs
    ctx.save_for_backward(*outs, *lses, output[1])
    ctx.count = len(outs)


def _autograd_backward(ctx, grad_out, grad_lse):
    count = ctx.count
    outs, lses = ctx.saved_tensors[:count], ctx.saved_tensors[count : 2 * count]
    lse = ctx.saved_tensors[2 * count]
    grad_out = grad_out.float()
    empties = [state_lse == -torch.inf for state_lse in lses]
    weights = [torch.exp(x.float() - lse).masked_fill(empty, 0) for x, empty in zip(lses, empties, strict=True)]
    # out . grad_out from the states: out itself has been rounded.
    along = [(grad_out * x.float()).sum(-1).masked_fill(empty, 0) for x, empty in zip(outs, empties, strict=True)]
    inner = sum(weight * part for weight, part in zip(weights, along, strict=True))
    grad_outs = [(weight.unsqueeze(-1) * grad_out).to(state.dtype) for weight, state in zip(weights, outs, strict=True)]
    grad_lses = [
        (weight * (part - inner + grad_lse)).to(state_lse.dtype)
        for weight, part, state_lse in zip(weights, along, lses, strict=True)
    ]
    return grad_outs, grad_lses, None


implement("merge_states", _forward)
torch.library.register_fake("c2c::merge_states", _fake, lib=LIBRARY)
torch.library.register_autograd("c2c::merge_states", _autograd_backward, setup_context=_setup_context, lib=LIBRARY)
