"""What silu_mul_quantize is tested, tuned and timed at. k is I, the width of the result; x has 2 I columns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..inspection import Expect
from ..shapes import DECODE, LAYERS, PREFILL, Case, activations, empty, generator, small

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SMALL = (
    small(1, 0, 1, dtype=FP16),
    small(1, 0, 128, dtype=BF16),
    small(3, 0, 37, dtype=FP16),
    small(5, 0, 1024, dtype=FP32),
    small(16, 0, 129, dtype=BF16),
    small(17, 0, 3072, dtype=FP16),
    small(32, 0, 1031, dtype=FP32),
    small(2, 0, 51200, dtype=FP16),
)
REAL = tuple(
    Case(f"{model}.k{layers['down'][1]}.{batch}", m, 0, layers["down"][1], small=False)
    for model, layers in LAYERS.items()
    if "down" in layers
    for batch, m in [(f"decode.b{m}", m) for m in DECODE] + [(f"prefill.t{m}", m) for m in PREFILL]
)
CASES = SMALL + REAL


def inputs(case: Case, seed: int, device: str = "cpu") -> tuple[torch.Tensor]:
    """The op's arguments for a case, random in `seed`."""
    return (activations(replace(case, k=2 * case.k), generator(case, seed, device)),)


def blank(case: Case) -> tuple[Any, ...]:
    """The flat arguments of a case without data, as the Triton body takes them."""
    return (empty(case.m, 2 * case.k, dtype=case.dtype),)


EXPECT = Expect(
    quick=(
        Case("qwen3-8b.k12288.decode.b1", 1, 0, 12288, "", small=False),
        Case("qwen3-0.6b.k3072.decode.b1", 1, 0, 3072, "", small=False),
    ),
    specs=("",),
    dtypes=(BF16, FP16, FP32),
    mma={"sm_80": "", "sm_89": "", "sm_90": "", "sm_100": ""},
    weight_operand={"sm_80": "none", "sm_89": "none", "sm_90": "none", "sm_100": "none"},
    ceilings={"sm_80": {}, "sm_89": {}, "sm_90": {}, "sm_100": {}},
)
