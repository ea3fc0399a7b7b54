"""The contract of ops whose activations stay 16-bit or fp32: what matmul_w4a16 and matmul_w8a16 share.

    op(x [M, K] bf16 | fp16 | fp32, w: QuantTensor [N, K], bias [N] or None) -> [M, N] in the type of x

The contract.py of such an op binds its name, the bits of its codes and its packings to the first arguments here.
"""

from __future__ import annotations

from typing import Any

import torch

from ..formats.tensor import QuantTensor
from .op import DTYPE_CODES, Cost, pointer, rows_contiguous
from .weight import (
    check_bias,
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

ROUNDS_WEIGHT_ABOVE = 64  # rows of bf16 above which `tolerance` lets a body round weights to bf16
SCHEMA = (
    "(Tensor x, Tensor w, Tensor scale, Tensor? zero, Tensor? bias, int n, int k, int group, str packing,"
    " bool batch_invariant=False) -> Tensor"
)

Flat = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, int, int, int, str, bool
]


def unwrap(
    op: str,
    bits: int,
    x: torch.Tensor,
    w: QuantTensor,
    bias: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> Flat:
    """`group` of the flat form is always a number of weights: K when a row has one scale.

    `batch_invariant`: the bits of a row of y do not depend on the other rows of x, nor on their number.
    """
    expect_spec(op, w, bits=bits, symmetric_only=False, rows_only=False)
    n, k = w.shape
    group = w.spec.group or k
    return rows_contiguous(x), w.data, w.scale, w.zero, fp32_bias(bias), n, k, group, w.packing, batch_invariant


def check(
    op: str,
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    batch_invariant: bool = False,
) -> None:
    if x.dtype not in DTYPE_CODES:
        raise ValueError(f"{op}: x is {x.dtype}, expected bfloat16, float16 or float32; cast it")
    check_rows(op, x, k)
    check_weight(op, w, scale, zero, n, k, group, packing)
    check_bias(op, bias, n)
    check_place(op, x, w=w, scale=scale, zero=zero, bias=bias)


def out_like(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    batch_invariant: bool = False,
) -> torch.Tensor:
    return torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)


def cost(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    batch_invariant: bool = False,
) -> Cost:
    m = x.shape[0]
    return Cost(flops=2 * m * n * k, bytes=m * (k + n) * x.element_size() + weight_bytes(w, scale, zero, bias))


def native(
    out: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    batch_invariant: bool = False,
) -> tuple[int, ...]:
    pointers = (pointer(x), pointer(w), pointer(scale), pointer(zero), pointer(bias), pointer(out))
    flags = (1,) if batch_invariant else ()  # the function's own default is no
    return (*pointers, x.shape[0], n, k, group, x.stride(0), DTYPE_CODES[x.dtype], *flags)


def tolerance(
    want: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """One ulp of the output type, and 2^-16 of the sum of absolute products for the order of the sum.

    Above 64 rows of bf16 a body may round each made-whole weight to bf16, as all engines do that dequantise for a matmul:
    errors of at most 2^-8 of a product, of either sign, which add up like their root of squares (measured: a standard
    deviation of 0.8 * 2^-9 of it; 2^-6 is ten of those).
    """
    weight = values(w, scale, zero, group)
    bound = ulp(want) + 2.0**-16 * (x.float().abs() @ weight.abs().T)
    if x.dtype == torch.bfloat16 and x.shape[0] > ROUNDS_WEIGHT_ABOVE and not batch_invariant:
        bound = bound + 2.0**-6 * (x.float().square() @ weight.square().T).sqrt()
    return bound if bias is None else bound + 2.0**-22 * bias.abs()


def takes(wanted: str, *flat: Any) -> str | None:
    """None, or why a body that reads packing `wanted` and any type of x does not serve."""
    return wrong_packing(flat[8], wanted)


def triton_takes(wanted: str, *flat: Any) -> str | None:
    """As `takes`, for a body whose products are of 16-bit numbers."""
    if flat[0].dtype == torch.float32:
        return "multiplies 16-bit activations, x is float32; cast x to bfloat16 or float16"
    return takes(wanted, *flat)


def product(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """The meaning of these ops, on a plain weight: fp32 sums, one rounding to the type of x."""
    y = x.float() @ values(w, scale, zero, group).T
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)
