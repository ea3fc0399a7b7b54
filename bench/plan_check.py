"""`percard plan --check RECORDS`: what the planner would have said of each measurement, and what it should have assumed.

    model    prefill, decode and whole runs of `bench model`, as they are
    layer    `bench layer` added up: layers x layer + head and sampling, beside the whole model's prediction
    op       linears of `bench ops`; torch's fastest float beside them, which is bf16

A ratio is predicted time over measured time. `points` turns the same rows into what bench/efficiency.py fits, so that a
machine's shares come from some shapes and are checked on others: a row that its own model was fitted on says so, and is left
out of the medians.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..formats.kvcache import BF16, KVSpec
from ..formats.spec import FormatError, QuantSpec
from . import efficiency, layer_check, plan
from .card_table import Card
from .efficiency import Efficiency, Point
from .plan_parts import load_shape
from .record import Record

_FLOATS = {"bf16": 2, "fp16": 2, "fp32": 4, "bfloat16": 2, "float16": 2, "float32": 4}  # bytes of a number


@dataclass(frozen=True)
class Measured:
    """One measured time, with what the planner needs to predict it. `mem` and `flop` are seconds at the roofs themselves."""

    level: str
    model: str
    phase: str
    spec: QuantSpec | None
    kv: KVSpec
    head: str
    plain: float
    batch: int
    tokens: float  # of the prompt, or in the cache; of a linear its rows
    layers: int
    seconds: float
    case: str
    when: str
    moved: float = 0.0  # of a linear: bytes, operations
    flops: float = 0.0
    attention: float = (
        0.0  # of a layer's prompt: seconds of its attention alone, over all layers; 0 = not measured apart
    )
    new: int = 0  # of a whole run: tokens that follow the prompt, the first of them with it

    @property
    def rows(self) -> int:
        """Tokens at once, by which shares are looked up."""
        return int(self.batch * self.tokens) if self.phase == "prefill" else self.batch


@dataclass(frozen=True)
class Checked:
    """A record beside its prediction; `reason` says why there is none. `own`: the shares were fitted on this very model."""

    level: str
    case: str
    spec: str
    kv: str
    phase: str
    measured: float = 0.0
    predicted: float = 0.0
    bound: str = ""
    basis: str = ""
    band: tuple[float, float] = (0.0, 0.0)
    source: str = ""
    own: bool = False
    reason: str = ""

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    @property
    def error(self) -> float:
        return abs(self.ratio - 1)

    @property
    def inside(self) -> bool:
        """Whether the measured rate lies in the band of the predicted one."""
        return 1 + self.band[0] <= self.ratio <= 1 + self.band[1]


def check(
    records: Sequence[Record],
    cards: Mapping[str, Card],
    *,
    card_id: str | None = None,
    files: Sequence[str | Path] = (),
) -> list[Checked]:
    """A row for each record that has a time, and one with its reason for each that cannot be predicted.

    `card_id` names the row of the card table for all records; without it each record's machine is looked up by its name.
    `files` are efficiency files beside the packaged one.
    """
    find = functools.partial(efficiency.find, files=tuple(str(file) for file in files))
    found = []
    for record, one in _measured(records):
        about = (record.level, record.case, str(record.scheme.get("spec")), str(record.scheme.get("kv_spec") or ""))
        machine = _card(record, cards, card_id)
        if isinstance(one, str) or isinstance(machine, str):
            found.append(Checked(*about, "", reason=one if isinstance(one, str) else str(machine)))
            continue
        try:
            found.append(_checked(one, about, machine, find))
        except FormatError as error:
            found.append(Checked(*about, one.phase, reason=str(error)))
    return found


def points(records: Sequence[Record], cards: Mapping[str, Card], card_id: str | None = None) -> list[Point]:
    """What efficiency.fit takes: of each record its seconds, and those that the roofs alone would have taken."""
    found = []
    for record, one in _measured(records):
        machine = _card(record, cards, card_id)
        if isinstance(one, str) or isinstance(machine, str) or one.phase == "whole":
            continue
        try:
            mem, flop = _predict(one, machine, _roofs)[1:3]
        except FormatError:
            continue
        name, seconds = efficiency.name(one.phase, one.spec), one.seconds
        source = f"{one.model} ({one.level}, {one.when})"
        # Seconds at the roofs in place of bytes and operations: some of these run at another type's rate.
        if one.attention:
            alone = _attention_flops(one) / (machine.bf16_tflops * 1e12)
            seconds, flop = seconds - one.attention, flop - alone
            if one.spec is None:  # once, not once more for each spec
                found.append(
                    Point(machine.id, "attention.prefill", one.rows, one.attention, 0.0, alone, 1.0, 1.0, source)
                )
        found.append(Point(machine.id, name, one.rows, seconds, mem, flop, 1.0, 1.0, source))
    return found


def medians(found: Sequence[Checked]) -> dict[tuple[str, str], tuple[int, float, float, int]]:
    """{(level, phase): (rows, median error, worst error, rows inside their band)} of rows that were not fitted on themselves."""
    out = {}
    for key in dict.fromkeys((one.level, one.phase) for one in found):
        some = [one for one in found if (one.level, one.phase) == key and not one.reason and not one.own]
        if some:
            errors = [one.error for one in some]
            out[key] = (len(some), statistics.median(errors), max(errors), sum(one.inside for one in some))
    return out


def overall(found: Sequence[Checked], level: str = "model") -> float | None:
    """The median error of a level over all phases; None when nothing of it was predicted."""
    errors = [one.error for one in found if one.level == level and not one.reason and not one.own]
    return statistics.median(errors) if errors else None


def lines(found: Sequence[Checked]) -> Iterator[str]:
    """The verdict in words: medians by level and phase, then what was not predicted and why, each reason once."""
    for (level, phase), (count, median, worst, inside) in medians(found).items():
        band = f"{inside} of {count} inside their band"
        yield f"{level} {phase}: median error {median:.1%} over {count} rows, worst {worst:.1%}; {band}"
    for level in dict.fromkeys(one.level for one in found):
        error = overall(found, level)
        if error is not None and len({k for k in medians(found) if k[0] == level}) > 1:
            yield f"{level}: median error {error:.1%}"
    own = sum(one.own for one in found)
    if own:
        yield f"{own} rows are of models that their shares were fitted on; they are in the table and in no median"
    reasons: dict[str, list[str]] = {}
    for one in found:
        if one.reason:
            reasons.setdefault(one.reason, []).append(one.case)
    for reason, cases in reasons.items():
        more = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
        yield f"not predicted: {cases[0]}{more}: {reason}"


def markdown(found: Sequence[Checked]) -> str:
    """The rows as a table for a page."""
    head = "| level | case | spec | cache | measured ms | predicted ms | predicted / measured | bound | basis |"
    rows = [head, "|---|---|---|---|---|---|---|---|---|"]
    for one in found:
        if not one.reason:
            mark = " (fitted on itself)" if one.own else ""
            rows.append(
                f"| {one.level} | {one.case} | {one.spec} | {one.kv} | {1e3 * one.measured:.4g} | {1e3 * one.predicted:.4g} "
                f"| {one.ratio:.2f}{mark} | {one.bound} | {one.basis} |"
            )
    return "\n".join(rows)


def _checked(one: Measured, about: tuple[str, str, str, str], card: Card, find: plan.Find) -> Checked:
    seconds, mem, flop, basis, band, source = _predict(one, card, find)
    bound = "memory" if mem >= flop else "compute"
    own = f"{one.model} (" in source
    return Checked(*about, one.phase, one.seconds, seconds, bound, basis, band, source, own)


def _predict(one: Measured, card: Card, find: plan.Find) -> tuple[float, float, float, str, tuple[float, float], str]:
    """(seconds, those of memory, those of compute, basis, band, source)."""
    if one.phase == "linear":
        share = find(card.id, efficiency.name("linear", one.spec), one.rows)
        rate = card.rate(one.spec)
        if rate is None:
            raise FormatError(f"{card.id}: no rate for {one.spec}")
        mem, flop = one.moved / (card.bandwidth_gbs * 1e9 * share.e_bw), one.flops / (rate[0] * share.e_fl)
        return max(mem, flop), mem, flop, *share.term("mem" if mem >= flop else "flop"), share.source
    if (
        one.phase == "whole"
    ):  # the first token comes with the prompt, a step for each of the others, from its middle depth
        first = _predict(replace(one, phase="prefill"), card, find)
        step = _predict(replace(one, phase="decode", tokens=one.tokens + one.new / 2), card, find)
        total, mem, flop = (a + (one.new - 1) * b for a, b in zip(first[:3], step[:3], strict=True))
        worst = max(first, step, key=lambda part: efficiency.BASES.index(part[3]))
        return total, mem, flop, worst[3], worst[4], f"prefill: {first[5]}; decode: {step[5]}"
    shape = load_shape(f"shape:{one.model}").with_layers(one.layers)
    call: Any = plan.predict_decode if one.phase == "decode" else plan.predict_prefill
    tokens = one.tokens if one.phase == "decode" else int(one.tokens)
    made = call(shape, one.spec, one.kv, one.batch, tokens, card, head=one.head, plain=one.plain, find=find)
    return made.seconds, made.mem, made.flop, made.basis, made.band, dict(made.sources)["shares"]


def _attention_flops(one: Measured) -> float:
    """Operations of the attention of prompts, as plan.predict_prefill counts them."""
    shape = load_shape(f"shape:{one.model}")
    return one.batch * one.layers * shape.heads * (shape.head_dim + shape.v_head_dim) * float(one.tokens) ** 2


def _roofs(card_id: str, of: str, bucket: int | None = None) -> Efficiency:
    """Shares of 1: the roofs themselves."""
    return Efficiency(1.0, 1.0, "measured", (0.0, 0.0), "roofs")


def _measured(records: Sequence[Record]) -> Iterator[tuple[Record, Measured | str]]:
    """Each record with what was measured, or why nothing of it is predicted. Heads and attention alone are parts, and left out."""
    layers = [record for record in records if record.level == "layer"]
    for record in records:
        if record.level == "layer" and ".layer." not in record.case:
            continue
        one = _one(record, layers)
        yield record, one
        if isinstance(one, Measured) and one.phase == "linear":
            yield from _floats(record, one)


def _one(record: Record, layers: Sequence[Record]) -> Measured | str:
    if record.status != "ok" or not (record.latency_us or {}).get("median"):
        gate = " (gate red)" if (record.quality or {}).get("gate") == "red" else ""
        return f"has no time: status {record.status}{gate}"
    assert record.latency_us is not None
    if record.source != "percard":
        return f"measured by {record.source}, whose engine is not the planner's"
    seconds, word = record.latency_us["median"] / 1e6, str(record.scheme.get("spec"))
    spec = None if word in _FLOATS else QuantSpec.parse(word)
    when = record.ts[:10]
    if record.level == "op":
        size = [record.shape.get(key) for key in ("M", "N", "K")]
        moved, flops = ((record.roofline or {}).get(key) for key in ("bytes", "flops"))
        if None in size or not moved or not flops or "experts" in record.case:
            return "an op that is no linear: only linears are predicted alone"
        model = _model_of(record.case)
        rows = int(size[0] or 1)
        return Measured(
            "op", model, "linear", spec, BF16, "", 2.0, rows, 1, 1, seconds, record.case, when, moved, flops
        )
    if record.level not in ("model", "layer"):
        return f"level {record.level} is not predicted: waves of requests have no closed form"
    if record.model.get("shard"):
        return "a rank's shard: its links are not measured"
    if "dequantised" in str(record.body.get("impl")):
        return f"{word} was dequantised at load: no kernel serves it"
    kv_word = str(record.scheme.get("kv_spec") or "bf16")
    try:
        kv = BF16 if kv_word in _FLOATS else KVSpec.parse(kv_word)
    except FormatError:
        return f"cache {kv_word}: its layers differ, and the planner has one spec for all"
    dtype = str(record.body.get("dtype") or "bf16")
    plain = float(_FLOATS.get(dtype, 2))
    prefill, whole = ".pp" in record.case, ".model.mix" in record.case
    tokens = record.shape.get("isl") if prefill or whole else record.shape.get("kv_len")
    attention, new = 0.0, int(record.shape.get("osl") or 0)
    if not tokens:
        return "says neither the prompt nor the depth of its cache"
    model, layers_run = str(record.model.get("id")), int(record.model.get("layers_run") or 0)
    head = str(record.scheme.get("head") or "16bit")
    if record.level == "layer":
        layers_run = int(record.model.get("layers") or 0)
        head = "int8-row" if spec is not None else "16bit"
        part = layer_check.head_of(layers, replace(record, scheme={**record.scheme, "head": head}))
        if isinstance(part, str):
            return f"{part}, so its layers do not add up to a model"
        assert part.latency_us is not None
        seconds = layers_run * seconds + part.latency_us["median"] / 1e6
        alone = layer_check.attention_of(layers, record) if prefill else None
        attention = 0.0 if alone is None else layers_run * alone
    elif not (prefill or whole):
        tokens += new / 2  # steps in a row: the middle of them
    batch = int(record.shape.get("batch") or 1)
    phase = "whole" if whole else "prefill" if prefill else "decode"
    about = (record.level, model, phase, spec, kv, head, plain, batch, tokens, layers_run, seconds, record.case, when)
    return Measured(*about, attention=attention, new=new)


def _floats(record: Record, one: Measured) -> Iterator[tuple[Record, Measured]]:
    """Torch's fastest float beside a linear: 16-bit or fp32 weights of the same shape."""
    timed = [r for r in record.against or () if r["status"] == "ok" and r["impl"].startswith("torch ")]
    timed = [r for r in timed if r["impl"].split()[1] in _FLOATS]
    if not timed:
        return
    best = min(timed, key=lambda r: r["median"])
    n, k, size = record.shape["N"], record.shape["K"], _FLOATS[best["impl"].split()[1]]
    moved = size * (n * k + one.rows * (n + k))
    beside = replace(record, scheme={**record.scheme, "spec": "bf16"}, case=f"{record.case} ({best['impl']})")
    yield beside, replace(one, spec=None, seconds=best["median"] / 1e6, moved=moved, plain=float(size))


def _model_of(case: str) -> str:
    """qwen3-0.6b of qwen3-0.6b.down.decode.b16.g64."""
    for phase in (".decode.", ".prefill."):
        if phase in case:
            return case.split(phase)[0].rpartition(".")[0]
    return case


def _card(record: Record, cards: Mapping[str, Card], card_id: str | None) -> Card | str:
    """The row of the machine that a record is from, or why there is none."""
    name = record.card.get("name") or f"{record.cpu.get('model')}, {record.cpu.get('threads')} threads"
    same = [card for card in cards.values() if card.name == name or card.id == record.card.get("spec_id")]
    if card_id is not None:
        card = cards[card_id]
        if same and card not in same:
            return f"measured on {name}, which is not {card_id}"
        if not same and (record.card.get("name") is None) != efficiency.is_cpu(card_id):
            return f"measured on {name}, which is not {card_id}"
        return card
    if not same:
        return f"no card is called {name!r}; measure its roofs with percard bench card --out FILE and give --card-file FILE"
    return min(same, key=lambda card: card.confidence != "measured")


def geometric(found: Sequence[Checked]) -> float | None:
    """Geometric mean of the ratios: whether predictions lean to one side."""
    logs = [math.log(one.ratio) for one in found if not one.reason and not one.own]
    return math.exp(statistics.mean(logs)) if logs else None
