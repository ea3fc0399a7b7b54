"""Which blocks a decoder misses least.

bi: block influence, 1 - mean cosine of a block's input and output (ShortGPT, arXiv 2403.03853): a block that hardly turns the
residual stream goes first. loss: cross-entropy of the text with the block skipped, exact, a pass for every block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

SCORES = ("bi", "loss")


class BlockInfluence:
    """Adds up over rows; `value` is 0 for a block that changes no direction, at most 2."""

    def __init__(self) -> None:
        self._sum, self._rows = 0.0, 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Input and output [..., H] of the block."""
        cosine = F.cosine_similarity(x.reshape(-1, x.shape[-1]).double(), y.reshape(-1, y.shape[-1]).double(), dim=-1)
        self._sum += float(cosine.sum())
        self._rows += cosine.numel()

    @property
    def value(self) -> float:
        return 1.0 - self._sum / max(self._rows, 1)


def lowest(scores: dict[int, float], spare: int) -> int:
    """The block to drop: the lowest score but for the first and last `spare` of those that are there; ties: the first."""
    blocks = sorted(scores)
    free = blocks[spare : len(blocks) - spare]
    if not free:
        raise ValueError(f"{len(blocks)} blocks are left, of which the first and last {spare} stay")
    return min(free, key=lambda i: (scores[i], i))
