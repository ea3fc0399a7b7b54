"""What attention_decode is tested and timed at. m is fresh tokens of all sequences, k the numbers of a head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...formats.kvcache import PAGE, SPECS, KVSpec, new_pages, pages_of
from ..attention import flat_of
from ..attention_cases import paged
from ..inspection import Expect
from ..shapes import Case, empty, generator

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# query heads, key heads, numbers of a head
MODELS = {"qwen3-0.6b": (16, 8, 128), "qwen3-8b": (32, 8, 128), "qwen3-32b": (64, 8, 128)}
DEPTHS = ((1, 512), (1, 8192), (1, 32768), (8, 8192), (64, 1024))


@dataclass(frozen=True)
class AttentionCase(Case):
    """Sequences of `lengths` keys with `tokens` fresh ones each, or those of `fresh`. `spec` "" is bf16, pages as they are.

    `layout`: kernels/attention_cases.py. `csr`: tables in pieces.
    """

    heads: int = 1
    kv_heads: int = 1
    page: int = PAGE
    tokens: int = 1
    lengths: tuple[int, ...] = (1,)
    deterministic: bool = False
    fresh: tuple[int, ...] = ()
    window: int = -1
    sinks: bool = False
    softcap: float = 0.0
    mu: bool = False
    layout: str = ""
    csr: bool = False
    q_bits: int = 8
    splits: int = 0

    @property
    def keys(self) -> int:
        """max_kv_len of the call."""
        return max(1, *self.lengths)


def small(
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    size: int,
    dtype: torch.dtype,
    tokens: int = 1,
    page: int = 16,
    spec: str = "",
    **more: Any,
) -> AttentionCase:
    """A small case; its name says all: `small.s1-130.n1.q4.kv2.d64.p16.fp16.int8.window9`."""
    kind = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
    sizes, fresh = "-".join(map(str, lengths)), "-".join(map(str, more.get("fresh", (tokens,))))
    said = [k if v is True else v if k == "layout" else f"{k}{v}" for k, v in more.items() if v and k != "fresh"]
    name = ".".join(["small", f"s{sizes}.n{fresh}.q{heads}.kv{kv_heads}.d{size}.p{page}.{kind}", spec, *said])
    m = sum(more["fresh"]) if more.get("fresh") else len(lengths) * tokens
    tokens = max(more.get("fresh") or (tokens,))
    return AttentionCase(
        name.replace("..", "."), m, heads * size, size, spec, dtype, False, True, heads, kv_heads, page, tokens, lengths, **more
    )  # fmt: skip


SMALL = (
    small((1,), 1, 1, 16, FP32),
    small((130, 1, 0, 200), 4, 2, 64, FP16),
    small((64, 65), 8, 2, 128, BF16, 1, 64),
    small((33, 7), 10, 2, 80, FP16, 7),
    small((16, 300), 6, 1, 96, FP16, 16, 32),
    small((700,), 8, 2, 64, FP16, 2, 16, layout="nhd"),
    small((257, 2), 7, 7, 128, FP32, 2, 128),
    small((90,), 16, 1, 256, FP16, 1, 32),
    small((1100, 3), 4, 1, 32, FP16, 1, 16, deterministic=True),
    small((3, 0), 5, 1, 48, BF16, 4),  # fewer keys than fresh tokens: the first ones see nothing
)
FORMS = (  # what pages hold, and options
    small((70, 21), 4, 2, 64, FP16, 2, window=9, sinks=True),
    small((90, 4, 17), 4, 2, 32, FP32, softcap=20.0, fresh=(3, 1, 7), csr=True),
    small((130, 1, 0, 200), 4, 2, 64, FP16, 1, 16, "int8"),
    small((130, 33), 4, 2, 64, FP16, 1, 16, "k8v4", mu=True),
    small((64, 65), 8, 2, 128, FP16, 1, 64, "int4"),
    small((33, 7), 10, 2, 80, FP16, 7, 16, "int8", mu=True),
    small((33, 70), 5, 1, 80, FP16, 2, 16, "int4", mu=True),
    small((16, 300), 6, 1, 96, FP16, 16, 32, "k8v4"),
    small((300, 3), 4, 1, 96, FP32, 1, 32, "int4-sym", mu=True, deterministic=True),
    small((129, 5), 8, 1, 256, FP16, 2, 128, "k8v4-sym"),
    small((90, 4, 17), 4, 2, 64, FP16, 1, 16, "int8", fresh=(3, 1, 7), mu=True, sinks=True),
    small((90, 4, 17), 4, 2, 64, FP16, 1, 16, "int4", fresh=(1, 16, 0), csr=True),
    small((150, 40), 4, 2, 64, FP16, 1, 16, "int8", window=21, softcap=15.0, mu=True, sinks=True),
    small((150, 0), 4, 2, 64, FP16, 2, 16, "k8v4", window=21, sinks=True),
    small((140, 6), 4, 2, 64, FP16, 1, 16, "int4", window=70, softcap=15.0, mu=True),
    small((70, 9), 4, 2, 64, FP16, 1, 16, "int8", layout="nhd"),
    small((70, 9), 4, 2, 64, FP16, 1, 16, "k8v4", layout="record", mu=True),
    small((70, 9), 4, 2, 64, FP16, 1, 16, "int4", layout="record"),
    small((70, 9), 4, 2, 64, FP16, 1, 16, "int8", layout="inline"),
    small((70, 9), 4, 2, 64, FP16, 1, 16, "int4", layout="inline"),
    small((70, 9), 4, 2, 64, FP16, 1, 16, "k8v4", layout="zeros"),
    small((70, 9), 4, 2, 64, FP16, 1, 16, "int4", layout="zeros", mu=True),
    small((40, 9), 4, 2, 64, FP16, 1, 1, "int8", layout="nhd", csr=True),
    small((70, 9), 4, 2, 64, FP16, 2, 16, "int8", q_bits=16, mu=True),
    small((70, 9), 4, 2, 64, FP16, 1, 16, "int4", q_bits=16),
    small((70, 9), 4, 2, 64, BF16, 1, 64, "int8"),
    small((600, 40), 4, 2, 32, FP16, 1, 16, "int4-sym", splits=2),
)
REAL = tuple(
    AttentionCase(
        f"{model}.attention.b{b}.s{s}.n{n}",
        b * n,
        q * d,
        d,
        small=False,
        heads=q,
        kv_heads=kv,
        tokens=n,
        lengths=(s,) * b,
    )
    for model, (q, kv, d) in MODELS.items()
    for b, s in DEPTHS
    for n in (1, 4)
)
CASES = SMALL + FORMS + REAL


def inputs(case: AttentionCase, seed: int, device: str = "cpu") -> tuple[Any, ...]:
    """The op's arguments for a case, random in `seed`: pages in random order, poison wherever no key lies."""
    random = generator(case, seed, device)
    given = paged(
        random, case.lengths, case.kv_heads, case.k, case.dtype, case.page, case.spec or "bf16", case.layout, case.mu, case.csr
    )  # fmt: skip
    q = torch.randn(case.m, case.heads, case.k, generator=random, device=device).to(case.dtype)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    q_starts = None
    if case.fresh:
        q_starts = torch.tensor((0, *case.fresh), device=device).cumsum(0).int()
    sinks = torch.randn(case.heads, generator=random, device=device) if case.sinks else None
    how = (case.keys, case.tokens, None, case.deterministic, True, q_starts, case.window, sinks, case.softcap)
    return q, given.pages, given.table, lengths, *how, case.splits, case.q_bits, given.table_starts


def blank(case: AttentionCase) -> tuple[Any, ...]:
    """The flat arguments of a case without data, as the Triton body takes them; pages in the layout of new_pages."""
    per, batch = pages_of(case.keys, case.page), len(case.lengths)
    count = batch * per
    mu = empty(case.kv_heads, case.k) if case.mu else None
    of = KVSpec.parse(case.spec or "bf16")
    pages = new_pages(
        count, case.kv_heads, case.k, dtype=case.dtype, device="meta", page=case.page, spec=of, mu=mu
    )  # fmt: skip
    q, lengths = empty(case.m, case.heads, case.k, dtype=case.dtype), empty(batch, dtype=torch.int32)
    starts = empty(batch + 1, dtype=torch.int32)
    table = empty(count, dtype=torch.int32) if case.csr else empty(batch, per, dtype=torch.int32)
    flat = flat_of(
        q, pages, table, lengths, case.keys, case.tokens, q_starts=starts if case.fresh else None,
        table_starts=starts if case.csr else None, scale=None, window=case.window,
        sinks=empty(case.heads) if case.sinks else None, softcap=case.softcap, q_bits=case.q_bits,
        deterministic=case.deterministic, with_lse=False,
    )  # fmt: skip
    return *flat, case.splits


def _compiled(spec: str, d: int = 128, p: int = 64, g: int = 4, n: int = 1, **more: Any) -> AttentionCase:
    """A case that is compiled, not run: 8 sequences of 8192 keys, 8 key heads of g query heads."""
    said = ".".join(k if v is True else f"{k}{v}" for k, v in more.items())
    m, heads = 8 * n, 8 * g
    case = AttentionCase(
        f"{spec}.d{d}.p{p}.g{g}.n{n}.{said}", m, heads * d, d, spec, BF16, small=False, heads=heads, kv_heads=8, page=p,
        tokens=n, lengths=(8192,) * 8,
    )  # fmt: skip
    return replace(case, **more)


def problems(_: Expect) -> list[Case]:
    """What inspection compiles of everything: tiles of 16, 32 and 64 rows, head sizes, pages, groups, options."""
    tiles = [_compiled(spec, g=g, n=n) for spec in SPECS for g, n in ((4, 1), (8, 4), (8, 16))]
    shapes = (
        (80, 16, 5, 1), (256, 64, 2, 1), (128, 128, 4, 16), (64, 64, 4, 1), (64, 64, 8, 16), (96, 64, 4, 2), (256, 16, 8, 16),
        (128, 16, 7, 1), (128, 32, 16, 2),
    )  # fmt: skip
    sizes = [_compiled(spec, *shape) for spec in ("int8", "int4") for shape in shapes]
    sizes += [_compiled(spec, *shape) for spec in ("bf16", "k8v4") for shape in shapes[:3]]
    options = [
        _compiled(spec, n=2, **more)
        for spec in ("bf16", "int8", "int4")
        for more in (
            {"window": 1024, "sinks": True}, {"softcap": 30.0, "mu": spec != "bf16"}, {"fresh": (2,) * 8, "csr": True},
            {"deterministic": True},
        )
    ]  # fmt: skip
    unrounded = [_compiled(spec, q_bits=16) for spec in ("int8", "int4")]
    others = [replace(tiles[0], name="fp16", dtype=FP16), replace(tiles[3], name="int8.fp16", dtype=FP16)]
    return [*tiles, *sizes, *options, *unrounded, *others]


EXPECT = Expect(  # of the merge; what the loops over pages must show stands in kernels/attention_code.py
    quick=(*(_compiled(spec) for spec in ("bf16", "int8", "k8v4", "int4")), _compiled("int8", g=8, n=16)),
    specs=("",),
    dtypes=(BF16, FP16),
    mma={},
    weight_operand={},
    ceilings={},
)
