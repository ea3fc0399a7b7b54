"""Triton body of moe_matmul: tokens sorted by expert on the card, then one program per (rows of an expert, its tokens).

    route               ids -> tokens in order of their experts, cut into blocks of BLOCK_M of one expert; no host waits
    matmul_experts_*    a block of tokens times BLOCK_N rows of its expert, W on the left as in the dense kernels
    add_slices          down only: the topk results of a token, first to last

All sizes on the host are bounds: the number of blocks that there are is read on the card and the rest returns at once, so
a CUDA graph serves any routing. Up to a few tokens each pair is a block of its own and nothing is sorted. A product has the
same steps along K whatever the batch, so a row has the same bits in any batch, for W4A16 too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...formats.spec import QuantSpec
from .. import tuning
from ..device import Card
from ..tiles import (
    FUSION,
    INTERPRETED,
    Launch,
    add_slices_launch,
    registers,
    runner,
    tile_index,
    unpack_plane16,
    word_scale,
)
from . import contract
from .tiles import blocks_in_all, most_blocks, route_kernel, rows_of_tile, store_products, tokens_of_block

OP = contract.OP
OP_VERSION = 1  # raised when a kernel changes so that tuned entries of the one before mean nothing
ROW = 1 << 30  # the kernel's GROUP for one scale per row: every k // ROW is group 0


@triton.jit(do_not_specialize=["M", "E", "K"])
def matmul_experts_w4a16_kernel(
    x_ptr, w_ptr, word_ptr, route_ptr, weight_ptr, y_ptr,
    M, E, N, K, N_PAD, TOPK, MOST,
    stride_xm, stride_wn, stride_se,
    UP: tl.constexpr, DIRECT: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, USE_ASM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PACK_BLOCKS: tl.constexpr, RASTER: tl.constexpr,
):  # fmt: skip
    """The products of one block of tokens with BLOCK_N rows of their expert; 4-bit codes unpacked in registers.

    x bf16 | fp16, rows stride_xm apart, of tokens (UP) or of pairs; w int16 [E, N_PAD, stride_wn] in packing planes16_w4;
    words int32 [E, groups, N_PAD], scale and zero point in one, experts stride_se apart; route as route_kernel leaves it;
    weight fp32 [M]; y [M, N] in the type of x (UP, N outputs of 2 N rows), else fp32 [TOPK, M / TOPK, N] or the type of x.

        UP   gate rows n     [BLOCK_N / 2, 128]   @  x^T of the block's tokens     acc, upper half   -> silu(gate) * up
             up rows N + n   [BLOCK_N / 2, 128]      [128, BLOCK_M]                acc, lower half

    Source: matmul_w4a16; tokens sorted by expert as in vLLM's and SGLang's fused_moe, but on the narrow side.
    """
    tiles_n = tl.cdiv(N, BLOCK_N // 2 if UP else BLOCK_N)
    tile_n, block = tile_index(tl.program_id(0), tiles_n, tl.num_programs(0) // tiles_n, RASTER)
    if block >= blocks_in_all(route_ptr, M, MOST, DIRECT):
        return
    expert, pairs, mask_m = tokens_of_block(route_ptr, block, M, E, MOST, DIRECT, BLOCK_M)
    rows, first = rows_of_tile(tile_n, N, N_PAD, UP, BLOCK_N)
    offs_j = tl.arange(0, 32)
    mine = expert >= 0
    e = tl.maximum(expert, 0).to(tl.int64)
    x_rows = pairs // TOPK if UP else pairs
    w_ptrs = w_ptr + e * N_PAD * stride_wn + rows.to(tl.int64)[:, None] * stride_wn + offs_j[None, :]
    word_ptrs = word_ptr + e * stride_se + rows
    x_ptrs = x_ptr + x_rows.to(tl.int64)[None, :] * stride_xm + offs_j[:, None]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(tl.where(mine, tl.cdiv(K, 128 * PACK_BLOCKS), 0)):
        for b in tl.static_range(PACK_BLOCKS):
            w_packed = tl.load(w_ptrs + 32 * b, eviction_policy="evict_first")  # [BLOCK_N, 32]
            for p in tl.static_range(4):
                k = 128 * b + 32 * p
                inside = mask_m[None, :]
                if not EVEN_K:
                    inside = inside & (step * (128 * PACK_BLOCKS) + k + offs_j < K)[:, None]
                x = tl.load(x_ptrs + k, mask=inside, other=0.0, eviction_policy="evict_last")  # [32, BLOCK_M]
                if (32 * p) % GROUP == 0:
                    group = (step * (128 * PACK_BLOCKS) + k) // GROUP
                    word = tl.load(word_ptrs + group.to(tl.int64) * N_PAD)  # [BLOCK_N]
                    part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
                w = unpack_plane16(w_packed, word, p, x_ptr.dtype.element_ty, USE_ASM)  # [BLOCK_N, 32]
                part = tl.dot(w, x, part)  # [BLOCK_N, BLOCK_M]
                if p == 3 or (32 * p + 32) % GROUP == 0:
                    acc = tl.fma(part, word_scale(word)[:, None], acc)
        w_ptrs += 32 * PACK_BLOCKS
        x_ptrs += 128 * PACK_BLOCKS

    store_products(acc, weight_ptr, y_ptr, first, pairs, mask_m, expert, M, N, TOPK, UP, BLOCK_N, BLOCK_M)


@triton.jit(do_not_specialize=["M", "E", "K"])
def matmul_experts_w8a8_kernel(
    x_ptr, w_ptr, sx_ptr, sw_ptr, route_ptr, weight_ptr, y_ptr,
    M, E, N, K, N_PAD, TOPK, MOST,
    stride_xm, stride_wn, stride_se,
    UP: tl.constexpr, DIRECT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, DOTS: tl.constexpr, RASTER: tl.constexpr,
):  # fmt: skip
    """As matmul_experts_w4a16_kernel, in int8: w int8 [E, N_PAD, stride_wn] in packing rows8, sw fp32 [E, ..., N_PAD] with
    experts stride_se apart, x int8 with sx fp32, one per row of x. Sums are int32, exact; y in any float type."""
    tiles_n = tl.cdiv(N, BLOCK_N // 2 if UP else BLOCK_N)
    tile_n, block = tile_index(tl.program_id(0), tiles_n, tl.num_programs(0) // tiles_n, RASTER)
    if block >= blocks_in_all(route_ptr, M, MOST, DIRECT):
        return
    expert, pairs, mask_m = tokens_of_block(route_ptr, block, M, E, MOST, DIRECT, BLOCK_M)
    rows, first = rows_of_tile(tile_n, N, N_PAD, UP, BLOCK_N)
    PIECE: tl.constexpr = BLOCK_K // DOTS
    offs_k = tl.arange(0, PIECE)
    mine = expert >= 0
    e = tl.maximum(expert, 0).to(tl.int64)
    x_rows = pairs // TOPK if UP else pairs
    w_ptrs = w_ptr + e * N_PAD * stride_wn + rows.to(tl.int64)[:, None] * stride_wn + offs_k[None, :]
    x_ptrs = x_ptr + x_rows.to(tl.int64)[None, :] * stride_xm + offs_k[:, None]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for step in range(tl.where(mine, tl.cdiv(K, BLOCK_K), 0)):
        for d in tl.static_range(DOTS):
            w = tl.load(w_ptrs + PIECE * d, eviction_policy="evict_first")  # [BLOCK_N, PIECE]
            inside = mask_m[None, :]
            if not EVEN_K:
                inside = inside & (step * BLOCK_K + PIECE * d + offs_k < K)[:, None]
            x = tl.load(x_ptrs + PIECE * d, mask=inside, other=0, eviction_policy="evict_last")  # [PIECE, BLOCK_M]
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)  # [BLOCK_N, BLOCK_M]
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K

    sx = tl.load(sx_ptr + x_rows, mask=mask_m, other=0.0)  # [BLOCK_M]
    sw = tl.load(sw_ptr + e * stride_se + rows)  # [BLOCK_N]
    y = acc.to(tl.float32) * tl.where(mine, sx, 0.0)[None, :] * sw[:, None]
    store_products(y, weight_ptr, y_ptr, first, pairs, mask_m, expert, M, N, TOPK, UP, BLOCK_N, BLOCK_M)


class Shape(NamedTuple):
    """One problem as the heuristic sees it: m tokens of `topk` experts each out of `experts`, weights [n, k]; up or down.

    dtype is that of x, int8 for W8A8.
    """

    m: int
    n: int
    k: int
    group: int
    dtype: torch.dtype
    experts: int
    topk: int
    up: bool


@dataclass(frozen=True)
class Config:
    """Rows of W and tokens of a tile, steps along K in codes, dots per step (W8A8), raster, warps, stages.

    direct: each pair is a block of its own, nothing is sorted.
    """

    block_n: int
    block_m: int
    block_k: int
    dots: int
    direct: bool
    raster: int
    num_warps: int
    num_stages: int


def heuristic(shape: Shape, card: Card) -> Config:
    """Tiles as narrow as twice the tokens of an average expert, so that few experts need a second pass over their rows.

    mma.sync keeps x in registers too: on sm_80 and sm_89 small groups have narrower tiles, and 256 codes a step at most 16
    tokens, or registers spill.
    """
    pairs = shape.m * shape.topk
    direct = 4 * pairs <= shape.experts
    warp_mma, int8 = card.sm < 90, shape.dtype == torch.int8
    widest = {32: 16, 64: 32}.get(shape.group, 64) if warp_mma and not int8 else 64
    twice = triton.next_power_of_2(-(-2 * pairs // shape.experts))
    block_m = 16 if direct else min(max(twice, 16), widest)
    warps = 4 if block_m <= 32 else 8
    if int8:
        buffers = (card.shared_bytes - 4096) // ((128 + block_m) * 128)
        stages = max(2, min(5, buffers + 1 if warp_mma else buffers))
        return Config(128, block_m, 128, 1 if card.sm == 90 else 2, direct, 8, warps, stages)
    even = shape.group >= 64 and -(-shape.k // 128) % 2 == 0
    two = even and block_m <= (16 if warp_mma else 32) and card.sm < 100
    return Config(128, block_m, 256 if two else 128, 1, direct, 8, warps, 3)


@functools.lru_cache(maxsize=4096)
def invariant(shape: Shape, card: Card) -> Config:
    """One Config for every M: the kernels sum in one order anyway, and here by one MMA instruction too."""
    return heuristic(shape._replace(m=-(-12 * shape.experts // shape.topk)), card)


def candidates(shape: Shape, card: Card) -> list[Config]:
    """What a tuner tries beside the heuristic: wider and narrower blocks of tokens, other rows, steps and depths."""
    base = heuristic(shape, card)
    int8 = shape.dtype == torch.int8
    steps = (128,) if int8 or -(-shape.k // 128) % 2 or shape.group < 64 else (128, 256)
    changes: list[dict[str, int | bool]] = [
        {"block_k": s, "num_stages": d, "num_warps": w} for d in (3, 4, 2, 5) for s in steps for w in (4, 8)
    ]
    if not base.direct:
        changes += [{"block_m": m, "num_warps": 4 if m <= 32 else 8} for m in (16, 32, 64)]
    changes += [{"block_n": n, "num_warps": w} for n, w in ((64, 4), (256, 8))]
    changes += [{"direct": not base.direct, "block_m": 16}] if shape.m * shape.topk <= 4 * shape.experts else []

    def fits(c: Config) -> bool:
        bytes_of_step = (c.block_n + c.block_m) * c.block_k if int8 else (c.block_n // 2 + 2 * c.block_m) * c.block_k
        small = card.sm < 100 or int8 or (c.block_n * c.block_m <= 128 * 64 and c.block_k == 128)
        return small and bytes_of_step * c.num_stages <= card.shared_bytes

    return tuning.variants(base, changes, fits)


def shape_of(case: Any) -> Shape:
    """A case of cases.py as the heuristic sees it."""
    spec = QuantSpec.parse(case.spec)
    dtype = torch.int8 if spec.act_bits == 8 else case.dtype
    return Shape(case.m, case.n, case.k, spec.group or case.k, dtype, case.experts, case.topk, case.up)


config_for = tuning.finder(
    Path(__file__).with_name("tuned.json"), triton.__version__, OP_VERSION, Config, heuristic, Shape._fields
)


def plan(
    card: Card,
    x: torch.Tensor,
    sx: torch.Tensor | None,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
    config: Config | None = None,
) -> tuple[torch.Tensor, list[Launch]]:
    """The output, and the kernels that fill it: up to three."""
    (tokens, topk), pairs, experts, up = ids.shape, ids.numel(), w.shape[0], weights is None
    if config is None:
        config = (invariant if batch_invariant else config_for)(
            Shape(tokens, n, k, group, x.dtype, experts, topk, up), card
        )
    n_pad, k_pad = w.shape[1], w.shape[2] * (4 if sx is None else 1)
    if k_pad % config.block_k or (sx is None and config.block_k % 128):
        raise ValueError(f"{OP}: block_k is {config.block_k}, expected a divisor of the padded K = {k_pad}; 128 fits")
    y = contract.out_like(x, sx, w, scale, zero, ids, weights, n, k, group, packing, out_dtype)
    out = y if up or topk == 1 else x.new_empty((topk, tokens, n), dtype=torch.float32)

    launches, route = [], ids
    blocks = pairs if config.direct else most_blocks(pairs, experts, config.block_m)
    if not config.direct:
        route = ids.new_empty(pairs + 3 * blocks + 1)
        options = {
            "BLOCK_M": config.block_m,
            "BINS": triton.next_power_of_2(experts + 2),
            "CHUNK": min(max(triton.next_power_of_2(pairs), 128), 2048),
            "num_warps": 4,
        }
        launches.append(Launch(route_kernel, (experts + 1,), (ids, route, pairs, experts, blocks), options))

    outputs = n // 2 if up else n
    grid = (triton.cdiv(outputs, config.block_n // 2 if up else config.block_n) * blocks,)
    sizes = (pairs, experts, outputs, k, n_pad, topk, blocks, x.stride(0), w.stride(1), scale.stride(0))
    weight = scale if up else weights
    options = {
        "UP": up,
        "DIRECT": config.direct,
        "EVEN_K": k % config.block_k == 0,
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "RASTER": config.raster,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": FUSION,
        **registers(card),
    }
    step = (config.block_n, config.block_k)
    if sx is None:
        options |= {"GROUP": ROW if group == k else group, "USE_ASM": not INTERPRETED}
        options |= {"PACK_BLOCKS": config.block_k // 128}
        launches.append(
            Launch(matmul_experts_w4a16_kernel, grid, (x, w, scale, route, weight, out, *sizes), options, step)
        )
    else:
        options |= {"BLOCK_K": config.block_k, "DOTS": config.dots}
        launches.append(
            Launch(matmul_experts_w8a8_kernel, grid, (x, w, sx, scale, route, weight, out, *sizes), options, step)
        )
    if out is not y:
        launches.append(add_slices_launch(out, None, None, None, y))
    return y, launches


run = runner(plan)
