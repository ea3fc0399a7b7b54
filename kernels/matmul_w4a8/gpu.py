"""Triton body of matmul_w4a8: y^T = W @ x^T in int8; 4-bit codes become int8 in registers on their way to the MMA.

Three kernels: one scale per row (int32 sums over all of K, exact); group scales (int32 within a group, then one fp32
multiply-add per accumulator and group; as fast below M = 64, slower above); and two-level group scales, whose integer part
multiplies the codes, so that sums are int32 over all of K again (formats/layout.py says which weights have them).

The zero point is gone before the product: the unpacking turns the stored u = q + 8 into 16 q, or into q times the integer of
its group, so no kernel needs the row sums `xsum`. 16 q costs the same three instructions for eight weights as leaving u
unsigned.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

from ...formats.layout import row_scale
from ...formats.spec import QuantSpec
from .. import tuning
from ..device import Card
from ..tiles import (
    FUSION,
    INTERPRETED,
    Launch,
    add_slices_launch,
    part_of_k,
    registers,
    runner,
    store_int32,
    tile_of,
    unpack_plane8,
    unpack_plane8_times,
    unpack_plane8_with,
)
from . import contract
from .cases import TWO_LEVEL, Case

OP = contract.OP
INVARIANT_ROWS = 256  # rows of x that share the workspace of a split K when results must not depend on M
OP_VERSION = 1  # raised when a kernel changes so that tuned entries of the one before mean nothing


@triton.jit(do_not_specialize=["M", "K", "steps_per_split"])
def matmul_w4a8_rows_kernel(
    x_ptr, w_ptr, sx_ptr, sw_ptr, bias_ptr, y_ptr,
    M, N, K, N_PAD, steps_per_split,
    stride_xm, stride_wn, stride_ym,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PARTIAL: tl.constexpr, USE_ASM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, RASTER: tl.constexpr,
):  # fmt: skip
    """y[m, n] = (sum_k x[m, k] * q[n, k]) * sx[m] * sw[n] + bias[n]

    x int8 [M, K], rows stride_xm apart; w int8 [N_PAD, stride_wn] in packing planes8_w4; sx fp32 [M]; sw fp32 [N_PAD]; bias
    fp32 [N]; y [M, N], rows stride_ym apart. PARTIAL: y is int32 [splits, M, N], the sums of one part of K each.

                                               x^T, 128 codes:  p=0 [64, BLOCK_M]    one program: BLOCK_N rows of W,
        W  [BLOCK_N, 64] bytes  -> 2 planes  @                  p=1 [64, BLOCK_M]    BLOCK_M tokens, steps_per_split
                                   [BLOCK_N, 64] of 16 q                             steps of 128 codes

    Source: 4-bit codes times int8 after QServe (mit-han-lab/omniserve) and QQQ (HandH1998/QQQ); 16 q is ours.
    """
    offs_n, offs_m = tile_of(M, N, BLOCK_N, BLOCK_M, RASTER)
    offs_j = tl.arange(0, 64)
    mask_m = offs_m < M
    split, first, last = part_of_k(tl.cdiv(K, 128), steps_per_split)
    # Rows of W past the padding wrap around: their sums are never stored, so no mask is spent on them.
    w_ptrs = w_ptr + (offs_n % N_PAD).to(tl.int64)[:, None] * stride_wn + (first * 64 + offs_j)[None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + (first * 128 + offs_j)[:, None]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for step in range(first, last):
        w_packed = tl.load(w_ptrs, eviction_policy="evict_first")  # [BLOCK_N, 64]
        for p in tl.static_range(2):
            inside = mask_m[None, :]
            if not EVEN_K:
                inside = inside & (step * 128 + 64 * p + offs_j < K)[:, None]
            x = tl.load(x_ptrs + 64 * p, mask=inside, other=0, eviction_policy="evict_last")  # [64, BLOCK_M]
            w = unpack_plane8(w_packed, p, USE_ASM)  # [BLOCK_N, 64]
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)  # [BLOCK_N, BLOCK_M]
        w_ptrs += 64
        x_ptrs += 128

    acc = acc >> 4  # 16 q -> q, exact
    store_int32(acc, split, offs_n, offs_m, M, N, sx_ptr, sw_ptr, bias_ptr, y_ptr, stride_ym, HAS_BIAS, PARTIAL)


@triton.jit(do_not_specialize=["M", "K", "steps_per_split"])
def matmul_w4a8_groups_kernel(
    x_ptr, w_ptr, sx_ptr, sw_ptr, bias_ptr, y_ptr,
    M, N, K, N_PAD, steps_per_split,
    stride_xm, stride_wn, stride_ym,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PARTIAL: tl.constexpr, USE_ASM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, RASTER: tl.constexpr,
):  # fmt: skip
    """y[m, n] = (sum_g sw[n, g] * sum_{k in g} x[m, k] * q[n, k]) * sx[m] + bias[n]

    As matmul_w4a8_rows_kernel, with sw fp32 [groups, N_PAD], GROUP = 32, 64 or 128 codes each, fp32 sums over the groups in
    ascending order. PARTIAL: y is fp32 [splits, M, N].

        W  [BLOCK_N, J] bytes, J = min(GROUP, 64), 64 / J times a step:     a piece h and a plane p are the codes
                                                                            64 p + J h .. 64 p + J h + J - 1
    """
    PIECE: tl.constexpr = GROUP if GROUP < 64 else 64
    offs_n, offs_m = tile_of(M, N, BLOCK_N, BLOCK_M, RASTER)
    offs_j = tl.arange(0, PIECE)
    rows = offs_n % N_PAD
    mask_n, mask_m = offs_n < N, offs_m < M
    split, first, last = part_of_k(tl.cdiv(K, 128), steps_per_split)
    w_ptrs = w_ptr + rows.to(tl.int64)[:, None] * stride_wn + (first * 64 + offs_j)[None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + (first * 128 + offs_j)[:, None]
    sw_ptrs = sw_ptr + first.to(tl.int64) * (128 // GROUP) * N_PAD + rows

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(first, last):
        for p in tl.static_range(2):
            for h in tl.static_range(64 // PIECE):
                k = 64 * p + PIECE * h
                w_packed = tl.load(w_ptrs + PIECE * h, eviction_policy="evict_first")  # [BLOCK_N, PIECE]
                inside = mask_m[None, :]
                if not EVEN_K:
                    inside = inside & (step * 128 + k + offs_j < K)[:, None]
                x = tl.load(x_ptrs + k, mask=inside, other=0, eviction_policy="evict_last")  # [PIECE, BLOCK_M]
                if (64 * p + PIECE * h) % GROUP == 0:
                    sw = tl.load(sw_ptrs + ((64 * p + PIECE * h) // GROUP) * N_PAD)  # [BLOCK_N]
                    part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
                w = unpack_plane8_with(w_packed, sw, p, USE_ASM)  # [BLOCK_N, PIECE]
                part = tl.dot(w, x, part, out_dtype=tl.int32)  # [BLOCK_N, BLOCK_M]
                if (64 * p + PIECE * h + PIECE) % GROUP == 0:
                    acc = tl.fma(part.to(tl.float32), (sw * 0.0625)[:, None], acc)  # 1/16 for 16 q
        w_ptrs += 64
        x_ptrs += 128
        sw_ptrs += (128 // GROUP) * N_PAD

    y_ptrs = y_ptr + (split * M + offs_m).to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    if not PARTIAL:
        acc *= tl.load(sx_ptr + offs_m, mask=mask_m, other=0.0)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    y = tl.trans(acc).to(y_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_N]
    tl.store(y_ptrs, y, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M", "K", "steps_per_split"])
def matmul_w4a8_two_level_kernel(
    x_ptr, w_ptr, sx_ptr, times_ptr, sw_ptr, bias_ptr, y_ptr,
    M, N, K, N_PAD, steps_per_split,
    stride_xm, stride_wn, stride_ym,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PARTIAL: tl.constexpr, USE_ASM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, RASTER: tl.constexpr,
):  # fmt: skip
    """y[m, n] = (sum_k x[m, k] * (q[n, k] * times[n, k // GROUP])) * sx[m] * sw[n] + bias[n]

    As matmul_w4a8_groups_kernel, with times fp32 [groups, N_PAD], integers of 1..16 (0 in padding), and sw fp32 [N_PAD]: codes
    become int8 q * times in registers, sums are int32 over all of K. PARTIAL: y is int32 [splits, M, N].

        W  [BLOCK_N, J] bytes, pieces and planes as there  ->  [BLOCK_N, J] of q * times  @  x^T [J, BLOCK_M]

    Source: progressive group quantisation after QServe (arXiv 2405.04532).
    """
    PIECE: tl.constexpr = GROUP if GROUP < 64 else 64
    offs_n, offs_m = tile_of(M, N, BLOCK_N, BLOCK_M, RASTER)
    offs_j = tl.arange(0, PIECE)
    rows = offs_n % N_PAD
    mask_m = offs_m < M
    split, first, last = part_of_k(tl.cdiv(K, 128), steps_per_split)
    w_ptrs = w_ptr + rows.to(tl.int64)[:, None] * stride_wn + (first * 64 + offs_j)[None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + (first * 128 + offs_j)[:, None]
    times_ptrs = times_ptr + first.to(tl.int64) * (128 // GROUP) * N_PAD + rows

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for step in range(first, last):
        for p in tl.static_range(2):
            for h in tl.static_range(64 // PIECE):
                k = 64 * p + PIECE * h
                w_packed = tl.load(w_ptrs + PIECE * h, eviction_policy="evict_first")  # [BLOCK_N, PIECE]
                inside = mask_m[None, :]
                if not EVEN_K:
                    inside = inside & (step * 128 + k + offs_j < K)[:, None]
                x = tl.load(x_ptrs + k, mask=inside, other=0, eviction_policy="evict_last")  # [PIECE, BLOCK_M]
                if (64 * p + PIECE * h) % GROUP == 0:
                    times = tl.load(times_ptrs + ((64 * p + PIECE * h) // GROUP) * N_PAD)  # [BLOCK_N]
                w = unpack_plane8_times(w_packed, times.to(tl.int32), p, USE_ASM)  # [BLOCK_N, PIECE]
                acc = tl.dot(w, x, acc, out_dtype=tl.int32)  # [BLOCK_N, BLOCK_M]
        w_ptrs += 64
        x_ptrs += 128
        times_ptrs += (128 // GROUP) * N_PAD

    store_int32(acc, split, offs_n, offs_m, M, N, sx_ptr, sw_ptr, bias_ptr, y_ptr, stride_ym, HAS_BIAS, PARTIAL)


@dataclass(frozen=True)
class Config:
    """Tile of y^T, parts of K, rows of W tiles that share x in L2, warps, stages of the pipeline."""

    block_n: int
    block_m: int
    split_k: int
    raster: int
    num_warps: int
    num_stages: int


def shape_of(case: Case) -> tuning.Shape:
    """The problem of a case as the heuristic sees it: a group below 0 is one of two-level scales."""
    group = QuantSpec.parse(case.spec).group or case.k
    return tuning.Shape(case.m, case.n, case.k, -group if case.name.endswith(TWO_LEVEL) else group, case.dtype)


def group_of(scale: torch.Tensor, k: int, group: int) -> int:
    """The group of a packed weight as a Shape has it: below 0 for two-level scales."""
    return group if row_scale(scale, k, group) is None else -group


def heuristic(shape: tuning.Shape, card: Card) -> Config:
    """Narrow tiles and split K while the weight's bytes are all that counts, square tiles above 64 tokens.

    On sm_100 tiles stay within 128 x 64: larger ones compile to a bare trap in Triton 3.6, where the unpacked weight goes
    through tensor memory.
    """
    m, n = shape.m, shape.n
    per_row = shape.group == shape.k or shape.group < 0
    # Every group adds its int32 sums to fp32 sums, and rows of x that do not lie on 16 bytes go through registers: narrower
    # tiles then, or registers spill.
    widest = 128 if per_row and card.sm < 100 and shape.k % 16 == 0 else 64 if per_row or shape.group >= 64 else 32
    if m > 64:
        return Config(128, widest, 1, 8, 4 if widest == 32 else 8, 3)
    # Up to 64 tokens on a small layer two programs share the weight in L2, so that there are programs for every SM.
    block_m = min(32 if m == 64 and n < 64 * card.sms else max(m, 16), widest)
    tiles = -(-n // 128) * -(-m // block_m)
    split = tuning.split_k(tiles, -(-shape.k // 128), shape, card)
    return Config(128, block_m, split, 8, 4 if block_m <= 32 else 8, 4)


def candidates(shape: tuning.Shape, card: Card) -> list[Config]:
    """What a tuner tries beside the heuristic: other splits and depths while weight bytes are all, else other tiles."""
    base = heuristic(shape, card)
    steps = -(-shape.k // 128)
    if shape.m <= 64:
        changes = [{"split_k": s, "num_stages": d} for s in (1, 2, 4, 8, 16) for d in (3, 4, 5)]
        changes += [{"block_n": n, "num_warps": w} for n, w in ((64, 4), (128, 8), (256, 8))]
        changes += [{"block_m": m, "num_warps": 4 if m <= 32 else 8} for m in (16, 32, 64)]
    else:
        tiles = ((128, 128, 8), (128, 64, 4), (128, 64, 8), (64, 128, 4), (256, 64, 8), (128, 32, 4), (256, 128, 8))
        changes = [
            {"block_n": n, "block_m": m, "num_warps": w, "num_stages": d} for d in (3, 4, 2) for n, m, w in tiles
        ]
        changes += [{"raster": r} for r in (4, 16)]

    def fits(c: Config) -> bool:
        largest = 128 * 64 if card.sm >= 100 else 256 * 128
        held = (c.block_n * 64 + c.block_m * 128) * c.num_stages
        return held <= card.shared_bytes and c.block_n * c.block_m <= largest and 4 * c.split_k <= max(4, steps)

    return tuning.variants(base, changes, fits)


def invariant_split(shape: tuning.Shape, card: Card) -> int:
    """Parts of K when the result of a row must not depend on M: the one thing that changes the order of fp32 sums.

    Sums within a group are int32 and exact whatever the tile; with one scale per row all sums are.
    """
    return min(4, tuning.split_k(-(-shape.n // 128), -(-shape.k // 128), shape._replace(m=1), card))


config_for = tuning.finder(Path(__file__).with_name("tuned.json"), triton.__version__, OP_VERSION, Config, heuristic)


def plan(
    card: Card,
    xq: torch.Tensor,
    sx: torch.Tensor,
    xsum: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
    config: Config | None = None,
) -> tuple[torch.Tensor, list[Launch]]:
    """The output, and the kernels that fill it: one, or two for a split K.

    Memory beside the output: the parts of a split K, int32 or (group scales) fp32 [split, M, N], M <= 256 if batch_invariant.
    """
    m, row = xq.shape[0], row_scale(scale, k, group)
    exact = group == k or row is not None
    config = config or config_for(tuning.Shape(m, n, k, group if row is None else -group, out_dtype), card)
    fixed = batch_invariant and not exact
    split_k = invariant_split(tuning.Shape(1, n, k, group, out_dtype), card) if fixed else config.split_k
    each, split = tuning.cut(triton.cdiv(k, 128), split_k)
    if group != k and group not in (32, 64, 128):
        raise ValueError(f"{OP}: group is {group}, expected 32, 64, 128 or K = {k}")
    y = contract.out_like(xq, sx, xsum, w, scale, bias, n, k, group, packing, out_dtype)
    partial = torch.int32 if exact else torch.float32
    rows = min(m, INVARIANT_ROWS) if fixed and split > 1 else m
    space = xq.new_empty(split * rows * n, dtype=partial) if split > 1 else y
    options = {
        "HAS_BIAS": bias is not None and split == 1,
        "EVEN_K": k % 128 == 0,
        "PARTIAL": split > 1,
        "USE_ASM": not INTERPRETED,
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "RASTER": config.raster,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": FUSION,
        **registers(card),
    }
    kernel = matmul_w4a8_rows_kernel if group == k else matmul_w4a8_groups_kernel
    kernel = kernel if row is None else matmul_w4a8_two_level_kernel
    options = options if group == k else {"GROUP": group, **options}
    scales = (scale,) if row is None else (scale, row)
    launches = []
    for first in range(0, m, rows):
        x, sx_part, y_part = (t[first : first + rows] for t in (xq, sx, y))
        count = x.shape[0]
        out = y_part if split == 1 else space[: split * count * n].view(split, count, n)
        sizes = (count, n, k, w.shape[0], each, xq.stride(0), w.stride(0), out.stride(-2))
        args = (x, w, sx_part, *scales, sx if bias is None else bias, out, *sizes)
        grid = (triton.cdiv(n, config.block_n) * triton.cdiv(count, config.block_m), split)
        launches.append(Launch(kernel, grid, args, options, (config.block_n, 128)))
        if split > 1:
            launches.append(add_slices_launch(out, sx_part, scales[-1] if exact else None, bias, y_part))
    return y, launches


run = runner(plan)
