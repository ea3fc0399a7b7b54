"""What matmul_w4a8 is tested, tuned and timed at."""

from __future__ import annotations

from typing import Any

import torch

from ..shapes import Case, bias, generator, int8_rows, real, small, weight

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
