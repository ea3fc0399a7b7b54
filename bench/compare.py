"""Two runs against each other: which cells became slower, faster, worse or stopped working, and how sure that is.

A cell is called slower (or faster) when all of this holds:

    1. the bootstrap 95 % interval of median(new) / median(base) excludes 1
    2. the change exceeds both what --fail allows and twice the noise floor of the records (an A/A run measures it)
    3. its test (stats.shifted) survives Benjamini-Hochberg at 5 % over all pairs: of 200 cells that did not change ten
       would differ at 95 % each

A change beyond the threshold that the samples do not prove is `unproven`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import stats
from .record import Record

FALSE_DISCOVERIES = 0.05
FLOATS = ("bf16", "fp16", "fp32")
WORKS = ("ok", "suspect")
BROKEN = ("failed", "timeout", "oom", "refused", "absent")
_MODEL = ("id", "weights", "layers_run", "tp", "pp", "ep", "shard", "routing")
GROUPS = ("case", "op", "layer", "model")
# From where on quality is worse than that of the base: share of the base's figure and absolute amount, added up. The same
# text through the same model repeats to the last digits, so these are far below the gate's limits.
QUALITY: dict[str, tuple[float, float]] = {
    "kl": (0.10, 0.0005),  # nats, may rise
    "top1": (0.0, 0.005),  # may fall
    "ppl_rel": (0.0, 0.001),  # may rise
    "task": (0.0, 0.01),  # score, may fall
}
FALLS = ("top1", "task")  # of these less is worse


def identity(record: Record) -> str:
    """What is measured, without the code that does it and the machine it runs on: canonical JSON.

    From the record's sections: level, case, shape, scheme (spec, cache, head), the layers and the routing of the model,
    and of an op its body. Not in it: cell_key (it holds hashes of code), op_source_hash, config, versions, card, clock.
    A 16-bit baseline is the fastest float type of its run, so every float type of a whole model counts as `float`.
    """
    spec, kv = record.scheme.get("spec"), record.scheme.get("kv_spec")
    if record.level != "op":  # a whole model whose row names no cache has one of a float type
        spec, kv = "float" if spec in FLOATS else spec, "float" if kv in (None, *FLOATS) else kv
    scheme = {"spec": spec, "kv_spec": kv, "head": record.scheme.get("head"), "sparsity": record.scheme.get("sparsity")}
    parts = {
        "level": record.level,
        "case": record.case,
        "shape": {key: value for key, value in record.shape.items() if value is not None},
        "scheme": scheme,
        "model": {key: record.model[key] for key in _MODEL if record.model.get(key) is not None},
        "body": record.body.get("impl") if record.level == "op" else None,
    }
    return json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)


Runs = Mapping[str, Sequence[Record]]  # records by name of file; one file has no name


def latest(records: Iterable[Record]) -> dict[str, Record]:
    """The last row of each cell that says anything: rows that a deadline cut are as good as missing."""
    return {identity(record): record for record in records if record.status != "cut"}


def _cells(run: Sequence[Record] | Runs, apart: bool) -> dict[tuple[str, str], Record]:
    """Cells of a run; with `apart` those of each file of a folder for themselves."""
    files = run if isinstance(run, Mapping) else {"": run}
    return {
        (name if apart else "", key): record for name, rows in files.items() for key, record in latest(rows).items()
    }


@dataclass(frozen=True)
class Pair:
    """One cell in both runs. `ratio` is new time over base time: above 1 is slower; None where a side has no figure.

    `verdict`: slower, faster, same, unproven, failing (the base worked), red (its gate), fixed, unmeasured.
    `worse` says in words what quality was lost, `apart` why the two may not be compared.
    """

    name: str
    base: Record
    new: Record
    ratio: float | None = None
    ci95: tuple[float, float] | None = None
    p: float | None = None
    threshold: float = 0.0
    verdict: str = "unmeasured"
    worse: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    draws: np.ndarray | None = None

    @property
    def regression(self) -> bool:
        """Slower, failing, red or worse."""
        return self.verdict in ("slower", "failing", "red") or bool(self.worse)

    def to_dict(self) -> dict[str, Any]:
        """As JSON prints it."""
        found: dict[str, Any] = {
            "cell": self.name,
            "level": self.base.level,
            "case": self.base.case,
            "verdict": self.verdict,
        }
        found |= {"base_us": time_of(self.base), "new_us": time_of(self.new), "ratio": self.ratio, "ci95": self.ci95}
        return found | {"p": self.p, "threshold": self.threshold, "worse": self.worse, "apart": self.apart}


@dataclass(frozen=True)
class Group:
    """Pairs that share a case, an op, a layer or a model: geometric mean of their ratios, with its interval."""

    name: str
    cells: int
    ratio: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """A new run against the base. `missing` and `added` are cells that only the base, or only the new run has."""

    pairs: tuple[Pair, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]
    groups: tuple[Group, ...]

    @property
    def apart(self) -> tuple[str, ...]:
        """Why they may not be compared, each reason once."""
        return tuple(dict.fromkeys(reason for pair in self.pairs for reason in pair.apart))

    @property
    def regressions(self) -> tuple[Pair, ...]:
        """Pairs that are slower, failing, red or worse."""
        return tuple(pair for pair in self.pairs if pair.regression)

    @property
    def exit_code(self) -> int:
        """3 when the two may not be compared (or have no cell in common), 4 on a regression, 0 otherwise."""
        if self.apart or not self.pairs:
            return 3
        return 4 if self.regressions else 0

    def count(self, verdict: str) -> int:
        """How many pairs have a verdict."""
        return sum(pair.verdict == verdict for pair in self.pairs)


def compare(
    base: Sequence[Record] | Runs, new: Sequence[Record] | Runs, *, fail: float = 0.03, group: str = "model"
) -> Comparison:
    """Pairs the cells of two runs and judges each; `fail` is a share (0.03 = three per cent).

    Of two folders of several files each file is compared with the one of its name.
    """
    apart = all(isinstance(run, Mapping) and "" not in run for run in (base, new))
    ours, theirs = _cells(base, apart), _cells(new, apart)
    pairs = _judged([_pair(ours[key], theirs[key], fail) for key in ours if key in theirs])
    alone = {name_of(theirs[key]): theirs[key] for key in theirs if key not in ours}
    return Comparison(
        tuple(pairs),
        tuple(_alone(ours[key], alone.get(name_of(ours[key]))) for key in ours if key not in theirs),
        tuple(name_of(theirs[key]) for key in theirs if key not in ours),
        tuple(_groups(pairs, group)),
    )


def _alone(record: Record, other: Record | None) -> str:
    """The name of a cell that the new run lacks; of one whose name it has, with what is not the same."""
    if other is None:
        return name_of(record)
    ours, theirs = (json.loads(identity(r)) for r in (record, other))
    differ = [key for key in ours if ours[key] != theirs[key]]
    return f"{name_of(record)} (another {', '.join(differ)}: {ours[differ[0]]} and {theirs[differ[0]]})"


def name_of(record: Record) -> str:
    """A cell in words: its case, then what of spec, cache, head and body the case does not say."""
    scheme = record.scheme
    spec = "float" if record.level != "op" and scheme.get("spec") in FLOATS else scheme.get("spec")
    words = [record.case, *([spec] if spec and not record.case.endswith(f".{spec}") else [])]
    if (kv := scheme.get("kv_spec")) and kv not in FLOATS and kv != spec:
        words.append(f"kv {kv}")
    if record.level == "model" and spec != "float" and scheme.get("head") == "16bit":
        words.append("head16")
    if record.level == "op" and record.body.get("impl") not in (None, "cpu", "triton"):
        words.append(record.body["impl"])
    return " ".join(words)


def time_of(record: Record) -> float | None:
    """Median microseconds of a cell; of a record without times (imported) the time of a token, from its rate."""
    latency, tokens = record.latency_us or {}, record.tokens or {}
    if latency.get("median"):
        return latency["median"]
    rate = tokens.get("tok_s") or tokens.get("tok_s_in")
    return 1e6 / rate if rate and rate > 0 else None


def samples_of(record: Record) -> list[float]:
    """Its samples, microseconds; [] where there are none or one is no time."""
    samples = list((record.latency_us or {}).get("samples") or ())
    return samples if all(sample > 0 for sample in samples) else []


def noise_floor(record: Record) -> float:
    """By which share one thing timed against itself differed in that run; 0 where nobody measured it."""
    return (record.card.get("noise_floor_pct") or record.cpu.get("noise_floor_pct") or 0.0) / 100


def _pair(base: Record, new: Record, fail: float) -> Pair:
    threshold = max(fail, 2 * noise_floor(base), 2 * noise_floor(new))
    pair = Pair(name_of(base), base, new, threshold=threshold, worse=_worse(base, new), apart=_apart(base, new))
    if (new.quality or {}).get("gate") == "red":
        return replace(pair, verdict="red")
    if new.status in BROKEN:
        return replace(pair, verdict="failing" if base.status in WORKS else "unmeasured")
    if base.status in BROKEN:
        return replace(pair, verdict="fixed")
    before, after = samples_of(base), samples_of(new)
    if before and after:
        draws = stats.median_ratios(before, after)
        ratio = float(np.median(after) / np.median(before))
        return replace(
            pair, ratio=ratio, ci95=stats.interval(draws), p=stats.shifted(before, after), draws=draws, verdict=""
        )
    times = time_of(base), time_of(new)
    if times[0] is None or times[1] is None or times[0] <= 0 or times[1] <= 0:
        return pair
    return replace(pair, ratio=times[1] / times[0], verdict="")


def _judged(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with verdicts. Those with a single sample on a side are not among the questions asked."""
    askable = [
        i
        for i, pair in enumerate(pairs)
        if pair.p is not None and min(len(samples_of(pair.base)), len(samples_of(pair.new))) > 1
    ]
    fallen = stats.benjamini_hochberg([pairs[i].p or 0.0 for i in askable], FALSE_DISCOVERIES)
    proven = {i for i, fell in zip(askable, fallen, strict=True) if fell}
    return [
        pair if pair.verdict else replace(pair, verdict=_verdict(pair, i in proven)) for i, pair in enumerate(pairs)
    ]


def _verdict(pair: Pair, proven: bool) -> str:
    assert pair.ratio is not None
    if max(pair.ratio, 1 / pair.ratio) - 1 <= pair.threshold:
        return "same"
    if not proven or pair.ci95 is None or pair.ci95[0] <= 1 <= pair.ci95[1]:
        return "unproven"
    return "slower" if pair.ratio > 1 else "faster"


def _worse(base: Record, new: Record) -> tuple[str, ...]:
    """What quality was lost, in words. Only figures of one protocol are compared."""
    ours, theirs = base.quality or {}, new.quality or {}
    found = []
    if theirs.get("gate") == "red":
        found.append(f"gate red: {'; '.join(theirs.get('reasons') or ['no reason given'])}")
    if ours.get("protocol") != theirs.get("protocol"):
        return tuple(found)
    for key, (share, amount) in QUALITY.items():
        before, after = (_figure(side, key) for side in (ours, theirs))
        if before is None or after is None:
            continue
        lost = before - after if key in FALLS else after - before
        if lost > share * abs(before) + amount:
            found.append(f"{key} {before:.5g} -> {after:.5g}")
    return tuple(found)


def _figure(quality: Mapping[str, Any], key: str) -> float | None:
    if key != "task":
        return quality.get(key)
    score = (quality.get("task") or {}).get("score")
    return score if isinstance(score, int | float) else None


def _apart(base: Record, new: Record) -> tuple[str, ...]:
    """Why two records may not be compared: card, driver, clock protocol, gate, or the program that measured."""
    sides = [(_machine(r), r.env.get("driver"), _gate(r), r.source) for r in (base, new)]
    words = ("card", "driver", "gate", "measured by")
    found = [f"{word}: {a} and {b}" for word, a, b in zip(words, *sides, strict=True) if a != b]
    for key in ("mode", "l2", "power"):
        a, b = base.clock.get(key), new.clock.get(key)
        if a is not None and b is not None and a != b:
            found.append(f"clock {key}: {a} and {b}")
    return tuple(found)


def _machine(record: Record) -> str:
    card, cpu = record.card, record.cpu
    if card.get("spec_id") or card.get("name"):
        count = card.get("cards") or 1
        return f"{count:g} x {card.get('spec_id') or card['name']}"
    if not cpu.get("model"):
        return "not stated"
    return f"{cpu['model']}, {cpu.get('threads')} threads"


def _gate(record: Record) -> str:
    """What the gate of a record rests on: figures of a protocol on a model, no figures, or nothing."""
    quality = record.quality or {}
    gate = quality.get("gate", "none")
    if gate in ("green", "red") or quality.get("kl") is not None:
        return f"{quality.get('model')} by {quality.get('protocol')}"
    return gate


def _groups(pairs: Sequence[Pair], by: str) -> list[Group]:
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.ratio is not None and pair.draws is not None:
            groups.setdefault(group_of(pair.base, by), []).append(pair)
    found = []
    for name, members in groups.items():
        ratios, draws = [p.ratio for p in members if p.ratio], [p.draws for p in members if p.draws is not None]
        mean, lo, hi = stats.geometric_mean(ratios, draws)
        found.append(Group(name, len(members), mean, (lo, hi)))
    return found


def group_of(record: Record, by: str) -> str:
    """The group of a record. Cases are named model.layer.phase...: `qwen3-0.6b.down.decode.b16`."""
    parts = record.case.split(".")
    layer = next((i for i, part in enumerate(parts) if i and part.replace("_", "").isalpha()), None)
    if by == "case":
        return record.case
    if by == "model":
        return record.model.get("id") or (".".join(parts[:layer]) if layer else parts[0])
    if by == "layer":
        if record.level in ("model", "layer"):
            return "prefill" if ".pp" in record.case else "whole" if ".mix" in record.case else "decode"
        return parts[layer] if layer else parts[0]
    spec = record.scheme.get("spec")
    return (
        f"linear {spec}"
        if record.level == "op" and layer
        else parts[0]
        if record.level == "op"
        else f"{record.level} {spec}"
    )


def share(text: str) -> float:
    """The share that --fail means: `3%`, `3 %` and `0.03` are the same. ValueError for anything else."""
    words = text.strip()
    try:
        value = float(words.removesuffix("%")) / (100 if words.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise ValueError(f"--fail {text}: expected a share as 3% or 0.03, at least 0 and below 100 %")
    return value
