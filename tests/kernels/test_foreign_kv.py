"""Caches of other engines, built here by the rule of each, read in place by the ops over pages.

What a cache must mean is written out in plain torch beside it. Triton's bodies run on a card, or in its interpreter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from percard.formats import foreign_kv, kvcache
from percard.formats.kvcache import KVPages
from percard.formats.spec import FormatError
from percard.kernels.attention_decode import attention_decode
from percard.kernels.conformance import faults
from percard.kernels.gather_dequantize import gather_dequantize

from .conftest import only

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HEADS, SIZE, LENGTHS = 2, 32, (37, 0, 18)


class Cache(NamedTuple):
    """An engine's cache as pages, how it finds its tokens, and what it means: keys and values fp32 [sum S, Hkv, D]."""

    pages: KVPages
    table: torch.Tensor
    table_starts: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor
    close: float = 0.0  # of a number: what the engine does with the words that we do not


def draw(seed: int) -> tuple[torch.Generator, torch.Tensor]:
    """Keys and values [2, sum S, Hkv, D] with rows that stand out and one of zeros."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, sum(LENGTHS), HEADS, SIZE, generator=random)
    x[:, 5] *= 40
    x[:, 6] = 0.0
    return random, x


def places(page: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """A table [B, pages] of pages in random order, the page and the row of each token of all sequences, and how many pages there are."""
    per = kvcache.pages_of(max(LENGTHS), page)
    count = len(LENGTHS) * per + 2
    table = torch.randperm(count, generator=random)[: len(LENGTHS) * per].view(len(LENGTHS), per).int()
    at = [torch.arange(n) for n in LENGTHS]
    pages = torch.cat([row[a // page].long() for row, a in zip(table, at, strict=True)])
    return table, pages, torch.cat([a % page for a in at]), count


def vllm(seed: int, bits: int, packed: bool) -> Cache:
    """[blocks, 2, P, Hkv, data + 4], or [blocks, Hkv, P, 2 (data + 4)]: rows with the fp32 scale in their last four bytes."""
    random, x = draw(seed)
    table, block, row, count = places(16, random)
    data = SIZE if bits == 8 else SIZE // 2
    dtype = torch.int8 if bits == 8 else torch.uint8
    halves = torch.full((2, count, HEADS, 16, data + 4), -1 if bits == 8 else 255, dtype=dtype)  # 0xFF: NaN as a scale
    if bits == 8:
        scale = (x.abs().amax(-1) / 127).clamp(min=1e-6)
        codes = (x * (1 / scale)[..., None]).round().clamp(-128, 127)
        rows, meant = codes.to(torch.int8), codes * scale[..., None]
    else:
        low, high = x.amin(-1), x.amax(-1)
        scale = ((high - low) / 15).clamp(min=1e-6)
        zero = (-low / scale).add(0.5).floor().clamp(0, 15)
        codes = (x * (1 / scale)[..., None] + zero[..., None]).add(0.5).floor().clamp(0, 15)
        cleared = scale.view(torch.int32) & -16
        scale = (cleared | zero.int()).view(FP32)
        rows = codes[..., 0::2].to(torch.uint8) | codes[..., 1::2].to(torch.uint8) << 4
        meant = (codes - zero[..., None]) * cleared.view(FP32)[..., None]
    whole = torch.cat((rows, scale[..., None].contiguous().view(dtype)), -1)
    for i in range(2):
        halves[i, block, :, row] = whole[i]
    if packed:
        cache = torch.cat((halves[0], halves[1]), -1)
    else:
        cache = halves.permute(1, 0, 3, 2, 4).contiguous()
    pages = foreign_kv.vllm_pages(cache, f"int{bits}_per_token_head")
    assert pages.k.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr(), "nothing is copied"
    return Cache(pages, table, None, *meant, close=2.0**-19 if bits == 4 else 0.0)


def lmdeploy(seed: int, dtype: torch.dtype) -> Cache:
    """[blocks, P, Hkv, D / 2] and scales and zeros of the model's type; a row of zeros would divide by zero there, so none is in."""
    random, x = draw(seed)
    x[:, 6] = x[:, 5]
    table, block, row, count = places(64, random)
    low, high = x.amin(-1), x.amax(-1)
    scale = (high - low) / 15
    zero = -low / scale
    codes = (x / scale[..., None] + zero[..., None] + 0.5).to(torch.uint8)
    caches = torch.full((2, count, 64, HEADS, SIZE // 2), 255, dtype=torch.uint8)
    words = torch.full((2, count, 64, HEADS, 2), torch.nan, dtype=dtype)
    caches[:, block, row] = codes[..., : SIZE // 2] | codes[..., SIZE // 2 :] << 4
    words[:, block, row] = torch.stack((scale, zero), -1).to(dtype)
    scale, zero = scale.to(dtype).float()[..., None], zero.to(dtype).float()[..., None]
    pages = foreign_kv.lmdeploy_pages(*caches, *words, quant_policy=4)
    return Cache(pages, table, None, *((codes.float() - zero) * scale))


def sglang(seed: int, scales: str) -> Cache:
    """[tokens, Hkv, D], a token a slot, found by kv_indices and kv_indptr."""
    random, x = draw(seed)
    slots = torch.randperm(100, generator=random)[: x.shape[1]]
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    if scales == "none":
        pool = torch.full((2, 100, HEADS, SIZE), torch.nan, dtype=FP16)
        pool[:, slots] = x.half()
        return Cache(foreign_kv.sglang_pages(*pool), slots.int(), starts, *x.half().float())
    scale = x.abs().amax(-1) / 127 if scales == "rows" else x.abs().amax((1, 2, 3)) / 127
    per = scale.clamp(min=1e-6)[..., None] if scales == "rows" else scale.view(2, 1, 1, 1)
    codes = (x / per).round().clamp(-127, 127)
    pool = torch.full((2, 100, HEADS, SIZE), -128, dtype=torch.int8)
    pool[:, slots] = codes.to(torch.int8)
    if scales == "rows":
        words = torch.full((2, 100, HEADS), torch.nan)
        words[:, slots] = per[..., 0]
        pages = foreign_kv.sglang_pages(*pool, *words)
    else:
        pages = foreign_kv.sglang_pages(pool[0], pool[1], float(scale[0]), scale[1])
    return Cache(pages, slots.int(), starts, *(codes * per))


def flashinfer(seed: int, layout: str, pair: bool) -> Cache:
    """[pages, 2, P, Hkv, D] or [pages, 2, Hkv, P, D], found by kv_page_indices and kv_indptr."""
    random, x = draw(seed)
    table, page, row, count = places(8, random)
    counts = [kvcache.pages_of(n, 8) for n in LENGTHS]
    indices = torch.cat([mine[:n] for mine, n in zip(table, counts, strict=True)])
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    last = torch.tensor([n - 8 * (c - 1) if c else 0 for n, c in zip(LENGTHS, counts, strict=True)]).int()
    assert foreign_kv.flashinfer_lengths(starts, last, 8).tolist() == list(LENGTHS)
    cache = torch.full((count, 2, 8, HEADS, SIZE), torch.nan, dtype=FP16)
    for i in range(2):
        cache[page, i, row] = x[i].half()
    if layout == "HND":
        cache = cache.transpose(2, 3).contiguous()
    given = (cache[:, 0], cache[:, 1]) if pair else cache
    return Cache(foreign_kv.flashinfer_pages(given, layout), indices, starts, *x.half().float())


CACHES: dict[str, Callable[[int], Cache]] = {
    "vllm-int8": lambda seed: vllm(seed, 8, False),
    "vllm-int8-packed": lambda seed: vllm(seed, 8, True),
    "vllm-int4": lambda seed: vllm(seed, 4, False),
    "vllm-int4-packed": lambda seed: vllm(seed, 4, True),
    "lmdeploy-fp16": lambda seed: lmdeploy(seed, FP16),
    "lmdeploy-bf16": lambda seed: lmdeploy(seed, BF16),
    "sglang": lambda seed: sglang(seed, "none"),
    "sglang-int8-scalar": lambda seed: sglang(seed, "one"),
    "sglang-int8-rows": lambda seed: sglang(seed, "rows"),
    "flashinfer-nhd": lambda seed: flashinfer(seed, "NHD", False),
    "flashinfer-hnd": lambda seed: flashinfer(seed, "HND", False),
    "flashinfer-pair": lambda seed: flashinfer(seed, "NHD", True),
}


def on(t: Any, where: str) -> Any:
    """A tensor on a device with the strides it has."""
    if t is None or t.device.type == where:
        return t
    memory = t.untyped_storage().to(where) if hasattr(t.untyped_storage(), "to") else t.untyped_storage().cuda()
    return torch.empty(0, dtype=t.dtype, device=where).set_(memory, t.storage_offset(), t.size(), t.stride())


def moved(pages: KVPages, where: str) -> KVPages:
    parts = [on(t, where) for t in (pages.k, pages.v, pages.scales, pages.mu, pages.v_scales)]
    return KVPages(parts[0], parts[1], pages.spec, *parts[2:], pages.nibbles, pages.zeros)


@only("gather_dequantize")
@pytest.mark.parametrize("engine", CACHES)
def test_gather_reads_it(body: Any, engine: str, seed: int) -> None:
    cache = CACHES[engine](seed)
    lengths, total = torch.tensor(LENGTHS, dtype=torch.int32), sum(LENGTHS)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    given = [on(t, body.where) for t in (cache.table, lengths, starts)]
    found = {
        impl: gather_dequantize(
            moved(cache.pages, body.where), *given, total, FP32, size=SIZE, table_starts=on(cache.table_starts, body.where),
            impl=impl,
        )
        for impl in ("reference", body.name)
    }  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))
    for got, want in zip(found[body.name], (cache.keys, cache.values), strict=True):
        assert torch.allclose(got.cpu(), want, rtol=cache.close, atol=0.0)


@only("attention_decode")
@pytest.mark.parametrize("engine", CACHES)
def test_decode_reads_it(body: Any, engine: str, seed: int) -> None:
    """The body is in tolerance of the reference, and the reference is attention over what the engine's cache means."""
    cache = CACHES[engine](seed)
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(len(LENGTHS), 2 * HEADS, SIZE, generator=random).half()
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    given = [on(t, body.where) for t in (q, cache.table, lengths, cache.table_starts)]
    pages = moved(cache.pages, body.where)
    args = (given[0], pages, given[1], given[2], max(LENGTHS), 1, None, False, True, None, -1, None, 0.0, 0)
    assert faults(body.op, body.name, (*args, 8, given[3])) == []
    out, lse = attention_decode(*args, 16, given[3], impl="reference")
    first = 0
    for b, length in enumerate(LENGTHS):
        k, v = (part[first : first + length].transpose(0, 1) for part in (cache.keys, cache.values))  # [Hkv, S, D]
        first += length
        if not length:
            assert (out[b] == 0).all() and (lse[b] == -torch.inf).all()
            continue
        want = F.scaled_dot_product_attention(q[b].float().view(HEADS, 2, SIZE), k, v)
        assert torch.allclose(
            out[b].float().cpu().view(HEADS, 2, SIZE), want, rtol=2e-3, atol=2e-3 * float(v.abs().max())
        )


@only("attention_prefill")
@pytest.mark.parametrize(
    "engine", ["vllm-int8-packed", "vllm-int4", "lmdeploy-bf16", "sglang-int8-rows", "flashinfer-nhd"]
)
def test_prefill_reads_it(body: Any, engine: str, seed: int) -> None:
    """Three fresh tokens of each sequence, its last ones; the body is in tolerance of the reference."""
    cache = CACHES[engine](seed)
    q = torch.randn(3 * len(LENGTHS), 2 * HEADS, SIZE, generator=torch.Generator().manual_seed(seed)).half()
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    given = [on(t, body.where) for t in (q, cache.table, lengths, cache.table_starts)]
    args = (given[0], moved(cache.pages, body.where), given[1], given[2], None, 3, max(LENGTHS))
    more = (None, None, None, -1, None, 0.0, 8, False, True, given[3])
    assert faults(body.op, body.name, (*args, *more)) == []


def test_rows_that_do_not_lie_16_bytes_apart_are_said() -> None:
    for engine, aligned in (
        ("vllm-int8", False),
        ("vllm-int4-packed", False),
        ("lmdeploy-fp16", True),
        ("sglang", True),
    ):
        pages = CACHES[engine](0).pages
        assert (kvcache.unaligned(pages.k, pages.v) is None) is aligned, engine


ROWS = torch.zeros(3, 16, 2, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: foreign_kv.vllm_pages(torch.zeros(3, 2, 16, 2, 36), "fp8_per_token_head"),
            "no form for kv_cache_dtype",
        ),
        (
            lambda: foreign_kv.vllm_pages(torch.zeros(3, 2, 16, 2, 36), "int8_per_token_head"),
            "the cache is torch.float32",
        ),
        (
            lambda: foreign_kv.vllm_pages(torch.zeros(3, 4, 16, 2, 36).char(), "int8_per_token_head"),
            r"2, P, Hkv, D \+ 4",
        ),
        (
            lambda: foreign_kv.vllm_pages(torch.zeros(3, 2, 16, 2, 38).char(), "int8_per_token_head"),
            r"2, P, Hkv, D \+ 4",
        ),
        (
            lambda: foreign_kv.vllm_pages(torch.zeros(3, 2, 16, 2, 40).char()[..., 2:38], "int8_per_token_head"),
            "multiples of 4",
        ),
        (
            lambda: foreign_kv.lmdeploy_pages(ROWS, ROWS, quant_policy=8),
            "8 bits with a zero point; int8 pages are symm",
        ),
        (lambda: foreign_kv.lmdeploy_pages(ROWS, ROWS, quant_policy=42), "TurboQuant's codebook"),
        (lambda: foreign_kv.lmdeploy_pages(ROWS, ROWS, quant_policy=4), "without k_scales_zeros"),
        (lambda: foreign_kv.sglang_pages(ROWS, ROWS), r"expected \[tokens, Hkv, D\]"),
        (lambda: foreign_kv.sglang_pages(ROWS[0], ROWS[0]), "fp8 has no form"),
        (lambda: foreign_kv.sglang_pages(ROWS[0].char(), ROWS[0].char()), "without k_scale"),
        (lambda: foreign_kv.sglang_pages(ROWS[0].half(), ROWS[0].half(), 1.0, 1.0), "expected none"),
        (
            lambda: foreign_kv.sglang_pages(ROWS[0].char(), ROWS[0].char(), torch.ones(16), torch.ones(16)),
            r"k_scale has shape \(16,\), expected one number or \(16, 2\)",
        ),
        (lambda: foreign_kv.flashinfer_pages(torch.zeros(3, 2, 16, 32)), r"expected \[pages, 2, P, Hkv, D\] or a pair"),
        (lambda: foreign_kv.flashinfer_pages(torch.zeros(3, 2, 16, 2, 32), "HDN"), "expected NHD or HND"),
    ],
)
def test_refusals(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        call()


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted process")
def test_in_the_interpreter(run_interpreted: Callable[..., str]) -> None:
    """This file again with Triton's bodies."""
    said = run_interpreted(Path(__file__), "-k", "triton")
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) > 2 * len(CACHES), said[-500:]
