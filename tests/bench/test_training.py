"""A training step beside plain autograd: the same gradients, and less than half of the memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from c2c_kernels.bench import training


@pytest.mark.parametrize("gates", [True, False])
def test_both_ways_give_the_same_gradients(gates: bool):
    assert training.differing(training.Size(shared=40, own=6, layers=2, gates=gates)) == ""


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what one step holds is Linux's to tell")


def peak(way: str, folder: Path, *size: str) -> int:
    """Bytes, of 4 layers and no more: the harder case, logits weigh more.

    In another folder than the checkout, whose package would go before the installed one and has no kernels.
    """
    command = [sys.executable, "-m", "c2c_kernels.bench.training", "--layers", "4", *size, "--peak", way]
    return int(subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout)


@linux
def test_a_step_holds_at_most_half_of_what_plain_autograd_holds(tmp_path):
    """At 2,048 tokens."""
    ours, plain = (peak(way, tmp_path) for way in training.WAYS)
    assert ours < plain / 2


@linux
def test_what_a_step_holds_is_linear_in_its_tokens(tmp_path):
    """Twice as many that were read and twice as many own ones; of plain autograd, which keeps scores, 2.5 times."""
    short, long = (peak("ours", tmp_path, "--shared", str(n), "--own", str(n // 16)) for n in (2048, 4096))
    assert long < 2 * short
