"""The meaning of matmul_w4a8, in plain torch."""

from __future__ import annotations

import torch


def run(
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
    y = torch.zeros((xq.shape[0], n), dtype=torch.float32, device=xq.device)
    for g, start in enumerate(range(0, k, group)):  # ascending: the order of the fp32 sum is part of the meaning
        part = xq[:, start : start + group].double() @ w[:, start : start + group].double().T  # exact, as int32 is
        y = y + part.float() * scale[:, g].float()
    y = y * sx[:, None]
    if bias is not None:
        y = y + bias
    return y.to(out_dtype)
