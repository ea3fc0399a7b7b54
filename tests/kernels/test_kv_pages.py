"""kv_append into pages of every spec: the bytes of formats/kvcache.py, in its own places and nowhere else.

Triton's bodies run on a card, or in its interpreter: test_in_the_interpreter starts this file again in a process of its own.
"""

from __future__ import annotations

import os
import re
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
from percard.kernels.conformance import answer, faults, packed
from percard.kernels.kv_append import cases, kv_append
from percard.kernels.op import Tape

from .conftest import only

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
QUANTISED = kvcache.SPECS[1:]


def raw(t: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: NaN equals NaN, and -0 is not 0."""
    return t.contiguous().view(torch.uint8)


def fresh(body: Any, spec: str, size: int, heads: int = 2, pages: int = 3, page: int = 16, **more: Any) -> KVPages:
    """Recycled pages: bytes of 0x80 under scales of NaN."""
    made = kvcache.new_pages(
        pages, heads, size, dtype=FP16, device=body.where, page=page, spec=KVSpec.parse(spec), **more
    )
    for rows in (made.k, made.v):
        rows.view(torch.uint8).fill_(0x80)
    if made.scales is not None:
        made.scales.fill_(torch.nan)
    return made


def rows(body: Any, seed: int, tokens: int, heads: int, size: int, dtype: torch.dtype = FP16) -> list[torch.Tensor]:
    """k and v of all kinds: normal, large, tiny, constant, zero, with NaN, with Inf, at the ends of fp16."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(2):
        x = 3 * torch.randn(tokens, heads, size, generator=random)
        for t, change in enumerate((1.0, 1e4, 1e-5, 0.0, 2e-8)):
            x[t::10] *= change
        x[5::10] = x[5::10, :, :1]
        x[6::10, 0, size - 1] = torch.nan
        x[7::10, heads - 1, 0] = -torch.inf
        x[8::10] = 65504.0 * x[8::10].sign()
        made.append(x.to(dtype).to(body.where))
    return made


def expected(x: torch.Tensor, bits: int, spec: KVSpec) -> tuple[torch.Tensor, list[torch.Tensor]]:
    codes, scale, offset = kvcache.quantize(x, bits, spec.symmetric)
    return codes, [scale, torch.zeros_like(scale) if offset is None else offset]


def at_slots(plane: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    page = plane.shape[2]
    return plane[slots // page, :, slots % page]


@only("kv_append")
@pytest.mark.parametrize("spec", QUANTISED)
def test_bytes_are_those_of_the_format(body: Any, spec: str, seed: int) -> None:
    """Bit for bit, into recycled pages, with an offset of keys and without; a slot of -1 goes nowhere."""
    of = KVSpec.parse(spec)
    sizes = (16, 80, 128) if INTERPRETED else (16, 32, 48, 64, 80, 96, 112, 128, 256)
    for size in sizes:
        for dtype in (FP16,) if body.name == "triton" else (FP16, BF16, FP32):
            k, v = rows(body, seed, 10, 2, size, dtype)
            mu = torch.randn(2, size, generator=torch.Generator().manual_seed(seed)).to(body.where)
            slots = torch.tensor([5, 17, -1, 40, 47, 3, 20, 0, 31, 32], device=body.where)
            live = slots >= 0
            for shift in (None, mu):
                pages = fresh(body, spec, size, mu=shift)
                kv_append(k, v, pages, slots, impl=body.name)
                x = k.float() if shift is None else k.float() - shift
                k_want, k_words = expected(x[live], of.k_bits, of)
                v_want, v_words = expected(v[live], of.v_bits, of)
                words = torch.stack((k_words[0], v_words[0], k_words[1], v_words[1])[: of.channels], -1)
                assert torch.equal(at_slots(pages.k, slots[live]), k_want), (size, dtype)
                assert torch.equal(at_slots(pages.v, slots[live]), v_want), (size, dtype)
                assert torch.equal(raw(at_slots(pages.scales, slots[live])), raw(words)), (size, dtype)
                if of.k_bits == 8:
                    assert at_slots(pages.k, slots[live]).min() >= -127


@only("kv_append")
@pytest.mark.parametrize("spec", QUANTISED)
def test_normed_and_turned_keys(body: Any, spec: str, seed: int) -> None:
    """Words and codes differ only where the rounding of the norm may move them: kv_append's tolerance."""
    for size, page in ((128, 16),) if INTERPRETED else ((64, 16), (80, 32), (128, 64), (256, 128)):
        case = cases.small(9, 4, 2, size, FP16, page, spec, "norm", "turn", "mu")
        assert faults(kv_append, body.name, cases.inputs(case, seed, body.where)) == []


@pytest.mark.parametrize("spec", QUANTISED)
def test_the_tolerance_sees_one_wrong_code(spec: str, seed: int) -> None:
    """A tolerance that lets everything pass would make the test above empty."""
    case = cases.small(9, 4, 2, 64, FP16, 16, spec, "norm", "turn", "mu")
    args = cases.inputs(case, seed)
    ready = packed(kv_append, "cpu", args)
    flat = kv_append.contract.unwrap(*ready)
    want = answer(kv_append, "reference", args)
    allowed = kv_append.contract.tolerance(want, *flat)
    slot = int(flat.slots[0])
    at = (slot // 16, slice(None), slot % 16)
    live = flat.slots >= 0
    assert (allowed[1][at] == 0).float().mean() > 0.9 and not allowed[2].any(), "nearly all codes must be equal"
    assert (allowed[3] > 0).float().mean() < 0.2 and not allowed[3][..., 1].any()
    assert all((a >= 0).all() and torch.isfinite(a).all() for a in allowed) and int(live.sum()) == 8


@only("kv_append")
@pytest.mark.parametrize("spec", kvcache.SPECS)
def test_nothing_else_is_written(body: Any, spec: str, seed: int) -> None:
    """Canaries: pages before and after, other rows, other heads' rows; of the scales too."""
    for size in (80,) if INTERPRETED else (64, 80, 128):
        k, v = rows(body, seed, 6, 3, size)
        of = KVSpec.parse(spec)
        memory = kvcache.new_pages(6, 3, size, dtype=FP16, device=body.where, page=16, spec=of)
        held = [t for t in (memory.k, memory.v, memory.scales) if t is not None]
        for t in held:
            t.view(torch.uint8).fill_(0x5A)
        inner = [t[1:5:2] for t in held]  # pages 1 and 3: each has a page of another beside it
        pages = KVPages(inner[0], inner[1], of, inner[2] if of.quantised else None)
        slots = torch.tensor([0, 15, 16, -1, 31, -7], device=body.where)
        kv_append(k, v, pages, slots, impl=body.name)
        mine = torch.zeros(6, 16, dtype=torch.bool, device=body.where)
        for page, row in ((1, 0), (1, 15), (3, 0), (3, 15)):
            mine[page, row] = True
        for t in held:
            by_row = t.transpose(1, 2)  # [pages, P, Hkv, ...]
            assert (raw(by_row[~mine]) == 0x5A).all()
            assert not (raw(by_row[mine]) == 0x5A).all(-1).any()


@only("kv_append")
@pytest.mark.parametrize("spec", QUANTISED)
def test_scales_behind_the_data_in_one_page_record(body: Any, spec: str, seed: int) -> None:
    """A page is one piece: rows of K of all heads, rows of V, scale words, and bytes of somebody else between them."""
    of, heads, page, size = KVSpec.parse(spec), 2, 16, 48
    k, v = rows(body, seed, 5, heads, size)
    parts = [(kvcache.row_length(bits, size), kvcache.row_dtype(bits, FP16)) for bits in (of.k_bits, of.v_bits)]
    parts.append((of.channels, FP16))
    lengths = [heads * page * n * dtype.itemsize for n, dtype in parts]
    record = 16 * -(-(sum(lengths) + 48) // 16)

    def views(memory: torch.Tensor) -> list[torch.Tensor]:
        made, at = [], 32
        for (n, dtype), length in zip(parts, lengths, strict=True):
            strides = (record // dtype.itemsize, page * n, n, 1)
            made.append(torch.as_strided(memory.view(dtype), (4, heads, page, n), strides, at // dtype.itemsize))
            at += length + 16  # the pieces do not touch
        return made

    memory = torch.full((4 * record + 64,), 0x5A, dtype=torch.uint8, device=body.where)
    mine = torch.zeros_like(memory)
    rows_, values, scales = views(memory)
    slots = torch.tensor([63, 0, 17, -1, 30], device=body.where)
    kv_append(k, v, KVPages(rows_, values, of, scales), slots, impl=body.name)
    want = fresh(body, spec, size, heads, 4)
    kv_append(k, v, want, slots, impl="reference")
    live = slots[slots >= 0]
    for got, right in zip((rows_, values, scales), (want.k, want.v, want.scales), strict=True):
        assert torch.equal(raw(at_slots(got, live)), raw(at_slots(right, live)))
    for part in views(mine):
        ours = part.view(torch.int16) if part.dtype == FP16 else part
        ours[live // page, :, live % page] = 255 if part.dtype == torch.uint8 else -1
    assert (memory[mine == 0] == 0x5A).all() and int((mine != 0).sum()) == len(live) * of.bytes_per_token(size, heads)


@only("kv_append")
@pytest.mark.parametrize("spec", QUANTISED)
def test_pages_of_any_strides(body: Any, spec: str, seed: int) -> None:
    """NHD, side by side (cases), and words whose numbers do not lie together: the same bytes."""
    of, size = KVSpec.parse(spec), 64
    k, v = rows(body, seed, 10, 2, size)
    slots = torch.tensor([5, 17, -1, 40, 47, 3, 20, 0, 31, 32], device=body.where)
    want = fresh(body, spec, size)
    kv_append(k, v, want, slots, impl="reference")
    assert want.scales is not None
    apart = torch.full((of.channels, 3, 2, 16), torch.nan, dtype=FP16, device=body.where).permute(1, 2, 3, 0)
    odd = torch.full((3 * 2 * 16 * of.channels + 1,), torch.nan, dtype=FP16, device=body.where)[1:]
    odd = odd.view(3, 2, 16, of.channels)
    nhd = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (want.k, want.v, want.scales)]
    for one in (
        KVPages(nhd[0], nhd[1], of, nhd[2]),
        KVPages(want.k, want.v, of, apart),
        KVPages(want.k, want.v, of, odd),
    ):
        for part in (one.k, one.v):
            part.view(torch.uint8).fill_(0x80)
        assert one.scales is not None
        one.scales.fill_(torch.nan)
        kv_append(k, v, one, slots, impl=body.name)
        again = fresh(body, spec, size)
        kv_append(k, v, again, slots, impl="reference")
        for got, right in zip((one.k, one.v, one.scales), (again.k, again.v, again.scales), strict=True):
            assert torch.equal(raw(got), raw(right))


@only("kv_append")
@pytest.mark.parametrize("spec", QUANTISED)
def test_rows_of_any_strides(body: Any, spec: str, seed: int) -> None:
    """k, v and q as one product gives them, and as slices of something wider."""
    wide = [t.repeat(1, 1, 2) for t in rows(body, seed, 4, 2, 64)]
    slots = torch.arange(4, device=body.where)
    pages, want = fresh(body, spec, 64), fresh(body, spec, 64)
    kv_append(wide[0][..., :64], wide[1][..., 64:], pages, slots, impl=body.name)
    kv_append(wide[0][..., :64].contiguous(), wide[1][..., 64:].contiguous(), want, slots, impl="reference")
    for got, right in zip((pages.k, pages.v, pages.scales), (want.k, want.v, want.scales), strict=True):
        assert torch.equal(raw(got), raw(right))


@only("kv_append")
@pytest.mark.parametrize("spec", QUANTISED)
def test_one_by_one_is_all_at_once(body: Any, spec: str, seed: int) -> None:
    """With norm, rotation and offset, on one body: bytes of a token depend on that token."""
    case = cases.small(4, 4, 2, 64, FP16, 16, spec, "norm", "turn", "mu")
    k, v, pages, _, q, positions, cos_sin, *rest = cases.inputs(case, seed, body.where)
    slots = torch.tensor([3, 19, 7, 0], device=body.where)
    whole, apart = (packed(kv_append, body.name, (k, v, pages))[2] for _ in range(2))
    out = kv_append(k, v, whole, slots, q, positions, cos_sin, *rest, impl=body.name)
    for t in range(4):
        one = slice(t, t + 1)
        alone = kv_append(k[one], v[one], apart, slots[one], q[one], positions[one], cos_sin, *rest, impl=body.name)
        assert torch.equal(alone, out[one])
    for a, b in zip((whole.k, whole.v, whole.scales), (apart.k, apart.v, apart.scales), strict=True):
        assert torch.equal(raw(a), raw(b))


@only("kv_append")
@pytest.mark.parametrize("spec", QUANTISED)
def test_the_same_bits_on_every_isa_and_thread_count(body: Any, spec: str, seed: int) -> None:
    if body.name != "cpu":
        return
    case = cases.small(40, 4, 2, 80, BF16, 16, spec, "norm", "turn", "mu")
    args = cases.inputs(case, seed)
    k, v = rows(body, seed, 40, 2, 80, BF16)
    args = (k, v, *args[2:])
    op.native().force_isa("scalar")
    want = [raw(t) for t in answer(kv_append, "cpu", args)]
    op.native().force_isa(body.isa)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        got = answer(kv_append, "cpu", args)
        assert all(torch.equal(raw(a), b) for a, b in zip(got, want, strict=True)), threads


@only("kv_append")
def test_what_is_appended_is_what_is_read(body: Any, seed: int) -> None:
    """Read back through the format: within half a step of what went in, for every spec; a NaN marks its own row."""
    for spec in QUANTISED:
        of = KVSpec.parse(spec)
        k, v = (torch.randn(12, 2, 64, generator=torch.Generator().manual_seed(seed + i)).to(FP16) for i in (0, 1))
        k, v = k.to(body.where), v.to(body.where)
        k[4, 1, 9] = torch.nan
        pages = fresh(body, spec, 64)
        slots = torch.randperm(48, generator=torch.Generator().manual_seed(seed))[:12].to(body.where)
        kv_append(k, v, pages, slots, impl=body.name)
        got_k, got_v = kvcache.read(pages, slots // 16, slots % 16, 64)
        assert got_k[4, 1].isnan().all() and int(got_k.isnan().sum()) == 64 and not got_v.isnan().any()
        for x, got, bits in ((k, got_k, of.k_bits), (v, got_v, of.v_bits)):
            spread = (x.float().amax(-1) - x.float().amin(-1)) / 15 if bits == 4 else x.float().abs().amax(-1) / 127
            if bits == 4 and of.symmetric:
                spread = x.float().abs().amax(-1) / 7
            off = (got - x.float()).abs().amax(-1).nan_to_num(0.0)
            assert (off <= 0.51 * spread.nan_to_num(1.0) + 2e-3).all()


@only("kv_append")
@pytest.mark.parametrize("spec", QUANTISED)
def test_opcheck(body: Any, spec: str, seed: int) -> None:
    if body.where == "cpu" and body.name == "triton":
        return  # the interpreter cannot be traced; what is traced is the same for every body
    case = cases.small(3, 4, 2, 64, FP16, 16, spec, "norm", "turn", "mu")
    args = list(cases.inputs(case, seed, body.where))
    args[2] = replace(args[2], scales=args[2].scales.nan_to_num(0.5))  # opcheck takes NaN for unequal
    flat = kv_append.contract.unwrap(*args)
    torch.library.opcheck(kv_append._torch_ops[body.name], flat)


@pytest.mark.skipif(INTERPRETED, reason="nothing of Triton in it")
@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_compile_sees_the_pages_and_the_scales_change(spec: str, seed: int) -> None:
    case = cases.small(3, 4, 2, 64, FP16, 16, spec, "norm", "turn", "mu")
    k, v, pages, *rest = cases.inputs(case, seed)
    assert pages.scales is not None and pages.mu is not None

    def call(k: torch.Tensor, v: torch.Tensor, held: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> Any:
        out = kv_append(k, v, KVPages(held, values, pages.spec, scales, pages.mu), *rest)
        return out + 1, scales.nan_to_num(0.0).sum(), held.sum()

    def blank() -> list[torch.Tensor]:
        return [pages.k.clone(), pages.v.clone(), pages.scales.clone()]

    want_pages, got_pages = blank(), blank()
    want = call(k, v, *want_pages)
    torch._dynamo.reset()
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(k, v, *got_pages)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True)) and float(want[1]) != 0
    assert all(torch.equal(raw(a), raw(b)) for a, b in zip(want_pages, got_pages, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="nothing of Triton in it")
@pytest.mark.parametrize("spec", QUANTISED)
def test_a_tape_repeats_on_new_numbers(spec: str, seed: int) -> None:
    case = cases.small(2, 4, 2, 64, FP32, 16, spec, "norm", "turn", "mu")
    args = cases.inputs(case, seed)
    tape = Tape()
    out = kv_append(*args, impl="cpu", tape=tape)
    args[0].normal_()
    args[1].normal_()
    args[3].copy_(torch.tensor([9, 1]))
    pages = packed(kv_append, "cpu", args)[2]
    tape.again()
    assert torch.equal(out, kv_append(*args[:2], pages, *args[3:], impl="cpu"))
    for a, b in zip((args[2].k, args[2].v, args[2].scales), (pages.k, pages.v, pages.scales), strict=True):
        assert torch.equal(raw(a), raw(b))


def append_row(held: str = "int8", **changes: Any) -> tuple[Any, ...]:
    """Arguments of a call that is right but for `changes`: of the pages by their names, else of the call."""
    pages = kvcache.new_pages(3, 2, 32, dtype=FP32, page=16, spec=KVSpec.parse(held))
    ours = {name: changes.pop(name) for name in list(changes) if hasattr(pages, name) and name not in ("k", "v")}
    right = {"k": torch.zeros(2, 2, 32), "v": torch.zeros(2, 2, 32), "pages": replace(pages, **ours)}
    return tuple((right | {"slots": torch.arange(2)} | changes).values())


def plane(*size: int, dtype: torch.dtype = FP16) -> torch.Tensor:
    return torch.zeros(size, dtype=dtype)


@pytest.mark.skipif(INTERPRETED, reason="nothing of Triton in it")
@pytest.mark.parametrize(
    ("error", "given", "said"),
    [
        (FormatError, {"scales": None}, "the scales of k are none, expected 1 for int8"),
        (
            FormatError,
            {"scales": plane(3, 2, 16, 2, dtype=FP32)},
            r"scales are torch.float32 .*expected float16 \(3, 2",
        ),
        (FormatError, {"scales": plane(3, 2, 16, 4)}, r"\(3, 2, 16, 4\), expected float16 \(3, 2, 16, 2\) for int8"),
        (FormatError, {"scales": plane(3, 2, 8, 2)}, r"\(3, 2, 8, 2\), expected float16 \(3, 2, 16, 2\) for int8"),
        (FormatError, {"spec": KVSpec.parse("int4")}, r"the scales are .*\(3, 2, 16, 2\), expected .*4\) for int4"),
        (FormatError, {"spec": KVSpec.parse("k8v4-sym")}, "the pages of v are torch.int8 .*, expected uint8"),
        (FormatError, {"spec": KVSpec.parse("bf16")}, "the pages of k are torch.int8 .*, expected a float type"),
        (FormatError, {"v_scales": plane(3, 2, 16, 1)}, "scale words of K and V lie apart, .*; write into new_pages"),
        (FormatError, {"nibbles": "pairs"}, "pages 'int8 pairs offset' are another engine's and are only read"),
        (FormatError, {"zeros": "zero"}, "pages 'int8 halves zero' are another engine's and are only read"),
        (
            FormatError,
            {"mu": torch.zeros(2, 16)},
            r"mu is torch.float32 \(2, 16\), expected contiguous float32 \(2, 32",
        ),
        (FormatError, {"mu": torch.zeros(2, 32).half()}, "mu is torch.float16"),
        (FormatError, {"mu": torch.zeros(32, 2).t()}, "expected contiguous float32"),
        (
            FormatError,
            {"k": torch.zeros(2, 2, 48)},
            r"pages of k are torch.int8 \(3, 2, 16, 32\), expected int8 .*48\]",
        ),
        (FormatError, {"k": torch.zeros(2, 2, 16)}, "the pages of k are .*, expected rows of 16 for int8"),
        (FormatError, {"k": torch.zeros(2, 2, 40)}, "a head has 40 numbers, expected a multiple of 16"),
        (ValueError, {"k": torch.zeros(2, 2, 32).double()}, "k is torch.float64"),
        (ValueError, {"v": torch.zeros(2, 2, 32).half()}, r"v is torch.float16 .*, expected torch.float32"),
        (ValueError, {"k": torch.zeros(2, 32)}, r"k has shape \(2, 32\), expected \[T, Hkv, D\]"),
    ],
)
def test_refusals(error: type[Exception], given: dict[str, Any], said: str) -> None:
    with pytest.raises(error, match=said) as raised:
        kv_append(*append_row(**given))
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(INTERPRETED, reason="nothing of Triton in it")
def test_refusals_of_pages_as_they_are() -> None:
    with pytest.raises(FormatError, match="mu with bf16 pages; keys that are not rounded need no offset"):
        kv_append(*append_row("bf16", mu=torch.zeros(2, 32)))
    with pytest.raises(FormatError, match=r"the scales of k are .*, expected none for bf16"):
        kv_append(*append_row("bf16", scales=plane(3, 2, 16, 2)))
    with pytest.raises(FormatError, match="a page holds 24 tokens, expected one of 1, 2, 4, 8"):
        kv_append(*append_row(pages=KVPages(*(torch.zeros(3, 2, 24, 32) for _ in range(2)))))
    kv_append(*append_row("int4"))
    with pytest.raises(FormatError, match="slots: 48 is beyond the last of 3 pages of 16 tokens"):
        kv_append(*append_row("int4", slots=torch.tensor([0, 48])), impl="reference")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter(run_interpreted: Callable[..., str]) -> None:
    """This file again with Triton's bodies."""
    said = run_interpreted(Path(__file__), "-k", "triton")
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) >= 40, said[-500:]


@pytest.mark.full
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter_of_the_oldest(run_interpreted: Callable[..., str], oldest_triton: Path) -> None:
    run_interpreted(Path(__file__), "-k", "triton", triton=oldest_triton)
