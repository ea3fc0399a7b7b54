"""quantize_rows(x [M, K] bf16 | fp16 | fp32) -> q int8 [M, K], scale fp32 [M], row_sum int32 [M]."""

from __future__ import annotations

import torch

from .. import rows
from ..op import DTYPE_CODES, Cost, pointer, rows_contiguous

SCHEMA = "(Tensor x) -> (Tensor, Tensor, Tensor)"


def unwrap(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (rows_contiguous(x),)


def check(x: torch.Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(
            f"quantize_rows: x has shape {tuple(x.shape)}, expected [M, K]; flatten the leading dimensions"
        )
    if x.dtype not in DTYPE_CODES:
        raise ValueError(f"quantize_rows: x is {x.dtype}, expected bfloat16, float16 or float32; cast it")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(
            f"quantize_rows: x has strides {x.stride()}, its last dimension is not contiguous; call .contiguous()"
        )


def out_like(x: torch.Tensor) -> rows.Rows:
    return rows.blank(x.shape[0], x.shape[1], x.device)


def cost(x: torch.Tensor) -> Cost:
    m, k = x.shape
    return Cost(flops=3 * m * k, bytes=m * k * (x.element_size() + 1) + 8 * m)


def native(out: rows.Rows, x: torch.Tensor) -> tuple:
    m, k = x.shape
    q, scale, row_sum = out
    return (pointer(x), pointer(q), pointer(scale), pointer(row_sum), m, k, x.stride(0), DTYPE_CODES[x.dtype])


def tolerance(want: rows.Rows, x: torch.Tensor) -> rows.Rows:
    """Codes and row sums are exact; a scale may be one ulp off, since nothing is rounded with it again."""
    return rows.exact(want)


def triton_takes(x: torch.Tensor) -> str | None:
    return None


def cpu_takes(x: torch.Tensor) -> str | None:
    return None
