"""matmul_w8a8(xq int8 [M, K], sx fp32 [M], w: QuantTensor [N, K], bias [N] or None, out_dtype) -> [M, N] in out_dtype."""

from __future__ import annotations

import torch

from ...formats.tensor import QuantTensor
from ..op import DTYPE_CODES, Cost, pointer, rows_contiguous
from ..weight import (
    check_bias,
    check_per_row,
    check_place,
    check_rows,
    check_weight,
    expect_spec,
    fp32_bias,
    ulp,
    weight_bytes,
    wrong_packing,
)

OP = "matmul_w8a8"
SCHEMA = (
    "(Tensor xq, Tensor sx, Tensor w, Tensor scale, Tensor? bias, int n, int k, str packing, ScalarType out_dtype)"
    " -> Tensor"
)
MAX_K = 132104  # 127 * 128 * K stays below 2^31

Flat = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, int, int, str, torch.dtype]


def unwrap(
    xq: torch.Tensor,
    sx: torch.Tensor,
    w: QuantTensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Flat:
    expect_spec(OP, w, bits=8, symmetric_only=True, rows_only=True)
    n, k = w.shape
    return rows_contiguous(xq), sx.contiguous(), w.data, w.scale, fp32_bias(bias), n, k, w.packing, out_dtype


def check(
    xq: torch.Tensor,
    sx: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    packing: str,
    out_dtype: torch.dtype,
) -> None:
    if xq.dtype != torch.int8:
        raise ValueError(
            f"{OP}: xq is {xq.dtype}, expected int8; quantize_rows makes it, or call kernels.linear.linear"
        )
    if k > MAX_K:
        raise ValueError(
            f"{OP}: K is {k}, expected at most {MAX_K}, where int32 sums are safe; split the layer along K"
        )
    if out_dtype not in DTYPE_CODES:
        raise ValueError(f"{OP}: out_dtype is {out_dtype}, expected bfloat16, float16 or float32")
    check_rows(OP, xq, k, "xq")
    check_per_row(OP, "sx", sx, torch.float32, xq.shape[0])
    check_weight(OP, w, scale, None, n, k, k, packing)
    check_bias(OP, bias, n)
    check_place(OP, xq, sx=sx, w=w, scale=scale, bias=bias)


def out_like(
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
    return torch.empty((xq.shape[0], n), dtype=out_dtype, device=xq.device)


def cost(
    xq: torch.Tensor,
    sx: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    packing: str,
    out_dtype: torch.dtype,
) -> Cost:
    m = xq.shape[0]
    return Cost(flops=2 * m * n * k, bytes=m * (k + 4 + n * out_dtype.itemsize) + weight_bytes(w, scale, None, bias))


def native(
    out: torch.Tensor,
    xq: torch.Tensor,
    sx: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    packing: str,
    out_dtype: torch.dtype,
) -> tuple[int, ...]:
    pointers = (pointer(xq), pointer(sx), pointer(w), pointer(scale), pointer(bias), pointer(out))
    return (*pointers, xq.shape[0], n, k, xq.stride(0), DTYPE_CODES[out_dtype])


def tolerance(
    want: torch.Tensor,
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
    """The sum is exact; the epilogue may be fused (2^-22 of its terms), then one rounding to the output type."""
    terms = want.float().abs() if bias is None else want.float().abs() + 2 * bias.abs()
    return ulp(want) + 2.0**-22 * terms


def triton_takes(
    xq: torch.Tensor,
    sx: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    packing: str,
    out_dtype: torch.dtype,
) -> str | None:
    return wrong_packing(packing, "rows8")


def cpu_takes(
    xq: torch.Tensor,
    sx: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    packing: str,
    out_dtype: torch.dtype,
) -> str | None:
    return wrong_packing(packing, "rows16_k4_w8")


def reference_takes(
    xq: torch.Tensor,
    sx: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    packing: str,
    out_dtype: torch.dtype,
) -> str | None:
    return wrong_packing(packing, "plain")
