"""What records say, as plain facts: groups that may stand side by side, a line for each spec and cache, what is missing.

Nothing is drawn or printed here; report_tables.py makes tables of it and report_series.py what the plots need.

A group is one model on one machine at one level: only within it are figures compared. A side of a group is a spec of weights
over a spec of the cache; the float types of the baseline (prefill and decode may differ in them) are one side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .record import Record

FLOATS = ("bf16", "fp16", "fp32", "16bit")  # 16bit: of a row that failed before its type was known
BASELINE = (
    "FP16"  # how the side of 16-bit weights over a 16-bit cache is keyed; it is shown as the float types it ran in
)
RED = "no figure: gate red"
RATIOS = {"same_batch": "same batch", "same_bound": "same bound", "max_fit": "max fit"}


@dataclass(frozen=True)
class Rate:
    """A figure with its spread over rounds; lo = hi = value when the record keeps no samples."""

    value: float
    lo: float
    hi: float

    def words(self) -> str:
        digits = 0 if self.value >= 100 else 1 if self.value >= 1 else 3
        text = f"{self.value:,.{digits}f}"
        return text if self.lo == self.hi else f"{text} ({self.lo:,.{digits}f}–{self.hi:,.{digits}f})"


@dataclass(frozen=True)
class Side:
    """A spec of weights ("FP16" for floats) over a cache (None = of the float type)."""

    spec: str
    cache: str | None

    @property
    def plain(self) -> bool:
        return self.spec == BASELINE and self.cache is None

    def words(self) -> str:
        return self.spec + (f", {self.cache} cache" if self.cache else "")


@dataclass(frozen=True)
class Group:
    """Records of one model on one machine at one level, of one program."""

    level: str
    machine: str
    model: str
    source: str
    records: tuple[Record, ...]

    @property
    def title(self) -> str:
        by = "" if self.source == "percard" else f", measured by {self.source}"
        what = {"model": "whole model", "serve": "served requests", "ladder": "ladder of models and specs"}[self.level]
        return f"{self.model}, {what}{by}; {self.machine}"

    def sides(self) -> list[Side]:
        """Baseline first, then in order of appearance, caches of one spec together."""
        found = list(dict.fromkeys(side(r) for r in self.records))
        specs = list(dict.fromkeys(s.spec for s in sorted(found, key=lambda s: s.spec != BASELINE)))
        return sorted(found, key=lambda s: (specs.index(s.spec), s.cache is not None))

    def of(self, wanted: Side, phase: str | None = None) -> list[Record]:
        """Records of a side; the 16-bit head beside an int8 one is left out."""
        mine = [r for r in self.records if side(r) == wanted]
        heads = list(dict.fromkeys(r.scheme.get("head") for r in mine))
        head = "int8-row" if "int8-row" in heads else heads[0] if heads else None
        return [r for r in mine if r.scheme.get("head") == head and phase in (None, phase_of(r))]


def latest(records: Iterable[Record]) -> list[Record]:
    """Of rows with one key the last one, but a row that holds figures stays before a later one that failed."""
    kept: dict[tuple[str, str, str], Record] = {}
    for record in records:
        # A key does not say which instructions of a machine were held back.
        key = (record.cell_key, machine(record), record.source)
        before = kept.get(key)
        if before is None or record.status == "ok" or before.status != "ok":
            kept[key] = record
    return list(kept.values())


def side(record: Record) -> Side:
    spec, cache = str(record.scheme.get("spec", "?")), record.scheme.get("kv_spec")
    if is_rung(record):  # sides of a ladder are of several models, each with floats of its own
        return Side(f"{record.model.get('id')} {spec}", None if cache in FLOATS else cache)
    return Side(BASELINE if spec in FLOATS else spec, None if cache in FLOATS else cache)


def is_rung(record: Record) -> bool:
    """Whether a record is of a ladder: a task of the user over models and specs."""
    return ".ladder." in record.case


def phase_of(record: Record) -> str:
    """prefill, decode or mixed (a prompt and its answer together); of a served load and of a ladder: serve."""
    if record.level == "serve" or is_rung(record):
        return "serve"
    return "prefill" if ".pp" in record.case else "mixed" if ".mix" in record.case else "decode"


def machine(record: Record) -> str:
    """Card, or processor with its threads; of which kind the cache of torch's kernels is where it was held back."""
    if record.card.get("name"):
        cards = record.card.get("cards") or 1
        return (f"{cards} x " if cards > 1 else "") + str(record.card["name"])
    cpu = record.cpu
    if not cpu:
        return "unnamed machine"
    held = str(cpu.get("torch_isa") or "").partition(",")[0]
    return f"{cpu.get('model', 'a processor')}, {cpu.get('threads', '?')} threads" + (f", {held}" if held else "")


def model_name(record: Record) -> str:
    """As it was timed: "qwen3-0.6b (synthetic, 8 of 28 layers)"."""
    model = record.model
    words = ["synthetic"] if model.get("weights") == "synthetic" else []
    if model.get("layers_run") != model.get("layers"):
        words.append(f"{model.get('layers_run')} of {model.get('layers')} layers")
    name = model.get("id") or record.case.split(".model.")[0].split(".serve.")[0].split(".layer.")[0]
    return name + (f" ({', '.join(words)})" if words else "")


def groups(records: Iterable[Record]) -> list[Group]:
    """Records of levels model and serve by level, machine, model and program; rows that failed stand with their kin."""
    found: dict[tuple[str, str, str, str], list[Record]] = {}
    for record in latest(records):
        if record.level in ("model", "serve"):
            rung = is_rung(record)
            name = record.case.split(".ladder.")[1] if rung else model_name(record)
            key = ("ladder" if rung else record.level, machine(record), name, record.source)
            found.setdefault(key, []).append(record)
    return [Group(*key, tuple(held)) for key, held in found.items()]


def rate(record: Record) -> Rate | None:
    """Tokens per second (of a prefill: read, else written) with the spread of the rounds; None without a figure."""
    tokens = record.tokens or {}
    value = tokens.get("tok_s_in" if phase_of(record) == "prefill" else "tok_s")
    if value is None or gate(record) == "red":
        return None
    return spread(record, value)


def spread(record: Record, value: float) -> Rate:
    """A rate with the ends that the slowest and the fastest round of its record give it."""
    latency = record.latency_us or {}
    middle, lo, hi = (latency.get(name) for name in ("median", "lo", "hi"))
    samples = latency.get("samples")
    if samples and middle is None:
        ordered = sorted(samples)
        middle, lo, hi = ordered[len(ordered) // 2], ordered[0], ordered[-1]
    if not (middle and lo and hi):
        return Rate(value, value, value)
    return Rate(value, min(value, value * middle / hi), max(value, value * middle / lo))


def per_user(record: Record) -> float | None:
    """Tokens per second that one user sees: as recorded, else the rate over the sequences that share it."""
    tokens = record.tokens or {}
    found, at = rate(record), batch(record)
    if tokens.get("tok_s_per_user") is not None:
        return tokens["tok_s_per_user"]
    return None if found is None or not at else found.value / at


def per_card(record: Record) -> Rate | None:
    """Tokens per second and card."""
    found, cards = rate(record), record.card.get("cards") or 1
    if found is None:
        return None
    return Rate(found.value / cards, found.lo / cards, found.hi / cards)


def batch(record: Record) -> int | None:
    """Sequences at once; of a served load the requests that were in flight."""
    return record.shape.get("batch") or (record.tokens or {}).get("concurrency")


def depth(record: Record) -> int:
    """Tokens in the cache when decoding begins."""
    return record.shape.get("kv_len") or record.shape.get("isl") or 0


def gate(record: Record) -> str:
    return (record.quality or {}).get("gate", "none")


def bound_words(bound: Mapping[str, Any] | str | None) -> str:
    """ "TTFT ≤ 2,000 ms, TPOT ≤ 50 ms at p99"; empty when there is none."""
    if not bound:
        return ""
    if isinstance(bound, str):
        return bound
    parts = [f"{name.upper()} ≤ {bound[f'{name}_ms']:,g} ms" for name in ("ttft", "tpot") if bound.get(f"{name}_ms")]
    quantile = bound.get("quantile")
    if not parts or quantile is None:
        return ", ".join(parts)
    return ", ".join(parts) + f" at p{100 * quantile if quantile <= 1 else quantile:g}"


def reason_words(reason: Any) -> str:
    """A reason as words: baseline_does_not_fit -> baseline does not fit."""
    text = str(reason)
    return text if " " in text else text.replace("_", " ")


def ratio_words(found: Mapping[str, Any] | None, record: Record, name: str) -> str:
    """One of the three ratios with what it needs to mean something: interval, both batches, of a bound the bound."""
    if not found:
        return "not measured"
    if found.get("ratio") is None:
        return f"none: {reason_words(found.get('reason', 'no reason was recorded'))}"
    interval: Sequence[float] = found.get("ci95") or ()
    text = f"{found['ratio']:.2f}×" + (f" ({interval[0]:.2f}–{interval[1]:.2f})" if len(interval) == 2 else "")
    ours, theirs = found.get("batch", batch(record)), found.get("batch_fp16", batch(record))
    text += f", batch {ours} / {theirs}"
    if name == "same_bound":
        text += f", {bound_words(found.get('bound') or record.shape.get('bound')) or 'bound not recorded'}"
    return text + (", see below" if found.get("reason") else "")


def caveats(records: Sequence[Record]) -> list[str]:
    """Why a batch of a ratio is not the one that was meant: "same bound: batch capped: ..."."""
    told = []
    for record in records:
        for name, words in RATIOS.items():
            found = ((record.tokens or {}).get("vs_fp16") or {}).get(name) or {}
            if found.get("ratio") is not None and found.get("reason"):
                told.append(f"{words}: {reason_words(found['reason'])}")
    return list(dict.fromkeys(told))


def ratios(records: Sequence[Record]) -> dict[str, str]:
    """Each of the three ratios in words, from the records of a side, the headline first: a ratio, else why there is none."""
    told: dict[str, str] = {}
    for name in RATIOS:
        seen = [(r, ((r.tokens or {}).get("vs_fp16") or {}).get(name)) for r in records]
        best = next(((r, f) for r, f in seen if f and f.get("ratio") is not None), None)
        best = best or next(((r, f) for r, f in seen if f), None)
        told[name] = ratio_words(best[1], best[0], name) if best else "not measured"
    return told


def money_words(records: Sequence[Record]) -> str:
    """Dollars for a million tokens, or why that is not known."""
    for record in records:
        found = (record.money or {}).get("usd_per_mtok") or {}
        parts = [f"{found[name]:.3g} {name}" for name in ("in", "out", "total") if found.get(name) is not None]
        if parts:
            return ", ".join(parts)
    return "not available: no price was given (--usd-hour)"


def energy_words(records: Sequence[Record]) -> str:
    """Joules of a written token, or why they are not known."""
    reasons = []
    for record in records:
        found = record.energy or {}
        if found.get("power_valid") and found.get("j_per_out_token") is not None:
            scope = str(found.get("scope") or "").replace("_", " ")
            return f"{found['j_per_out_token']:.3g}" + (f" ({scope})" if scope else "")
        if found.get("power_reason"):
            reasons.append(reason_words(found["power_reason"]))
    return f"not available: {reasons[0] if reasons else 'not measured in this run'}"


def case_of(record: Record) -> str:
    """The case, without the model where sides are of several models."""
    return "ladder." + record.case.split(".ladder.")[1] if is_rung(record) else record.case


def headline(group: Group, phase: str) -> str | None:
    """The case that most sides have a figure of; of several the smallest batch at the smallest depth."""
    cases = {case_of(r): r for r in group.records if phase_of(r) == phase}
    counts = Counter(case_of(r) for s in group.sides() for r in group.of(s, phase) if rate(r) is not None)
    if not cases:
        return None
    return min(cases, key=lambda c: (-counts[c], batch(cases[c]) or 0, depth(cases[c])))


@dataclass(frozen=True)
class Verdict:
    """A side of a group: whether it still says the same, what it holds, how fast it is beside FP16.

    `ratios` are of its answers (decode, serve or mixed), `prefill_ratio` is of reading at the same batch.
    """

    side: Side
    name: str
    cache: str
    quality: Mapping[str, Any]
    weights: int | None
    kv_per_token: float | None
    prefill: Rate | None
    rate: Rate | None
    prefill_ratio: str
    ratios: Mapping[str, str]
    usd: str
    joules: str
    caveats: Sequence[str] = ()
    status: str = "ok"  # of its rows when none of them came to a figure


def verdicts(group: Group, phases: Sequence[str] = ("decode", "serve")) -> list[Verdict]:
    """A line for each side, at the headline cases of the group; `phases` are those whose rate and three ratios it gives."""
    cases = {phase: headline(group, phase) for phase in ("prefill", *phases)}
    found = []
    for wanted in group.sides():

        def rows(phase: str, wanted: Side = wanted) -> list[Record]:
            return sorted(group.of(wanted, phase), key=lambda r: case_of(r) != cases[phase])

        mine, reads = [r for phase in phases for r in rows(phase)], rows("prefill")
        every = [*mine, *reads, *group.of(wanted)]
        if "mixed" in phases and not mine:
            continue
        memory: Mapping[str, Any] = next((r.memory for r in every if r.memory), {})
        quality: Mapping[str, Any] = next((r.quality for r in every if r.quality), {})
        read = next((rate(r) for r in reads if case_of(r) == cases["prefill"]), None)
        told, reading = ratios(mine), ratios(reads)["same_batch"]
        red = quality.get("gate") == "red"
        if wanted.plain or red:
            told, reading = (
                dict.fromkeys(told, "baseline" if wanted.plain else RED),
                "baseline" if wanted.plain else RED,
            )
        unsaid = "16-bit" if every[0].source == "percard" else "not stated"  # our rows name a cache that is not
        found.append(
            Verdict(
                side=wanted,
                name=wanted.spec
                if group.level == "ladder"
                else "/".join(dict.fromkeys(r.scheme.get("spec") or "not stated" for r in [*reads, *mine] or every)),
                cache=wanted.cache or next((r.scheme["kv_spec"] for r in every if r.scheme.get("kv_spec")), unsaid),
                quality=quality,
                weights=memory.get("weights"),
                kv_per_token=memory.get("kv_bytes_per_token"),
                prefill=read,
                rate=next((rate(r) for r in mine if case_of(r) in cases.values()), None),
                prefill_ratio=reading,
                ratios=told,
                usd=RED if red else money_words(mine or every),
                joules=RED if red else energy_words(mine or every),
                caveats=caveats(mine) if told["same_batch"] not in ("baseline", RED) else (),
                status="ok" if any(r.status == "ok" for r in every) else every[0].status,
            )
        )
    return found


def left_out(records: Iterable[Record]) -> list[tuple[str, str, int]]:
    """(why, what, how many) of all that has no figure: rows that failed, were refused or cut, red gates, absent rivals."""
    seen: dict[str, list[str]] = {}
    for record in latest(records):
        scheme = record.scheme
        cache = f"{scheme['kv_spec']} cache" if scheme.get("kv_spec") not in (None, *FLOATS) else None
        if scheme.get("spec") == scheme.get("kv_spec"):
            cache = None
        what = " ".join(filter(None, [scheme.get("spec"), cache, record.case]))
        if record.status != "ok":
            error = record.error or {}
            stage = f" at {error['stage']}" if error.get("stage") else ""
            seen.setdefault(f"{record.status}{stage}: {error.get('message', 'no reason was recorded')}", []).append(
                what
            )
        elif gate(record) == "red":
            why = "; ".join((record.quality or {}).get("reasons") or ["no reason was recorded"])
            seen.setdefault(f"gate red, so no speed: {why}", []).append(what)
        for rival in record.against or ():
            if rival["status"] != "ok":
                why = f"{rival['impl']}: {rival.get('reason') or rival['status']}"
                seen.setdefault(why, []).append(record.case)
    out = []
    for why, cases in seen.items():
        held = list(dict.fromkeys(cases))
        more = f" and {len(held) - 3} more" if len(held) > 3 else ""
        out.append((why, ", ".join(held[:3]) + more, len(held)))
    return out


def header(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """(name, lines) of what every figure below depends on: machine, roofs, versions, date, command, gate, noise."""

    def each(make: Any) -> list[str]:
        return list(dict.fromkeys(words for r in records if (words := make(r))))

    def roofs(r: Record) -> str:
        roof = {"read": r.cpu.get("read_gbs"), **(r.cpu.get("roof") or {}), **(r.card.get("roof") or {})}
        parts = [f"{n.removesuffix('_gbs')} {v:,.0f} {'GB/s' if n in ('read', 'copy_gbs') or n.endswith('_gbs') else 'T/s'}"
                 for n, v in roof.items() if v]  # fmt: skip
        return ", ".join(parts)

    def floors() -> list[str]:
        found: dict[str, list[float]] = {}
        for r in records:
            if (floor := r.card.get("noise_floor_pct", r.cpu.get("noise_floor_pct"))) is not None:
                found.setdefault(r.code.get("command") or "this run", []).append(floor)
        ends = {run: sorted({f"{f:.1f}" for f in (min(held), max(held))}, key=float) for run, held in found.items()}
        told = "noise floor {} % in {}: the baseline against itself; nothing below twice that is a result"
        return [told.format(" to ".join(held), run) for run, held in ends.items()]

    def versions(r: Record) -> str:
        env, code = r.env, r.code
        sha = (code.get("git_sha") or "")[:10] + (" with changes" if code.get("dirty") else "")
        pairs = [("percard", code.get("percard")), ("commit", sha), *((n, env.get(n)) for n in ("torch", "triton"))]
        pairs += [(n, env.get(n)) for n in ("cuda", "driver", "python", "os")]
        return ", ".join(f"{name} {value}" for name, value in pairs if value)

    def protocol(r: Record) -> str:
        found = r.quality or {}
        if not found.get("protocol"):
            return ""
        return f"{found.get('model') or 'the model itself'}: {found['protocol'].split('; reference in')[0]}"

    days = sorted(r.ts[:10] for r in records)
    parts = [
        ("machine", each(machine)),
        ("measured here", _few(each(roofs), 4) + _few(floors(), 6)),
        ("versions", _few(each(versions), 4)),
        ("date", [days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"] if days else []),
        ("command", _few(each(lambda r: r.code.get("command")), 6)),
        ("quality gate", _few(each(protocol), 6)),
        ("noise", _few([w for r in records for w in r.clock.get("noisy") or ()], 6)),
        ("rows", [", ".join(f"{n} {level}" for level, n in Counter(r.level for r in latest(records)).items())]),
    ]
    return [(name, lines) for name, lines in parts if lines]


def _few(lines: Iterable[str], most: int) -> list[str]:
    held = list(dict.fromkeys(lines))
    return held if len(held) <= most else [*held[:most], f"and {len(held) - most} more, in table.csv"]
