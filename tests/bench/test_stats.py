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


@pytest.mark.parametrize(
    ("a", "b", "p"),
    [  # scipy.stats.ttest_ind(np.log(a), np.log(b), equal_var=False)
        ([1.0, 1.02, 0.99], [1.1, 1.13, 1.08], 0.005935419384936136),
        ([1.0, 1.2], [1.1, 1.13], 0.8788253137129151),
        ([480609.29, 480981.42, 462622.78], [2692256.0, 2650000.0, 2712345.0], 1.061096562864021e-06),
        (
            [19.8, 20.4, 19.6, 17.8, 18.5, 18.9, 18.3, 18.9, 19.5, 22.0],
            [28.2, 26.6, 20.1, 23.3, 25.2, 22.1, 17.7, 27.6, 20.6, 13.7, 23.2, 17.5],
            0.0982183045758736,
        ),
        ([2.0, 2.0], [2.0, 2.0], 1.0),
        ([2.0, 2.0], [3.0, 3.0], 0.0),
        ([2.0], [3.0, 3.1], 1.0),
    ],
)
def test_welchs_test_agrees_with_known_values(a, b, p):
    assert stats.welch(a, b) == pytest.approx(p, rel=1e-8)
    assert stats.welch(b, a) == pytest.approx(p, rel=1e-8)


def test_the_incomplete_beta_function_has_its_closed_forms():
    for x in (0.01, 0.3, 0.5, 0.77, 0.999):
        assert stats.incomplete_beta(1, 1, x) == pytest.approx(x)
        assert stats.incomplete_beta(3, 1, x) == pytest.approx(x**3)
        assert stats.incomplete_beta(1, 4, x) == pytest.approx(1 - (1 - x) ** 4)
        # Student's t of one degree of freedom is Cauchy's distribution
        t = math.sqrt((1 - x) / x)
        assert stats.incomplete_beta(0.5, 0.5, x) == pytest.approx(1 - 2 / math.pi * math.atan(t))


def test_three_and_three_ranks_prove_nothing_and_means_may():
    assert stats.mann_whitney([1, 2, 3], [7, 8, 9]) == 0.1
    assert stats.shifted([1, 1.01, 1.02], [7, 7.1, 7.2]) < 1e-6
    assert stats.shifted(range(1, 9), range(11, 19)) == stats.mann_whitney(range(1, 9), range(11, 19)) == 2 / 12870


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
