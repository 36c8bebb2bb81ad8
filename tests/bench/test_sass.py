"""Counting instructions of loops in machine code as nvdisasm prints it."""

from __future__ import annotations

import pytest
import sass

# A loop whose usual pass copies (block .L_x_1) and skips what runs now and then; an outer loop around it.
CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/              @P0 BRA `(.L_x_2) ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*0040*/                   IADD3 R4, R4, 0x10, RZ ;
.L_x_2:
        /*0050*/                   LDSM.16.M88.4 R8, [R5] ;
        /*0060*/                   HMMA.16816.F32 R12, R8, R10, R12 ;
        /*0070*/                   HMMA.16816.F32 R16, R8, R10, R16 ;
        /*0080*/                   NOP ;
        /*0090*/             @!P1 BRA `(.L_x_3) ;
        /*00a0*/                   FMUL R12, R12, R20 ;
        /*00b0*/                   HMMA.16816.F32 R16, R8, R10, R16 ;
.L_x_3:
        /*00c0*/              @P2 BRA `(.L_x_1) ;
        /*00d0*/              @P3 BRA `(.L_x_0) ;
        /*00e0*/                   EXIT ;
"""


def test_the_usual_pass_of_the_innermost_loop():
    """Two branches, a copy and its address, one load, one branch more: 6 others to 2 products."""
    assert sass.others_per_product(CODE) == 3.0


def test_products_of_warp_groups():
    """64 x 64 x 16 counts as 8 products, and needs no copy beside it: 4 others to 9 products."""
    code = CODE.replace("LDGSTS.E.BYPASS.128 [R3], [R4.64]", "NOP").replace(
        "HMMA.16816.F32 R12, R8, R10, R12", "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], R88, gsb0"
    )
    assert sass.others_per_product(code) == round(4 / 9, 2)


def test_a_loop_that_copies_nothing_is_not_one_of_those_meant():
    assert sass.others_per_product(CODE.replace("LDGSTS", "LDG")) == 0.0
    assert sass.others_per_product("        /*0000*/  EXIT ;") == 0.0


def test_a_branch_of_warps_that_have_parted_may_not_be_taken():
    code = CODE.replace("@P0 BRA `(.L_x_2)", "BRA.DIV UR4, `(.L_x_2)")
    assert sass.others_per_product(code) == 3.0


def test_control_flow():
    flow = sass.blocks(CODE)
    assert [block.following for block in flow] == [(1,), (2,), (4, 3), (4,), (6, 5), (6,), (2, 7), (1, 8), ()]
    assert [tuple(block.count) for block in flow] == [
        (0, 0, 1), (0, 0, 1), (0, 0, 1), (0, 1, 2), (2, 0, 2), (1, 0, 1), (0, 0, 1), (0, 0, 1), (0, 0, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["on PATH", "in triton's wheel", "nowhere"])
def test_the_disassembler(where, monkeypatch, tmp_path):
    beside = tmp_path / "backends" / "nvidia" / "bin" / "nvdisasm"
    beside.parent.mkdir(parents=True)
    beside.touch()
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(sass.shutil, "which", lambda name: "/bin/" + name if where == "on PATH" else None)
    monkeypatch.setattr(sass.importlib.util, "find_spec", lambda name: spec if "wheel" in where else None)
    wanted = {"on PATH": "/bin/nvdisasm", "in triton's wheel": str(beside), "nowhere": None}
    assert sass.disassembler() == wanted[where]
