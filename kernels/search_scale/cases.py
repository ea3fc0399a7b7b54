"""What search_scale is tested and timed at. A case's m is 0: there is no activation; its dtype is the scales'."""

from __future__ import annotations

import torch

from ...formats.spec import QuantSpec
from ..shapes import LAYERS, Case, generator, small

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SMALL = (
    small(0, 0, 128, "w4a16-g128", BF16),
    small(0, 1, 1, "w8a8", FP32),
    small(0, 3, 37, "w8a8", FP32),
    small(0, 5, 61, "w4a16", FP16),
    small(0, 7, 128, "w3a16-g64", BF16),
    small(0, 17, 96, "w4a16-g32-asym", FP16),
    small(0, 33, 256, "w4a16-g128", BF16),
    small(0, 31, 384, "w4a16-g128-asym", BF16),
    small(0, 16, 512, "w8a16-g128", FP16),
    small(0, 64, 1031, "w8a16", BF16),
)
REAL = tuple(
    Case(f"{model}.{layer}.{spec}", 0, n, k, spec, dtype, small=False)
    for model, layers in LAYERS.items()
    for layer, (n, k) in layers.items()
    for spec, dtype in (("w4a16-g128", BF16), ("w8a8", FP32))
)
CASES = SMALL + REAL


def inputs(case: Case, seed: int, device: str = "cpu") -> tuple[torch.Tensor, QuantSpec, torch.dtype, float]:
    """The op's arguments for a case, random in `seed`: normal weights with a few that stand out, one row of zeros."""
    random = generator(case, seed, device)
    w = torch.randn(case.n, case.k, generator=random, device=device) * 0.02
    outliers = torch.rand(case.n, case.k, generator=random, device=device) < 0.005
    w = torch.where(outliers, 8 * w, w)
    w[case.n // 2 : case.n // 2 + 1] = 0  # a row of zeros has scale 1
    return w, QuantSpec.parse(case.spec), case.dtype, 2.4 if case.name.endswith("asym.fp16") else 2.0
