"""The tables of a report, as words: verdicts first, then rows of every kind, then what has no figure. For markdown and HTML.

A ratio stands with both batches and, where there is one, the bound; a figure with its spread. A column that would say "not
available" in every line becomes one line below the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from . import report_lines as lines
from . import report_series as series
from .record import Record
from .report_lines import Group, Verdict


@dataclass(frozen=True)
class Table:
    """`left` are the columns of words; `marks` {line: style} for a gate; `long` ones may be folded away."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[int] = frozenset({0})
    notes: tuple[str, ...] = ()
    long: bool = False
    gate: int | None = None

    def markdown(self) -> str:
        """As markdown; a bar within a cell would end it, so it becomes a slash."""
        line = "|" + "|".join("---" if i in self.left else "---:" for i in range(len(self.header))) + "|"
        body = ["| " + " | ".join(c.replace("|", "/").replace("\n", " ") for c in row) + " |" for row in self.rows]
        parts = [f"### {self.title}", "", "| " + " | ".join(self.header) + " |", line, *body]
        return "\n".join(parts + (["", *(f"- {note}" for note in self.notes)] if self.notes else [])) + "\n"


def verdict(group: Group) -> list[Table]:
    """Spec x cache: gate, what it costs in quality, what it holds, how fast, the three ratios, money and energy.

    Runs of a prompt and its answer together (mixed) have a table of their own below it.
    """
    found = lines.verdicts(group)
    answers = {"serve": "served, tok/s", "ladder": "output, tok/s"}.get(group.level, "decode, tok/s")
    columns: list[tuple[str, list[str]]] = [
        *_names(found),
        ("KL, nats", [_number(v.quality.get("kl"), ".4f") for v in found]),
        ("top-1", [_number(v.quality.get("top1"), ".1%") for v in found]),
        ("task score", [_number((v.quality.get("task") or {}).get("score"), ".3f") for v in found]),
        ("weights, MB", [_number(v.weights and v.weights / 1e6, ",.1f") for v in found]),
        ("KV, B/token", [_number(v.kv_per_token, ",.0f") for v in found]),
        ("prefill, tok/s", [_rate(v, v.prefill) for v in found]),
        (answers, [_rate(v, v.rate) for v in found]),
        ("prefill, × FP16 at same batch", [v.prefill_ratio for v in found]),
        *_gains(found),
    ]
    cases = [lines.headline(group, phase) for phase in ("prefill", "decode", "serve")]
    notes = ["figures are of " + ", ".join(case for case in cases if case) + "; " + _READ]
    notes += [
        f"KL, top-1 and gate were measured on {g}" for g in dict.fromkeys(v.quality.get("model") for v in found) if g
    ]
    if any(v.quality.get("gate") == "synthetic" for v in found):
        notes.append("gate synthetic: random weights at true shapes, so speed only; quality was not measured")
    notes += [f"{v.name}, {v.cache} cache: {why}" for v in found for why in v.quality.get("reasons") or () if _told(v)]
    tables = [_side_table(group.title, columns, notes + _caveats(found))]
    if case := lines.headline(group, "mixed"):
        mixed = lines.verdicts(group, ["mixed"])
        columns = [*_names(mixed), ("output, tok/s", [_rate(v, v.rate) for v in mixed]), *_gains(mixed)]
        notes = [f"figures are of {case}, the time of the prompt included; {_READ}", *_caveats(mixed)]
        tables.append(_side_table(f"Prompt and answer together: {group.title}", columns, notes))
    return tables


_READ = "brackets: spread over rounds, of a ratio the 95 % interval; batch: of this side / of FP16"


def _caveats(found: Sequence[Verdict]) -> list[str]:
    return [f"{v.name}, {v.cache} cache, {words}" for v in found for words in v.caveats]


def _names(found: Sequence[Verdict]) -> list[tuple[str, list[str]]]:
    return [
        ("spec", [v.name for v in found]),
        ("cache", [v.cache for v in found]),
        ("gate", ["reference" if v.side.plain else str(v.quality.get("gate", "none")) for v in found]),
    ]


def _gains(found: Sequence[Verdict]) -> list[tuple[str, list[str]]]:
    """The three ratios, money and energy."""
    return [
        *((f"× FP16 at {words}", [v.ratios[name] for v in found]) for name, words in lines.RATIOS.items()),
        ("$/Mtok", [v.usd for v in found]),
        ("J/token", [v.joules for v in found]),
    ]


def _side_table(title: str, columns: Sequence[tuple[str, list[str]]], notes: Sequence[str]) -> Table:
    """A line a side. A column that has nothing to say in any line becomes a note, or goes."""
    kept, told = [], []
    for name, cells in columns:
        others = {c for c in cells if c not in ("baseline", lines.RED)}
        only = next(iter(others)) if len(others) == 1 else ""
        if others and all(c.startswith("not available: ") for c in others):
            only = "not available: " + "; ".join(sorted(c.removeprefix("not available: ") for c in others))
        if only.startswith(("not ", "none: ")):
            told.append(f"{name}: {only}")
        elif only != "-":
            kept.append((name, cells))
    names = tuple(name for name, _ in kept)
    words = ("spec", "cache", "gate", "$/Mtok", "J/token")
    left = frozenset(i for i, n in enumerate(names) if n in words or "FP16" in n)
    rows = tuple(zip(*(cells for _, cells in kept), strict=True))
    return Table(title, names, rows, left, (*told, *notes), gate=names.index("gate"))


def _told(verdict: Verdict) -> bool:
    return verdict.quality.get("gate") not in ("synthetic", "none")


def _rate(verdict: Verdict, rate: lines.Rate | None) -> str:
    if rate is None and verdict.quality.get("gate") == "red":
        return lines.RED
    if rate is None and verdict.status != "ok":
        return f"{verdict.status}: see below"
    return "-" if rate is None else rate.words()


def points(group: Group) -> Table | None:
    """Every case that was measured; None when the verdict already shows them all."""
    body = []
    for side in group.sides():
        for r in group.of(side):
            rate, tokens = lines.rate(r), r.tokens or {}
            if rate is None:
                continue
            times = [_quantiles(tokens.get(name)) for name in ("ttft_s", "tpot_s")]
            same = lines.ratio_words((tokens.get("vs_fp16") or {}).get("same_batch"), r, "same_batch")
            roof = (r.roofline or {}).get("pct_of_roof")
            user, good = lines.per_user(r), tokens.get("goodput")
            body.append(
                (
                    r.case,
                    side.words(),
                    str(lines.batch(r) or "-"),
                    rate.words(),
                    _number(user, ",.1f"),
                    *times,
                    _number(good, ",.2f"),
                    "baseline" if side.plain else same,
                    _number(roof, ".0f"),
                )
            )
    if len({row[0] for row in body}) < 3:
        return None
    header = ["case", "side", "batch", "tok/s", "tok/s/user", "TTFT p50 / p99, ms", "TPOT p50 / p99, ms"]
    header += ["goodput, req/s", "× FP16 at same batch", "% of roof"]
    kept = [i for i in range(len(header)) if any(row[i] not in ("-", "not measured") for row in body)]
    rows = tuple(tuple(row[i] for i in kept) for row in body)
    left = frozenset(n for n, i in enumerate(kept) if i in (0, 1, 8))
    return Table(f"Every case: {group.title}", tuple(header[i] for i in kept), rows, left, long=True)


def break_even(grid: series.Grid) -> Table:
    """Rows of activations at which each spec meets torch's fastest float, by layer."""
    body = []
    for spec, held in grid.specs.items():
        row = [spec]
        for layer in grid.layers:
            row.append(series.crossing([p for (name, _), p in held.items() if name == layer])[1])
        body.append(tuple(row))
    notes = ["M at which the time of torch's fastest float equals ours; below it the quantised linear is faster"]
    if grid.ridge:
        notes.append(
            f"expected from published figures of {grid.ridge['card']}: weight-only gains are gone at M = {grid.ridge['ridge']:.0f}"
        )
        notes += _findings(grid)
    left = frozenset(range(len(grid.layers) + 1))
    return Table(f"Break-even M: {grid.title}; {grid.machine}", ("spec", *grid.layers), tuple(body), left, tuple(notes))


def _findings(grid: series.Grid) -> list[str]:
    """Crossings of weight-only specs more than twice off what the card's published figures let expect."""
    out = []
    for spec, held in grid.specs.items():
        at, _ = series.crossing([p for (name, _), p in held.items() if name == series.STACK])
        if at is not None and "a16" in spec and not 0.5 <= at / grid.ridge["ridge"] <= 2:
            out.append(f"finding: {spec} meets FP16 at M = {at:.0f}, {at / grid.ridge['ridge']:.1f} times the expected")
    return out


def ops(records: Iterable[Record]) -> list[Table]:
    """Ops and layers one by one, a table for each machine."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for r in lines.latest(records):
        if r.level not in ("op", "layer") or r.status != "ok" or not r.latency_us or lines.gate(r) == "red":
            continue
        latency, done = r.latency_us, [a for a in r.against or () if a["status"] == "ok" and a.get("median")]
        cache = r.scheme.get("kv_spec")
        base = series.base_of(r) or min(done, key=lambda a: a["median"], default=None)
        ends: Sequence[float] = (base or {}).get("ci95") or ()
        ratio = f"{base['ratio']:.2f}×" if base and base.get("ratio") else "-"
        ratio += f" ({ends[0]:.2f}–{ends[1]:.2f})" if len(ends) == 2 else ""
        best = min((a for a in done if not a["impl"].startswith("torch ")), key=lambda a: a["median"], default=None)
        middle = lines.Rate(
            latency["median"], latency.get("lo") or latency["median"], latency.get("hi") or latency["median"]
        )
        spec = str(r.scheme.get("spec"))
        row = (
            r.case,
            spec if not cache or cache == spec else f"{spec}, {cache} cache",
            middle.words(),
            f"{base['impl']}: {base['median']:,.1f}" if base else "-",
            ratio,
            f"{best['impl']}: {best['median']:,.1f}" if best else "-",
            _number((r.roofline or {}).get("pct_of_roof"), ".0f"),
        )
        found.setdefault(lines.machine(r), []).append(row)
    header = (
        "case",
        "spec",
        "µs (spread)",
        "fastest float of torch, µs",
        "× that (95 %)",
        "fastest other rival, µs",
        "% of roof",
    )
    return [
        Table(f"Ops and layers, one by one; {where}", header, tuple(rows), frozenset({0, 1, 3, 5}), long=True)
        for where, rows in found.items()
    ]


def left_out(records: Sequence[Record]) -> Table | None:
    """Not compared here: rows without a figure, by reason."""
    rows = tuple((why, str(count), what) for why, what, count in lines.left_out(records))
    return Table("Not compared here", ("why", "rows", "which"), rows, frozenset({0, 2})) if rows else None


def all_of(records: Sequence[Record]) -> dict[str, list[Table]]:
    """The tables by the part of the report they stand in: verdict, missing, break_even, rows."""
    groups = lines.groups(records)
    missing = left_out(records)
    return {
        "verdict": [t for g in groups for t in verdict(g)],
        "missing": [missing] if missing else [],
        "break_even": [break_even(g) for g in series.grids(records)],
        "rows": [t for g in groups if (t := points(g))] + ops(records),
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _quantiles(found: object) -> str:
    if not isinstance(found, dict) or found.get("p50") is None:
        return "-"
    last = found.get("p99")
    return f"{1e3 * found['p50']:,.1f} / " + ("-" if last is None else f"{1e3 * last:,.1f}")
