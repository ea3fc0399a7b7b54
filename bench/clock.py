"""How time is taken: warm-up, A B A B interleaving, median and spread, and the interval of a ratio.

Two runs of one thing on one machine differ by more than many speed-ups do. So sides are timed in turn inside one
process, a ratio is taken within each round, and every figure carries its spread. No outlier is dropped.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

DRAWS = 2000  # bootstrap draws of a ratio's interval
DRIFT = 0.03  # the last third may differ from the first by this share


@dataclass(frozen=True)
class Sample:
    """Times of one thing in seconds per call, in the order taken. `lo` and `hi` are the ends of the spread: the
    extremes below 10 samples, the 10th and 90th percentile from there on."""

    median: float
    lo: float
    hi: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Sample:
        """The summary of at least one sample."""
        if not samples:
            raise ValueError("no sample was taken")
        few = len(samples) < 10
        lo, hi = (min(samples), max(samples)) if few else (quantile(samples, 0.1), quantile(samples, 0.9))
        return cls(statistics.median(samples), lo, hi, tuple(samples))

    def rate(self, work: float) -> Sample:
        """`work` per second: the same samples as rates, so that lo stays the slow end."""
        return Sample.of([work / s for s in self.samples])

    @property
    def iqr(self) -> float:
        """Distance of the quartiles, seconds."""
        return quantile(self.samples, 0.75) - quantile(self.samples, 0.25)

    @property
    def drift(self) -> bool:
        """True when the median of the last third differs from that of the first by more than 3 %."""
        third = len(self.samples) // 3
        if third == 0:
            return False
        first, last = statistics.median(self.samples[:third]), statistics.median(self.samples[-third:])
        return abs(last / first - 1) > DRIFT


@dataclass(frozen=True)
class Ratio:
    """How many times faster: median over rounds, and the bootstrap 95 % interval."""

    median: float
    lo: float
    hi: float


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, linear between neighbours."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def synchronize(device: torch.device) -> None:
    """Waits for the card's queue; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ab(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 3,
    warmup: int = 1,
    calls: int = 1,
    device: torch.device | None = None,
    now: Callable[[], float] = time.perf_counter,
    before: Callable[[str, int], None] | None = None,
) -> dict[str, Sample]:
    """Times each function once per round, in turn (A B A B), after `warmup` untimed calls of each.

    A sample is the wall time of `calls` calls divided by `calls`, until the device has finished. `before(name, round)`
    runs untimed ahead of each sample (fresh inputs, a rewound cache, progress). `now` is seconds, for tests a fake.
    """
    if rounds < 1 or calls < 1:
        raise ValueError(f"rounds {rounds} and calls {calls} must be at least 1")
    where = device if device is not None else torch.device("cpu")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-warmup, rounds):
        for name, function in functions.items():
            if before is not None:
                before(name, turn)
            synchronize(where)
            start = now()
            for _ in range(calls):
                function()
            synchronize(where)
            if turn >= 0:
                times[name].append((now() - start) / calls)
    return {name: Sample.of(samples) for name, samples in times.items()}


def ratio(base: Sample, other: Sample, *, draws: int = DRAWS, seed: int = 0) -> Ratio:
    """How many times faster `other` is than `base`, from samples of the same rounds.

    Each round gives one ratio; rounds are drawn again with replacement and the 2.5 and 97.5 % points of the medians
    are the interval (percentile bootstrap, Efron 1979). Fixed seed: the same record gives the same interval.
    """
    if len(base.samples) != len(other.samples):
        raise ValueError(f"{len(base.samples)} and {len(other.samples)} samples are not of the same rounds")
    ratios = [b / o for b, o in zip(base.samples, other.samples, strict=True)]
    generator = random.Random(seed)
    medians = [statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws)]
    return Ratio(statistics.median(ratios), quantile(medians, 0.025), quantile(medians, 0.975))
