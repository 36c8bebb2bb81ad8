"""Results do not depend on the batch, on the number of threads, or on the run; instruction sets agree."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Plan, SegmentPlan, build, reference_call
from error_rule import assert_as_exact
from test_merged_attention import check_call, run

import c2c_kernels as c2c
from c2c_kernels import _cpu
from c2c_kernels.segment import to_tensors

PLANS = {
    "decode": Plan(
        batch=4, kv_heads=2, group=3, q_len=1, length=1500, head_dim=64, value_dim=64, is_causal=True, lengths=True,
        segments=[
            SegmentPlan(2100, 2, 32, 32, "dense", gate="full", lengths=True),
            SegmentPlan(700, gate="head", positions="shuffled", lengths=True),
        ],
    ),
    "prefill": Plan(
        batch=3, kv_heads=1, group=4, q_len=150, length=600, head_dim=64, value_dim=40, is_causal=True, window=200,
        segments=[SegmentPlan(333, 2, 32, 32, "low_rank", bias=True, positions="shared", visibility="causal")],
    ),
}  # fmt: skip


def row_of(call: dict, row: int) -> dict:
    """The same call with one batch row."""

    def pick(tensor, dims):
        return tensor[row : row + 1] if tensor is not None and tensor.dim() == dims else tensor

    alone = dict(call)
    dims_of = {"query": 4, "key": 4, "value": 4, "attn_mask": 4, "query_positions": 2, "lengths": 1}
    for name, dims in dims_of.items():
        alone[name] = pick(call[name], dims)
    alone["segments"] = []
    for part in call["segments"]:
        fields = dict(vars(part))
        for name, dims in (("key", 4), ("value", 4), ("lengths", 1), ("positions", 2)):
            fields[name] = pick(fields[name], dims)
        if fields["gate"] is not None and fields["gate"].dim() == 3 and fields["gate"].shape[0] > 1:
            fields["gate"] = fields["gate"][row : row + 1]
        alone["segments"].append(c2c.SharerSegment(**fields))
    return alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("strategy", ["auto", "absorb", "materialize"])
def test_rows_do_not_depend_on_the_batch(name, dtype, strategy):
    plan = PLANS[name]
    plan.dtype, plan.strategy = dtype, strategy
    call = build(plan, 3)
    whole = run(call)
    for row in range(plan.batch):
        for together, alone in zip(whole, run(row_of(call, row)), strict=True):
            assert torch.equal(together[row : row + 1], alone)


def test_rows_do_not_depend_on_padding():
    """A row among longer ones gives the bits of the row cut to its own length."""
    call = build(PLANS["decode"], 4)
    whole = run(call)
    for row in range(PLANS["decode"].batch):
        alone = row_of(call, row)
        length = int(alone["lengths"][0])
        alone.update(key=alone["key"][:, :, :length], value=alone["value"][:, :, :length], lengths=None)
        for together, cut in zip(whole, run(alone), strict=True):
            assert torch.equal(together[row : row + 1], cut)


@pytest.mark.parametrize("name", PLANS)
def test_threads_and_runs_do_not_matter(name):
    call = build(PLANS[name], 5)
    cotangent = torch.randn(run(call)[0].shape)

    def everything():
        fresh = dict(call)
        for which in ("query", "key", "value"):
            fresh[which] = call[which].detach().float().requires_grad_()
        fresh["segments"] = [
            c2c.SharerSegment(**{**vars(part), "key": part.key.float(), "value": part.value.float()})
            for part in call["segments"]
        ]
        out, lse, mass = run(fresh)
        grads = torch.autograd.grad((out * cotangent).sum(), [fresh[which] for which in ("query", "key", "value")])
        return (out, lse, mass, *grads)

    threads = torch.get_num_threads()
    try:
        first = everything()
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            for one, other in zip(first, everything(), strict=True):
                assert torch.equal(one.nan_to_num(), other.nan_to_num())
    finally:
        torch.set_num_threads(threads)


def available_sets() -> list[str]:
    found = []
    for name in ("amx_bf16", "avx512_bf16", "avx512", "avx2", "baseline", "neon"):
        try:
            _cpu.set_isa(name)
        except ValueError:
            continue
        found.append(name)
    _cpu.set_isa(None)
    return found


@pytest.fixture
def instruction_set(request):
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(None)


@pytest.mark.sanitize
@pytest.mark.parametrize("instruction_set", available_sets(), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [1, 17, 32, 145])
def test_scales_of_any_sign(instruction_set, dtype, length):
    """What fills a block up to whole vectors is hidden whatever scores are multiplied by."""
    call = build(Plan(dtype, 1, 1, 2, 1, length, 64, 64), 1)
    for scale in (-0.2, 0.0, -0.0, 0.3):
        check_call({**call, "scale": scale})


@pytest.mark.sanitize
@pytest.mark.parametrize("instruction_set", available_sets(), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_every_instruction_set(name, dtype, instruction_set):
    assert _cpu.isa() == instruction_set
    plan = PLANS[name]
    for seed, strategy in enumerate(("absorb", "materialize")):
        plan.dtype, plan.strategy, plan.softcap = dtype, strategy, 20.0 if seed else None
        call = build(plan, seed)
        oracle = reference_call(call, torch.float64)
        theirs = reference_call(call, dtype, dtype)
        for which, mine, torchs, exact in zip(("out", "lse", "mass"), run(call), theirs, oracle, strict=True):
            assert_as_exact(which, mine, torchs, exact)


@pytest.mark.parametrize("instruction_set", available_sets(), indirect=True)
def test_gradients_on_every_instruction_set(instruction_set):
    from test_gradients import check

    part = SegmentPlan(70, 2, 24, 24, "dense", bias=True, gate="full")
    check(Plan(q_len=40, length=90, head_dim=40, value_dim=24, softcap=5.0, is_causal=True, segments=[part]), 2)


@pytest.mark.parametrize("instruction_set", available_sets(), indirect=True)
def test_half_precision_is_converted_exactly(instruction_set):
    """Every bfloat16 and float16 number survives a copy through the kernels; float32 rounds as PyTorch rounds."""
    for dtype in (torch.bfloat16, torch.float16):
        codes = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 1, 256, 256)
        key, _ = c2c.project_kv(c2c.SharerSegment(codes, codes), backend="cpu")
        assert torch.equal(key.nan_to_num(nan=1.25), codes.nan_to_num(nan=1.25))
        assert torch.equal(key.isnan(), codes.isnan())
        wide = torch.randn(1, 1, 300, 37) * torch.logspace(-9, 6, 300).reshape(1, 1, 300, 1)
        wide[0, 0, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
        target = torch.empty(1, 1, 300, 37, dtype=dtype), torch.empty(1, 1, 300, 37, dtype=dtype)
        c2c.project_kv(c2c.SharerSegment(wide, wide), out=target, backend="cpu")
        torch.testing.assert_close(target[0], wide.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_a_batch_row_alone_projects_the_same():
    part = SegmentPlan(140, 2, 24, 24, "dense", bias=True, lengths=True)
    segment = build(Plan(batch=3, segments=[part]), 6)["segments"][0]
    key, value = c2c.project_kv(segment, backend="cpu")
    for row in range(3):
        fields = {name: t for name, t in vars(segment).items() if name not in ("key", "value", "lengths", "gate")}
        one = slice(row, row + 1)
        alone = c2c.SharerSegment(segment.key[one], segment.value[one], lengths=segment.lengths[one], **{
            name: t for name, t in fields.items() if name not in ("positions", "visibility")
        })  # fmt: skip
        assert to_tensors(alone).length == 140
        for mine, whole in zip(c2c.project_kv(alone, backend="cpu"), (key, value), strict=True):
            assert torch.equal(mine, whole[one])
