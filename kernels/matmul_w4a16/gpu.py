"""Triton body of matmul_w4a16: y^T = W @ x^T, the weight unpacked in registers on its way to the MMA, exact packings.

Two ways to apply the scale of a group, one kernel, since only two lines differ:
    A  w = u - z, exact; the sum of a group in its own accumulator; acc += scale * sum      any scale, M <= 64, all fp16
    C  w = (u - z) * scale, rounded to bf16; one accumulator                                M > 64 in bf16
A gives the weight exactly and costs registers and one multiply-add per accumulator and group; C costs one multiplication
per pair of weights. C is not used in fp16, where code * scale may overflow.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

from .. import device, tuning
from ..device import Card
from ..tiles import (
    FUSION,
    INTERPRETED,
    Launch,
    add_slices_launch,
    registers,
    start,
    tile_index,
    unpack_plane16,
    word_scale,
)
from . import contract

OP = contract.OP
ROW = 1 << 30  # the kernel's GROUP for one scale per row: every k // ROW is group 0


@triton.jit(do_not_specialize=["M", "K", "steps_per_split"])
def matmul_w4a16_kernel(
    x_ptr, w_ptr, word_ptr, bias_ptr, y_ptr,
    M, N, K, N_PAD, steps_per_split,
    stride_xm, stride_wn, stride_ym,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, SCALE_WEIGHT: tl.constexpr, USE_ASM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PACK_BLOCKS: tl.constexpr, RASTER: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_g scale[n, g] * sum_{k in g} (u[n, k] - z[n, g]) * x[m, k] + bias[n]

    x bf16 | fp16 [M, K], rows stride_xm apart; w int16 [N_PAD, stride_wn] in packing planes16_w4; words int32
    [groups, N_PAD], scale and zero point in one (formats/layout.py); bias fp32 [N]; y [M, N], rows stride_ym apart, in the
    type of x, or fp32 [splits, M, N] for the parts of a split K.

                                             x^T, 128 codes:  p=0 [32, BLOCK_M]     one program: BLOCK_N rows of W,
                                                              p=1 [32, BLOCK_M]     BLOCK_M tokens, steps_per_split
        W  [BLOCK_N, 32] words  -> 4 planes  @                p=2 [32, BLOCK_M]     steps of PACK_BLOCKS * 128 codes
                                   [BLOCK_N, 32]              p=3 [32, BLOCK_M]

    Source: weights on the left so that they stay in registers, as tilelang and triton_kernels turn the product (SWAP_XW);
    the unpacking after IST-DASLab/marlin. The scale travels with the zero point, which feeds the dot: loads that feed no
    dot are not pipelined.
    """
    tile_n, tile_m = tile_index(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), RASTER)
    split = tl.program_id(1)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_j = tl.arange(0, 32)
    rows = offs_n % N_PAD  # rows past the padding wrap around: they are never stored, so no mask is spent on them
    mask_n, mask_m = offs_n < N, offs_m < M
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(K, 128 * PACK_BLOCKS))
    w_ptrs = w_ptr + rows.to(tl.int64)[:, None] * stride_wn + (first * (32 * PACK_BLOCKS) + offs_j)[None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + (first * (128 * PACK_BLOCKS) + offs_j)[:, None]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(first, last):
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
                    word = tl.load(word_ptr + group.to(tl.int64) * N_PAD + rows)  # [BLOCK_N]
                    part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
                w = unpack_plane16(w_packed, word, p, x_ptr.dtype.element_ty, USE_ASM)  # [BLOCK_N, 32]
                if SCALE_WEIGHT:
                    w *= word_scale(word).to(w.dtype)[:, None]
                    acc = tl.dot(w, x, acc)  # [BLOCK_N, BLOCK_M]
                else:
                    part = tl.dot(w, x, part)  # [BLOCK_N, BLOCK_M]
                    if p == 3 or (32 * p + 32) % GROUP == 0:
                        acc = tl.fma(part, word_scale(word)[:, None], acc)
        w_ptrs += 32 * PACK_BLOCKS
        x_ptrs += 128 * PACK_BLOCKS

    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    y_ptrs = y_ptr + (split * M + offs_m).to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    y = tl.trans(acc).to(y_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_N]
    tl.store(y_ptrs, y, mask=mask_m[:, None] & mask_n[None, :])


@dataclass(frozen=True)
class Config:
    """Tile of y^T, pack blocks of 128 codes per step, parts of K, way C (scale_weight), raster, warps, stages."""

    block_n: int
    block_m: int
    pack_blocks: int
    split_k: int
    scale_weight: bool
    raster: int
    num_warps: int
    num_stages: int


def heuristic(shape: tuning.Shape, card: Card) -> Config:
    """Way A and as many weights in flight as fit up to 64 tokens, way C on square tiles above (bf16).

    On sm_100 tiles stay within 128 x 64: larger ones compile to a bare trap in Triton 3.6, where the unpacked weight goes
    through tensor memory.
    """
    m, n = shape.m, shape.n
    blackwell = card.sm >= 100
    if m > 64:
        scale_weight = shape.dtype == torch.bfloat16
        square = scale_weight and not blackwell
        return Config(128, 128 if square else 64, 1, 1, scale_weight, 8, 8, 3)
    # Up to 64 tokens on a small layer two programs share the weight in L2, so that there are programs for every SM.
    block_m = 32 if m == 64 and n < 64 * card.sms else max(m, 16)
    # On a large one x costs twice the weight's bytes in L2 traffic at 128 rows.
    block_n = 256 if block_m == 64 and not blackwell and shape.group >= 128 and n >= 128 * card.sms else 128
    # 256 codes a step: 2.6 instructions per weight at M <= 16 instead of 2.8.
    even = -(-shape.k // 128) % 2 == 0
    blocks = 2 if block_m <= 32 and even and shape.group >= 64 and not blackwell else 1
    tiles = -(-n // block_n) * -(-m // block_m)
    split = tuning.split_k(tiles, -(-shape.k // (128 * blocks)), shape, card)
    return Config(block_n, block_m, blocks, split, False, 8, 4 if block_m <= 32 else 8, 3)


@functools.cache
def _tuned() -> tuning.Table:
    return tuning.load(Path(__file__).with_name("tuned.json"), triton.__version__)


@functools.lru_cache(maxsize=4096)
def config_for(shape: tuning.Shape, card: Card) -> Config:
    """Tuned for this card and Triton, or the heuristic's."""
    return tuning.choose(_tuned(), shape, card, Config, heuristic)


def plan(
    card: Card,
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    config: Config | None = None,
) -> tuple[torch.Tensor, list[Launch]]:
    """The output, and the one or two kernels that fill it."""
    m = x.shape[0]
    config = config or config_for(tuning.Shape(m, n, k, group, x.dtype), card)
    step = 128 * config.pack_blocks
    each, split = tuning.cut(triton.cdiv(k, step), config.split_k)
    n_pad, k_pad = w.shape[0], 4 * w.shape[1]
    if k_pad % step:
        raise ValueError(
            f"{OP}: a step is {step} codes, expected a divisor of the padded K = {k_pad}; pack_blocks=1 fits"
        )
    if group != k and group not in (32, 64) and group % 128:
        raise ValueError(
            f"{OP}: group is {group}, expected 32, 64, a multiple of 128, or K = {k}: planes hold 32 codes"
        )
    y = contract.out_like(x, w, scale, zero, bias, n, k, group, packing)
    out = y if split == 1 else x.new_empty((split, m, n), dtype=torch.float32)
    has_bias = bias is not None and split == 1
    options = {
        "GROUP": ROW if group == k else group,
        "HAS_BIAS": has_bias,
        "EVEN_K": k % step == 0,
        "SCALE_WEIGHT": config.scale_weight,
        "USE_ASM": not INTERPRETED,
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "PACK_BLOCKS": config.pack_blocks,
        "RASTER": config.raster,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": FUSION,
        **registers(card),
    }
    sizes = (m, n, k, n_pad, each, x.stride(0), w.stride(0), out.stride(-2))
    grid = (triton.cdiv(n, config.block_n) * triton.cdiv(m, config.block_m), split)
    args = (x, w, scale, bias if has_bias else scale, out, *sizes)
    launches = [Launch(matmul_w4a16_kernel, grid, args, options, (config.block_n, step))]
    if split > 1:
        launches.append(add_slices_launch(out, None, None, bias, y))
    return y, launches


def run(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
) -> torch.Tensor:
    """The body: what op.py calls."""
    y, launches = plan(device.card_of(x.device), x, w, scale, zero, bias, n, k, group, packing)
    start(launches, x.device)
    return y
