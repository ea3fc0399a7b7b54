"""Which experts a mixture misses least: REAP, router-weighted expert activation (arXiv 2510.13999).

S_j = mean over the tokens routed to expert j of g_j * |f_j(x)|, g_j the router's weight and f_j the expert's output; an expert
that no token was routed to has 0. Dropped per block, as many in each. Calibrate on the domain that will be served.
"""

from __future__ import annotations

import torch


class ExpertScore:
    """Adds up over tokens; `scores` fp64 [experts], `tokens` int64 [experts]."""

    def __init__(self, experts: int) -> None:
        self._sum = torch.zeros(experts, dtype=torch.float64)
        self.tokens = torch.zeros(experts, dtype=torch.int64)

    def add(self, expert: int, y: torch.Tensor, weight: torch.Tensor) -> None:
        """Output [T, H] of one expert for its own tokens, before the router's `weight` [T]."""
        self._sum[expert] += float((y.float().norm(dim=-1) * weight.float()).sum(dtype=torch.float64))
        self.tokens[expert] += len(y)

    @property
    def scores(self) -> torch.Tensor:
        return self._sum / self.tokens.clamp(min=1)
