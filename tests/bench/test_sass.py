"""The scanner of Hopper machine code: what it must find in code with faults, and must not find in code without.

The code is text: two loops in nvdisasm's notation, the parts of a real attention kernel that matter.
"""

import re

import pytest

from bench.compile.sass import Program

WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
# A main loop in which q k^T is waited for at once and p v is in flight until the next turn.
KERNEL = """
MOV R1, R2
.L_x_1:
SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9+0xa000], R3
@!P0 BRA `(.L_x_3)
.L_x_2:
WARPGROUP.ARRIVE
HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], RZ, !UPT
HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], R24, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x0
FMNMX R9, R24, R25, !PT
MUFU.EX2 R26, R26
FMUL R56, R56, R9
FMUL R87, R87, R9
F2FP.BF16.F32.PACK_AB R100, R25, R24
WARPGROUP.ARRIVE
HGMMA.64x64x16.F32.BF16 R56, R100, gdesc[UR20].tnspB, R56
HGMMA.64x64x16.F32.BF16 R56, R104, gdesc[UR24].tnspB, R56, gsb0
ISETP.GT.AND P1, PT, R5, R6, PT
@P1 BRA `(.L_x_1)
WARPGROUP.DEPBAR.LE gsb0, 0x0
FMUL R56, R56, R10
STG.E.128 desc[UR4][R2.64], R56
EXIT
.L_x_3:
SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9+0xa000], R3
@!P0 BRA `(.L_x_3)
BRA `(.L_x_2)
"""
# One 64x64x32 product that is waited for after each half, which is what ptxas does when it gives up.
SERIALISED = """
.L_x_1:
WARPGROUP.ARRIVE
HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], RZ, !UPT, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x0
WARPGROUP.ARRIVE
HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], R24, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x0
FADD R5, R5, R24
@P1 BRA `(.L_x_1)
EXIT
"""
WARNING = (
    "ptxas info : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma "
    "instructions defining accumulator registers of a wgmma"
)


def listing(text: str) -> str:
    """As nvdisasm prints it: addresses before instructions."""
    lines = []
    for line in text.strip().splitlines():
        lines.append(line if line.startswith(".L") else f"        /*{16 * len(lines):04x}*/                   {line} ;")
    return "\n".join(lines)


def edited(old: str, new: str, count: int = 0) -> Program:
    changed = re.sub(re.escape(old) + "\n", new, KERNEL, count=count)
    assert changed != KERNEL
    return Program(listing(changed))


def reasons(program: Program) -> set[str]:
    return {hazard.reason for hazard in program.hazards()}


def test_a_good_kernel_has_no_fault():
    program = Program(listing(KERNEL))
    assert program.hazards() == []
    assert program.serialised() == program.serialised(WARNING) == []


def test_loops_and_mix():
    (loop,) = Program(listing(KERNEL)).loops  # not the one that polls the barrier
    program = Program(listing(KERNEL))
    assert program.innermost_loops == [loop]
    mix = program.mix(loop)
    assert (mix["HGMMA.64x64x16"], mix["MUFU.EX2"], mix["FMUL"], mix["EXIT"], mix["STG"]) == (4, 1, 2, 0, 0)
    assert program.mix()["FMUL"] == 3


def test_inner_loop_is_told_from_outer():
    text = "\n".join(["MOV R1, R2"] * 3)
    program = Program(listing(f".L_x_1:\n{text}\n.L_x_2:\n{text}\n@P0 BRA `(.L_x_2)\n{text}\n@P1 BRA `(.L_x_1)\nEXIT"))
    assert [len(loop) for loop in program.loops] == [11, 4]
    assert [len(loop) for loop in program.innermost_loops] == [4]


def test_deleted_waits_are_hazards():
    assert reasons(edited(WAIT, "")) == {
        "overwrites the operand of a wgmma in flight",
        "touches the accumulator of a wgmma in flight",
    }


def test_each_wait_is_needed():
    inside, behind = edited(WAIT, "", 1), Program(listing(WAIT.join(KERNEL.split(WAIT)[:2]) + KERNEL.split(WAIT)[2]))
    # Without the one in the loop: p v of the last turn still reads R100 when the next one writes it.
    assert any(h.text.startswith("F2FP") and "operand" in h.reason for h in inside.hazards())
    assert {h.text.split(" ")[0] for h in behind.hazards()} == {"FMUL", "STG.E.128"}


def test_wait_that_leaves_one_group_in_flight():
    weaker = edited(WAIT, "WARPGROUP.DEPBAR.LE gsb0, 0x1\n", 1)
    assert {h.text.split(" ")[0] for h in weaker.hazards()} >= {"FMNMX", "F2FP.BF16.F32.PACK_AB"}
    # The accumulator of p v is older than q k^T, so this wait covers it.
    assert not any("R56" in h.text or "R87" in h.text for h in weaker.hazards())


@pytest.mark.parametrize(
    ("late", "reason"),
    [
        ("MOV R107, R1", "overwrites the operand of a wgmma in flight"),
        ("MOV R1, R87", "touches the accumulator of a wgmma in flight"),
        ("CS2R R54, SRZ", None),
        ("CS2R R106, SRZ", "overwrites the operand of a wgmma in flight"),
        ("LDSM.16.M88.4 R97, [R1]", "overwrites the operand of a wgmma in flight"),
        ("STS.128 [R1], R53", "touches the accumulator of a wgmma in flight"),
        ("SHFL.BFLY PT, R101, R9, 0x1, 0x1f", "overwrites the operand of a wgmma in flight"),
        ("ISETP.GT.AND P0, PT, R101, R6, PT", None),
        ("MOV R1, R101", None),
    ],
)
def test_one_late_instruction(late, reason):
    program = edited("ISETP.GT.AND P1, PT, R5, R6, PT", f"{late}\n")
    assert reasons(program) == ({reason} if reason else set())


def test_hazard_on_one_of_two_paths():
    """Only where the wait is jumped over."""
    code = KERNEL.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0\nFMUL R56, R56, R10", "@P2 BRA `(.L_x_9)\n" + WAIT +
                          "\n.L_x_9:\nFMUL R56, R56, R10")  # fmt: skip
    assert code != KERNEL
    assert "FMUL R56, R56, R10" in {h.text for h in Program(listing(code)).hazards()}


def test_a_loop_without_waits_ends():
    assert Program(listing(SERIALISED.replace(WAIT, "NOP"))).hazards()


def test_serialised():
    assert len(Program(listing(SERIALISED)).serialised()) == 2
    assert len(Program(listing(SERIALISED)).serialised(WARNING)) == 2


def test_waiting_once_outside_a_loop_is_no_fault():
    assert Program(listing(SERIALISED.replace("@P1 BRA `(.L_x_1)", "NOP"))).serialised(WARNING) == []


def test_a_product_of_one_instruction_is_no_fault_unless_ptxas_warns():
    single = SERIALISED.replace("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], R24, gsb0", "NOP")
    assert Program(listing(single)).serialised() == []
    assert len(Program(listing(single)).serialised(WARNING)) == 1
