"""The statistics of comparisons against figures that scipy 1.17 gives, and against what must hold for any samples."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from percard.bench import stats


@pytest.mark.parametrize(
    ("a", "b", "p"),
    [
        # scipy.stats.mannwhitneyu(method="exact")
        ([1, 2, 3], [4, 5, 6], 0.1),
        ([19, 22, 16, 29, 24], [20, 11, 17, 12], 0.1111111111111111),
        # ties: mannwhitneyu(method=PermutationMethod(n_resamples=10**6)), which counts all 48620 arrangements
        (
            [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30],
            [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29],
            0.12990538872891813,
        ),
        # above 40 samples, with ties: mannwhitneyu(method="asymptotic", use_continuity=True)
        (
            [round(v, 2) for v in np.linspace(1, 2, 30) ** 1.5],
            [round(v, 2) for v in np.linspace(1.05, 2.2, 28) ** 1.5],
            0.17579048790902607,
        ),
        ([1] * 25, [1] * 20, 1.0),
        ([], [1, 2], 1.0),
    ],
)
def test_the_rank_test_agrees_with_known_values(a, b, p):
    assert stats.mann_whitney(a, b) == pytest.approx(p, rel=1e-9)
    assert stats.mann_whitney(b, a) == pytest.approx(p, rel=1e-9)


def test_three_and_three_samples_never_prove_anything():
    assert stats.least_p(3, 3) == stats.mann_whitney([1, 2, 3], [7, 8, 9]) == 0.1
    assert stats.least_p(7, 7) == pytest.approx(2 / 3432)


def test_false_discoveries_are_bounded_as_published():
    # scipy.stats.false_discovery_control gives 0.042 for the four lowest and more than 0.05 for the rest
    p = [0.01, 0.013, 0.014, 0.19, 0.35, 0.5, 0.63, 0.67, 0.75, 0.81, 0.01, 0.051]
    assert [i for i, fell in enumerate(stats.benjamini_hochberg(p)) if fell] == [0, 1, 2, 10]
    assert stats.benjamini_hochberg([]) == []
    # a step-up test: 0.04 alone would fall short of 0.025, with 0.05 beside it both pass
    assert stats.benjamini_hochberg([0.04, 0.05]) == [True, True]


def test_the_rank_test_keeps_its_rate():
    """Of samples of one distribution at most about 5 % are called different: 400 pairs, binomial, four deviations."""
    draw = random.Random(3)
    found = sum(
        stats.mann_whitney(*[[draw.expovariate(1) for _ in range(7)] for _ in "ab"]) <= 0.05 for _ in range(400)
    )
    assert found <= 400 * 0.05 + 4 * math.sqrt(400 * 0.05 * 0.95)


def test_the_interval_of_a_ratio_holds_what_was_planted():
    draw = random.Random(1)
    inside = 0
    for seed in range(100):
        a, b = ([scale * draw.gauss(1, 0.03) for _ in range(15)] for scale in (1.0, 1.2))
        lo, hi = stats.interval(stats.median_ratios(a, b, seed=seed))
        inside += lo <= 1.2 <= hi
    assert (
        inside >= 85
    )  # a percentile interval of a median of 15 is a little narrow; 95 of 100 wanted, 4 deviations below
    assert (stats.median_ratios([1, 2, 3], [2, 4, 9]) == stats.median_ratios([1, 2, 3], [2, 4, 9])).all()


def test_the_geometric_mean_is_of_ratios_and_of_draws():
    mean, lo, hi = stats.geometric_mean([2.0, 0.5], [np.full(9, 2.0), np.full(9, 0.5)])
    assert (mean, lo, hi) == pytest.approx((1.0, 1.0, 1.0))
    assert stats.geometric_mean([8.0, 2.0], [np.full(9, 8.0), np.full(9, 2.0)])[0] == pytest.approx(4.0)
