"""`merge_states` beside the same formula in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

import c2c_kernels as c2c
from c2c_kernels.backends import reference
from c2c_kernels.bench.check import disagreement
from c2c_kernels.bench.inputs import Device, Random, storage_bytes
from c2c_kernels.bench.shapes import Case
from c2c_kernels.bench.work import Cost, Work


def build(case: Case, device: Device = "cpu") -> Work:
    """The work of merging `states` attention results."""
    random, receiver = Random(case, device), case.receiver
    rows = (case.batch, receiver.q_heads, case.q_len)
    outs = [random(*rows, receiver.head_dim) for _ in range(case.states)]
    lses = [random(*rows).float() for _ in range(case.states)]

    def ours() -> tuple[Tensor, Tensor]:
        return c2c.merge_states(outs, lses)

    cost = Cost(storage_bytes(*outs, *lses, outs[0], lses[0]), 2 * case.states * outs[0].numel())
    return Work(
        ours=ours,
        problem=lambda: _problem(outs, lses, ours()),
        costs=[cost],
        touched=cost.bytes,
        alternatives={
            "torch": lambda: lambda: _with_torch(outs, lses),
            "reference": lambda: lambda: c2c.merge_states(outs, lses, backend="reference"),
        },
    )


def _with_torch(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(lses)
    lse = torch.logsumexp(stacked, dim=0)
    weights = torch.exp(stacked - lse).unsqueeze(-1)
    return (torch.stack(outs) * weights).sum(dim=0).to(outs[0].dtype), lse


def _problem(outs: list[Tensor], lses: list[Tensor], ours: tuple[Tensor, Tensor]) -> str:
    wanted = reference.merge_states([o.double() for o in outs], [lse.double() for lse in lses])
    for name, mine, theirs, oracle in zip(("out", "lse"), ours, _with_torch(outs, lses), wanted, strict=True):
        problem = disagreement(name, mine, theirs, oracle)
        if problem:
            return problem
    return ""
