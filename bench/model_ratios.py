"""same_bound and max_fit of model rows, over the batches of a ladder. Pure: records in, records out.

A row that was written before the ladder's last batch was timed cannot know them; `completed` fills them in, for tables and JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import ratios
from .fair import Budget
from .ratios import Bound, Point
from .record import Record

_FLOATS = ("bf16", "fp32", "fp16")


def fits(asked: Mapping[str, Any], tokens: int) -> int:
    """Sequences that fit, from what `vs_fp16.max_fit.memory` of a row says."""
    return ratios.max_fit_batch(
        memory=asked["bytes"],
        weights=asked["weights"],
        kv_per_token=asked["kv_per_token"],
        tokens=tokens,
        util=asked["util"],
        overhead=asked["overhead"],
    )


def completed(records: Sequence[Record], bound: Bound | None = None, budget: Budget | None = None) -> list[Record]:
    """The records with same_bound and max_fit in every timed row of a decode or a whole, from all batches among them.

    `bound` and `budget` None = as the rows say (the last one that says). Other rows, and rows without their baseline, come as
    they are.
    """
    timed = [r for r in records if r.level == "model" and r.status == "ok" and _over_ladder(r)]
    families: dict[tuple[Any, ...], list[Record]] = {}
    for found in timed:
        families.setdefault(_family(found), []).append(found)
    filled: dict[int, Record] = {}
    for family in families.values():
        limit = bound or next(
            (Bound.of_section(r.shape["bound"]) for r in reversed(family) if r.shape.get("bound")), None
        )
        sides: dict[tuple[Any, ...], list[Record]] = {}
        for found in family:
            sides.setdefault(_side(found), []).append(found)
        base = sides.get(("baseline",), [])
        if not base:  # what the rows say was taken against rows that are not here
            continue
        for rows in sides.values():
            said = _ladder_ratios(base, rows, limit, budget)
            for found in rows:
                assert found.tokens is not None
                versus = found.tokens["vs_fp16"] | said
                filled[id(found)] = replace(found, tokens=found.tokens | {"vs_fp16": versus})
    return [filled.get(id(found), found) for found in records]


def _ladder_ratios(
    base: Sequence[Record], side: Sequence[Record], bound: Bound | None, budget: Budget | None
) -> dict[str, Any]:
    """same_bound and max_fit of one side."""
    asked = [_asked_of(rows, budget) for rows in (base, side)]
    length = side[0].shape["isl"] + side[0].shape["osl"]
    quantile = bound.quantile if bound else ratios.QUANTILE
    ours, theirs = points(side, quantile), points(base, quantile)
    ran, of = side[0].model.get("layers_run"), side[0].model.get("layers")
    if bound is not None and ran != of:
        words = f"{ran} of {of} layers ran: their time says nothing about a bound of the whole model"
        held = ratios.nothing(words, bound=bound.section())
    else:
        held = ratios.same_bound(theirs, ours, bound)
    if asked[0] is None or asked[1] is None:
        fit = ratios.nothing("the memory is not known; --memory-gb")
    else:
        fit = ratios.max_fit(theirs, ours, fits(asked[0], length), fits(asked[1], length))
    return {"same_bound": held, "max_fit": fit | {"memory": asked[1]}}


def points(rows: Iterable[Record], quantile: float = ratios.QUANTILE) -> list[Point]:
    """Rows of one side as points over the batch."""
    found = []
    for r in rows:
        assert r.latency_us is not None and r.tokens is not None
        made = r.shape["batch"] * (r.shape["osl"] if ".mix" in r.case else 1)
        rates = tuple(made / (t / 1e6) for t in r.latency_us["samples"])
        name = f"p{round(100 * quantile)}"
        latency = {k: (r.tokens.get(k) or {}).get(name) for k in ("ttft_s", "tpot_s")}
        found.append(Point(r.shape["batch"], rates, latency["ttft_s"], latency["tpot_s"], r.cell_key, r.run_id))
    return found


def _over_ladder(r: Record) -> bool:
    return (".tg" in r.case or ".mix" in r.case) and bool(
        r.tokens and r.latency_us and r.shape.get("osl") and "max_fit" in (r.tokens.get("vs_fp16") or {})
    )


def _family(r: Record) -> tuple[Any, ...]:
    shape = r.shape
    machine = r.card.get("uuid") or r.cpu.get("model")
    kind = ".mix" in r.case
    return r.model["id"], r.model.get("layers_run"), kind, shape["isl"], shape["osl"], shape["kv_len"], machine


def _side(r: Record) -> tuple[Any, ...]:
    assert r.tokens is not None
    if r.tokens["vs_fp16"]["same_batch"].get("baseline_key") == r.cell_key:
        return ("baseline",)
    cache = r.scheme["kv_spec"]
    return r.scheme["spec"], r.scheme["head"], None if cache in _FLOATS else cache


def _asked_of(rows: Sequence[Record], budget: Budget | None) -> dict[str, Any] | None:
    """What a side needs of memory. A baseline may run in another float type at each batch: the one that holds least counts."""
    said = [m for r in rows if r.tokens and (m := (r.tokens["vs_fp16"].get("max_fit") or {}).get("memory"))]
    found = min(said, key=lambda m: (m["weights"], m["kv_per_token"])) if said else None
    if found is None or budget is None:
        return found
    return found | {"bytes": budget.memory, "util": budget.util, "overhead": budget.overhead, "of": budget.of}
