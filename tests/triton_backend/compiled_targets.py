"""Every Triton kernel compiled ahead of time for GPUs that are not there: no spills, shared memory, launch counts."""

from __future__ import annotations

import os

import pytest
import torch

from c2c_kernels import FuserBlock, FuserHalf
from c2c_kernels.backends import triton as backend
from c2c_kernels.backends.triton import fusing, gradients, scatter
from c2c_kernels.backends.triton.launch import Launch, Target, executed_by
from c2c_kernels.backends.triton.offline import SHARED_LIMIT, compiled, serialised, usage
from c2c_kernels.segment import SegmentTensors, SharerSegment, to_tensors

TARGETS = [Target("cuda", 80), Target("cuda", 90), Target("cuda", 100), Target("hip", "gfx942")]
HALF, SINGLE = torch.bfloat16, torch.float32


def plain(dtype, heads: int, length: int, dim: int, **fields) -> SegmentTensors:
    return to_tensors(SharerSegment(*(torch.empty(1, heads, length, dim, dtype=dtype) for _ in range(2)), **fields))


def attention(dtype, q_heads: int, kv_heads: int, dim: int, q_len: int, segments=(), strategy="materialize", **options):
    query = torch.empty(1, q_heads, q_len, dim, dtype=dtype)
    key = torch.empty(1, kv_heads, 1040, dim, dtype=dtype)
    chosen = dict.fromkeys(("attn_mask", "query_positions", "lengths", "window", "softcap", "sinks")) | options
    chosen = {"is_causal": True} | chosen
    backend.merged_attention(
        "triton", query, key, key, list(segments), chosen["attn_mask"], chosen["is_causal"], chosen["query_positions"],
        chosen["lengths"], 0.1, chosen["window"], chosen["window"], chosen["softcap"], chosen["sinks"], strategy,
        True, True,
    )  # fmt: skip


def absorbed(dtype, q_heads: int, kv_heads: int, dim: int, heads: int, raw_dim: int, q_len: int = 1, weights=None):
    proj = torch.empty(kv_heads, dim, heads * raw_dim, dtype=weights or dtype)
    bias = torch.empty(kv_heads, dim, dtype=weights or dtype)
    projectors = {"key_proj": proj, "value_proj": proj, "key_bias": bias, "value_bias": bias}
    attention(dtype, q_heads, kv_heads, dim, q_len, [plain(dtype, heads, 512, raw_dim, **projectors)], "absorb")


def everything(q_heads: int, q_len: int) -> dict:
    """Every option of a call, all at once."""
    return {
        "attn_mask": torch.zeros(1, q_heads, q_len, 1040), "query_positions": torch.arange(q_len)[None],
        "lengths": torch.tensor([1040]), "window": 512, "softcap": 30.0, "sinks": torch.zeros(q_heads),
    }  # fmt: skip


def demanding(dtype, q_heads: int, kv_heads: int, dim: int, **fields) -> SegmentTensors:
    """A segment with gates per head and token, positions and lengths."""
    options = {
        "gate": torch.ones(1, q_heads, 512),
        "lengths": torch.tensor([512]),
        "positions": torch.arange(512)[None],
    }
    return plain(dtype, kv_heads, 512, dim, visibility="causal", **options, **fields)


def attend_everything(dtype, q_heads: int, kv_heads: int, dim: int, stored, q_len: int = 256, **options):
    """With two segments: of dtype `stored`, and int8. `options` in place of the call's."""
    scales = {name: torch.ones(1, kv_heads, 512) for name in SCALES}
    segments = [
        demanding(stored, q_heads, kv_heads, dim), demanding(torch.int8, q_heads, kv_heads, dim, **scales)
    ]  # fmt: skip
    attention(dtype, q_heads, kv_heads, dim, q_len, segments, **(everything(q_heads, q_len) | options))


def backward(dtype, dim: int, segments=(), **options):
    query, key = torch.empty(1, 4, 96, dim, dtype=dtype), torch.empty(1, 2, 1040, dim, dtype=dtype)
    rows = torch.empty(1, 4, 96)
    segments = list(segments) or [plain(dtype, 2, 80, dim, gate=torch.ones(1, 4, 80))]
    chosen = dict.fromkeys(("attn_mask", "query_positions", "lengths", "window", "softcap", "sinks")) | options
    gradients.gradients(
        query, rows, torch.empty(1, 4, 96, 1 + len(segments)), query, key, key, segments,
        [segment.gate is not None for segment in segments], chosen["attn_mask"], True, chosen["query_positions"],
        chosen["lengths"], 0.1, chosen["window"], chosen["window"], chosen["softcap"], chosen["sinks"],
    )  # fmt: skip


def backward_everything(dtype, dim: int, *stored):
    """With a segment of each dtype `stored`."""
    backward(dtype, dim, [demanding(each, 4, 2, dim) for each in stored], **everything(4, 96))


def project(dtype, kv_heads: int, dim: int, heads: int, raw_dim: int, stored=None, **fields):
    stored = stored or dtype
    raw = torch.empty(1, heads, 512, raw_dim).to(stored)
    proj = torch.empty(kv_heads, dim, heads * raw_dim, dtype=dtype)
    segment = to_tensors(SharerSegment(raw, raw, proj, proj, **fields))
    backend.project_kv("triton", segment, None, *(torch.empty(1, kv_heads, 512, dim, dtype=dtype) for _ in range(2)))


def fuse(dtype, hidden: int = 1024, halves: int = 1, dim: int = 128, sharer_dim: int = 64, weights=None):
    def of(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=weights or dtype)

    receiver, sharer = torch.empty(1, 8, 64, dim, dtype=dtype), torch.empty(1, 2, 64, sharer_dim, dtype=dtype)
    block = FuserBlock(of(hidden), of(hidden, hidden), of(hidden, hidden))
    half = FuserHalf(
        of(hidden, 2 * sharer_dim + 8 * dim), of(hidden), block, (block,), of(8 * dim, hidden), of(8 * dim), block,
        of(8, hidden), of(8), of(),
    )  # fmt: skip
    index = torch.zeros(1, 64, dtype=torch.int64) if weights else None
    fusing.fuse([fusing.Half(receiver, sharer, half, index, None, None, receiver)] * halves)


SCALES = {"key_scale": torch.ones(1, 8, 512), "value_scale": torch.ones(1, 8, 512)}
TWO = ["split_kernel", "combine_kernel"]
GRADIENTS = ["query_gradient_kernel", "token_gradient_kernel"]
# What is called, and the kernels that it launches.
CALLS = {
    "decode 64": (lambda: attention(HALF, 9, 3, 64, 1, [plain(HALF, 3, 512, 64)]), TWO),
    "decode 128": (lambda: attention(HALF, 16, 8, 128, 1, [plain(HALF, 8, 512, 128)]), TWO),
    "decode 128 int8": (lambda: attention(HALF, 16, 8, 128, 1, [plain(torch.int8, 8, 512, 128, **SCALES)]), TWO),
    "decode 128 e4m3": (
        lambda: attention(HALF, 16, 8, 128, 1, [plain(torch.float8_e4m3fn, 8, 512, 128, **SCALES)]),
        TWO,
    ),
    "decode 128 float32": (lambda: attention(SINGLE, 16, 8, 128, 1, [plain(SINGLE, 8, 512, 128)]), TWO),
    "decode 64 float32 32 rows": (lambda: attention(SINGLE, 16, 2, 64, 4), TWO),
    "decode 256 float32": (lambda: attention(SINGLE, 4, 1, 256, 1), TWO),
    "decode 256": (lambda: attention(HALF, 4, 1, 256, 1, window=512), TWO),
    "decode 64 rows": (lambda: attention(HALF, 16, 2, 128, 8, softcap=30.0, sinks=torch.zeros(16)), TWO),
    "decode 64 everything": (lambda: attend_everything(HALF, 9, 3, 64, SINGLE, 21), TWO),
    "decode 64 all but a mask": (lambda: attend_everything(HALF, 9, 3, 64, SINGLE, 21, attn_mask=None), TWO),
    "absorbed 128": (lambda: absorbed(HALF, 16, 8, 128, 2, 64), TWO),
    "absorbed 256": (lambda: absorbed(HALF, 9, 3, 64, 1, 256), TWO),
    "absorbed 512": (lambda: absorbed(HALF, 16, 8, 128, 8, 64), TWO),
    "absorbed 512 32 rows": (lambda: absorbed(HALF, 16, 8, 128, 8, 64, 2), TWO),
    "absorbed 256 64 rows": (lambda: absorbed(HALF, 16, 8, 128, 4, 64, 4), TWO),
    "absorbed head dim 256 64 rows": (lambda: absorbed(HALF, 8, 1, 256, 4, 64, 8), TWO),
    "absorbed head dim 256 float32": (lambda: absorbed(SINGLE, 8, 1, 256, 2, 64, 2), TWO),
    "absorbed head dim 128 float32 16 rows": (lambda: absorbed(SINGLE, 16, 2, 128, 2, 32, 2), TWO),
    "absorbed head dim 64 float32 32 rows": (lambda: absorbed(SINGLE, 8, 1, 64, 2, 32, 4), TWO),
    "absorbed float32 projectors": (lambda: absorbed(HALF, 8, 1, 256, 4, 64, 8, SINGLE), TWO),
    "absorbed float32": (lambda: absorbed(SINGLE, 16, 8, 128, 2, 64), TWO),
    "prefill 64": (lambda: attention(HALF, 9, 3, 64, 256, [plain(HALF, 3, 512, 64)]), ["prefill_kernel"]),
    "prefill 128": (lambda: attention(HALF, 16, 8, 128, 256, [plain(HALF, 8, 512, 128)]), ["prefill_kernel"]),
    "prefill 128 float32": (
        lambda: attention(SINGLE, 16, 8, 128, 256, [plain(SINGLE, 8, 512, 128)]),
        ["prefill_kernel"],
    ),
    "prefill 64 float32": (lambda: attention(SINGLE, 9, 3, 64, 256, [plain(SINGLE, 3, 512, 64)]), ["prefill_kernel"]),
    "prefill 256 float32": (lambda: attention(SINGLE, 4, 1, 256, 256), ["prefill_kernel"]),
    "prefill 128 float32 segment": (
        lambda: attention(HALF, 16, 8, 128, 256, [plain(SINGLE, 8, 512, 128)]),
        ["prefill_kernel"],
    ),
    "prefill 256 float32 segment": (
        lambda: attention(HALF, 4, 1, 256, 256, [plain(SINGLE, 1, 512, 256)]),
        ["prefill_kernel"],
    ),
    "prefill 128 gate": (
        lambda: attention(HALF, 16, 8, 128, 256, [plain(HALF, 8, 512, 128, gate=torch.ones(1, 16, 512))]),
        ["prefill_kernel"],
    ),
    "prefill 64 float32 mask": (
        lambda: attention(SINGLE, 9, 3, 64, 256, attn_mask=torch.zeros(1, 9, 256, 1040)),
        ["prefill_kernel"],
    ),
    "prefill 256 float32 mask": (
        lambda: attention(SINGLE, 4, 1, 256, 256, attn_mask=torch.zeros(1, 4, 256, 1040)),
        ["prefill_kernel"],
    ),
    "prefill 256 float32 mask and gate": (
        lambda: attention(
            SINGLE, 4, 1, 256, 256, [plain(SINGLE, 1, 512, 256, gate=torch.ones(1, 4, 512))],
            attn_mask=torch.zeros(1, 4, 256, 1040),
        ),
        ["prefill_kernel"],
    ),
    "prefill 256 window and gate": (
        lambda: attention(HALF, 4, 1, 256, 256, [plain(HALF, 1, 512, 256, gate=torch.ones(1, 4, 512))], window=512),
        ["prefill_kernel"],
    ),
    "prefill 64 int8 gate": (
        lambda: attention(
            HALF, 16, 8, 64, 256, [plain(torch.int8, 8, 512, 64, gate=torch.ones(1, 16, 512), **SCALES)]
        ),
        ["prefill_kernel"],
    ),
    "prefill 64 gate": (
        lambda: attention(HALF, 9, 3, 64, 256, [plain(HALF, 3, 512, 64, gate=torch.ones(1, 9, 512))]),
        ["prefill_kernel"],
    ),
    "prefill 256": (lambda: attention(HALF, 4, 1, 256, 256, window=512), ["prefill_kernel"]),
    "prefill 128 masks": (
        lambda: attention(
            HALF, 16, 8, 128, 256, [plain(HALF, 8, 512, 128, gate=torch.ones(1, 16, 512))], softcap=30.0,
            sinks=torch.zeros(16), attn_mask=torch.ones(1, 1, 256, 1040, dtype=torch.bool),
        ),
        ["prefill_kernel"],
    ),
    "prefill 64 everything": (lambda: attend_everything(HALF, 9, 3, 64, SINGLE), ["prefill_kernel"]),
    "prefill 128 everything": (lambda: attend_everything(HALF, 16, 8, 128, SINGLE), ["prefill_kernel"]),
    "prefill 256 everything": (lambda: attend_everything(HALF, 4, 1, 256, SINGLE), ["prefill_kernel"]),
    "prefill 80 everything alike": (lambda: attend_everything(HALF, 16, 8, 80, HALF), ["prefill_kernel"]),
    "prefill 256 everything float32": (lambda: attend_everything(SINGLE, 4, 1, 256, SINGLE), ["prefill_kernel"]),
    "backward 64": (lambda: backward(HALF, 64), GRADIENTS),
    "backward 128": (lambda: backward(HALF, 128), GRADIENTS),
    "backward 256": (lambda: backward(HALF, 256), GRADIENTS),
    "backward 256 float32": (lambda: backward(SINGLE, 256), GRADIENTS),
    "backward 128 float32": (lambda: backward(SINGLE, 128), GRADIENTS),
    "backward 64 float32": (lambda: backward(SINGLE, 64), GRADIENTS),
    "backward 64 everything": (lambda: backward_everything(HALF, 64, HALF), GRADIENTS),
    "backward 256 everything": (lambda: backward_everything(HALF, 256, HALF), GRADIENTS),
    "backward 128 everything float32 segment": (lambda: backward_everything(HALF, 128, HALF, SINGLE), GRADIENTS),
    "backward 128 float32 segment": (lambda: backward(HALF, 128, [plain(SINGLE, 2, 80, 128)]), GRADIENTS),
    "backward 256 everything float32": (lambda: backward_everything(SINGLE, 256, SINGLE), GRADIENTS),
    "project": (lambda: project(HALF, 8, 128, 8, 64), ["project_kernel"]),
    "project int8": (lambda: project(HALF, 8, 128, 8, 64, torch.int8, **SCALES), ["project_kernel"]),
    "project float32": (lambda: project(SINGLE, 8, 128, 8, 64), ["project_kernel"]),
    "merge": (
        lambda: backend.merge_states("triton", [torch.empty(1, 16, 64, 128)] * 2, [torch.empty(1, 16, 64)] * 2),
        ["merge_kernel"],
    ),
    "quantise": (lambda: backend.quantize("triton", torch.empty(1, 8, 64, 128, dtype=HALF)), ["quantise_kernel"]),
    "spread": (
        lambda: scatter.spread(torch.empty(1, 2, 40, 64), torch.zeros(1, 40, dtype=torch.int64), 70),
        ["spread_kernel"],
    ),
    "fuse": (lambda: fuse(HALF), ["fuse_kernel"]),
    "fuse layers": (lambda: fuse(HALF, halves=56), ["fuse_kernel"]),
    "fuse float32": (lambda: fuse(SINGLE), ["fuse_kernel"]),
    "fuse odd sizes": (lambda: fuse(HALF, 1003, dim=80, sharer_dim=72), ["fuse_kernel"]),
    "fuse float32 weights": (lambda: fuse(HALF, 1003, dim=80, sharer_dim=72, weights=SINGLE), ["fuse_kernel"]),
}  # fmt: skip


# Tensor cores' on sm_80: "ieee".
WITHOUT_PRODUCTS = (
    "prefill 256 float32", "prefill 256 float32 mask", "prefill 256 everything float32",
    "prefill 256 float32 mask and gate",
)  # fmt: skip
# On sm_90: logarithms of gates branch, and with a soft cap too the product of the tile before is under way meanwhile.
SERIALISED = ("prefill 128 masks",)
# Shapes that bench/static_gpu.py compiles for sm_80 and sm_90, and holds to the same limits.
STATIC = (
    "decode 64", "decode 128", "decode 128 int8", "decode 128 e4m3", "decode 128 float32", "absorbed 128",
    "absorbed 256", "absorbed 512", "prefill 64", "prefill 128", "prefill 128 float32", "backward 64", "backward 128",
    "project", "project float32", "merge", "quantise", "fuse", "fuse layers",
)  # fmt: skip


# Further shapes of kernels that other lines compile as well.
FURTHER = (
    "absorbed 256 64 rows", "absorbed 512 32 rows", "absorbed float32", "absorbed float32 projectors",
    "absorbed head dim 128 float32 16 rows", "absorbed head dim 256 float32", "absorbed head dim 64 float32 32 rows",
    "absorbed head dim 256 64 rows", "decode 64 all but a mask", "fuse float32 weights", "fuse odd sizes",
    "prefill 64 everything", "prefill 64 gate", "prefill 80 everything alike", "backward 64 float32",
    "backward 128 float32",
)  # fmt: skip


def targets_of(name: str, number: int) -> list[Target]:
    """All of them where the environment variable C2C_EVERY_TARGET asks for it, which takes minutes; else sm_90, which
    spills first, and for the lines that are not FURTHER ones the others in turn."""
    wanted = [target for target in TARGETS if not (name in STATIC and target in TARGETS[:2])]
    if "C2C_EVERY_TARGET" in os.environ:
        return wanted
    others = [] if name in FURTHER else [target for target in wanted if target != TARGETS[1]]
    turn = others[number % len(others)] if others else None
    return [target for target in wanted if target in (TARGETS[1], turn)]


CASES = [(name, target) for number, name in enumerate(CALLS) for target in targets_of(name, number)]


@pytest.mark.parametrize(("name", "target"), CASES, ids=[f"{n}-{t.backend}-{t.arch}" for n, t in CASES])
def test_compiles_without_spills(name, target):
    call, kernels = CALLS[name]
    launches: list[Launch] = []
    with executed_by(target, launches.append):
        call()
    assert [launch.kernel.__name__ for launch in launches] == kernels
    for launch in launches:
        kernel = compiled(launch, target).kernel
        found = usage(kernel, target)
        assert found.spills == 0, f"{launch.kernel.__name__}: {found}"
        assert found.shared <= SHARED_LIMIT[target.arch], f"{launch.kernel.__name__}: {found}"
        assert getattr(kernel.metadata, "tmem_size", 0) <= 512, "columns of sm_100's tensor memory"
        if target.arch == 80:  # whose tiles sm_86, sm_89 and sm_120 take
            assert found.shared <= 99 * 1024, f"{launch.kernel.__name__}: {found}"
        if launch.kernel.__name__ == "prefill_kernel" and target.arch in (80, 90):
            assert found.resident_warps >= 8, found
            products = "wgmma.mma_async" if target.arch == 90 else "mma.sync"
            assert products in kernel.asm["ptx"] or (name in WITHOUT_PRODUCTS and target.arch == 80)


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("prefill") and name not in SERIALISED])
def test_products_of_sm_90_do_not_wait_for_one_another(name):
    launches: list[Launch] = []
    with executed_by(TARGETS[1], launches.append):
        CALLS[name][0]()
    assert not serialised(compiled(launches[0], TARGETS[1]).kernel)
