"""Two tables of served requests: rates and latencies of every side at every concurrency, and tokens per card against FP16.

Titles say model, machine, mix, lengths and bound; a factor has both batches beside it; what has no figure has a number, and the
reason stands under the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import ratios
from .record import Record
from .report_ratios import Lines

RATES = (
    "spec", "cache", "users", "tok/s (rounds)", "in t/s", "per user", "good/s", "TTFT 50", "99", "TPOT 50", "99", "ITL 99",
    "E2E 99",
)  # fmt: skip
RATIOS = ("spec", "cache", "gate", "users", "same batch, x", "same bound, x", "max fit, x", "fits", "$/Mt", "J/t")
_WAYS = ("same_batch", "same_bound", "max_fit")
_FLOATS = ("bf16", "fp32", "fp16")


def tables(records: Sequence[Record]) -> list[Lines]:
    """Both tables of each model and mix, nothing for records without served requests."""
    groups: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in records:
        if r.level == "serve" and r.source == "percard":
            mix = (r.shape.get("load") or {}).get("mix")
            groups.setdefault((r.model.get("id"), r.model.get("layers_run"), mix), {})[r.cell_key] = r
    found = []
    for held in groups.values():
        rows = list(held.values())
        found += [_rates(rows), _ratios(rows)]
    return [lines for lines in found if lines.rows]


def _rates(records: Sequence[Record]) -> Lines:
    lines = Lines(RATES, title=_title(records[0]), words=2)
    for r in records:
        lines.rows.append((*_side(r), str(r.shape["batch"]), *_figures(r)))
    failed = [r for r in records if r.status != "ok"]
    lines.notes = [f"{' '.join(_side(r))}: {r.status}: {(r.error or {}).get('message', '')}" for r in failed]
    load = records[0].shape.get("load") or {}
    refused = f", {load['refused']} refused (above the context)" if load.get("refused") else ""
    lines.notes += [
        "users: requests of a wave; TTFT, TPOT (first token left out), ITL and E2E in ms, 50 and 99: percentiles over all rounds",
        f"{load.get('requests')} requests{refused}; a wave starts when the one before has ended: no continuous batching",
        f"mix {load.get('mix')}: {load.get('source')}",
    ]
    return lines


def _figures(r: Record) -> tuple[str, ...]:
    tokens, latency = r.tokens, r.latency_us
    if not tokens or not latency:
        return (_why(r), *("-" for _ in RATES[4:]))
    rate = tokens["tok_s"]
    ends = sorted(rate * latency["median"] / latency[name] for name in ("hi", "lo"))
    return (
        f"{number(rate)} ({'-'.join(number(end) for end in ends)})",
        *(number(tokens.get(name)) for name in ("tok_s_in", "tok_s_per_user", "goodput")),
        *(
            _ms(tokens, *which)
            for which in (("ttft_s", "p50"), ("ttft_s", "p99"), ("tpot_s", "p50"), ("tpot_s", "p99"))
        ),
        _ms(tokens, "itl_s", "p99"),
        _ms(tokens, "e2e_s", "p99"),
    )


def _ratios(records: Sequence[Record]) -> Lines:
    """Of each side one line: at its largest concurrency, since the other two ratios are of the whole ladder."""
    lines = Lines(RATIOS, words=3, title="tokens per second and card against FP16 of the same rounds")
    last: dict[tuple[str, str], Record] = {}
    for r in records:
        if r.tokens and (_side(r) not in last or r.shape["batch"] > last[_side(r)].shape["batch"]):
            last[_side(r)] = r
    numbers: dict[str, int] = {}
    capped = False
    for side, r in last.items():
        assert r.tokens is not None
        versus, memory = r.tokens.get("vs_fp16") or {}, r.memory or {}
        price = ((r.money or {}).get("usd_per_mtok") or {}).get("out")
        joules = (r.energy or {}).get("j_per_out_token") if (r.energy or {}).get("power_valid") else None
        gate = (r.quality or {}).get("gate", "none")
        found = [versus.get(way) or {} for way in _WAYS]
        cells = [ratios.cell(one, numbers) for one in found]
        capped |= any(one.get("ratio") is not None and one.get("reason") for one in found)
        if side[0] == "FP16" and side[1] == "16bit":
            cells = [
                "1",
                *(
                    "1" if (versus.get(way) or {}).get("ratio") else c
                    for way, c in zip(_WAYS[1:], cells[1:], strict=True)
                ),
            ]
        fits = memory.get("max_concurrency")
        fits = f"{fits / 1000:.0f}k" if fits and fits >= 10_000 else number(fits)
        lines.rows.append((*side, gate, str(r.shape["batch"]), *cells, fits, number(price), number(joules)))
    kept = [
        i for i in range(len(RATIOS)) if i < 8 or any(row[i] != "-" for row in lines.rows)
    ]  # no price, no joules: no column
    lines.header = tuple(RATIOS[i] for i in kept)
    lines.rows = [tuple(row[i] for i in kept) for row in lines.rows]
    first = records[0]
    lines.notes = [f"[{n}] {why}" for why, n in numbers.items()]
    if capped:
        lines.notes.append("* batch capped: the largest measured is still inside the bound, or less than what fits")
    lines.notes.append(
        "a/b: batch of this side / of FP16; [lo, hi]: 95 % interval over rounds; fits: sequences of mean length"
    )
    floor = first.cpu.get("noise_floor_pct", first.card.get("noise_floor_pct"))
    if floor is not None:
        lines.notes.append(f"noise floor: FP16 against itself differs by {floor:.1f} %")
    lines.notes += sorted(
        {f"no joules: {e['power_reason']}" for r in records if (e := r.energy) and not e["power_valid"]}
    )
    if any((r.quality or {}).get("gate") == "synthetic" for r in records):
        lines.notes.append("gate synthetic: speed at true shapes, quality not measured")
    lines.notes += _reasons(records)
    return lines


def _reasons(records: Sequence[Record]) -> list[str]:
    """What red gates say."""
    found = {_side(r): r.quality for r in records if (r.quality or {}).get("gate") == "red"}
    return [f"{' '.join(side)}: gate red: {'; '.join((q or {}).get('reasons') or [])}" for side, q in found.items()]


def _side(r: Record) -> tuple[str, str]:
    """(spec, cache); FP16 is FP16 in whatever float type it ran."""
    spec, cache = str(r.scheme.get("spec", "?")), str(r.scheme.get("kv_spec", "?"))
    return "FP16" if spec in (*_FLOATS, "16bit") else spec, "16bit" if cache in _FLOATS else cache


def _why(r: Record) -> str:
    return "gate red" if (r.quality or {}).get("gate") == "red" else r.status


def _title(r: Record) -> str:
    model, bound = r.model, r.shape.get("bound") or {}
    layers = "" if model["layers_run"] == model["layers"] else f", {model['layers_run']} of {model['layers']} layers"
    words = f"{model['id']}{', synthetic' if model['weights'] == 'synthetic' else ''}{layers}: "
    words += f"{(r.shape.get('load') or {}).get('mix')}, mean {r.shape['isl']} in and {r.shape['osl']} out"
    limits = [f"{n.upper()} {bound[f'{n}_ms']:g} ms" for n in ("ttft", "tpot") if bound.get(f"{n}_ms") is not None]
    if limits:
        words += f"; good: within {', '.join(limits)}"
    machine = r.card.get("name") or f"{r.cpu.get('model')}, {r.cpu.get('threads')} threads"
    base = f"; FP16 is {r.body['baseline_dtype']}" if r.body.get("baseline_dtype") else ""
    return f"{words}; {machine}{base}"


def _ms(tokens: Mapping[str, Any], name: str, which: str) -> str:
    value = (tokens.get(name) or {}).get(which)
    return number(None if value is None else value * 1e3)


def number(value: float | None) -> str:
    """Three digits or so."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
