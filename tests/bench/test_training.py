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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what one step holds is Linux's to tell")
def test_a_step_holds_at_most_half_of_what_plain_autograd_holds(tmp_path):
    """At 2,048 tokens; of fewer layers than the receiver has, which is the harder case: logits weigh more.

    In another folder than the checkout, whose package would go before the installed one and has no kernels.
    """
    command = [sys.executable, "-m", "c2c_kernels.bench.training", "--layers", "4", "--peak"]
    ours, plain = (
        int(subprocess.run([*command, way], cwd=tmp_path, check=True, capture_output=True, text=True).stdout)
        for way in training.WAYS
    )
    assert ours < plain / 2
