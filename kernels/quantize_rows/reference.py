"""The meaning of quantize_rows, in plain torch."""

from __future__ import annotations

import torch

TINY = 2.0**-100  # a smaller absmax counts as zero, so that 127 / absmax stays finite


def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.float()
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
