"""What matmul_w4a16 is tested, tuned and timed at."""

from __future__ import annotations

from typing import Any

import torch

from ..inspection import Expect
from ..shapes import Case, activations, bias, blank_weight, empty, generator, real, small, weight
from . import contract

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SMALL = (
    small(1, 1, 1, "w4a16", FP16),
    small(1, 64, 128, "w4a16-g128", BF16),
    small(3, 37, 53, "w4a16", FP16, bias=True),
    small(2, 70, 96, "w4a16-g32", FP32),
    small(5, 127, 61, "w4a16-asym", FP16),
    small(7, 33, 192, "w4a16-g64", FP16, bias=True),
    small(15, 129, 384, "w4a16-g128-asym", FP16),
    small(16, 64, 256, "w4a16-g64-asym", BF16, bias=True),
    small(17, 131, 160, "w4a16-g32-asym", FP16),
    small(33, 65, 320, "w4a16-g64", FP32, bias=True),
    small(63, 191, 512, "w4a16-g128", FP16),
    small(65, 96, 257, "w4a16", FP16),
    small(129, 64, 128, "w4a16-g128", FP16),
    small(129, 64, 384, "w4a16-g64-asym", BF16),
    small(1, 16, 4096, "w4a16-g128", FP16),
)
CASES = SMALL + real("w4a16-g128") + real("w4a16-g64", ".g64", ("qwen3-0.6b",))


def inputs(case: Case, seed: int, device: str = "cpu") -> tuple[Any, ...]:
    """The op's arguments for a case, random in `seed`; the weight is plain."""
    random = generator(case, seed, device)
    return activations(case, random), weight(case, random), bias(case, random)


def blank(case: Case) -> tuple[Any, ...]:
    """The flat arguments of a case without data, as the Triton body takes them."""
    x = empty(case.m, case.k, dtype=case.dtype)
    bias = empty(case.n) if case.bias else None
    return contract.unwrap(x, blank_weight(case, "planes16_w4"), bias)


EXPECT = Expect(
    quick=(
        Case("qwen3-8b.o.decode.b1", 1, 4096, 4096, "w4a16-g128", small=False),
        Case("qwen3-8b.o.decode.b1.fp16", 1, 4096, 4096, "w4a16-g128", FP16, small=False),
        Case("qwen3-8b.gate_up.decode.b64", 64, 24576, 4096, "w4a16-g128", small=False),
        Case("qwen3-8b.o.prefill.t512", 512, 4096, 4096, "w4a16-g128", small=False),
        Case("qwen3-8b.o.prefill.t4096", 4096, 4096, 4096, "w4a16-g128", small=False),
    ),
    specs=("w4a16-g128", "w4a16-g64", "w4a16-g32", "w4a16"),
    dtypes=(BF16, FP16),
    mma={"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"},
    weight_operand={"sm_80": "registers", "sm_89": "registers", "sm_90": "registers", "sm_100": "tensor memory"},
    ceilings={
        "sm_80": {16: (2.5, 2.8, 3.7), 32: (2.9, 3.4, 4.5), 64: (4.9, 5.9, 8.1), 128: (6.4, 6.8, 7.5)},
        "sm_89": {16: (2.5, 2.8, 3.7), 32: (2.9, 3.4, 4.5), 64: (4.9, 5.9, 8.1), 128: (6.4, 6.8, 7.5)},
        "sm_90": {16: (2.7, 3.1, 4.0), 32: (2.9, 3.3, 4.5), 64: (4.6, 5.5, 7.4), 128: (4.7, 5.0, 5.6)},
        "sm_100": {16: (3.6, 3.8, 4.4), 32: (3.8, 4.2, 5.3), 64: (6.1, 7.4, 9.5)},
        "sm_100 3.6": {16: (3.6, 3.9, 4.5), 32: (3.8, 4.3, 5.2), 64: (6.5, 7.7, 9.6)},
    },
)
