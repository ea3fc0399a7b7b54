"""silu_mul_quantize(x [M, 2 I] bf16 | fp16 | fp32) -> q int8 [M, I], scale fp32 [M], row_sum int32 [M]."""

from __future__ import annotations

import torch

from .. import rows
from ..op import DTYPE_CODES, Cost, pointer, rows_contiguous
from ..weight import check_rows

OP = "silu_mul_quantize"
SCHEMA = "(Tensor x) -> (Tensor, Tensor, Tensor)"
_SILU_OFF = 6 * 2.0**-24  # relative: 1.51 ulp of the exponential, one rounding of the sum, one of the quotient
_SILU_LEAST = 2.0**-121  # absolute: below -88.7 fp32 has no e^-g and silu becomes 0


def unwrap(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (rows_contiguous(x),)


def check(x: torch.Tensor) -> None:
    if x.ndim != 2 or x.shape[1] < 2 or x.shape[1] % 2:
        raise ValueError(
            f"{OP}: x has shape {tuple(x.shape)}, expected [M, 2 I]: I gate columns, then as many up columns"
        )
    if x.dtype not in DTYPE_CODES:
        raise ValueError(f"{OP}: x is {x.dtype}, expected bfloat16, float16 or float32; cast it")
    check_rows(OP, x, x.shape[1])


def out_like(x: torch.Tensor) -> rows.Rows:
    return rows.blank(x.shape[0], x.shape[1] // 2, x.device)


def cost(x: torch.Tensor) -> Cost:
    m, k = x.shape[0], x.shape[1] // 2
    return Cost(flops=24 * m * k, bytes=m * k * (2 * x.element_size() + 1) + 8 * m)


def native(out: rows.Rows, x: torch.Tensor) -> tuple[int, ...]:
    pointers = tuple(pointer(t) for t in (x, *out))
    return (*pointers, x.shape[0], x.shape[1] // 2, x.stride(0), DTYPE_CODES[x.dtype])


def tolerance(want: rows.Rows, x: torch.Tensor) -> rows.Rows:
    """What an exponential that is not the nearest number can do to silu, and then the roundings."""
    gate, up = x.double().chunk(2, 1)
    silu = gate / (1 + torch.exp(-gate))
    off = _SILU_OFF * silu.abs() + _SILU_LEAST
    ends = [((silu + side * off).to(x.dtype).float() * up.float()).to(x.dtype).float() for side in (-1, 1)]
    return rows.reach(torch.minimum(*ends), torch.maximum(*ends), want)


def triton_takes(x: torch.Tensor) -> str | None:
    return None


def cpu_takes(x: torch.Tensor) -> str | None:
    return None
