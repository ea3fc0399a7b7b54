"""matmul_w4a8(xq int8 [M, K], sx fp32 [M], xsum int32 [M], w: QuantTensor [N, K], bias, out_dtype) -> [M, N]."""

from __future__ import annotations

import torch

from ...formats.layout import has_row_scale
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
    values,
    weight_bytes,
    wrong_packing,
)

OP = "matmul_w4a8"
SCHEMA = (
    "(Tensor xq, Tensor sx, Tensor xsum, Tensor w, Tensor scale, Tensor? bias, int n, int k, int group, str packing,"
    " ScalarType out_dtype, bool batch_invariant=False) -> Tensor"
)
MAX_K = 132104  # one limit for all int8 ops: 16 * 8 * 127 * K stays below 2^31, so a body may multiply 16 q

Flat = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, int, int, int, str,
    torch.dtype, bool,
]  # fmt: skip


def unwrap(
    xq: torch.Tensor,
    sx: torch.Tensor,
    xsum: torch.Tensor,
    w: QuantTensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
) -> Flat:
    """`group` of the flat form is always a number of weights: K when a row has one scale.

    `batch_invariant`: the bits of a row of y do not depend on the number of rows. Only group scales on a card need to be
    asked: everywhere else it is so anyway.
    """
    expect_spec(OP, w, bits=4, symmetric_only=True, rows_only=False)
    n, k = w.shape
    rows = (rows_contiguous(xq), sx.contiguous(), xsum.contiguous())
    group = w.spec.group or k
    return *rows, w.data, w.scale, fp32_bias(bias), n, k, group, w.packing, out_dtype, batch_invariant


def check(
    xq: torch.Tensor,
    sx: torch.Tensor,
    xsum: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
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
    check_per_row(OP, "xsum", xsum, torch.int32, xq.shape[0])
    check_weight(OP, w, scale, None, n, k, group, packing)
    check_bias(OP, bias, n)
    check_place(OP, xq, sx=sx, xsum=xsum, w=w, scale=scale, bias=bias)


def out_like(
    xq: torch.Tensor,
    sx: torch.Tensor,
    xsum: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> torch.Tensor:
    return torch.empty((xq.shape[0], n), dtype=out_dtype, device=xq.device)


def cost(
    xq: torch.Tensor,
    sx: torch.Tensor,
    xsum: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Cost:
    m = xq.shape[0]
    return Cost(flops=2 * m * n * k, bytes=m * (k + 8 + n * out_dtype.itemsize) + weight_bytes(w, scale, None, bias))


def native(
    out: torch.Tensor,
    xq: torch.Tensor,
    sx: torch.Tensor,
    xsum: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> tuple[int, ...]:
    pointers = (pointer(xq), pointer(sx), pointer(w), pointer(scale), pointer(bias), pointer(out))
    flat = (*pointers, xq.shape[0], n, k, group, xq.stride(0), DTYPE_CODES[out_dtype], pointer(xsum))
    rows, columns = scale.shape
    return (*flat, pointer(scale) + 4 * (rows - 1) * columns) if has_row_scale(scale, k, group) else flat


def tolerance(
    want: torch.Tensor,
    xq: torch.Tensor,
    sx: torch.Tensor,
    xsum: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Sums of a group are exact; over G groups any order of fp32 adds errs by at most (G + 4) * 2^-24 of the terms.

    Two-level scales leave nothing to add in fp32: those bodies are nearer to the truth than the reference is.
    """
    terms = sx.abs()[:, None] * (xq.float().abs() @ values(w, scale, None, group).abs().T)
    bound = ulp(want) + (-(-k // group) + 4) * 2.0**-24 * terms
    return bound if bias is None else bound + 2.0**-22 * bias.abs()


def triton_takes(
    xq: torch.Tensor,
    sx: torch.Tensor,
    xsum: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> str | None:
    return wrong_packing(packing, "planes8_w4")


def cpu_takes(
    xq: torch.Tensor,
    sx: torch.Tensor,
    xsum: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> str | None:
    return wrong_packing(packing, "rows16_k4_w4")


def reference_takes(
    xq: torch.Tensor,
    sx: torch.Tensor,
    xsum: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> str | None:
    return wrong_packing(packing, "plain")
