"""Triton body of quantize_rows: one program per row, two passes over it; the second finds the row in L1 or L2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

from .. import tuning
from ..device import Card
from ..rows import Rows
from ..tiles import FUSION, Launch, row_code, row_scale, runner
from . import contract

OP_VERSION = 1  # raised when a kernel changes so that tuned entries of the one before mean nothing


@triton.jit  # specialised for K % 16 == 0: without knowing that of its mask, a load takes one element at a time
def quantize_rows_kernel(
    x_ptr, q_ptr, scale_ptr, row_sum_ptr,
    K,
    stride_xm, stride_qm,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """scale[m] = absmax(x[m, :]) / 127      q[m, k] = rne(x[m, k] * (127 / absmax))      row_sum[m] = sum_k q[m, k]

    x [M, K] bf16 | fp16 | fp32, q int8 [M, K], rows stride_xm and stride_qm apart; scale fp32 [M], row_sum int32 [M].

        x   [ BLOCK_K | BLOCK_K | BLO..]      program m reads row m twice: for its absmax, then to write q
        q   [ BLOCK_K | BLOCK_K | BLO..]

    A row of zeros (below 2^-100) has scale 1; a row with NaN or Inf has scale NaN and codes 0.
    Source of the convention: vLLM, csrc/quantization/w8a8/int8/scaled_quant.cu; of the rounding: the 1.5 * 2^23 trick.
    """
    m = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    x_row = x_ptr + m * stride_xm
    q_row = q_ptr + m * stride_qm

    peak = tl.zeros((BLOCK_K,), dtype=tl.float32)
    poison = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        x = tl.load(x_row + first + offs_k, mask=first + offs_k < K, other=0.0).to(tl.float32)  # [BLOCK_K]
        peak = tl.maximum(peak, tl.abs(x))
        poison += x * 0.0  # a maximum may drop NaN, a sum does not; Inf * 0 is NaN
    live, inverse, scale = row_scale(peak, poison)

    count = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for first in range(0, K, BLOCK_K):
        inside = first + offs_k < K
        x = tl.load(x_row + first + offs_k, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_K]
        code = row_code(x, live, inverse)
        count += code.to(tl.int32)
        tl.store(q_row + first + offs_k, code.to(tl.int8), mask=inside)

    tl.store(scale_ptr + m, scale)
    tl.store(row_sum_ptr + m, tl.sum(count, axis=0))


@dataclass(frozen=True)
class Config:
    """Elements of a row that a program holds at once, and its warps."""

    block_k: int
    num_warps: int


def heuristic(shape: tuning.Shape, card: Card) -> Config:
    """The whole row at once up to 8192, 4 to 32 elements a thread."""
    block = min(max(triton.next_power_of_2(shape.k), 128), 8192)
    return Config(block_k=block, num_warps=min(max(block // 256, 1), 8))


def candidates(shape: tuning.Shape, card: Card) -> list[Config]:
    """What a tuner tries beside the heuristic: half and a quarter of the row at once, more or fewer warps."""
    base = heuristic(shape, card)
    changes = [{"block_k": base.block_k // d, "num_warps": w} for d in (1, 2, 4) for w in (1, 2, 4, 8, 16)]
    return tuning.variants(base, changes, lambda c: c.block_k >= max(128, 32 * c.num_warps))


config_for = tuning.finder(Path(__file__).with_name("tuned.json"), triton.__version__, OP_VERSION, Config, heuristic)


def plan(card: Card, x: torch.Tensor, config: Config | None = None) -> tuple[Rows, list[Launch]]:
    """Outputs, and the kernel that fills them."""
    m, k = x.shape
    q, scale, row_sum = contract.out_like(x)
    config = config or config_for(tuning.Shape(m, 0, k, k, x.dtype), card)
    args = (x, q, scale, row_sum, k, x.stride(0), q.stride(0))
    options = {"BLOCK_K": config.block_k, "num_warps": config.num_warps, "enable_fp_fusion": FUSION}
    return (q, scale, row_sum), [Launch(quantize_rows_kernel, (m,), args, options)]


run = runner(plan)
