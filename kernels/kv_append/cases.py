"""What kv_append is tested and timed at. m is fresh tokens, k the numbers of a head, n all numbers of a token's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...formats.kvcache import PAGE, KVPages
from ..inspection import Expect
from ..shapes import DECODE, PREFILL, Case, empty, generator

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6
# query heads, key heads, numbers of a head
MODELS = {"qwen3-0.6b": (16, 8, 128), "qwen3-8b": (32, 8, 128), "qwen3-32b": (64, 8, 128)}


@dataclass(frozen=True)
class AppendCase(Case):
    """m tokens of `heads` query and `kv_heads` key heads; norm and turn say what is done to them; `strided`: pages whose
    heads lie inside of rows, as other engines have them."""

    heads: int = 0
    kv_heads: int = 1
    page: int = PAGE
    norm: bool = True
    turn: bool = True
    strided: bool = False


def small(m: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype, page: int = 16, *flags: str) -> AppendCase:
    """A small case; its name says all: `small.t3.q4.kv2.d64.p16.fp16.norm.turn`."""
    kind = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
    name = ".".join([f"small.t{m}.q{heads}.kv{kv_heads}.d{size}.p{page}.{kind}", *flags])
    on = ("norm" in flags, "turn" in flags, "strided" in flags)
    return AppendCase(name, m, (heads + 2 * kv_heads) * size, size, "", dtype, False, True, heads, kv_heads, page, *on)


SMALL = (
    small(1, 2, 1, 16, FP32, 16),
    small(1, 4, 2, 128, BF16, 64, "norm", "turn"),
    small(3, 4, 4, 64, FP16, 16, "norm", "turn"),
    small(5, 5, 1, 80, FP16, 16, "turn"),
    small(2, 7, 7, 96, FP32, 32, "norm", "turn", "strided"),
    small(3, 0, 3, 128, FP16, 16),
    small(2, 16, 1, 256, FP16, 128, "norm"),
    small(4, 12, 2, 48, BF16, 16, "norm", "turn", "strided"),
)
REAL = tuple(
    AppendCase(f"{model}.append.{batch}", m, (q + 2 * kv) * d, d, small=False, heads=q, kv_heads=kv)
    for model, (q, kv, d) in MODELS.items()
    for batch, m in [(f"decode.b{m}", m) for m in DECODE] + [(f"prefill.t{m}", m) for m in PREFILL]
)
CASES = SMALL + REAL


def pages_like(case: Any, count: int, device: str, fill: float = float("nan")) -> KVPages:
    """Pages that hold `fill`; strided ones are [pages, P, Hkv, D] in memory, keys and values side by side."""
    shape = (count, case.kv_heads, case.page, case.k)
    if not case.strided:
        k, v = (torch.full(shape, fill, dtype=case.dtype, device=device) for _ in range(2))
        return KVPages(k, v)
    both = torch.full((count, case.page, case.kv_heads, 2, case.k), fill, dtype=case.dtype, device=device)
    k, v = (both[:, :, :, i].transpose(1, 2) for i in range(2))
    return KVPages(k, v)


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
    return k, v, pages_like(case, count, device), slots, q if case.heads else None, positions, cos_sin, *weights, EPS


def blank(case: AppendCase) -> tuple[Any, ...]:
    """The flat arguments of a case without data, as the Triton body takes them."""
    rows = empty(case.m, case.heads + 2 * case.kv_heads, case.k, dtype=case.dtype)
    q, k, v = rows.split((case.heads, case.kv_heads, case.kv_heads), 1)
    count = -(-case.m // case.page) + 1
    pages = [empty(count, case.kv_heads, case.page, case.k, dtype=case.dtype) for _ in range(2)]
    slots = empty(case.m, dtype=torch.int64)
    weight, table = empty(case.k, dtype=case.dtype), empty(4096, case.k)
    return k, v, *pages, None, None, slots, q, slots, table, weight, weight, EPS, "bf16"


def problems(expect: Expect) -> list[Case]:
    """What inspection compiles of everything: each model at one token and at many, in each type."""
    found = [c for c in REAL if c.name.endswith((".b1", ".t512"))]
    return [AppendCase(**(vars(c) | {"name": f"{c.name}.{d}", "dtype": d})) for c in found for d in expect.dtypes]


EXPECT = Expect(
    quick=tuple(c for c in REAL if c.name in ("qwen3-0.6b.append.decode.b1", "qwen3-32b.append.decode.b16")),
    specs=("",),
    dtypes=(BF16, FP16, FP32),
    mma={"sm_80": "", "sm_89": "", "sm_90": "", "sm_100": ""},
    weight_operand={"sm_80": "none", "sm_89": "none", "sm_90": "none", "sm_100": "none"},
    ceilings={"sm_80": {}, "sm_89": {}, "sm_90": {}, "sm_100": {}},
)
