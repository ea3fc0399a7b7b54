"""The meaning of search_scale, in plain torch."""

from __future__ import annotations

import torch

from . import contract

CHUNK = 1 << 20  # weights tried at once, so that the trials stay in the cache and memory stays small


def run(w: torch.Tensor, bits: int, group: int, symmetric: bool, scale_dtype: int, norm: float) -> torch.Tensor:
    out = contract.out_like(w, bits, group, symmetric, scale_dtype, norm)
    groups = w.reshape(-1, group)  # [N * K/group, group]
    flat, step = out.view(-1), max(1, CHUNK // group)
    for start in range(0, groups.shape[0], step):
        part = groups[start : start + step]
        flat[start : start + step] = _search(part, bits, symmetric, out.dtype, norm)
    return out


def _search(w: torch.Tensor, bits: int, symmetric: bool, dtype: torch.dtype, norm: float) -> torch.Tensor:
    """Best scale of each row of w [R, group], in `dtype`."""
    widest, zero = start_of(w, bits, symmetric, dtype)
    best = torch.ones_like(widest)
    least = torch.full_like(widest, torch.inf)
    for i in range(contract.TRIALS):
        scale = stored(widest * (1.0 - i / 100), dtype)
        error = loss(w, scale, zero, bits, norm)
        better = (error < least) & (widest > 0) & torch.isfinite(scale)
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best.to(dtype)


def start_of(w: torch.Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(s0, z) of each row of w [R, group]: the scale at p = 1 before rounding, fp32, and the zero point, fp32."""
    if symmetric:
        widest = w.abs().amax(1) / ((2**bits - 1) / 2)
        return widest, torch.zeros_like(widest)
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    widest = (high - low) / (2**bits - 1)
    scale = torch.where(widest > 0, stored(widest, dtype), torch.ones_like(widest))
    qmin = -(2 ** (bits - 1))
    return widest, (qmin - low / scale).clamp(qmin, -qmin - 1).round()


def stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 scales as `dtype` stores them, as fp32; never below the least number that no device flushes to 0."""
    return scale.to(dtype).float().clamp_min(2.0**-24 if dtype == torch.float16 else 2.0**-126)


def loss(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, norm: float) -> torch.Tensor:
    """sum |dequantised - w|^norm of each row of w [R, group], for scale and zero [R]."""
    qmin = -(2 ** (bits - 1))
    code = (w / scale[:, None] + zero[:, None]).clamp(qmin, -qmin - 1).round()
    error = (code - zero[:, None]) * scale[:, None] - w
    return (error * error).sum(1) if norm == 2.0 else error.abs().pow(norm).sum(1)
