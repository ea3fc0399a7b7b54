"""How time is taken: warm-up, A B A B interleaving, median and spread, and the interval of a ratio.

Two runs of one thing on one machine differ by more than many speed-ups do. So sides are timed in turn inside one
process, a ratio is taken within each round, and every figure carries its spread. No outlier is dropped.
"""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class CardTimes:
    """Times of one thing on a card, seconds per call: inside a CUDA graph (the headline), and started one by one.

    `calls` are in one graph, `replays` of it in one sample.
    """

    graph: Sample
    eager: Sample
    calls: int
    replays: int


def copies_for_cold_cache(nbytes: int, cache_bytes: int, factor: int = 4) -> int:
    """How many copies of `nbytes` each hold `factor` times the cache: used in turn, none is still in it at its turn."""
    return max(1, -(-factor * cache_bytes // max(1, nbytes)))


def card_ab(
    functions: Mapping[str, Sequence[Callable[[], Any]]],
    *,
    device: torch.device,
    rounds: int = 7,
    sample_s: float = 0.010,
    work_s: float = 0.005,
    gap_s: float = 0.005,
    most_calls: int = 4096,
    eager_rounds: int = 3,
) -> dict[str, CardTimes]:
    """Times each thing on a card: CUDA graphs in turn (A B A B), and eager calls beside them.

    A thing is a list of functions that do the same on different copies of its weight; they are called in turn, so that
    the L2 is cold (`copies_for_cold_cache`). One graph holds enough calls for `work_s` of work, one sample enough
    replays for `sample_s`, with a pause of `gap_s` after each: a burst that does not reach the card's power limit.
    """
    if rounds < 1 or not all(functions.values()):
        raise ValueError("card_ab wants at least one round, and one function per name")
    eager = {name: _eager(turn, device, eager_rounds) for name, turn in functions.items()}
    graphs = {name: _Graph(turn, device, work_s, most_calls) for name, turn in functions.items()}
    try:
        replays = {name: max(1, math.ceil(0.9 * sample_s / graph.seconds)) for name, graph in graphs.items()}
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, graph in graphs.items():
                total = 0.0
                for _ in range(replays[name]):
                    total += graph.replay()
                    time.sleep(gap_s)
                times[name].append(total / replays[name] / graph.calls)
        return {n: CardTimes(Sample.of(times[n]), eager[n], graphs[n].calls, replays[n]) for n in functions}
    finally:
        for graph in graphs.values():
            graph.free()


def _eager(turn: Sequence[Callable[[], Any]], device: torch.device, rounds: int) -> Sample:
    """Seconds per call started one by one: queue and launch cost included where they are longer than the work."""
    for function in turn[:3]:  # compiles, makes library handles, loads what is loaded at a first call
        function()
    samples = []
    calls = max(len(turn), 20)
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for i in range(calls):
            turn[i % len(turn)]()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3 / calls)
    return Sample.of(samples)


class _Graph:
    """Calls of a thing, captured once. `seconds` is what one replay took when it was sized."""

    def __init__(self, turn: Sequence[Callable[[], Any]], device: torch.device, work_s: float, most_calls: int) -> None:
        self._turn, self._device = turn, device
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capture(max(len(turn), 4))
        self.seconds = min(self.replay() for _ in range(3))
        wanted = min(most_calls, round(work_s / (self.seconds / self.calls)))
        if wanted > 1.2 * self.calls:
            # Whole turns, so that each copy is read equally often.
            self._capture(-(-wanted // len(turn)) * len(turn))
            self.replay()
            self.seconds = min(self.replay() for _ in range(2))

    def _capture(self, calls: int) -> None:
        self.free()
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # a library's workspace belongs to a stream: make it before the capture
            for function in self._turn[:2]:
                function()
        torch.cuda.synchronize(self._device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for i in range(calls):
                self._turn[i % len(self._turn)]()
        torch.cuda.synchronize(self._device)
        self.calls = calls

    def replay(self) -> float:
        """Seconds that one replay takes on the card."""
        assert self._graph is not None
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def free(self) -> None:
        """Gives the graph and its memory back."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None
