"""Statistics of comparisons, written out because the package does without scipy: rank test, false discoveries, bootstrap.

    mann_whitney         are samples of B shifted against samples of A? (Mann and Whitney 1947)
    benjamini_hochberg   of many such questions, which answers stand at a false discovery rate (Benjamini, Hochberg 1995)
    median_ratios        bootstrap draws of median(B) / median(A) (percentile bootstrap, Efron 1979)

Times of one cell are neither normal nor free of outliers, so nothing here assumes that they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DRAWS = 2000
EXACT = 40  # samples of both sides up to which the rank test counts every arrangement


def midranks(values: Sequence[float]) -> np.ndarray:
    """Twice the rank of each value, equal ones sharing the mean of their ranks: int64 [n], so that halves stay whole."""
    array = np.asarray(values, dtype=np.float64)
    ordered = np.sort(array)
    first, behind = np.searchsorted(ordered, array, "left"), np.searchsorted(ordered, array, "right")
    return (first + behind + 1).astype(np.int64)


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of the rank test of two samples; 1.0 when one of them is empty.

    Up to 40 samples in all it is exact, ties included: of all ways to hand the ranks to the two sides, the share whose
    rank sum is as extreme. Above, the normal approximation with the correction for ties and for continuity.
    """
    if not a or not b:
        return 1.0
    ranks = midranks([*a, *b])
    seen = int(ranks[: len(a)].sum())
    if len(ranks) <= EXACT:
        counts = _rank_sums(ranks, len(a))
        total = sum(counts)
        return min(1.0, 2 * min(sum(counts[: seen + 1]), sum(counts[seen:])) / total)
    n, m = len(a), len(b)
    size = n + m
    groups = np.unique(ranks, return_counts=True)[1].astype(np.float64)
    variance = n * m / 12 * (size + 1 - float((groups**3 - groups).sum()) / (size * (size - 1)))
    if variance <= 0:
        return 1.0
    away = max(0.0, abs(seen / 2 - n * (size + 1) / 2) - 0.5)
    return math.erfc(away / math.sqrt(2 * variance))


def _rank_sums(ranks: np.ndarray, chosen: int) -> list[int]:
    """How many choices of `chosen` of the doubled ranks have each sum: exact whole numbers, index = sum."""
    top = int(ranks.sum())
    ways = np.zeros((chosen + 1, top + 1), dtype=object)  # of Python's integers: binomials of 40 outgrow a double
    ways[0, 0] = 1
    for done, rank in enumerate(int(r) for r in ranks):
        for k in range(min(chosen, done + 1), 0, -1):
            ways[k, rank:] += ways[k - 1, : top + 1 - rank]
    return list(ways[chosen])


def least_p(n: int, m: int) -> float:
    """The smallest p-value that so many samples can reach: both sides apart. Three and three never get below 0.1."""
    return min(1.0, 2 / math.comb(n + m, n)) if n and m else 1.0


def benjamini_hochberg(p_values: Sequence[float], rate: float = 0.05) -> list[bool]:
    """Which hypotheses fall when at most `rate` of those that fall may be false alarms: a flag for each p-value."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    last = max((k for k, i in enumerate(order, 1) if p_values[i] <= rate * k / len(order)), default=0)
    fallen = set(order[:last])
    return [i in fallen for i in range(len(p_values))]


def median_ratios(a: Sequence[float], b: Sequence[float], *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """median(b) / median(a) of `draws` bootstrap draws, each side drawn again from itself: float64 [draws]."""
    generator = np.random.default_rng(seed)
    sides = [np.asarray(side, dtype=np.float64) for side in (a, b)]
    medians = [np.median(side[generator.integers(0, len(side), (draws, len(side)))], axis=1) for side in sides]
    return medians[1] / medians[0]


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of bootstrap draws."""
    lo, hi = np.quantile(draws, [0.025, 0.975])
    return float(lo), float(hi)


def geometric_mean(ratios: Sequence[float], draws: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """(mean, lo, hi) of ratios of several cells, with the interval from the bootstrap draws of each."""
    mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
    return (mean, *interval(np.exp(np.mean([np.log(d) for d in draws], axis=0))))
