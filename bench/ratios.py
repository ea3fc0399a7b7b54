"""Tokens per card against FP16, three ways, from measured points of both sides. Pure: no torch, no clock.

    same_batch   both sides at one batch                                    what the kernels do
    same_bound   each side at its largest batch inside a latency bound      what a service with a promise gains
    max_fit      each side at the batch that fits beside its weights        what saves cards

The same kernels can be 1.8 x by the first and 29 x by the second, so each is a mapping that carries both batches, or says why
there is no figure:

    {"ratio": 1.8, "ci95": [1.7, 1.9], "batch": 7, "batch_fp16": 7, "baseline_key": "..."}  and "reason" where a batch was capped
    {"ratio": None, "reason": "baseline_does_not_fit"}

max_fit and same_bound also carry `fits` and `fits_fp16` (sequences by the formula), or the bound.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..formats.spec import FormatError
from .clock import DRAWS, quantile

NO_FIT = "baseline_does_not_fit"
UTIL = 0.9  # share of a memory that weights and cache may take
QUANTILE = 0.99  # of latencies that a bound speaks about

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Bound:
    """Seconds that a promise allows; None = not promised. The `quantile` of the measured latencies must be inside."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    quantile: float = QUANTILE

    @classmethod
    def parse(cls, text: str) -> Bound:
        """The Bound of "tpot=50ms,ttft=2s" (either may be missing); FormatError for anything else."""
        found: dict[str, float] = {}
        for part in filter(None, (word.strip() for word in text.lower().split(","))):
            name, _, value = part.partition("=")
            digits = value.rstrip("ums")
            unit = _UNITS.get(value[len(digits) :])
            try:
                seconds = float(digits) * (unit or math.nan)
            except ValueError:
                seconds = math.nan
            if name not in ("ttft", "tpot") or not 0 < seconds < math.inf:
                raise FormatError(
                    f"bound {part!r}: expected ttft=TIME or tpot=TIME with us, ms or s, such as tpot=50ms"
                )
            if name in found:
                raise FormatError(f"bound {text!r}: {name} is given twice; give it once")
            found[name] = seconds
        if not found:
            raise FormatError(f"bound {text!r}: names no bound; expected such as tpot=50ms,ttft=2s")
        return cls(found.get("ttft"), found.get("tpot"))

    def met(self, point: Point) -> bool:
        """Is this point inside? A latency that was not measured is not."""
        pairs = ((self.ttft_s, point.ttft_s), (self.tpot_s, point.tpot_s))
        return all(limit is None or (found is not None and found <= limit) for limit, found in pairs)

    def section(self) -> dict[str, Any]:
        """As the Record has it: {ttft_ms, tpot_ms, quantile}."""
        ms = {f"{n}_ms": None if v is None else v * 1e3 for n, v in (("ttft", self.ttft_s), ("tpot", self.tpot_s))}
        return ms | {"quantile": self.quantile}

    @classmethod
    def of_section(cls, said: Mapping[str, Any]) -> Bound:
        """The Bound that `section` wrote."""
        ttft, tpot = (None if said.get(f"{n}_ms") is None else said[f"{n}_ms"] / 1e3 for n in ("ttft", "tpot"))
        return cls(ttft, tpot, said.get("quantile") or QUANTILE)

    def __str__(self) -> str:
        named = (("TTFT", self.ttft_s), ("TPOT", self.tpot_s))
        words = ", ".join(f"{name} <= {_time(limit)}" for name, limit in named if limit is not None)
        return f"p{self.quantile * 100:g} {words}"


def _time(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1e3:g} ms"


@dataclass(frozen=True)
class Point:
    """One side at one batch: output tokens per second of each round, and the latencies at the quantile of the bound, in seconds.

    `key` is the cell_key of its record. Points of one `run` were timed in turn in the same rounds: their ratio is taken round
    by round. Others were not, and each side's rounds are drawn for themselves.
    """

    batch: int
    tok_s: tuple[float, ...]
    ttft_s: float | None = None
    tpot_s: float | None = None
    key: str = ""
    run: str = ""

    def __post_init__(self) -> None:
        if self.batch < 1 or not self.tok_s or min(self.tok_s) <= 0:
            raise ValueError(
                f"a point needs a batch of at least 1 and rates above 0, not {self.batch} and {self.tok_s}"
            )

    @property
    def rate(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.tok_s)


def max_fit_batch(
    *,
    memory: float,
    weights: float,
    kv_per_token: float,
    tokens: float,
    util: float = UTIL,
    overhead: float = 0.0,
    cards: int = 1,
) -> int:
    """Sequences of `tokens` (input and output) whose cache fits beside `weights`; 0 = none, or not even the weights.

    floor((cards x (util x memory - overhead) - weights) / (kv_per_token x tokens)), all in bytes; memory and overhead of one
    card, weights of all.
    """
    if not 0 < util <= 1 or memory <= 0 or tokens <= 0 or kv_per_token <= 0 or overhead < 0 or cards < 1:
        raise FormatError(
            f"memory {memory / 1e9:g} GB x {cards}, util {util:g}, overhead {overhead / 1e9:g} GB, {tokens:g} tokens of "
            f"{kv_per_token:g} bytes: expected sizes above 0 and util in 0 .. 1"
        )
    return max(0, math.floor(free_for_kv(memory, weights, util, overhead, cards) / (kv_per_token * tokens)))


def free_for_kv(memory: float, weights: float, util: float = UTIL, overhead: float = 0.0, cards: int = 1) -> float:
    """Bytes that are left for a cache; negative when the weights do not fit."""
    return cards * (util * memory - overhead) - weights


def of_points(base: Point, side: Point, *, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """{ratio, ci95, batch, batch_fp16, baseline_key} of two points: how many times more tokens per second.

    Of the same rounds: the median of the ratios round by round, and a percentile bootstrap over rounds (Efron 1979). Of
    different ones: the ratio of medians, each side's rounds drawn for themselves. 95 %, fixed seed.
    """
    generator = random.Random(seed)
    if base.run == side.run and len(base.tok_s) == len(side.tok_s):
        ratios = [s / b for b, s in zip(base.tok_s, side.tok_s, strict=True)]
        middle = statistics.median(ratios)
        drawn = [statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws)]
    else:
        middle = side.rate / base.rate

        def again(values: Sequence[float]) -> float:
            return statistics.median(generator.choices(values, k=len(values)))

        drawn = [again(side.tok_s) / again(base.tok_s) for _ in range(draws)]
    interval = [quantile(drawn, 0.025), quantile(drawn, 0.975)]
    found = {"ratio": middle, "ci95": interval, "batch": side.batch, "batch_fp16": base.batch}
    return found | {"baseline_key": base.key}


def nothing(reason: str, **more: Any) -> dict[str, Any]:
    """No figure, and why."""
    return {"ratio": None, "reason": reason, **more}


def same_batch(base: Sequence[Point], side: Sequence[Point], batch: int) -> dict[str, Any]:
    """Both sides at `batch`, against the baseline of the same rounds where there is one."""
    mine = _at(side, batch)
    theirs = _at(base, batch, mine.run if mine else "")
    if mine is None or theirs is None:
        return nothing(f"batch {batch} was not measured for {'FP16' if mine else 'this side'}")
    return of_points(theirs, mine)


def same_bound(base: Sequence[Point], side: Sequence[Point], bound: Bound | None) -> dict[str, Any]:
    """Each side at the largest measured batch inside `bound`; a side whose largest batch still is inside was capped."""
    if bound is None:
        return nothing("no bound was given; --bound tpot=50ms,ttft=2s")
    more = {"bound": bound.section()}
    mine, theirs = (_largest(points, bound.met) for points in (side, base))
    for name, points, at in (("FP16", base, theirs), ("this side", side, mine)):
        if at is None:
            return nothing(_outside(name, points, bound), **more)
    assert mine is not None and theirs is not None
    theirs = _at(base, theirs.batch, mine.run) or theirs
    capped = [n for n, points, at in (("FP16", base, theirs), ("this side", side, mine)) if at.batch == _top(points)]
    found = of_points(theirs, mine) | more
    if capped:
        found["reason"] = f"batch capped: the largest measured of {' and of '.join(capped)} is still inside {bound}"
    return found


def max_fit(
    base: Sequence[Point], side: Sequence[Point], fits_fp16: int, fits: int, *, cap: str = "measured"
) -> dict[str, Any]:
    """Each side at the largest measured batch of at most what fits (`max_fit_batch`). `cap` names what bounds a batch from above."""
    more = {"fits": fits, "fits_fp16": fits_fp16}
    if fits_fp16 < 1:
        return nothing(NO_FIT, **more)
    if fits < 1:
        return nothing("this side does not fit", **more)
    mine, theirs = _largest(side, lambda p: p.batch <= fits), _largest(base, lambda p: p.batch <= fits_fp16)
    for name, points, at, limit in (("FP16", base, theirs, fits_fp16), ("this side", side, mine, fits)):
        if at is None:
            least = f"the smallest is {min(p.batch for p in points)}" if points else "none was"
            return nothing(f"{name}: no batch of at most {limit} (what fits) was {cap}; {least}", **more)
    assert mine is not None and theirs is not None
    theirs = _at(base, theirs.batch, mine.run) or theirs
    capped = [
        f"{name} at {at.batch} of {limit} that fit"
        for name, at, limit in (("FP16", theirs, fits_fp16), ("this side", mine, fits))
        if at.batch < limit
    ]
    found = of_points(theirs, mine) | more
    if capped:
        found["reason"] = f"batch capped at the largest {cap}: {', '.join(capped)}"
    return found


def three(
    base: Sequence[Point],
    side: Sequence[Point],
    batch: int,
    *,
    bound: Bound | None = None,
    fits: tuple[int, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """vs_fp16 of a record at `batch`; `fits` are the sequences that fit of (FP16, this side), None = memory not known."""
    unknown = nothing("the memory is not known; --memory-gb")
    return {
        "same_batch": same_batch(base, side, batch),
        "same_bound": same_bound(base, side, bound),
        "max_fit": unknown if fits is None else max_fit(base, side, *fits),
    }


def words(found: Mapping[str, Any] | None) -> str:
    """One ratio for a table: "1.82 x [1.79, 1.85] (16 / 4)" with the batch of this side and of FP16, or the reason."""
    if not found:
        return "-"
    if found.get("ratio") is None:
        return str(found.get("reason") or "not measured").replace("_", " ")
    lo, hi = found["ci95"]
    sign = " *" if found.get("reason") else ""
    return f"{found['ratio']:.2f} x [{lo:.2f}, {hi:.2f}] ({found['batch']} / {found['batch_fp16']}){sign}"


def cell(found: Mapping[str, Any] | None, numbers: dict[str, int]) -> str:
    """The same for a narrow column: "1.82 [1.79, 1.85] 16/4", a star where a batch was capped, or the number of a footnote.

    `numbers` holds the reasons so far and gets new ones.
    """
    if not found:
        return "-"
    if found.get("ratio") is None:
        why = str(found.get("reason") or "not measured").replace("_", " ")
        return f"- [{numbers.setdefault(why, len(numbers) + 1)}]"
    lo, hi = found["ci95"]
    star = "*" if found.get("reason") else ""
    return f"{found['ratio']:.2f} [{lo:.2f}, {hi:.2f}] {found['batch']}/{found['batch_fp16']}{star}"


def _at(points: Sequence[Point], batch: int, run: str | None = None) -> Point | None:
    """The point at `batch`: the one of `run`, else the last one."""
    found = [point for point in points if point.batch == batch]
    return next((point for point in found if run is not None and point.run == run), found[-1] if found else None)


def _largest(points: Sequence[Point], good: Callable[[Point], bool]) -> Point | None:
    """The point with the largest batch among the good ones, the last of several."""
    found = [point for point in points if good(point)]
    return max(reversed(found), key=lambda point: point.batch) if found else None


def _top(points: Sequence[Point]) -> int:
    return max(point.batch for point in points)


def _outside(name: str, points: Sequence[Point], bound: Bound) -> str:
    """Why no batch of a side is inside the bound."""
    if not points:
        return f"{name} was not measured"
    least = min(points, key=lambda point: point.batch)
    pairs = (("TTFT", bound.ttft_s, least.ttft_s), ("TPOT", bound.tpot_s, least.tpot_s))
    found = [(n, value) for n, limit, value in pairs if limit is not None]
    measured = ", ".join(f"{n} {'not measured' if value is None else _time(round(value, 6))}" for n, value in found)
    return f"bound not met by {name} at batch {least.batch}: {measured}; bound {bound}"
