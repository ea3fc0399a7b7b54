"""Triton's attention_decode: how pages are read, what its assembly does, every spec in the interpreter and on a card.

The interpreter runs in a process of its own: test_in_the_interpreter starts this file, and that of quantised pages, again.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.formats.kvcache import SPECS
from percard.kernels import attention_code
from percard.kernels.attention import Attention, rounded_q
from percard.kernels.attention_decode import attention_decode, cases, contract
from percard.kernels.conformance import answer, faults

from .conftest import only

FP16, BF16 = torch.float16, torch.bfloat16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SUITES = [Path(__file__), Path(__file__).with_name("test_attention_quantised.py")]


def reading(case: cases.AttentionCase, block_m: int = 16, warpgroups: bool = False) -> Any:
    from percard.kernels import attention_reading

    a = Attention(*contract.unwrap(*cases.inputs(case, 1))[:-1])
    return attention_reading.reading(a, block_m, warpgroups, asm=True)


def of(spec: str, size: int = 64, page: int = 16, **more: Any) -> cases.AttentionCase:
    return cases.small((40, 3), 4, 2, size, FP16, 1, page, spec, **more)


@needs_triton
def test_how_native_pages_are_read() -> None:
    """One word a token, 16-byte lines, V in units of 16 bits, a part for each number of a unit."""
    found = {spec: reading(of(spec, 128)) for spec in SPECS}
    said = {spec: (h.word, h.v_unit, h.v_parts, h.k_width, h.v_width) for spec, h in found.items()}
    assert said == {
        "bf16": (0, 0, 1, 128, 128),
        "int8": (32, 2, 2, 128, 64),
        "k8v4": (64, 2, 4, 128, 32),
        "int4": (64, 2, 4, 64, 32),
        "k8v4-sym": (32, 2, 4, 128, 32),
        "int4-sym": (32, 2, 4, 64, 32),
    }
    assert all(h.whole_copies for h in found.values())
    assert reading(of("int4", 80)).k_row == 48, "a row of 40 bytes is filled up to 48, which may be read"


@needs_triton
@pytest.mark.parametrize(
    ("size", "rows", "parts"), [(128, 16, 4), (128, 32, 2), (64, 16, 2), (64, 32, 1), (256, 32, 4)]
)
def test_parts_join_where_a_product_would_be_higher_than_wide(size: int, rows: int, parts: int) -> None:
    how = reading(of("int4", size), rows)
    assert how.v_parts == parts and size // parts > (rows if parts > 1 else 0)
    assert reading(of("int4", size), 64, True).v_parts == 2, "through shared memory: bytes, low and high nibbles"


@needs_triton
def test_how_pages_of_other_engines_are_read() -> None:
    inline = reading(of("int8", 64, layout="inline"))
    assert inline.word == 0 and not inline.whole_copies and inline.k_line >= 4, "fp32 words behind rows: 4-byte copies"
    assert (
        reading(of("int4", 64, layout="inline")).pairs and reading(of("int4", 64, layout="inline")).zeros == "mantissa"
    )
    record = reading(of("int8", 64, layout="record"))
    assert record.word == 32 and record.whole_copies, "words behind the rows of a page are still one word a token"
    assert reading(of("int4", 64, layout="nhd")).word == 64
    assert reading(of("int4", 64, layout="zeros")).word == 0
    a = list(contract.unwrap(*cases.inputs(of("int8"), 1)))
    a[2] = torch.nn.functional.pad(a[2], (1, 0))[..., 1:]  # rows of 65 bytes that begin at an odd one
    from percard.kernels import attention_reading

    odd = attention_reading.reading(Attention(*a[:-1]), 16, False)
    assert (odd.v_unit, odd.v_parts, odd.v_line) == (1, 1, 1)


def test_explain_says_how_foreign_rows_are_copied() -> None:
    for layout, said in (("inline", "4-byte copies"), ("", None)):
        args = cases.inputs(of("int8", layout=layout), 1)
        assert contract.triton_remark(*contract.unwrap(*args)) == (
            said and f"the rows of k do not lie 16 bytes apart: {said}"
        )
    assert "refuses" in attention_decode.explain(*cases.inputs(of("int8"), 1)[:6], scale=-1.0)


def test_the_assembly_does_what_its_picture_says() -> None:
    """The constants of the inline assembly, applied with torch to every byte and nibble, give the whole numbers."""

    def bf16(bits: torch.Tensor) -> torch.Tensor:
        return bits.to(torch.int16).view(BF16).float()

    r = torch.arange(256, dtype=torch.int32)
    low, high = bf16(r & 0x7F | 0x4300), bf16(r & 0x80 | -0x3D00)  # the bits of 0xC300
    assert torch.equal(low + high, r.to(torch.uint8).view(torch.int8).float())
    u = torch.arange(16, dtype=torch.int32)
    for minus, zero in ((-0x3D00, 0), (-0x3CF8, 8)):  # 0xC300 is -128, 0xC308 is -136
        assert torch.equal(bf16(u | 0x4300) + bf16(torch.tensor([minus])), (u - zero).float())


def test_codes_of_queries_are_those_of_a_division(seed: int) -> None:
    """127 / absmax is rounded once: 127 * (1 / absmax), as torch divides a number by a tensor, gives other codes."""
    q = torch.randn(5000, 64, generator=torch.Generator().manual_seed(seed)).half()
    most = q.float().abs().amax(-1, keepdim=True)
    by = (127.0 / most.double()).float()
    assert torch.equal(rounded_q(q)[0], (q.float() * by).round())


@pytest.mark.parametrize("spec", SPECS)
def test_what_the_loop_must_show(spec: str) -> None:
    row = {"config": f"attention_decode {spec} d128 p64 m16 n64", "triton": "3.9.0", "loop": {"loads": (1, 0, 1)}}
    row["mma"] = "HMMA" if spec == "bf16" else "HMMA+IMMA"
    assert attention_code.faults(row, "sm_90") == []
    assert attention_code.faults(row | {"mma": "HMMA" if spec != "bf16" else ""}, "sm_90")[0].startswith("MMA is")
    bad = row | {"loop": {"loads": (9, 0, 1), "buffers": (1, 3, 3)}}
    assert attention_code.faults(bad, "sm_90") == ["loads is 9, expected 0 to 1", "buffers is 1, expected 3"]


def test_the_mma_of_wide_tiles() -> None:
    wanted = [attention_code.products("int8", 64, arch, "3.9.0") for arch in ("sm_80", "sm_90", "sm_100")]
    assert wanted == ["HMMA+IMMA", "HGMMA+IGMMA", "UTCHMMA+UTCIMMA"]
    assert attention_code.products("int8", 64, "sm_100", "3.6.0") == "IMMA+UTCHMMA", "3.6 has no int8 tcgen05"


@needs_triton
def test_a_config_of_the_deterministic_mode_knows_no_batch() -> None:
    from percard.kernels.attention_decode import gpu
    from percard.kernels.inspection import ARCHS

    case = replace(cases.REAL[0], spec="int8", deterministic=True)
    found = set()
    for batch in (1, 7, 200):
        mine = replace(case, lengths=(5000,) * batch, m=batch)
        launch = gpu.plan(ARCHS["sm_90"], *cases.blank(mine))[1][0]
        found.add((tuple(launch.options.items()), launch.grid[2]))
        assert launch.grid == (batch, 8, 5), "chunks of 1024 keys, whatever the batch"
    assert len(found) == 1


@needs_triton
def test_a_window_is_split_by_what_it_sees() -> None:
    from percard.kernels.attention_decode import gpu
    from percard.kernels.inspection import ARCHS

    for window, most in ((-1, 64), (1000, 5), (100, 1)):
        mine = replace(cases.REAL[0], lengths=(32768,), window=window)
        assert gpu.plan(ARCHS["sm_90"], *cases.blank(mine))[1][0].grid[2] <= most


OPTIONS = (
    {},
    {"window": 21, "sinks": True},
    {"softcap": 9.0},
    {"fresh": (1, 4, 0)},
    {"csr": True, "deterministic": True},
)


@only("attention_decode")
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_specs_sizes_and_options(body: Any, size: int, seed: int) -> None:
    """Every spec at every size, each with another group, page and option."""
    for i, spec in enumerate(SPECS):
        more = OPTIONS[(i + size // 16) % len(OPTIONS)] | ({"mu": True} if i % 2 else {})
        group, page = (1, 4, 5, 7, 8, 16)[i], (16, 32, 64, 128)[(i + size // 32) % 4]
        case = cases.small((67, 3, 20), group, 1, size, FP16, 1 + i % 3, page, spec, **more)
        assert faults(body.op, body.name, cases.inputs(case, seed, body.where)) == [], f"{case.name}, seed {seed}"


@only("attention_decode")
def test_tokens_of_no_sequence_are_zeros(body: Any, seed: int) -> None:
    """A captured call has room for more tokens than q_starts names."""
    if body.name != "triton":
        pytest.skip("the C++ body leaves them unwritten")
    for keys in ((40, 30), (600, 30)):  # one split, and several
        args = list(cases.inputs(cases.small(keys, 4, 2, 32, FP16, 2, 16, "int8"), seed, body.where))
        args[9] = torch.tensor([0, 1, 3], dtype=torch.int32, device=body.where)
        out, lse = answer(body.op, body.name, tuple(args))
        assert not out[3].any() and torch.isneginf(lse[3]).all() and torch.isfinite(lse[:3]).all()
        assert faults(body.op, body.name, tuple(args)) == []


@only("attention_decode")
@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_a_bad_key_marks_only_who_sees_it(body: Any, spec: str, seed: int) -> None:
    """The last key has words of NaN: of three fresh tokens the last alone sees it, and the other head none."""
    args = cases.inputs(cases.small((50, 20), 4, 2, 64, FP16, 3, 16, spec), seed, body.where)
    pages, table = args[1], args[2]
    pages.scales[table[0, 49 // 16], 0, 49 % 16] = float("nan")
    out = answer(body.op, body.name, args)[0]
    assert (
        torch.isnan(out[2, :2]).all()
        and torch.isfinite(out[[0, 1, 3, 4, 5]]).all()
        and torch.isfinite(out[2, 2:]).all()
    )


@pytest.mark.gpu
@only("attention_decode")
@pytest.mark.parametrize("spec", SPECS)
def test_real_cases_of_every_spec_on_a_card(body: Any, spec: str, seed: int) -> None:
    for case in cases.REAL:
        mine = replace(case, spec=spec if spec != "bf16" else "")
        assert faults(body.op, body.name, cases.inputs(mine, seed, body.where)) == [], (
            f"{case.name} {spec}, seed {seed}"
        )


@pytest.mark.gpu
@only("attention_decode")
@pytest.mark.parametrize("spec", ["int8", "k8v4", "int4", "int4-sym"])
def test_the_assembly_gives_the_bits_of_its_twin(body: Any, spec: str, seed: int) -> None:
    from percard.kernels.attention_decode import gpu
    from percard.kernels.device import card_of
    from percard.kernels.tiles import start

    flat = contract.unwrap(*cases.inputs(cases.small((700, 40), 8, 2, 128, BF16, 2, 64, spec), seed, body.where))
    found = []
    for asm in (True, False):
        (out, lse), launches = gpu.plan(card_of(flat[0].device), *flat)
        how = replace(launches[0].options["HOW"], asm=asm)
        start([launches[0]._replace(options=launches[0].options | {"HOW": how}), *launches[1:]], flat[0].device)
        found.append((out, lse))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
@only("attention_decode")
@pytest.mark.parametrize("spec", SPECS)
def test_a_captured_call_serves_every_length(body: Any, spec: str, seed: int) -> None:
    """Grid and memory follow from sizes: replayed with lengths 0 .. max, other tables and other queries, it says the same."""
    case = replace(cases.small((3000,) * 4, 8, 2, 128, BF16, 2, 64, "" if spec == "bf16" else spec), seed=seed)
    args = cases.inputs(case, seed, body.where)
    q, pages, table, lengths, keys, n = args[:6]
    body.op(q, pages, table, lengths, keys, n)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = body.op(q, pages, table, lengths, keys, n)[0]
    for new in ((1, 0, 64, 2999), (3000, 257, 65, 2)):
        lengths.copy_(torch.tensor(new))
        q.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, body.op(q, pages, table, lengths, keys, n)[0])


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter(run_interpreted: Callable[..., str]) -> None:
    said = run_interpreted(SUITES, "-k", "attention_decode-triton")
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) >= 10, said[-500:]


@pytest.mark.full
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter_of_the_oldest(run_interpreted: Callable[..., str], oldest_triton: Path) -> None:
    run_interpreted(SUITES, "-k", "attention_decode-triton", triton=oldest_triton)
