"""Triton body of silu_mul_quantize: one program per row, which it holds in registers; longer rows are passed twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

from .. import tuning
from ..device import Card
from ..rows import Rows
from ..tiles import FUSION, Launch, row_code, row_scale, runner, silu
from . import contract

OP_VERSION = 1  # raised when a kernel changes so that tuned entries of the one before mean nothing


@triton.jit
def _product(gate_row, up_row, offs, inside):
    """silu(gate) * up [BLOCK_K] as fp32; silu and the product are rounded to the type of gate. 0 outside."""
    gate = tl.load(gate_row + offs, mask=inside, other=0.0)  # [BLOCK_K]
    up = tl.load(up_row + offs, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_K]
    s = silu(gate.to(tl.float32)).to(gate.dtype).to(tl.float32)
    return (s * up).to(gate.dtype).to(tl.float32)


@triton.jit  # specialised for K % 16 == 0: without knowing that of its mask, a load takes one element at a time
def silu_mul_quantize_kernel(
    gate_ptr, up_ptr, q_ptr, scale_ptr, row_sum_ptr,
    K,
    stride_xm, stride_qm,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As silu_mul_quantize_rows_kernel, for K <= BLOCK_K: a row is read once, and y stays in registers.

    gate, up  [ BLOCK_K ]  ->  y, absmax  ->  q  [ BLOCK_K ]
    """
    m = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    inside = offs_k < K

    y = _product(gate_ptr + m * stride_xm, up_ptr + m * stride_xm, offs_k, inside)
    live, inverse, scale = row_scale(tl.abs(y), y * 0.0)
    code = row_code(y, live, inverse)

    tl.store(q_ptr + m * stride_qm + offs_k, code.to(tl.int8), mask=inside)
    tl.store(scale_ptr + m, scale)
    tl.store(row_sum_ptr + m, tl.sum(code.to(tl.int32), axis=0))


@triton.jit
def silu_mul_quantize_rows_kernel(
    gate_ptr, up_ptr, q_ptr, scale_ptr, row_sum_ptr,
    K,
    stride_xm, stride_qm,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = silu(gate) * up      q, scale, row_sum = quantize_rows(y)

    gate, up [M, K] bf16 | fp16 | fp32, rows stride_xm apart: the halves of one matrix; q int8 [M, K], rows stride_qm
    apart; scale fp32 [M], row_sum int32 [M].

        gate  [ BLOCK_K | BLOCK_K | BLO..]      program m computes row m of y twice: for its absmax, then to write q
        up    [ BLOCK_K | BLOCK_K | BLO..]
        q     [ BLOCK_K | BLOCK_K | BLO..]      silu is 20 operations: cheaper than a second trip of y to memory

    silu and y are rounded to the type of gate, as separate operations would.
    """
    m = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    gate_row, up_row = gate_ptr + m * stride_xm, up_ptr + m * stride_xm

    peak = tl.zeros((BLOCK_K,), dtype=tl.float32)
    poison = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        y = _product(gate_row, up_row, first + offs_k, first + offs_k < K)
        peak = tl.maximum(peak, tl.abs(y))
        poison += y * 0.0
    live, inverse, scale = row_scale(peak, poison)

    count = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for first in range(0, K, BLOCK_K):
        inside = first + offs_k < K
        code = row_code(_product(gate_row, up_row, first + offs_k, inside), live, inverse)
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
    """16 elements a thread: the whole row up to 8192, of longer ones as much.

    Half of it where there are more long rows than SMs, so that one program loads while another adds up.
    """
    whole = max(triton.next_power_of_2(shape.k), 128)
    block = whole if whole <= 8192 else 8192 if shape.m <= card.sms else 4096
    return Config(block_k=block, num_warps=min(max(block // 512, 1), 16))


def candidates(shape: tuning.Shape, card: Card) -> list[Config]:
    """What a tuner tries beside the heuristic: 1024 to 16384 at once, 8 to 32 elements a thread. None changes a bit."""
    base, whole = heuristic(shape, card), max(triton.next_power_of_2(shape.k), 128)
    changes = [{"block_k": b, "num_warps": w} for b in (1024, 2048, 4096, 8192, 16384) for w in (2, 4, 8, 16, 32)]
    return tuning.variants(base, changes, lambda c: c.block_k <= whole and 8 <= c.block_k // (32 * c.num_warps) <= 32)


config_for = tuning.finder(Path(__file__).with_name("tuned.json"), triton.__version__, OP_VERSION, Config, heuristic)


def plan(card: Card, x: torch.Tensor, config: Config | None = None) -> tuple[Rows, list[Launch]]:
    """Outputs, and the kernel that fills them."""
    m, k = x.shape[0], x.shape[1] // 2
    q, scale, row_sum = contract.out_like(x)
    config = config or config_for(tuning.Shape(m, 0, k, k, x.dtype), card)
    args = (x, x[:, k:], q, scale, row_sum, k, x.stride(0), q.stride(0))
    options = {"BLOCK_K": config.block_k, "num_warps": config.num_warps, "enable_fp_fusion": FUSION}
    kernel = silu_mul_quantize_kernel if k <= config.block_k else silu_mul_quantize_rows_kernel
    return (q, scale, row_sum), [Launch(kernel, (m,), args, options)]


run = runner(plan)
