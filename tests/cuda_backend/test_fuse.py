"""`fuse_kv` on the CUDA backend: PTX for sm_80 and sm_90 run by ptxsim, through the operator."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from error_rule import assert_as_exact
from fuse_cases import FusePlan, build
from fused import BF16, F16, Staged, Steps, Whole, built, check, plan
from gpu_simulator import simulator
from simulated import ARCHS, DEVICE, Simulator, missing
from test_fuse_kv import check_gradients, like, oracle_of, run, torchs

import c2c_kernels as c2c
from c2c_kernels.backends import cuda

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Workspaces are full of NaN before kernels write to them."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


WHOLE = plan(
    batch=2, kv_heads=2, key_dim=64, value_dim=64, length=35, sharer_heads=1, sharer_key_dim=64, sharer_value_dim=64,
    hidden=128, inner=128, strided=False,
)  # fmt: skip
PLANS = {
    "whole": WHOLE,
    "few tokens": dataclasses.replace(WHOLE, length=5),
    "one token": dataclasses.replace(WHOLE, batch=1, length=1),
    "aligned": plan(
        F16, batch=1, kv_heads=3, key_dim=32, value_dim=32, length=20, sharer_heads=2, sharer_key_dim=16,
        sharer_value_dim=16, hidden=80, inner=144, blocks=2, index=True,
    ),
    "odd": plan(hidden=37, inner=21, length=7, index=True, residual=True, gates=True),
    "many heads": plan(F16, kv_heads=11, key_dim=8, value_dim=8, hidden=520, inner=8, length=2, closed=("value",)),
    "many blocks": plan(batch=1, blocks=4, hidden=40, inner=24, length=65),
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", PLANS)
def test_results_and_races(name, arch):
    simulated = Staged(arch)
    check(build(PLANS[name], 5), simulated)
    if not DEVICE:
        assert len(simulated.ran) % (7 + 2 * (PLANS[name].blocks - 1)) == 0  # the table and every stage


def products(simulated: Simulator) -> list[str]:
    """The kernels launched, without those that fill tables."""
    return [name for name in simulated.names() if not name.startswith("c2c_fuse_table")]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("fields", "kernel"),
    [
        ({"length": 3, "hidden": 64}, "c2c_fuse_bf16_16x32"),
        ({"length": 9, "hidden": 128}, "c2c_fuse_bf16_16x128"),
        ({"length": 21, "hidden": 128}, "c2c_fuse_bf16_64x128"),
        ({"length": 21, "hidden": 264}, "c2c_fuse_bf16_64x256"),
        ({"length": 21, "hidden": 520}, "c2c_fuse_bf16_64x512"),
    ],
)
def test_layers_of_a_model(fields, kernel, arch):
    """In place and in one launch, all but a few halves closed; every tile gives the bits that one layer gives alone."""
    calls = [build(plan(batch=1, key_dim=8, value_dim=8, sharer_value_dim=4, **fields), seed) for seed in (5, 6)]
    calls[1].weights.value.gate_logit.fill_(-1)
    closed = built(7, batch=1, key_dim=8, value_dim=8, sharer_value_dim=4, closed=("key", "value"), **fields)
    wanted = [run(call, "reference") for call in calls]
    with Whole(arch).installed():
        alone = [run(call, "cuda") for call in calls]
    exact, theirs = [oracle_of(call) for call in calls], [torchs(call, call.receiver_key) for call in calls]
    count = 48 if fields["length"] > 16 else 2
    layers = [*calls, *(_copied(closed) for _ in range(count - 2))]
    layers = [dataclasses.replace(call, out=(call.receiver_key, call.receiver_value)) for call in layers]
    with Whole(arch).installed() as simulated:
        made = c2c.fuse_layers(layers, backend="cuda")
    assert products(simulated) == [kernel]
    for ours, one, others, oracle in zip(made, alone, theirs, exact, strict=False):
        for slot, mine, single, torchs_own, exactly in zip(("key", "value"), ours, one, others, oracle, strict=True):
            assert_as_exact(slot, mine, torchs_own, exactly)
            assert torch.equal(mine, single)
    assert torch.equal(made[1][1], wanted[1][1])
    for ours in made[2:]:
        assert torch.equal(ours[0], closed.receiver_key) and torch.equal(ours[1], closed.receiver_value)


def _copied(call: c2c.FuseCall) -> c2c.FuseCall:
    """With caches of its own."""
    return dataclasses.replace(call, receiver_key=call.receiver_key.clone(), receiver_value=call.receiver_value.clone())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_token_does_not_depend_on_its_batch_or_length(dtype):
    """Nor on the tile, which the number of tokens decides."""
    call = built(5, dtype, batch=2, length=66, hidden=72, strided=False)
    caches = call.receiver_key, call.receiver_value, call.sharer_key, call.sharer_value
    with Whole(80).installed() as simulated:
        whole = run(call, "cuda")
        for row, start, stop in ((0, 0, 66), (1, 63, 66), (0, 5, 15)):
            part = c2c.FuseCall(*(cache[row : row + 1, :, start:stop] for cache in caches), call.weights)
            for alone, together in zip(run(part, "cuda"), whole, strict=True):
                assert torch.equal(alone, together[row : row + 1, :, start:stop])
    shapes = {name.rpartition("_")[2] for name in products(simulated)}
    assert shapes == {"64x128", "16x128", "16x32"}


@pytest.mark.parametrize("residual", [False, True])
def test_a_closed_half_is_left_as_it_is_whatever_it_holds(residual):
    call = built(3, closed=("key", "value"), residual=residual)
    sources = call.residual or (call.receiver_key, call.receiver_value)
    for tensor in (call.sharer_key, call.sharer_value, *sources):
        tensor[:, :, 1], tensor[:, :, 2], tensor[:, :, 3] = torch.nan, torch.inf, -0.0
    with Whole(80).installed():
        ours = run(call, "cuda")
    for mine, source in zip(ours, sources, strict=True):
        assert torch.equal(mine.view(torch.int16), source.contiguous().view(torch.int16))


def test_a_closed_half_costs_nothing():
    """A model of closed gates reads a byte per program, and a little for its table."""
    call = build(dataclasses.replace(WHOLE, closed=("key", "value")), 3)
    with Whole(80).installed() as simulated:
        c2c.fuse_layers([dataclasses.replace(call, out=(call.receiver_key, call.receiver_value))], backend="cuda")
    if DEVICE:
        return
    table, kernel = simulated.ran
    assert kernel.counters["global_load_bytes"] <= kernel.launch.block * kernel.launch.grid  # every lane its byte
    assert kernel.counters["global_store_bytes"] == 4 * kernel.launch.grid  # tickets
    assert kernel.counters["mma_flops"] == 0
    assert table.counters["global_load_sectors"] <= 2


@pytest.mark.skipif(bool(DEVICE), reason="an index on a device is not looked at")
def test_an_index_outside_reads_zeros():
    call = built(3, index=True, length=9)
    index = call.index.clone()
    outside = torch.zeros_like(index, dtype=torch.bool)
    outside[0, 2] = outside[1, 5] = True
    index[0, 2], index[1, 5] = -1, call.sharer_key.shape[2]
    halves = []
    for which in ("key", "value"):
        sharer = getattr(call, f"sharer_{which}")
        halves.append(torch.cat([sharer, torch.zeros_like(sharer[:, :, :1])], 2))
    zeros = dataclasses.replace(
        call, sharer_key=halves[0], sharer_value=halves[1], index=index.masked_fill(outside, halves[0].shape[2] - 1)
    )
    with Whole(80).installed():
        wanted = run(zeros, "cuda")
        out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted]
        cuda.fuse_kv(
            "cuda", call.receiver_key, call.receiver_value, call.sharer_key, call.sharer_value, call.weights, index,
            None, None, *out,
        )  # fmt: skip
    for mine, theirs in zip(out, wanted, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.skipif(bool(DEVICE), reason="waits for ever")
def test_programs_wait_for_the_stage_before():
    """Where one tile more is waited for than there is, programs wait for ever: the simulator says so."""

    class Missing(Whole):
        def __call__(self, launch: cuda.Launch) -> None:
            if not launch.kernel.startswith("c2c_fuse_table"):
                steps = Steps.from_buffer_copy(launch.params)
                steps.step[1].wait += 1
                launch = launch._replace(params=bytes(steps) + launch.params[ctypes.sizeof(Steps) :])
            super().__call__(launch)

    with pytest.raises(simulator().PtxError, match="deadlock|timeout"), Missing(80, timeout=2).installed():
        run(build(dataclasses.replace(WHOLE, batch=1, length=3), 5), "cuda")


NARROW = {"key_dim": 8, "value_dim": 8, "sharer_value_dim": 4, "hidden": 520, "inner": 8, "batch": 1, "strided": False}


def test_more_layers_than_scratch_has_room_for():
    """A launch for as many as there is room for, then another; the one open half is the last."""
    closed = built(3, closed=("key", "value"), length=17, **NARROW)
    last = built(4, closed=("key",), length=17, **NARROW)
    exact, theirs = oracle_of(last), torchs(last, last.receiver_key)
    layers = [_copied(closed) for _ in range(120)] + [last]
    with Whole(80).installed() as simulated:
        made = c2c.fuse_layers(
            [dataclasses.replace(call, out=(call.receiver_key, call.receiver_value)) for call in layers], backend="cuda"
        )
    assert len(products(simulated)) == 2
    assert all(ran.launch.tensors[0].numel() < 64e6 for ran in simulated.ran)
    assert_as_exact("value", made[-1][1], theirs[1], exact[1])
    assert all(torch.equal(value, closed.receiver_value) for _, value in made[:-1])


def test_more_tokens_than_scratch_has_room_for():
    call = built(3, closed=("key", "value"), length=4000, **{**NARROW, "hidden": 2056})
    out = like(call.receiver_key), like(call.receiver_value)
    with Whole(80).installed() as simulated:
        made = run(call, "cuda", out)
    assert len(products(simulated)) == 4
    assert torch.equal(made[0], call.receiver_key) and torch.equal(made[1], call.receiver_value)


def test_capabilities_with_little_shared_memory():
    """99 KiB a block: no tile asks for more."""
    call = built(1, hidden=512, inner=512, length=64, batch=1)
    layer = (call.receiver_key, call.receiver_value, call.sharer_key, call.sharer_value, call.weights, None, None, None)
    for capability, columns in ((80, 512), (86, 256), (89, 256), (90, 512), (100, 512), (120, 256)):
        launches: list[cuda.Launch] = []
        with cuda.executed_by(capability, launches.append):
            cuda.fuse_kv_layers("cuda", [(*layer, like(call.receiver_key), like(call.receiver_value))] * 96)
        names = {launch.kernel for launch in launches if "table" not in launch.kernel}
        assert names == {f"c2c_fuse_bf16_64x{columns}"}
        limit = 163 if columns == 512 else 99
        assert all(launch.shared + 3072 <= limit * 1024 for launch in launches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weights": torch.float32},
            "takes caches and weights of one dtype, bfloat16 or float16; got bfloat16, float32",
        ),
        ({"sharer": F16}, ".*; got bfloat16, float16"),
        ({"blocks": 14}, r"takes up to 13 blocks in project; weights.key has 14"),
    ],
)
def test_what_the_kernels_do_not_take_is_left_to_others(changes, message):
    call = build(dataclasses.replace(plan(), **changes), 1)
    with Simulator(80).installed() as simulated:
        with pytest.raises(ValueError, match=f"cuda: {message}"):
            run(call, "cuda")
        run(call, None)
    assert not simulated.ran


def test_gates_of_any_dtype():
    for dtype in (torch.float32, F16):
        call = built(5, gates=True)
        check(dataclasses.replace(call, gates=tuple(gate.to(dtype) for gate in call.gates)), Whole(80))


def test_gradients():
    """By PyTorch's products, from what the kernels leave."""
    call = build(FusePlan(BF16, BF16, BF16, index=True, strided=False), 3)
    with Whole(80).installed():
        check_gradients(call, "cuda")
