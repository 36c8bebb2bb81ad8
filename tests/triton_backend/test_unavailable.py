"""What a machine without triton or without a GPU pays for the Triton backend, nothing, and what it is told."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from error_rule import assert_as_exact

import c2c_kernels

INSTALLED = Path(c2c_kernels.__file__).parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
WITHOUT = "import sys; sys.modules['triton'] = None"  # as if it were not installed
NOT_INSTALLED = "triton is not installed: pip install 'c2c-kernels[triton]'"
NO_GPU = "torch finds no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
VERIFIED = (
    "verified: in Triton's interpreter; compiled ahead of time for sm_80, sm_90, sm_100 and gfx942; the PTX for sm_80 "
    "and sm_90 run in a simulator; not run on hardware"
)


def python(code: str, before: str = "", *arguments: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    cleared = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "C2C_BACKEND")}
    paths = os.pathsep.join([str(INSTALLED), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", f"{before}\n{textwrap.dedent(code)}", *arguments],
        cwd=Path(__file__).parent,  # not the checkout: its package goes before the installed one there
        env={**cleared, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


CALLS = """
    import json, sys, torch, c2c_kernels as c2c
    query, key = torch.randn(1, 4, 3, 16, requires_grad=True), torch.randn(1, 2, 5, 16)
    raw, proj = torch.randn(1, 1, 6, 8), torch.randn(2, 16, 8)
    segment = c2c.SharerSegment(raw, raw, proj, proj)
    c2c.merged_attention(query, key, key, [segment], is_causal=True).sum().backward()
    c2c.project_kv(segment)
    c2c.merge_states([query.detach()], [query.detach()[..., 0]])
    c2c.quantize_kv(key, key)
    records = {record.name: record for record in c2c.backends()}
    assert records["cpu"].available
    from c2c_kernels.cli import main
    main(["info"])
    print(json.dumps(sorted(name for name in sys.modules if name.partition(".")[0] == "triton")))
"""


@needs_triton
@no_gpu
def test_neither_import_nor_calls_on_the_cpu_import_triton():
    assert json.loads(python(CALLS).splitlines()[-1]) == []


@no_gpu
@pytest.mark.parametrize(
    ("before", "reason"),
    [(WITHOUT, NOT_INSTALLED), pytest.param("", NO_GPU, marks=needs_triton)],
    ids=["not installed", "no GPU"],
)
def test_the_reason_is_told_everywhere(before, reason):
    told = json.loads(
        python(
            """
            import json, os, torch, c2c_kernels as c2c
            (record,) = (r for r in c2c.backends() if r.name == "triton")
            x = torch.randn(1, 2, 3, 16)
            calls = {
                "merged_attention": lambda **o: c2c.merged_attention(x, x, x, **o),
                "project_kv": lambda **o: c2c.project_kv(c2c.SharerSegment(x, x), **o),
                "merge_states": lambda **o: c2c.merge_states([x], [x[..., 0]], **o),
                "quantize_kv": lambda **o: c2c.quantize_kv(x, x, **o),
            }
            told = {"available": record.available, "reason": record.reason, "verified": record.verified}
            for name, call in calls.items():
                call()  # the fastest that runs here
                for by in ("argument", "environment"):
                    try:
                        if by == "environment":
                            os.environ["C2C_BACKEND"] = "triton"
                        call(**({"backend": "triton"} if by == "argument" else {}))
                    except ValueError as error:
                        told[f"{name} by {by}"] = str(error)
                    os.environ.pop("C2C_BACKEND", None)
            print(json.dumps(told))
            """,
            before,
        )
    )
    assert told.pop("available") is False
    assert told.pop("reason") == reason
    assert f"verified: {told.pop('verified')}" == VERIFIED
    assert len(told) == 8
    for call, message in told.items():
        assert message == f"{call.split()[0]} cannot run on the backend asked for. triton: {reason}"


@no_gpu
@pytest.mark.parametrize(
    ("before", "reason"),
    [(WITHOUT, NOT_INSTALLED), pytest.param("", NO_GPU, marks=needs_triton)],
    ids=["not installed", "no GPU"],
)
def test_the_command_tells_it(before, reason):
    code = "from c2c_kernels.cli import main; main(['info'])"
    lines = [line.strip() for line in python(code, before).splitlines()]
    at = lines.index(f"triton      not available: {reason}")
    assert lines[at + 1] == VERIFIED
    code = """
        import contextlib, io
        from c2c_kernels.cli import main
        with contextlib.redirect_stderr(io.StringIO()) as told:
            assert main(["tune"]) == 1
        print(told.getvalue())
    """
    wanted = f"c2c-kernels: tune measures on a GPU, and the triton backend is not available: {reason}"
    assert python(code, before).strip() == wanted


@needs_triton
@pytest.mark.parametrize("yes", ["1", "true", "ON"])
def test_the_interpreter_is_there_by_name(yes):
    """Whatever triton takes for yes."""
    code = """
        import json, sys, torch, triton, c2c_kernels as c2c
        (record,) = (r for r in c2c.backends() if r.name == "triton")
        x = torch.tensor(json.loads(sys.argv[1]))
        out = c2c.merged_attention(x, x, x, backend="triton")
        print(json.dumps([record.available, record.isa, triton.knobs.runtime.interpret, out.tolist()]))
    """
    x = torch.randn(1, 2, 3, 16)
    *record, out = json.loads(python(code, "", json.dumps(x.tolist()), TRITON_INTERPRET=yes))
    assert record == [True, "interpreter", True]
    theirs, exact = (c2c_kernels.merged_attention(t, t, t, backend="reference") for t in (x, x.double()))
    assert_as_exact("out", torch.tensor(out), theirs, exact)
    told = python("from c2c_kernels.cli import main; main(['info'])", TRITON_INTERPRET=yes)
    assert "triton      where asked for by name; bfloat16, float16, float32; interpreter" in told


@needs_triton
@no_gpu
@pytest.mark.parametrize("no", ["0", "", "no"])
def test_no_interpreter_where_it_is_not_asked_for(no):
    code = """
        import triton, c2c_kernels as c2c
        (record,) = (r for r in c2c.backends() if r.name == "triton")
        print(record.available, triton.knobs.runtime.interpret)
    """
    assert python(code, TRITON_INTERPRET=no).split() == ["False", "False"]
