"""What gather_dequantize is tested and timed at. m is rows of the outputs, k the numbers of a head, n all numbers of a row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...formats.kvcache import PAGE, KVPages, KVSpec, pages_of, row_dtype, row_length
from ..inspection import Expect
from ..shapes import Case, empty, generator

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# key heads, numbers of a head
MODELS = {"qwen3-0.6b": (8, 128), "qwen3-8b": (8, 128), "qwen2.5-7b": (4, 128)}
DEPTHS = ((1, 2048), (1, 32768), (8, 8192))


@dataclass(frozen=True)
class GatherCase(Case):
    """Sequences of `lengths` tokens in pages of `kv`, with `gap` unused rows behind each; `strided`: pages whose heads lie inside of
    rows; csr: table rows one after another; nibbles and zeros: another engine's; `dtype` of the outputs and of 16-bit pages."""

    kv: str = "int8"
    kv_heads: int = 1
    page: int = PAGE
    lengths: tuple[int, ...] = (1,)
    gap: int = 0
    mu: bool = False
    strided: bool = False
    csr: bool = False
    nibbles: str = "halves"
    zeros: str = "offset"
    parts: str = "kv"

    @property
    def form(self) -> str:
        """As KVPages.form says it."""
        plain = self.nibbles == "halves" and self.zeros == "offset"
        return self.kv if plain else f"{self.kv} {self.nibbles} {self.zeros}"


def small(
    kv: str, lengths: tuple[int, ...], kv_heads: int, size: int, dtype: torch.dtype, page: int = 16, **more: Any
) -> GatherCase:
    """A small case; its name says all: `small.int8.s1-130.kv2.d64.p16.fp16.mu`."""
    kind = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
    said = [name if value is True else f"{name}{value}" for name, value in more.items()]
    name = ".".join(["small", kv, "s" + "-".join(map(str, lengths)), f"kv{kv_heads}.d{size}.p{page}.{kind}", *said])
    m = sum(lengths) + len(lengths) * more.get("gap", 0)
    n = 2 * kv_heads * size
    return GatherCase(name, m, n, size, dtype=dtype, kv=kv, kv_heads=kv_heads, page=page, lengths=lengths, **more)


SMALL = (
    small("int8", (1,), 1, 16, FP32),
    small("int8", (130, 1, 0, 200), 2, 64, FP16, mu=True),
    small("k8v4", (33, 64), 2, 128, BF16, 64, mu=True),
    small("int4", (33, 7), 2, 80, FP16, mu=True),
    small("int4-sym", (16, 31), 1, 96, FP32, 32, strided=True),
    small("k8v4-sym", (70,), 2, 64, FP16, csr=True, gap=5),
    small("int4", (0, 40, 0), 3, 48, FP32, csr=True, mu=True, gap=3),
    small("int8", (65, 3), 2, 32, FP16, 128, strided=True, parts="k"),
    small("int4", (20,), 1, 256, FP16, parts="v"),
    small("bf16", (17, 0, 30), 2, 64, FP16, strided=True),
    small("bf16", (40,), 2, 80, BF16, 32, gap=2),
    small("bf16", (9, 9), 1, 128, FP32, 1, csr=True),
    small("int4", (37,), 2, 64, FP16, 4, nibbles="pairs"),
    small("int4", (21, 20), 1, 80, FP32, 16, nibbles="halves", zeros="zero", mu=True),
    small("int4", (50,), 2, 32, FP16, 16, nibbles="pairs", zeros="mantissa", mu=True),
    small("k8v4", (19,), 1, 64, FP16, 1, zeros="zero", csr=True),
)
REAL = tuple(
    GatherCase(
        f"{model}.gather.{kv}.b{b}.s{s}", b * s, 2 * heads * d, d, small=False, kv=kv, kv_heads=heads, lengths=(s,) * b
    )
    for model, (heads, d) in MODELS.items()
    for b, s in DEPTHS
    for kv in ("int8", "k8v4", "int4")
)
CASES = SMALL + REAL


def pages_like(case: GatherCase, live: torch.Tensor, random: torch.Generator) -> KVPages:
    """Pages of a case whose rows hold any bytes, and what no sequence may read where `live` [pages, P] is not set: NaN, -128."""
    spec, device, count = KVSpec.parse(case.kv), live.device, len(live)

    def draw(width: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory [pages, P, Hkv, width], as other engines have it."""
        shape = (count, case.page, case.kv_heads, width)
        if dtype.is_floating_point:
            rows = torch.randn(shape, generator=random, device=device).to(dtype)
        else:
            first, last = (-127, 128) if dtype == torch.int8 else (0, 256)
            rows = torch.randint(first, last, shape, generator=random, device=device, dtype=dtype)
        rows[~live] = torch.nan if dtype.is_floating_point else -128 if dtype == torch.int8 else 128
        return rows

    def placed(memory: torch.Tensor) -> torch.Tensor:
        return memory.transpose(1, 2) if case.strided else memory.transpose(1, 2).contiguous()

    k, v = (placed(draw(row_length(bits, case.k), row_dtype(bits, case.dtype))) for bits in (spec.k_bits, spec.v_bits))
    mu = torch.randn(case.kv_heads, case.k, generator=random, device=device) if case.mu else None
    if not spec.quantised:
        return KVPages(k, v, spec)
    if case.zeros == "offset" and case.nibbles == "halves":
        words = draw(spec.channels, FP16)
        words[..., :2] = 0.01 + 0.03 * words[..., :2].abs()
        return KVPages(k, v, spec, placed(words), mu)
    apart = []
    for bits in (spec.k_bits, spec.v_bits):
        words = draw(1 if bits == 8 or case.zeros == "mantissa" else 2, FP32)
        words[..., :1] = 0.01 + 0.03 * words[..., :1].abs()
        if case.zeros == "zero":
            words[..., 1:] = (8 + 2 * words[..., 1:]).round().clamp(0, 15)
        apart.append(placed(words))
    return KVPages(k, v, spec, apart[0], mu, apart[1], case.nibbles, case.zeros)


def inputs(case: GatherCase, seed: int, device: str = "cpu") -> tuple[Any, ...]:
    """The op's arguments for a case, random in `seed`: pages in random order, entries of the table past a length -1."""
    random = generator(case, seed, device)
    per = max(1, pages_of(max(case.lengths), case.page))
    batch = len(case.lengths)
    count = batch * per + 2
    table = torch.randperm(count, generator=random, device=random.device)[: batch * per].view(batch, per).int()
    live = torch.zeros(count, case.page, dtype=torch.bool, device=device)
    rows = []
    for row, length in zip(table, case.lengths, strict=True):
        at = torch.arange(length, device=device)
        live[row[at // case.page].long(), at % case.page] = True
        row[pages_of(length, case.page) :] = -1
        rows.append(row[: pages_of(length, case.page)])
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    room = torch.tensor([0, *(n + case.gap for n in case.lengths)], device=device)
    keys, values = "k" in case.parts, "v" in case.parts
    pages = pages_like(case, live, random)
    table_starts = None
    if case.csr:
        table = torch.cat(rows)
        counts = torch.tensor([0, *(len(row) for row in rows)], device=device)
        table_starts = counts.cumsum(0).to(torch.int32)
    starts = room.cumsum(0).to(torch.int32)
    return pages, table, lengths, starts, case.m, case.dtype, keys, values, case.k, table_starts


def blank(case: GatherCase) -> tuple[Any, ...]:
    """The flat arguments of a case without data, as the Triton body takes them."""
    spec, per, batch = KVSpec.parse(case.kv), pages_of(max(case.lengths), case.page), len(case.lengths)

    def part(width: int, dtype: torch.dtype) -> torch.Tensor:
        return empty(batch * per, case.kv_heads, case.page, width, dtype=dtype)

    k, v = (part(row_length(bits, case.k), row_dtype(bits, case.dtype)) for bits in (spec.k_bits, spec.v_bits))
    scales = part(spec.channels, FP16) if spec.quantised else None
    mu = empty(case.kv_heads, case.k) if case.mu else None
    pages = KVPages(k, v, spec, scales, mu)
    ints = [empty(*size, dtype=torch.int32) for size in ((batch,), (batch, per), (batch + 1,))]
    return (
        ints[0], k, v, *pages.words, mu, ints[1], None, ints[2], case.m, case.k, True, True, case.dtype, case.form,
    )  # fmt: skip


def problems(expect: Expect) -> list[Case]:
    """What inspection compiles of everything: forms with mu and without in each type, then head sizes and pages."""
    base = next(c for c in REAL if c.name.startswith("qwen3-8b"))
    sizes = ((64, 16), (80, 16), (96, 64), (256, 64))
    kinds = [(128, 64, mu, dtype) for mu in (False, True) for dtype in expect.dtypes]
    kinds += [(d, p, True, expect.dtypes[0]) for d, p in sizes]
    return [
        replace(base, name=f"{kv}.d{d}.p{p}.{'mu' if mu else 'plain'}.{dtype}", kv=kv, k=d, page=p, mu=mu, dtype=dtype)
        for kv in ("bf16", "int8", "int4", "int4-sym")
        for d, p, mu, dtype in kinds
        if kv != "bf16" or not mu
    ]


EXPECT = Expect(
    quick=tuple(
        replace(c, mu=True)
        for c in REAL
        if c.name in ("qwen3-8b.gather.k8v4.b1.s32768", "qwen3-8b.gather.int4.b1.s32768")
    ),
    specs=("",),
    dtypes=(BF16, FP16),
    mma={"sm_80": "", "sm_89": "", "sm_90": "", "sm_100": ""},
    weight_operand={"sm_80": "none", "sm_89": "none", "sm_90": "none", "sm_100": "none"},
    ceilings={"sm_80": {}, "sm_89": {}, "sm_90": {}, "sm_100": {}},
)
