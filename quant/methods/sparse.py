"""Masks: which weights of a matrix become zero. magnitude, Wanda (arXiv 2306.11695), SparseGPT (arXiv 2301.00774).

    magnitude   |w|                         compared over the whole matrix; needs no text
    wanda       |w| * sqrt(mean x^2)        compared within each output row; no weight changes
    sparsegpt   w^2 / U[i, i]^2             U: upper Cholesky factor of the inverse of H = 2 / tokens * sum x x^T + damp;
                                            compared over blocks of 128 columns, and later columns make good for the error

A pattern n:m zeroes m - n of every m neighbours in a row instead of a share. No engine of today serves such a file faster: zeros
are stored like other numbers (docs/prune.md). They are for study, and a start for training.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ...formats.spec import FormatError

METHODS = ("magnitude", "wanda", "sparsegpt")
BLOCK = 128  # columns of SparseGPT's mask
DAMP = 0.01  # of the mean of H's diagonal


@dataclass(frozen=True)
class Pattern:
    """A share of zeros, or n:m (`keep` of each `of`)."""

    share: float
    keep: int = 0
    of: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """ "0.5" or "2:4"; FormatError for anything else."""
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if found:
            keep, of = int(found[1]), int(found[2])
            if 0 < keep < of <= 64:
                return cls(1 - keep / of, keep, of)
        else:
            try:
                share = float(text)
            except ValueError:
                share = -1.0
            if 0 < share < 1:
                return cls(share)
        raise FormatError(f"sparsity {text!r}: expected a share of zeros such as 0.5, or a pattern such as 2:4")

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.of else f"{self.share:g}"

    def fits(self, columns: int) -> bool:
        """Whether rows of so many columns can be cut into its groups."""
        return not self.of or columns % self.of == 0


def lowest(scores: torch.Tensor, pattern: Pattern, whole: bool = False) -> torch.Tensor:
    """bool [N, K], True = becomes zero: the lowest of each row (of the matrix with `whole`), or of each group of n:m.

    Exactly the share that was asked for, rounded down; of equal scores the first.
    """
    if pattern.of:
        groups = scores.unflatten(1, (-1, pattern.of))
        order = groups.sort(dim=2, stable=True).indices[..., : pattern.of - pattern.keep]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True).flatten(1)
    flat = scores.reshape(1, -1) if whole else scores
    order = flat.sort(dim=1, stable=True).indices[:, : int(pattern.share * flat.shape[1])]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True).view(scores.shape)


def magnitude(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The mask [N, K] of weight fp32 [N, K]."""
    return lowest(weight.abs(), pattern, whole=True)


def wanda(weight: torch.Tensor, mean_square: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The mask [N, K]; mean_square fp32 [K] of the inputs."""
    return lowest(weight.abs() * mean_square.sqrt(), pattern)


def sparsegpt(
    weight: torch.Tensor, gram: torch.Tensor, tokens: int, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """(new weight fp32 [N, K] with zeros, mask [N, K]); gram fp32 [K, K] = sum x x^T over `tokens`."""
    weight, columns = weight.clone(), weight.shape[1]
    h = gram.double() * (2 / max(tokens, 1))
    dead = h.diagonal() <= 0
    weight[:, dead] = 0
    h.diagonal()[dead] = 1
    h.diagonal().add_(DAMP * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    step = BLOCK if not pattern.of else max(BLOCK // pattern.of, 1) * pattern.of
    for start in range(0, columns, step):
        stop = min(columns, start + step)
        part, u = weight[:, start:stop].clone(), upper[start:stop, start:stop]
        zero = torch.zeros_like(part, dtype=torch.bool)
        if not pattern.of:
            zero = lowest((part / u.diagonal()).square(), pattern, whole=True)
        errors = torch.zeros_like(part)
        for i in range(stop - start):
            if pattern.of and i % pattern.of == 0:
                group = slice(i, i + pattern.of)
                zero[:, group] = lowest((part[:, group] / u.diagonal()[group]).square(), pattern)
            error = torch.where(zero[:, i], part[:, i], 0.0) / u[i, i]
            part[:, i:] -= error[:, None] * u[i, i:]
            part[:, i].masked_fill_(zero[:, i], 0.0)
            errors[:, i] = error
        weight[:, start:stop] = part
        mask[:, start:stop] = zero
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight.masked_fill_(mask, 0.0), mask
