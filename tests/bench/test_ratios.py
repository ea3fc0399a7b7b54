"""The three ratios: arithmetic of the batch that fits, batches inside a bound, intervals, and reasons in place of figures."""

from __future__ import annotations

import dataclasses

import pytest

from percard.bench import card, ratios
from percard.bench.engine import load_config
from percard.bench.ratios import Bound, Point
from percard.formats.spec import FormatError, QuantSpec


def points(**rates: float) -> list[Point]:
    """b4=100.0 -> a point at batch 4 whose three rounds lie around 100 tok/s; latencies follow."""
    made = []
    for name, rate in rates.items():
        batch = int(name[1:])
        made.append(Point(batch, (rate, 1.1 * rate, 0.9 * rate), batch / 10, batch / rate, key=name, run=name))
    return made


BASE, SIDE = points(b1=10.0, b4=35.0, b16=80.0), points(b1=20.0, b4=70.0, b16=240.0)


# The worked example: Qwen3-32B on one H100-80, 4,096 in and 512 out, 90 % of memory, 2 GB of overhead, 80 % of the bandwidth,
# decode in the middle of the answer. A roofline and no measurement: what is tested is how a batch is found and a ratio made.
CONFIG = load_config("shape:qwen3-32b")
H100 = next(row for row in card.published() if row["id"] == "h100-80-sxm")
ISL, OSL = 4096, 512


class Roofline:
    """One side of the example; `kv_bits` 8 has a scale of 16 bits for each head's vector."""

    def __init__(self, spec: str | None, kv_bits: int = 16):
        blocks, table = CONFIG.layers * CONFIG.block_parameters(), CONFIG.vocab * CONFIG.hidden
        parsed = QuantSpec.parse(spec) if spec else None
        scales = 16 / parsed.group if parsed and parsed.group else 0
        bits = parsed.weight_bits + scales if parsed else 16
        self.weights = blocks * bits / 8 + 2 * 2 * table
        self.read = self.weights - 2 * table  # a step does not read the embedding
        self.kv = 2 * CONFIG.layers * CONFIG.kv_heads * (CONFIG.head_dim * kv_bits + (16 if kv_bits == 8 else 0)) / 8

    @property
    def fits(self) -> int:
        memory = H100["memory_mib"] * 2**20
        return ratios.max_fit_batch(
            memory=memory, weights=self.weights, kv_per_token=self.kv, tokens=ISL + OSL, overhead=2e9
        )

    def point(self, batch: int) -> Point:
        step = (self.read + batch * (ISL + OSL / 2) * self.kv) / (0.8 * H100["bandwidth_gbs"] * 1e9)
        assert step > 2 * batch * CONFIG.layers * CONFIG.block_parameters() / (0.7 * H100["bf16_tflops"] * 1e12)
        return Point(batch, (batch / step,), tpot_s=step)

    @property
    def points(self) -> list[Point]:
        return [self.point(batch) for batch in range(1, self.fits + 1)]


@pytest.mark.parametrize(
    ("spec", "kv_bits", "gb", "fits", "same", "bound_batch", "bound", "fit"),
    [
        ("w8a8", 16, 34.3, 33, 1.8, 30, 15, 4.8),
        ("w8a8", 8, 34.3, 66, 2.0, 59, 29, 9.5),
        ("w4a16-g128", 16, 19.2, 46, 2.8, 43, 21, 6.7),
        ("w4a16-g128", 8, 19.2, 90, 3.3, 85, 42, 13),
    ],
)
def test_the_worked_example(spec, kv_bits, gb, fits, same, bound_batch, bound, fit):
    base, side = Roofline(None), Roofline(spec, kv_bits)
    assert (base.fits, side.fits) == (7, fits)
    assert (round(base.weights / 1e9, 1), round(side.weights / 1e9, 1)) == (65.5, gb)
    assert round(base.point(7).rate) == 261 and round(base.point(2).rate) == 81
    found = ratios.three(base.points, side.points, 7, bound=Bound(tpot_s=0.025), fits=(base.fits, side.fits))

    def like(value: float, printed: float) -> bool:
        """Two figures are printed, rounded or cut: the 9.555 of w8a8 over INT8 stands as 9.5."""
        unit = 1 if printed >= 10 else 0.1
        return printed - unit / 2 <= value < printed + unit

    assert like(found["same_batch"]["ratio"], same)
    held = found["same_bound"]
    assert (held["batch_fp16"], held["batch"]) == (2, bound_batch) and like(held["ratio"], bound)
    freed = found["max_fit"]
    assert (freed["batch_fp16"], freed["batch"]) == (7, fits) and like(freed["ratio"], fit)
    assert "reason" not in freed and "reason" not in held


def test_the_batch_that_fits_counts_cards_overhead_and_both_lengths():
    given = {"memory": 100.0, "weights": 30.0, "kv_per_token": 0.5, "tokens": 10, "util": 0.9, "overhead": 10.0}
    assert ratios.max_fit_batch(**given) == 10
    assert ratios.max_fit_batch(**given | {"cards": 2}) == 26  # 2 x (90 - 10) - 30 = 130
    assert (
        ratios.max_fit_batch(**given | {"weights": 80.0}) == 0 and ratios.max_fit_batch(**given | {"weights": 999}) == 0
    )
    for wrong in ({"util": 1.2}, {"memory": 0}, {"tokens": 0}, {"kv_per_token": 0}, {"overhead": -1.0}, {"cards": 0}):
        with pytest.raises(FormatError, match="expected sizes above 0"):
            ratios.max_fit_batch(**given | wrong)


def test_same_batch_is_taken_round_by_round_in_a_run_and_from_medians_across_runs():
    base = Point(4, (10.0, 20.0, 30.0), key="k", run="a")
    side = Point(4, (20.0, 40.0, 60.0), run="a")
    found = ratios.same_batch([base], [side], 4)
    assert found == {"ratio": 2.0, "ci95": [2.0, 2.0], "batch": 4, "batch_fp16": 4, "baseline_key": "k"}
    apart = ratios.same_batch([dataclasses.replace(base, run="b")], [side], 4)
    assert apart["ratio"] == 2.0 and apart["ci95"][0] < 1 < 3 < apart["ci95"][1]
    assert apart == ratios.same_batch([dataclasses.replace(base, run="b")], [side], 4)  # fixed seed
    # Measured twice: the baseline of the very rounds counts, whichever came last.
    later = Point(4, (1.0, 1.0, 1.0), key="later", run="c")
    assert ratios.same_batch([base, later], [side], 4)["baseline_key"] == "k"


def test_a_thing_against_itself_has_one_in_its_interval():
    noisy = Point(1, (9.0, 10.0, 11.0, 10.5, 9.5, 10.2, 9.9))
    again = Point(1, (10.0, 9.0, 10.4, 11.1, 10.0, 9.6, 10.0))
    lo, hi = ratios.of_points(noisy, again)["ci95"]
    assert lo < 1 < hi


def test_each_side_has_the_largest_batch_inside_the_bound_for_itself():
    # TPOT of BASE: 0.1, 0.114, 0.2; of SIDE: 0.05, 0.057, 0.067. TTFT of both: 0.1, 0.4, 1.6.
    found = ratios.same_bound(BASE, SIDE, Bound(tpot_s=0.12))
    assert (found["batch"], found["batch_fp16"], found["ratio"]) == (16, 4, pytest.approx(240 / 35))
    assert found["reason"].startswith(
        "batch capped: the largest measured of this side is still inside p99 TPOT <= 120 ms"
    )
    assert found["bound"] == {"ttft_ms": None, "tpot_ms": 120.0, "quantile": 0.99}
    assert ratios.same_bound(BASE, SIDE, Bound(ttft_s=0.5, tpot_s=0.12))["batch"] == 4


def test_no_batch_inside_the_bound_is_said():
    found = ratios.same_bound(BASE, SIDE, Bound(tpot_s=0.08))
    assert found["ratio"] is None
    assert found["reason"] == "bound not met by FP16 at batch 1: TPOT 100 ms; bound p99 TPOT <= 80 ms"
    assert "by this side at batch 1" in ratios.same_bound(SIDE, BASE, Bound(tpot_s=0.08))["reason"]
    unmeasured = [dataclasses.replace(point, ttft_s=None) for point in BASE]
    assert "TTFT not measured" in ratios.same_bound(unmeasured, SIDE, Bound(ttft_s=9.0))["reason"]
    assert "--bound" in ratios.same_bound(BASE, SIDE, None)["reason"]


def test_max_fit_takes_measured_batches_and_says_where_they_end():
    assert ratios.max_fit(BASE, SIDE, 4, 16)["ratio"] == pytest.approx(240 / 35)
    assert "reason" not in ratios.max_fit(BASE, SIDE, 4, 16)
    capped = ratios.max_fit(BASE, SIDE, 5, 40)
    assert (capped["batch"], capped["batch_fp16"], capped["fits"], capped["fits_fp16"]) == (16, 4, 40, 5)
    assert (
        capped["reason"]
        == "batch capped at the largest measured: FP16 at 4 of 5 that fit, this side at 16 of 40 that fit"
    )


def test_a_baseline_that_does_not_fit_has_no_ratio():
    assert ratios.max_fit(BASE, SIDE, 0, 3) == {
        "ratio": None,
        "reason": "baseline_does_not_fit",
        "fits": 3,
        "fits_fp16": 0,
    }
    assert ratios.max_fit(BASE, SIDE, 3, 0)["reason"] == "this side does not fit"
    assert "FP16: no batch of at most 2" in ratios.max_fit(BASE[1:], SIDE, 2, 16)["reason"]
    assert "this side was not measured" in ratios.same_bound(BASE, [], Bound(tpot_s=1.0))["reason"]
    assert ratios.three(BASE, SIDE, 4)["max_fit"]["reason"].endswith("--memory-gb")
    assert "batch 8 was not measured" in ratios.three(BASE, SIDE, 8)["same_batch"]["reason"]


@pytest.mark.parametrize(
    ("text", "ttft", "tpot"),
    [("tpot=50ms,ttft=2s", 2.0, 0.05), ("ttft=1.5s", 1.5, None), ("tpot=800us", None, 8e-4), ("TPOT=1e2ms", None, 0.1)],
)
def test_a_bound_reads_as_it_is_written(text, ttft, tpot):
    found = Bound.parse(text)
    assert (found.ttft_s, found.tpot_s) == (ttft, pytest.approx(tpot) if tpot else None)


@pytest.mark.parametrize(
    "text", ["", "tpot", "tpot=50", "tpot=-1ms", "tpot=nanms", "itl=5ms", "tpot=1s,tpot=2s", "ttft=xs"]
)
def test_what_is_no_bound(text):
    with pytest.raises(FormatError, match="bound"):
        Bound.parse(text)


def test_words_of_a_ratio_carry_both_batches():
    assert ratios.words(ratios.max_fit(BASE, SIDE, 4, 16)).endswith("(16 / 4)")
    assert ratios.words(ratios.max_fit(BASE, SIDE, 5, 16)).endswith("(16 / 4) *")
    assert ratios.words(ratios.nothing(ratios.NO_FIT)) == "baseline does not fit" and ratios.words(None) == "-"


def test_points_that_cannot_be():
    for batch, rates in ((0, (1.0,)), (1, ()), (1, (0.0,))):
        with pytest.raises(ValueError, match="a point needs"):
            Point(batch, rates)
