"""Rotary position embedding: frequencies of the known rope types, and the table of cos and sin.

default  Su et al. 2021, https://arxiv.org/abs/2104.09864
linear   position interpolation, Chen et al. 2023, https://arxiv.org/abs/2306.15595
llama3   the three bands of Llama 3.1, https://arxiv.org/abs/2407.21783
yarn     Peng et al. 2023, https://arxiv.org/abs/2309.00071
"""

from __future__ import annotations

import math

import torch

from .config import Rope


def frequencies(rope: Rope, head_dim: int) -> tuple[torch.Tensor, float]:
    """Angle per position, fp32 [head_dim/2], and the factor on cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    base = 1.0 / rope.theta**exponents
    n = dict(rope.numbers)
    if rope.type == "linear":
        return base / n["factor"], 1.0
    if rope.type == "llama3":
        # Long waves are stretched by the factor, short ones kept, those between blended by their turns in the context.
        turns = n["original_max_position_embeddings"] * base / (2 * math.pi)
        keep = (turns - n["low_freq_factor"]) / (n["high_freq_factor"] - n["low_freq_factor"])
        return _blend(base, n["factor"], keep.clamp(0, 1)), 1.0
    if rope.type == "yarn":
        length, last = n["original_max_position_embeddings"], head_dim - 1

        def dimension(turns: float) -> float:
            """The dimension (a real number) whose wave turns that often in the trained context."""
            return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

        low, high = max(math.floor(dimension(n["beta_fast"])), 0), min(math.ceil(dimension(n["beta_slow"])), last)
        ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
        scale = rope.attention_factor
        if scale is None:
            scale = 0.1 * math.log(n["factor"]) + 1.0 if n["factor"] > 1 else 1.0
        return _blend(base, n["factor"], 1 - ramp.clamp(0, 1)), scale
    return base, 1.0


def _blend(base: torch.Tensor, factor: float, keep: torch.Tensor) -> torch.Tensor:
    """Frequencies kept where `keep` is 1, divided by `factor` where it is 0."""
    return keep * base + (1 - keep) * base / factor


def table(rope: Rope, head_dim: int, length: int, device: torch.device) -> torch.Tensor:
    """cos and sin of positions 0 .. length-1, fp32 [length, head_dim]: head_dim/2 cosines, then as many sines."""
    inverse, scale = frequencies(rope, head_dim)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse  # [length, head_dim/2]
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=1).to(device)


def spread(cos_sin: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a table for whole heads: cos and signed sin, each [T, 1, head_dim] in `dtype`.

    The first half of sin carries the minus sign of rotate_half, so that a rotation is
    x * cos + roll(x, head_dim / 2) * sin: three calls instead of six.
    """
    cos, sin = cos_sin.chunk(2, dim=1)
    return torch.cat((cos, cos), 1).to(dtype)[:, None], torch.cat((-sin, sin), 1).to(dtype)[:, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [..., heads, head_dim] turned by its position; cos and sin broadcast over heads."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
