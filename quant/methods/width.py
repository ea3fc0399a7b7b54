"""Which channels a decoder misses least, from what flows through them.

score_c = sqrt(sum over windows of (mean over tokens of |x_c|)^2), the activation score of Minitron (arXiv 2407.14679; the form is
that of NVIDIA Model Optimizer's mcore_minitron). x is what down_proj reads (ffn), what both norms of every block give (hidden),
or the L2 norm of a head's slice of what o_proj reads (heads).
"""

from __future__ import annotations

import torch


class ChannelScore:
    """Adds up over windows; scores fp64 [channels]. Which windows came together makes no difference."""

    def __init__(self, channels: int) -> None:
        self._squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        """x [windows, T, channels]."""
        self._squares += x.abs().mean(dim=1, dtype=torch.float64).square().sum(dim=0).cpu()

    @property
    def squares(self) -> torch.Tensor:
        """Of the scores: what may be summed over layers."""
        return self._squares.clone()

    @property
    def scores(self) -> torch.Tensor:
        return self._squares.sqrt()


def head_norms(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[..., heads * D] -> [..., heads]: the L2 norm of each head's slice, fp32."""
    return x.float().unflatten(-1, (-1, head_dim)).norm(dim=-1)


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices int64 [count] of the highest scores, sorted; of equal ones the first."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def heads_to_keep(
    scores: torch.Tensor, kv_heads: int, keep_kv: int, keep_per_group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(query heads, KV heads) that stay, sorted: the KV groups with the most in them, and in each its best query heads.

    scores fp64 [heads], heads of a group next to each other.
    """
    groups = scores.view(kv_heads, -1)
    kv = top(groups.square().sum(dim=1), keep_kv)
    query = [int(g) * groups.shape[1] + top(groups[g], keep_per_group) for g in kv]
    return torch.cat(query), kv
