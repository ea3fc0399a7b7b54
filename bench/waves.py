"""Requests through the engine in waves: all of a wave begin together, those that end leave, the next wave starts when it is over.

    1  requests in their order borrow pages, `concurrency` of them at most or as many as the pool has pages for
    2  prompts, packed, PROMPT_TOKENS at a time: the first token of an answer comes from there
    3  greedy steps of all that have not ended; an ended or cancelled one gives its pages back and leaves the batch

Serving stacks fill a place that comes free at once (continuous batching); a wave does not, so at the end of one the batch is small.
It is the same for every side. End-of-text is not looked at: an answer has the length that its request says.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from . import clock
from .engine.cache import Cache
from .engine.graphs import capture
from .engine.model import Model
from .engine.pool import Lease, OverLong, Pool
from .load import Request

PROMPT_TOKENS = 2048  # of packed prompts in one go, unless one is longer
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)  # rows of a step on a card: one CUDA graph each


@dataclass
class Served:
    """What became of a request: seconds from the start of its wave to its first and its last token, and between tokens.

    `tokens` of the answer are kept when asked for. `refused` says why it never ran.
    """

    request: Request
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    made: int = 0
    tokens: list[int] = field(default_factory=list)
    refused: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds of a token after the first one; None for an answer of one."""
        return (self.e2e_s - self.ttft_s) / (self.made - 1) if self.made > 1 else None


@dataclass(frozen=True)
class Round:
    """All requests once: `wall_s` seconds, `prefill_s` of them over prompts, `waves` of them, most rows of a step."""

    served: tuple[Served, ...]
    wall_s: float
    prefill_s: float
    waves: int
    rows: int

    @property
    def tokens_out(self) -> int:
        return sum(s.made for s in self.served)

    @property
    def tokens_in(self) -> int:
        """Of prompts that ran."""
        return sum(s.request.prompt for s in self.served if s.made)


@dataclass(eq=False)
class _Live:
    """One request of a wave."""

    served: Served
    lease: Lease
    ids: torch.Tensor
    last: int = 0

    @property
    def wanted(self) -> int:
        """Tokens of answer before it leaves."""
        request = self.served.request
        return request.answer if request.leaves is None else min(request.answer, request.leaves)


@dataclass(eq=False)
class Stepper:
    """Greedy steps of `model` over caches of a pool: noted on a CPU, a CUDA graph for each bucket of rows on a card.

    `words` say what went otherwise.
    """

    model: Model
    words: list[str] = field(default_factory=list)
    _graphs: dict[Cache, tuple[Callable[[], object], torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def rows(self, count: int) -> int:
        """Rows of a batch of so many sequences."""
        if self.model.device.type == "cpu":
            return count
        return next((b for b in BUCKETS if b >= count), count)

    def __call__(self, tokens: Sequence[int], cache: Cache) -> list[int]:
        """The next token of each row after `tokens`; the cache grows by one."""
        model, missing = self.model, cache.batch - len(tokens)
        given = torch.tensor([*tokens, *[0] * missing])
        if model.device.type == "cpu":
            return model.step(given, cache).argmax(-1).tolist()
        if cache not in self._graphs:
            self._graphs[cache] = self._captured(given.to(model.device), cache)
        replay, held, out = self._graphs[cache]
        cache.need(1)
        cache.point()
        held.copy_(given)
        replay()
        cache.grow()
        return out.tolist()[: len(tokens)]

    def _captured(self, held: torch.Tensor, cache: Cache) -> tuple[Callable[[], object], torch.Tensor, torch.Tensor]:
        """(replay, tokens that it reads, tokens that it writes) of one step; the tries write where the next step will."""
        out = torch.zeros_like(held)

        def step() -> None:
            out.copy_(self.model.bare_step(held, cache).argmax(-1))

        cache.point()
        try:
            return capture(step, self.model.device), held, out
        except RuntimeError as error:
            self.words.append(f"no CUDA graph ({str(error).splitlines()[0]}), steps are launched one by one")
            return step, held, out


@torch.inference_mode()
def run(
    stepper: Stepper,
    pool: Pool,
    requests: Sequence[Request],
    prompts: Sequence[torch.Tensor],
    concurrency: int,
    *,
    keep: bool = False,
    now: Callable[[], float] = time.perf_counter,
) -> Round:
    """Serves `requests`, whose ids are `prompts` (int64 [prompt] each). `keep` the tokens of answers.

    Whatever happens, the pages that a wave has borrowed are given back.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency {concurrency}; expected at least 1")
    served = [Served(request) for request in requests]
    waiting = deque(zip(served, prompts, strict=True))
    waves, rows, prefill_s, start = 0, 0, 0.0, now()
    while waiting:
        wave: list[_Live] = []
        try:
            _admit(pool, waiting, wave, concurrency)
            if wave:
                waves, rows = waves + 1, max(rows, len(wave))
                prefill_s += _wave(stepper, pool, wave, keep, now)
        finally:
            for live in wave:
                pool.give_back(live.lease)
    return Round(tuple(served), now() - start, prefill_s, waves, rows)


def _admit(pool: Pool, waiting: deque[tuple[Served, torch.Tensor]], wave: list[_Live], most: int) -> None:
    """The next requests, in order, as far as there are pages; one that can never run, or has left, is passed over."""
    while waiting and len(wave) < most:
        one, ids = waiting[0]
        request = one.request
        if request.leaves == 0:
            waiting.popleft()
            continue
        try:
            lease = pool.borrow(request.prompt, request.answer)
        except OverLong as error:
            one.refused = str(error)
            waiting.popleft()
            continue
        if lease is None:
            return
        wave.append(_Live(one, lease, ids))
        waiting.popleft()


def _wave(stepper: Stepper, pool: Pool, wave: Sequence[_Live], keep: bool, now: Callable[[], float]) -> float:
    """Runs one wave to its end; the seconds its prompts took."""
    model, begin = stepper.model, now()
    for group in _groups(wave):
        leases = [live.lease for live in group]
        cache = pool.batch(leases)
        packed = torch.cat([live.ids for live in group]).to(model.device)
        tokens = model.prefill_packed(packed, cache, [len(live.ids) for live in group]).argmax(-1).tolist()
        at = now()
        pool.note(cache, leases)
        for live, token in zip(group, tokens, strict=True):
            live.served.ttft_s = live.served.e2e_s = at - begin
            _took(live, token, keep)
    clock.synchronize(model.device)
    prefilled = at = now()
    running = _staying(pool, wave)
    while running:
        leases = [live.lease for live in running]
        cache = pool.batch(leases, stepper.rows(len(running)))
        tokens = [live.last for live in running]
        for _ in range(min(live.wanted - live.served.made for live in running)):
            tokens = stepper(tokens, cache)
            before, at = at, now()
            for live, token in zip(running, tokens, strict=True):
                # prompts that came after a first token lie in the gap to the second one
                live.served.itl_s.append(at - (begin + live.served.e2e_s if live.served.made == 1 else before))
                live.served.e2e_s = at - begin
                _took(live, token, keep)
        pool.note(cache, leases)
        running = _staying(pool, running)
    return prefilled - begin


def _took(live: _Live, token: int, keep: bool) -> None:
    live.last = token
    live.served.made += 1
    if keep:
        live.served.tokens.append(token)


def _staying(pool: Pool, lives: Sequence[_Live]) -> list[_Live]:
    """Those with tokens to come; the others give their pages back."""
    for live in lives:
        if live.served.made >= live.wanted:
            pool.give_back(live.lease)
    return [live for live in lives if live.served.made < live.wanted]


def _groups(wave: Sequence[_Live]) -> list[list[_Live]]:
    """Prompts that go through the model together."""
    groups: list[list[_Live]] = []
    filled = PROMPT_TOKENS
    for live in wave:
        if filled + len(live.ids) > PROMPT_TOKENS:
            groups.append([])
            filled = 0
        groups[-1].append(live)
        filled += len(live.ids)
    return groups


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """{p50, p90, p99}, None for no value."""
    return {f"p{p}": clock.quantile(values, p / 100) for p in (50, 90, 99)} if values else None


def within(served: Sequence[Served], ttft_s: float, tpot_s: float) -> int:
    """How many requests ended and kept the bound, each for itself."""
    return sum(s.made > 0 and s.ttft_s <= ttft_s and (s.tpot_s or 0.0) <= tpot_s for s in served)


def mean_rows(one: Round) -> float:
    """Rows of a step on average over the tokens of a round: what a wave's ragged end leaves of its concurrency."""
    steps = [len(s.itl_s) for s in one.served if s.itl_s]
    return statistics.fmean(steps) / max(steps) * one.rows if steps else 0.0
