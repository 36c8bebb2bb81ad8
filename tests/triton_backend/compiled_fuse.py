"""The compiled PTX of `fuse_kernel` for sm_80 and sm_90 in ptxsim: results, races, bounds, waits, launch counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from error_rule import assert_as_exact
from fuse_cases import FusePlan, build, programs_of_stages
from gpu_simulator import Ran, Simulator, simulator
from test_fuse_kv import like, oracle_of, run, torchs

import c2c_kernels as c2c
from c2c_kernels.backends.triton import fuse_kv_layers
from c2c_kernels.backends.triton.launch import Launch, Target, executed_by
from c2c_kernels.backends.triton.offline import compiled

simulated_only = pytest.mark.skipif(simulator() is None, reason="shared/ptxsim is not in or beside the checkout")

HALF, SINGLE, FLOAT16 = torch.bfloat16, torch.float32, torch.float16


def stages(launch: Launch) -> list[int]:
    """How many programs each stage has."""
    return programs_of_stages(launch.arguments["steps"], launch.arguments["jobs"], launch.grid)


class Staged(Simulator):
    """Runs a launch stage by stage: within a stage programs are independent, and the simulator sees that they are.

    Between stages programs wait for each other by the job's counter, which the simulator's check does not know of.
    """

    def __call__(self, launch: Launch) -> None:
        built = compiled(launch, self.target)
        module = self.ptxsim.Module.from_triton(built.kernel)
        for programs in stages(launch):
            result = module.launch_triton((programs,), built.arguments, ranges=launch.reached, **self.checks)
            self.ran.append(Ran(dataclasses.replace(launch, grid=programs), built, result))


PLANS = {
    # Every tile whole, all dtypes alike: loads straight to shared memory.
    "whole": FusePlan(
        HALF, HALF, HALF, batch=2, kv_heads=2, key_dim=64, value_dim=64, length=35, sharer_heads=1, sharer_key_dim=64,
        sharer_value_dim=64, hidden=128, inner=128, strided=False,
    ),
    # Rows of 16 numbers, tiles that are not whole, head dims other than the tile's.
    "aligned": FusePlan(
        FLOAT16, FLOAT16, FLOAT16, batch=1, kv_heads=3, key_dim=32, value_dim=32, length=9, sharer_heads=2,
        sharer_key_dim=16, sharer_value_dim=16, hidden=80, inner=144, blocks=2, index=True,
    ),
    "odd": FusePlan(HALF, HALF, HALF, hidden=37, inner=21, length=7, index=True, residual=True, gates=True),
    "float32": FusePlan(
        batch=1, key_dim=32, value_dim=32, kv_heads=1, sharer_heads=1, sharer_key_dim=16, sharer_value_dim=16,
        hidden=64, inner=64, length=70, closed=("value",), residual=True,
    ),
    "narrow weights": FusePlan(
        HALF, SINGLE, FLOAT16, batch=1, kv_heads=2, key_dim=32, value_dim=32, length=9, sharer_heads=1,
        sharer_key_dim=64, sharer_value_dim=64, hidden=96, inner=80, gates=True,
    ),
}  # fmt: skip


@simulated_only
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", PLANS)
def test_results_and_races(name, arch):
    call = build(PLANS[name], 5)
    out = like(call.receiver_key), like(call.receiver_value)
    with Staged(arch).installed() as simulated:
        ours = run(call, "triton", out)
    counts = [ran.launch.grid for ran in simulated.ran]
    assert len(counts) % (6 + 2 * (PLANS[name].blocks - 1)) == 0
    for slot, mine, theirs, oracle in zip(
        ("key", "value"), ours, torchs(call, call.receiver_key), oracle_of(call), strict=True
    ):
        assert_as_exact(slot, mine, theirs.to(mine.dtype), oracle)
    if arch == 90 and name == "whole":
        assert "wgmma" in simulated.ran[0].built.kernel.asm["ptx"]


@simulated_only
@pytest.mark.parametrize("arch", [80, 90])
def test_layers_in_one_launch(arch):
    """In place, one half closed; what is waited for is waited for."""
    calls = [build(PLANS["whole"], seed) for seed in (5, 6)]
    calls[1].weights.value.gate_logit.fill_(-1)
    wanted = [oracle_of(call) for call in calls]
    before = calls[1].receiver_value.clone()
    calls = [dataclasses.replace(call, out=(call.receiver_key, call.receiver_value)) for call in calls]
    theirs = [torchs(call, call.receiver_key) for call in calls]
    with Simulator(arch, global_race=False).installed() as simulated:
        made = c2c.fuse_layers(calls, backend="triton")
    assert simulated.names() == ["fuse_kernel"]
    for ours, other, exact in zip(made, theirs, wanted, strict=True):
        for slot, mine, torchs_own, oracle in zip(("key", "value"), ours, other, exact, strict=True):
            assert_as_exact(slot, mine, torchs_own, oracle)
    assert torch.equal(made[1][1], before)


@simulated_only
def test_programs_wait_for_the_stage_before():
    """Without the programs of the first stage those of the second wait for ever: the simulator says so."""
    call = build(PLANS["whole"], 5)

    class Missing(Simulator):
        def __call__(self, launch: Launch) -> None:
            first, second, *_ = stages(launch)
            built = compiled(launch, self.target)
            launch.arguments["buffers"].counters[0] = first
            self.ptxsim.Module.from_triton(built.kernel).launch_triton(
                (second,), built.arguments, ranges=launch.reached, timeout=2, **self.checks
            )

    missing = Missing(90, global_race=False)
    with pytest.raises(missing.ptxsim.PtxError, match="deadlock|timeout"), missing.installed():
        run(call, "triton")


def test_launches_of_a_model():
    """All layers of a model in one launch; keys and values that differ in shape in one each."""
    call = build(FusePlan(HALF, HALF, HALF, key_dim=8, value_dim=8, sharer_value_dim=4), 1)
    other = build(FusePlan(HALF, HALF, HALF), 1)

    def names(calls) -> list[str]:
        launches: list[Launch] = []
        with executed_by(Target("cuda", 90), launches.append):
            fuse_kv_layers("triton", [
                (each.receiver_key, each.receiver_value, each.sharer_key, each.sharer_value, each.weights, each.index,
                 each.residual, each.gates, like(each.receiver_key), like(each.receiver_value)) for each in calls
            ])  # fmt: skip
        return [launch.kernel.__name__ for launch in launches]

    assert names([call] * 28) == ["fuse_kernel"]
    assert names([other] * 28) == ["fuse_kernel"] * 2
    assert names([call]) == ["fuse_kernel"]
