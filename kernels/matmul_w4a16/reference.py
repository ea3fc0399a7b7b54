"""The meaning of matmul_w4a16, in plain torch."""

from __future__ import annotations

import torch

from ..weight import values


def run(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
) -> torch.Tensor:
    y = x.float() @ values(w, scale, zero, group).T
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)
