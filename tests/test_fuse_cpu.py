"""`fuse_kv` on the CPU: instruction sets, threads, tiles of tokens, weights that move, memory."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from error_rule import assert_as_exact
from fuse_cases import FLOATS, FusePlan, arguments, build, mapped
from test_invariance import available_sets, instruction_set  # noqa: F401
from threads import torch_threads

import c2c_kernels as c2c
from c2c_kernels.backends import native_fuse, reference_fuse

# Wider than a piece of the width, tails behind vectors of every instruction set, heads that units of rows cut.
WIDE = FusePlan(kv_heads=3, key_dim=40, value_dim=25, sharer_heads=2, sharer_key_dim=70, hidden=301, inner=275)


def run(call: c2c.FuseCall, **changes):
    positional, options = arguments(call)
    return c2c.fuse_kv(*positional, **(options | changes), backend="cpu")


def halves(call: c2c.FuseCall, dtype: torch.dtype):
    """Both halves by the reference in `dtype`."""
    same = mapped(call, lambda tensor: tensor.to(dtype))
    residual, gates = same.residual or (None, None), same.gates or (None, None)
    return [
        reference_fuse.fuse_half(own, raw, half, call.index, base, gate, dtype)
        for own, raw, half, base, gate in (
            (same.receiver_key, same.sharer_key, same.weights.key, residual[0], gates[0]),
            (same.receiver_value, same.sharer_value, same.weights.value, residual[1], gates[1]),
        )
    ]


def check(call: c2c.FuseCall) -> None:
    """Against PyTorch in float32: that is what the kernels compute in, whatever the dtypes are."""
    for slot, mine, theirs, exact in zip(
        ("key", "value"), run(call), halves(call, torch.float32), halves(call, torch.float64), strict=True
    ):
        assert_as_exact(slot, mine, theirs.to(mine.dtype), exact)


@pytest.mark.sanitize
@pytest.mark.parametrize("instruction_set", available_sets(), indirect=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [1, 9, 40, 65, 81])
def test_every_instruction_set(length, dtype, instruction_set):  # noqa: F811
    plan = dataclasses.replace(WIDE, batch=1 if length > 40 else 2, length=length, weights=dtype, sharer=dtype)
    check(build(dataclasses.replace(plan, index=length == 40, gates=length == 9, blocks=1 + length % 2), length))


@pytest.mark.sanitize
@pytest.mark.parametrize("instruction_set", available_sets(), indirect=True)
@pytest.mark.parametrize("length", [2, 20])
def test_gelu_far_from_zero(length, instruction_set):  # noqa: F811
    call = build(dataclasses.replace(WIDE, length=length, weights=torch.float32), 3)
    for half in (call.weights.key, call.weights.value):
        for block in (half.embed, half.scale, *half.project):
            block.norm.mul_(4.0)
    check(call)


@pytest.mark.parametrize("closed", [(), ("key",)], ids=["open", "closed"])
@pytest.mark.parametrize("length", [3, 30, 65, 150])
def test_threads_do_not_change_a_bit(length, closed):
    call = build(dataclasses.replace(WIDE, batch=1, length=length, closed=closed, index=True), 5)
    with torch_threads(1):
        wanted = run(call)
    for count in (2, 3, 7):
        with torch_threads(count):
            for mine, alone in zip(run(call), wanted, strict=True):
                assert torch.equal(mine, alone), f"{count} threads"


@pytest.mark.parametrize(("batch", "length"), [(37, 2), (70, 1), (3, 33)])
def test_a_row_does_not_depend_on_the_batch(batch, length):
    call = build(dataclasses.replace(WIDE, batch=batch, length=length, strided=False), 6)
    caches = (call.receiver_key, call.receiver_value, call.sharer_key, call.sharer_value)
    whole = run(call)
    for row in (0, batch // 2, batch - 1):
        alone = run(c2c.FuseCall(*(cache[row : row + 1] for cache in caches), call.weights))
        for mine, together in zip(alone, whole, strict=True):
            assert torch.equal(mine, together[row : row + 1])


def test_a_token_does_not_depend_on_its_tile():
    call = build(dataclasses.replace(WIDE, batch=1, length=150, strided=False), 7)
    caches = (call.receiver_key, call.receiver_value, call.sharer_key, call.sharer_value)
    whole = run(call)
    for part in (slice(0, 90), slice(60, 97), slice(141, 150)):
        alone = run(c2c.FuseCall(*(cache[:, :, part] for cache in caches), call.weights))
        for mine, together in zip(alone, whole, strict=True):
            assert torch.equal(mine, together[:, :, part])


def test_layers_of_all_kinds_in_one_call():
    plans = [
        FusePlan(hidden=40, length=70, batch=1, blocks=3),
        FusePlan(hidden=8, length=2, batch=33, closed=("key",), receiver=torch.bfloat16),
        FusePlan(hidden=100, length=9, blocks=2, weights=torch.float16, gates=True, residual=True),
        FusePlan(closed=("key", "value"), receiver=torch.float16, residual=True),
    ]
    calls = [build(plan, number) for number, plan in enumerate(plans)]
    for count in (1, 2, 5):
        with torch_threads(count):
            for got, call in zip(c2c.fuse_layers(calls, backend="cpu"), calls, strict=True):
                assert all(torch.equal(mine, wanted) for mine, wanted in zip(got, run(call), strict=True))


def test_weights_are_read_where_they_lie_now():
    call = build(dataclasses.replace(WIDE, hidden=275, weights=torch.float32), 8)
    check(call)
    half = call.weights.key
    with torch.no_grad():
        half.embed.w1.data = torch.randn(half.embed.w1.shape) / 16  # elsewhere
        check(call)
        half.embed.w2.t_()  # square: the same memory, other strides
        check(call)
        half.scale.w1.copy_(torch.randn(half.scale.w1.shape) / 16)
        check(call)
        half.scale_bias.add_(1)
        check(call)


def test_nothing_keeps_weights_alive():
    gc.collect()
    before = len(native_fuse._known)
    call = build(dataclasses.replace(WIDE, strided=False), 9)
    call = mapped(call, torch.Tensor.contiguous)
    run(call)
    assert len(native_fuse._known) == before + 2
    del call
    gc.collect()
    assert len(native_fuse._known) == before


def test_the_kernel_checks_the_index_itself():
    call = build(FusePlan(index=True, strided=False), 1)
    call.index[1, 2] = call.sharer_key.shape[2]
    out = torch.zeros_like(call.receiver_key), torch.zeros_like(call.receiver_value)
    caches = (call.receiver_key, call.receiver_value, call.sharer_key, call.sharer_value)
    with pytest.raises(ValueError, match="index has values outside"):
        native_fuse.fuse_kv("cpu", *caches, call.weights, call.index, None, None, *out)
    assert not out[0].any() and not out[1].any()


MEMORY = """
import resource, torch
from fuse_cases import FusePlan, build
import c2c_kernels as c2c
from c2c_kernels.backends import native_fuse
torch.set_num_threads(2)
plan = FusePlan(torch.bfloat16, torch.bfloat16, torch.bfloat16, 1, 8, 128, 128, 2048, 8, 128, 128, 1024, 1024)
call = build(plan, 0)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
# What drawing the inputs has freed is taken again, so that the peak is what is in use.
held = torch.ones(int(16 + peak() - int(open("/proc/self/statm").read().split()[1]) / 256), 2**18)
out = call.receiver_key, call.receiver_value
small = build(FusePlan(), 0)
c2c.fuse_kv(small.receiver_key, small.receiver_value, small.sharer_key, small.sharer_value, small.weights)
before = peak()
c2c.fuse_kv(*out, call.sharer_key, call.sharer_value, call.weights, out=out, backend="cpu")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_a_tile_for_every_thread():
    """At the shape of Qwen3-0.6B with Qwen3-4B and 2048 tokens: a few megabytes, for one layer or for all."""
    here = Path(__file__).parent  # first on the path of the process: the helpers, not the checkout's package
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=here, check=True)
    assert 0 <= float(done.stdout) < 16
