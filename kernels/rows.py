"""Rows to int8, the tail of every op that makes activations for int8 matmuls: its meaning, and how far a body may be off.

    scale[m] = absmax(y[m, :]) / 127     q[m, k] = round_half_even(y[m, k] * (127 / absmax))     row_sum[m] = sum_k q[m, k]

Each division and product is fp32, rounded once, so equal rows give equal codes in every body. csrc/rows.h and tiles.py say
the same in C++ and in Triton.
"""

from __future__ import annotations

import torch

from .weight import ulp

TINY = 2.0**-100  # a smaller absmax counts as zero, so that 127 / absmax stays finite
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q int8 [M, K], scale fp32 [M], row_sum int32 [M]


def blank(m: int, k: int, device: torch.device) -> Rows:
    """Outputs for M rows of K numbers, not filled."""
    q = torch.empty((m, k), dtype=torch.int8, device=device)
    return q, torch.empty(m, dtype=torch.float32, device=device), torch.empty(m, dtype=torch.int32, device=device)


def quantize(rows: torch.Tensor) -> Rows:
    """fp32 [M, K] to codes, scales and sums. A row with NaN or Inf has scale NaN and codes 0, one of zeros scale 1."""
    absmax = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
    finite = torch.isfinite(rows).all(1)
    live = finite & (absmax >= TINY)
    # A tensor of 127s: torch turns a division by a Python number into a product on a card, and 127.0 / t into 127 * (1/t).
    # Here each is one division, rounded once, so that every body can give the same bits.
    levels = torch.full_like(absmax, 127.0)
    scale = torch.where(live, absmax / levels, torch.ones_like(absmax))
    scale = torch.where(finite, scale, torch.full_like(scale, torch.nan))
    inverse = torch.where(live, levels / absmax, torch.zeros_like(absmax))
    q = torch.where(live[:, None], rows * inverse[:, None], torch.zeros_like(rows)).round().clamp(-127, 127)
    q = q.to(torch.int8)
    return q, scale, q.sum(1, dtype=torch.int32)


def exact(want: Rows) -> Rows:
    """How far a body may be off when every body has the same rows: codes and sums not at all, a scale by one ulp."""
    q, scale, row_sum = want
    return torch.zeros_like(q), ulp(scale), torch.zeros_like(row_sum)


def reach(low: torch.Tensor, high: torch.Tensor, want: Rows) -> Rows:
    """How far a body may be off whose rows lie anywhere between fp32 `low` and `high` [M, K].

    Where the two are equal, in a row whose largest number is certain, a code has no freedom at all.
    """
    q, scale, _ = want
    sure = torch.isfinite(scale) & torch.isfinite(low).all(1) & torch.isfinite(high).all(1)
    low, high = (torch.where(sure[:, None], t, torch.zeros_like(t)) for t in (low, high))
    zero = torch.zeros_like(low)
    least = torch.where(low * high <= 0, zero, torch.minimum(low.abs(), high.abs())).amax(1)  # of absmax
    most = torch.maximum(low.abs(), high.abs()).amax(1)
    levels = torch.full_like(most, 127.0)
    off = torch.zeros_like(low)
    for absmax in (least, most):
        inverse = torch.where(absmax >= TINY, levels / absmax, torch.zeros_like(absmax))
        for side in (low, high):
            code = (side * inverse[:, None]).round().clamp(-127, 127)
            off = torch.maximum(off, (code - q).abs())
    off = torch.where(sure[:, None], off, zero)
    scale_off = torch.where(sure, (most - least) / 127 + ulp(scale), torch.zeros_like(scale))
    scale_off = torch.where((least < TINY) & (most >= TINY), torch.ones_like(scale_off), scale_off)
    return off, scale_off, off.sum(1)
