"""The meaning of moe_matmul, in plain torch."""

from __future__ import annotations

import torch

from ..weight import values


def pairwise(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    group: int,
    absolute: bool = False,
) -> torch.Tensor:
    """x @ W[e]^T of each pair (t, j), e = ids[t, j]: fp32 [T * topk, N], 0 where e is no expert. `absolute`: with |W|."""
    out = torch.zeros(ids.numel(), w.shape[1], device=x.device)
    for e in range(w.shape[0]):
        pairs = (ids.flatten() == e).nonzero()[:, 0]
        if pairs.numel() == 0:
            continue
        at = pairs // ids.shape[1] if weights is None else pairs
        if sx is not None:  # exact up to 2^53, so it is the int32 sum; every device multiplies doubles
            out[pairs] = (x[at].double() @ w[e].double().T).float() * sx[at][:, None] * scale[e].float().T
        else:
            weight = values(w[e], scale[e], None if zero is None else zero[e], group)
            out[pairs] = x[at].float() @ (weight.abs() if absolute else weight).T
    return out


def run(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> torch.Tensor:
    products = pairwise(x, sx, w, scale, zero, ids, weights, group)
    if weights is None:
        gate, up = products.chunk(2, 1)
        return (torch.nn.functional.silu(gate) * up).to(out_dtype)
    mine = (ids >= 0) & (ids < w.shape[0])
    weighted = products.view(*ids.shape, n) * weights.where(mine, torch.zeros_like(weights))[:, :, None]
    y = torch.zeros_like(weighted[:, 0])
    for term in weighted.unbind(1):  # in this order
        y = y + term
    return y.to(out_dtype)
