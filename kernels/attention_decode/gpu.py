"""Triton body of attention_decode: one program per tile of rows, key head and split of a sequence; then one merge."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import tuning
from ..attention import Attention
from ..device import Card
from ..tiles import FUSION, Launch, runner
from . import contract

OP_VERSION = 1  # raised when a kernel changes so that tuned entries of the one before mean nothing
LOG2E = 1.4426950408889634


@triton.jit
def _chunk(length, SPLITS, FIXED: tl.constexpr):
    """Keys of a split: contract.chunk, or FIXED of them."""
    if FIXED:
        chunk = length * 0 + FIXED
    else:
        chunk = tl.maximum(256, tl.cdiv(length, SPLITS * 64) * 64)
    return chunk


@triton.jit
def _page_at(table_row, start, last, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of a tile's keys: one number where a tile lies in one page, else a column of them; 0 past the end."""
    if PAGE >= BLOCK_N:
        page = tl.load(table_row + start // PAGE, mask=start < last, other=0).to(tl.int64)
    else:
        at = start + tl.arange(0, BLOCK_N)[:, None]
        page = tl.load(table_row + at // PAGE, mask=at < last, other=0).to(tl.int64)  # [BLOCK_N, 1]
    return page


@triton.jit
def attention_decode_kernel(
    q_ptr, k_pages_ptr, v_pages_ptr, table_ptr, lengths_ptr, o_ptr, lse_ptr,
    scale, HQ, ROWS, SPLITS,
    stride_q, stride_kp, stride_vp, stride_tb,
    Q_LEN: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, MANY: tl.constexpr, FIXED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale * q k^T) v over one split of one sequence, for the heads that share a key head.

    q [B * Q_LEN, HQ, D] with strides (token, head); pages [pages, HQ / GROUP, PAGE, D] with strides (page, head, row), of one
    16-bit type or fp32; table, lengths int32. o fp32 [SPLITS, ROWS = B * Q_LEN * HQ, D] and lse fp32 [SPLITS, ROWS] in base 2;
    with one split o is the result, in its type, and lse the natural one.

        program (b * tiles + i, h, s)         rows i * BLOCK_M ..: row r is token r // GROUP, head h * GROUP + r % GROUP
        keys    [ s * chunk ............ ]    in tiles of BLOCK_N; row r sees those before length - Q_LEN + r // GROUP + 1

                 k [BLOCK_N, D] ^T                       v [BLOCK_N, D]
        q [M, D] |-> s [M, BLOCK_N] -> p = 2^(s - m) ->  acc [M, D]

    The page of the next tile is looked up one tile ahead: a look-up in the step itself costs the pipeline all its buffers.
    The idea of splits is flash decoding's (pytorch.org/blog/flash-decoding), of shared rows FlashInfer's (arXiv:2501.01005).
    """
    tiles: tl.constexpr = (Q_LEN * GROUP + BLOCK_M - 1) // BLOCK_M
    b, h, split = tl.program_id(0) // tiles, tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + b)
    chunk = _chunk(length, SPLITS, FIXED)
    first = split * chunk
    last = tl.minimum(first + chunk, length)
    offs_r = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d, offs_n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    inside = offs_r < Q_LEN * GROUP
    token, head = b.to(tl.int64) * Q_LEN + offs_r // GROUP, h * GROUP + offs_r % GROUP
    seen = length - Q_LEN + offs_r // GROUP + 1  # [BLOCK_M]
    mask_q = inside[:, None] & (offs_d < D)[None, :]
    q = tl.load(
        q_ptr + token[:, None] * stride_q[0] + head[:, None] * stride_q[1] + offs_d[None, :], mask=mask_q, other=0.0
    )
    k_head = k_pages_ptr + h.to(tl.int64) * stride_kp[1] + offs_d[None, :]
    v_head = v_pages_ptr + h.to(tl.int64) * stride_vp[1] + offs_d[None, :]
    table_row = table_ptr + b.to(tl.int64) * stride_tb

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)  # noqa: E741
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    page = _page_at(table_row, first, last, PAGE, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        following = _page_at(table_row, start + BLOCK_N, last, PAGE, BLOCK_N)
        at = start + offs_n
        row = (at % PAGE)[:, None].to(tl.int64)
        live = (at < last)[:, None] & (offs_d < D)[None, :]
        k = tl.load(k_head + page * stride_kp[0] + row * stride_kp[2], mask=live, other=0.0)  # [BLOCK_N, BLOCK_D]
        v = tl.load(v_head + page * stride_vp[0] + row * stride_vp[2], mask=live, other=0.0)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        s = tl.where(at[None, :] < tl.minimum(seen, last)[:, None], s, float("-inf"))
        largest = tl.maximum(m, tl.max(s, axis=1))
        base = tl.where(largest == float("-inf"), 0.0, largest)  # a row that has seen nothing yet
        p = tl.exp2(s - base[:, None])
        kept = tl.exp2(m - base)
        l = l * kept + tl.sum(p, axis=1)  # noqa: E741
        acc = acc * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")  # [BLOCK_M, BLOCK_D]
        m = largest
        page = following

    some = l != 0.0
    lse = tl.where(some, m + tl.log2(l), float("-inf"))
    acc = acc / tl.where(some, l, 1.0)[:, None]
    into = token * HQ + head
    if MANY:
        into += split.to(tl.int64) * ROWS
        tl.store(lse_ptr + into, lse, mask=inside)
        if first < last:  # what an empty split would write is never read
            tl.store(o_ptr + into[:, None] * D + offs_d[None, :], acc, mask=mask_q)
    else:
        tl.store(lse_ptr + into, lse * 0.6931471805599453, mask=inside)
        tl.store(o_ptr + into[:, None] * D + offs_d[None, :], acc.to(o_ptr.dtype.element_ty), mask=mask_q)


@triton.jit
def merge_kernel(
    o_ptr, lse_ptr, out_ptr, out_lse_ptr,
    ROWS, SPLITS,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = sum_s 2^(lse_s - m) o_s / sum_s 2^(lse_s - m), one row a program, splits in order; a split of -inf is not read.

    o fp32 [SPLITS, ROWS, D], lse fp32 [SPLITS, ROWS] in base 2; out [ROWS, D], out_lse fp32 [ROWS], natural.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    m = tl.load(lse_ptr + row)
    at = row
    for _ in range(1, SPLITS):
        at += ROWS
        m = tl.maximum(m, tl.load(lse_ptr + at))
    base = tl.where(m == float("-inf"), 0.0, m)
    total = base * 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    at = row
    for _ in range(SPLITS):
        lse = tl.load(lse_ptr + at)
        weight = tl.exp2(lse - base)
        live = tl.where(lse == float("-inf"), 0, D)
        o = tl.load(o_ptr + at * D + offs_d, mask=offs_d < live, other=0.0)
        acc += weight * o
        total += weight
        at += ROWS
    some = total != 0.0
    tl.store(
        out_ptr + row * D + offs_d, (acc / tl.where(some, total, 1.0)).to(out_ptr.dtype.element_ty), mask=offs_d < D
    )
    tl.store(out_lse_ptr + row, tl.where(some, (base + tl.log2(total)) * 0.6931471805599453, float("-inf")))


class Shape(NamedTuple):
    """One problem as the heuristic sees it: sequences, fresh tokens of each, heads of queries and keys, head size, cached keys."""

    m: int
    q_len: int
    heads: int
    kv_heads: int
    size: int
    page: int
    keys: int
    deterministic: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Config:
    """Tile of rows and keys, splits of a sequence (fixed: of that many keys each, whatever the batch), warps and stages."""

    block_m: int
    block_n: int
    splits: int
    fixed: int
    num_warps: int
    num_stages: int


def shape_of(case: Any) -> Shape:
    """The problem of a case of cases.py."""
    batch, fixed = len(case.lengths), case.deterministic
    sizes = (case.heads, case.kv_heads, case.k, case.page, case.keys)
    return Shape(batch, case.tokens, *sizes, fixed, case.dtype)


def splits(batch: int, tiles: int, kv_heads: int, keys: int, sms: int, per_sm: int = 4) -> int:
    """Into how many splits every sequence is cut: by sizes alone, so that a captured grid stays right."""
    cap = 64 if batch <= 4 else 16 if batch <= 32 else 8 if batch <= 128 else 4
    want = -(-sms * per_sm // (batch * tiles * kv_heads))
    most = max(1, min(cap, -(-keys // contract.LEAST_CHUNK)))
    return min(max(want, 4 if keys > 4096 else 1), most)


def heuristic(shape: Shape, card: Card) -> Config:
    """16 rows hold a group of up to 16 heads; more take tiles of 32, side by side, so that keys read again lie in the L2.

    Stages as shared memory allows.
    """
    rows, wide = shape.q_len * shape.heads // shape.kv_heads, triton.next_power_of_2(shape.size)
    whole = 4 if shape.dtype == torch.float32 else 2
    block_m = 16 if rows <= 16 else 32
    block_n = 64 if wide * whole <= 256 else 32
    stages = max(2, min(4, (card.shared_bytes - block_m * wide * whole) // (2 * block_n * wide * whole) - 1))
    tiles = -(-rows // block_m)
    fixed = contract.FIXED_CHUNK if shape.deterministic else 0
    count = -(-shape.keys // fixed) if fixed else splits(shape.m, tiles, shape.kv_heads, shape.keys, card.sms)
    return Config(block_m, block_n, count, fixed, 4, stages)


config_for = tuning.finder(
    Path(__file__).with_name("tuned.json"), triton.__version__, OP_VERSION, Config, heuristic, Shape._fields
)


def plan(card: Card, *flat: Any, config: Config | None = None) -> tuple[contract.Outputs, list[Launch]]:
    """Outputs, and the kernels that fill them; partial results lie in two workspaces, fp32 [splits, T * Hq, D + 1]."""
    a, wanted = Attention(*flat[:-1]), flat[-1]
    out, lse = contract.out_like(*flat)
    (tokens, heads, size), (kv_heads, page) = a.q.shape, a.k_pages.shape[1:3]
    q_len, rows = a.max_q_len, tokens * heads
    # The shape's own batch, not its bucket's: splits follow from it, and a grid must hold every key.
    shape = Shape(a.batch, q_len, heads, kv_heads, size, page, a.max_kv_len, a.deterministic, a.q.dtype)
    config = config or config_for(shape, card)
    if wanted and not config.fixed:
        config = replace(config, splits=wanted)
    many = config.splits > 1
    full_lse = lse if a.with_lse else a.q.new_empty((tokens, heads), dtype=torch.float32)
    o, part = out, full_lse
    if many:
        o = a.q.new_empty((config.splits, rows, size), dtype=torch.float32)
        part = a.q.new_empty((config.splits, rows), dtype=torch.float32)
    wide = triton.next_power_of_2(size)
    tiles = -(-q_len * a.group // config.block_m)
    strides = (tuple(a.q.stride()[:2]), tuple(a.k_pages.stride()[:3]), tuple(a.v_pages.stride()[:3]), a.table.stride(0))
    pointers = (a.q, a.k_pages, a.v_pages, a.table, a.lengths, o, part)
    args = (*pointers, a.scale * LOG2E, heads, rows, config.splits, *strides)
    flags = {"Q_LEN": q_len, "GROUP": a.group, "D": size, "PAGE": page}
    flags |= {"MANY": many, "FIXED": config.fixed}
    flags |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": wide}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": FUSION}
    grid, step = (a.batch * tiles, kv_heads, config.splits), (2 * config.block_n, wide)
    launches = [Launch(attention_decode_kernel, grid, args, flags | options, step)]
    if many:
        sizes = {"D": size, "BLOCK_D": wide, "num_warps": 2, "enable_fp_fusion": FUSION}
        launches.append(Launch(merge_kernel, (rows,), (o, part, out, full_lse, rows, config.splits), sizes))
    return (out, lse), launches


run = runner(plan)
