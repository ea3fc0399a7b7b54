"""The meaning of matmul_w8a8, in plain torch."""

from __future__ import annotations

import torch


def run(
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
    acc = (
        xq.double() @ w.double().T
    )  # [M, N]: exact up to 2^53, so it is the int32 sum; every device multiplies doubles
    y = acc.float() * sx[:, None] * scale.float().T
    if bias is not None:
        y = y + bias
    return y.to(out_dtype)
