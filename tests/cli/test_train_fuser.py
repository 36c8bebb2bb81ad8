"""The command `train --fuser c2c`, on tiny models."""

from __future__ import annotations

import json

import pytest
import torch

import c2c_kernels as c2c
from c2c_kernels.cli import main


def arguments(models, output, *more):
    return [
        *("train", "--fuser", "c2c", "--sharer", models[0], "--receiver", models[1], "--output", str(output)),
        *("--steps", "2", "--accumulate", "1", "--context", "40", "--continuation", "10", "--threads", "1"),
        *("--held-out", "1", "--validations", "1", *more),
    ]


SIZES = ("--hidden", "16", "--inner", "24")


def test_trains_and_goes_on(models, documents, tmp_path, capsys):
    first, second = tmp_path / "f.safetensors", tmp_path / "g.safetensors"
    more = ("--corpus", str(documents), "--questions", "made-up", "--most-questions", "6")
    assert main(arguments(models, first, *more, *SIZES, "--layer-map", "1,0", "--json")) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["steps"] == 2 and found["bytes"] == first.stat().st_size and 0 <= found["open_gates"] <= 4
    assert "held-out text" in printed.err and "(without fusing " in printed.err
    fuser = c2c.C2CFuser.load(first)
    assert fuser.layer_map == {0: 1, 1: 0} and fuser.shape.hidden == 16
    assert (fuser.sharer.name, fuser.receiver.name) == tuple(models)
    command = arguments(models, second, "--corpus", str(documents), "--storage", "bfloat16")
    command.insert(1, str(first))
    assert main(command) == 0
    line = capsys.readouterr().out
    assert "2 steps in" in line and "of 4 gates open" in line
    assert next(c2c.C2CFuser.load(second).parameters()).dtype == torch.bfloat16
    assert {path.name for path in tmp_path.iterdir()} == {"f.safetensors", "g.safetensors"}


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--storage", "int8"), "--storage int8 is for projectors"),
        (("--distill", "0.5"), "--distill, --match and --repeat-weight are for projectors"),
        (("--repeat-weight", "0.5"), "--distill, --match and --repeat-weight are for projectors"),
        (("--average", "0.5"), "--average is for projectors"),
        (("--layer-map", "0,9"), "to sharer layer 9: the sharer has layers 0..1"),
        (("--layer-map", "first"), "layer_map must be one of last_aligned, k_nearest"),
        (("--num-layers", "2"), "num_layers must be an integer of at least 3, got 2"),
        (("--lr", "-1"), "lr must be a number above 0"),
    ],
)
def test_what_is_refused(models, documents, tmp_path, capsys, more, match):
    assert main(arguments(models, tmp_path / "f.safetensors", "--corpus", str(documents), *SIZES, *more)) == 1
    assert match in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_options_of_the_other_kind_are_refused(models, documents, tmp_path, capsys):
    plain = ["train", "--steps", "1", "--corpus", str(documents), "--output", str(tmp_path / "f.safetensors")]
    assert main(plain) == 1
    assert "a projector file is wanted" in capsys.readouterr().err
    assert main([*plain, str(documents), "--hidden", "8"]) == 1
    assert "--hidden goes with --fuser" in capsys.readouterr().err
