"""How a kernel reads pages for attention: what a form and strides allow, worked out on the host; attention_tiles.py does it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats.kvcache import KVSpec, parse_form
from .attention import Attention
from .device import Card
from .tiles import INTERPRETED

LINE = 16  # bytes of an asynchronous copy


def _power_of_2(n: int) -> int:
    """The next one."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Reading:
    """How a kernel reads pages: the bits and order of numbers, and what strides allow. One constant of the compilation.

    size D, page P. word: bits of a token's scale word, 32 or 64; 0: its numbers are read one by one. v_unit: bytes of V read as
    one number (0: pages of 16 bits or fp32). v_parts: tiles that a tile of V becomes. k_line, v_line: elements that strides are
    counted in. k_row, v_row: elements of a row that may be read. asm: conversion by assembly, or by its twin in plain
    operations. fp32: type in which weights meet quantised values, else bf16; Triton's interpreter computes on the bits of bf16.
    """

    k_bits: int
    v_bits: int
    size: int
    page: int
    symmetric: bool
    pairs: bool
    zeros: str
    word: int
    v_unit: int
    v_parts: int
    k_line: int
    v_line: int
    k_row: int
    v_row: int
    rounds_q: bool
    asm: bool
    fp32: bool

    @property
    def name(self) -> str:
        """For people: `int8 d128 p64 units2 parts2 word32`."""
        given = self.v_bits == 16 > self.k_bits  # values that do not come from the pages
        spec = f"k{self.k_bits} given" if given else str(KVSpec(self.k_bits, self.v_bits, self.symmetric))
        more = f"units{self.v_unit} parts{self.v_parts} word{self.word}" if self.v_unit else ""
        flags = (
            ["pairs"] * self.pairs + [self.zeros] * (self.zeros != "offset") + ["q16"] * (bool(more) > self.rounds_q)
        )
        return " ".join([spec, f"d{self.size}", f"p{self.page}", *more.split(), *flags])

    @property
    def wide(self) -> tuple[int, int]:
        """Bytes of a number of K and of V as they are loaded; 16-bit pages count as such, fp32 ones too."""
        return (2 if self.k_bits == 16 else 1), (self.v_unit or 2)

    @property
    def whole_copies(self) -> bool:
        """Whether pages can be copied 16 bytes at a time."""
        return self.k_line * self.wide[0] >= LINE and self.v_line * self.wide[1] >= LINE

    @property
    def k_parts(self) -> int:
        """Products that a score is the sum of: one of low and one of high nibbles."""
        return 2 if self.k_bits == 4 else 1

    @property
    def k_width(self) -> int:
        """Columns of a part of q and k; an int8 MMA is 32 deep."""
        return max(32 if self.rounds_q else 16, _power_of_2(self.size // self.k_parts))

    @property
    def v_columns(self) -> int:
        """Numbers of a row of V as they are loaded."""
        loaded = self.size if self.v_bits == 16 else self.size * self.v_bits // 8 // self.v_unit
        return max(16, _power_of_2(loaded))

    @property
    def v_width(self) -> int:
        """Columns of a part of V."""
        whole = 1 if self.v_bits == 16 else 8 * self.v_unit // self.v_bits
        return self.v_columns * whole // self.v_parts

    @property
    def v_offsets(self) -> bool:
        """Whether values have an offset of their own; that of symmetric ones is in their conversion."""
        return self.v_bits == 4 and not self.symmetric


def warpgroups(card: Card) -> bool:
    """Whether tiles of 64 rows are multiplied from shared memory (wgmma, tcgen05)."""
    return 90 <= card.sm < 120


def reading(a: Attention, block_m: int, warpgroups: bool, asm: bool | None = None) -> Reading:
    """How the kernels read the pages of `a` for tiles of `block_m` rows. `warpgroups`: V goes through shared memory anyway."""
    form, size = parse_form(a.form), a.q.shape[2]
    spec = form.spec
    unit = 0
    if spec.quantised:
        unit = 2 if not warpgroups and _lines(a.v_pages, 2) else 1
    parts = 8 * unit // spec.v_bits if unit else 1
    # All warps stack along M, and each repeats the whole tile, where a product is not wider than it is high.
    while parts > 1 and not warpgroups and size // parts <= block_m:
        parts //= 2
    word = 0
    if spec.quantised and packed_words(a) is not None:
        word = 16 * spec.channels
    # What strides and places divide by; an asynchronous copy takes 4, 8 or 16 bytes.
    widths = [next(n for n in (LINE, 8, 4, 2, 1) if _lines(t, n)) for t in (a.k_pages, a.v_pages)]
    k_line = max(1, widths[0] // a.k_pages.element_size())
    v_line = max(1, widths[1] // max(unit, a.v_pages.element_size()))
    how = Reading(
        spec.k_bits, spec.v_bits, size, a.k_pages.shape[2], spec.symmetric, form.nibbles == "pairs", form.zeros, word, unit,
        parts, k_line, v_line, 0, 0, a.rounds_q, not INTERPRETED if asm is None else asm, INTERPRETED,
    )  # fmt: skip
    rows = min(a.k_pages.shape[3], how.k_width), min(a.v_pages.shape[3] // max(1, unit), how.v_columns)
    return Reading(**(vars(how) | {"k_row": rows[0], "v_row": rows[1]}))


def _lines(t: torch.Tensor, size: int) -> bool:
    """Whether pages, heads and rows all begin at multiples of `size` bytes of the first."""
    steps = (*t.stride()[:3], t.storage_offset())
    return all(step * t.element_size() % size == 0 for step in steps)


def packed_words(a: Attention) -> torch.Tensor | None:
    """The scale words of K and V as one plane of whole numbers [pages, Hkv, P, 1], int32 or int64; None where they lie apart."""
    k, v, channels = a.k_scales, a.v_scales, parse_form(a.form).spec.channels
    if k is None or v is None or k.dtype != torch.float16 or v.dtype != torch.float16:
        return None
    same = k.stride() == v.stride() and v.storage_offset() == k.storage_offset() + 1 and k.stride(3) == 2
    same = same and k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    if not same or any(step % channels for step in (*k.stride()[:3], k.storage_offset())):
        return None
    words = k.as_strided((*k.shape[:3], channels), (*k.stride()[:3], 1), k.storage_offset())
    return words.view(torch.int32 if channels == 2 else torch.int64)


def sides(a: Attention, how: Reading) -> tuple[tuple, tuple, tuple, tuple]:
    """(k pointers, v pointers, k strides, v strides): of pages and words.

    Strides: (page, head, row) of pages in lines, (page, head, row, channel) of words, and how many lines behind its pointer a
    plane begins: one that begins where 16 bytes do not is seen from the start of its memory, or nothing would be known of it.
    """
    v_pages = a.v_pages
    if how.v_unit == 2:
        v_pages = v_pages[..., : v_pages.shape[3] // 2 * 2].view(torch.int16)
    words = packed_words(a) if how.word else None
    pointers, strides = [], []
    for pages, line, apart in ((a.k_pages, how.k_line, a.k_scales), (v_pages, how.v_line, a.v_scales)):
        held = apart if words is None else words
        begin = 0
        if pages.storage_offset() * pages.element_size() % LINE:
            begin, lead = pages.storage_offset() // line, pages.as_strided((1,), (1,), 0)
        else:
            lead = pages
        pointers.append((lead, held))
        of_words = (0, 0, 0, 0) if held is None else held.stride()
        strides.append((*(step // line for step in pages.stride()[:3]), *of_words, begin))
    return pointers[0], pointers[1], strides[0], strides[1]
