"""Random calls of `fuse_kv` on the simulated CUDA backend: at least 200, every option with every other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fuse_cases import build
from fused import Staged, Whole, check
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import seeds
from simulated import ARCHS, missing
from test_fuse_kv import plans, run

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@given(
    plans(), st.sampled_from((torch.bfloat16, torch.float16)), st.sampled_from(ARCHS), st.booleans(), st.booleans(),
    seeds,
)  # fmt: skip
@settings(max_examples=220)
def test_calls(plan, dtype, arch, aligned, staged, seed):
    """Not in place, then in place with the same bits and nothing else touched."""
    plan = dataclasses.replace(plan, weights=dtype, receiver=dtype, sharer=dtype)
    if aligned:
        plan = dataclasses.replace(
            plan, strided=False, key_dim=8, value_dim=16, sharer_key_dim=16, sharer_value_dim=8, hidden=40, inner=24
        )
    call = build(plan, seed)
    staged = staged and plan.key_dim % 2 == 0  # the check of races between programs sees words, not their halves
    wanted = check(call, Staged(arch) if staged else Whole(arch))
    sources = call.residual or (call.receiver_key, call.receiver_value)
    wholes = [torch.randn(plan.batch, plan.kv_heads + 1, plan.length + 4, x.shape[3]).to(dtype) for x in sources]
    for whole, source in zip(wholes, sources, strict=True):
        whole[:, :-1, 3:-1] = source
    before = [whole.clone() for whole in wholes]
    pair = (wholes[0][:, :-1, 3:-1], wholes[1][:, :-1, 3:-1])
    changed = {"residual": pair} if plan.residual else {"receiver_key": pair[0], "receiver_value": pair[1]}
    with Whole(arch).installed():
        run(dataclasses.replace(call, **changed), "cuda", pair)
    for slot, whole, old, result in zip(("key", "value"), wholes, before, wanted, strict=True):
        assert torch.equal(whole[:, :-1, 3:-1], result)
        if slot in plan.closed and not plan.gates:
            assert torch.equal(whole, old)
        whole[:, :-1, 3:-1] = old[:, :-1, 3:-1]
        assert torch.equal(whole, old)
