"""bfloat16 by matrix tiles (AMX, or dot products): which machines have them, what a result depends on.

How exact they are is checked by the suites of every operator, which run on the best instruction set there is.
"""

from __future__ import annotations

import pathlib
import threading

import pytest
import torch
from error_rule import assert_as_exact

import c2c_kernels as c2c
from c2c_kernels import _cpu


def machine_flags() -> set[str]:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


NEEDED = {"amx_tile", "amx_bf16", "avx512_bf16"}
MISSING = NEEDED - machine_flags()
with_tiles = pytest.mark.skipif(bool(MISSING), reason=f"this processor has no {', '.join(sorted(MISSING))}")


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).bfloat16()


@with_tiles
def test_are_used_where_the_processor_has_them():
    assert _cpu.isa() == "amx_bf16"


@pytest.mark.skipif(not MISSING, reason="this processor has matrix tiles")
def test_are_refused_where_the_processor_has_none():
    assert _cpu.isa() != "amx_bf16"
    with pytest.raises(ValueError, match="amx_bf16"):
        _cpu.set_isa("amx_bf16")


@pytest.mark.skipif("avx512_bf16" not in machine_flags(), reason="this processor has no avx512_bf16")
def test_dot_products_are_another_kernel_and_as_exact():
    torch.manual_seed(3)
    query, key, value = normal(1, 4, 70, 64), normal(1, 2, 150, 64), normal(1, 2, 150, 64)
    call = {"is_causal": True, "scale": 0.125}
    found = {}
    try:
        for isa in ("avx512", "avx512_bf16"):
            _cpu.set_isa(isa)
            found[isa] = c2c.merged_attention(query, key, value, backend="cpu", **call)
    finally:
        _cpu.set_isa(None)
    oracle = c2c.merged_attention(*(t.double() for t in (query, key, value)), backend="reference", **call)
    mask = torch.ones(70, 150, dtype=torch.bool).tril(80)
    torchs = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.125, enable_gqa=True
    )
    assert not torch.equal(found["avx512"], found["avx512_bf16"])
    for isa, out in found.items():
        assert_as_exact(isa, out, torchs, oracle)


def attention_call():
    """Rows with two heads to a stored head, own tokens, a stored segment and one that is projected on the way."""
    torch.manual_seed(1)
    proj = normal(2, 48, 80, scale=0.1), normal(2, 40, 80, scale=0.1)
    plain = c2c.SharerSegment(normal(1, 2, 300, 48), normal(1, 2, 300, 40))
    raw = c2c.SharerSegment(normal(1, 2, 530, 40), normal(1, 2, 530, 40), *proj)
    return [normal(1, 4, 70, 48), normal(1, 2, 150, 48), normal(1, 2, 150, 40)], [plain, raw]


def everything(tensors, segments) -> list[torch.Tensor]:
    results = []
    for strategy in ("absorb", "materialize"):
        results += c2c.merged_attention(
            *tensors, segments, is_causal=True, strategy=strategy, return_lse=True, backend="cpu"
        )
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = c2c.merged_attention(*leaves, segments[:1], is_causal=True, backend="cpu")
    return [*results, *torch.autograd.grad(out.float().square().sum(), leaves)]


def test_results_do_not_depend_on_threads():
    call = attention_call()
    threads = torch.get_num_threads()
    try:
        first = everything(*call)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for one, other in zip(first, everything(*call), strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rank", [0, 72])
def test_projection_does_not_depend_on_threads_or_on_tokens_beside(rank):
    """Tokens of a tile are cut as threads need; up to 8 of a tile are summed otherwise, so none are cut off."""
    torch.manual_seed(2)
    proj = (normal(3, 24, rank), normal(rank, 1088, scale=0.03)) if rank else normal(3, 24, 1088, scale=0.03)
    raw = normal(1, 2, 140, 544)

    def project(tokens):
        return c2c.project_kv(c2c.SharerSegment(tokens, tokens, proj, proj), backend="cpu")[0]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = project(raw)
        assert torch.equal(project(raw[:, :, 20:51]), whole[:, :, 20:51])
        for count in (2, 5):
            torch.set_num_threads(count)
            assert torch.equal(project(raw), whole)
    finally:
        torch.set_num_threads(threads)


@with_tiles
def test_take_turns_with_torch():
    """torch multiplies by tiles too, on the same threads and on others; neither disturbs the other."""
    call = attention_call()
    a, b = normal(256, 256), normal(256, 256)
    product, ours = a @ b, everything(*call)
    found = []

    def take_turns():
        for _ in range(3):
            again = everything(*call)
            found.append(all(torch.equal(x, y) for x, y in zip(ours, again, strict=True)))
            found.append(torch.equal(a @ b, product))

    workers = [threading.Thread(target=take_turns) for _ in range(2)]
    for worker in workers:
        worker.start()
    take_turns()
    for worker in workers:
        worker.join()
    assert len(found) == 18 and all(found)
