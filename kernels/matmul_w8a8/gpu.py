"""Triton body of matmul_w8a8: y^T = W @ x^T in int8, K-major operands, exact split-K for small problems."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

from .. import device, tuning
from ..device import Card
from ..tiles import FUSION, Launch, add_slices_launch, start, tile_index
from . import contract


@triton.jit(do_not_specialize=["M", "K", "steps_per_split"])
def matmul_w8a8_kernel(
    x_ptr, w_ptr, sx_ptr, sw_ptr, bias_ptr, y_ptr,
    M, N, K, N_PAD, steps_per_split,
    stride_xm, stride_wn, stride_ym,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PARTIAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, RASTER: tl.constexpr,
):  # fmt: skip
    """y[m, n] = (sum_k x[m, k] * w[n, k]) * sx[m] * sw[n] + bias[n]

    x int8 [M, K], rows stride_xm apart; w int8 [N_PAD, stride_wn] in packing rows8; sx fp32 [M]; sw fp32 [N_PAD]; bias
    fp32 [N]; y [M, N], rows stride_ym apart. PARTIAL: y is int32 [splits, M, N], the sums of one part of K each.

              x^T   [BLOCK_K, BLOCK_M]          one program: BLOCK_N rows of W, BLOCK_M tokens,
        W  [BLOCK_N, BLOCK_K]  acc              steps_per_split steps of BLOCK_K along K
    """
    tile_n, tile_m = tile_index(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), RASTER)
    split = tl.program_id(1)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n, mask_m = offs_n < N, offs_m < M
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(K, BLOCK_K))
    # Rows of W past the padding wrap around: their sums are never stored, so no mask is spent on them.
    w_ptrs = w_ptr + (offs_n % N_PAD).to(tl.int64)[:, None] * stride_wn + (first * BLOCK_K + offs_k)[None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + (first * BLOCK_K + offs_k)[:, None]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for step in range(first, last):
        w = tl.load(w_ptrs, eviction_policy="evict_first")  # [BLOCK_N, BLOCK_K]
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m[None, :], other=0, eviction_policy="evict_last")  # [BLOCK_K, BLOCK_M]
        else:
            inside = mask_m[None, :] & (step * BLOCK_K + offs_k < K)[:, None]
            x = tl.load(x_ptrs, mask=inside, other=0, eviction_policy="evict_last")  # [BLOCK_K, BLOCK_M]
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)  # [BLOCK_N, BLOCK_M]
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K

    y_ptrs = y_ptr + (split * M + offs_m).to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    if PARTIAL:
        tl.store(y_ptrs, tl.trans(acc), mask=mask_y)  # [BLOCK_M, BLOCK_N]
    else:
        sx = tl.load(sx_ptr + offs_m, mask=mask_m, other=0.0)  # [BLOCK_M]
        sw = tl.load(sw_ptr + offs_n, mask=mask_n, other=0.0)  # [BLOCK_N]
        y = acc.to(tl.float32) * sx[None, :] * sw[:, None]
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
        tl.store(y_ptrs, tl.trans(y).to(y_ptr.dtype.element_ty), mask=mask_y)  # [BLOCK_M, BLOCK_N]


@dataclass(frozen=True)
class Config:
    """Tile of y^T, step along K, parts of K, rows of W tiles that share x in L2, warps, stages of the pipeline."""

    block_n: int
    block_m: int
    block_k: int
    split_k: int
    raster: int
    num_warps: int
    num_stages: int


def heuristic(shape: tuning.Shape, card: Card) -> Config:
    """Narrow tiles and split K while the weight's bytes are all that counts, wide tiles when x is read many times."""
    m, n = shape.m, shape.n
    shared = card.shared_bytes

    def stages(block_n: int, block_m: int, block_k: int, most: int) -> int:
        return max(2, min(most, (shared - 4096) // ((block_n + block_m) * block_k)))

    if m <= 64:
        block_m = max(m, 16)
        block_n = 128 if m <= 32 or n >= 128 * card.sms else 64
        tiles, steps = -(-n // block_n), -(-shape.k // 128)
        split = tuning.split_k(tiles, steps, shape, card)
        return Config(block_n, block_m, 128, split, 8, 4, stages(block_n, block_m, 128, 5))

    def tiles(block_n: int, block_m: int) -> int:
        return -(-n // block_n) * -(-m // block_m)

    wide = 256 if card.sm >= 90 else 128  # mma.sync keeps both operands in registers: 128 x 256 would spill
    if m > 128 and tiles(128, wide) >= card.sms:
        return Config(128, wide, 128, 1, 8, 8, stages(128, wide, 128, 3))
    if tiles(128, 128) >= card.sms:
        return Config(128, 128, 128, 1, 8, 8, stages(128, 128, 128, 4))
    return Config(64, 128, 128, 1, 8, 4, stages(64, 128, 128, 4))


@functools.cache
def _tuned() -> tuning.Table:
    return tuning.load(Path(__file__).with_name("tuned.json"), triton.__version__)


@functools.lru_cache(maxsize=4096)
def config_for(shape: tuning.Shape, card: Card) -> Config:
    """Tuned for this card and Triton, or the heuristic's."""
    return tuning.choose(_tuned(), shape, card, Config, heuristic)


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
    options = {key.upper(): value for key, value in asdict(config).items() if key.startswith("block")}
    options |= {"RASTER": config.raster, "HAS_BIAS": bias is not None, "EVEN_K": k % config.block_k == 0}
    options |= {"PARTIAL": split > 1, "num_warps": config.num_warps, "num_stages": config.num_stages}
    options["enable_fp_fusion"] = FUSION
    sizes = (m, n, k, n_pad, each, xq.stride(0), w.stride(0), out.stride(-2))
    args = (xq, w, sx, scale, sx if bias is None else bias, out, *sizes)
    grid = (triton.cdiv(n, config.block_n) * triton.cdiv(m, config.block_m), split)
    launches = [Launch(matmul_w8a8_kernel, grid, args, options)]
    if split > 1:
        launches.append(add_slices_launch(out, sx, scale, bias, y))
    return y, launches


def run(
    xq: torch.Tensor,
    sx: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    packing: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The body: what op.py calls."""
    y, launches = plan(device.card_of(xq.device), xq, sx, w, scale, bias, n, k, packing, out_dtype)
    start(launches, xq.device)
    return y
