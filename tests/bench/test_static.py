"""Limits over static figures of GPU kernels, and what is kept of them. `.ci/run` makes the figures themselves."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import static_gpu
from static_limits import HELD, NOT_REACHED, Limit, not_reached, problems, reached
from static_page import page
from static_records import Figures, Kernel

KERNEL = Kernel("split_kernel", 8, 4, 128, 0, 4096, 16, 1000, 15.8, 0.99, 0.01, "wgmma", 10, 1.5)
FIGURES = Figures("decode Model bfloat16", 80, kernels=(KERNEL,), bytes_over_least=1.04, flops_over_least=8.0)


@pytest.mark.parametrize(
    ("figure", "good", "bad"),
    [
        ("bytes_over_least", 1.04, 1.03), ("flops_over_least", 8.0, 7.9), ("registers", 128, 127), ("spills", 0, -1),
        ("shared", 4096, 4095), ("bank_conflicts", 0.01, 0.005), ("launches", 1, 0), ("resident_warps", 16, 17),
        ("sector_use", 0.99, 0.995), ("products", "wgmma", "mma"), ("others", 1.5, 1.4),
    ],
)  # fmt: skip
def test_a_figure_that_is_worse_is_a_problem(figure, good, bad):
    assert problems([FIGURES], [Limit(figure, good)]) == []
    (problem,) = problems([FIGURES], [Limit(figure, bad)])
    assert figure in problem and "decode Model bfloat16" in problem and "sm_80" in problem


def test_the_last_line_that_matches_counts():
    limits = [
        Limit("spills", 0),
        Limit("spills", 40, "decode*", "split*", (80,), NOT_REACHED),
        Limit("spills", 8, "decode*", archs=(90,), standing=HELD),
    ]
    spilling = replace(FIGURES, kernels=(replace(KERNEL, spills=40),))
    other = replace(spilling, arch=90)
    assert [p.partition(":")[0] for p in problems([spilling, other], limits)] == [
        "decode Model bfloat16 split_kernel on sm_90"
    ]
    assert not_reached([spilling], limits) == ["decode Model bfloat16 split_kernel on sm_80: spills 40, wanted 0"]
    assert reached([spilling], limits) == []
    assert not_reached([FIGURES], limits) == []
    assert [line.partition(" (")[0] for line in reached([FIGURES], limits)] == ["spills 40"]


def test_a_line_may_be_of_one_backend():
    cuda = replace(FIGURES, backend="cuda")
    limits = [Limit("spills", 0), Limit("launches", 0, backend="cuda")]
    assert problems([FIGURES], limits, whole=False) == []
    assert len(problems([FIGURES, cuda], limits)) == 1
    assert "matches no figure" in problems([FIGURES], limits)[0]


def test_figures_of_cuda_stand_beside_tritons():
    cuda = replace(FIGURES, backend="cuda", bytes_over_least=1.01, kernels=(replace(KERNEL, name="c2c_decode"),))
    text = page([replace(FIGURES, kernels=(replace(KERNEL, others=0.0),)), cuda], [], "3.7")
    calls = next(line for line in text.splitlines() if line.startswith("| decode Model bfloat16 |"))
    assert calls == "| decode Model bfloat16 | split | 1.040 | 1.010 | 8.00 | 8.00 | all |"
    kernels = [line for line in text.splitlines() if line.startswith("| decode Model bfloat16:")]
    assert [line.rsplit("|", 2)[1].strip() for line in kernels] == ["–", "1.50"] and "c2c_decode" in kernels[1]
    for figures in (FIGURES, cuda):
        assert Figures.from_json(json.loads(json.dumps(figures.as_json()))) == figures


def test_wrong_results_and_lines_that_match_nothing_are_problems():
    wrong = Figures("decode Model", 80, problem="wrong: out is off by 3")
    assert problems([wrong], []) == ["decode Model on sm_80: wrong: out is off by 3"]
    refused = Figures("decode Model", 80, problem="refused: no such dtype")
    assert problems([refused], [Limit("refused", True)]) == []
    assert "refused is True" in problems([refused], [Limit("refused", False)])[0]
    lines = [Limit("refused", False), Limit("refused", True, standing=NOT_REACHED)]
    assert problems([FIGURES], lines) == [] and len(reached([FIGURES], lines)) == 1
    (problem,) = problems([FIGURES], [Limit("spills", 0, "prefil*")])
    assert "matches no figure" in problem
    assert problems([FIGURES], [Limit("spills", 0, "prefil*")], whole=False) == []


def test_kept_figures_are_those_of_the_page():
    kept = static_gpu.kept()
    data = json.loads((static_gpu.HERE / "static_gpu.json").read_text(encoding="utf-8"))
    assert [figures.as_json() for figures in kept] == [
        {**each, "kernels": tuple(each["kernels"])} for each in data["figures"]
    ]
    assert page(kept, not_reached(kept, static_gpu.LIMITS), data["triton"]) == (
        static_gpu.HERE / "static_gpu.md"
    ).read_text(encoding="utf-8")
    unmatched = [problem for problem in problems(kept, static_gpu.LIMITS) if "matches no figure" in problem]
    assert unmatched == []


def test_without_the_simulator_the_check_says_why(monkeypatch, capsys):
    monkeypatch.setattr(static_gpu, "unavailable", lambda: "triton is not installed")
    assert static_gpu.main(["--check"]) == 0
    assert static_gpu.main([]) == 1
    assert capsys.readouterr().out.count("static figures skipped: triton is not installed") == 2
