"""attention_prefill: bodies against the reference over every kind of page, cuts of a prompt, bits, refusals.

Triton's bodies run on a card, or in its interpreter: test_in_the_interpreter starts this file again in a process of its own.
The interpreter computes on the bits of bf16, so bf16 is left to the card.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from percard.formats import kvcache
from percard.kernels import op
from percard.kernels.attention_prefill import cases
from percard.kernels.conformance import answer, faults

from .conftest import only, unserved

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OP = "attention_prefill"


def call(body: Any, seed: int, *case: Any) -> tuple[Any, ...]:
    return cases.inputs(cases.small(*case), seed, body.where)


@only(OP)
def test_small_cases(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in cases.SMALL:
        if not unserved(body, case.dtype):
            with subtests.test(case.name):
                assert faults(body.op, body.name, cases.inputs(case, seed, body.where)) == [], (
                    f"{case.name}, seed {seed}"
                )


@pytest.mark.gpu
@only(OP)
def test_real_cases_on_a_card(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in cases.REAL:
        if case.heads <= 16:  # the reference holds all scores
            with subtests.test(case.name):
                assert faults(body.op, body.name, cases.inputs(case, seed, body.where)) == []


@only(OP)
@pytest.mark.parametrize("form", kvcache.SPECS)
def test_a_prompt_in_pieces_has_the_bits_of_the_whole(body: Any, form: str, seed: int) -> None:
    """A second chunk over a quantised prefix equals one pass: a token's sums do not know where its chunk began."""
    q, pages, table, lengths, starts, _, keys = call(body, seed, (300,), (300,), 4, 2, 64, FP16, form)[:7]
    whole = answer(body.op, body.name, (q, pages, table, lengths, starts, 300, keys))[0]
    for first, last in ((0, 100), (100, 133), (133, 300)):
        ends = torch.tensor([last], dtype=torch.int32, device=q.device)
        got = answer(body.op, body.name, (q[first:last], pages, table, ends, None, last - first, keys))[0]
        if body.name == "cpu":
            assert torch.equal(got, whole[first:last])
        assert torch.allclose(got.float(), whole[first:last].float(), atol=2e-2)


@only(OP)
@pytest.mark.parametrize("group", [1, 4, 5, 6, 7, 8, 16])
def test_groups(body: Any, group: int, seed: int) -> None:
    assert faults(body.op, body.name, call(body, seed, (19,), (70,), group, 1, 64, FP16, "int8")) == []


@only(OP)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_sizes_of_heads(body: Any, size: int, seed: int) -> None:
    for form in ("bf16", "int8", "int4"):
        assert faults(body.op, body.name, call(body, seed, (21,), (50,), 4, 2, size, FP16, form)) == []


@only(OP)
def test_the_same_bits_every_time_and_on_every_isa(body: Any, seed: int) -> None:
    for case in (c for c in cases.SMALL if c.dtype == FP16):
        args = cases.inputs(case, seed, body.where)
        first = answer(body.op, body.name, args)
        again = answer(body.op, body.name, args)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), case.name
        if body.name == "cpu":
            before = op.native().isa()
            op.native().force_isa("scalar")
            other = answer(body.op, body.name, args)
            op.native().force_isa(before)
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), case.name
        if INTERPRETED:
            return
