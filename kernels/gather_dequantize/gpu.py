"""Triton body of gather_dequantize: one program per tile of output rows and key head; keys and values are a launch each."""

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
from .contract import Gather, Outputs, out_like

OP_VERSION = 1  # raised when a kernel changes so that tuned entries of the one before mean nothing


@triton.jit
def _sequence_of(offs_r, starts_ptr, B, STEPS):
    """The last sequence that starts at or before each row, by bisection: int32 [BLOCK_T]. 2^STEPS is at least B."""
    b = tl.zeros_like(offs_r)
    step = 1 << STEPS
    for _ in range(STEPS):
        step = step // 2
        ahead = b + step
        start = tl.load(starts_ptr + ahead, mask=ahead < B, other=0x7FFFFFFF)
        b = tl.where(start <= offs_r, ahead, b)
    return b


@triton.jit
def _store(
    x, mu_ptr, out_ptr, offs_d, rows_at, live, inside,
    D: tl.constexpr, MU: tl.constexpr,
):  # fmt: skip
    """x [BLOCK_T, BLOCK] plus mu, to columns offs_d [BLOCK] of the rows at rows_at [BLOCK_T]; zeros where no token is."""
    mask_d = offs_d < D
    if MU:
        x += tl.load(mu_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
    x = tl.where(live[:, None], x, 0.0)
    mask = inside[:, None] & mask_d[None, :]
    tl.store(out_ptr + rows_at[:, None] + offs_d[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gather_dequantize_kernel(
    pages_ptr, scales_ptr, mu_ptr, table_ptr, table_starts_ptr, lengths_ptr, starts_ptr, out_ptr,
    B, TOTAL, STEPS,
    stride_p, stride_s, stride_tb,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, PAIRS: tl.constexpr, ZERO: tl.constexpr, MANTISSA: tl.constexpr,
    CSR: tl.constexpr, MU: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[starts[b] + t, h] = what row t of sequence b means in pages of keys or of values; zeros where no token is.

    pages [pages, HKV, PAGE, row] of a float type (BITS 16), int8 or bytes of two 4-bit numbers, strides (page, head, row); scales
    [.., 1 or 2] fp16 or fp32, four strides; mu fp32 [HKV, D] (MU); table int32, rows stride_tb apart or at table_starts (CSR); lengths
    int32 [B], starts int32 [B + 1]; out [TOTAL, HKV, D].

        program (i, h)     rows i * BLOCK_T ..  ->  their sequences  ->  their pages     any mix of sequences in a tile

        4 bits   [ byte j = x[j + D/2] : x[j] ]  ->  [ low: D/2 | high: D/2 ]    two stores; PAIRS: x[2j + 1] : x[2j], one

    ZERO: x = (u - word[1]) * scale. MANTISSA: the zero is the lowest four bits of the scale. Else x = u * scale + word[1].
    """
    HKV, h = tl.num_programs(1), tl.program_id(1).to(tl.int64)
    offs_r = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = _sequence_of(offs_r, starts_ptr, B, STEPS)
    token = offs_r - tl.load(starts_ptr + b)  # [BLOCK_T]
    inside = offs_r < TOTAL
    live = inside & (token >= 0) & (token < tl.load(lengths_ptr + b))
    if CSR:
        first = tl.load(table_starts_ptr + b).to(tl.int64)
    else:
        first = b.to(tl.int64) * stride_tb
    page = tl.load(table_ptr + first + token // PAGE, mask=live, other=0).to(tl.int64)  # [BLOCK_T]
    row = (token % PAGE).to(tl.int64)
    rows = pages_ptr + (page * stride_p[0] + h * stride_p[1] + row * stride_p[2])[:, None]
    into = (offs_r.to(tl.int64) * HKV + h) * D
    mu_row = mu_ptr + h * D
    if BITS != 16:
        word = scales_ptr + page * stride_s[0] + h * stride_s[1] + row * stride_s[2]
        scale = tl.load(word, mask=live, other=0.0).to(tl.float32)[:, None]  # [BLOCK_T, 1]

    if BITS == 4:
        offs_j = tl.arange(0, BLOCK_D // 2)
        mask = live[:, None] & (offs_j < D // 2)[None, :]
        packed = tl.load(rows + offs_j[None, :], mask=mask, other=0)  # [BLOCK_T, BLOCK_D / 2]
        low, high = (packed & 15).to(tl.float32), (packed >> 4).to(tl.float32)
        if SYMMETRIC:
            low, high = (low - 8.0) * scale, (high - 8.0) * scale
        elif MANTISSA:
            zero = (scale.to(tl.int32, bitcast=True) & 15).to(tl.float32)
            low, high = (low - zero) * scale, (high - zero) * scale
        else:
            offset = tl.load(word + stride_s[3], mask=live, other=0.0).to(tl.float32)[:, None]
            if ZERO:
                low, high = (low - offset) * scale, (high - offset) * scale
            else:
                low, high = low * scale + offset, high * scale + offset
        if PAIRS:
            both = tl.interleave(low, high)  # [BLOCK_T, BLOCK_D]
            _store(both, mu_row, out_ptr, tl.arange(0, BLOCK_D), into, live, inside, D, MU)
        else:
            _store(low, mu_row, out_ptr, offs_j, into, live, inside, D // 2, MU)
            _store(high, mu_row + D // 2, out_ptr + D // 2, offs_j, into, live, inside, D // 2, MU)
    else:
        offs_d = tl.arange(0, BLOCK_D)
        mask = live[:, None] & (offs_d < D)[None, :]
        x = tl.load(rows + offs_d[None, :], mask=mask, other=0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
        if BITS == 8:
            x = x * scale
        _store(x, mu_row, out_ptr, offs_d, into, live, inside, D, MU)


class Shape(NamedTuple):
    """One problem as the heuristic sees it: rows of the outputs, key heads, numbers of a head, form of the pages."""

    m: int
    kv_heads: int
    size: int
    form: str


@dataclass(frozen=True)
class Config:
    """Rows of a tile, and warps."""

    block_t: int
    num_warps: int


def shape_of(case: Any) -> Shape:
    """The problem of a case of cases.py."""
    return Shape(case.m, case.kv_heads, case.k, case.form)


def heuristic(shape: Shape, card: Card) -> Config:
    """Tiles of about 4096 numbers: 32 a thread, so that rows leave as 16-byte stores and enough programs share an SM."""
    rows = 4096 // triton.next_power_of_2(shape.size)
    return Config(max(8, min(64, rows)), 4)


config_for = tuning.finder(
    Path(__file__).with_name("tuned.json"), triton.__version__, OP_VERSION, Config, heuristic, Shape._fields
)


def plan(card: Card, *flat: Any, config: Config | None = None) -> tuple[Outputs, list[Launch]]:
    """Keys and values, and the kernels that fill what is asked for of them."""
    a = Gather(*flat)
    outputs, form, heads = out_like(*flat), parse_form(a.form), a.k_pages.shape[1]
    config = config or config_for(Shape(a.total, heads, a.size, a.form), card)
    shared = {"SYMMETRIC": form.spec.symmetric, "PAIRS": form.nibbles == "pairs", "ZERO": form.zeros == "zero"}
    shared |= {"MANTISSA": form.zeros == "mantissa", "CSR": a.table_starts is not None}
    tiles = {"D": a.size, "PAGE": a.k_pages.shape[2], "BLOCK_T": config.block_t}
    tiles |= {"BLOCK_D": triton.next_power_of_2(a.size), "num_warps": config.num_warps, "enable_fp_fusion": FUSION}
    indices = (a.table, a.table if a.table_starts is None else a.table_starts, a.lengths, a.starts)
    sizes = (a.batch, a.total, (a.batch - 1).bit_length())
    launches = []
    for wanted, rows, words, mu, bits, out in (
        (a.keys, a.k_pages, a.k_scales, a.mu, form.spec.k_bits, outputs[0]),
        (a.values, a.v_pages, a.v_scales, None, form.spec.v_bits, outputs[1]),
    ):
        if not wanted or not a.total:
            continue
        some: torch.Tensor = rows if words is None else words
        strides = (tuple(rows.stride()[:3]), tuple(some.stride()), a.table.stride(0))
        args = (rows, some, some if mu is None else mu, *indices, out, *sizes, *strides)
        flags = {"BITS": bits} | shared | {"MU": mu is not None} | tiles
        launches.append(Launch(gather_dequantize_kernel, (-(-a.total // config.block_t), heads), args, flags))
    return outputs, launches


run = runner(plan)
