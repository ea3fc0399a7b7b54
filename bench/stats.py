"""Statistics of comparisons, written out because the package does without scipy: rank test, false discoveries, bootstrap.

    mann_whitney         are samples of B shifted against samples of A? (Mann and Whitney 1947)
    welch                the same by the means of logarithms, for samples too few for ranks to tell (Welch 1947)
    benjamini_hochberg   of many such questions, which answers stand at a false discovery rate (Benjamini, Hochberg 1995)
    median_ratios        bootstrap draws of median(B) / median(A) (percentile bootstrap, Efron 1979)

Times of one cell are neither normal nor free of outliers, so nothing here assumes that they are, except `welch`: three
ranks against three are the same in one of ten shuffles, however far apart. An outlier there widens the spread, which
makes the test more careful.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DRAWS = 2000
FEW = 8  # samples a side from which on the rank test is used
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
    if len(a) == 0 or len(b) == 0:
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


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of Welch's t-test on the logarithms of positive samples; 1.0 below two samples a side."""
    if min(len(a), len(b)) < 2:
        return 1.0
    sides = [np.log(np.asarray(side, dtype=np.float64)) for side in (a, b)]
    away = float(sides[1].mean() - sides[0].mean())
    parts = [float(side.var(ddof=1)) / len(side) for side in sides]
    variance = sum(parts)
    if variance <= 0:
        return 1.0 if away == 0 else 0.0
    freedom = variance**2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True))
    t2 = away**2 / variance
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t2))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22), Lentz's way."""
    if x <= 0 or x >= 1:
        return min(1.0, max(0.0, x))
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast below its mean; above, the symmetry
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    value = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d = 1 / ((1 + step * d) or tiny)
            c = (1 + step / c) or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value


def shifted(a: Sequence[float], b: Sequence[float]) -> float:
    """The p-value of a comparison: ranks from 8 samples a side on, means of logarithms below.

    Eight against eight reach 2 / 12870, which still stands among 300 cells of which one has changed; seven against seven
    do not. The choice looks at the counts only, never at the values.
    """
    return mann_whitney(a, b) if min(len(a), len(b)) >= FEW else welch(a, b)


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
