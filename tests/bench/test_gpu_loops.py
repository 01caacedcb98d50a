"""Loops read from machine code: what belongs to them, which one does the work, and what its instructions are."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cierzo.bench.gpu import loops
from cierzo.bench.gpu.loops import Loop, class_of, main_loop

END = """
    EXIT ;
.L_trap:
    BRA `(.L_trap) ;
    NOP ;
"""
# Copies begin before the loop, which multiplies what came two turns ago; the last two turns' sums follow it.
PIPELINED = """
    LDGSTS.E.BYPASS.128 [R12], desc[UR4][R2.64] ;
    LDGDEPBAR ;
    @P1 EXIT ;
.L_x_0:
    DEPBAR.LE SB0, 0x6 ;
    BAR.SYNC.DEFER_BLOCKING 0x0 ;
    F2FP.F16.E4M3.UNPACK_B R166, R157.reuse ;
    F2F.BF16.F16 R206, R166 ;
    WARPGROUP.ARRIVE ;
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], R24, gsb0 ;
    WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    @!P3 LDGSTS.E.BYPASS.128 [R12+0x800], desc[UR4][R2.64], P3 ;
    LDGSTS.E [R13], desc[UR4][R4.64] ;
    LDGDEPBAR ;
    @!P3 BRA `(.L_x_0) ;
    WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    FADD R1, R2, R3 ;
    STG.E.128 desc[UR4][R2.64], R4 ;
"""
NESTED = """
    MOV R1, R2 ;
.L_x_1:
    LDG.E R4, desc[UR4][R2.64] ;
    LDG.E R5, desc[UR4][R2.64] ;
.L_x_0:
    HMMA.16816.F32.BF16 R24, R8, R10, R24 ;
    @P0 BRA `(.L_x_0) ;
    FADD R1, R2, R3 ;
    @P1 BRA `(.L_x_1) ;
"""
# A barrier is polled within the loop, its slow path lies behind it, and blocks are passed over.
WITH_BRANCHES = """
.L_x_0:
    IMAD.SHL.U32 R0, R0, 0x4, RZ ;
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
    @!P0 BRA `(.L_x_4) ;
.L_x_1:
    HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR12].tnspB, R24, gsb0 ;
    WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
    BSSY B0, `(.L_x_3) ;
    @P2 BRA `(.L_x_2) ;
    FMUL R1, R2, R3 ;
    FMUL R2, R2, R3 ;
    BSYNC B0 ;
.L_x_2:
    MUFU.EX2 R1, R2 ;
    BSYNC B0 ;
.L_x_3:
    @UP0 UTMALDG.2D [UR8], [UR14] ;
    BRA.U UP1, `(.L_x_0) ;
    EXIT ;
.L_x_4:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
    @!P0 BRA `(.L_x_4) ;
    BRA `(.L_x_1) ;
"""


def code_of(lines: str, name: str = "kernel") -> str:
    """A function as the disassembler prints it, with offsets."""
    found, offset = [f'\t.section\t.text.{name},"ax",@progbits', f"{name}:", f".text.{name}:"], 0
    for line in filter(None, (lines + END).split("\n")):
        if line.endswith(":"):
            found.append(line)
        else:
            found.append(f"        /*{offset:04x}*/              {line.strip()}")
            offset += 16
    return "\n".join(found) + "\n"


def found_in(lines: str) -> Loop:
    """The main loop, which there must be."""
    loop = main_loop(code_of(lines))
    assert loop is not None
    return loop


def test_a_pipelined_loop_is_one_turn_without_what_leads_in_and_out() -> None:
    loop = found_in(PIPELINED)
    assert loop.classes() == {
        "WAIT": 2, "BARRIER": 1, "F2FP": 1, "F2F": 1, "FENCE": 2, "MMA": 2, "LDGSTS": 2, "CONTROL": 1,
    }  # fmt: skip
    assert loop.mma == {"HGMMA.64x64x16.F32.BF16": 2}
    assert loop.widths() == {"LDGSTS.128": 1, "LDGSTS.32": 1}
    assert loop.instructions["DEPBAR.LE 6"] == loop.drains == 1
    assert loops.classes(loop.outside) == {"LDGSTS": 1, "FENCE": 1, "CONTROL": 2, "WAIT": 1, "FP32": 1, "STG": 1}
    assert (loop.issued, loop.depth, loop.skipped) == (12, 0, 0)


def test_two_tiles_of_the_source_in_a_turn_show_in_its_products() -> None:
    """A warp group multiplies 64 by 64 by 16 at a time: the loop above, unrolled twice, has the MMA of both."""
    body = PIPELINED.split(".L_x_0:")[1].split("    @!P3 BRA")[0]
    twice = found_in(PIPELINED.replace(body, body * 2))
    assert twice.products == 2 * found_in(PIPELINED).products == 2 * (64 * 64 * 32) // 4
    assert loops.products("QGMMA.64x128x32.F32.E4M3.E4M3") * 4 == 64 * 128 * 32
    assert loops.products("HMMA.16816.F32.BF16") == 16 * 8 * 16
    assert loops.products("IMMA.16832.S8.S8") == 16 * 8 * 32
    assert loops.products("FMUL") == 0


def test_the_loop_that_multiplies_is_the_main_one_however_deep_it_lies() -> None:
    outer, inner = loops.loops(code_of(NESTED))
    assert (outer.depth, outer.issued) == (0, 6)
    assert (inner.depth, inner.issued) == (1, 2)
    main = found_in(NESTED)
    assert (main, sum(main.around.values())) == (replace(inner, around=main.around), 6 - 2)
    # and where the inner one only counts down, the outer one, with one turn of the other
    moved = NESTED.replace("HMMA.16816.F32.BF16 R24, R8, R10, R24", "IADD3 R1, R1, R1, RZ").replace(
        "FADD R1, R2, R3", "HMMA.16816.F32.BF16 R24, R8, R10, R24"
    )
    assert found_in(moved).instructions["IADD3"] == 1
    assert found_in(moved).issued == 6


# A norm's loop loads more than the product's, whose weights are in registers; what is behind that multiplies too.
FUSED = """
.L_x_0:
    LDG.E.128 R4, desc[UR4][R2.64] ;
    LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
    FFMA R1, R4, R4, R1 ;
    @P0 BRA `(.L_x_0) ;
    MUFU.RSQ R1, R1 ;
.L_x_1:
    LDG.E.128 R4, desc[UR4][R2.64] ;
    LOP3.LUT R5, R4, R6, RZ, 0xc0, !PT ;
    HGMMA.64x16x16.F32.BF16 R24, R120, gdesc[UR12], R24 ;
    HGMMA.64x16x16.F32.BF16 R24, R124, gdesc[UR12], R24, gsb0 ;
    WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
    @P1 BRA `(.L_x_1) ;
    HGMMA.64x16x16.F32.BF16 R24, R120, gdesc[UR12], R24, gsb0 ;
.L_x_2:
    FMUL R1, R2, R3 ;
    @P2 BRA `(.L_x_2) ;
"""


def test_of_several_loops_the_one_that_multiplies_is_the_main_one_and_says_which_it_is() -> None:
    loop = found_in(FUSED)
    assert (loop.mma, loop.place) == ({"HGMMA.64x16x16.F32.BF16": 2}, (2, 3))
    fp8 = found_in(FUSED.replace("HGMMA.64x16x16.F32.BF16", "QGMMA.64x16x32.F32.E4M3.E4M3"))
    assert (fp8.products, fp8.place) == (2 * 64 * 16 * 32 // 4, (2, 3))


def test_a_loop_around_the_one_that_multiplies_is_not_the_main_one_for_what_was_moved_out() -> None:
    """Parts of k: each has a loop, whose last turn the compiler put behind it, within the loop over parts."""
    parts = ".L_x_9:\n    MOV R1, R2 ;\n" + FUSED + "    @P3 BRA `(.L_x_9) ;\n"
    assert (found_in(parts).place, found_in(parts).depth) == ((3, 4), 1)
    assert found_in(parts).around["MOV"] == found_in(parts).around["MUFU.RSQ"] == 1
    assert found_in(FUSED).around == {}
    more = parts.replace(
        "    MUFU.RSQ", "    HGMMA.64x64x16.F32.BF16 R24, R120, gdesc[UR12], R24, gsb0 ;\n    MUFU.RSQ"
    )
    assert found_in(more).place == (3, 4)


def test_a_loop_with_whole_tiles_of_the_source_comes_before_one_with_more_products() -> None:
    scores = ".L_x_5:\n" + "    HMMA.16816.F32.BF16 R24, R8, R10, R24 ;\n" * 9 + "    @P0 BRA `(.L_x_5) ;\n"
    tile = 2 * 64 * 16 * 16 // 4
    assert main_loop(code_of(FUSED + scores)).place == (4, 4)  # type: ignore[union-attr]
    assert main_loop(code_of(FUSED + scores), tile).place == (2, 4)  # type: ignore[union-attr]
    assert main_loop(code_of(FUSED + scores), tile + 1).place == (4, 4)  # type: ignore[union-attr]


def test_a_kernel_that_multiplies_outside_its_loops_has_no_main_loop() -> None:
    straight = FUSED.replace("    @P1 BRA `(.L_x_1) ;\n", "")
    assert main_loop(code_of(straight)) is None
    assert loops.whole(code_of(straight)).products == 3 * 64 * 16 * 16 // 4


def test_without_products_the_loop_that_loads_most_bytes_is_the_main_one() -> None:
    busy = ".L_x_0:\n" + "    FADD R1, R2, R3 ;\n" * 9 + "    @P0 BRA `(.L_x_0) ;\n"
    loading = ".L_x_1:\n    LDG.E.U8 R4, desc[UR4][R2.64] ;\n    @P0 BRA `(.L_x_1) ;\n"
    assert found_in(busy + loading).widths() == {"LDG.8": 1}
    wide = loading.replace("LDG.E.U8", "LDG.E.128").replace("L_x_1", "L_x_2")
    assert found_in(loading.replace("    @", "    LDG.E.U8 R5, [R2] ;\n    @") + wide).widths() == {"LDG.128": 1}
    copied = ".L_x_3:\n    UTMALDG.2D [UR8], [UR14] ;\n    @P0 BRA `(.L_x_3) ;\n"
    assert found_in(copied + wide).widths() == {"UTMALDG": 1}
    assert found_in(busy + ".L_x_1:\n    IADD3 R1, R1, R1, RZ ;\n    @P0 BRA `(.L_x_1) ;\n").issued == 10


def test_of_two_loops_with_equal_products_the_first_counts() -> None:
    """Attention without a mask comes before that with one, which is longer."""
    second = PIPELINED.replace(".L_x_0", ".L_x_1").replace(
        "    BAR.SYNC.DEFER_BLOCKING 0x0 ;\n", "    ISETP R1 ;\n" * 5
    )
    assert found_in(PIPELINED + second).issued == 12


def test_code_without_a_loop_has_none_and_counts_once() -> None:
    straight = code_of("    FMUL R1, R2, R3 ;\n    @P0 BRA `(.L_x_0) ;\n    FMUL R2, R2, R3 ;\n.L_x_0:\n")
    assert main_loop(straight) is None
    assert loops.loops(straight) == []
    # neither the trap behind the code, a branch to itself that nothing reaches, nor what fills the last line
    assert loops.whole(straight).instructions == {"FMUL": 2, "BRA": 1, "EXIT": 1}


def test_branches_within_a_loop_and_blocks_moved_behind_it_belong_to_it() -> None:
    loop = found_in(WITH_BRANCHES)
    assert loop.classes() == {
        "IMAD": 1, "WAIT": 3, "CONTROL": 8, "MMA": 1, "FP32": 2, "MUFU": 1, "UTMALDG": 1,
    }  # fmt: skip
    assert loop.drains == 0
    assert loop.instructions["WARPGROUP.DEPBAR.LE 1"] == 1
    assert loop.skipped == 8  # the slow path 3, the two multiplications and their end 3, the other side 2
    assert loop.widths() == {"UTMALDG": 1}


BODY = "    LDG.E R4, [R2] ;\n    HMMA.16816.F32.BF16 R24, R8, R10, R24 ;\n"
COPYING = ".L_x_7:\n    LDG.E R4, [R2] ;\n    @P0 BRA `(.L_x_7) ;\n"


@pytest.mark.parametrize("behind", ["", COPYING])
def test_a_loop_with_two_entrances_is_refused(behind: str) -> None:
    """Neither of them passes the other; no loop beside it becomes the main one."""
    lines = f"    @P0 BRA `(.L_x_1) ;\n.L_x_0:\n{BODY}.L_x_1:\n    @P1 BRA `(.L_x_0) ;\n{behind}"
    with pytest.raises(ValueError, match="more than one entrance"):
        main_loop(code_of(lines))


@pytest.mark.parametrize(
    "branch", ["BRA 0x10", "BRX R4 -0x50", "BRXU UR4 -0x50", "JMP 0x10", "@P0 BRA 0x10", "BRA.U UP1, 0x10"]
)
def test_a_branch_without_a_label_is_refused(branch: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"a branch to no label: {branch.removeprefix('@P0 ')}")):
        main_loop(code_of(f".L_x_0:\n{BODY}    {branch} ;\n"))


def test_a_branch_by_a_table_goes_to_what_the_table_names() -> None:
    for name in ("BRX R4", "BRXU UR4"):
        table = f'    {name} -0x50 (*"BRANCH_TARGETS .L_x_0,.L_x_1"*) ;\n.L_x_1:\n'
        assert found_in(f".L_x_0:\n{BODY}{table}").classes() == {"LDG": 1, "MMA": 1, "CONTROL": 1}


def test_a_call_within_a_loop_is_refused_and_one_outside_is_not() -> None:
    """Division calls a routine of the compiler's, whose instructions nobody counts."""
    call, loop = "    CALL.REL.NOINC `($kernel$__internal_0) ;\n", f".L_x_0:\n{BODY}    @P0 BRA `(.L_x_0) ;\n"
    routine = "    EXIT ;\n$kernel$__internal_0:\n    FMUL R1, R2, R3 ;\n    RET.REL.NODEC R20 `(kernel) ;\n"
    assert found_in(call + loop + call + routine).classes() == {"LDG": 1, "MMA": 1, "CONTROL": 1}
    with pytest.raises(ValueError, match=r"a loop of 4 instructions has a CALL\.REL\.NOINC"):
        main_loop(code_of(loop.replace("    @P0", f"{call}    @P0") + routine))
    with pytest.raises(ValueError, match="a loop of 4 instructions"):  # which would not be the main one
        main_loop(code_of(loop + COPYING.replace("    @P0", f"{call}    FMUL R1, R2, R3 ;\n    @P0") + routine))


def test_code_that_is_cut_short_or_has_a_gap_is_refused() -> None:
    """Wherever the listing ends, or a line is missing, before the trap that ends it."""
    listing = code_of(PIPELINED).splitlines()
    trap = next(number for number, line in enumerate(listing) if line.startswith(".L_trap"))
    labelled = [number for number, line in enumerate(listing) if "/*" not in line]
    for number in range(trap - 1):
        with pytest.raises(ValueError, match=r"cut short|which the code does not have"):
            loops.whole("\n".join(listing[:number]))
    for number in set(range(trap)) - set(labelled):
        with pytest.raises(ValueError, match=r"an instruction at 0x\w{4}, not at 0x\w{4}"):
            loops.whole("\n".join(listing[:number] + listing[number + 1 :]))
    assert loops.whole("\n".join(listing[:trap])) == loops.whole(code_of(PIPELINED))


def test_functions_without_sections_are_not_taken_for_one() -> None:
    def bare(lines: str) -> str:
        return code_of(lines).split(".text.kernel:\n")[1]

    with pytest.raises(ValueError, match="an instruction at 0x0000, not at"):
        main_loop(bare(PIPELINED.replace(".L_x_0", ".L_x_8")) + bare(NESTED.replace(".L_trap", ".L_other")))
    with pytest.raises(ValueError, match=r"the label \.L_x_0 twice"):
        main_loop(code_of(PIPELINED + ".L_x_0:\n"))


def test_predicates_decide_what_may_follow() -> None:
    """EXIT under a condition goes on, one without does not; a condition of a branch may stand before its target."""
    body = "    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;\n"
    loop = found_in(f".L_x_0:\n{body}    @P0 EXIT P1 ;\n    FADD R1, R2, R3 ;\n    BRA P1, `(.L_x_0) ;\n")
    assert loop.classes() == {"MMA": 1, "CONTROL": 2, "FP32": 1}
    assert main_loop(code_of(f".L_x_0:\n{body}    EXIT ;\n    BRA `(.L_x_0) ;\n")) is None


def test_functions_of_a_file_keep_to_themselves() -> None:
    both = code_of(PIPELINED, "one") + code_of(NESTED, "two")
    with pytest.raises(ValueError, match="2 functions, not of one: one, two"):
        main_loop(both)
    parts = loops.functions(both)
    assert list(parts) == ["one", "two"]
    assert main_loop(parts["one"]) == found_in(PIPELINED)  # both have a .L_x_0
    assert main_loop(parts["two"]) == found_in(NESTED)
    with pytest.raises(ValueError, match=r"a branch to \.L_x_9, which the code does not have"):
        main_loop(code_of("    @P0 BRA `(.L_x_9) ;\n"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FFMA", "FP32"), ("HFMA2.BF16_V2", "HALF2"), ("IMAD.MOV.U32", "IMAD"), ("LOP3.LUT", "LOP3"),
        ("SHF.R.U32.HI", "SHF"), ("PRMT", "PRMT"), ("F2F.BF16.F16", "F2F"), ("F2FP.BF16.F32.PACK_AB", "F2FP"),
        ("F2I.FTZ.U32.TRUNC.NTZ", "F2F"), ("MUFU.EX2", "MUFU"), ("LDSM.16.M88.4", "LDS"), ("STS.128", "STS"),
        ("LDG.E.128.CONSTANT", "LDG"), ("LDGDEPBAR", "FENCE"), ("WARPGROUP.ARRIVE", "FENCE"),
        ("WARPGROUP.DEPBAR.LE 0", "WAIT"), ("SYNCS.PHASECHK.TRANS64.TRYWAIT", "WAIT"),
        ("SYNCS.ARRIVE.TRANS64", "FENCE"), ("UIADD3.64", "UNIFORM"), ("R2UR", "UNIFORM"), ("UTMALDG.2D", "UTMALDG"),
        ("LDL.LU", "LOCAL"), ("S2R", "REST"), ("QGMMA.64x128x32.F32.E4M3.E4M3", "MMA"), ("IADD3.X", "ALU"),
    ],
)  # fmt: skip
def test_classes(name: str, expected: str) -> None:
    assert class_of(name) == expected
