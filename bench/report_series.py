"""What the plots of a report show, as plain numbers: curves, points and grids taken from records.

Pure: no drawing, no file. A row whose gate is red gives no speed here; it may stand in `sizes`, marked as red.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import card as card_module
from . import report_lines as lines
from .record import Record
from .report_lines import Group, Side

STACK = "whole layer"  # the four linears of a layer in one time
_LINEARS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class Point:
    """x and y with the spread of y over rounds, and words that belong to it (a batch, a case)."""

    x: float
    y: float
    lo: float
    hi: float
    label: str = ""
    red: bool = False


@dataclass(frozen=True)
class Curve:
    """Points of a side in the order of x."""

    side: Side
    points: tuple[Point, ...]
    rival: bool = False


@dataclass(frozen=True)
class Chart:
    """What one figure holds: where it belongs, and its curves. `about` are facts that a drawing adds (roofs, ridges)."""

    title: str
    curves: tuple[Curve, ...]
    about: Mapping[str, Any] = field(default_factory=dict)


def pareto(group: Group) -> list[Chart]:
    """Tokens per second and card against those of a user, over batch or concurrency; a chart for each length of text."""
    found: dict[tuple[Any, ...], dict[Side, list[tuple[int, Point]]]] = {}
    for side in group.sides():
        for record in (r for phase in ("decode", "mixed", "serve") for r in group.of(side, phase)):
            y, x, at = lines.per_card(record), lines.per_user(record), lines.batch(record)
            if y is None or x is None or at is None:
                continue
            load = record.shape.get("load") or {}
            kind = "prompt and answer together" if lines.phase_of(record) == "mixed" else ""
            isl = record.shape.get("isl") if kind else lines.depth(record)
            key = (kind, isl, record.shape.get("osl"), load.get("mix"), load.get("rate"))
            point = Point(x, y.value, y.lo, y.hi, str(at))
            found.setdefault(key, {}).setdefault(side, []).append((at, point))
    charts = []
    for (kind, isl, osl, mix, load_rate), sides in found.items():
        if len({at for held in sides.values() for at, _ in held}) < 2:
            continue
        text = [
            kind,
            f"{isl:,.0f} tokens in" if isl else "",
            f"{osl:,.0f} out" if osl else "",
            f"mix {mix}" if mix else "",
        ]
        text.append(f"{load_rate:g} requests/s" if isinstance(load_rate, int | float) else "")
        curves = tuple(Curve(s, tuple(p for _, p in sorted(h, key=lambda ap: ap[0]))) for s, h in sides.items())
        charts.append(Chart(", ".join(filter(None, [group.model, *text])), curves, {"level": group.level}))
    return charts


def rates(group: Group) -> list[Chart]:
    """Per phase one dot a side, at the headline case, with its spread."""
    charts = []
    for phase in ("prefill", "decode", "mixed", "serve"):
        case = lines.headline(group, phase)
        curves = []
        for side in group.sides():
            found = [r for r in group.of(side, phase) if lines.case_of(r) == case and lines.rate(r) is not None]
            if found:
                rate = lines.rate(found[-1])
                assert rate is not None
                curves.append(Curve(side, (Point(rate.value, rate.value, rate.lo, rate.hi),)))
        if len(curves) > 1:
            charts.append(Chart(f"{case}", tuple(curves), {"phase": phase}))
    return charts


def depths(group: Group) -> list[Chart]:
    """Decode rate over depths of the cache, a curve a side; a chart for each batch. Only where there are several depths."""
    found: dict[int, dict[Side, list[Point]]] = {}
    for side in group.sides():
        for record in group.of(side, "decode"):
            rate, at = lines.rate(record), lines.batch(record)
            if rate is not None and at is not None and lines.depth(record):
                point = Point(lines.depth(record), rate.value, rate.lo, rate.hi)
                found.setdefault(at, {}).setdefault(side, []).append(point)
    return [
        Chart(f"{group.model}, batch {at}", tuple(Curve(s, _sorted(h)) for s, h in sides.items()))
        for at, sides in found.items()
        if len({p.x for held in sides.values() for p in held}) > 1
    ]


def attention(records: Iterable[Record]) -> list[Chart]:
    """Ops over a paged cache: microseconds over the cached length, a curve a cache, and the fastest rival of each length."""
    found: dict[tuple[str, str], dict[Side, list[Point]]] = {}
    rivals: dict[tuple[str, str], dict[float, Point]] = {}
    for r in lines.latest(records):
        if r.level != "op" or not r.scheme.get("kv_spec") or r.status != "ok" or not r.latency_us:
            continue
        s, latency = r.shape, r.latency_us
        op = r.case.partition(".")[0]
        heads = f"{s['G'] * s['H']}/{s['H']}/{s['D']}" if {"G", "H", "D"} <= set(s) else ""
        key = (
            lines.machine(r),
            ", ".join(filter(None, [op, f"heads {heads}" if heads else "", f"batch {s.get('batch', 1)}"])),
        )
        # The cache gives the colour here: there are no weights.
        side = Side(str(r.scheme["kv_spec"]), None)
        point = Point(s.get("S") or s.get("T") or 1, latency["median"], latency["lo"], latency["hi"])
        found.setdefault(key, {}).setdefault(side, []).append(point)
        done = [a for a in r.against or () if a["status"] == "ok"]
        if done:
            best = min(done, key=lambda a: a["median"])
            held = rivals.setdefault(key, {}).get(point.x)
            if held is None or best["median"] < held.y:
                rivals[key][point.x] = Point(point.x, best["median"], best["lo"], best["hi"], best["impl"])
    charts = []
    for key, sides in found.items():
        curves = [Curve(s, _sorted(h)) for s, h in sides.items()]
        if key in rivals:
            curves.append(Curve(Side("fastest rival", None), _sorted(rivals[key].values()), rival=True))
        if len({p.x for c in curves for p in c.points}) > 1:
            charts.append(Chart(key[1], tuple(curves), {"machine": key[0]}))
    return charts


def roofline(records: Iterable[Record]) -> list[Chart]:
    """Arithmetic intensity (FLOP per byte) against FLOP/s, with the roofs that were measured; a chart for each machine."""
    found: dict[str, dict[Side, list[Point]]] = {}
    roofs: dict[str, dict[str, float]] = {}
    for r in lines.latest(records):
        work, latency = r.roofline or {}, r.latency_us
        if not (latency and work.get("flops") and work.get("bytes")) or r.status != "ok" or lines.gate(r) == "red":
            continue
        if r.level != "op" and r.level != "layer" and r.level != "model":
            continue
        name, did = lines.machine(r), float(work["flops"])
        # A step of a model records its own bytes and flops; an op is named by what it did with them.
        kind = r.case.partition(".")[0] if r.scheme.get("kv_spec") and r.level == "op" else lines.side(r).spec
        rates = [did / latency[end] * 1e6 for end in ("median", "hi", "lo")]
        point = Point(did / work["bytes"], rates[0], min(rates), max(rates), r.case)
        found.setdefault(name, {}).setdefault(Side(kind, None), []).append(point)
        roof = (
            {"read": r.cpu.get("read_gbs")} | (r.cpu.get("roof") or {})
            if not r.card
            else dict(r.card.get("roof") or {})
        )
        for key, value in roof.items():
            if value:
                roofs.setdefault(name, {})[key] = max(value, roofs.get(name, {}).get(key, 0.0))
    return [
        Chart(name, tuple(Curve(s, _sorted(h)) for s, h in sides.items()), {"roofs": _named(roofs.get(name, {}))})
        for name, sides in found.items()
        if sum(len(h) for h in sides.values()) > 2
    ]


def _named(roof: Mapping[str, float]) -> dict[str, float]:
    """{memory: bytes/s, <type>: FLOP/s} from GB/s and 1e12/s; of several rates of memory the highest."""
    memory = [v for k, v in roof.items() if k in ("read", "copy_gbs", "read_gbs")]
    found = {"memory": 1e9 * max(memory)} if memory else {}
    return found | {k: 1e12 * v for k, v in roof.items() if k not in ("read", "copy_gbs", "read_gbs")}


@dataclass(frozen=True)
class Grid:
    """Speed-ups of a model's layers on one machine: {spec: {(layer, M): Point(M, ratio, lo, hi)}}."""

    title: str
    machine: str
    layers: tuple[str, ...]
    tokens: tuple[int, ...]
    specs: Mapping[str, Mapping[tuple[str, int], Point]]
    ridge: Mapping[str, Any] = field(default_factory=dict)


def grids(records: Iterable[Record]) -> list[Grid]:
    """Ratio of torch's fastest float to each linear, by layer and rows of activations, and of the four linears together.

    Of the sum of the four the ends are those of all slow and all fast rounds together: wider than an interval would be.
    """
    found: dict[tuple[str, str], dict[str, dict[tuple[str, int], Record]]] = {}
    for r in lines.latest(records):
        parts = r.case.split(".")
        ours = (
            r.level == "op" and r.status == "ok" and not r.scheme.get("kv_spec") and r.latency_us and r.shape.get("M")
        )
        if not ours or len(parts) < 4 or base_of(r) is None:
            continue
        at = next((i for i, part in enumerate(parts) if part in ("decode", "prefill")), None)
        if at is None or at < 2:
            continue
        model, layer = ".".join(parts[: at - 1]), parts[at - 1]
        spec = found.setdefault((model, lines.machine(r)), {}).setdefault(str(r.scheme["spec"]), {})
        spec[layer, r.shape["M"]] = r
    out = []
    for (model, where), specs in found.items():
        tokens = tuple(sorted({m for held in specs.values() for _, m in held}))
        named = list(dict.fromkeys(layer for held in specs.values() for layer, _ in held))
        points = {spec: _ratios(held, tokens) for spec, held in specs.items()}
        whole = any(layer == STACK for held in points.values() for layer, _ in held)
        some = next(r for held in specs.values() for r in held.values())
        rows = (*named, *([STACK] if whole else []))
        out.append(Grid(model, where, rows, tokens, points, ridges(some)))
    return out


def _ratios(held: Mapping[tuple[str, int], Record], tokens: Sequence[int]) -> dict[tuple[str, int], Point]:
    found: dict[tuple[str, int], Point] = {}
    for (layer, m), record in held.items():
        base = base_of(record)
        assert base is not None
        ends = base.get("ci95") or (base["ratio"], base["ratio"])
        found[layer, m] = Point(m, base["ratio"], ends[0], ends[1])
    for m in tokens:
        pairs = [(base_of(held[layer, m]), held[layer, m].latency_us) for layer in _LINEARS if (layer, m) in held]
        if len(pairs) == len(_LINEARS):
            total = {(who, end): sum(pair[who][end] for pair in pairs)  # type: ignore[index]
                     for who in (0, 1) for end in ("median", "lo", "hi")}  # fmt: skip
            middle = total[0, "median"] / total[1, "median"]
            found[STACK, m] = Point(m, middle, total[0, "lo"] / total[1, "hi"], total[0, "hi"] / total[1, "lo"])
    return found


def base_of(record: Record) -> Mapping[str, Any] | None:
    """torch's fastest float of the same rounds."""
    done = [
        r for r in record.against or () if r["status"] == "ok" and r["impl"].startswith("torch ") and r.get("ratio")
    ]
    return min(done, key=lambda r: r["median"], default=None)


def ridges(record: Record) -> dict[str, Any]:
    """{"ridge": rows, "flat": {bits: rows}} that the published figures of this card let expect; {} for another machine.

    FP16 meets its roof at rate / bandwidth rows, and weight-only codes of b bytes at rate x b / (2 x bandwidth): up to there
    their gain is flat, and at the FP16 ridge it is gone (bench/cards/cards.json; Williams et al., Roofline, CACM 2009).
    """
    name, spec_id = record.card.get("name"), record.card.get("spec_id")
    row = next((c for c in card_module.published() if c["id"] == spec_id or (name and name in c["device_names"])), None)
    if row is None:
        return {}
    ridge = row["bf16_tflops"] * 1e12 / (row["bandwidth_gbs"] * 1e9)
    return {"ridge": ridge, "flat": {8: ridge / 2, 4: ridge / 4}, "card": row["name"]}


def crossing(points: Sequence[Point]) -> tuple[float | None, str]:
    """Where a speed-up meets 1: (rows, words). Between two measured M it is read off a straight line over log M."""
    ordered = sorted(points, key=lambda p: p.x)
    if not ordered:
        return None, "not measured"
    if ordered[0].y < 1 and all(p.y < 1 for p in ordered):
        return None, f"never ahead, from M = {ordered[0].x:,.0f} to {ordered[-1].x:,.0f}"
    for left, right in itertools.pairwise(ordered):
        if left.y >= 1 > right.y:
            share = math.log(left.y) / (math.log(left.y) - math.log(right.y))
            at = math.exp(math.log(left.x) + share * (math.log(right.x) - math.log(left.x)))
            return at, f"about {at:,.0f} (between {left.x:,.0f} and {right.x:,.0f})"
    return None, f"above {ordered[-1].x:,.0f}, the largest measured"


def sizes(group: Group) -> list[Chart]:
    """Bytes of the weights against KL (nats) of each side; red ones are marked. None where fewer than two have both."""
    curves = []
    for verdict in lines.verdicts(group):
        kl = verdict.quality.get("kl")
        if verdict.weights and kl is not None:
            red = verdict.quality.get("gate") == "red"
            curves.append(Curve(verdict.side, (Point(verdict.weights, kl, kl, kl, verdict.name, red),)))
    if sum(c.points[0].y > 0 for c in curves) < 2:
        return []
    gated = next((v.quality.get("model") for v in lines.verdicts(group) if v.quality.get("kl")), None)
    return [Chart(group.model, tuple(curves), {"gated": gated})]


def prices(group: Group) -> list[Chart]:
    """Dollars per million tokens at the cheapest batch of each side, against a task's score or, where rows have none, KL."""
    rows = {
        s: [r for p in ("decode", "mixed", "serve") for r in group.of(s, p) if lines.rate(r)] for s in group.sides()
    }

    def cheapest(kind: str) -> dict[Side, tuple[float, Record]]:
        prices = {s: [(u[kind], r) for r in held if (u := (r.money or {}).get("usd_per_mtok")) and u.get(kind) is not None]
                  for s, held in rows.items()}  # fmt: skip
        return {s: min(held, key=lambda pair: pair[0]) for s, held in prices.items() if held}

    # All sides by one kind of price: tokens in and out together where every side has it.
    kinds = {kind: cheapest(kind) for kind in ("total", "out")}
    kind = max(kinds, key=lambda k: len(kinds[k]))
    found = kinds[kind]
    scored = any((r.quality or {}).get("task") for _, r in found.values())
    curves = []
    for side, (price, record) in found.items():
        quality = record.quality or {}
        y = (quality.get("task") or {}).get("score") if scored else quality.get("kl")
        if y is not None:
            curves.append(Curve(side, (Point(price, y, y, y, str(lines.batch(record) or "")),)))
    if sum(scored or c.points[0].y > 0 for c in curves) < 2:
        return []
    return [Chart(group.model, tuple(curves), {"scored": scored, "kind": kind})]


def _sorted(points: Iterable[Point]) -> tuple[Point, ...]:
    return tuple(sorted(points, key=lambda p: p.x))
