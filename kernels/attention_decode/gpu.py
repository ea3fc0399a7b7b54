"""Triton body of attention_decode: one program per tile of rows, key head and split of a sequence; then one merge."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...formats.kvcache import parse_form
from .. import tuning
from ..attention import Attention
from ..attention_reading import reading, sides, warpgroups
from ..attention_tiles import (
    load_queries,
    load_tile,
    meet,
    no_sums,
    page_at,
    rounded_queries,
    rows_of,
    value_dims,
)
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
def attention_decode_kernel(
    q_ptr, k_ptrs, v_ptrs, mu_ptr, table_ptrs, lengths_ptr, q_starts_ptr, sinks_ptr, o_ptr, lse_ptr,
    scale, softcap, window, ROWS,
    stride_q, stride_k, stride_v, stride_tb,
    HOW: tl.constexpr, Q_LEN: tl.constexpr, GROUP: tl.constexpr, FIXED: tl.constexpr, MANY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale * q k^T) v over one split of one sequence, for the heads that share a key head.

    q [T, HQ, D] with strides (token, head). k_ptrs, v_ptrs: pages and their scale words (or None), as attention_tiles.Reading HOW
    says; stride_k, stride_v: attention_reading.sides. mu fp32 [HQ / GROUP, D] or
    None. table_ptrs: table int32 with rows stride_tb apart, or its pieces and their starts int32 [B + 1]. lengths int32 [B];
    q_starts int32 [B + 1], or None: Q_LEN tokens of each. sinks fp32 [HQ] or None. softcap, window: None, or a number.
    o fp32 [SPLITS, ROWS = T * HQ, D] and lse fp32 [SPLITS, ROWS] in base 2; not MANY: o is the result, in its type, lse natural.

        program (b * tiles + i, h, s)         rows i * BLOCK_M ..: row r is token r // GROUP, head h * GROUP + r % GROUP
        keys    [ s * chunk ............ ]    in tiles of BLOCK_N; row r sees those before length - n + r // GROUP + 1
                [ whole tiles | masked ]      with a window all tiles are masked, and those before it never visited

                 k [BLOCK_N, D] ^T                       v [BLOCK_N, D]
        q [M, D] |-> t [M, BLOCK_N] -> p = 2^(t - m) ->  acc [M, D]          (attention_tiles.meet)

    The page of the next tile is looked up one tile ahead: a look-up in the step itself costs the pipeline all its buffers.
    A sink is what the first split has seen before its first key. The idea of splits is flash decoding's
    (pytorch.org/blog/flash-decoding), of shared rows FlashInfer's (arXiv:2501.01005), of int8 scores SageAttention's.
    """
    tiles: tl.constexpr = (Q_LEN * GROUP + BLOCK_M - 1) // BLOCK_M
    b, h, split = tl.program_id(0) // tiles, tl.program_id(1), tl.program_id(2)
    HQ = tl.num_programs(1) * GROUP
    length = tl.load(lengths_ptr + b)
    offs_r = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    token0, n = b.to(tl.int64) * Q_LEN, Q_LEN
    if q_starts_ptr is not None:
        token0 = tl.load(q_starts_ptr + b).to(tl.int64)
        n = (tl.load(q_starts_ptr + b + 1) - token0).to(tl.int32)
    inside = offs_r < n * GROUP
    token, head = token0 + offs_r // GROUP, h * GROUP + offs_r % GROUP
    stands = length - n + offs_r // GROUP  # [BLOCK_M]
    lowest = 0
    if window is not None:
        lowest = tl.maximum(length - n - window + 1, 0) // BLOCK_N * BLOCK_N
    chunk = _chunk(length - lowest, tl.num_programs(2), FIXED)
    first = lowest + split * chunk
    last = tl.minimum(first + chunk, length)
    last = tl.where((tl.program_id(0) % tiles) * BLOCK_M < n * GROUP, last, first)  # no such tokens here

    table_row = table_ptrs[0]
    if table_ptrs[1] is not None:
        table_row += tl.load(table_ptrs[1] + b)
    else:
        table_row += b.to(tl.int64) * stride_tb
    page = page_at(table_row, first, last, HOW, BLOCK_N)
    mu_head = None if mu_ptr is None else mu_ptr + h * HOW.size
    q_rows = q_ptr + token * stride_q[0] + head * stride_q[1]
    q, shift = load_queries(q_rows, inside, mu_head, HOW)
    q, step, q_sum = rounded_queries(q, HOW)
    cap = None
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)  # noqa: E741
    if softcap is not None:
        cap = softcap * 1.4426950408889634
        step, shift = step * scale / softcap, shift * scale / softcap
    else:
        step, shift = step * (scale * 1.4426950408889634), shift * (scale * 1.4426950408889634)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=inside, other=0.0) * 1.4426950408889634
        m = tl.where(split == 0, sink if cap is not None else sink - shift, m)
        l += tl.where(split == 0, 1.0, 0.0)  # noqa: E741

    h64 = h.to(tl.int64)
    k_head, v_head = (h64 * stride_k[1] + stride_k[7]) * HOW.k_line, (h64 * stride_v[1] + stride_v[7]) * HOW.v_line
    k_rows = k_ptrs[0] + k_head + rows_of(stride_k[2], HOW.k_line, HOW, BLOCK_N)[:, None]
    v_rows = v_ptrs[0] + v_head + rows_of(stride_v[2], HOW.v_line, HOW, BLOCK_N)[:, None]
    places = (k_rows + tl.arange(0, HOW.k_width)[None, :], v_rows + tl.arange(0, HOW.v_columns)[None, :])
    if HOW.k_bits != 16:
        k_words = k_ptrs[1] + h64 * stride_k[4] + rows_of(stride_k[5], 1, HOW, BLOCK_N)
        v_words = v_ptrs[1] + h64 * stride_v[4] + rows_of(stride_v[5], 1, HOW, BLOCK_N)
        places = (places[0], places[1], k_words, v_words)
    state = (m, l, tl.zeros((BLOCK_M,), tl.float32), no_sums(BLOCK_M, HOW))
    whole = first
    if window is None:
        whole += tl.maximum(tl.minimum(last, length - n + 1) - first, 0) // BLOCK_N * BLOCK_N
        for start in range(first, whole, BLOCK_N):
            following = page_at(table_row, start + BLOCK_N, last, HOW, BLOCK_N)
            k, v, words = load_tile(places, page, start, last, stride_k, stride_v, HOW, BLOCK_N, False)
            state = meet(state, q, k, v, words, None, q_sum, step, shift, cap, HOW, False)
            page = following
    for start in range(whole, last, BLOCK_N):
        following = page_at(table_row, start + BLOCK_N, last, HOW, BLOCK_N)
        k, v, words = load_tile(places, page, start, last, stride_k, stride_v, HOW, BLOCK_N, True)
        at = start + tl.arange(0, BLOCK_N)
        visible = (at < last)[None, :] & (at[None, :] <= stands[:, None])
        if window is not None:
            visible = visible & (at[None, :] > stands[:, None] - window)
        state = meet(state, q, k, v, words, visible, q_sum, step, shift, cap, HOW, True)
        page = following

    m, l, off, acc = state  # noqa: E741
    some = l != 0.0
    lse = tl.where(some, m + tl.log2(tl.where(some, l, 1.0)), float("-inf"))
    if cap is None:
        lse += shift
    into = token * HQ + head + (split.to(tl.int64) * ROWS if MANY else 0)
    tl.store(lse_ptr + into, lse if MANY else lse * 0.6931471805599453, mask=inside)
    if (first < last) | (split == 0):  # what an empty split would write is never read
        parts: tl.constexpr = HOW.v_parts
        for part in tl.static_range(parts):
            dims, there = value_dims(part, HOW)
            o = (acc[part] + off[:, None]) / tl.where(some, l, 1.0)[:, None]
            o_ptrs = o_ptr + into[:, None] * HOW.size + dims[None, :]
            tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=inside[:, None] & there[None, :])


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
    form: str


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
    return Shape(batch, case.tokens, *sizes, fixed, case.dtype, "bf16")


def splits(batch: int, tiles: int, kv_heads: int, keys: int, sms: int, per_sm: int = 4) -> int:
    """Into how many splits every sequence is cut: by sizes alone, so that a captured grid stays right."""
    cap = 64 if batch <= 4 else 16 if batch <= 32 else 8 if batch <= 128 else 4
    want = -(-sms * per_sm // (batch * tiles * kv_heads))
    most = max(1, min(cap, -(-keys // contract.LEAST_CHUNK)))
    return min(max(want, 4 if keys > 4096 else 1), most)


def heuristic(shape: Shape, card: Card) -> Config:
    """A tile holds a group's tokens, 16, 32 or 64 rows; more take tiles side by side, so that keys read again lie in the L2.

    64 rows only where warpgroups multiply, and heads of at most 128; heads of more over small pages take 16: others would need
    all registers, and spill.
    Stages as shared memory allows when two programs share an SM; a tile of K and V has stages - 1 buffers.
    """
    spec = parse_form(shape.form).spec
    rows, wide = shape.q_len * shape.heads // shape.kv_heads, triton.next_power_of_2(shape.size)
    whole = 4 if shape.dtype == torch.float32 else 2
    row = [wide * whole if bits == 16 else max(32, wide * bits // 8) for bits in (spec.k_bits, spec.v_bits)]
    block_m = 16 if rows <= 16 else 32 if rows <= 32 or wide > 128 or not warpgroups(card) else 64
    block_m = 16 if wide > 128 and shape.page < contract.TILE else block_m
    block_n = 64 if max(row) <= 256 else 32
    buffers = (card.shared_bytes // 2 - block_m * wide * whole) // (block_n * (sum(row) + 8))
    stages = max(2, min(4, buffers + 1))
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
    span = a.max_kv_len if a.window < 0 else min(a.max_kv_len, a.window + q_len + contract.TILE)
    batch = 1 if a.deterministic else a.batch
    shape = Shape(batch, q_len, heads, kv_heads, size, page, span, a.deterministic, a.q.dtype, a.form)
    config = config or config_for(shape, card)
    count = -(-span // config.fixed) if config.fixed else wanted or config.splits
    config = replace(config, splits=count)
    many = config.splits > 1
    full_lse = lse if a.with_lse else a.q.new_empty((tokens, heads), dtype=torch.float32)
    o, part = out, full_lse
    if many:
        o = a.q.new_empty((config.splits, rows, size), dtype=torch.float32)
        part = a.q.new_empty((config.splits, rows), dtype=torch.float32)
    if a.q_starts is not None:  # a captured call has tokens of no sequence: zeros, which nobody else writes
        part.fill_(float("-inf"))
        if not many:
            out.zero_()
    how = reading(a, config.block_m, warpgroups(card) and config.block_m >= 64)
    k, v, stride_k, stride_v = sides(a, how)
    window, softcap = (a.window if a.window > 0 else None), (a.softcap if a.softcap else None)
    args = (
        a.q, k, v, a.mu, (a.table, a.table_starts), a.lengths, a.q_starts, a.sinks, o, part, a.scale, softcap, window, rows,
        tuple(a.q.stride()[:2]), stride_k, stride_v, a.table.stride(0),
    )  # fmt: skip
    flags = {"HOW": how, "Q_LEN": q_len, "GROUP": a.group, "FIXED": config.fixed, "MANY": many}
    flags |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": FUSION}
    # Left alone, ptxas spills some of these where one register less makes room for another program.
    if config.block_m > 16 or softcap is not None:
        options["maxnreg"] = 255
    tiles = -(-q_len * a.group // config.block_m)
    grid = (a.batch * tiles, kv_heads, config.splits)
    step = (config.block_n, how.k_width * how.k_parts + how.v_width * how.v_parts)
    launches = [Launch(attention_decode_kernel, grid, args, flags | options, step)]
    if many:
        sizes = {"D": size, "BLOCK_D": triton.next_power_of_2(size), "num_warps": 2, "enable_fp_fusion": FUSION}
        launches.append(Launch(merge_kernel, (rows,), (o, part, out, full_lse, rows, config.splits), sizes))
    return (out, lse), launches


run = runner(plan)
