"""Segments that attention does not read as they are stored: projected, gathered or float8, across several stages."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from error_rule import assert_as_exact

import c2c_kernels as c2c

STAGE = 512
LENGTHS = torch.tensor([3 * STAGE + 37, STAGE, 0])


def case(dtype: torch.dtype, storage: str, length: int = 3 * STAGE + 37):
    torch.manual_seed(length)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape) * scale).to(dtype)

    raw = normal(3, 2, length + 9, 24), normal(3, 2, length + 9, 24)
    extra = {}
    if storage == "float8":
        raw = tuple(t.to(torch.float8_e4m3fn) for t in raw)
        extra = {name: torch.rand(3, 2, length + 9) + 0.5 for name in ("key_scale", "value_scale")}
    elif storage == "int8":
        *raw, key_scale, value_scale = c2c.quantize_kv(*raw)
        extra = {"key_scale": key_scale, "value_scale": value_scale}
    if storage == "index":
        extra["index"] = torch.randint(0, length + 9, (3, length))
    else:
        raw = tuple(t[:, :, :length] for t in raw)
        extra = {name: t[:, :, :length] for name, t in extra.items()}
    segment = c2c.SharerSegment(
        *raw,
        key_proj=normal(2, 32, 48, scale=48**-0.5),
        value_proj=normal(2, 32, 48, scale=48**-0.5),
        key_bias=normal(2, 32),
        value_bias=normal(2, 32),
        gate=torch.rand(3, 4, length),
        lengths=LENGTHS.clamp(max=length),
        positions=torch.arange(length).expand(3, length),
        visibility="causal",
        **extra,
    )
    own = normal(3, 2, 40, 32)
    return normal(3, 4, 40, 32), own, normal(3, 2, 40, 32), segment


def doubled(segment: c2c.SharerSegment) -> c2c.SharerSegment:
    """The segment with everything that float64 can hold in float64."""
    fields = {field.name: getattr(segment, field.name) for field in dataclasses.fields(segment)}
    return c2c.SharerSegment(
        **{name: t.double() if torch.is_tensor(t) and t.dtype == torch.float32 else t for name, t in fields.items()}
    )


@pytest.mark.parametrize("storage", ["plain", "index", "float8", "int8"])
@pytest.mark.parametrize("strategy", ["materialize", "absorb"])
@pytest.mark.parametrize("q_len", [1, 5, 40])
def test_stages_match_the_reference(storage, strategy, q_len):
    query, key, value, segment = case(torch.float32, storage)
    query = query[:, :, :q_len]
    positions = torch.arange(700, 700 + q_len).expand(3, q_len)
    options = {"is_causal": True, "query_positions": positions, "return_lse": True, "return_mass": True}
    ours = c2c.merged_attention(query, key, value, [segment], strategy=strategy, backend="cpu", **options)
    torchs = c2c.merged_attention(query, key, value, [segment], strategy=strategy, backend="reference", **options)
    oracle = c2c.merged_attention(
        *(t.double() for t in (query, key, value)), [doubled(segment)], backend="reference", **options
    )
    for name, *results in zip(("out", "lse", "mass"), ours, torchs, oracle, strict=True):
        assert_as_exact(name, *results)


@pytest.mark.parametrize("strategy", ["materialize", "absorb"])
def test_stages_do_not_depend_on_batch_or_threads(strategy):
    query, key, value, segment = case(torch.bfloat16, "float8")
    together = c2c.merged_attention(query, key, value, [segment], strategy=strategy, backend="cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(
            together, c2c.merged_attention(query, key, value, [segment], strategy=strategy, backend="cpu")
        )
    finally:
        torch.set_num_threads(threads)
    row = slice(0, 1)
    alone = c2c.SharerSegment(
        segment.key[row], segment.value[row], segment.key_proj, segment.value_proj,
        key_bias=segment.key_bias, value_bias=segment.value_bias, gate=segment.gate[row],
        lengths=segment.lengths[row], positions=segment.positions[row], visibility="causal",
        key_scale=segment.key_scale[row], value_scale=segment.value_scale[row],
    )  # fmt: skip
    assert torch.equal(
        together[row],
        c2c.merged_attention(query[row], key[row], value[row], [alone], strategy=strategy, backend="cpu"),
    )


MEMORY = """
import resource, sys, torch
import c2c_kernels as c2c
torch.set_num_threads(2)
length, strategy, storage = int(sys.argv[1]), sys.argv[2], sys.argv[3]
raw = torch.randn(1, 2, length, 64).to(getattr(torch, storage))
weights = torch.randn(8, 128, 128)
query, own = torch.randn(1, 16, 1, 128), torch.randn(1, 8, 16, 128)
scale = torch.ones(1, 2, length) if storage.startswith("float8") else None
few = None if scale is None else scale[:, :, :600]
small = c2c.SharerSegment(raw[:, :, :600], raw[:, :, :600], weights, weights, key_scale=few, value_scale=few)
c2c.merged_attention(query, own, own, [small], strategy=strategy, backend="cpu")
segment = c2c.SharerSegment(raw, raw, weights, weights, key_scale=scale, value_scale=scale)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
c2c.merged_attention(query, own, own, [segment], strategy=strategy, backend="cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KB on Linux")
@pytest.mark.parametrize(
    ("strategy", "storage"), [("materialize", "float32"), ("absorb", "float32"), ("absorb", "float8_e4m3fn")]
)
def test_memory_does_not_grow_with_the_cache(strategy, storage, tmp_path):
    # 65,536 tokens in receiver space are 512 MB, the same gathered as raw float32 tokens 64 MB.
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, "65536", strategy, storage],
        cwd=tmp_path,  # not where the sources are: the installed package is meant
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 16 * 1024
