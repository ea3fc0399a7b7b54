"""Attention at the heads of Qwen3-0.6B: a decode step over 1,024 cached tokens and a prompt of 512, over each cache."""

from __future__ import annotations

import dataclasses

import pytest

from percard.bench import ops

SPECS = ("bf16", "int8", "k8v4", "int4")


@pytest.mark.bench
@pytest.mark.parametrize("spec", SPECS)
def test_decode(timed_op, spec):
    op, cases = ops.OPS["attention_decode"]
    real = next(case for case in cases.CASES if case.name == "qwen3-0.6b.attention.b1.s512.n1")
    held = "" if spec == "bf16" else spec
    timed_op(
        op,
        cases,
        dataclasses.replace(real, name=f"qwen3-0.6b.attention.b1.s1024.n1.{spec}", spec=held, lengths=(1024,)),
        spec,
    )


@pytest.mark.bench
@pytest.mark.parametrize("spec", SPECS)
def test_prefill(timed_op, spec):
    op, cases = ops.OPS["attention_prefill"]
    case = next(case for case in cases.CASES if case.name == f"qwen3-0.6b.prefill.n512.s512.{spec}")
    timed_op(op, cases, case, spec, rounds=10)
