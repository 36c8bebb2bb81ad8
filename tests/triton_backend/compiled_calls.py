"""The calls that the interpreter runs, through the compiler's front end: every option in combination with every other.

Python forgives what a compiled kernel does not: a name with two types in a branch, a dtype without an operation.
"""

from __future__ import annotations

import pytest
import torch
import triton
from attention_cases import Plan, SegmentPlan, build
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import DTYPES, plans, seeds, segments
from test_gradients import cotangents
from test_project_kv import build as build_projection
from torch_backward import operator_gradients
from triton._C.libtriton import ir
from triton.compiler import make_backend

import c2c_kernels as c2c
from c2c_kernels.backends import Backend
from c2c_kernels.backends.triton.launch import Launch, Target, executed_by
from c2c_kernels.backends.triton.offline import compiled

TARGET = Target("cuda", 80)


def front_end(source, target, options):
    """In place of `triton.compile`: Triton's IR of the kernel, verified, and no further."""
    backend = make_backend(target)
    options = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    assert module.verify(), source.fn
    return module


@pytest.fixture(scope="module", autouse=True)
def _offered():
    """The backend as if there were a GPU, its kernels through the front end alone."""
    import importlib

    record = Backend("triton", True, "", (), ("bfloat16", "float16", "float32"), "", ("cpu",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "compile", front_end)
        for name in ("merged_attention", "project_kv"):
            operator = importlib.import_module(f"c2c_kernels.ops.{name}")
            patch.setattr(operator, "choose", lambda *arguments: record)
        yield


def launched(call) -> list[str]:
    """The names of what `call` launches, each seen to compile."""
    launches: list[Launch] = []
    with executed_by(TARGET, launches.append):
        call()
    for launch in launches:
        compiled(launch, TARGET)
    return [launch.kernel.__name__ for launch in launches]


def attend(plan: Plan, seed: int) -> list[str]:
    plan.strategy = plan.strategy.replace("absorb", "auto")
    call = build(plan, seed)
    names = ("query", "key", "value", "segments")
    options = {name: value for name, value in call.items() if name not in names}
    return launched(
        lambda: c2c.merged_attention(
            *(call[name] for name in names), **options, return_lse=True, return_mass=True, backend="triton"
        )
    )


@given(plans(max_length=130, max_queries=70), seeds)
@settings(max_examples=60)
def test_attention(plan, seed):
    attend(plan, seed)


@given(plans(max_length=65, max_queries=17), seeds)
@settings(max_examples=30)
def test_gradients(plan, seed):
    plan.strategy = plan.strategy.replace("absorb", "auto")
    call, wanted = build(plan, seed), cotangents(plan, seed)
    launched(lambda: operator_gradients(call, wanted, "triton"))


@given(segments(65), st.sampled_from(DTYPES), st.sampled_from((16, 40, 64)), st.booleans(), st.booleans(), seeds)
@settings(max_examples=30)
def test_projection(part, dtype, dim, remove, apply, seed):
    segment, rope = build_projection(part, dtype, 2, 2, dim, remove, apply, seed)
    launched(lambda: c2c.project_kv(segment, rope=rope, backend="triton"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", [1, 70])
def test_every_option_at_once(q_len, dtype):
    parts = [
        SegmentPlan(130, gate="full", lengths=True, positions="shuffled", visibility="causal"),
        SegmentPlan(33, gate="head", quantised=True, index=True),
        SegmentPlan(70, 2, 24, 24, "low_rank", bias=True, gate="token"),
    ]
    plan = Plan(
        dtype, 2, 2, 4, q_len, 300, 40, 64, is_causal=True, window=40, softcap=2.0, sinks=True, lengths=True,
        mask="additive", query_positions=True, segments=parts,
    )  # fmt: skip
    projected = ["project_kernel"] * 2
    assert attend(plan, 3) == projected + (["split_kernel", "combine_kernel"] if q_len == 1 else ["prefill_kernel"])


def test_a_kernel_that_does_not_compile_is_noticed():
    @triton.jit
    def kernel(x, CHANGES: triton.language.constexpr):
        at = x
        if triton.language.load(x) > 0:
            at = 1.5
        triton.language.store(x, at)

    launch = Launch(kernel, 1, {"x": torch.empty(1), "CHANGES": True})
    with pytest.raises(triton.compiler.errors.CompilationError):
        compiled(launch, TARGET)
