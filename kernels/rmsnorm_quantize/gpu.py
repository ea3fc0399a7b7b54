"""Triton body of rmsnorm_quantize: one program per row, which it holds in registers; longer rows are passed three times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

from .. import tuning
from ..device import Card
from ..tiles import FUSION, Launch, row_code, row_scale, runner
from . import contract

OP_VERSION = 1  # raised when a kernel changes so that tuned entries of the one before mean nothing


@triton.jit
def _summed(x_row, residual_row, offs, inside, HAS_RESIDUAL: tl.constexpr):
    """x + residual [BLOCK_K] in the type of x; x without a residual; 0 outside."""
    x = tl.load(x_row + offs, mask=inside, other=0.0)  # [BLOCK_K]
    if HAS_RESIDUAL:
        x = (x.to(tl.float32) + tl.load(residual_row + offs, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _normed(r, inverse_root, weight_ptr, offs, inside):
    """r / root * weight [BLOCK_K], rounded to the type of r, as fp32."""
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_K]
    return ((r.to(tl.float32) * inverse_root) * weight).to(r.dtype).to(tl.float32)


@triton.jit
def _inverse_root(squares, K, eps):
    """1 / sqrt(mean + eps) of sums of squares [BLOCK_K]."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=0), K * 1.0) + eps))


@triton.jit  # specialised for K % 16 == 0: without knowing that of its mask, a load takes one element at a time
def rmsnorm_quantize_kernel(
    x_ptr, weight_ptr, residual_ptr, q_ptr, scale_ptr, row_sum_ptr, r_ptr,
    K, eps,
    stride_xm, stride_sm, stride_qm,
    HAS_RESIDUAL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As rmsnorm_quantize_rows_kernel, for K <= BLOCK_K: a row is read once and stays in registers.

    x + residual  [ BLOCK_K ]  ->  r, sum of squares  ->  y, absmax  ->  q  [ BLOCK_K ]
    """
    m = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    inside = offs_k < K

    r = _summed(x_ptr + m * stride_xm, residual_ptr + m * stride_sm, offs_k, inside, HAS_RESIDUAL)
    if HAS_RESIDUAL:
        tl.store(r_ptr + m * stride_qm + offs_k, r, mask=inside)
    inverse_root = _inverse_root(r.to(tl.float32) * r.to(tl.float32), K, eps)
    y = _normed(r, inverse_root, weight_ptr, offs_k, inside)
    live, inverse, scale = row_scale(tl.abs(y), y * 0.0)
    code = row_code(y, live, inverse)

    tl.store(q_ptr + m * stride_qm + offs_k, code.to(tl.int8), mask=inside)
    tl.store(scale_ptr + m, scale)
    tl.store(row_sum_ptr + m, tl.sum(code.to(tl.int32), axis=0))


@triton.jit
def rmsnorm_quantize_rows_kernel(
    x_ptr, weight_ptr, residual_ptr, q_ptr, scale_ptr, row_sum_ptr, r_ptr,
    K, eps,
    stride_xm, stride_sm, stride_qm,
    HAS_RESIDUAL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """r = x + residual      y = (r / sqrt(mean(r^2) + eps)) * weight      q, scale, row_sum = quantize_rows(y)

    x, residual, r [M, K] bf16 | fp16 | fp32, rows stride_xm, stride_sm and stride_qm apart (residual and r are not
    touched without HAS_RESIDUAL); weight [K] alike; q int8 [M, K], rows stride_qm apart; scale fp32, row_sum int32 [M].

        x + residual  [ BLOCK_K | BLOCK_K | BLO..]   1: r and the sum of squares
                      [ BLOCK_K | BLOCK_K | BLO..]   2: absmax of y          2 and 3 add up x and residual again rather
        q             [ BLOCK_K | BLOCK_K | BLO..]   3: codes                than read r: nobody waits for a store

    r and y are rounded to the type of x, as separate operations would.
    """
    m = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    x_row = x_ptr + m * stride_xm
    residual_row = residual_ptr + m * stride_sm

    squares = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        inside = first + offs_k < K
        r = _summed(x_row, residual_row, first + offs_k, inside, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(r_ptr + m * stride_qm + first + offs_k, r, mask=inside)
        squares += r.to(tl.float32) * r.to(tl.float32)
    inverse_root = _inverse_root(squares, K, eps)

    peak = tl.zeros((BLOCK_K,), dtype=tl.float32)
    poison = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        inside = first + offs_k < K
        r = _summed(x_row, residual_row, first + offs_k, inside, HAS_RESIDUAL)
        y = _normed(r, inverse_root, weight_ptr, first + offs_k, inside)
        peak = tl.maximum(peak, tl.abs(y))
        poison += y * 0.0
    live, inverse, scale = row_scale(peak, poison)

    count = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for first in range(0, K, BLOCK_K):
        inside = first + offs_k < K
        r = _summed(x_row, residual_row, first + offs_k, inside, HAS_RESIDUAL)
        code = row_code(_normed(r, inverse_root, weight_ptr, first + offs_k, inside), live, inverse)
        count += code.to(tl.int32)
        tl.store(q_ptr + m * stride_qm + first + offs_k, code.to(tl.int8), mask=inside)

    tl.store(scale_ptr + m, scale)
    tl.store(row_sum_ptr + m, tl.sum(count, axis=0))


@dataclass(frozen=True)
class Config:
    """Elements of a row that a program holds at once, and its warps."""

    block_k: int
    num_warps: int


def heuristic(shape: tuning.Shape, card: Card) -> Config:
    """The whole row at once up to 8192, 16 elements a thread.

    There are no candidates to tune: block and warps decide the order of the sum of squares, and a row's bits must not depend
    on M through an entry for a bucket.
    """
    block = min(max(triton.next_power_of_2(shape.k), 128), 8192)
    return Config(block_k=block, num_warps=min(max(block // 512, 1), 16))


config_for = tuning.finder(Path(__file__).with_name("tuned.json"), triton.__version__, OP_VERSION, Config, heuristic)


def plan(
    card: Card,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    config: Config | None = None,
) -> tuple[contract.Outputs, list[Launch]]:
    """Outputs, and the kernel that fills them."""
    m, k = x.shape
    outputs = contract.out_like(x, weight, residual, eps)
    config = config or config_for(tuning.Shape(m, 0, k, k, x.dtype), card)
    other = x if residual is None else residual
    args = (x, weight, other, *outputs, k, eps, x.stride(0), other.stride(0), outputs[0].stride(0))
    flags = {"HAS_RESIDUAL": residual is not None, "BLOCK_K": config.block_k}
    # All the registers that the warps can have: left alone, ptxas spills 8 bytes to make room for a second program.
    most = min(255, 65536 // (32 * config.num_warps))
    options = {"num_warps": config.num_warps, "maxnreg": most, "enable_fp_fusion": FUSION}
    kernel = rmsnorm_quantize_kernel if k <= config.block_k else rmsnorm_quantize_rows_kernel
    return outputs, [Launch(kernel, (m,), args, flags | options)]


run = runner(plan)
