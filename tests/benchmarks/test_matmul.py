"""Linears of Qwen3-0.6B: one row, a batch and a prompt."""

from __future__ import annotations

import pytest

from percard.bench import ops

CELLS = ops.plan(["qwen3-0.6b"], ["w8a8", "w4a16-g64", "w8a16", "w4a8-g64"], [1, 16, 512], ["down"])


@pytest.mark.bench
@pytest.mark.parametrize(("spec", "case"), CELLS, ids=[f"{spec} {case.name}" for spec, case in CELLS])
def test_matmul(timed_op, spec, case):
    op = ops.linear_ops(spec)[-1]  # the product; what quantises its activations is in test_quantising.py
    timed_op(op, ops.OPS[op.name][1], case, spec)
