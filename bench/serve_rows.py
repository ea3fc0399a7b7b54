"""What `bench serve` measured as Records: a row for each side and concurrency, with its three ratios."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..formats.spec import QuantSpec
from . import clock, energy, load, money, ratios, waves
from .probe import FLOATS
from .ratios import Point
from .record import Record

if TYPE_CHECKING:
    from .serve import Session, Side

_BASELINE, _AGAIN = "baseline", "baseline again"


def about(session: Session, spec: QuantSpec | None, kv: str, concurrency: int) -> dict[str, Any]:
    """What is known of a record before anything is measured."""
    isl, osl = load.means(session.fitting)
    plan = session.plan
    return {
        "level": "serve",
        "case": session.case(concurrency),
        "model": {
            "id": session.config.name,
            "weights": "synthetic" if session.synthetic else "real",
            "layers_run": session.config.layers,
            "layers": session.whole.layers,
        },
        "shape": {
            "batch": concurrency,
            "isl": isl,
            "osl": osl,
            "load": session.load_section(),
            "bound": plan.bound.section() if plan.bound else None,
        },
        "scheme": {
            "spec": "16bit" if spec is None else str(spec),
            "kv_spec": kv,
            "head": plan.head if spec else "16bit",
        },
    }


def floor(base: Side, again: Side) -> float:
    """How far the 16-bit side is from itself, in percent: the largest over concurrencies."""
    pairs = [(walls(base.rounds[c]), walls(again.rounds[c])) for c in base.rounds]
    return max(abs(clock.ratio(clock.Sample.of(a), clock.Sample.of(b)).median - 1) * 100 for a, b in pairs)


def walls(rounds: Sequence[waves.Round]) -> list[float]:
    """Seconds of each round."""
    return [r.wall_s for r in rounds]


def points(side: Side, keys: Mapping[int, str], run: str) -> list[Point]:
    """The side at each concurrency that it was timed at, for ratios."""
    found = []
    for c, rounds in side.rounds.items():
        ttft, tpot = latencies(rounds)
        first, each = (clock.quantile(v, ratios.QUANTILE) if v else None for v in (ttft, tpot))
        rates = tuple(r.tokens_out / r.wall_s for r in rounds)
        found.append(Point(c, rates, first, each, key=keys.get(c, ""), run=run))
    return found


def latencies(rounds: Sequence[waves.Round]) -> tuple[list[float], list[float]]:
    """TTFT of all requests that ran, and TPOT of those with more than one token, over all rounds."""
    served = [s for r in rounds for s in r.served if s.made]
    return [s.ttft_s for s in served], [s.tpot_s for s in served if s.tpot_s is not None]


def records(session: Session, spec: QuantSpec | None, sides: Mapping[str, Side], seconds: float) -> Iterator[Record]:
    """A record for each side and concurrency, in the order of `Session.rows_of`."""
    base, name = sides[_BASELINE], "16-bit weights" if spec is None else str(spec)
    keys = {c: session.key(_BASELINE, "bf16", c) for c in session.plan.concurrency}
    theirs = points(base, keys, name)
    for named, kv, c in session.rows_of(spec):
        key = session.key(named, kv, c)
        side = base if (named, kv) == (_BASELINE, "bf16") else sides[f"{named}, {kv} cache"]
        rounds = side.rounds.get(c)
        measured: dict[str, Any] = {"latency_us": None, "tokens": None, "energy": None, "money": None}
        if rounds:
            mine, fits = points(side, {c: key}, name), (_fits(session, base), _fits(session, side))
            measured = {
                "latency_us": _latency(rounds),
                "tokens": _tokens(session, rounds, c)
                | {"vs_fp16": ratios.three(theirs, mine, c, bound=session.plan.bound, fits=fits)},
                "energy": side.meters.get(c) or energy.missing(session.where, "not measured"),
                "money": _money(session, rounds),
            }
        yield Record(
            **{**_sections(session, spec, side, kv, c, rounds or ()), "cell_key": key, "seconds": seconds, **measured}
        )


def _sections(
    session: Session, spec: QuantSpec | None, side: Side, kv: str, concurrency: int, rounds: Sequence[waves.Round]
) -> dict[str, Any]:
    """All of a record but its figures of speed."""
    model, shared = side.model, session.machine
    kept, bits = model.kv, model.dtype.itemsize * 8
    found = about(session, spec, kv, concurrency)
    found["scheme"] = {
        "spec": str(spec) if spec else FLOATS[model.dtype],
        "kv_spec": kept.name if kept.quantised else FLOATS[model.dtype],
        "kv_bits": kept.bits if kept.quantised else bits,
        "weight_bits": spec.weight_bits if spec else bits,
        "act_bits": spec.act_bits if spec else bits,
        "group": spec.group if spec else None,
        "symmetric": spec.symmetric if spec else None,
        "head": model.head,
        "notes": [*model.notes, *side.stepper.words],
    }
    place = "cpu" if session.where.type == "cpu" else "card"
    shared = shared | {place: shared[place] | {"noise_floor_pct": session.floor_pct}}
    return found | {
        **shared,
        "body": {
            "impl": model.kernel,
            "isa": model.isa,
            "dtype": FLOATS[model.dtype],
            "baseline_dtype": FLOATS[session.base.dtype],
            "baseline_probe": session.speed.words,
            "same_fusions": model.same_fusions,
            "attention_body": model.attention("decode"),
        },
        "clock": {
            "mode": "graph" if session.where.type == "cuda" and not side.stepper.words else "wall",
            "l2": "warm",
            "rounds": len(rounds),
            "calls_per_sample": 1,
            "warmup": 1,
            "noisy": session.noisy,
            "power": "sustained",
            "drift": bool(rounds) and clock.Sample.of(walls(rounds)).drift,
        },
        "memory": _memory(session, side),
        "quality": side.quality,
    }


def _latency(rounds: Sequence[waves.Round]) -> dict[str, Any]:
    """Microseconds of a round: all requests once."""
    sample = clock.Sample.of(walls(rounds))
    found: dict[str, Any] = {n: getattr(sample, n) * 1e6 for n in ("median", "lo", "hi", "iqr")}
    return found | {"samples": [t * 1e6 for t in sample.samples]}


def _tokens(session: Session, rounds: Sequence[waves.Round], concurrency: int) -> dict[str, Any]:
    ttft, tpot = latencies(rounds)
    served = [s for r in rounds for s in r.served if s.made]
    gaps = list(itertools.chain.from_iterable(s.itl_s for s in served))
    rate = statistics.median(r.tokens_out / r.wall_s for r in rounds)
    bound = session.plan.bound
    inf = float("inf")
    good = None
    if bound is not None:
        limits = (bound.ttft_s or inf, bound.tpot_s or inf)
        good = statistics.median(waves.within(r.served, *limits) / r.wall_s for r in rounds)
    return {
        "tok_s": rate,
        "tok_s_in": statistics.median(r.tokens_in / r.prefill_s for r in rounds),
        "tok_s_per_card": rate,
        "tok_s_per_user": 1 / statistics.median(tpot) if tpot else None,
        "req_s": statistics.median(sum(s.made > 0 for s in r.served) / r.wall_s for r in rounds),
        "goodput": good,
        "concurrency": concurrency,
        "ttft_s": waves.spread(ttft),
        "tpot_s": waves.spread(tpot),
        "itl_s": waves.spread(gaps),
        "e2e_s": waves.spread([s.e2e_s for s in served]),
    }


def _fits(session: Session, side: Side) -> int:
    """How many sequences of mean length fit the memory beside the weights of a side."""
    model, tokens = side.model, sum(load.means(session.fitting))
    each = model.kv_bytes_per_token
    return ratios.max_fit_batch(memory=session.memory, weights=model.nbytes, kv_per_token=each, tokens=tokens)


def _memory(session: Session, side: Side) -> dict[str, Any]:
    model = side.model
    free = ratios.free_for_kv(session.memory, model.nbytes)
    on_card = session.where.type == "cuda"
    return {
        "weights": model.nbytes,
        "kv": side.pool.nbytes,
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "peak": torch.cuda.max_memory_allocated(session.where) if on_card else None,
        "free_for_kv": max(0, int(free)),
        "max_tokens": max(0, int(free / model.kv_bytes_per_token)),
        "max_concurrency": _fits(session, side),
        "load_s": side.load_s,
    }


def _money(session: Session, rounds: Sequence[waves.Round]) -> dict[str, Any] | None:
    return money.section(
        session.plan.usd_hour,
        prefill_s=sum(r.prefill_s for r in rounds),
        decode_s=sum(r.wall_s - r.prefill_s for r in rounds),
        tokens_in=sum(r.tokens_in for r in rounds),
        tokens_out=sum(r.tokens_out for r in rounds),
    )
