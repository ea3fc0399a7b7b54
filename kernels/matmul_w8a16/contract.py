"""matmul_w8a16(x [M, K] bf16 | fp16 | fp32, w: QuantTensor [N, K], bias [N] or None) -> [M, N] in the type of x."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .. import weight_only
from ..weight_only import ROUNDS_WEIGHT_ABOVE, SCHEMA, cost, native, out_like, tolerance

__all__ = ["OP", "SCHEMA", "check", "cost", "native", "out_like", "tolerance", "unwrap"]

OP = "matmul_w8a16"

unwrap = partial(weight_only.unwrap, OP, 8)
check = partial(weight_only.check, OP)
cpu_takes = partial(weight_only.takes, "rows16_k4_w8")
reference_takes = partial(weight_only.takes, "plain")


def triton_takes(*flat: Any) -> str | None:
    """Packing planes16_w8; the rows8 of a w8a8 layer only where its values may be rounded and M may decide (way D)."""
    x, packing, batch_invariant = flat[0], flat[8], any(flat[9:])
    if packing != "rows8":
        return weight_only.triton_takes("planes16_w8", *flat)
    if x.dtype == torch.bfloat16 and x.shape[0] > ROUNDS_WEIGHT_ABOVE and not batch_invariant:
        return None
    few = f"more than {ROUNDS_WEIGHT_ABOVE} rows of bfloat16, not batch_invariant"
    return f"makes a weight packed as rows8 whole for {few}; kernels.linear.linear takes the route that serves"
