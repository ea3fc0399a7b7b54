"""A paged cache of keys and values: what lies where, and what a byte means. Ops read pages from here and describe them nowhere else.

One layer is two tensors of rows and, when they are quantised, a plane of scale words beside them. Page-major, head before row:

    k        [pages, Hkv, P, row]       page  0                  1                  a page of a head is one piece of memory;
    v        [pages, Hkv, P, row]       head  0     1     2      0     1     2      a row is D numbers of one token, filled
    scales   [pages, Hkv, P, C] fp16    row   0..P  0..P  0..P   0..P  0..P  0..P   up to a multiple of 16 bytes

    token t of sequence b               page = table[b, t // P],  row = t % P,  slot = page * P + row
    table [B, at least S / P] int32     any page may be any sequence's; what a page held before is never read

    spec       K            V            C    scale word                        bytes per token and head, D = 128
    bf16       as they are  as they are  0    none                              512 (in a type of 16 bits)
    int8       int8         int8         2    k_scale v_scale                   260
    k8v4       int8         4 bits       4    k_scale v_scale   -      v_offset 200
    int4       4 bits       4 bits       4    k_scale v_scale k_offset v_offset 136
    k8v4-sym   int8         4 bits       2    k_scale v_scale                   196
    int4-sym   4 bits       4 bits       2    k_scale v_scale                   132

A 4-bit row, D = 128: byte j = x[j] | x[j + 64] << 4, each number u in 0 .. 15, so that halves stay in one piece and a pair that
RoPE turns is one byte.

    int8       x = q * scale             q in -127 .. 127      scale = fp16(max(absmax / 127, 1e-6))
    4 bits     x = u * scale + offset    u in 0 .. 15          scale = fp16(max((hi - lo) / 15, 1e-6)), offset = fp16(lo)
    symmetric  x = (u - 8) * scale       u in 1 .. 15          scale = fp16(max(absmax / 7, 1e-6))

Scales and offsets beyond fp16 become +-65504. Codes are found with the fp16 words as they are stored, by a division, a clamp and
rounding half to even, all in fp32. A row that holds NaN or Inf becomes bytes of 0 under a scale (and offset) of NaN: it shows.

`mu` fp32 [Hkv, D] is subtracted from keys before they are rounded, one value for every request that shares pages: softmax does not
see q . mu, which is the same for all keys of a query (SageAttention, arXiv:2410.02367). Logarithms of sums and softcap do.

Strides are free but for the last of k and v, which is 1, so caches of other engines are read in place: `v_scales` when K and V keep
words apart (scale, then offset), fp32 words, `nibbles` "pairs" (byte j = x[2j] | x[2j + 1] << 4), `zeros` "zero" (x = (u - offset)
* scale, words bf16 too) or "mantissa" (the zero is the lowest four bits of the fp32 scale), pages of any power of two down to 1. Rows past the
length of a sequence may hold anything, NaN too. Page 0 is as good as any other; a slot below 0 is no slot.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .huge import zeros
from .spec import FormatError

PAGE = 64  # tokens, unless asked otherwise
PAGES = (16, 32, 64, 128)
READABLE_PAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # of another engine's cache
ALIGN = 16  # bytes of a row
SMALLEST, LARGEST = 1e-6, 65504.0  # of a scale
_NAMES = {
    "bf16": (16, 16, False),
    "int8": (8, 8, False),
    "k8v4": (8, 4, False),
    "int4": (4, 4, False),
    "k8v4-sym": (8, 4, True),
    "int4-sym": (4, 4, True),
}
SPECS = tuple(_NAMES)


@dataclass(frozen=True)
class KVSpec:
    """How keys and values are held, by the bits of each; `symmetric` is about the 4-bit ones.

    16 is "as they are": in the type of the model, fp32 on a CPU too.
    """

    k_bits: int = 16
    v_bits: int = 16
    symmetric: bool = False

    def __post_init__(self) -> None:
        if (self.k_bits, self.v_bits, self.symmetric) not in _NAMES.values():
            found = f"keys of {self.k_bits} and values of {self.v_bits} bits{', symmetric' if self.symmetric else ''}"
            raise FormatError(f"there is no cache of {found}; known: {', '.join(SPECS)}")

    @classmethod
    def parse(cls, text: str) -> KVSpec:
        """The spec of a printed name; FormatError for one that is not known."""
        if text not in _NAMES:
            raise FormatError(f"cache spec {text!r} is not one; known: {', '.join(SPECS)}")
        return cls(*_NAMES[text])

    def __str__(self) -> str:
        return next(name for name, is_ in _NAMES.items() if is_ == (self.k_bits, self.v_bits, self.symmetric))

    @property
    def quantised(self) -> bool:
        return self.k_bits < 16

    @property
    def has_offsets(self) -> bool:
        """Whether 4-bit numbers have an offset of their own."""
        return self.v_bits == 4 and not self.symmetric

    @property
    def channels(self) -> int:
        """fp16 numbers of a scale word."""
        return 0 if not self.quantised else 4 if self.has_offsets else 2

    def bytes_per_token(self, head_dim: int, kv_heads: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of one token of one layer; `dtype` is the model's, for numbers that stay as they are."""
        rows = sum(row_length(bits, head_dim) * row_dtype(bits, dtype).itemsize for bits in (self.k_bits, self.v_bits))
        return kv_heads * (rows + 2 * self.channels)


BF16 = KVSpec()


class Form(NamedTuple):
    """How the bytes of pages are read: spec, order of nibbles, what stands behind a scale."""

    spec: KVSpec
    nibbles: str = "halves"
    zeros: str = "offset"


@functools.cache
def parse_form(text: str) -> Form:
    """The Form of `KVPages.form`: "int4", or "int4 pairs zero" for another engine's."""
    name, *flags = text.split()
    form = Form(KVSpec.parse(name), *flags)
    if form.nibbles not in ("halves", "pairs") or form.zeros not in ("offset", "zero", "mantissa"):
        raise FormatError(f"pages {text!r}: expected nibbles halves or pairs, zeros offset, zero or mantissa")
    return form


@dataclass(frozen=True, eq=False)
class KVPages:
    """The pages of one layer: k, v [pages, Hkv, P, row]; scales [pages, Hkv, P, C]; mu fp32 [Hkv, D] or None.

    k and v are of the model's type (bf16), int8, or uint8 with two 4-bit numbers a byte. With `v_scales` scales holds the words
    of K only, [pages, Hkv, P, 1 or 2], and v_scales those of V.

    Made from these once, because a view costs more than all checks of a call:
    form   what ops are told: the spec's name, and how bytes are read where that is not our way
    words  the scale words of K and of V, [pages, Hkv, P, 1 or 2] each: scale, and offset where there is one
    """

    k: torch.Tensor
    v: torch.Tensor
    spec: KVSpec = BF16
    scales: torch.Tensor | None = None
    mu: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None
    nibbles: str = "halves"
    zeros: str = "offset"
    form: str = field(init=False, repr=False)
    words: tuple[torch.Tensor | None, torch.Tensor | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        plain = self.nibbles == "halves" and self.zeros == "offset"
        words = self.scales, self.v_scales
        if self.scales is not None and self.v_scales is None:
            words = self.scales[..., 0::2], self.scales[..., 1::2]
        object.__setattr__(self, "form", str(self.spec) if plain else f"{self.spec} {self.nibbles} {self.zeros}")
        object.__setattr__(self, "words", words)

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        held = (self.k, self.v, self.scales, self.v_scales)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def pages_as(
    form: str,
    k: torch.Tensor,
    v: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    mu: torch.Tensor | None,
) -> KVPages:
    """The pages that an op was given part by part, their words as `KVPages.words` has them."""
    said = parse_form(form)
    return KVPages(k, v, said.spec, k_scales, mu, v_scales, said.nibbles, said.zeros)


def row_dtype(bits: int, dtype: torch.dtype) -> torch.dtype:
    """What rows of so many bits are held in; `dtype` is the model's."""
    return {16: dtype, 8: torch.int8, 4: torch.uint8}[bits]


def row_length(bits: int, head_dim: int) -> int:
    """Elements of a row: numbers, or bytes of two 4-bit ones, filled up to 16 bytes."""
    return -(-head_dim // (2 * ALIGN)) * ALIGN if bits == 4 else head_dim


def new_pages(
    pages: int,
    heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    page: int = PAGE,
    spec: KVSpec = BF16,
    mu: torch.Tensor | None = None,
) -> KVPages:
    """Fresh pages of one layer, zero; FormatError for sizes that no op takes. `dtype` of numbers that stay as they are."""
    if page not in PAGES:
        raise FormatError(f"new_pages: a page holds {page} tokens, expected one of {', '.join(map(str, PAGES))}")
    k, v = (
        zeros((pages, heads, page, row_length(bits, head_dim)), row_dtype(bits, dtype), device)
        for bits in (spec.k_bits, spec.v_bits)
    )
    scales = None
    if spec.quantised:
        scales = zeros((pages, heads, page, spec.channels), torch.float16, device)
    made = KVPages(k, v, spec, scales, mu)
    check_pages("new_pages", k, v, *made.words, mu, made.form, head_dim)
    return made


def pages_of(length: int, page: int = PAGE) -> int:
    """How many pages `length` tokens take."""
    return -(-length // page)


def slots_of(table: torch.Tensor, positions: torch.Tensor, page: int) -> torch.Tensor:
    """Slots int64 [B] of one token per sequence, at `positions` int64 [B]; table [B, pages] int32."""
    held = table.gather(1, (positions // page)[:, None])[:, 0]
    return held.to(torch.int64) * page + positions % page


def layer_specs(layers: int, spec: KVSpec, skip: Sequence[int] = (0,)) -> tuple[KVSpec, ...]:
    """One spec per layer: `spec`, and bf16 for the layers in `skip` (negative: from the end). FormatError for one not there."""
    if wrong := [i for i in skip if not -layers <= i < layers]:
        raise FormatError(f"layer {wrong[0]} is to stay bf16, the model has layers 0 .. {layers - 1}")
    kept = {i % layers for i in skip}
    return tuple(BF16 if i in kept else spec for i in range(layers))


# ---- what a byte means --------------------------------------------------------------------------------------------


def quantize(
    x: torch.Tensor, bits: int, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows [..., D] of a float type as (int8 [..., D] or bytes [..., row], scale fp16 [...], offset fp16 [...] or None)."""
    x = x.float()
    # divisors are tensors, since torch multiplies by the inverse of a number on a card
    good = torch.isfinite(x).all(-1)
    x = x.where(good[..., None], torch.zeros_like(x))
    offset = None
    if bits == 4 and not symmetric:
        low, high = x.amin(-1), x.amax(-1)
        scale, offset = (high - low) / x.new_tensor(15.0), (low.clamp(-LARGEST, LARGEST) + 0.0).half()  # never -0
        first, last = 0, 15
    else:
        last = 127 if bits == 8 else 7
        scale, first = x.abs().amax(-1) / x.new_tensor(float(last)), -last
    scale = scale.clamp(SMALLEST, LARGEST).half()
    shifted = x if offset is None else x - offset.float()[..., None]
    codes = (shifted / scale.float()[..., None]).clamp(first, last).round()
    if bits == 4 and symmetric:
        codes += 8
    codes = codes.where(good[..., None], torch.zeros_like(codes))
    nan = torch.full_like(scale, torch.nan)
    scale = scale.where(good, nan)
    offset = None if offset is None else offset.where(good, nan)
    return (codes.to(torch.int8) if bits == 8 else _packed(codes.to(torch.uint8))), scale, offset


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Numbers 0 .. 15 [..., D] as bytes [..., row], halves of a row in one byte."""
    low, high = codes.chunk(2, -1)
    missing = row_length(4, codes.shape[-1]) - low.shape[-1]
    return torch.nn.functional.pad(low | high << 4, (0, missing))


def dequantize(
    rows: torch.Tensor,
    words: torch.Tensor,
    bits: int,
    size: int,
    symmetric: bool = False,
    nibbles: str = "halves",
    zeros: str = "offset",
) -> torch.Tensor:
    """fp32 [..., size] of rows [..., row] and their words [..., 1 or 2] (scale, offset)."""
    words = words.float()
    scale, offset = words[..., :1], words[..., 1:2]
    if bits == 8:
        return rows[..., :size].float() * scale
    packed = rows[..., : size // 2]
    low, high = (packed & 15).float(), (packed >> 4).float()
    codes = torch.cat((low, high), -1) if nibbles == "halves" else torch.stack((low, high), -1).flatten(-2)
    if symmetric:
        return (codes - 8) * scale
    if zeros == "zero":
        return (codes - offset) * scale
    if zeros == "mantissa":
        return (codes - (words[..., :1].contiguous().view(torch.int32) & 15).float()) * scale
    return codes * scale + offset


def read(pages: KVPages, page: torch.Tensor, row: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 keys and values [n, Hkv, size] of the tokens in rows `row` of pages `page`, int64 [n]; `mu` is not added back."""
    found = []
    for rows, words, bits in zip((pages.k, pages.v), pages.words, (pages.spec.k_bits, pages.spec.v_bits), strict=True):
        mine = rows[page, :, row]  # [n, Hkv, row]
        if words is None:
            found.append(mine.float())
            continue
        how = (pages.spec.symmetric, pages.nibbles, pages.zeros)
        found.append(dequantize(mine, words[page, :, row], bits, size, *how))
    return found[0], found[1]


# ---- checks -------------------------------------------------------------------------------------------------------


def check_pages(
    op: str,
    k: torch.Tensor,
    v: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    mu: torch.Tensor | None,
    form: str,
    size: int,
) -> None:
    """FormatError unless these are pages of one layer as `form` holds them, of heads of `size`. Looks at shapes and strides only."""
    spec, _, zeros = parse_form(form)
    if size % 16 or size < 16:
        raise FormatError(f"{op}: a head has {size} numbers, expected a multiple of 16")
    for name, rows, bits in (("k", k, spec.k_bits), ("v", v, spec.v_bits)):
        right = rows.is_floating_point() if bits == 16 else rows.dtype == row_dtype(bits, k.dtype)
        kind = {16: "a float type", 8: "int8", 4: "uint8"}[bits]
        least = row_length(bits, size) if bits != 4 else size // 2
        if rows.ndim != 4 or not right or rows.shape[:3] != k.shape[:3] or rows.shape[3] < least:
            found = f"{rows.dtype} {tuple(rows.shape)}"
            raise FormatError(
                f"{op}: the pages of {name} are {found}, expected {kind} [pages, Hkv, P, {least}] for {form}"
            )
        if bits == 16 and (rows.shape[3] != size or rows.dtype != k.dtype):
            found = f"{k.dtype} {tuple(k.shape)} and {v.dtype} {tuple(v.shape)}"
            raise FormatError(f"{op}: the pages are {found}, expected k and v alike, [pages, Hkv, P, {size}]")
        if rows.stride(3) != 1:
            raise FormatError(f"{op}: the pages of {name} have strides {rows.stride()}, expected 1 for the last")
    page = k.shape[2]
    if page not in READABLE_PAGES:
        raise FormatError(f"{op}: a page holds {page} tokens, expected one of {', '.join(map(str, READABLE_PAGES))}")
    for name, words, bits in (("k", k_scales, spec.k_bits), ("v", v_scales, spec.v_bits)):
        channels = 0 if not spec.quantised else 2 if bits == 4 and spec.has_offsets and zeros != "mantissa" else 1
        if words is None and channels == 0:
            continue
        if words is None or channels == 0:
            found = "none" if words is None else f"{words.dtype} {tuple(words.shape)}"
            raise FormatError(f"{op}: the scales of {name} are {found}, expected {channels or 'none'} for {form}")
        wide = words.ndim == 4 and words.shape[:3] == k.shape[:3] and words.shape[3] >= channels
        types = (torch.float16, torch.float32, *((torch.bfloat16,) if zeros == "zero" else ()))
        if not wide or words.dtype not in types:
            found = f"{words.dtype} {tuple(words.shape)}"
            wanted = f"float16 or float32 {(*k.shape[:3], channels)}"
            raise FormatError(f"{op}: the scales of {name} are {found}, expected {wanted} for {form}")
    if zeros == "mantissa" and any(w is not None and w.dtype != torch.float32 for w in (k_scales, v_scales)):
        raise FormatError(f"{op}: zeros in the mantissa need float32 scales")
    if mu is not None and (mu.dtype != torch.float32 or mu.shape != (k.shape[1], size) or not mu.is_contiguous()):
        found = f"{mu.dtype} {tuple(mu.shape)}"
        raise FormatError(f"{op}: mu is {found}, expected contiguous float32 {(k.shape[1], size)}")
    if mu is not None and not spec.quantised:
        raise FormatError(f"{op}: mu with bf16 pages; keys that are not rounded need no offset")


def unaligned(k: torch.Tensor, v: torch.Tensor) -> str | None:
    """None, or why rows cannot be copied 16 bytes at a time: another engine's layout, read 4 bytes at a time."""
    for name, rows in (("k", k), ("v", v)):
        steps = [stride * rows.element_size() for stride in rows.stride()[:3]]
        if any(step % ALIGN for step in steps) or rows.storage_offset() * rows.element_size() % ALIGN:
            return f"the rows of {name} do not lie 16 bytes apart: 4-byte copies"
    return None


def check_values(
    pages: KVPages,
    *,
    table: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    table_starts: torch.Tensor | None = None,
) -> None:
    """FormatError unless every page and slot that would be read or written exists. Exact and slow: reads the tensors."""
    count, page = pages.k.shape[0], pages.page
    if slots is not None and slots.numel() and int(slots.max()) >= count * page:
        raise FormatError(f"slots: {int(slots.max())} is beyond the last of {count} pages of {page} tokens")
    if slots is not None and (live := slots[slots >= 0]).unique().numel() != live.numel():
        raise FormatError("slots: one slot stands twice; two tokens would be written over each other")
    if table is None or lengths is None:
        return
    for b, length in enumerate(lengths.tolist()):
        mine = table_row(table, b, table_starts)
        if length < 0 or length > len(mine) * page:
            raise FormatError(f"lengths: sequence {b} has {length} tokens, its row of the table {len(mine) * page}")
        if wrong := [p for p in mine[: pages_of(length, page)].tolist() if not 0 <= p < count]:
            raise FormatError(f"table: sequence {b} names page {wrong[0]}, there are {count}")


def table_row(table: torch.Tensor, b: int, starts: torch.Tensor | None = None) -> torch.Tensor:
    """The pages of sequence b, in order: a row of table [B, pages], or with starts [B + 1] a piece of table [n] (CSR)."""
    return table[b] if starts is None else table[int(starts[b]) : int(starts[b + 1])]
