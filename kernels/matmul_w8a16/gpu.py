"""Triton body of matmul_w8a16: y^T = W @ x^T, int8 codes made bf16 or fp16 in registers on their way to the MMA.

Ways to apply the scale of a group, as in matmul_w4a16:
    A  w = q - z, exact; the sum of a group in its own accumulator; acc += scale * sum      any scale, M <= 64, all fp16
    C  w = (q - z) * scale, rounded to bf16; one accumulator                                M > 64 in bf16
and for many tokens of bf16 way D: chunks of the weight are made whole in the L2, and torch's matmul (cuBLAS) multiplies.
and D for many tokens of bf16: the weight made whole by chunks that stay in the L2, torch's matmul behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from .. import tuning, weight_only_plan
from ..device import Card
from ..tiles import Launch, Product, part_of_k, runner, tile_of, unpack_plane16_w8, word8_scale
from ..weight_only_plan import CHUNK_MB, Config, Kernels, invariant, why
from . import contract

__all__ = ["Config", "candidates", "config_for", "heuristic", "invariant", "plan", "run", "why"]

OP = contract.OP
OP_VERSION = 1  # raised when a kernel changes so that tuned entries of the one before mean nothing
CODES_PER_WORD = 2


@triton.jit(do_not_specialize=["M", "K", "steps_per_split"])
def matmul_w8a16_kernel(
    x_ptr, w_ptr, word_ptr, bias_ptr, y_ptr,
    M, N, K, N_PAD, steps_per_split,
    stride_xm, stride_wn, stride_ym,
    GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    SCALE_WEIGHT: tl.constexpr, USE_ASM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PACK_BLOCKS: tl.constexpr, RASTER: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_g scale[n, g] * sum_{k in g} (q[n, k] - z[n, g]) * x[m, k] + bias[n]

    x bf16 | fp16 [M, K], rows stride_xm apart; w int16 [N_PAD, stride_wn] in packing planes16_w8; word [groups, N_PAD]:
    fp32 scales, or int32 scale words if HAS_ZERO (formats/layout.py); bias fp32 [N]; y [M, N], rows stride_ym apart, in the
    type of x, or fp32 [splits, M, N] for the parts of a split K.

                                               x^T, 128 codes:  p=0 [J, BLOCK_M]      one program: BLOCK_N rows of W,
        W  [BLOCK_N, J] words  -> 2 planes     @                p=1 [J, BLOCK_M]      BLOCK_M tokens, steps_per_split
                                  [BLOCK_N, J]                                        steps of PACK_BLOCKS * 128 codes

    J = 64 words, of groups of 32 twice 32: then piece h and plane p are the codes 64 p + 32 h .. + 31, one group.

    Source: weights on the left so that they stay in registers, as tilelang and triton_kernels turn the product (SWAP_XW).
    """
    PIECE: tl.constexpr = GROUP if GROUP < 64 else 64
    offs_n, offs_m = tile_of(M, N, BLOCK_N, BLOCK_M, RASTER)
    offs_j = tl.arange(0, PIECE)
    rows = offs_n % N_PAD  # rows past the padding wrap around: they are never stored, so no mask is spent on them
    mask_n, mask_m = offs_n < N, offs_m < M
    split, first, last = part_of_k(tl.cdiv(K, 128 * PACK_BLOCKS), steps_per_split)
    w_ptrs = w_ptr + rows.to(tl.int64)[:, None] * stride_wn + (first * (64 * PACK_BLOCKS) + offs_j)[None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + (first * (128 * PACK_BLOCKS) + offs_j)[:, None]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(first, last):
        for piece in tl.static_range(PACK_BLOCKS * (64 // PIECE)):
            w_packed = tl.load(w_ptrs + PIECE * piece, eviction_policy="evict_first")  # [BLOCK_N, PIECE]
            for p in tl.static_range(2):
                k = 128 * ((PIECE * piece) // 64) + (PIECE * piece) % 64 + 64 * p
                inside = mask_m[None, :]
                if not EVEN_K:
                    inside = inside & (step * (128 * PACK_BLOCKS) + k + offs_j < K)[:, None]
                x = tl.load(x_ptrs + k, mask=inside, other=0.0, eviction_policy="evict_last")  # [PIECE, BLOCK_M]
                if p == 0 or GROUP <= 64:
                    group = (step * (128 * PACK_BLOCKS) + k) // GROUP
                    word = tl.load(word_ptr + group.to(tl.int64) * N_PAD + rows)  # [BLOCK_N]
                    part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
                w = unpack_plane16_w8(w_packed, word, p, x_ptr.dtype.element_ty, HAS_ZERO, USE_ASM)
                if SCALE_WEIGHT:
                    w *= word8_scale(word, HAS_ZERO).to(w.dtype)[:, None]
                    acc = tl.dot(w, x, acc)  # [BLOCK_N, BLOCK_M]
                else:
                    part = tl.dot(w, x, part)  # [BLOCK_N, BLOCK_M]
                    if p == 1 or GROUP <= 64:
                        acc = tl.fma(part, word8_scale(word, HAS_ZERO)[:, None], acc)
        w_ptrs += 64 * PACK_BLOCKS
        x_ptrs += 128 * PACK_BLOCKS

    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    y_ptrs = y_ptr + (split * M + offs_m).to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    y = tl.trans(acc).to(y_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_N]
    tl.store(y_ptrs, y, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["first"])
def dequantize_planes16_w8_kernel(
    w_ptr, word_ptr, y_ptr,
    first, N_PAD,
    stride_wn, stride_yn,
    GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, USE_ASM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[r, k] = (q[first + r, k] - z) * scale, rounded to the type of y (bf16 or fp16)

    w int16 [N_PAD, stride_wn] in packing planes16_w8, word as in matmul_w8a16_kernel; y, rows stride_yn apart. One program:
    BLOCK_N rows of one pack block of 128 codes.

        w  [BLOCK_N, J] words  ->  y  [BLOCK_N, J] of plane 0 | plane 1
    """
    PIECE: tl.constexpr = GROUP if GROUP < 64 else 64
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (first + r) % N_PAD
    block = tl.program_id(1)
    offs_j = tl.arange(0, PIECE)
    w_ptrs = w_ptr + rows.to(tl.int64)[:, None] * stride_wn + block * 64 + offs_j[None, :]
    y_ptrs = y_ptr + r.to(tl.int64)[:, None] * stride_yn + block * 128 + offs_j[None, :]
    for piece in tl.static_range(64 // PIECE):
        w_packed = tl.load(w_ptrs + PIECE * piece, eviction_policy="evict_first")  # [BLOCK_N, PIECE]
        for p in tl.static_range(2):
            k = 64 * p + PIECE * piece
            word = tl.load(word_ptr + ((block * 128 + k) // GROUP).to(tl.int64) * N_PAD + rows)  # [BLOCK_N]
            w = unpack_plane16_w8(w_packed, word, p, y_ptr.dtype.element_ty, HAS_ZERO, USE_ASM)
            y = w.to(tl.float32) * word8_scale(word, HAS_ZERO)[:, None]
            tl.store(y_ptrs + k, y.to(y_ptr.dtype.element_ty))  # [BLOCK_N, PIECE]


@triton.jit(do_not_specialize=["first"])
def dequantize_rows8_kernel(
    w_ptr, scale_ptr, y_ptr,
    first, N_PAD,
    stride_wn, stride_yn,
    GROUP: tl.constexpr, USE_ASM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[r, k] = q[first + r, k] * scale[first + r], rounded to the type of y: the copy of a w8a8 layer

    w int8 [N_PAD, stride_wn] in packing rows8, scale fp32 [1, N_PAD]; y, rows stride_yn apart. One program: BLOCK_N rows of 128
    codes. GROUP and USE_ASM are those of the kernel above; a row has one scale, and nothing is unpacked.

        w  [BLOCK_N, 128] bytes  ->  y  [BLOCK_N, 128]
    """
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (first + r) % N_PAD
    offs_k = tl.program_id(1) * 128 + tl.arange(0, 128)
    w = tl.load(w_ptr + rows.to(tl.int64)[:, None] * stride_wn + offs_k[None, :], eviction_policy="evict_first")
    y = w.to(tl.float32) * tl.load(scale_ptr + rows)[:, None]  # [BLOCK_N, 128]
    tl.store(y_ptr + r.to(tl.int64)[:, None] * stride_yn + offs_k[None, :], y.to(y_ptr.dtype.element_ty))


def heuristic(shape: tuning.Shape, card: Card) -> Config:
    """Way A, and K split until the card is full, up to 64 tokens; way C on square tiles above, way D from 1024 on (bf16)."""
    m, n = shape.m, shape.n
    if m > 64:
        scale_weight = shape.dtype == torch.bfloat16
        if scale_weight and m >= 1024:  # 1 / (1 + 230 / M) of bf16's rate on an H200, computed: 0.82 at 1024
            return Config(128, 64, 1, 1, True, 8, 8, 3, dequantize_mb=CHUNK_MB)
        square = scale_weight and card.sm == 90  # 128 x 128 spills on sm_89
        return Config(128, 128 if square else 64, 1, 1, scale_weight, 8, 8, 3)
    # Up to 64 tokens on a small layer two programs share the weight in L2, so that there are programs for every SM.
    block_m = 32 if m == 64 and n < 64 * card.sms else max(m, 16)
    tiles = -(-n // 128) * -(-m // block_m)
    split = tuning.split_k(tiles, -(-shape.k // 128), shape, card)
    few = block_m <= 32
    return Config(128, block_m, 1, split, False, 8, 4 if few else 8, 4 if few else 3)


def candidates(shape: tuning.Shape, card: Card) -> list[Config]:
    """What a tuner tries beside the heuristic."""
    return weight_only_plan.candidates(shape, card, heuristic, CODES_PER_WORD)


config_for = tuning.finder(Path(__file__).with_name("tuned.json"), triton.__version__, OP_VERSION, Config, heuristic)


def plan(card: Card, *flat: Any, config: Config | None = None) -> tuple[torch.Tensor, list[Launch | Product]]:
    """The output, and the kernels that fill it, for the arguments of the schema."""
    if flat[8] == "rows8":
        whole = Config(128, 64, 1, 1, True, 8, 8, 3, dequantize_mb=CHUNK_MB)
        rows8 = Kernels(OP, matmul_w8a16_kernel, dequantize_rows8_kernel, 1, {})
        return weight_only_plan.plan(rows8, config_for, card, flat, config or whole)
    flags = {"HAS_ZERO": flat[2].dtype == torch.int32}
    kernels = Kernels(OP, matmul_w8a16_kernel, dequantize_planes16_w8_kernel, CODES_PER_WORD, flags)
    return weight_only_plan.plan(kernels, config_for, card, flat, config)


run = runner(plan)
