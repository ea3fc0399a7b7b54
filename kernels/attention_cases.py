"""Pages for the cases of attentions: random rows in random pages, and poison wherever no key lies.

Layouts, of the same numbers:
    ""        as formats.kvcache.new_pages makes them
    "nhd"     heads inside of rows, [pages, P, Hkv, row], words alike
    "record"  K, V and words of a page one behind another in one piece
    "inline"  heads inside of rows, fp32 words right behind each row (vLLM): 4-bit rows in pairs, the zero in the mantissa
    "zeros"   words of K and of V in planes of their own, [pages, P, Hkv, 2] of scale and zero (LMDeploy)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..formats.kvcache import KVPages, KVSpec, pages_of, quantize, row_dtype

LAYOUTS = ("", "nhd", "record", "inline", "zeros")
POISON = -128  # the byte 0x80


class Paged(NamedTuple):
    """Pages, table int32 [B, n] (or [n] with table_starts [B + 1]), and fp32 k and v [count, P, Hkv, D] that were put there."""

    pages: KVPages
    table: torch.Tensor
    table_starts: torch.Tensor | None
    k: torch.Tensor
    v: torch.Tensor


def paged(
    random: torch.Generator,
    lengths: Sequence[int],
    heads: int,
    size: int,
    dtype: torch.dtype,
    page: int,
    spec: str = "bf16",
    layout: str = "",
    with_mu: bool = False,
    csr: bool = False,
) -> Paged:
    """Random keys and values of sequences; a table whose entries past a length name no page, or one of NaN."""
    device, batch, per = random.device, len(lengths), pages_of(max(1, *lengths), page)
    count = batch * per + 2  # the last two belong to nobody
    order = torch.randperm(batch * per, generator=random, device=device).int()
    table = torch.full((batch, per + 1), -1, dtype=torch.int32, device=device)
    live = torch.zeros(count, page, dtype=torch.bool, device=device)
    for b, length in enumerate(lengths):
        held = pages_of(length, page)
        table[b, :held] = order[b * per : b * per + held]
        table[b, held + 1 :] = count - 1  # a page of NaN
        at = torch.arange(length, device=device)
        live[table[b, at // page].long(), at % page] = True
    drawn = torch.randn(2, count, page, heads, size, generator=random, device=device)
    mu = torch.randn(heads, size, generator=random, device=device) if with_mu else None
    k, v = (drawn[0] if mu is None else drawn[0] + mu), drawn[1]
    pages = rows_to_pages(k, v, live, dtype, KVSpec.parse(spec), layout, mu)
    if not csr:
        return Paged(pages, table, None, k, v)
    pieces = [table[b, : pages_of(length, page)] for b, length in enumerate(lengths)]
    ends = torch.tensor([len(p) for p in pieces], device=device).cumsum(0).int()
    starts = torch.cat((ends.new_zeros(1), ends))
    return Paged(pages, torch.cat((*pieces, starts.new_full((1,), -1))), starts, k, v)


def rows_to_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    live: torch.Tensor,
    dtype: torch.dtype,
    spec: KVSpec,
    layout: str = "",
    mu: torch.Tensor | None = None,
) -> KVPages:
    """Pages of fp32 k, v [count, P, Hkv, D]; rows that are not `live` bool [count, P] hold the byte 0x80 and NaN."""
    if not spec.quantised:
        rows = [part.to(dtype).masked_fill(~live[:, :, None, None], torch.nan) for part in (k, v)]
        return KVPages(_laid(rows[0], layout), _laid(rows[1], layout), spec)
    zeros = "offset"
    if spec.has_offsets:
        zeros = {"inline": "mantissa", "zeros": "zero"}.get(layout, "offset")
    nibbles = "pairs" if layout == "inline" and spec.v_bits == 4 else "halves"
    rows, words = [], []
    for part, bits in ((k if mu is None else k - mu, spec.k_bits), (v, spec.v_bits)):
        codes, scale, offset = quantize(part, bits, spec.symmetric)
        if bits == 4 and nibbles == "pairs":
            codes = _paired(codes, part.shape[-1])
        word = torch.stack((scale,) if offset is None else (scale, offset), -1).float()
        word = _with_zero(word, zeros) if offset is not None else word
        rows.append(codes.view(torch.int8).masked_fill(~live[:, :, None, None], POISON))
        words.append(word.masked_fill(~live[:, :, None, None], torch.nan))
    if layout == "inline":
        k_rows, k_words = _inline(rows[0], words[0], spec.k_bits)
        v_rows, v_words = _inline(rows[1], words[1], spec.v_bits)
        return KVPages(k_rows, v_rows, spec, k_words, mu, v_words, nibbles, zeros)
    k_rows, v_rows = rows[0].view(row_dtype(spec.k_bits, dtype)), rows[1].view(row_dtype(spec.v_bits, dtype))
    if layout == "zeros":
        k_words, v_words = (w.half().transpose(1, 2) for w in words)
        return KVPages(_laid(k_rows, "nhd"), _laid(v_rows, "nhd"), spec, k_words, mu, v_words, nibbles, zeros)
    plane = torch.full((*live.shape, k.shape[2], spec.channels), torch.nan, device=k.device)
    for i, word in enumerate(words):
        plane[..., i::2][..., : word.shape[-1]] = word
    if layout == "record":
        return _record(k_rows, v_rows, plane.half(), spec, mu)
    return KVPages(_laid(k_rows, layout), _laid(v_rows, layout), spec, _laid(plane.half(), layout), mu)


def _laid(rows: torch.Tensor, layout: str) -> torch.Tensor:
    """[count, P, Hkv, n] seen as [count, Hkv, P, n]."""
    seen = rows.transpose(1, 2)
    return seen if layout == "nhd" else seen.contiguous()


def _paired(codes: torch.Tensor, size: int) -> torch.Tensor:
    """Bytes of halves as bytes of pairs, without what fills a row up."""
    packed = codes[..., : size // 2]
    numbers = torch.cat((packed & 15, packed >> 4), -1)
    return numbers[..., 0::2] | numbers[..., 1::2] << 4


def _with_zero(word: torch.Tensor, zeros: str) -> torch.Tensor:
    """Words (scale, offset) as other engines keep them: with the number that stands for 0, whole and of 0 .. 15."""
    if zeros == "offset":
        return word
    zero = (-word[..., 1] / word[..., 0]).round().clamp(0, 15)
    if zeros == "zero":
        return torch.stack((word[..., 0], zero), -1)
    bits = word[..., 0].contiguous().view(torch.int32)
    return (bits & ~15 | zero.int()).view(torch.float32)[..., None]


def _inline(rows: torch.Tensor, words: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and fp32 words [count, Hkv, P, n] over one storage [count, P, Hkv, row + 4]."""
    n = rows.shape[-1]
    memory = torch.cat((rows, words.contiguous().view(torch.int8)), -1).contiguous()
    whole = memory.view(torch.float32)[..., n // 4 :]
    return memory[..., :n].view(row_dtype(bits, torch.int8)).transpose(1, 2), whole.transpose(1, 2)


def _record(k: torch.Tensor, v: torch.Tensor, words: torch.Tensor, spec: KVSpec, mu: torch.Tensor | None) -> KVPages:
    """Pages whose K, V and words lie one behind another."""
    parts = [part.transpose(1, 2).contiguous() for part in (k, v, words)]
    flat = [part.reshape(len(part), -1).view(torch.int8) for part in parts]
    memory = torch.cat(flat, 1)
    found: list[Any] = []
    for part, wide, first in zip(parts, flat, (0, flat[0].shape[1], flat[0].shape[1] + flat[1].shape[1]), strict=True):
        seen = memory[:, first : first + wide.shape[1]].view(part.dtype)
        found.append(seen.unflatten(1, part.shape[1:]))
    return KVPages(found[0], found[1], spec, found[2], mu)
