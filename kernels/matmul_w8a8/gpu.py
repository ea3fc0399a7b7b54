"""Triton body of matmul_w8a8: y^T = W @ x^T in int8, K-major operands, exact split-K for small problems."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

from .. import tuning
from ..device import Card
from ..tiles import FUSION, Launch, add_slices_launch, part_of_k, runner, store_int32, tile_of
from . import contract

OP_VERSION = 1  # raised when a kernel changes so that tuned entries of the one before mean nothing


@triton.jit(do_not_specialize=["M", "K", "steps_per_split"])
def matmul_w8a8_kernel(
    x_ptr, w_ptr, sx_ptr, sw_ptr, bias_ptr, y_ptr,
    M, N, K, N_PAD, steps_per_split,
    stride_xm, stride_wn, stride_ym,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PARTIAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, DOTS: tl.constexpr, RASTER: tl.constexpr,
):  # fmt: skip
    """y[m, n] = (sum_k x[m, k] * w[n, k]) * sx[m] * sw[n] + bias[n]

    x int8 [M, K], rows stride_xm apart; w int8 [N_PAD, stride_wn] in packing rows8; sx fp32 [M]; sw fp32 [N_PAD]; bias
    fp32 [N]; y [M, N], rows stride_ym apart. PARTIAL: y is int32 [splits, M, N], the sums of one part of K each.

                             x^T  [BLOCK_K, BLOCK_M]      one program: BLOCK_N rows of W, BLOCK_M tokens,
        W  [BLOCK_N, BLOCK_K]     acc                     steps_per_split steps of BLOCK_K codes, DOTS products each

    Source: the tiles after torchao's int8_mm.py and DeepGEMM; weights on the left as in the 4-bit kernels.
    """
    offs_n, offs_m = tile_of(M, N, BLOCK_N, BLOCK_M, RASTER)
    PIECE: tl.constexpr = BLOCK_K // DOTS
    offs_k = tl.arange(0, PIECE)
    mask_m = offs_m < M
    split, first, last = part_of_k(tl.cdiv(K, BLOCK_K), steps_per_split)
    # Rows of W past the padding wrap around: their sums are never stored, so no mask is spent on them.
    w_ptrs = w_ptr + (offs_n % N_PAD).to(tl.int64)[:, None] * stride_wn + (first * BLOCK_K + offs_k)[None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + (first * BLOCK_K + offs_k)[:, None]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for step in range(first, last):
        for d in tl.static_range(DOTS):
            w = tl.load(w_ptrs + PIECE * d, eviction_policy="evict_first")  # [BLOCK_N, PIECE]
            inside = mask_m[None, :]
            if not EVEN_K:
                inside = inside & (step * BLOCK_K + PIECE * d + offs_k < K)[:, None]
            x = tl.load(x_ptrs + PIECE * d, mask=inside, other=0, eviction_policy="evict_last")  # [PIECE, BLOCK_M]
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)  # [BLOCK_N, BLOCK_M]
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K

    store_int32(acc, split, offs_n, offs_m, M, N, sx_ptr, sw_ptr, bias_ptr, y_ptr, stride_ym, HAS_BIAS, PARTIAL)


@dataclass(frozen=True)
class Config:
    """Tile of y^T, step along K and products per step, parts of K, rows of W tiles that share x in L2, warps, stages."""

    block_n: int
    block_m: int
    block_k: int
    dots: int
    split_k: int
    raster: int
    num_warps: int
    num_stages: int


def heuristic(shape: tuning.Shape, card: Card) -> Config:
    """Narrow tiles and split K while the weight's bytes are all that counts, wide tiles when x is read many times.

    Two products per step but on sm_90: with one, Triton 3.9 carries the operands of mma.sync from step to step byte by
    byte and spends six instructions on every weight. 128 x 256 on sm_90 only: elsewhere mma.sync (on sm_100 that of
    Triton 3.6, which has no int8 tcgen05) would spill.
    """
    m, n, dots = shape.m, shape.n, 1 if card.sm == 90 else 2

    def config(block_n: int, block_m: int, split: int, warps: int, most_stages: int) -> Config:
        buffers = (card.shared_bytes - 4096) // ((block_n + block_m) * 128)
        stages = max(2, min(most_stages, buffers if card.sm >= 90 else buffers + 1))
        return Config(block_n, block_m, 128, dots, split, 8, warps, stages)

    if m <= 64:
        block_n = 128 if m <= 32 or n >= 128 * card.sms else 64
        split = tuning.split_k(-(-n // block_n), -(-shape.k // 128), shape, card)
        return config(block_n, max(m, 16), split, 4, 5)

    def fills_card(block_n: int, block_m: int) -> bool:
        return -(-n // block_n) * -(-m // block_m) >= card.sms

    if card.sm == 90 and m > 128 and fills_card(128, 256):
        return config(128, 256, 1, 8, 3)
    return config(128, 128, 1, 8, 4) if fills_card(128, 128) else config(64, 128, 1, 4, 4)


def candidates(shape: tuning.Shape, card: Card) -> list[Config]:
    """What a tuner tries beside the heuristic: other splits and depths while weight bytes are all, else other tiles."""
    base = heuristic(shape, card)
    steps = -(-shape.k // base.block_k)
    if shape.m <= 64:
        changes = [{"split_k": s, "num_stages": d} for s in (1, 2, 4, 8, 16) for d in (3, 4, 5, 6)]
        changes += [{"block_n": n, "num_warps": w} for n, w in ((64, 4), (128, 4), (128, 8), (256, 8))]
    else:
        tiles = ((128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4), (64, 256, 4), (64, 128, 4), (128, 64, 4))
        changes = [
            {"block_n": n, "block_m": m, "num_warps": w, "num_stages": d} for d in (3, 4, 2) for n, m, w in tiles
        ]
        changes += [{"raster": r} for r in (4, 16)]

    def fits(c: Config) -> bool:
        return (c.block_n + c.block_m) * c.block_k * c.num_stages <= card.shared_bytes and 4 * c.split_k <= max(
            4, steps
        )

    return tuning.variants(base, changes, fits)


config_for = tuning.finder(Path(__file__).with_name("tuned.json"), triton.__version__, OP_VERSION, Config, heuristic)


def plan(
    card: Card,
    xq: torch.Tensor,
    sx: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    packing: str,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> tuple[torch.Tensor, list[Launch]]:
    """The output, and the one or two kernels that fill it."""
    m = xq.shape[0]
    config = config or config_for(tuning.Shape(m, n, k, k, out_dtype), card)
    each, split = tuning.cut(triton.cdiv(k, config.block_k), config.split_k)
    n_pad, k_pad = w.shape
    if k_pad % config.block_k:
        raise ValueError(f"matmul_w8a8: block_k is {config.block_k}, expected a divisor of the padded K = {k_pad}")
    y = contract.out_like(xq, sx, w, scale, bias, n, k, packing, out_dtype)
    out = y if split == 1 else xq.new_empty((split, m, n), dtype=torch.int32)
    options = {
        "HAS_BIAS": bias is not None and split == 1,
        "EVEN_K": k % config.block_k == 0,
        "PARTIAL": split > 1,
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "DOTS": config.dots,
        "RASTER": config.raster,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": FUSION,
    }
    sizes = (m, n, k, n_pad, each, xq.stride(0), w.stride(0), out.stride(-2))
    args = (xq, w, sx, scale, sx if bias is None else bias, out, *sizes)
    grid = (triton.cdiv(n, config.block_n) * triton.cdiv(m, config.block_m), split)
    launches = [Launch(matmul_w8a8_kernel, grid, args, options, (config.block_n, config.block_k))]
    if split > 1:
        launches.append(add_slices_launch(out, sx, scale, bias, y))
    return y, launches


run = runner(plan)
