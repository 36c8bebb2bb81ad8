"""What windows, absorbed decode and project_kv do, counted by the simulator: products, shared memory, sectors.

The usual shapes, causal prefill among them, are held to limits by `bench/static_gpu.py --check`, which `.ci/run` runs.
"""

from __future__ import annotations

import pytest
import torch
from simulated import ARCHS, Simulator, missing

import c2c_kernels as c2c

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

DTYPE = torch.bfloat16


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(DTYPE)


def check_memory(counters) -> None:
    """Requests of shared memory without conflicts, written sectors full, nothing spilled."""
    done, ideal = (
        sum(counters[f"shared_{kind}_wavefronts{end}"] for kind in ("load", "store")) for end in ("", "_ideal")
    )
    assert ideal >= 0.95 * done
    assert counters["global_store_bytes"] == 32 * counters["global_store_sectors"]
    assert counters["local_bytes"] == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_window_skips_tokens_before_it(arch):
    length, window, dim = 2048, 100, 64
    with Simulator(arch).installed() as simulated:
        c2c.merged_attention(
            *(numbers(1, 1, length, dim) for _ in range(3)), is_causal=True, window=window, backend="cuda"
        )
    (ran,) = simulated.ran
    assert ran.counters["mma_flops"] <= 2.5 * 4 * dim * length * window  # tiles of 32 or 64 rows and 64 tokens


@pytest.mark.parametrize("arch", ARCHS)
def test_projection(arch):
    """No product of tokens that are not there, keys and values read once per tile."""
    raw, proj = numbers(1, 8, 256, 64), numbers(2, 128, 512)
    with Simulator(arch).installed() as simulated:
        c2c.project_kv(c2c.SharerSegment(raw, raw, proj, proj, lengths=torch.tensor([128])), backend="cuda")
    (ran,) = simulated.ran
    assert ran.counters["mma_flops"] == 2 * 2 * 128 * 256 * 512
    assert ran.counters["cp_async_bytes"] == 2 * 2 * (128 + 128) * 512 * 2
    check_memory(ran.counters)


@pytest.mark.parametrize("heads", [2, 8])
def test_absorbed_decode(heads):
    """Raw tokens are read once for 32 rows, without conflicts, in two launches."""
    raw, proj, none = numbers(1, heads, 1024, 64), numbers(8, 64, heads * 64), numbers(1, 8, 0, 64)
    segment = c2c.SharerSegment(raw, raw, proj, proj)
    with Simulator(80).installed() as simulated:
        c2c.merged_attention(numbers(1, 32, 1, 64), none, none, [segment], strategy="absorb", backend="cuda")
    split, _ = simulated.ran
    assert split.counters["cp_async_bytes"] == 2 * 1024 * heads * 64 * 2
    for _, counters in simulated.ran:
        assert counters.bank_conflicts == 0
