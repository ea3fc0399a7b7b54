"""The meaning of matmul_w8a16, in plain torch: x @ W^T with W = (code - zero) * scale, fp32 sums."""

from __future__ import annotations

from ..weight_only import product as run

__all__ = ["run"]
