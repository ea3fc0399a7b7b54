"""What kv_append is tested and timed at. m is fresh tokens, k the numbers of a head, n all numbers of a token's rows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...formats.kvcache import PAGE, SPECS, KVPages, KVSpec, row_dtype, row_length
from ..inspection import Expect
from ..shapes import DECODE, PREFILL, Case, empty, generator

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6
# query heads, key heads, numbers of a head
MODELS = {"qwen3-0.6b": (16, 8, 128), "qwen3-8b": (32, 8, 128), "qwen3-32b": (64, 8, 128)}


@dataclass(frozen=True)
class AppendCase(Case):
    """m tokens of `heads` query and `kv_heads` key heads into pages of `kv`; norm, turn and mu say what is done to them;
    `strided`: pages whose heads lie inside of rows, key, value and scale word side by side."""

    heads: int = 0
    kv_heads: int = 1
    page: int = PAGE
    norm: bool = True
    turn: bool = True
    strided: bool = False
    mu: bool = False
    kv: str = "bf16"


def small(m: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype, page: int = 16, *flags: str) -> AppendCase:
    """A small case; its name says all: `small.t3.q4.kv2.d64.p16.fp16.norm.turn`."""
    kind = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
    name = ".".join([f"small.t{m}.q{heads}.kv{kv_heads}.d{size}.p{page}.{kind}", *flags])
    norm, turn, strided, mu = (flag in flags for flag in ("norm", "turn", "strided", "mu"))
    kv = next((flag for flag in flags if flag in SPECS), "bf16")
    n = (heads + 2 * kv_heads) * size
    return AppendCase(name, m, n, size, "", dtype, False, True, heads, kv_heads, page, norm, turn, strided, mu, kv)


SMALL = (
    small(1, 2, 1, 16, FP32, 16),
    small(1, 4, 2, 128, BF16, 64, "norm", "turn"),
    small(3, 4, 4, 64, FP16, 16, "norm", "turn"),
    small(5, 5, 1, 80, FP16, 16, "turn"),
    small(2, 7, 7, 96, FP32, 32, "norm", "turn", "strided"),
    small(3, 0, 3, 128, FP16, 16),
    small(2, 16, 1, 256, FP16, 128, "norm"),
    small(4, 12, 2, 48, BF16, 16, "norm", "turn", "strided"),
    small(5, 4, 2, 128, FP16, 16, "int8", "norm", "turn", "mu"),
    small(4, 2, 2, 64, FP16, 16, "k8v4"),
    small(4, 6, 3, 80, FP16, 16, "int4", "norm", "turn", "mu"),
    small(3, 0, 2, 96, FP16, 32, "int4", "turn", "strided"),
    small(2, 2, 1, 16, FP32, 64, "int4-sym", "norm"),
    small(5, 2, 2, 256, FP16, 16, "k8v4-sym", "norm", "turn", "strided"),
    small(5, 8, 8, 64, BF16, 128, "k8v4", "norm", "turn", "mu", "strided"),
    small(3, 4, 4, 48, BF16, 16, "int8", "strided"),
)
REAL = tuple(
    AppendCase(f"{model}.append.{batch}", m, (q + 2 * kv) * d, d, small=False, heads=q, kv_heads=kv)
    for model, (q, kv, d) in MODELS.items()
    for batch, m in [(f"decode.b{m}", m) for m in DECODE] + [(f"prefill.t{m}", m) for m in PREFILL]
)
REAL += tuple(replace(c, name=f"{c.name}.{kv}", kv=kv) for c in REAL for kv in SPECS[1:4])
CASES = SMALL + REAL


def filled(size: tuple[int, ...], dtype: torch.dtype, fill: float, device: str) -> torch.Tensor:
    """A tensor of `fill`; of integers, that have no NaN, of bytes 0x80."""
    held = torch.empty(size, dtype=dtype, device=device)
    if dtype.is_floating_point or fill == fill:
        return held.fill_(fill)
    return held.view(torch.uint8).fill_(128).view(dtype)


def pages_like(case: Any, count: int, device: str, fill: float = float("nan")) -> KVPages:
    """Pages that hold `fill`; strided ones are [pages, P, Hkv, ...] in memory, key, value and scale word side by side."""
    spec = KVSpec.parse(case.kv)
    kinds = [(row_length(bits, case.k), row_dtype(bits, case.dtype)) for bits in (spec.k_bits, spec.v_bits)]
    kinds += [(spec.channels, FP16)] if spec.quantised else []
    if not case.strided:
        held = [filled((count, case.kv_heads, case.page, n), dtype, fill, device) for n, dtype in kinds]
    else:
        ends = list(itertools.accumulate(n * dtype.itemsize for n, dtype in kinds))
        record = torch.empty(count, case.page, case.kv_heads, ends[-1], dtype=torch.uint8, device=device)
        held = []
        for (n, dtype), end in zip(kinds, ends, strict=True):
            part = record[..., end - n * dtype.itemsize : end].view(dtype).transpose(1, 2)
            held.append(part.copy_(filled((n,), dtype, fill, device)))
    return KVPages(held[0], held[1], spec, held[2] if spec.quantised else None)


def inputs(case: AppendCase, seed: int, device: str = "cpu") -> tuple[Any, ...]:
    """The op's arguments for a case, random in `seed`: slots are scattered, and of four tokens or more one has none."""
    random = generator(case, seed, device)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random, device=random.device)

    heads = case.heads + 2 * case.kv_heads
    rows = (2 * draw(case.m, heads, case.k)).to(case.dtype)  # q, k and v side by side, as one product gives them
    q, k, v = rows.split((case.heads, case.kv_heads, case.kv_heads), 1)
    count = -(-case.m // case.page) + 1
    slots = torch.randperm(count * case.page, generator=random, device=random.device)[: case.m]
    if case.m >= 4:
        slots[1] = -1
    weights: tuple[torch.Tensor | None, ...] = (None, None)
    if case.norm:
        weights = tuple((1 + 0.2 * draw(case.k)).to(case.dtype) for _ in range(2))
    positions = cos_sin = None
    if case.turn:
        positions = torch.randint(0, 50, (case.m,), generator=random, device=random.device)
        angle = draw(50, case.k // 2)
        cos_sin = torch.cat((angle.cos(), angle.sin()), 1)
    pages = pages_like(case, count, device)
    if case.mu:
        pages = replace(pages, mu=draw(case.kv_heads, case.k).contiguous())
    return k, v, pages, slots, q if case.heads else None, positions, cos_sin, *weights, EPS


def blank(case: AppendCase) -> tuple[Any, ...]:
    """The flat arguments of a case without data, as the Triton body takes them."""
    rows = empty(case.m, case.heads + 2 * case.kv_heads, case.k, dtype=case.dtype)
    q, k, v = rows.split((case.heads, case.kv_heads, case.kv_heads), 1)
    count = -(-case.m // case.page) + 1
    spec = KVSpec.parse(case.kv)
    sides = [(row_length(bits, case.k), row_dtype(bits, case.dtype)) for bits in (spec.k_bits, spec.v_bits)]
    pages = [empty(count, case.kv_heads, case.page, n, dtype=dtype) for n, dtype in sides]
    scales = empty(count, case.kv_heads, case.page, spec.channels, dtype=FP16) if spec.quantised else None
    mu = empty(case.kv_heads, case.k) if spec.quantised else None
    slots = empty(case.m, dtype=torch.int64)
    weight, table = empty(case.k, dtype=case.dtype), empty(4096, case.k)
    return k, v, *pages, scales, mu, slots, q, slots, table, weight, weight, EPS, case.kv


def problems(expect: Expect) -> list[Case]:
    """What inspection compiles of everything: each model and spec at one token and at many, in each type."""
    found = [c for c in REAL if c.m in (1, 512)]
    return [AppendCase(**(vars(c) | {"name": f"{c.name}.{d}", "dtype": d})) for c in found for d in expect.dtypes]


QUICK = (
    "qwen3-0.6b.append.decode.b1",
    "qwen3-32b.append.decode.b16",
    "qwen3-8b.append.decode.b16.int8",
    "qwen3-8b.append.decode.b16.k8v4",
    "qwen3-8b.append.decode.b16.int4",
)
EXPECT = Expect(
    quick=tuple(c for c in REAL if c.name in QUICK),
    specs=("",),
    dtypes=(BF16, FP16, FP32),
    mma={"sm_80": "", "sm_89": "", "sm_90": "", "sm_100": ""},
    weight_operand={"sm_80": "none", "sm_89": "none", "sm_90": "none", "sm_100": "none"},
    ceilings={"sm_80": {}, "sm_89": {}, "sm_90": {}, "sm_100": {}},
    narrow_stores=1,  # the scale words of some heads; rows leave 16 bytes at a time
)
