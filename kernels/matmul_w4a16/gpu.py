"""Triton body of matmul_w4a16: y^T = W @ x^T, the weight unpacked in registers on its way to the MMA, exact packings.

Two ways to apply the scale of a group, one kernel, since only two lines differ:
    A  w = u - z, exact; the sum of a group in its own accumulator; acc += scale * sum      any scale, M <= 64, all fp16
    C  w = (u - z) * scale, rounded to bf16; one accumulator                                M > 64 in bf16
A gives the weight exactly and costs registers and one multiply-add per accumulator and group; C costs one multiplication
per pair of weights. C is not used in fp16, where code * scale may overflow.

For many tokens of bf16 there is a third way, D: the weight is made whole by chunks of rows that stay in the L2, and torch's
matmul (cuBLAS) multiplies. The chunk is this op's second workspace; the first holds the parts of a split K.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from .. import tuning, weight_only_plan
from ..device import Card
from ..tiles import Launch, Product, runner, tile_index, unpack_plane16, word_scale
from ..weight_only_plan import CHUNK_MB, Config, Kernels, invariant, why
from . import contract

__all__ = ["Config", "candidates", "config_for", "heuristic", "invariant", "plan", "run", "why"]

OP = contract.OP
OP_VERSION = 1  # raised when a kernel changes so that tuned entries of the one before mean nothing
CODES_PER_WORD = 4


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


@triton.jit(do_not_specialize=["first"])
def dequantize_planes16_kernel(
    w_ptr, word_ptr, y_ptr,
    first, N_PAD,
    stride_wn, stride_yn,
    GROUP: tl.constexpr, USE_ASM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[r, k] = (u[first + r, k] - z) * scale, rounded to the type of y (bf16 or fp16)

    w int16 [N_PAD, stride_wn] in packing planes16_w4, words int32 [groups, N_PAD]; y, rows stride_yn apart. One program:
    BLOCK_N rows of one pack block of 128 codes.

        w  [BLOCK_N, 32] words  ->  y  [BLOCK_N, 32] of plane 0 | plane 1 | plane 2 | plane 3
    """
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (first + r) % N_PAD
    block = tl.program_id(1)
    offs_j = tl.arange(0, 32)
    packed = w_ptr + rows.to(tl.int64)[:, None] * stride_wn + block * 32 + offs_j[None, :]
    w_packed = tl.load(packed, eviction_policy="evict_first")  # [BLOCK_N, 32]
    y_ptrs = y_ptr + r.to(tl.int64)[:, None] * stride_yn + block * 128 + offs_j[None, :]
    for p in tl.static_range(4):
        group = (block * 128 + 32 * p) // GROUP
        word = tl.load(word_ptr + group.to(tl.int64) * N_PAD + rows)  # [BLOCK_N]
        w = unpack_plane16(w_packed, word, p, y_ptr.dtype.element_ty, USE_ASM)  # [BLOCK_N, 32]
        y = w.to(tl.float32) * word_scale(word)[:, None]
        tl.store(y_ptrs + 32 * p, y.to(y_ptr.dtype.element_ty))


def heuristic(shape: tuning.Shape, card: Card) -> Config:
    """Way A and as many weights in flight as fit up to 64 tokens, way C on square tiles above, way D from 1024 on (bf16).

    D moves 0.53 + 2 bytes a weight beside the product: 1 / (1 + 190 / M) of bf16's rate on an H200 (computed), 0.84 at 1024;
    C is expected at 0.75 to 0.85 whatever M, since unpacking does not overlap the MMA of its warps. `percard tune` measures.

    On sm_100 tiles stay within 128 x 64: larger ones compile to a bare trap in Triton 3.6, where the unpacked weight goes
    through tensor memory.
    """
    m, n = shape.m, shape.n
    blackwell = card.sm >= 100
    if m > 64:
        scale_weight = shape.dtype == torch.bfloat16
        if scale_weight and m >= 1024:
            return Config(128, 64, 1, 1, True, 8, 8, 3, dequantize_mb=CHUNK_MB)
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


def candidates(shape: tuning.Shape, card: Card) -> list[Config]:
    """What a tuner tries beside the heuristic."""
    return weight_only_plan.candidates(shape, card, heuristic, CODES_PER_WORD)


config_for = tuning.finder(Path(__file__).with_name("tuned.json"), triton.__version__, OP_VERSION, Config, heuristic)


def plan(card: Card, *flat: Any, config: Config | None = None) -> tuple[torch.Tensor, list[Launch | Product]]:
    """The output, and the kernels that fill it, for the arguments of the schema."""
    kernels = Kernels(OP, matmul_w4a16_kernel, dequantize_planes16_kernel, CODES_PER_WORD, {})
    return weight_only_plan.plan(kernels, config_for, card, flat, config)


run = runner(plan)
