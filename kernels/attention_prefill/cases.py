"""What attention_prefill is tested and timed at. m is fresh tokens of all sequences, k the numbers of a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...formats import kvcache
from ...formats.kvcache import PAGE, KVPages, KVSpec, pages_of
from ..inspection import Expect
from ..shapes import Case, empty, generator

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# query heads, key heads, numbers of a head
MODELS = {"qwen3-0.6b": (16, 8, 128), "qwen3-8b": (32, 8, 128), "qwen3-32b": (64, 8, 128)}
PROMPTS = ((512, 512), (2048, 2048), (512, 8192))  # fresh tokens, keys


@dataclass(frozen=True)
class PrefillCase(Case):
    """Sequences of `lengths` keys with `fresh` new tokens each, over pages of `form`.

    `flags`: strided (heads lie inside of rows), mu, sinks, softcap, window (of 20 keys), given (16-bit values come beside the pages),
    q16 (queries are not rounded), even (no q_starts), csr (the table in one row), pairs, zero (another engine's 4-bit rows).
    """

    heads: int = 1
    kv_heads: int = 1
    page: int = PAGE
    fresh: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] = (1,)
    form: str = "bf16"
    flags: tuple[str, ...] = ()

    @property
    def keys(self) -> int:
        """max_kv_len of the call."""
        return max(1, *self.lengths)

    @property
    def most(self) -> int:
        """max_q_len of the call."""
        return max(self.fresh)


def small(
    fresh: tuple[int, ...],
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    size: int,
    dtype: torch.dtype,
    form: str = "int8",
    page: int = 16,
    *flags: str,
) -> PrefillCase:
    """A small case; its name says all: `small.n20-3.s20-130.q4.kv2.d64.p16.int8.fp16`."""
    kind = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
    n, s = ("-".join(map(str, each)) for each in (fresh, lengths))
    name = ".".join([f"small.n{n}.s{s}.q{heads}.kv{kv_heads}.d{size}.p{page}", form.replace(" ", "_"), kind, *flags])
    m = sum(fresh)
    return PrefillCase(
        name, m, heads * size, size, "", dtype, False, True, heads, kv_heads, page, fresh, lengths, form, flags
    )


SMALL = (
    small((1,), (1,), 1, 1, 16, FP32, "bf16"),
    small((33, 1, 5), (70, 1, 0), 4, 2, 64, FP16, "bf16"),
    small((65,), (129,), 8, 2, 64, BF16, "bf16", 64),
    small((40, 17), (40, 150), 4, 2, 64, FP16, "int8"),
    small((70,), (70,), 4, 1, 128, FP32, "int8", 64, "mu"),
    small((40, 3), (130, 20), 6, 2, 96, FP16, "k8v4", 32, "window"),
    small((20, 50), (100, 60), 5, 1, 80, FP16, "int4", 16, "sinks"),
    small((33,), (40,), 4, 2, 64, FP16, "int4-sym", 16, "softcap", "mu"),
    small((24, 24), (24, 90), 4, 2, 32, FP16, "k8v4-sym", 16, "even", "strided"),
    small((30,), (90,), 4, 2, 64, FP16, "int8", 16, "given", "mu", "sinks"),
    small((30,), (90,), 4, 2, 64, FP16, "int8", 16, "q16"),
    small((30, 9), (90, 40), 4, 2, 64, FP16, "int4", 16, "q16", "csr"),
    small((20,), (70,), 2, 1, 64, FP16, "int4", 16, "pairs", "zero"),
    small((5, 0, 2), (3, 50, 0), 4, 4, 48, BF16, "int8", 16, "sinks"),  # fewer keys than tokens: the first see nothing
    small((40,), (560,), 7, 1, 256, FP32, "int4", 128, "window", "sinks", "mu"),
)
REAL = tuple(
    PrefillCase(
        f"{model}.prefill.n{n}.s{s}.{form}", n, q * d, d, small=False, heads=q, kv_heads=kv, fresh=(n,), lengths=(s,),
        form=form,
    )
    for model, (q, kv, d) in MODELS.items()
    for n, s in PROMPTS
    for form in ("bf16", "int8", "k8v4", "int4")
)  # fmt: skip
CASES = SMALL + REAL


def pages_for(case: PrefillCase, table: torch.Tensor, random: torch.Generator) -> KVPages:
    """Pages of random numbers where `table` and the lengths say a key lies; bytes of 0x80 and NaN everywhere else."""
    spec, (count, heads, size) = kvcache.parse_form(case.form).spec, (int(table.max()) + 2, case.kv_heads, case.k)
    live = torch.zeros(count, case.page, dtype=torch.bool, device=table.device)
    for row, length in zip(table, case.lengths, strict=True):
        at = torch.arange(length, device=table.device)
        live[row[at // case.page].long(), at % case.page] = True
    strided = "strided" in case.flags
    held: list[torch.Tensor] = []
    words: list[torch.Tensor] = []
    for bits in (spec.k_bits, spec.v_bits):
        x = torch.randn(count, heads, case.page, size, generator=random, device=random.device)
        if bits == 16:
            rows = x.to(case.dtype).masked_fill(~live[:, None, :, None], torch.nan)
        else:
            rows, scale, offset = kvcache.quantize(x, bits, spec.symmetric)
            rows = rows.masked_fill(~live[:, None, :, None], -128 if bits == 8 else 0x80)
            word = torch.stack((scale, torch.zeros_like(scale) if offset is None else offset), -1)
            words.append(word.masked_fill(~live[:, None, :, None], torch.nan))
        held.append(rows.transpose(1, 2).contiguous().transpose(1, 2) if strided else rows)
    if not spec.quantised:
        return KVPages(held[0], held[1])
    mu = torch.randn(heads, size, generator=random, device=random.device) if "mu" in case.flags else None
    if "pairs" in case.flags:  # the same bytes mean other numbers; a zero of 0 .. 15
        zeros = torch.randint(0, 16, words[0].shape[:3], generator=random, device=random.device).half()
        apart = (torch.stack((w[..., 0], zeros.where(w[..., 0].isfinite(), w[..., 0])), -1) for w in words)
        return KVPages(held[0], held[1], spec, next(apart), mu, next(apart), "pairs", "zero")
    plane = torch.stack((words[0][..., 0], words[1][..., 0]), -1)
    if spec.has_offsets:
        plane = torch.cat((plane, torch.stack((words[0][..., 1], words[1][..., 1]), -1)), -1)
    return KVPages(held[0], held[1], spec, plane, mu)


def _options(case: PrefillCase) -> tuple[int, float, int]:
    """(window, softcap, q_bits) of a case."""
    flags = case.flags
    return 20 if "window" in flags else -1, 1.5 if "softcap" in flags else 0.0, 16 if "q16" in flags else 8


def inputs(case: PrefillCase, seed: int, device: str = "cpu") -> tuple[Any, ...]:
    """The op's arguments for a case, random in `seed`: pages in random order, poison wherever no key lies."""
    random = generator(case, seed, device)
    per, batch, flags = pages_of(case.keys, case.page), len(case.lengths), case.flags
    order = torch.randperm(batch * per + 2, generator=random, device=random.device)[: batch * per]
    table = order.view(batch, per).int()
    pages = pages_for(case, table, random)
    q = torch.randn(case.m, case.heads, case.k, generator=random, device=random.device).to(case.dtype)
    lengths, fresh = (torch.tensor(each, dtype=torch.int32, device=device) for each in (case.lengths, case.fresh))
    starts = torch.nn.functional.pad(fresh.cumsum(0), (1, 0)).int()
    given: tuple[Any, Any] = (None, None)
    if "given" in flags:
        v = torch.randn(sum(case.lengths), case.kv_heads, case.k, generator=random, device=random.device)
        given = (v.to(case.dtype), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int())
    sinks = torch.randn(case.heads, generator=random, device=random.device) if "sinks" in flags else None
    table_starts = None
    if "csr" in flags:
        table, table_starts = table.flatten(), torch.arange(0, batch * per + 1, per, dtype=torch.int32, device=device)
    window, softcap, q_bits = _options(case)
    return (
        q, pages, table, lengths, None if "even" in flags else starts, case.most, case.keys, *given, None, window, sinks,
        softcap, q_bits, False, True, table_starts,
    )  # fmt: skip


def blank(case: PrefillCase) -> tuple[Any, ...]:
    """The flat arguments of a case without data, as the Triton body takes them."""
    per, batch, spec = pages_of(case.keys, case.page), len(case.lengths), KVSpec.parse(case.form)
    k, v = (
        empty(batch * per, case.kv_heads, case.page, kvcache.row_length(bits, case.k), dtype=kvcache.row_dtype(bits, case.dtype))
        for bits in (spec.k_bits, spec.v_bits)
    )  # fmt: skip
    scales = empty(batch * per, case.kv_heads, case.page, spec.channels, dtype=FP16) if spec.quantised else None
    words = KVPages(k, v, spec, scales).words
    given: tuple[Any, Any] = (None, None)
    if "given" in case.flags:
        given = (empty(sum(case.lengths), case.kv_heads, case.k, dtype=case.dtype), empty(batch + 1, dtype=torch.int32))
    starts = None if "even" in case.flags else empty(batch + 1, dtype=torch.int32)
    where = (empty(batch, per, dtype=torch.int32), None, empty(batch, dtype=torch.int32), starts)
    mu = empty(case.kv_heads, case.k) if "mu" in case.flags else None
    sinks = empty(case.heads) if "sinks" in case.flags else None
    window, softcap, q_bits = _options(case)
    sizes = (case.k**-0.5, case.most, case.keys, window, softcap, q_bits, False, False, case.form)
    return (empty(case.m, case.heads, case.k, dtype=case.dtype), k, v, *words, mu, *where, sinks, *sizes, *given)


def _compiled(
    form: str, *flags: str, size: int = 128, page: int = PAGE, group: int = 4, dtype: torch.dtype = BF16
) -> PrefillCase:
    """A call that inspection compiles: 1024 tokens over 4096 keys, 8 key heads."""
    name = ".".join([form.replace(" ", "_"), f"d{size}.p{page}.g{group}", *flags])
    return PrefillCase(
        name, 1024, 8 * group * size, size, "", dtype, False, False, 8 * group, 8, page, (1024,), (4096,), form, flags
    )


def problems(_: Expect) -> list[Case]:
    """What inspection compiles of everything: forms, head sizes, pages, groups, options."""
    forms = [_compiled(form) for form in kvcache.SPECS]
    forms += [_compiled(form, "given") for form in ("int8", "k8v4", "int4")]
    shapes = ((64, 64, 4), (80, 16, 5), (96, 64, 4), (256, 64, 2), (128, 16, 7), (128, 128, 16))
    sizes = [_compiled(form, size=d, page=p, group=g) for form in ("bf16", "int8", "int4") for d, p, g in shapes]
    options = [_compiled("int8", flag) for flag in ("window", "softcap", "sinks", "mu", "even", "q16")]
    return [*forms, *sizes, *options, _compiled("bf16", dtype=FP16), _compiled("int8", dtype=FP16)]


EXPECT = Expect(
    quick=(_compiled("bf16"), _compiled("int8"), _compiled("int8", "given"), _compiled("int4", "given")),
    specs=("",),
    dtypes=(BF16, FP16),
    mma={},
    weight_operand={},
    ceilings={},
)
