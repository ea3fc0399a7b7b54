"""The clock, with a fake one: order of calls, median and spread, drift, and the interval of a ratio."""

from __future__ import annotations

import pytest

from percard.bench.clock import Sample, ab, quantile, ratio


class FakeTime:
    """Functions that take the seconds they are told, and the order they were called in."""

    def __init__(self) -> None:
        self.time = 0.0
        self.log: list[str] = []

    def takes(self, name: str, *seconds: float):
        turns = iter(seconds)

        def call() -> None:
            self.log.append(name)
            self.time += next(turns)

        return call


def test_sides_are_timed_in_turn():
    fake = FakeTime()
    functions = {"a": fake.takes("a", 9, 1, 2, 3), "b": fake.takes("b", 9, 4, 6, 5)}
    seen = []
    found = ab(functions, rounds=3, now=lambda: fake.time, before=lambda name, turn: seen.append((name, turn)))
    assert fake.log == ["a", "b"] * 4
    assert seen == [(name, turn) for turn in (-1, 0, 1, 2) for name in "ab"]
    assert found["a"] == Sample(2, 1, 3, (1, 2, 3))
    assert found["b"] == Sample(5, 4, 6, (4, 6, 5))


def test_what_runs_before_a_sample_is_not_timed():
    fake = FakeTime()

    def before(name: str, turn: int) -> None:
        fake.time += 100

    found = ab({"a": fake.takes("a", *[1.0] * 8)}, rounds=2, calls=2, warmup=2, now=lambda: fake.time, before=before)
    assert found["a"].samples == (1.0, 1.0)


def test_spread_is_extremes_of_few_and_percentiles_of_many():
    assert (Sample.of([3, 1, 2]).lo, Sample.of([3, 1, 2]).hi) == (1, 3)
    many = Sample.of(list(range(1, 101)))
    assert (many.median, many.lo, many.hi) == (50.5, pytest.approx(10.9), pytest.approx(90.1))
    assert many.iqr == pytest.approx(49.5)
    with pytest.raises(ValueError, match="no sample"):
        Sample.of([])


def test_rates_keep_the_slow_end_low():
    rate = Sample.of([0.5, 0.25, 1.0]).rate(100)
    assert (rate.lo, rate.median, rate.hi) == (100, 200, 400)


def test_drift_is_a_last_third_that_differs_by_more_than_three_per_cent():
    assert not Sample.of([1.0, 1.0, 1.0, 1.02, 1.02, 1.02]).drift
    assert Sample.of([1.0, 1.0, 1.0, 1.0, 1.05, 1.05]).drift
    assert not Sample.of([1.0, 2.0]).drift


def test_ratio_is_taken_within_rounds():
    """A machine that slows down for both sides alike leaves the ratio at exactly two."""
    base, other = Sample.of([2.0, 4.0, 8.0]), Sample.of([1.0, 2.0, 4.0])
    found = ratio(base, other)
    assert (found.median, found.lo, found.hi) == (2.0, 2.0, 2.0)


def test_ratio_interval_holds_the_median_and_is_the_same_each_time():
    base = Sample.of([1.0, 1.1, 0.9, 1.05, 0.95, 1.2, 1.0])
    other = Sample.of([0.5, 0.5, 0.52, 0.48, 0.5, 0.55, 0.5])
    found = ratio(base, other)
    assert found == ratio(base, other)
    assert min(b / o for b, o in zip(base.samples, other.samples, strict=True)) <= found.lo < found.median < found.hi
    with pytest.raises(ValueError, match="same rounds"):
        ratio(base, Sample.of([1.0]))


def test_quantile_is_linear_between_neighbours():
    assert [quantile([10, 20, 30], q) for q in (0, 0.25, 0.5, 1)] == [10, 15, 20, 30]
    with pytest.raises(ValueError, match="at least 1"):
        ab({}, rounds=0)
