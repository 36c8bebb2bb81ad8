"""`merge_states` and `quantize_kv` on the CUDA backend, their compiled PTX run by ptxsim through the operators."""

from __future__ import annotations

import pytest
import torch
from attention_cases import numbers
from error_rule import assert_as_exact
from simulated import ARCHS, Simulator, missing

import c2c_kernels as c2c
from c2c_kernels.backends import reference

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def check_merge(outs: list[torch.Tensor], lses: list[torch.Tensor], arch: int) -> None:
    with Simulator(arch).installed() as simulated:
        out, lse = c2c.merge_states(outs, lses, backend="cuda")
    assert simulated.names() == ["c2c_merge_states"] * bool(lse.numel())
    exact = reference.merge_states([x.double() for x in outs], [x.double() for x in lses])
    theirs = reference.merge_states(outs, lses)
    assert_as_exact("out", out, theirs[0].to(out.dtype), exact[0])
    assert_as_exact("lse", lse, theirs[1], exact[1])


def check_codes(key: torch.Tensor, value: torch.Tensor, arch: int) -> None:
    """The reference's, to the bit."""
    with Simulator(arch).installed() as simulated:
        found = c2c.quantize_kv(key, value, backend="cuda")
    assert simulated.names() == ["c2c_quantize"] * 2 * bool(key.numel())
    for codes, scale, x in ((found[0], found[2], key), (found[1], found[3], value)):
        wanted = reference.quantize(x)
        assert torch.equal(codes, wanted[0])
        assert torch.equal(scale.nan_to_num(-1.0), wanted[1].nan_to_num(-1.0))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("dtype", "shape", "count", "spread"),
    [(BF16, (2, 3, 5, 128), 3, 1.0), (F16, (1, 2, 33, 40), 32, 3000.0), (BF16, (2, 1, 7, 13), 1, 5.0)],
    ids=["usual", "many far apart", "odd"],
)
def test_merge_states(dtype, shape, count, spread, arch):
    generator = torch.Generator().manual_seed(3)
    outs = [numbers(generator, shape, dtype, strided=True) for _ in range(count)]
    lses = [numbers(generator, shape[:3], F32, strided=True, spread=spread) for _ in range(count)]
    lses[0] = lses[0].to(dtype)
    lses[-1][0, 0, :2] = -torch.inf
    outs[-1][0, 0, :2] = torch.nan  # not read
    for lse in lses:
        lse[-1, -1, -1] = -torch.inf  # a row that nobody has
    check_merge(outs, lses, arch)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "dim"), [(BF16, 128), (F16, 64), (BF16, 13), (F16, 200)])
def test_quantize_kv_gives_the_references_codes(dtype, dim, arch):
    generator = torch.Generator().manual_seed(4)
    key, value = (numbers(generator, (2, 3, 11, dim), dtype, strided=True, spread=spread) for spread in (1.0, 300.0))
    key[0, 0, 0], key[0, 0, 1, 0], key[0, 0, 2, 1] = 0, torch.nan, -torch.inf
    key[0, 0, 3] = 2 * torch.finfo(dtype).smallest_normal * key[0, 0, 3]  # denormal scales
    value[1, 2, 3, 5:] = 0
    check_codes(key, value, arch)


def test_rows_of_no_numbers_and_no_rows():
    with Simulator(80).installed() as simulated:
        _, lse = c2c.merge_states([torch.zeros(1, 2, 3, 0).to(BF16)] * 2, [torch.zeros(1, 2, 3)] * 2, backend="cuda")
        _, _, scale, _ = c2c.quantize_kv(*(torch.zeros(1, 2, 3, 0).to(BF16) for _ in range(2)), backend="cuda")
        c2c.quantize_kv(*(torch.zeros(1, 2, 0, 16).to(BF16) for _ in range(2)), backend="cuda")
    assert simulated.names() == ["c2c_merge_states", "c2c_quantize", "c2c_quantize"]
    assert torch.allclose(lse, torch.full_like(lse, 2).log())
    assert not scale.any()
