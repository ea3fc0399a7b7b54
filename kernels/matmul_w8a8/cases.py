"""What matmul_w8a8 is tested, tuned and timed at."""

from __future__ import annotations

from typing import Any

import torch

from ..shapes import Case, bias, generator, int8_rows, real, small, weight

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
