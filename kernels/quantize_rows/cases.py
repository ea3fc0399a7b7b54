"""What quantize_rows is tested, tuned and timed at."""

from __future__ import annotations

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
    small(17, 0, 4096, dtype=FP16),
    small(32, 0, 1031, dtype=FP16),
)
# The inputs of a layer are as wide as its K; layers of one model share widths.
REAL = tuple(
    Case(f"{model}.k{k}.{batch}", m, 0, k, small=False)
    for model, layers in LAYERS.items()
    for k in sorted({k for _, k in layers.values()})
    for batch, m in [(f"decode.b{m}", m) for m in DECODE] + [(f"prefill.t{m}", m) for m in PREFILL]
)
CASES = SMALL + REAL


def inputs(case: Case, seed: int, device: str = "cpu") -> tuple[torch.Tensor]:
    """The op's arguments for a case, random in `seed`."""
    return (activations(case, generator(case, seed, device)),)


def blank(case: Case) -> tuple[Any, ...]:
    """The flat arguments of a case without data, as the Triton body takes them."""
    return (empty(case.m, case.k, dtype=case.dtype),)


EXPECT = Expect(
    quick=(Case("qwen3-8b.k4096.decode.b1", 1, 0, 4096, "", small=False),),
    specs=("",),
    dtypes=(BF16, FP16, FP32),
    mma={"sm_80": "", "sm_89": "", "sm_90": "", "sm_100": ""},
    weight_operand={"sm_80": "none", "sm_89": "none", "sm_90": "none", "sm_100": "none"},
    ceilings={"sm_80": {}, "sm_89": {}, "sm_90": {}, "sm_100": {}},
)
