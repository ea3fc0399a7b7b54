"""Triton body of attention_prefill: one program per tile of rows and key head, over all keys that the tile sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...formats.kvcache import parse_form
from .. import tuning
from ..attention_reading import Reading, reading, sides, warpgroups
from ..attention_tiles import (
    load_queries,
    load_tile,
    load_words,
    meet,
    no_sums,
    page_at,
    rounded_queries,
    rows_of,
    tile_at,
    value_dims,
)
from ..device import Card
from ..tiles import FUSION, Launch, runner
from . import contract

OP_VERSION = 1  # raised when a kernel changes so that tuned entries of the one before mean nothing


@triton.jit
def _whose(q_starts_ptr, BATCH, Q_LEN, pid, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(sequence, its first token, its tokens, its tile) of a program.

    Sequence b has the tiles from q_starts[b] * GROUP // BLOCK_M + b on, so that none is too few whatever the lengths are, and the
    sequence of a tile is found by halving: no list of tiles, nothing that waits for the device (vLLM's unified attention).
    """
    if q_starts_ptr is None:
        tiles = tl.cdiv(Q_LEN * GROUP, BLOCK_M)
        b = pid // tiles
        token0, n, tile = b.to(tl.int64) * Q_LEN, Q_LEN, pid % tiles
    else:
        low, high = pid * 0, pid * 0 + BATCH
        while high - low > 1:
            middle = (low + high) // 2
            begins = tl.load(q_starts_ptr + middle) * GROUP // BLOCK_M + middle
            low = tl.where(begins <= pid, middle, low)
            high = tl.where(begins <= pid, high, middle)
        b = low
        start = tl.load(q_starts_ptr + b)
        n = tl.load(q_starts_ptr + b + 1) - start
        token0, tile = start.to(tl.int64), pid - (start * GROUP // BLOCK_M + b)
    return b, token0, n, tile


@triton.jit
def _load(
    places, page, start, last, stride_k, stride_v, HOW: tl.constexpr, GIVEN: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """k, v and words of a tile of keys; GIVEN: v from rows of 16 bits, of which places[1] are the first BLOCK_N."""
    if GIVEN:
        live = start + tl.arange(0, BLOCK_N) < last
        k_at = tile_at(page, start, stride_k[0], stride_k[2], HOW.k_line, HOW, BLOCK_N)
        if HOW.page < BLOCK_N:
            k_at = k_at[:, None]
        k_there = (tl.arange(0, HOW.k_width) < HOW.k_row)[None, :]
        k = tl.load(places[0] + k_at, mask=k_there, other=0) if HOW.k_row < HOW.k_width else tl.load(places[0] + k_at)
        k_at = tile_at(page, start, stride_k[3], stride_k[5], 1, HOW, BLOCK_N)
        v_at = tile_at(page, start, stride_v[3], stride_v[5], 1, HOW, BLOCK_N)
        words = load_words(places[2] + k_at, places[3] + v_at, stride_k[6], stride_v[6], live, HOW, MASKED)
        there = (tl.arange(0, HOW.v_columns) < HOW.v_row)[None, :]
        rows = places[1] + (tl.full((), 0, tl.int64) + start) * stride_v[2]
        if MASKED:
            v = tl.load(rows, mask=there & live[:, None], other=0.0)
        elif HOW.v_row < HOW.v_columns:
            v = tl.load(rows, mask=there, other=0.0)
        else:
            v = tl.load(rows)
    else:
        k, v, words = load_tile(places, page, start, last, stride_k, stride_v, HOW, BLOCK_N, MASKED)
    return k, v, words


@triton.jit
def attention_prefill_kernel(
    q_ptr, k_ptrs, v_ptrs, given_ptrs, mu_ptr, table_ptrs, lengths_ptr, q_starts_ptr, sinks_ptr, o_ptr, lse_ptr,
    scale, softcap, window, BATCH, Q_LEN,
    stride_q, stride_k, stride_v, stride_tb,
    HOW: tl.constexpr, GROUP: tl.constexpr, GIVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale * q k^T) v for a tile of rows of one sequence: tokens x the heads that share a key head.

    q [T, HQ, D] with strides (token, head). k_ptrs, v_ptrs: pages and their scale words (or None), as attention_reading.Reading HOW
    says; stride_k, stride_v: attention_reading.sides. GIVEN: given_ptrs are v
    [sum S, HQ / GROUP, D] and v_starts int32 [B + 1], and stride_v[1], stride_v[2] are its head and token. mu fp32 [HQ / GROUP, D]
    or None. table_ptrs: table int32 with rows stride_tb apart, or its pieces and their starts int32 [B + 1]. lengths int32 [B];
    q_starts int32 [B + 1], or None: Q_LEN tokens of each. sinks fp32 [HQ] or None. softcap, window: None, or a number.
    o [T, HQ, D] in its type, lse fp32 [T, HQ], natural.

        program (tile, h)      rows tile * BLOCK_M ..: row r is token r // GROUP, head h * GROUP + r % GROUP
        keys    [ all rows see them | the diagonal ]      whole tiles without a mask, then those that are masked;
                                                          with a window all are, and those before it never visited
                 k [BLOCK_N, D] ^T                       v [BLOCK_N, D]
        q [M, D] |-> t [M, BLOCK_N] -> p = 2^(t - m) ->  acc [M, D]          (attention_tiles.meet)

    The longest tiles, the last of a sequence, start first. The page of the next tile is looked up one tile ahead. Running maxima
    are FlashAttention's (arXiv:2205.14135), int8 scores over a scale per query row SageAttention's (arXiv:2410.02367).
    """
    pid, h = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    b, token0, n, tile = _whose(q_starts_ptr, BATCH, Q_LEN, pid, GROUP, BLOCK_M)
    HQ = tl.num_programs(1) * GROUP
    length = tl.load(lengths_ptr + b)
    offs_r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_r < n * GROUP
    token, head = token0 + offs_r // GROUP, h * GROUP + offs_r % GROUP
    stands = length - n + offs_r // GROUP  # [BLOCK_M]
    lowest = length - n + tile * BLOCK_M // GROUP  # where the first row stands
    last = tl.minimum(length - n + (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, length)
    last = tl.where(tile * BLOCK_M < n * GROUP, last, 0)  # a program too many has no keys
    first = last * 0
    if window is not None:
        first = tl.maximum(lowest - window + 1, 0) // BLOCK_N * BLOCK_N

    table_row = table_ptrs[0]
    if table_ptrs[1] is not None:
        table_row += tl.load(table_ptrs[1] + b)
    else:
        table_row += b.to(tl.int64) * stride_tb
    page = page_at(table_row, first, last, HOW, BLOCK_N)
    mu_head = None if mu_ptr is None else mu_ptr + h * HOW.size
    q, shift = load_queries(q_ptr + token * stride_q[0] + head * stride_q[1], inside, mu_head, HOW)
    q, step, q_sum = rounded_queries(q, HOW)
    cap = None
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)  # noqa: E741
    if softcap is not None:
        cap = softcap * 1.4426950408889634
        step, shift = step * scale / softcap, shift * scale / softcap
    else:
        step, shift = step * (scale * 1.4426950408889634), shift * (scale * 1.4426950408889634)
    if sinks_ptr is not None:  # what a row has seen before its first key
        sink = tl.load(sinks_ptr + head, mask=inside, other=0.0) * 1.4426950408889634
        m = sink if cap is not None else sink - shift
        l += 1.0  # noqa: E741

    h64 = h.to(tl.int64)
    k_head = (h64 * stride_k[1] + stride_k[7]) * HOW.k_line
    k_rows = k_ptrs[0] + k_head + rows_of(stride_k[2], HOW.k_line, HOW, BLOCK_N)[:, None]
    if GIVEN:
        v_head = given_ptrs[0] + h64 * stride_v[1] + tl.load(given_ptrs[1] + b).to(tl.int64) * stride_v[2]
        v_rows = v_head + tl.arange(0, BLOCK_N).to(tl.int64)[:, None] * stride_v[2]
    else:
        v_first = (h64 * stride_v[1] + stride_v[7]) * HOW.v_line
        v_rows = v_ptrs[0] + v_first + rows_of(stride_v[2], HOW.v_line, HOW, BLOCK_N)[:, None]
    places = (k_rows + tl.arange(0, HOW.k_width)[None, :], v_rows + tl.arange(0, HOW.v_columns)[None, :])
    if HOW.k_bits != 16:
        k_words = k_ptrs[1] + h64 * stride_k[4] + rows_of(stride_k[5], 1, HOW, BLOCK_N)
        v_words = v_ptrs[1] + h64 * stride_v[4] + rows_of(stride_v[5], 1, HOW, BLOCK_N)
        places = (places[0], places[1], k_words, v_words)
    state = (m, l, tl.zeros((BLOCK_M,), tl.float32), no_sums(BLOCK_M, HOW))
    whole = first
    if window is None:
        whole += tl.maximum(tl.minimum(last, lowest + 1), 0) // BLOCK_N * BLOCK_N
        for start in range(first, whole, BLOCK_N):
            following = page_at(table_row, start + BLOCK_N, last, HOW, BLOCK_N)
            k, v, words = _load(places, page, start, last, stride_k, stride_v, HOW, GIVEN, BLOCK_N, False)
            state = meet(state, q, k, v, words, None, q_sum, step, shift, cap, HOW, False)
            page = following
    for start in range(whole, last, BLOCK_N):
        following = page_at(table_row, start + BLOCK_N, last, HOW, BLOCK_N)
        k, v, words = _load(places, page, start, last, stride_k, stride_v, HOW, GIVEN, BLOCK_N, True)
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
    into = token * HQ + head
    if lse_ptr is not None:
        tl.store(lse_ptr + into, lse * 0.6931471805599453, mask=inside)
    parts: tl.constexpr = HOW.v_parts
    for part in tl.static_range(parts):
        dims, there = value_dims(part, HOW)
        o = (acc[part] + off[:, None]) / tl.where(some, l, 1.0)[:, None]
        o_ptrs = o_ptr + into[:, None] * HOW.size + dims[None, :]
        tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=inside[:, None] & there[None, :])


class Shape(NamedTuple):
    """One problem as the heuristic sees it: sequences, the most fresh tokens of one, heads of queries and keys, head size, keys."""

    m: int
    q_len: int
    heads: int
    kv_heads: int
    size: int
    page: int
    keys: int
    given: bool
    capped: bool
    dtype: torch.dtype
    form: str


@dataclass(frozen=True)
class Config:
    """Tile of rows and keys, warps and stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def shape_of(case: Any) -> Shape:
    """The problem of a case of cases.py."""
    sizes = (case.heads, case.kv_heads, case.k, case.page, case.keys)
    return Shape(
        len(case.lengths), case.most, *sizes, "given" in case.flags, "softcap" in case.flags, case.dtype, case.form
    )


def heuristic(shape: Shape, card: Card) -> Config:
    """128 rows of 8 warps; 64 rows of heads beyond 128 numbers, of fp32, and where there are no more.

    64 keys in 3 stages where warpgroups multiply; 32 in 4 where warps do (mma.sync), with 64 they spill up to 88 bytes; and of
    pages smaller than that, whose ids take registers too, and of softcap. Quantised pages of 16 leave 128 rows too few
    registers where warps multiply (up to 216 bytes spilled at 7 heads a group), 64 enough, and fewer instructions a weight; of
    4 bits and padded heads, 16 keys at a time.
    """
    spec = parse_form(shape.form).spec
    rows, wide = shape.q_len * shape.heads // shape.kv_heads, triton.next_power_of_2(shape.size)
    whole = 4 if shape.dtype == torch.float32 else 2
    k_row = wide * whole if spec.k_bits == 16 else max(32, wide * spec.k_bits // 8)
    v_row = wide * whole if spec.v_bits == 16 or shape.given else max(32, wide * spec.v_bits // 8)
    tight = spec.quantised and shape.page < 32 and not warpgroups(card)
    narrow = tight and spec.k_bits == 4 and wide != shape.size
    small = wide > 128 or whole == 4 or rows <= 64 or (tight and not narrow)
    wide_tile = warpgroups(card) and max(k_row, v_row) <= 256 and shape.page >= 64 and not shape.capped
    block_m, block_n = 64 if small else 128, 64 if wide_tile else 16 if narrow and not small else 32
    buffers = (card.shared_bytes - block_m * wide * whole) // (block_n * (k_row + v_row + 8))
    return Config(block_m, block_n, 4 if small and wide <= 128 else 8, max(2, min(3 if block_n == 64 else 4, buffers)))


config_for = tuning.finder(
    Path(__file__).with_name("tuned.json"), triton.__version__, OP_VERSION, Config, heuristic, Shape._fields
)


def _reading(a: Any, v: torch.Tensor | None, block_m: int, card: Card) -> Reading:
    """How pages are read; with `v`, values as rows of numbers."""
    how = reading(a, block_m, warpgroups(card))
    if v is None:
        return how
    line = 16 // v.element_size()
    line = line if all(step % line == 0 for step in (v.storage_offset(), *v.stride()[:2])) else 1
    how = replace(how, v_bits=16, v_unit=0, v_parts=1, v_line=line)
    return replace(how, v_row=min(v.shape[2], how.v_columns))


def plan(card: Card, *flat: Any, config: Config | None = None) -> tuple[contract.Outputs, list[Launch]]:
    """Outputs, and the kernel that fills them. The grid follows from sizes alone: a few programs too many find nothing to do."""
    a, given = contract.parts(*flat)
    out, lse = contract.out_like(*flat)
    heads, (kv_heads, page) = a.q.shape[1], a.k_pages.shape[1:3]
    sizes = (heads, kv_heads, a.q.shape[2], page, a.max_kv_len)
    shape = Shape(a.batch, a.max_q_len, *sizes, given is not None, a.softcap > 0, a.q.dtype, a.form)
    config = config or config_for(shape, card)
    how = _reading(a, None if given is None else given[0], config.block_m, card)
    k, v, stride_k, stride_v = sides(a, reading(a, config.block_m, warpgroups(card)) if given is not None else how)
    if given is not None:
        stride_v = (0, given[0].stride(1), given[0].stride(0), *stride_v[3:])
    args = (
        a.q, k, v, given or (None, None), a.mu, (a.table, a.table_starts), a.lengths, a.q_starts, a.sinks, out,
        lse if a.with_lse else None, a.scale, a.softcap or None, a.window if a.window > 0 else None, a.batch, a.max_q_len,
        tuple(a.q.stride()[:2]), stride_k, stride_v, a.table.stride(0),
    )  # fmt: skip
    flags = {"HOW": how, "GROUP": a.group, "GIVEN": given is not None}
    flags |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": FUSION}
    tiles = a.batch * -(-a.max_q_len * a.group // config.block_m)
    if a.q_starts is not None:
        tiles = a.q.shape[0] * a.group // config.block_m + a.batch
    step = (config.block_n, how.k_width * how.k_parts + how.v_width * how.v_parts)
    return (out, lse), [Launch(attention_prefill_kernel, (tiles, kv_heads), args, flags | options, step)]


run = runner(plan)
