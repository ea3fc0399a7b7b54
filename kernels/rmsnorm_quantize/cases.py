"""What rmsnorm_quantize is tested, tuned and timed at. A case with `bias` has a residual; n is 0, there is no product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..inspection import Expect
from ..shapes import DECODE, LAYERS, PREFILL, Case, activations, empty, generator, small

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6


def tiny(m: int, k: int, dtype: torch.dtype, residual: bool = False) -> Case:
    case = small(m, 0, k, dtype=dtype, bias=residual)
    return replace(case, name=case.name.replace("bias", "residual"))


SMALL = (
    tiny(1, 1, FP16),
    tiny(1, 128, BF16, residual=True),
    tiny(3, 37, FP16, residual=True),
    tiny(5, 1024, FP32),
    tiny(16, 129, BF16),
    tiny(17, 4096, FP16, residual=True),
    tiny(32, 1031, FP32, residual=True),
    tiny(2, 51200, FP16, residual=True),
)
# qkv and gate_up read the hidden state: one width for each model, with the residual as in all blocks but the first.
REAL = tuple(
    Case(f"{model}.k{layers['qkv'][1]}.{batch}.residual", m, 0, layers["qkv"][1], bias=True, small=False)
    for model, layers in LAYERS.items()
    if "qkv" in layers
    for batch, m in [(f"decode.b{m}", m) for m in DECODE] + [(f"prefill.t{m}", m) for m in PREFILL]
)
CASES = SMALL + REAL


def inputs(case: Case, seed: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor | None]:
    """The op's arguments for a case, random in `seed`."""
    random = generator(case, seed, device)
    x = activations(case, random)
    weight = (1 + 0.2 * torch.randn(case.k, generator=random, device=random.device)).to(case.dtype)
    return x, weight, EPS, activations(case, random) if case.bias else None


def blank(case: Case) -> tuple[Any, ...]:
    """The flat arguments of a case without data, as the Triton body takes them."""
    x = empty(case.m, case.k, dtype=case.dtype)
    return x, empty(case.k, dtype=case.dtype), torch.empty_like(x) if case.bias else None, EPS


EXPECT = Expect(
    quick=(
        Case("qwen3-8b.k4096.decode.b1.residual", 1, 0, 4096, "", bias=True, small=False),
        Case("qwen3-32b.k5120.decode.b1.residual", 1, 0, 5120, "", bias=True, small=False),
        Case("longer.k16384.decode.b1.residual", 1, 0, 16384, "", bias=True, small=False),
    ),
    specs=("",),
    dtypes=(BF16, FP16, FP32),
    mma={"sm_80": "", "sm_89": "", "sm_90": "", "sm_100": ""},
    weight_operand={"sm_80": "none", "sm_89": "none", "sm_90": "none", "sm_100": "none"},
    ceilings={"sm_80": {}, "sm_89": {}, "sm_90": {}, "sm_100": {}},
)
