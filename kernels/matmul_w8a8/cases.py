"""What matmul_w8a8 is tested, tuned and timed at."""

from __future__ import annotations

from typing import Any

import torch

from ..inspection import Expect
from ..shapes import Case, bias, blank_weight, empty, generator, int8_rows, real, small, weight
from . import contract

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SMALL = (
    small(1, 1, 1, "w8a8", FP16),
    small(1, 64, 128, "w8a8", BF16),
    small(3, 37, 53, "w8a8", FP16, bias=True),
    small(5, 127, 61, "w8a8", FP32),
    small(15, 65, 129, "w8a8", FP16),
    small(16, 128, 256, "w8a8", BF16, bias=True),
    small(17, 131, 257, "w8a8", FP16, bias=True),
    small(33, 96, 1031, "w8a8", FP32, bias=True),
    small(65, 191, 640, "w8a8", FP16),
    small(2, 16, 4096, "w8a8", FP16),
)
CASES = SMALL + real("w8a8")


def inputs(case: Case, seed: int, device: str = "cpu") -> tuple[Any, ...]:
    """The op's arguments for a case, random in `seed`; the weight is plain."""
    random = generator(case, seed, device)
    xq, sx, _ = int8_rows(case, random)
    return xq, sx, weight(case, random), bias(case, random), case.dtype


def blank(case: Case) -> tuple[Any, ...]:
    """The flat arguments of a case without data, as the Triton body takes them."""
    xq, sx = empty(case.m, case.k, dtype=torch.int8), empty(case.m)
    bias = empty(case.n) if case.bias else None
    return contract.unwrap(xq, sx, blank_weight(case, "rows8"), bias, case.dtype)


EXPECT = Expect(
    quick=(
        Case("qwen3-8b.o.decode.b1", 1, 4096, 4096, "w8a8", small=False),
        Case("qwen3-8b.o.prefill.t4096", 4096, 4096, 4096, "w8a8", small=False),
    ),
    specs=("w8a8",),
    dtypes=(BF16, FP16),
    mma={"sm_80": "IMMA", "sm_89": "IMMA", "sm_90": "IGMMA", "sm_100": "UTCIMMA", "sm_100 3.6": "IMMA"},
    weight_operand={
        "sm_80": "registers",
        "sm_89": "registers",
        "sm_90": "shared memory",
        "sm_100": "shared memory",
        "sm_100 3.6": "registers",
    },
    ceilings={
        "sm_80": {16: (0.7,), 32: (0.9,), 64: (1.8,), 128: (2.6,)},
        "sm_89": {16: (0.7,), 32: (0.9,), 64: (1.8,), 128: (2.6,)},
        "sm_90": {16: (1.0,), 32: (1.0,), 64: (1.7,), 128: (2.2,), 256: (2.4,)},
        "sm_100": {16: (1.0,), 32: (1.1,), 64: (2.1,), 128: (2.4,)},
        "sm_100 3.6": {16: (0.7,), 32: (0.9,), 64: (1.7,), 128: (2.6,)},
    },
)
