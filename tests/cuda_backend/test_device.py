"""This folder's tests on a GPU (`pytest -m gpu`): the calls that are simulated elsewhere, run by the device.

Not run on hardware yet.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import c2c_kernels as c2c
from c2c_kernels.backends import cuda

HERE = Path(__file__).parent
OTHERS = (Path(__file__).name, "test_counters.py")  # what is counted there a device does not count
FILES = sorted(file.name for file in HERE.glob("test_*.py") if file.name not in OTHERS)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
    pytest.mark.skipif(cuda._cuda is None, reason=cuda._why_not or "there is no extension"),
]


@pytest.mark.parametrize("name", FILES)
def test_simulated_calls(name):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)],
        env={**os.environ, "C2C_CUDA_DEVICE": "cuda", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-20000:] + result.stderr[-4000:]


@pytest.mark.parametrize("q_len", [1, 70])
def test_a_captured_call_follows_its_inputs(q_len):
    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    query, key, value = numbers(1, 8, q_len, 64), numbers(1, 2, 300, 64), numbers(1, 2, 300, 64)
    segment = c2c.SharerSegment(numbers(1, 2, 130, 64), numbers(1, 2, 130, 64))
    raw = c2c.SharerSegment(segment.key, segment.value, numbers(2, 64, 128) / 11, numbers(2, 64, 128) / 11)

    def call() -> torch.Tensor:  # one query absorbs the projectors of the raw segment
        return c2c.merged_attention(query, key, value, [segment, raw], is_causal=True, backend="cuda")

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    query.copy_(numbers(*query.shape))
    graph.replay()
    assert torch.equal(captured, call())


def test_the_fastest_backend_is_chosen():
    query, cache = (torch.randn(1, 2, n, 64, device="cuda", dtype=torch.float16) for n in (1, 90))
    out = c2c.merged_attention(query, cache, cache)
    assert torch.equal(out, c2c.merged_attention(query, cache, cache, backend="cuda"))
