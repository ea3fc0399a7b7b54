"""matmul_w8a16(x [M, K] bf16 | fp16 | fp32, w: QuantTensor [N, K], bias [N] or None) -> [M, N] in the type of x."""

from __future__ import annotations

from functools import partial

from .. import weight_only
from ..weight_only import SCHEMA, cost, native, out_like, tolerance

__all__ = ["OP", "SCHEMA", "check", "cost", "native", "out_like", "tolerance", "unwrap"]

OP = "matmul_w8a16"

unwrap = partial(weight_only.unwrap, OP, 8)
check = partial(weight_only.check, OP)
triton_takes = partial(weight_only.triton_takes, "planes16_w8")
cpu_takes = partial(weight_only.takes, "rows16_k4_w8")
reference_takes = partial(weight_only.takes, "plain")
