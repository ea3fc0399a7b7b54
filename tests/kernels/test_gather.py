"""gather_dequantize: bodies against the reference bit for bit, what was appended comes back, canaries, refusals.

Triton's body runs on a card, or in its interpreter: test_in_the_interpreter starts this file again in a process of its own.
The interpreter computes on the bits of bf16, so bf16 is left to the card.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.formats import kvcache
from percard.formats.kvcache import KVPages, KVSpec
from percard.formats.spec import FormatError
from percard.kernels import op
from percard.kernels.conformance import answer, faults
from percard.kernels.gather_dequantize import cases, gather_dequantize
from percard.kernels.op import Tape

from .conftest import only, unserved

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
QUANTISED = [name for name in kvcache.SPECS if name != "bf16"]


def ints(*numbers: int, on: Any = "cpu") -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=on)


@only("gather_dequantize")
def test_small_cases(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in cases.SMALL:
        if not unserved(body, case.dtype):
            with subtests.test(case.name):
                assert faults(body.op, body.name, cases.inputs(case, seed, body.where)) == [], f"seed {seed}"


@pytest.mark.gpu
@only("gather_dequantize")
def test_real_cases_on_a_card(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in cases.REAL:
        with subtests.test(case.name):
            assert faults(body.op, body.name, cases.inputs(case, seed, body.where)) == []


@pytest.mark.full
@only("gather_dequantize")
def test_every_fill_of_a_page_in_every_spec(body: Any, seed: int) -> None:
    dtype = FP32 if body.name == "cpu" else FP16
    for kv in kvcache.SPECS:
        for page in kvcache.PAGES:
            lengths = tuple(range(page + 1)) if body.name == "cpu" or page == 16 else (1, page - 1, page, page + 1)
            case = cases.small(kv, lengths, 1, 32, dtype, page, mu=kv != "bf16")
            assert faults(body.op, body.name, cases.inputs(case, seed, body.where)) == [], case.name


@only("gather_dequantize")
@pytest.mark.parametrize("kv", QUANTISED)
def test_what_was_written_comes_back_as_it_was_rounded(body: Any, kv: str, seed: int) -> None:
    """Rows quantised into scattered slots of recycled pages, and back: as quantize and dequantize say, bit for bit."""
    random = torch.Generator().manual_seed(seed)
    spec, heads, size, page, length = KVSpec.parse(kv), 2, 48, 16, 37
    x = torch.randn(2, length, heads, size, generator=random)
    x[:, 3], x[:, 4], x[0, 5, 0] = 0.0, 2.5, 1e5
    x[1, 6, 1, 7] = torch.nan
    mu = torch.randn(heads, size, generator=random)
    pages = kvcache.new_pages(6, heads, size, dtype=FP16, page=page, spec=spec, mu=mu)
    pages.k.fill_(-128 if spec.k_bits == 8 else 128)
    pages.v.fill_(-128 if spec.v_bits == 8 else 128)
    pages.scales.fill_(torch.nan)  # type: ignore[union-attr]
    table = torch.randperm(6, generator=random)[:3].int()[None]
    at = torch.arange(length)
    to = table[0, at // page].long(), slice(None), at % page
    wanted = []
    held = zip((x[0] - mu, x[1]), pages.words, (pages.k, pages.v), (spec.k_bits, spec.v_bits), strict=True)
    for rows, words, part, bits in held:
        data, scale, offset = kvcache.quantize(rows, bits, spec.symmetric)
        both = scale[..., None] if offset is None else torch.stack((scale, offset), -1)
        part[to] = data
        words[to[0], :, to[2], : both.shape[-1]] = both  # type: ignore[index]
        wanted.append(kvcache.dequantize(data, both, bits, size, spec.symmetric))
    wanted[0] = wanted[0] + mu
    here = [None if t is None else t.to(body.where) for t in (pages.k, pages.v, pages.scales, pages.mu)]
    pages = KVPages(here[0], here[1], spec, here[2], here[3])  # type: ignore[arg-type]
    given = table.to(body.where), ints(length, on=body.where), ints(0, length, on=body.where), length
    got = gather_dequantize(pages, *given, dtype=FP16, impl=body.name)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.cpu().nan_to_num(7.0), b.half().nan_to_num(7.0))
    assert got[1].isnan().sum() == size, "the row that held NaN, and no other"
    assert torch.isfinite(got[0]).sum() == got[0].numel() - got[0].isinf().sum()


@only("gather_dequantize")
def test_scales_behind_the_data_of_a_page(body: Any, seed: int) -> None:
    """One record per page: keys, values, words. The same numbers as apart, and nothing is copied."""
    case = cases.small("int8", (50, 20), 2, 64, FP16, 16, mu=True)
    pages, *rest = cases.inputs(case, seed, body.where)
    count, heads, page, size = pages.k.shape
    tile = heads * page * size
    record = 2 * tile + heads * page * 4
    memory = torch.zeros(count * record, dtype=torch.int8, device=body.where)
    k, v = (memory.as_strided(pages.k.shape, (record, page * size, size, 1), i * tile) for i in range(2))
    words = memory.view(FP16).as_strided((count, heads, page, 2), (record // 2, page * 2, 2, 1), tile)
    for to, what in ((k, pages.k), (v, pages.v), (words, pages.scales)):
        to.copy_(what)
    apart = gather_dequantize(pages, *rest, impl=body.name)
    assert faults(body.op, body.name, (replace(pages, k=k, v=v, scales=words), *rest)) == []
    together = gather_dequantize(replace(pages, k=k, v=v, scales=words), *rest, impl=body.name)
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


@only("gather_dequantize")
def test_the_same_bits_every_time_and_on_every_isa(body: Any, seed: int) -> None:
    for kv in ("int8", "int4", "k8v4-sym", "bf16"):
        case = cases.small(kv, (90, 0, 33), 3, 80, FP16, 16, mu=kv != "bf16")
        args = cases.inputs(case, seed, body.where)
        first = answer(body.op, body.name, args)
        assert all(torch.equal(a, b) for a, b in zip(first, answer(body.op, body.name, args), strict=True))
        if body.name == "cpu":
            op.native().force_isa("scalar")
            assert all(torch.equal(a, b) for a, b in zip(first, answer(body.op, "cpu", args), strict=True))
            op.native().force_isa(body.isa)


def test_threads_do_not_change_bits(seed: int) -> None:
    args = cases.inputs(cases.small("int4", (700, 0, 900), 4, 64, BF16, 16, mu=True, gap=7), seed)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(answer(gather_dequantize, "cpu", args))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_is_written_outside_of_the_outputs(seed: int) -> None:
    """The C++ body, into memory of the test's own, with a canary on both sides."""
    for kv, size in (("int8", 80), ("int4", 48), ("int4-sym", 80), ("bf16", 16)):
        flat = gather_dequantize.contract.unwrap(
            *cases.inputs(cases.small(kv, (19, 0, 5), 2, size, FP16, 16, gap=2), seed)
        )
        rows = flat.total * 2 * size
        memory = [torch.full((rows + 64,), 7.0, dtype=FP16) for _ in range(2)]
        outs = tuple(m[32:-32].view(flat.total, 2, size) for m in memory)
        op.native().gather_dequantize(*gather_dequantize.contract.native(outs, *flat))
        assert all((m[:32] == 7).all() and (m[-32:] == 7).all() for m in memory)
        want = gather_dequantize.torch_op(*flat)
        assert all(torch.equal(a, b) for a, b in zip(outs, want, strict=True))


@only("gather_dequantize")
def test_rows_of_no_token_are_zero(body: Any, seed: int) -> None:
    case = cases.small("k8v4-sym", (5, 0, 9), 2, 32, FP16, 16, mu=True)
    pages, table, lengths, _, _, *rest = cases.inputs(case, seed, body.where)
    starts = ints(3, 10, 14, 30, on=body.where)
    for out in gather_dequantize(pages, table, lengths, starts, 33, *rest, impl=body.name):
        used = out.flatten(1).ne(0).any(1)
        assert used.nonzero().flatten().tolist() == [*range(3, 8), *range(14, 23)]


@only("gather_dequantize")
def test_a_sequence_longer_than_its_room_is_cut(body: Any, seed: int) -> None:
    case = cases.small("int8", (20, 20), 1, 32, FP16, 16)
    pages, table, lengths, _, _, *rest = cases.inputs(case, seed, body.where)
    whole = gather_dequantize(pages, table, lengths, ints(0, 20, 40, on=body.where), 40, *rest, impl=body.name)
    cut = gather_dequantize(pages, table, lengths, ints(0, 12, 24, on=body.where), 24, *rest, impl=body.name)
    for a, b in zip(whole, cut, strict=True):
        assert torch.equal(b, torch.cat((a[:12], a[20:32])))
    with pytest.raises(FormatError, match="sequence 0 has 20 tokens and room for 12"):
        gather_dequantize(pages, table, lengths, ints(0, 12, 24, on=body.where), 24, *rest, impl="reference")


def test_what_is_not_asked_for_and_what_is_not_there(seed: int) -> None:
    pages, table, lengths, starts, total, *_ = cases.inputs(cases.small("int8", (20,), 2, 32, FP16), seed)
    for impl in ("cpu", "reference"):
        k, v = gather_dequantize(pages, table, lengths, starts, total, values=False, impl=impl)
        assert k.shape == (20, 2, 32) and k.dtype == BF16 and v.shape == (0, 2, 32)
        none = gather_dequantize(pages, table[:0], lengths[:0], ints(0), 0, impl=impl)
        assert [t.shape for t in none] == [(0, 2, 32)] * 2
        k, _ = gather_dequantize(pages, table, ints(0), ints(0, 20), 20, impl=impl)
        assert (k == 0).all()
    assert gather_dequantize(KVPages(pages.k.half(), pages.v.half()), table, lengths, starts, total)[0].dtype == FP16


@only("gather_dequantize")
def test_opcheck(body: Any, seed: int) -> None:
    if body.where == "cpu" and body.name == "triton":
        return  # the interpreter cannot be traced; what is traced is the same for every body
    for case in (cases.small("k8v4", (20, 3), 2, 32, FP16, mu=True), cases.small("bf16", (32,), 1, 32, FP16, csr=True)):
        flat = gather_dequantize.contract.unwrap(*cases.inputs(case, seed, body.where))
        clean = (t.nan_to_num(0.5) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in flat)
        flat = type(flat)(*clean)  # opcheck takes NaN for unequal
        torch.library.opcheck(gather_dequantize._torch_ops[body.name], flat)
        torch.library.opcheck(gather_dequantize.torch_op, flat)


def test_compile_and_tape(seed: int) -> None:
    pages, *rest = cases.inputs(cases.small("int4", (40, 9), 2, 64, FP16, mu=True), seed)

    def call(pages: KVPages, table: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return gather_dequantize(pages, table, lengths, starts, *rest[3:])[0] + 1

    torch._dynamo.reset()
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(pages, *rest[:3])
    assert torch.equal(got, call(pages, *rest[:3]))
    tape = Tape()
    held = gather_dequantize(pages, *rest, tape=tape)
    rest[1].copy_(ints(12, 3))
    tape.again()
    assert all(torch.equal(a, b) for a, b in zip(held, gather_dequantize(pages, *rest), strict=True))


def call(**changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A call that is right but for `changes`."""
    spec = KVSpec.parse("int8")
    right = {
        "pages": kvcache.new_pages(3, 2, 32, dtype=BF16, page=16, spec=spec),
        "table": torch.zeros(2, 2, dtype=torch.int32),
        "lengths": ints(1, 20),
        "starts": ints(0, 1, 21),
        "total": 21,
    }
    return gather_dequantize(**(right | changes))


INT4 = kvcache.new_pages(3, 2, 80, dtype=BF16, page=16, spec=KVSpec.parse("int4"))
FP32_WORDS = kvcache.new_pages(3, 2, 32, dtype=BF16, page=16, spec=KVSpec.parse("int8"))


@pytest.mark.parametrize(
    ("error", "changes", "said"),
    [
        (ValueError, {"lengths": torch.ones(2)}, r"lengths is torch.float32 \(2,\), expected contiguous int32 \(2,\)"),
        (ValueError, {"starts": ints(0, 1)}, r"starts is torch.int32 \(2,\), expected contiguous int32 \(3,\)"),
        (ValueError, {"table": torch.zeros(3, 2).int()}, r"table is torch.int32 \(3, 2\), expected int32 \[2, pages\]"),
        (ValueError, {"table": torch.zeros(2, 2)}, "table is torch.float32"),
        (ValueError, {"table_starts": ints(0, 1, 2)}, r"expected int32 \[n\] with table_starts"),
        (ValueError, {"table": torch.zeros(4).int(), "table_starts": ints(0, 1)}, "table_starts is torch.int32"),
        (ValueError, {"table": torch.zeros(2, 2).int().t()}, "expected 1 for the last"),
        (ValueError, {"total": -1}, "total is -1"),
        (ValueError, {"dtype": torch.int8}, "dtype torch.int8 from pages"),
        (FormatError, {"size": 40}, "40 numbers, expected a multiple of 16"),
        (FormatError, {"pages": INT4}, "rows of 48 bytes hold heads of 80 or of 96 numbers; say size="),
        (FormatError, {"pages": replace(FP32_WORDS, scales=None)}, "the scales of k are none"),
        (
            FormatError,
            {"pages": replace(FP32_WORDS, scales=torch.zeros(3, 2, 16, 1).half(), v_scales=torch.zeros(3, 2, 16, 1))},
            "expected one type",
        ),
        (FormatError, {"lengths": ints(1, 33), "impl": "reference"}, "sequence 1 has 33 tokens"),
        (FormatError, {"table": torch.full((2, 2), 9).int(), "impl": "reference"}, "names page 9"),
        (FormatError, {"starts": ints(0, 30, 21), "impl": "reference"}, "expected rising rows within 0 .. 21"),
    ],
)
def test_refusals(error: type[Exception], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(error, match=said):
        call(**changes)


def test_bytes_are_those_that_lie_there() -> None:
    """cost counts what a token's rows and words take in the tensors, and what is written."""
    for kv, held in (("int8", 260), ("k8v4", 200), ("int4", 136), ("int4-sym", 132), ("bf16", 512)):
        case = next(c for c in cases.REAL if c.name == "qwen3-8b.gather.int8.b1.s2048")
        flat = cases.blank(replace(case, kv=kv))
        assert gather_dequantize.contract.cost(*flat).bytes == 2048 * 8 * (held + 512)
        assert KVSpec.parse(kv).bytes_per_token(128, 8) == 8 * held


WIDTHS = """
import collections, json, re, sys
from percard.kernels import inspection
from percard.kernels.gather_dequantize import cases
problems = cases.problems(cases.EXPECT) if sys.argv[1] == "all" else cases.EXPECT.quick
for arch in inspection.ARCHS:
    planned = [launch for case in problems for launch in inspection.plan("gather_dequantize", case, arch)]
    for launch in {inspection.key(launch): launch for launch in planned}.values():
        refused = inspection.refuses(inspection.ARCHS[arch], [launch], arch)
        made = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
        text = inspection._disassembled(made.asm["cubin"], "-sass")
        widths = collections.Counter(re.findall(r"\\b(?:LDG|STG)\\.E[.\\w]*", text))
        print(json.dumps([arch, inspection.describe(launch), refused, widths]), flush=True)
"""


def sixteen_bytes(which: str, triton: Path | None = None) -> None:
    """Rows are read and written 16 bytes at a time: what is narrower are table, lengths and scale words. Nothing spills."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([*([str(triton)] if triton else []), *(p for p in sys.path if p)])
    done = subprocess.run([sys.executable, "-c", WIDTHS, which], env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row[0] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100"}
    for arch, kernel, refused, widths in rows:
        assert refused is None, f"{kernel} on {arch}: {refused}"
        if " d80 " in kernel and " bits4 " in kernel:
            continue  # halves of 40 bytes
        stores = {name.split(".")[-1] for name in widths if name.startswith("STG")}
        loads = {name for name in widths if name.startswith("LDG") and not name.endswith(".128")}
        assert stores == {"128"} and any(name.endswith(".128") for name in widths if name.startswith("LDG")), kernel
        narrow = ("U8", "S8") if " mu " in kernel else ("U8", "S8", ".64")  # mu itself may come 8 bytes a thread
        assert not any(kind in name for name in loads for kind in narrow), f"{kernel} on {arch}: {widths}"


@pytest.mark.skipif(
    INTERPRETED or importlib.util.find_spec("triton") is None, reason="compiles, outside the interpreter"
)
def test_rows_come_and_go_16_bytes_at_a_time() -> None:
    sixteen_bytes("quick")


@pytest.mark.full
@pytest.mark.skipif(INTERPRETED, reason="compiles, outside the interpreter")
def test_rows_come_and_go_16_bytes_at_a_time_in_every_form(oldest_triton: Path) -> None:
    sixteen_bytes("all")
    sixteen_bytes("all", oldest_triton)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter(run_interpreted: Callable[..., str]) -> None:
    """This file again with Triton's body."""
    said = run_interpreted(Path(__file__), "-k", "triton")
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) >= 10, said[-500:]


@pytest.mark.full
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter_of_the_oldest(run_interpreted: Callable[..., str], oldest_triton: Path) -> None:
    run_interpreted(Path(__file__), "-k", "triton", triton=oldest_triton)
