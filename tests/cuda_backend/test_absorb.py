"""Segments whose projectors are absorbed in decode on the CUDA backend, its compiled PTX run by ptxsim."""

from __future__ import annotations

import re

import pytest
import torch
from attention_cases import Plan, SegmentPlan, build, reference_call
from cuda_simulator import file_of, ptx, simulator
from error_rule import assert_as_exact
from simulated import ARCHS, DEVICE, Simulator, attend, missing

import c2c_kernels as c2c
from c2c_kernels.backends import cuda

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

BF16, F16 = torch.bfloat16, torch.float16


def raw(length: int, heads: int = 2, key_dim: int = 64, value_dim: int = 64, **fields) -> SegmentPlan:
    return SegmentPlan(length, heads, key_dim, value_dim, "dense", **fields)


PLANS = {
    "128": Plan(BF16, 2, 2, 3, 1, 165, 64, 64, is_causal=True, strided=False, segments=[raw(150, bias=True)]),
    "256": Plan(F16, 1, 2, 2, 1, 70, 128, 128, strided=False, segments=[raw(300, 4), SegmentPlan(40)]),
    "512": Plan(BF16, 1, 1, 4, 2, 40, 128, 80, strided=False, segments=[raw(140, 8, gate="full"), raw(33, 1, 128, 16)]),
    "wide heads": Plan(BF16, 1, 2, 9, 1, 40, 256, 256, segments=[raw(70, 1, 256, 512, gate="head", lengths=True)]),
    "odd": Plan(F16, 3, 3, 7, 1, 20, 40, 72, softcap=5.0, sinks=True, lengths=True, segments=[
        raw(65, 3, 24, 40, bias=True, gate="token", lengths=True), raw(0), raw(17, 5, 8, 9)]),
    "int8": Plan(BF16, 2, 2, 2, 1, 40, 64, 64, strided=False, segments=[
        raw(290, 8, quantised=True), raw(50, 2, 24, 40, quantised=True, index=True, bias=True)]),
    "positions": Plan(F16, 2, 1, 4, 3, 30, 64, 64, is_causal=True, window=20, segment_window=40, query_positions=True,
        segments=[raw(80, positions="shuffled", visibility="causal"), raw(80, positions="shared", index=True)]),
    "many rows": Plan(BF16, 1, 3, 4, 8, 40, 64, 64, mask="bool_heads", segments=[raw(90, bias=True, gate="some_zero")]),
}  # fmt: skip


def check(call: dict, arch: int) -> Simulator:
    ours, simulated = attend(call, arch)
    dtype = call["query"].dtype
    oracle, theirs = reference_call(call, torch.float64), reference_call(call, dtype, dtype)
    for which, mine, torchs, exact in zip(("out", "lse", "mass"), ours, theirs, oracle, strict=True):
        assert_as_exact(which, mine, torchs, exact)
    return simulated


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", PLANS)
def test_attention(name, arch):
    plan = PLANS[name]
    plan.strategy = "absorb"
    simulated = check(build(plan, 5), arch)
    names = [each for each in simulated.names() if "project" not in each and "copy" not in each]
    assert len(names) == 2 and names[0].startswith("c2c_absorb_") and names[1].startswith("c2c_absorb_combine_")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("heads", "quantised"), [(2, False), (8, False), (8, True)])
def test_folded_queries_beyond_float16(heads, quantised, arch):
    """Queries through a projector that float16 does not hold, of tokens as small; beside columns with the reverse."""
    call = build(Plan(F16, 1, 2, 3, 2, 20, 64, 64, strided=False, segments=[raw(70, heads, quantised=quantised)]), 5)
    (segment,) = call["segments"]
    large = torch.tensor([2.0**11, 2.0**-7]).repeat_interleave(64).repeat(heads // 2)
    call["query"], segment.key_proj = call["query"] * 64, (segment.key_proj * large).to(F16)
    small = large.reciprocal().view(1, heads, 1, 64)
    if quantised:
        segment.key_scale = segment.key_scale * small[..., 0]
    else:
        segment.key = (segment.key * small).to(F16)
    folded = call["query"].double().unflatten(1, (2, 3)).flatten(2, 3) @ segment.key_proj.double()
    assert folded.abs().max() > 2 * torch.finfo(F16).max
    assert reference_call(call, torch.float64)[0].isfinite().all()
    check({**call, "strategy": "absorb"}, arch)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_float8(dtype):
    call = build(Plan(dtype, 2, 2, 2, 1, 40, 64, 64, segments=[raw(70, quantised=True), raw(20, 8, quantised=True)]), 3)
    for segment in call["segments"]:
        segment.key, segment.value = (
            (codes.float() / 16).to(torch.float8_e4m3fn) for codes in (segment.key, segment.value)
        )
    check({**call, "strategy": "absorb"}, 80)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_scales_that_are_strided_or_of_two_bytes(dtype):
    call = build(Plan(dtype, 2, 2, 2, 1, 9, 64, 64, segments=[raw(70, 3, quantised=True)] * 2), 3)
    first, second = call["segments"]
    first.key_scale = first.key_scale.transpose(1, 2).contiguous().transpose(1, 2)
    second.key_scale, second.value_scale = second.key_scale.to(dtype), second.value_scale[..., :1].expand(-1, -1, 70)
    check({**call, "strategy": "absorb"}, 80)


def test_auto_absorbs_where_the_cost_model_says_so():
    narrow = build(Plan(BF16, 1, 2, 2, 1, 20, 64, 64, segments=[raw(200, 2)]), 3)
    assert attend(narrow, 80)[1].names()[0].startswith("c2c_absorb_")
    low_rank = build(Plan(BF16, 1, 2, 2, 1, 20, 64, 64, segments=[SegmentPlan(200, 2, 64, 64, "low_rank")]), 3)
    assert attend(low_rank, 80)[1].names()[-1] == "c2c_combine"


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_scales_of_16_bit_tokens_are_not_lost(dtype):
    """They are applied where bytes are widened: such a segment is projected first, or by name refused."""
    call = build(Plan(dtype, 1, 2, 2, 1, 20, 64, 64, segments=[raw(200, 2)]), 3)
    (segment,) = call["segments"]
    segment.key_scale, segment.value_scale = (torch.rand(1, 2, 200) + 0.5 for _ in range(2))
    assert check(call, 80).names()[-1] == "c2c_combine"
    with pytest.raises(ValueError, match=r"tokens with scales in int8 or float8_e4m3fn; segments\[0\] has scales and"):
        attend({**call, "strategy": "absorb"}, 80)


# --- what changes no bit ---


def same(ours: tuple, theirs: tuple) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(BF16)


def absorbed(length: int, batch: int = 1, heads: int = 2, **fields) -> c2c.SharerSegment:
    width = heads * 64
    weights = [(torch.randn(2, 64, width) / width**0.5).to(BF16) for _ in range(2)]
    return c2c.SharerSegment(numbers(batch, heads, length, 64), numbers(batch, heads, length, 64), *weights, **fields)


def run(query, key, value, segments, **options) -> tuple:
    with Simulator(80).installed():
        return c2c.merged_attention(
            query, key, value, segments, strategy="absorb", is_causal=True, backend="cuda", return_lse=True, **options
        )


@pytest.mark.parametrize("q_len", [1, 5])
def test_empty_and_closed_segments(q_len):
    """Beside no absorbed segment, other kernels take the rest; beside one, the same."""
    query, key, value = numbers(1, 8, q_len, 64), numbers(1, 2, 300, 64), numbers(1, 2, 300, 64)
    plain = c2c.SharerSegment(numbers(1, 2, 150, 64), numbers(1, 2, 150, 64))
    closed = absorbed(150, heads=8, gate=torch.zeros(1, 1, 1), key_bias=numbers(2, 64), value_bias=numbers(2, 64))
    short = absorbed(90, lengths=torch.zeros(1, dtype=torch.int64))
    for others in ([plain], [plain, absorbed(130)]):
        wanted = run(query, key, value, others)
        for extra in (closed, short, absorbed(0)):
            assert same(run(query, key, value, [extra, *others]), wanted)
            assert same(run(query, key, value, [*others, extra]), wanted)


def test_rows_do_not_depend_on_the_batch():
    query, key, value = numbers(3, 4, 2, 64), numbers(3, 2, 200, 64), numbers(3, 2, 200, 64)
    lengths, shared = torch.tensor([200, 170, 60]), torch.tensor([1, 400, 140])
    segment = absorbed(400, 3, lengths=shared, key_bias=numbers(2, 64))
    whole = run(query, key, value, [segment], lengths=lengths)
    for row, (own, length) in enumerate(zip(lengths.tolist(), shared.tolist(), strict=True)):
        cut = [t[row : row + 1, :, :own] for t in (key, value)]
        raw_cut = (t[row : row + 1, :, :length] for t in (segment.key, segment.value))
        alone = c2c.SharerSegment(*raw_cut, segment.key_proj, segment.value_proj, key_bias=segment.key_bias)
        assert same([t[row : row + 1] for t in whole], run(query[row : row + 1], *cut, [alone]))


def test_nothing_visible():
    query, key = numbers(1, 4, 1, 64), numbers(1, 2, 0, 64)
    out, lse = run(query, key, key, [absorbed(33, gate=torch.zeros(1, 1, 1), value_bias=numbers(2, 64))])
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


class Backwards(Simulator):
    """Starts blocks in the opposite order: those of raw tokens find nothing folded, and fold."""

    def __call__(self, launch: cuda.Launch) -> None:
        if launch.kernel.startswith("c2c_absorb_combine"):
            super().__call__(launch)
            return
        text = ptx(file_of(launch.kernel), self.arch).read_text()
        turned = r"mov.u32 \1, %ctaid.x; { .reg .b32 last; mov.u32 last, %nctaid.x; sub.s32 last, last, 1; "
        turned += r"sub.s32 \1, last, \1; }"
        text, count = re.subn(r"mov.u32 \s*(%r\d+), %ctaid.x;", turned, text)
        assert count
        simulator().Module(text).launch(
            launch.kernel, launch.grid, launch.block, [launch.params], dynamic_shared=launch.shared,
            ranges=launch.tensors, **self.checks,
        )  # fmt: skip


def test_blocks_may_start_in_any_order():
    query, key, value = numbers(2, 8, 1, 64), numbers(2, 2, 70, 64), numbers(2, 2, 70, 64)
    segments = [absorbed(150, 2, 3, key_bias=numbers(2, 64)), absorbed(50, 2)]
    found = []
    for order in (Simulator, Backwards):
        with order(80).installed():
            found.append(
                c2c.merged_attention(query, key, value, segments, strategy="absorb", backend="cuda", return_lse=True)
            )
    assert same(*found)


@pytest.mark.skipif(bool(DEVICE), reason="test_device.py captures graphs")
def test_launches_can_be_run_again():
    """As a CUDA graph does: in the same workspace, with the same numbers of the call, but for other queries."""
    query, key, value = numbers(2, 8, 1, 64), numbers(2, 2, 70, 64), numbers(2, 2, 70, 64)
    segments = [absorbed(150, 2, 3, key_bias=numbers(2, 64)), absorbed(50, 2)]

    def call(simulated: Simulator) -> torch.Tensor:
        with simulated.installed():
            return c2c.merged_attention(query, key, value, segments, strategy="absorb", backend="cuda")

    first = Simulator(80)
    out = call(first)
    before = out.clone()
    query.copy_(numbers(*query.shape))
    for ran in list(first.ran):
        first(ran.launch)
    assert torch.equal(out, call(Simulator(80))) and not torch.equal(out, before)
