"""rmsnorm_quantize(x [M, K], weight [K], eps, residual [M, K] or None) -> q int8 [M, K], scale fp32 [M],
row_sum int32 [M], r [M, K] in the type of x ([0, K] without a residual). x bf16 | fp16 | fp32, the others alike."""

from __future__ import annotations

import torch

from .. import rows
from ..op import DTYPE_CODES, Cost, pointer, rows_contiguous
from ..weight import check_place, check_rows
from .reference import inverse_root

OP = "rmsnorm_quantize"
SCHEMA = "(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor, Tensor)"
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Flat = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]


def unwrap(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, residual: torch.Tensor | None = None) -> Flat:
    residual = None if residual is None else rows_contiguous(residual)
    return rows_contiguous(x), weight.contiguous(), residual, float(eps)


def check(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float) -> None:
    if x.ndim != 2 or x.shape[1] < 1:
        raise ValueError(f"{OP}: x has shape {tuple(x.shape)}, expected [M, K], K >= 1; flatten the leading dimensions")
    if x.dtype not in DTYPE_CODES:
        raise ValueError(f"{OP}: x is {x.dtype}, expected bfloat16, float16 or float32; cast it")
    m, k = x.shape
    check_rows(OP, x, k)
    if weight.dtype != x.dtype or weight.shape != (k,) or not weight.is_contiguous():
        found = f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(f"{OP}: weight is {found}, expected contiguous {x.dtype} {(k,)}; cast it once at load")
    if residual is not None:
        check_rows(OP, residual, k, "residual")
        if residual.dtype != x.dtype or residual.shape[0] != m:
            found = f"{residual.dtype} {tuple(residual.shape)}"
            raise ValueError(f"{OP}: residual is {found}, expected {x.dtype} {(m, k)} as x")
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"{OP}: eps is {eps}, expected a number from 0 on")
    check_place(OP, x, weight=weight, residual=residual)


def out_like(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float) -> Outputs:
    m, k = x.shape
    return (*rows.blank(m, k, x.device), x.new_empty((0 if residual is None else m, k)))


def cost(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float) -> Cost:
    m, k = x.shape
    moved = 1 if residual is None else 3  # x; x, residual and r
    return Cost(flops=8 * m * k, bytes=m * k * (moved * x.element_size() + 1) + 8 * m + k * x.element_size())


def native(
    out: Outputs, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float
) -> tuple[int | float, ...]:
    q, scale, row_sum, r = out
    m, k = x.shape
    pointers = tuple(pointer(t) for t in (x, weight, residual, q, scale, row_sum))
    stride = 0 if residual is None else residual.stride(0)
    return (*pointers, pointer(None if residual is None else r), m, k, x.stride(0), stride, DTYPE_CODES[x.dtype], eps)


def tolerance(
    want: Outputs, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float
) -> Outputs:
    """What the order of the sum of squares can do: (K / 128 + 16) * 2^-24 of y, then the roundings; r is exact.

    Bodies add at least 64 partial sums of at most K / 64 squares, and a square root halves a relative error.
    """
    q, scale, row_sum, r = want
    source = x if residual is None else r
    y = source.double() * inverse_root(source, eps).double() * weight.double()
    off = (source.shape[1] / 128 + 16) * 2.0**-24 * y.abs()
    low, high = ((y + side * off).to(x.dtype).float() for side in (-1, 1))
    return (*rows.reach(low, high, (q, scale, row_sum)), torch.zeros_like(r))


def triton_takes(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float) -> str | None:
    return None


def cpu_takes(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float) -> str | None:
    return None
