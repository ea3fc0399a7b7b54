"""What the kernels of moe_matmul stand on: which tokens a program takes, which rows of W, and where its products go."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import silu


def most_blocks(pairs: int, experts: int, block_m: int) -> int:
    """The most blocks that pairs can make: each expert that has one (and "none of ours") may fill all but one in part."""
    filled = min(pairs, experts + 1)
    return filled + (pairs - filled) // block_m


@triton.jit(do_not_specialize=["M", "E"])
def route_kernel(
    ids_ptr, route_ptr,
    M, E, MOST,
    BLOCK_M: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Counting sort of M (token, expert) pairs by expert, stable; program e places the pairs of expert e.

    ids int32 [M]; route int32 [M + 3 MOST + 1]:

        [ pairs in order of experts, M | expert of a block, MOST | its first place | its end | blocks in all ]

    Program E takes the pairs of no expert of ours (any other id): their blocks have expert -1. Every program counts all
    pairs and adds up what comes before its own, so none waits for another.
    """
    mine = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    for begin in range(0, M, CHUNK):
        offs = begin + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + offs, mask=offs < M, other=0)  # [CHUNK]
        ids = tl.where((ids < 0) | (ids >= E), E, ids)
        counts += tl.histogram(tl.where(offs < M, ids, BINS - 1), BINS)  # the last bin counts what is past the end

    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    place = tl.sum(tl.where(bins < mine, counts, 0))
    first = tl.sum(tl.where(bins < mine, blocks, 0))
    count = tl.sum(tl.where(bins == mine, counts, 0))
    many = (count + BLOCK_M - 1) // BLOCK_M
    block_ptr = route_ptr + M + first
    for begin in range(0, many, BINS):
        b = begin + bins
        tl.store(block_ptr + b, tl.where(mine == E, -1, mine) + tl.zeros_like(b), mask=b < many)
        tl.store(block_ptr + MOST + b, place + b * BLOCK_M, mask=b < many)
        tl.store(block_ptr + 2 * MOST + b, tl.minimum(place + (b + 1) * BLOCK_M, place + count), mask=b < many)
    if mine == E:
        tl.store(route_ptr + M + 3 * MOST, first + many)

    for begin in range(0, M, CHUNK):
        offs = begin + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + offs, mask=offs < M, other=0)  # [CHUNK]
        ids = tl.where((ids < 0) | (ids >= E), E, ids)
        here = ((ids == mine) & (offs < M)).to(tl.int32)
        tl.store(route_ptr + place + tl.cumsum(here, 0) - here, offs, mask=here > 0)
        place += tl.sum(here)


@triton.jit
def blocks_in_all(route_ptr, M, MOST, DIRECT: tl.constexpr):
    """How many blocks there are: at most the number that the grid was made for."""
    if DIRECT:
        there = M
    else:
        there = tl.load(route_ptr + M + 3 * MOST)
    return there


@triton.jit
def tokens_of_block(route_ptr, block, M, E, MOST, DIRECT: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert or -1, pairs int32 [BLOCK_M], which of them there are); DIRECT: route is ids, block b is pair b alone."""
    offs_m = tl.arange(0, BLOCK_M)
    if DIRECT:
        expert = tl.load(route_ptr + block)
        expert = tl.where(expert < E, expert, -1)
        pairs = block + offs_m * 0
        mask_m = offs_m < 1
    else:
        expert = tl.load(route_ptr + M + block)
        places = tl.load(route_ptr + M + MOST + block) + offs_m
        mask_m = places < tl.load(route_ptr + M + 2 * MOST + block)
        pairs = tl.load(route_ptr + places, mask=mask_m, other=0)
    return expert, pairs, mask_m


@triton.jit
def rows_of_tile(tile_n, N, N_PAD, UP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of W in a tile, and the first output. UP: half of them gate rows n, half up rows N + n, of the same outputs.

    Rows past the padding wrap around: what they give is never stored, so no mask is spent on them.
    """
    r = tl.arange(0, BLOCK_N)
    if UP:
        first = tile_n * (BLOCK_N // 2)
        rows = first + r % (BLOCK_N // 2) + (r // (BLOCK_N // 2)) * N
    else:
        first = tile_n * BLOCK_N
        rows = first + r
    return rows % N_PAD, first


@triton.jit
def store_products(
    acc, weight_ptr, y_ptr, first, pairs, mask_m, expert,
    M, N, TOPK,
    UP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """fp32 products [BLOCK_N, BLOCK_M] -> y. UP: silu(gate) * up to row `pair`; else times the weight of the pair to row
    (pair % TOPK) * T + pair // TOPK, so that add_slices finds slice j of all tokens side by side."""
    if UP:
        halves = tl.permute(tl.reshape(acc, (2, BLOCK_N // 2, BLOCK_M)), (2, 1, 0))
        gate, up = tl.split(halves)  # [BLOCK_M, BLOCK_N / 2]
        y = silu(gate) * up
        rows = pairs
        offs_n = first + tl.arange(0, BLOCK_N // 2)
    else:
        weight = tl.load(weight_ptr + pairs, mask=mask_m, other=0.0)  # [BLOCK_M]
        y = tl.trans(acc * tl.where(expert >= 0, weight, 0.0)[None, :])  # [BLOCK_M, BLOCK_N]
        rows = (pairs % TOPK) * (M // TOPK) + pairs // TOPK
        offs_n = first + tl.arange(0, BLOCK_N)
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_n < N)[None, :])
