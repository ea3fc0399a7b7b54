"""The meaning of rmsnorm_quantize, in plain torch."""

from __future__ import annotations

import torch

from ..rows import quantize


def inverse_root(r: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(r^2) + eps) of each row as F.rms_norm takes it, fp32 [M, 1]."""
    return (r.float().square().mean(1, keepdim=True) + eps).rsqrt()


def run(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    r = x if residual is None else x + residual
    y = (r.float() * inverse_root(r, eps) * weight.float()).to(x.dtype)
    return (*quantize(y.float()), x.new_empty((0, x.shape[1])) if residual is None else r)
