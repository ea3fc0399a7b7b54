"""Triton body of kv_append: one program per token and few heads; tiles of key heads first, then those of queries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...formats.kvcache import parse_form
from .. import tuning
from ..device import Card
from ..tiles import FUSION, Launch, runner
from . import contract

OP_VERSION = 2  # raised when a kernel changes so that tuned entries of the one before mean nothing


@triton.jit
def _prepared(rows_ptr, stride_h, weight_ptr, offs_h, mask, cos, sin, eps, HALF: tl.constexpr, TURN: tl.constexpr):
    """The two halves of heads `offs_h`, normed where there is a weight and turned: fp32 [BLOCK_H, BLOCK_D] each."""
    offs_d = tl.arange(0, mask.shape[1])
    at = offs_h[:, None].to(tl.int64) * stride_h + offs_d[None, :]
    low = tl.load(rows_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
    high = tl.load(rows_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
    if weight_ptr is not None:
        mean = tl.div_rn(tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1), 2.0 * HALF)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
        inside = offs_d < HALF
        low = low * inverse * tl.load(weight_ptr + offs_d, mask=inside, other=0.0).to(tl.float32)[None, :]
        high = high * inverse * tl.load(weight_ptr + HALF + offs_d, mask=inside, other=0.0).to(tl.float32)[None, :]
    if TURN:
        turned = low * cos[None, :] - high * sin[None, :]
        high = high * cos[None, :] + low * sin[None, :]
        low = turned
    return low, high


@triton.jit
def _half_bits(x, good):
    """fp32 [BLOCK_H] as the bits of fp16, int32 [BLOCK_H]; NaN where not good. x is within fp16, or it is NaN's row."""
    return tl.where(good, x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF, 0x7E00)


@triton.jit
def _put(low, high, into, mask, HALF: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr):
    """Writes rows to `into` [BLOCK_H, BLOCK_D], the places of their low halves; bits of their scale and offset, int32 [BLOCK_H].

    x + 12582912 = 0x4B400000 + n      n: x rounded half to even. The low byte is n, the low nibble n of 0 .. 15.
    symmetric 4 bits: + 12582920, so that n + 8 comes out
    """
    scale_bits = tl.zeros((low.shape[0],), dtype=tl.int32)
    offset_bits = scale_bits
    if BITS == 16:
        tl.store(into, low.to(into.dtype.element_ty), mask=mask)
        tl.store(into + HALF, high.to(into.dtype.element_ty), mask=mask)
    else:
        offs_d = tl.arange(0, low.shape[1])
        inside = (offs_d < HALF)[None, :]
        # a maximum drops NaN, so each number is asked; masked ones are 0
        fits = (tl.abs(low) <= 3.4028234663852886e38) & (tl.abs(high) <= 3.4028234663852886e38)
        good = tl.min(fits.to(tl.int32), axis=1) > 0  # [BLOCK_H]
        low = tl.where(good[:, None], low, 0.0)
        high = tl.where(good[:, None], high, 0.0)
        offset = tl.zeros((low.shape[0],), dtype=tl.float32)
        FIRST: tl.constexpr = 0.0 if OFFSET else (-127.0 if BITS == 8 else -7.0)
        LAST: tl.constexpr = 15.0 if OFFSET else (127.0 if BITS == 8 else 7.0)
        MAGIC: tl.constexpr = 12582920.0 if BITS == 4 and not OFFSET else 12582912.0
        if OFFSET:
            least = tl.min(tl.where(inside, tl.minimum(low, high), float("inf")), axis=1)
            most = tl.max(tl.where(inside, tl.maximum(low, high), float("-inf")), axis=1) - least
            # + 0.0: never -0
            offset = (tl.minimum(tl.maximum(least, -65504.0), 65504.0) + 0.0).to(tl.float16).to(tl.float32)
            offset_bits = _half_bits(offset, good)
        else:
            most = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=1)
        scale = tl.minimum(tl.maximum(tl.div_rn(most, LAST), 1e-6), 65504.0).to(tl.float16).to(tl.float32)
        scale_bits = _half_bits(scale, good)
        low = tl.div_rn(low - offset[:, None], scale[:, None])
        high = tl.div_rn(high - offset[:, None], scale[:, None])
        low = (tl.minimum(tl.maximum(low, FIRST), LAST) + MAGIC).to(tl.int32, bitcast=True)
        high = (tl.minimum(tl.maximum(high, FIRST), LAST) + MAGIC).to(tl.int32, bitcast=True)
        live = good[:, None] & inside
        if BITS == 8:
            tl.store(into, tl.where(live, low, 0).to(tl.int8), mask=mask)
            tl.store(into + HALF, tl.where(live, high, 0).to(tl.int8), mask=mask)
        else:
            ROW: tl.constexpr = (HALF + 15) // 16 * 16
            packed = tl.where(live, (low & 15) | (high & 15) << 4, 0).to(tl.uint8)
            heads = tl.max(mask.to(tl.int32), axis=1) > 0
            tl.store(into, packed, mask=heads[:, None] & (offs_d < ROW)[None, :])  # zeros fill the row
    return scale_bits, offset_bits


@triton.jit
def _put_word(into, k_scale, v_scale, k_offset, v_offset, stride, mask, C: tl.constexpr):
    """Writes scale words of C numbers of 16 bits to `into` [BLOCK_H]: as one number, or `stride` apart where into is fp16."""
    kind: tl.constexpr = into.dtype.element_ty
    if kind == tl.float16:
        tl.store(into, k_scale.to(tl.int16).to(tl.float16, bitcast=True), mask=mask)
        tl.store(into + stride, v_scale.to(tl.int16).to(tl.float16, bitcast=True), mask=mask)
        if C == 4:
            tl.store(into + 2 * stride, k_offset.to(tl.int16).to(tl.float16, bitcast=True), mask=mask)
            tl.store(into + 3 * stride, v_offset.to(tl.int16).to(tl.float16, bitcast=True), mask=mask)
    else:
        scales = k_scale | v_scale << 16
        if C == 4:
            offsets = k_offset | v_offset << 16
            tl.store(into, (scales.to(tl.int64) & 0xFFFFFFFF) | offsets.to(tl.int64) << 32, mask=mask)
        else:
            tl.store(into, scales, mask=mask)


@triton.jit
def kv_append_kernel(
    k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, scales_ptr, mu_ptr, slots_ptr, q_ptr, q_out_ptr, positions_ptr, cos_sin_ptr,
    q_weight_ptr, k_weight_ptr,
    HQ, HKV, P, eps,
    stride_in, stride_pages, stride_s,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """k_pages[slot // P, :, slot % P] = turn(norm(k[t]))   v_pages[...] = v[t]   q_out[t] = turn(norm(q[t]))

    k, v [T, HKV, D], q [T, HQ, D] of one float type: stride_in is (token, head) of k, of v, of q; q_out contiguous. Pages
    [pages, HKV, P, row]: stride_pages is (page, head, row) of k, of v. Rows of BITS: 16 that type, 8 int8, 4 uint8, halves in
    one byte. scales: C fp16 numbers a word, as int32 | int64 [pages, HKV, P], or fp16 [pages, HKV, P, C] where words do not lie
    in one piece; stride_s as it has. mu fp32 [HKV, D], slots, positions int64 [T]; cos_sin fp32 [.., D]; weights [D]. None: not done.

        program (t, i)    i < ceil(HKV / BLOCK_H)   heads of k and v    [ BLOCK_H x D/2 | BLOCK_H x D/2 ]    rows leave whole
                          else                      heads of q          [     low       |     high      ]
    """
    t = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    kv_tiles = tl.cdiv(HKV, BLOCK_H)
    # a row of 4-bit numbers is filled up to 16 bytes
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(HALF))
    TURN: tl.constexpr = cos_sin_ptr is not None
    offs_d = tl.arange(0, BLOCK_D)
    cos = tl.zeros((BLOCK_D,), dtype=tl.float32)
    sin = tl.zeros((BLOCK_D,), dtype=tl.float32)
    if TURN:
        row = cos_sin_ptr + tl.load(positions_ptr + t) * (2 * HALF)
        cos = tl.load(row + offs_d, mask=offs_d < HALF, other=0.0)
        sin = tl.load(row + HALF + offs_d, mask=offs_d < HALF, other=0.0)

    if tile < kv_tiles:
        offs_h = tile * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (offs_h < HKV)[:, None] & (offs_d < HALF)[None, :]
        slot = tl.load(slots_ptr + t)
        if slot >= 0:
            page = slot // P
            r = slot % P
            heads = offs_h.to(tl.int64)[:, None]
            low, high = _prepared(
                k_ptr + t * stride_in[0], stride_in[1], k_weight_ptr, offs_h, mask, cos, sin, eps, HALF, TURN
            )
            if mu_ptr is not None:
                mu = mu_ptr + heads * (2 * HALF) + offs_d[None, :]  # [BLOCK_H, BLOCK_D]
                low -= tl.load(mu, mask=mask, other=0.0)
                high -= tl.load(mu + HALF, mask=mask, other=0.0)
            into = k_pages_ptr + page * stride_pages[0] + r * stride_pages[2]
            into += heads * stride_pages[1] + offs_d[None, :]
            k_scale, k_offset = _put(low, high, into, mask, HALF, K_BITS, C == 4 and K_BITS == 4)
            rows = v_ptr + t * stride_in[2]
            into = v_pages_ptr + page * stride_pages[3] + r * stride_pages[5]
            into += heads * stride_pages[4] + offs_d[None, :]
            v_scale = k_scale
            v_offset = k_offset
            if V_BITS == 16:
                rows += heads * stride_in[3] + offs_d[None, :]
                tl.store(into, tl.load(rows, mask=mask, other=0.0), mask=mask)
                tl.store(into + HALF, tl.load(rows + HALF, mask=mask, other=0.0), mask=mask)
            else:
                low, high = _prepared(rows, stride_in[3], None, offs_h, mask, cos, sin, eps, HALF, False)
                v_scale, v_offset = _put(low, high, into, mask, HALF, V_BITS, C == 4 and V_BITS == 4)
            if scales_ptr is not None:
                words = scales_ptr + page * stride_s[0] + r * stride_s[2] + offs_h.to(tl.int64) * stride_s[1]
                _put_word(words, k_scale, v_scale, k_offset, v_offset, stride_s[3], offs_h < HKV, C)
    else:
        offs_h = (tile - kv_tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (offs_h < HQ)[:, None] & (offs_d < HALF)[None, :]
        low, high = _prepared(
            q_ptr + t * stride_in[4], stride_in[5], q_weight_ptr, offs_h, mask, cos, sin, eps, HALF, TURN
        )
        into = q_out_ptr + (t * HQ + offs_h[:, None]) * (2 * HALF) + offs_d[None, :]
        tl.store(into, low.to(q_out_ptr.dtype.element_ty), mask=mask)
        tl.store(into + HALF, high.to(q_out_ptr.dtype.element_ty), mask=mask)


class Shape(NamedTuple):
    """One problem as the heuristic sees it: fresh tokens, heads of queries and of keys, numbers of a head."""

    m: int
    heads: int
    kv_heads: int
    size: int
    dtype: torch.dtype
    form: str


@dataclass(frozen=True)
class Config:
    """Heads that a program takes, and its warps."""

    block_h: int
    num_warps: int


def shape_of(case: Any) -> Shape:
    """The problem of a case of cases.py."""
    return Shape(case.m, case.heads, case.kv_heads, case.k, case.dtype, case.kv)


def heuristic(shape: Shape, card: Card) -> Config:
    """As many heads as fill 16-byte stores of one warp: 512 bytes of a half of each, at most 16 heads."""
    if parse_form(shape.form).spec.quantised:
        most = max(1, min(16, 512 // max(16, triton.next_power_of_2(shape.size // 2))))
        return Config(min(most, triton.next_power_of_2(shape.kv_heads)), 1)
    most = 8 if shape.size <= 128 else 4
    return Config(min(most, triton.next_power_of_2(shape.kv_heads)), 1 if shape.size <= 64 else 2)


config_for = tuning.finder(
    Path(__file__).with_name("tuned.json"), triton.__version__, OP_VERSION, Config, heuristic, Shape._fields
)


def as_words(scales: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The plane of scales as one number per word and its strides, where words lie in one piece; else as it is."""
    wide = {2: torch.int32, 4: torch.int64}[scales.shape[3]]
    apart = (*scales.stride()[:3], scales.storage_offset())
    if scales.stride(3) != 1 or any(step % scales.shape[3] for step in apart):
        return scales, scales.stride()
    words = scales.view(wide)[..., 0]
    return words, (*words.stride(), 0)


def plan(card: Card, *flat: Any, config: Config | None = None) -> tuple[torch.Tensor, list[Launch]]:
    """q_out, and the kernel that fills it and the slots."""
    a = contract.Append(*flat)
    out, spec = contract.out_like(*flat), parse_form(a.form).spec
    tokens, kv_heads, size = a.k.shape
    heads = 0 if a.q is None else a.q.shape[1]
    config = config or config_for(Shape(tokens, heads, kv_heads, size, a.k.dtype, a.form), card)
    some = a.k if a.q is None else a.q
    words, of_words = (None, (0, 0, 0, 0)) if a.scales is None else as_words(a.scales)
    args = (
        a.k, a.v, a.k_pages, a.v_pages, words, a.mu, a.slots, some, out, a.positions, a.cos_sin, a.q_weight, a.k_weight,
        heads, kv_heads, a.k_pages.shape[2], a.eps,
        (*a.k.stride()[:2], *a.v.stride()[:2], *some.stride()[:2]), (*a.k_pages.stride()[:3], *a.v_pages.stride()[:3]),
        of_words,
    )  # fmt: skip
    flags = {"K_BITS": spec.k_bits, "V_BITS": spec.v_bits, "C": spec.channels, "HALF": size // 2}
    tiles = -(-kv_heads // config.block_h) + -(-heads // config.block_h)
    options = {"BLOCK_H": config.block_h, "num_warps": config.num_warps, "enable_fp_fusion": FUSION}
    return out, [Launch(kv_append_kernel, (tokens, tiles), args, flags | options)]


run = runner(plan)
