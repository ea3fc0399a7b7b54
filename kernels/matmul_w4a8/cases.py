"""What matmul_w4a8 is tested, tuned and timed at."""

from __future__ import annotations

from typing import Any

import torch

from ..inspection import Expect
from ..shapes import Case, bias, blank_weight, empty, generator, int8_rows, real, small, weight
from . import contract

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SMALL = (
    small(1, 1, 1, "w4a8", FP16),
    small(1, 64, 128, "w4a8-g128", BF16),
    small(3, 37, 53, "w4a8", FP16, bias=True),
    small(2, 70, 96, "w4a8-g32", FP32),
    small(5, 127, 61, "w4a8", FP32),
    small(7, 33, 192, "w4a8-g64", FP16, bias=True),
    small(15, 129, 384, "w4a8-g128", FP16),
    small(16, 64, 256, "w4a8-g64", BF16, bias=True),
    small(17, 131, 160, "w4a8-g32", FP16),
    small(33, 65, 320, "w4a8-g64", FP32, bias=True),
    small(63, 191, 512, "w4a8-g128", FP16),
    small(65, 96, 257, "w4a8", FP16),
    small(129, 64, 128, "w4a8-g128", FP16),
    small(1, 16, 4096, "w4a8", FP16),
)
CASES = SMALL + real("w4a8") + real("w4a8-g128", ".g128", ("qwen3-8b",)) + real("w4a8-g64", ".g64", ("qwen3-0.6b",))


def inputs(case: Case, seed: int, device: str = "cpu") -> tuple[Any, ...]:
    """The op's arguments for a case, random in `seed`; the weight is plain."""
    random = generator(case, seed, device)
    xq, sx, xsum = int8_rows(case, random)
    return xq, sx, xsum, weight(case, random), bias(case, random), case.dtype


def blank(case: Case) -> tuple[Any, ...]:
    """The flat arguments of a case without data, as the Triton body takes them."""
    xq, sx = empty(case.m, case.k, dtype=torch.int8), empty(case.m)
    xsum = empty(case.m, dtype=torch.int32)
    bias = empty(case.n) if case.bias else None
    return contract.unwrap(xq, sx, xsum, blank_weight(case, "planes8_w4"), bias, case.dtype)


EXPECT = Expect(
    quick=(
        Case("qwen3-8b.o.decode.b1", 1, 4096, 4096, "w4a8", small=False),
        Case("qwen3-8b.o.decode.b1.g128", 1, 4096, 4096, "w4a8-g128", small=False),
        Case("qwen3-8b.o.prefill.t4096", 4096, 4096, 4096, "w4a8", small=False),
    ),
    specs=("w4a8", "w4a8-g128", "w4a8-g64", "w4a8-g32"),
    dtypes=(BF16,),
    mma={"sm_80": "IMMA", "sm_89": "IMMA", "sm_90": "IGMMA", "sm_100": "UTCIMMA", "sm_100 3.6": "IMMA"},
    weight_operand={
        "sm_80": "registers",
        "sm_89": "registers",
        "sm_90": "registers",
        "sm_100": "tensor memory",
        "sm_100 3.6": "registers",
    },
    ceilings={
        "sm_80": {16: (1.4, 1.8, 2.5), 32: (1.9, 2.5, 3.7), 64: (3.3, 4.6), 128: (2.8,)},
        "sm_89": {16: (1.4, 1.8, 2.5), 32: (1.9, 2.5, 3.7), 64: (3.3, 4.6), 128: (2.8,)},
        "sm_90": {16: (1.7, 2.0, 2.9), 32: (1.9, 2.5, 3.9), 64: (3.2, 4.4), 128: (1.9,)},
        "sm_100": {16: (1.9, 2.2, 3.3), 32: (2.1, 2.7, 4.1), 64: (3.8, 4.5)},
        "sm_100 3.6": {16: (1.4, 1.6, 2.2), 32: (1.7, 2.3, 3.3), 64: (3.1, 4.2)},
    },
)
