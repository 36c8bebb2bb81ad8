"""`fuse_kv` on the simulated CUDA backend: calls, and launches stage by stage."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from error_rule import assert_as_exact
from fuse_cases import FusePlan, build, programs_of_stages
from simulated import DEVICE, Simulator
from test_fuse_kv import like, oracle_of, run, torchs

import c2c_kernels as c2c
from c2c_kernels.backends import cuda

BF16, F16 = torch.bfloat16, torch.float16


def plan(dtype: torch.dtype = BF16, **fields: Any) -> FusePlan:
    """All tensors of one dtype, as the kernels want them."""
    return FusePlan(dtype, dtype, dtype, **fields)


class Step(ctypes.Structure):
    """FuseStep of csrc/cuda/fuse.h."""

    _fields_ = [(name, ctypes.c_int32) for name in ("first", "kind", "block", "size", "width", "tiles", "wait")]


class Steps(ctypes.Structure):
    """What Fuse of csrc/cuda/fuse.h begins with."""

    _fields_ = [("count", ctypes.c_int32), ("step", Step * 32)]


def steps_of(launch: cuda.Launch) -> list[Step]:
    """The products of a launch of `c2c_fuse_*`."""
    found = Steps.from_buffer_copy(launch.params)
    return list(found.step[: found.count])


def stages(launch: cuda.Launch) -> list[int]:
    """How many programs each stage has."""
    steps = steps_of(launch)
    jobs = launch.grid // (steps[-1].first + steps[-1].tiles)
    return programs_of_stages(steps, jobs, launch.grid)


class Whole(Simulator):
    """Products of all stages in one launch. Programs wait for each other by counters, which the simulator's check of
    races between programs does not know of; all other checks are on."""

    def __init__(self, arch: int, **checks: Any) -> None:
        super().__init__(arch, global_race=False, **checks)


class Staged(Simulator):
    """A launch stage by stage: within a stage programs are independent, and the simulator sees that they are."""

    def __call__(self, launch: cuda.Launch) -> None:
        if DEVICE or launch.kernel.startswith("c2c_fuse_table"):
            super().__call__(launch)
            return
        for programs in stages(launch):
            super().__call__(launch._replace(grid=programs))


def check(call: c2c.FuseCall, simulator: Simulator) -> tuple[torch.Tensor, torch.Tensor]:
    """Both outs, in poisoned surroundings, against the reference."""
    out = like(call.receiver_key), like(call.receiver_value)
    with simulator.installed():
        ours = run(call, "cuda", out)
    exact, theirs = oracle_of(call), torchs(call, call.receiver_key)
    for slot, mine, torchs_own, oracle in zip(("key", "value"), ours, theirs, exact, strict=True):
        assert_as_exact(slot, mine, torchs_own, oracle)
    for mine, oracle in zip(ours, exact, strict=True):
        whole = mine._base
        assert whole is not None and whole.isnan().sum() == whole.numel() - oracle.numel() + oracle.isnan().sum()
    return ours


def built(seed: int, dtype: torch.dtype = BF16, **fields: Any) -> c2c.FuseCall:
    """A call of a plan."""
    return build(plan(dtype, **fields), seed)
