"""Triton body of kv_append: one program per token and few heads; tiles of key heads first, then those of queries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import tuning
from ..device import Card
from ..tiles import FUSION, Launch, runner
from . import contract

OP_VERSION = 1  # raised when a kernel changes so that tuned entries of the one before mean nothing


@triton.jit
def _prepared(
    rows_ptr, stride_h, weight_ptr, offs_h, mask, cos, sin, eps,
    NORM: tl.constexpr, TURN: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The two halves of heads `offs_h`, normed and turned: fp32 [BLOCK_H, BLOCK_D] each."""
    offs_d = tl.arange(0, BLOCK_D)
    at = offs_h[:, None].to(tl.int64) * stride_h + offs_d[None, :]
    low = tl.load(rows_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
    high = tl.load(rows_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
    if NORM:
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
def kv_append_kernel(
    k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, slots_ptr, q_ptr, q_out_ptr, positions_ptr, cos_sin_ptr,
    q_weight_ptr, k_weight_ptr,
    HQ, HKV, P, eps,
    stride_k, stride_v, stride_q, stride_kp, stride_vp,
    NORM: tl.constexpr, TURN: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """k_pages[slot // P, :, slot % P] = turn(norm(k[t]))   v_pages[...] = v[t]   q_out[t] = turn(norm(q[t]))

    k, v [T, HKV, D], q [T, HQ, D], strides (token, head); pages [pages, HKV, P, D], strides (page, head, row); q_out contiguous;
    all of one float type. slots, positions int64 [T]; cos_sin fp32 [.., D]; weights [D], as norm wants them (NORM).

        program (t, i)    i < ceil(HKV / BLOCK_H)   heads of k and v    [ BLOCK_H x D/2 | BLOCK_H x D/2 ]    rows leave whole
                          else                      heads of q          [     low       |     high      ]
    """
    t = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    kv_tiles = tl.cdiv(HKV, BLOCK_H)
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
            low, high = _prepared(
                k_ptr + t * stride_k[0],
                stride_k[1],
                k_weight_ptr,
                offs_h,
                mask,
                cos,
                sin,
                eps,
                NORM,
                TURN,
                HALF,
                BLOCK_D,
            )
            heads = offs_h[:, None].to(tl.int64)
            into = k_pages_ptr + (slot // P) * stride_kp[0] + (slot % P) * stride_kp[2]
            into += heads * stride_kp[1] + offs_d[None, :]
            tl.store(into, low.to(k_pages_ptr.dtype.element_ty), mask=mask)
            tl.store(into + HALF, high.to(k_pages_ptr.dtype.element_ty), mask=mask)
            rows = v_ptr + t * stride_v[0] + heads * stride_v[1] + offs_d[None, :]
            into = v_pages_ptr + (slot // P) * stride_vp[0] + (slot % P) * stride_vp[2]
            into += heads * stride_vp[1] + offs_d[None, :]
            tl.store(into, tl.load(rows, mask=mask, other=0.0), mask=mask)
            tl.store(into + HALF, tl.load(rows + HALF, mask=mask, other=0.0), mask=mask)
    else:
        offs_h = (tile - kv_tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (offs_h < HQ)[:, None] & (offs_d < HALF)[None, :]
        low, high = _prepared(
            q_ptr + t * stride_q[0], stride_q[1], q_weight_ptr, offs_h, mask, cos, sin, eps, NORM, TURN, HALF, BLOCK_D
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


@dataclass(frozen=True)
class Config:
    """Heads that a program takes, and its warps."""

    block_h: int
    num_warps: int


def shape_of(case: Any) -> Shape:
    """The problem of a case of cases.py."""
    return Shape(case.m, case.heads, case.kv_heads, case.k, case.dtype)


def heuristic(shape: Shape, card: Card) -> Config:
    """As many heads as fill 16-byte stores of one warp, at most 8; wide heads take two warps."""
    most = 8 if shape.size <= 128 else 4
    return Config(min(most, triton.next_power_of_2(shape.kv_heads)), 1 if shape.size <= 64 else 2)


config_for = tuning.finder(
    Path(__file__).with_name("tuned.json"), triton.__version__, OP_VERSION, Config, heuristic, Shape._fields
)


def plan(card: Card, *flat: Any, config: Config | None = None) -> tuple[torch.Tensor, list[Launch]]:
    """q_out, and the kernel that fills it and the slots."""
    k, v, k_pages, v_pages, _, _, slots, q, positions, cos_sin, q_weight, k_weight, eps, _ = flat
    out = contract.out_like(*flat)
    tokens, kv_heads, size = k.shape
    heads = 0 if q is None else q.shape[1]
    config = config or config_for(Shape(tokens, heads, kv_heads, size, k.dtype), card)
    some = k if q is None else q
    pointers = (
        k, v, k_pages, v_pages, slots, some, out, slots if positions is None else positions,
        k if cos_sin is None else cos_sin, k if q_weight is None else q_weight, k if k_weight is None else k_weight,
    )  # fmt: skip
    strides = (k.stride()[:2], v.stride()[:2], some.stride()[:2], k_pages.stride()[:3], v_pages.stride()[:3])
    flags = {"NORM": k_weight is not None, "TURN": positions is not None, "HALF": size // 2}
    flags |= {"BLOCK_H": config.block_h, "BLOCK_D": triton.next_power_of_2(size // 2)}
    tiles = -(-kv_heads // config.block_h) + -(-heads // config.block_h)
    args = (*pointers, heads, kv_heads, k_pages.shape[2], eps, *(tuple(map(int, s)) for s in strides))
    options = {"num_warps": config.num_warps, "enable_fp_fusion": FUSION}
    return out, [Launch(kv_append_kernel, (tokens, tiles), args, flags | options)]


run = runner(plan)
