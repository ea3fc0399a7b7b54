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
    Product,
    add_slices_launch,
    chunks,
    registers,
    start,
    tile_index,
    unpack_plane16,
    word_scale,
)
from . import contract

OP = contract.OP
OP_VERSION = 1  # raised when a kernel changes so that tuned entries of the one before mean nothing
CHUNK_MB = 32  # of a weight made whole: it stays in the L2 until the product has read it
INVARIANT_ROWS = 256  # rows of x that share the workspace of a split K when results must not depend on M
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


@dataclass(frozen=True)
class Config:
    """Tile of y^T, pack blocks of 128 codes per step, parts of K, way C (scale_weight), raster, warps, stages.

    dequantize_mb above 0 is way D with chunks of so many MB; nothing else counts then.
    """

    block_n: int
    block_m: int
    pack_blocks: int
    split_k: int
    scale_weight: bool
    raster: int
    num_warps: int
    num_stages: int
    dequantize_mb: int = 0


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


def invariant(shape: tuning.Shape, card: Card) -> Config:
    """The one Config of a weight when a row's result must not depend on the other rows: nothing in it looks at M.

    Way A, exact, on tiles that are wide enough for a prompt and narrow enough for one token; K split for one token.
    """
    split = min(4, tuning.split_k(-(-shape.n // 128), -(-shape.k // 128), shape._replace(m=1), card))
    return Config(128, 64, 1, split, False, 8, 8, 3)


def candidates(shape: tuning.Shape, card: Card) -> list[Config]:
    """What a tuner tries beside the heuristic: splits, depths and steps up to 64 tokens; tiles and way D above."""
    base, m = heuristic(shape, card), shape.m
    blocks = -(-shape.k // 128)
    rounds = shape.dtype == torch.bfloat16 and m > 64
    if m <= 64:
        changes = [{"split_k": s, "num_stages": d} for s in (1, 2, 4, 8) for d in (3, 4, 5)]
        changes += [{"pack_blocks": b, "num_stages": d} for b in (1, 2) for d in (2, 3, 4)]
        changes += [{"block_n": n, "num_warps": w} for n, w in ((64, 4), (128, 8), (256, 8))]
        changes += [{"block_m": b, "num_warps": 4 if b <= 32 else 8} for b in (16, 32, 64)]
    else:
        fused = {"dequantize_mb": 0, "scale_weight": rounds}
        tiles = ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 128, 4), (256, 64, 8), (256, 128, 8), (128, 256, 8))
        changes = [
            {**fused, "block_n": n, "block_m": b, "num_warps": w, "num_stages": d} for d in (3, 4) for n, b, w in tiles
        ]
        changes += [{**fused, "block_m": 64, "scale_weight": False}, {**fused, "raster": 4}]
        changes += [{"dequantize_mb": size} for size in (16, 32, 64)] if rounds else []

    def fits(c: Config) -> bool:
        if c.dequantize_mb:
            return True
        x_bytes, w_bytes = c.block_m * 256 * c.pack_blocks, c.block_n * 64 * c.pack_blocks
        largest = 128 * 64 if card.sm >= 100 else 256 * 128
        whole = blocks % c.pack_blocks == 0 and (c.pack_blocks == 1 or shape.group >= 64)
        split = 4 * c.split_k <= max(4, blocks // c.pack_blocks)
        held = (x_bytes + w_bytes) * c.num_stages <= card.shared_bytes
        return held and whole and split and c.block_n * c.block_m <= largest

    return tuning.variants(base, changes, fits)


@functools.cache
def _tuned() -> tuning.Table:
    return tuning.load(Path(__file__).with_name("tuned.json"), triton.__version__, OP_VERSION)


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
    batch_invariant: bool = False,
    config: Config | None = None,
) -> tuple[torch.Tensor, list[Launch | Product]]:
    """The output, and the kernels that fill it: one, or two for a split K, or two per chunk of way D.

    Memory beside the output: the parts of a split K, fp32 [split, M, N] (M <= 256 if batch_invariant), or one chunk of the
    weight, at most `dequantize_mb` MB.
    """
    m = x.shape[0]
    if config is None:
        config = (invariant if batch_invariant else config_for)(tuning.Shape(m, n, k, group, x.dtype), card)
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
    if config.dequantize_mb:
        return y, _by_chunks(x, w, scale, bias, y, config.dequantize_mb, ROW if group == k else group)
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
    rows = min(m, INVARIANT_ROWS) if batch_invariant and split > 1 else m
    space = x.new_empty(split * rows * n, dtype=torch.float32) if split > 1 else y
    launches: list[Launch | Product] = []
    for first in range(0, m, rows):
        x_part, y_part = x[first : first + rows], y[first : first + rows]
        count = x_part.shape[0]
        out = y_part if split == 1 else space[: split * count * n].view(split, count, n)
        sizes = (count, n, k, n_pad, each, x.stride(0), w.stride(0), out.stride(-2))
        grid = (triton.cdiv(n, config.block_n) * triton.cdiv(count, config.block_m), split)
        args = (x_part, w, scale, bias if has_bias else scale, out, *sizes)
        launches.append(Launch(matmul_w4a16_kernel, grid, args, options, (config.block_n, step)))
        if split > 1:
            launches.append(add_slices_launch(out, None, None, bias, y_part))
    return y, launches


def _by_chunks(
    x: torch.Tensor,
    w: torch.Tensor,
    word: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    megabytes: int,
    group: int,
) -> list[Launch | Product]:
    """Way D: chunk after chunk in the same memory, made whole by a kernel of ours and multiplied by torch."""
    n, (n_pad, words), k = y.shape[1], w.shape, x.shape[1]
    parts = chunks(n, 4 * words, megabytes)
    chunk = x.new_empty((-(-(parts[0][1] - parts[0][0]) // 64) * 64, 4 * words))
    launches: list[Launch | Product] = []
    for first, last in parts:
        grid = (triton.cdiv(last - first, 64), words // 32)
        args = (w, word, chunk, first, n_pad, w.stride(0), chunk.stride(0))
        options = {
            "GROUP": group,
            "USE_ASM": not INTERPRETED,
            "BLOCK_N": 64,
            "num_warps": 4,
            "enable_fp_fusion": FUSION,
        }
        launches.append(Launch(dequantize_planes16_kernel, grid, args, options))
        part = None if bias is None else bias[first:last]
        launches.append(Product(x, chunk[: last - first, :k], part, y[:, first:last]))
    return launches


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
    batch_invariant: bool = False,
) -> torch.Tensor:
    """The body: what op.py calls."""
    card = device.card_of(x.device)
    y, launches = plan(card, x, w, scale, zero, bias, n, k, group, packing, batch_invariant)
    start(launches, x.device)
    return y
