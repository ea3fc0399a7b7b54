"""The machine code of the kernels, without a card: the typical ones in every run, all of them in `make test-full`."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from percard.kernels import inspection, machine_code
from percard.kernels.inspection import ARCHS
from percard.kernels.machine_code import hot_loop, instructions

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
OPS = [
    "matmul_w4a16",
    "matmul_w4a8",
    "matmul_w8a16",
    "matmul_w8a8",
    "moe_matmul",
    "quantize_rows",
    "rmsnorm_quantize",
    "silu_mul_quantize",
    "kv_append",
    "attention_decode",
    "attention_prefill",
    "gather_dequantize",
    "distill_loss",
]
FIELDS = [
    "op",
    "config",
    "arch",
    "triton",
    "registers",
    "spilled_bytes",
    "shared_bytes",
    "mma",
    "weight_operand",
    "instructions_per_weight",
    "narrow_stores",
    "loop",
]


def sass(lines: str) -> str:
    """What cuobjdump prints, from `address: text` lines."""
    return "\n".join(
        f"        /*{a}*/  {text} ;   /* 0x000 */" for a, text in (x.strip().split(": ") for x in lines.splitlines())
    )


LOOP = """0000: MOV R1, c[0x0][0x28]
    0010: @P1 BRA 0x90
    0020: LDSM.16.M88.4 R16, [R98+UR13]
    0030: LOP3.LUT R3, R16, 0xf000f, R2, 0xea, !PT
    0040: HGMMA.64x16x16.F32.BF16 R32, R40, gdesc[UR16], RZ, !UPT
    0050: @!P2 BRA 0xa0
    0060: NOP
    0070: @P4 BRA 0x20
    0080: HGMMA.64x16x16.F32.BF16 R32, gdesc[UR4], R32
    0090: EXIT
    00a0: SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R2
    00b0: @!P2 BRA 0xa0
    00c0: BRA 0x60"""


def test_the_hot_loop_is_found_with_what_lies_out_of_line() -> None:
    code = instructions(sass(LOOP))
    assert len(code) == 13 and code[1] == (0x10, True, "BRA 0x90")
    names = [text.split()[0].split(".")[0] for text in hot_loop(code)]
    assert names == ["LDSM", "LOP3", "HGMMA", "BRA", "BRA", "SYNCS", "BRA", "BRA"]  # no NOP, no code before or after


def test_no_loop_with_an_mma_is_no_hot_loop() -> None:
    assert hot_loop(instructions(sass(LOOP.replace("HGMMA", "FFMA")))) == []
    assert hot_loop(instructions(sass("0000: EXIT"))) == []
    assert hot_loop([]) == []


@pytest.mark.parametrize(
    ("text", "mma", "operand"),
    [
        ("HGMMA.64x16x16.F32.BF16 R32, R40, gdesc[UR16], RZ, !UPT", "HGMMA", "registers"),
        ("IGMMA.64x256x32.S8.S8 R24, gdesc[UR4], R24", "IGMMA", "shared memory"),
        ("UTCHMMA tmem[UR7], gdesc[UR14], tmem[UR8], tmem[UR12], idesc[UR13], !UPT", "UTCHMMA", "tensor memory"),
        ("UTCIMMA gdesc[UR4], gdesc[UR6], tmem[UR17], tmem[UR10], idesc[UR11]", "UTCIMMA", "shared memory"),
        ("HMMA.16816.F32.BF16 R64, R52, R56, RZ", "HMMA", "registers"),
    ],
)
def test_where_the_weight_comes_from(text: str, mma: str, operand: str) -> None:
    assert machine_code.operand(mma, ["MOV R1, R2", text]) == operand
    assert machine_code.operand(mma, [text, "STS.128 [R4], R8"]) == f"{operand} + stores to shared memory"


def test_steps_are_counted_by_multiply_adds() -> None:
    """An unrolled loop is several steps, so that instructions per weight mean the same."""
    wgmma = "HGMMA.64x16x16.F32.BF16 R32, R40, gdesc[UR16], RZ"  # 64 rows x 16 codes of 128 x 128
    assert machine_code.steps([wgmma] * 16, (128, 128), 16, 128) == 1
    assert machine_code.steps([wgmma] * 32, (128, 128), 16, 128) == 2
    assert machine_code.steps(["IMMA.16832.S8.S8.SAT R4, R20.ROW, R2.COL, R4"] * 16, (128, 128), 16, 128) == 1
    assert machine_code.steps(["UTCIMMA tmem[UR7], gdesc[UR14], tmem[UR8]"] * 4, (128, 128), 64, 256) == 1
    assert machine_code.steps(["UTCHMMA tmem[UR7], gdesc[UR14], tmem[UR8]"] * 16, (128, 128), 64, 256) == 2


def good_row(**changes: Any) -> dict[str, Any]:
    expect = inspection.expected("matmul_w4a16")
    row = {
        "op": "matmul_w4a16",
        "config": "matmul_w4a16 group128 even_k n128 m16 pack_blocks1 warps4 stages4 bfloat16>float32",
        "arch": "sm_90",
        "triton": "3.9.0",
        "registers": 120,
        "spilled_bytes": 0,
        "shared_bytes": 42496,
        "mma": "HGMMA",
        "weight_operand": "registers",
        "instructions_per_weight": expect.ceilings["sm_90"][16][0],
        "narrow_stores": 4,
        "loop": None,
    }
    return row | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spilled_bytes": 40}, "spills 40 bytes, expected none"),
        ({"shared_bytes": 300000}, "takes 300000 bytes of shared memory, has 232448"),
        ({"mma": "", "weight_operand": "none", "instructions_per_weight": None}, "MMA is none, expected HGMMA"),
        ({"mma": "HMMA"}, "MMA is HMMA, expected HGMMA"),
        ({"weight_operand": "shared memory"}, "weight comes from shared memory, expected registers"),
        (
            {"weight_operand": "registers + stores to shared memory"},
            "weight comes from registers + stores to shared memory, expected registers",
        ),
        ({"instructions_per_weight": 4.7}, "4.7 instructions per weight, expected at most"),
    ],
)
def test_faults_say_what_is_wrong(changes: dict[str, Any], said: str) -> None:
    assert inspection.faults([good_row()]) == []
    (fault,) = inspection.faults([good_row(**changes)])
    assert said in fault and "sm_90" in fault and "3.9.0" in fault


def test_narrow_stores_are_counted() -> None:
    code = instructions(sass("0000: STG.E.128 [R2], R4\n0010: STG.E [R2], R4\n0020: STG.E.64 [R2], R4\n0030: EXIT"))
    assert machine_code.narrow_stores(code) == 2
    row = good_row(op="kv_append", config="kv_append k_bits8 v_bits8 c2 warps1 bfloat16>bfloat16", mma="")
    assert inspection.faults([row | {"narrow_stores": 1}]) == []
    (fault,) = inspection.faults([row])
    assert "4 stores of less than 16 bytes, expected at most 1" in fault


def test_a_bare_trap_is_a_fault() -> None:
    """Triton 3.6 "compiles" some tiles to a trap: no MMA."""
    row = good_row(arch="sm_100", triton="3.6.0", mma="", weight_operand="none", instructions_per_weight=None)
    assert "MMA is none" in inspection.faults([row])[0]


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no op 'matmul_w2a2' with a Triton body; known: attention_decode, "):
        inspection.inspect(["matmul_w2a2"])
    with pytest.raises(ValueError, match=r"no architecture 'sm_70' with a Triton body; known: sm_80, "):
        inspection.inspect(None, ["sm_70"])


@needs_triton
def test_launches_that_compile_to_the_same_code_are_one_job() -> None:
    jobs = inspection.jobs(["matmul_w4a16"], ["sm_90"], True)
    described = [inspection.describe(inspection.plan(j.op, j.case, j.arch)[j.index]) for j in jobs]
    assert len(described) == len(set(described)) >= 15


@needs_triton
def test_typical_kernels(subtests: pytest.Subtests) -> None:
    """All ops, all architectures, from workers that are outside of the interpreter. One test, so that it compiles once."""
    rows = inspection.inspect()
    with subtests.test("as the ops expect"):
        assert inspection.faults(rows) == []
    with subtests.test("fields"):
        assert all(list(row) == FIELDS for row in rows)
        assert {(row["op"], row["arch"]) for row in rows} == {(op, arch) for op in OPS for arch in ARCHS}
        assert all(row["registers"] > 8 for row in rows), "a trap needs no registers"
        assert json.loads(json.dumps(rows)) == rows
    with subtests.test("on Hopper four-bit weights stay in registers and are not stored to shared memory"):
        mine = [r for r in rows if r["arch"] == "sm_90" and r["config"].startswith("matmul_w4")]
        assert len(mine) >= 6
        assert all(r["weight_operand"] == "registers" and r["mma"] in ("HGMMA", "IGMMA") for r in mine)
    with subtests.test("docs/inspect.md says the same"):
        page = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
        assert page.startswith(inspection.PAGE)
        if f" {rows[0]['triton']} " in page:  # figures of another Triton are not comparable
            missing = [line for line in inspection.markdown(rows).splitlines()[2:] if line not in page]
            assert not missing, "make inspect-page"


def _everything(triton_at: str | None) -> None:
    rows = inspection.inspect(everything=True, workers=os.cpu_count() or 2, triton_at=triton_at)
    assert len(rows) > 150
    assert inspection.faults(rows) == []


@pytest.mark.full
@needs_triton
def test_all_kernels_of_real_layers() -> None:
    _everything(None)


@pytest.mark.full
@needs_triton
def test_all_kernels_of_real_layers_with_the_oldest_triton(oldest_triton: Path) -> None:
    _everything(str(oldest_triton))
