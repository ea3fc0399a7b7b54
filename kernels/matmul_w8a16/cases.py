"""What matmul_w8a16 is tested, tuned and timed at."""

from __future__ import annotations

from typing import Any

import torch

from ..inspection import Expect
from ..shapes import Case, activations, bias, blank_weight, empty, generator, real, small, weight
from . import contract

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SMALL = (
    small(1, 1, 1, "w8a16", FP16),
    small(1, 64, 128, "w8a16-g128", BF16),
    small(3, 37, 53, "w8a16", FP16, bias=True),
    small(2, 70, 96, "w8a16-g32", FP32),
    small(5, 127, 61, "w8a16-asym", FP16),
    small(7, 33, 192, "w8a16-g64", FP16, bias=True),
    small(15, 129, 384, "w8a16-g128-asym", FP16),
    small(16, 64, 256, "w8a16-g64-asym", BF16, bias=True),
    small(17, 131, 160, "w8a16-g32-asym", FP16),
    small(33, 65, 320, "w8a16-g64", FP32, bias=True),
    small(63, 191, 512, "w8a16-g128", FP16),
    small(65, 96, 257, "w8a16", FP16),
    small(129, 64, 128, "w8a16-g128", FP16),
    small(129, 64, 384, "w8a16-g64-asym", BF16),
    small(1, 16, 4096, "w8a16", FP16),
)
CASES = SMALL + real("w8a16") + real("w8a16-g128", ".g128", ("qwen3-0.6b", "qwen3-8b"))


def inputs(case: Case, seed: int, device: str = "cpu") -> tuple[Any, ...]:
    """The op's arguments for a case, random in `seed`; the weight is plain."""
    random = generator(case, seed, device)
    return activations(case, random), weight(case, random), bias(case, random)


def blank(case: Case) -> tuple[Any, ...]:
    """The flat arguments of a case without data, as the Triton body takes them."""
    x = empty(case.m, case.k, dtype=case.dtype)
    return contract.unwrap(x, blank_weight(case, "planes16_w8"), empty(case.n) if case.bias else None)


EXPECT = Expect(
    quick=(
        Case("qwen3-8b.o.decode.b1", 1, 4096, 4096, "w8a16", small=False),
        Case("qwen3-8b.o.decode.b1.g128", 1, 4096, 4096, "w8a16-g128", small=False),
        Case("qwen3-8b.o.decode.b1.g128.asym.fp16", 1, 4096, 4096, "w8a16-g128-asym", FP16, small=False),
        Case("qwen3-8b.gate_up.decode.b64", 64, 24576, 4096, "w8a16", small=False),
        Case("qwen3-8b.o.prefill.t512", 512, 4096, 4096, "w8a16", small=False),
        Case("qwen3-8b.o.prefill.t4096", 4096, 4096, 4096, "w8a16", small=False),
    ),
    specs=("w8a16", "w8a16-g128", "w8a16-g64", "w8a16-g32", "w8a16-asym", "w8a16-g32-asym"),
    dtypes=(BF16, FP16),
    mma={"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"},
    weight_operand={"sm_80": "registers", "sm_89": "registers", "sm_90": "registers", "sm_100": "tensor memory"},
    ceilings={  # groups of 128 and rows, 64, 32; the worst of symmetric and asymmetric
        "sm_80": {16: (3.7, 3.3, 4.8), 32: (4.2, 3.9, 5.6), 64: (6.3, 6.8, 9.1)},
        "sm_89": {16: (3.7, 3.3, 4.8), 32: (4.2, 3.9, 5.6), 64: (6.3, 6.8, 9.1)},
        "sm_90": {16: (3.8, 3.5, 5.1), 32: (4.0, 3.8, 5.6), 64: (5.5, 6.2, 8.6), 128: (5.9, 5.9, 6.8)},
        "sm_100": {16: (4.1, 3.8, 5.5), 32: (4.4, 4.2, 6.3), 64: (6.9, 7.5, 10.5)},
    },
)
