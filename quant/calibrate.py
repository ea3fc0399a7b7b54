"""Activation statistics of one block: what a text says about the input of each linear, as the methods read it.

Rows are added batch by batch in a fixed order, sums are fp32 (a matrix product of any other precision would round the
small eigenvalues away that a Cholesky factor lives on), and the sample is drawn by seeded keys: the same text gives the
same bytes.
"""

from __future__ import annotations

import torch

from ..formats.spec import FormatError
from .methods.records import Stats

SAMPLE = 512  # rows kept of each input
_TILE = 1024  # columns of a gram's tile: only tiles on and above the diagonal are multiplied


class Collector:
    """Statistics of an input of K features; `add` takes [..., K] of any float dtype."""

    def __init__(self, k: int, seed: int, device: torch.device | str = "cpu", gram: bool = True) -> None:
        self.k, self.tokens = k, 0
        self._gram = torch.zeros(k, k, device=device) if gram else None
        self._absmax = torch.zeros(k, device=device)
        self._abssum = torch.zeros(k, dtype=torch.float64, device=device)
        self._sample = torch.zeros(0, k, device=device)
        self._keys = torch.zeros(0)
        self._random = torch.Generator().manual_seed(seed)

    def add(self, x: torch.Tensor) -> None:
        """FormatError for NaN or Inf, which no statistic survives."""
        rows = x.reshape(-1, self.k).float()
        if not rows.shape[0]:
            return
        largest = rows.abs()
        peak = largest.amax(dim=0)
        if not bool(torch.isfinite(peak).all()):
            first = int((~torch.isfinite(rows)).any(dim=1).nonzero()[0])
            raise FormatError(f"activations hold NaN or Inf (token {self.tokens + first} of the calibration text)")
        torch.maximum(self._absmax, peak, out=self._absmax)
        self._abssum += largest.sum(dim=0, dtype=torch.float64)
        if self._gram is not None:
            add_gram(self._gram, rows)
        self._draw(rows)
        self.tokens += rows.shape[0]

    def _draw(self, rows: torch.Tensor) -> None:
        """Keeps the SAMPLE rows with the smallest random keys: an even draw, whatever the size of the batches."""
        keys = torch.rand(rows.shape[0], generator=self._random)
        if len(self._keys) == SAMPLE:
            near = (keys < self._keys.max()).nonzero()[:, 0]
            rows, keys = rows[near], keys[near]
        both = torch.cat([self._keys, keys])
        keep = both.argsort(stable=True)[:SAMPLE]
        self._sample = torch.cat([self._sample, rows])[keep]
        self._keys = both[keep]

    def stats(self) -> Stats:
        """What was seen so far."""
        gram = torch.zeros(0, 0) if self._gram is None else mirror(self._gram)
        mean = (self._abssum / max(self.tokens, 1)).float()
        return Stats(gram, self._absmax.clone(), mean, self._sample.clone(), self.tokens)


def add_gram(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """gram [K, K] += rows^T rows, upper triangle by tiles (what lies below is made by `mirror`)."""
    k = gram.shape[0]
    for i in range(0, k, _TILE):
        left = rows[:, i : i + _TILE].T
        gram[i : i + _TILE, i:].addmm_(left, rows[:, i:])


def mirror(gram: torch.Tensor) -> torch.Tensor:
    """The whole of a symmetric matrix whose upper triangle is right, as a new tensor."""
    return torch.triu(gram) + torch.triu(gram, 1).T


def blended(routed: Stats, mean: Stats, weight: float) -> Stats:
    """An expert's statistics when `weight` tokens of the mean over `mean.tokens` tokens are added to the routed ones."""
    share = weight / max(mean.tokens, 1)
    tokens = routed.tokens + weight
    absmean = (routed.absmean * routed.tokens + mean.absmean * weight) / max(tokens, 1)
    sample = torch.cat([routed.sample, mean.sample])[:SAMPLE]
    return Stats(
        routed.gram + mean.gram * share, torch.maximum(routed.absmax, mean.absmax), absmean, sample, round(tokens)
    )
