"""What rounds activations and what writes and unpacks caches, at the sizes of Qwen3-0.6B."""

from __future__ import annotations

import pytest

from percard.bench import ops

CELLS = {
    "quantize_rows": ("qwen3-0.6b.k1024.decode.b16", "qwen3-0.6b.k1024.prefill.t512"),
    "rmsnorm_quantize": ("qwen3-0.6b.k1024.decode.b16.residual", "qwen3-0.6b.k1024.prefill.t512.residual"),
    "silu_mul_quantize": ("qwen3-0.6b.k3072.decode.b16", "qwen3-0.6b.k3072.prefill.t512"),
    "kv_append": (
        "qwen3-0.6b.append.decode.b16",
        "qwen3-0.6b.append.decode.b16.int8",
        "qwen3-0.6b.append.decode.b16.int4",
    ),
    "gather_dequantize": ("qwen3-0.6b.gather.int8.b1.s2048", "qwen3-0.6b.gather.int4.b1.s2048"),
}


@pytest.mark.bench
@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CELLS.items() for case in cases])
def test_quantising(timed_op, name, case):
    op, cases = ops.OPS[name]
    found = next(c for c in cases.CASES if c.name == case)
    timed_op(op, cases, found, getattr(found, "kv", "") or "int8")
