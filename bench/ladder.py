"""`percard bench ladder`: the smallest model that does the user's task. Models x specs x caches: score, gate, then speed.

    1  a model answers the task's questions (task.py), first in 16 bits: that is its own reference
    2  each spec and cache passes the gate against those 16 bits: KL and top-1 on the questions' own text (or a given one),
       lengths of greedy answers, the drop of the score. Models below 50 million parameters: KL and top-1 decide alone
    3  what is not red is timed, beside the 16-bit self in the same rounds: prompts of the task's mean length are taken in
       and answers of its mean length made, `batch` at once
    4  a pair passes when its score is within the drop of the best 16-bit score of all models; the cheapest comes first

One Record per pair, level "model", case `<model>.ladder.<task>.b<batch>`. The 16-bit side runs in the float type that
answers soonest on this machine, as everywhere (docs/bench.md).
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..formats import compressed_tensors
from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError, QuantSpec
from . import card, cells, clock, contexts, fair, here, money, ops, quality, record, task
from .cells import Cell, Say
from .engine import Model, load, load_config
from .engine import kv as caches
from .probe import FLOATS
from .record import Record
from .vocabulary import Vocabulary

SIXTEEN = "bf16"  # names 16-bit weights or caches, whatever float type they run in
_LEAST_S, _MOST_ROUNDS = 1.5, 25  # a side is timed for so long, or in so many rounds
_HOPELESS = 4.0  # a float type whose first short wave takes so many times the best whole one is not tried further
TEXT_TOKENS = 16384  # of the text that KL is measured on, at most


@dataclass(frozen=True)
class Plan:
    """What to measure. `specs` and `kv` make the pairs; `drop` of the score is allowed, None = a hundredth of the best.

    `text` for KL and top-1, None = the task's own questions with their answers. `answers`, `answer_limit`: prompts and tokens of
    the comparison of lengths.
    """

    specs: tuple[str, ...] = (SIXTEEN, "w8a8", "w4a16-g128")
    kv: tuple[str, ...] = (SIXTEEN,)
    batch: int = 8
    rounds: int = 3
    drop: float | None = None
    text: Path | None = None
    answers: int = task.LENGTH_PROMPTS
    answer_limit: int = task.LENGTH_LIMIT

    def allowed(self, best: float) -> float:
        """The least score that will do."""
        return best - (0.01 * best if self.drop is None else self.drop)


def quick(plan: Plan) -> Plan:
    """The same in less time: one round, fewer and shorter answers compared."""
    return replace(plan, rounds=1, answers=16, answer_limit=32)


@dataclass(frozen=True)
class Pair:
    """A spec of the weights and one of the cache, by name."""

    spec: str
    kv: str

    @property
    def plain(self) -> bool:
        """The model's own 16-bit self."""
        return self == Pair(SIXTEEN, SIXTEEN)


def pairs(plan: Plan) -> list[Pair]:
    """All pairs, 16 bits first: every model is its own reference, so it is measured whether it is asked for or not."""
    found = {Pair(SIXTEEN, SIXTEEN): None}
    for spec in plan.specs:
        name = spec if spec == SIXTEEN else str(QuantSpec.parse(spec))
        kinds = [kv if kv == caches.CALIBRATED else str(caches.parse(kv)) for kv in plan.kv]
        found |= {Pair(name, kv): None for kv in kinds}
    return list(found)


class Rung:
    """One model folder. Its 16-bit self is loaded, asked and held when the first of its cells needs it."""

    def __init__(self, folder: Path, wanted: task.Task, plan: Plan, where: torch.device) -> None:
        """FormatError when the folder is no 16-bit checkpoint, or a question does not fit the model."""
        self.folder, self.task, self.plan, self.where = folder, wanted, plan, where
        self.config = load_config(folder)
        if compressed_tensors.claims(Checkpoint.open(folder).config):
            raise FormatError(
                f"{folder}: is quantised already; give its 16-bit source, --specs are made of that at load"
            )
        for pair in pairs(plan):
            caches.of(pair.kv, self.config, str(folder))
        self.words = Vocabulary(folder)
        asked = task.prompts(wanted, self.words, self.config.context, self.config.name)
        longest = max(len(ids) + item.max_new for ids, item in zip(asked, wanted.items, strict=True))
        self.isl = max(1, round(sum(map(len, asked)) / len(asked)))
        self.osl = max(1, round(sum(item.tokens_out for item in wanted.items) / len(wanted.items)))
        if plan.text is None:
            self.ids = torch.tensor(self.words.ids(wanted.text)[:TEXT_TOKENS], dtype=torch.int64)
        else:
            self.ids = quality.read_ids(plan.text, folder, TEXT_TOKENS)
        self.window = min(2048, self.config.context, len(self.ids))
        need = max(longest, self.isl + self.osl, self.window, max(map(len, asked)) + plan.answer_limit)
        self.max_len = min(self.config.context, need)

    @property
    def signature(self) -> str:
        """Changes when the checkpoint does: config.json as it is, weights by name, size and time of change."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in sorted(self.folder.glob("*.safetensors")):
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]

    def load(self, pair: Pair) -> Model:
        """The model as a pair says, in the float type that answers soonest; a quantised one has an int8 head."""
        spec = None if pair.spec == SIXTEEN else QuantSpec.parse(pair.spec)
        head = "16bit" if spec is None else "int8-row"
        made = load(self.folder, spec=spec, head=head, device=self.where, max_len=self.max_len)
        return soonest(made, self.plan.batch, self.isl, self.osl)

    @functools.cached_property
    def reference(self) -> Model:
        return self.load(Pair(SIXTEEN, SIXTEEN))

    @functools.cached_property
    def own_score(self) -> task.Scored:
        return task.score(self.reference, self.words, self.task)

    @functools.cached_property
    def own_lengths(self) -> list[int]:
        return self.lengths(self.reference)

    def lengths(self, model: Model) -> list[int]:
        """Tokens of greedy answers."""
        return task.lengths(model, self.words, self.task, count=self.plan.answers, limit=self.plan.answer_limit)

    def release(self) -> None:
        """Lets the model go; scores and lengths stay."""
        self.__dict__.pop("reference", None)


def soonest(model: Model, batch: int, isl: int, osl: int) -> Model:
    """`model` computing in the float type (and for one sequence through torch.mv or not) that answers a wave soonest here.

    A card has 16-bit units and keeps the checkpoint's type.
    """
    if model.device.type == "cuda":
        return model
    found: dict[float, Model] = {}
    for dtype in FLOATS:
        for mv in (False, True)[: 2 if batch == 1 else 1]:
            option = replace(model.with_dtype(dtype), mv=mv)
            begun = time.perf_counter()
            _wave(option, batch, isl, 2)  # loads what is loaded at a first call
            if found and time.perf_counter() - begun > _HOPELESS * min(found):
                continue
            begun = time.perf_counter()
            _wave(option, batch, isl, 1)
            middle = time.perf_counter()
            _wave(option, batch, isl, 2)
            step = max(0.0, time.perf_counter() - middle - (middle - begun))
            found[middle - begun + (osl - 1) * step] = option
    return found[min(found)]


def _wave(model: Model, batch: int, isl: int, osl: int) -> None:
    """Random prompts are taken in and `osl` greedy tokens made."""
    prompts = contexts.tokens_of(model.config.vocab, (batch, isl), 0, model.device).tolist()
    model.generate(prompts, osl, stop=())


# ---- one cell --------------------------------------------------------------------------------------------------------


def judge(rung: Rung, model: Model, plain: bool) -> dict[str, Any]:
    """The quality section of a model against its 16-bit self: KL, top-1, perplexity, the task, lengths; gate and reasons."""
    reference, name = rung.reference, rung.config.name
    own, scored = rung.own_score, rung.own_score if plain else task.score(model, rung.words, rung.task)
    if plain:
        found = quality.compare(reference, reference, rung.ids, rung.window)
        made = quality.reference_section(found, name) | {"reasons": ["16-bit weights are the reference"]}
        return made | {"task": scored.section(), "length_ratio": 1.0}
    found, (word, reasons) = contexts.judged(reference, model, rung.ids, rung.window)
    ratio = task.length_ratio(rung.lengths(model), rung.own_lengths)
    beyond = quality.gate_length(ratio)
    least = rung.plan.allowed(own.score)
    if scored.score < least:
        beyond.append(f"score {scored.score:.1%} is below {least:.1%}, its 16-bit {own.score:.1%} less the drop")
    if quality.is_small(reference):
        beyond = [f"{words} (printed, does not decide: a small model)" for words in beyond]
    elif beyond:
        word = "red"
    cut = sum(n >= rung.plan.answer_limit for n in rung.own_lengths)
    said = f"lengths of {len(rung.own_lengths)} greedy answers, {cut} of the reference's cut at {rung.plan.answer_limit} tokens"
    return quality.section(found, (word, [*reasons, *beyond]), name) | {
        "protocol": f"{found.protocol}; {said}",
        "task": scored.section(),
        "length_ratio": ratio,
    }


def time_waves(rung: Rung, model: Model) -> dict[str, dict[str, clock.Sample]]:
    """{"prefill", "wave"} -> side -> seconds, of the same rounds; a wave is a prefill and the steps after it.

    Short waves are repeated: a few of them would say more about the machine than about the model.
    """
    plan = fair.Plan(prompt=rung.isl, new=max(1, rung.osl - 1), batch=rung.plan.batch, rounds=rung.plan.rounds)
    sides = {"baseline": rung.reference, "pair": model}
    contexts.fits_memory(list(sides.values()), plan, rung.where)
    ids = contexts.tokens_of(rung.config.vocab, (plan.batch, plan.prompt), 1, rung.where)
    held = {name: side.new_cache(plan.batch, plan.prompt) for name, side in sides.items()}
    calls = {name: functools.partial(side.prefill, ids, held[name]) for name, side in sides.items()}

    def prefills(rounds: int) -> dict[str, clock.Sample]:
        return clock.ab(calls, rounds=rounds, device=rung.where, before=lambda name, turn: held[name].rewind())

    wave = prefills(1)["baseline"].median * rung.osl  # at most: a step is no longer than the prefill of as many prompts
    plan = replace(plan, rounds=max(plan.rounds, min(_MOST_ROUNDS, math.ceil(_LEAST_S / wave))))
    prefill = prefills(plan.rounds)
    if rung.osl == 1:  # the prefill gives the one token
        return {"prefill": prefill, "wave": prefill}
    step = contexts.time_decode(sides, plan, plan.prompt, rung.where).samples
    both = {name: zip(prefill[name].samples, step[name].samples, strict=True) for name in sides}
    waves = {name: clock.Sample.of([p + plan.new * s for p, s in rounds]) for name, rounds in both.items()}
    return {"prefill": prefill, "wave": waves}


def _figures(rung: Rung, model: Model, baseline_key: str, price: float | None) -> dict[str, Any]:
    """Sections that only a pair with no red gate has."""
    times, batch = time_waves(rung, model), rung.plan.batch
    wave, prefill = times["wave"]["pair"], times["prefill"]["pair"]
    gain = clock.ratio(times["wave"]["baseline"], wave)
    rate = batch * rung.osl / wave.median
    versus = {"ratio": gain.median, "ci95": [gain.lo, gain.hi], "batch": batch, "batch_fp16": batch}
    tokens: dict[str, Any] = {"tok_s": rate, "tok_s_in": batch * rung.isl / prefill.median, "tok_s_per_card": rate}
    tokens |= {"tok_s_per_user": rate / batch, "concurrency": batch}
    tokens["vs_fp16"] = {"same_batch": versus | {"baseline_key": baseline_key}}
    spread = {name: getattr(wave, name) * 1e6 for name in ("median", "lo", "hi", "iqr")}
    return {
        "tokens": tokens,
        "latency_us": spread | {"samples": [s * 1e6 for s in wave.samples]},
        "clock": {"mode": "graph" if rung.where.type == "cuda" else "wall", "l2": "warm", "rounds": len(wave.samples)}
        | {
            "calls_per_sample": 1,
            "warmup": 1,
            "power": "sustained",
            "drift": wave.drift,
            "noisy": card.noise(rung.where),
        },
        "money": priced(rung.isl, rung.osl, batch, tokens, price),
    }


def priced(isl: int, osl: int, batch: int, tokens: Mapping[str, Any], usd_hour: float | None) -> dict[str, Any] | None:
    """The money section from the rates of a record; None without a price."""
    into = batch * isl / tokens["tok_s_in"]
    wave = batch * osl / tokens["tok_s"]
    seconds = {"prefill_s": into, "decode_s": max(0.0, wave - into)}
    return money.section(usd_hour, **seconds, tokens_in=batch * isl, tokens_out=batch * osl)


def _measure(rung: Rung, pair: Pair, key: str, own_key: str, about: Mapping[str, Any], price: float | None) -> Record:
    begun = time.perf_counter()
    reference = rung.reference
    model = reference if pair.spec == SIXTEEN else rung.load(pair)
    model = model.with_kv(None if pair.kv == SIXTEEN else pair.kv)
    judged = judge(rung, model, pair.plain)
    figures = {} if judged["gate"] == "red" else _figures(rung, model, own_key, price)
    bits: dict[str, Any] = {"kv_bits": model.kv.bits if model.kv.quantised else model.dtype.itemsize * 8}
    spec = model.spec
    bits |= {"weight_bits": spec.weight_bits if spec else model.dtype.itemsize * 8}
    bits |= {"act_bits": spec.act_bits if spec else model.dtype.itemsize * 8, "group": spec.group if spec else None}
    body = {"impl": model.kernel, "isa": model.isa, "dtype": FLOATS[model.dtype], "same_fusions": model.same_fusions}
    body |= {"baseline_dtype": FLOATS[reference.dtype], "attention_body": model.attention("decode")}
    return Record(
        cell_key=key,
        **{**about, "scheme": about["scheme"] | bits | {"head": model.head, "notes": list(model.notes)}},
        seconds=round(time.perf_counter() - begun, 3),
        body=body,
        memory={"weights": model.nbytes, "kv_bytes_per_token": model.kv_bytes_per_token}
        | {"kv": rung.plan.batch * (rung.isl + rung.osl) * model.kv_bytes_per_token},
        quality=judged,
        **figures,
    )


# ---- all cells -------------------------------------------------------------------------------------------------------


def run(
    folders: Sequence[Path],
    wanted: task.Task,
    plan: Plan | None = None,
    *,
    device: torch.device | None = None,
    out: str | Path | None = None,
    usd_hour: float | None = None,
    progress: Say | None = None,
    command: str = "",
    **resume: Any,
) -> list[Record]:
    """A Record for each model, spec and cache; `out` is gone on with, `resume` as in cells.run.

    FormatError before anything is measured: a folder that is no 16-bit checkpoint, a name given twice, a question too long.
    """
    plan, say = plan or Plan(), progress or (lambda words: None)
    where = device or card.default_device()
    rungs = [Rung(folder, wanted, plan, where) for folder in folders]
    names = [rung.config.name for rung in rungs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise FormatError(f"models {', '.join(sorted(twice))}: given twice; rows are told apart by the folder's name")
    machine, found = here.identity(where), card.fingerprint(where)
    shared = found | {"code": record.code_section(command) | {"op_source_hash": ops.source_hash(*ops.OPS)}}
    made = []
    for rung in rungs:
        identity = {"machine": machine, "source": shared["code"]["op_source_hash"], "model": rung.signature}
        identity |= {"task": _digest(wanted), "text": _digest(rung.ids.tolist()), "rounds": plan.rounds}
        identity |= {"batch": plan.batch, "drop": plan.drop, "answers": [plan.answers, plan.answer_limit]}

        def key(pair: Pair, identity: Mapping[str, Any] = identity) -> str:
            return record.cell_key(level="model", verb="ladder", pair=[pair.spec, pair.kv], **identity)

        for pair in pairs(plan):
            about = shared | _about(rung, pair, wanted)
            call = functools.partial(_alone, rungs, rung, pair, key(pair), key(Pair(SIXTEEN, SIXTEEN)), about, usd_hour)
            name = f"{rung.config.name} {pair.spec} {pair.kv} cache"
            made.append(Cell(name, (key(pair),), seconds(rung, pair), call, about))
    try:
        rows = cells.run(made, None if out is None else Path(out), say=say, **resume)
    finally:
        for rung in rungs:
            rung.release()
    return [_again(row, usd_hour) for row in rows]


def _alone(rungs: Sequence[Rung], rung: Rung, *rest: Any) -> list[Record]:
    """A cell, with the 16-bit self of no other model in memory."""
    for other in rungs:
        if other is not rung:
            other.release()
    return [_measure(rung, *rest)]


def _again(row: Record, usd_hour: float | None) -> Record:
    """A row with the cost at today's price, whatever it was when it was measured."""
    if not row.tokens:
        return row
    shape = row.shape
    return replace(row, money=priced(shape["isl"], shape["osl"], shape["batch"], row.tokens, usd_hour))


def _about(rung: Rung, pair: Pair, wanted: task.Task) -> dict[str, Any]:
    """Sections that are known before a pair is measured."""
    config = rung.config
    return {
        "level": "model",
        "case": f"{config.name}.ladder.{wanted.name}.b{rung.plan.batch}",
        "model": {"id": config.name, "weights": "real", "layers_run": config.layers, "layers": config.layers}
        | {"config_hash": rung.signature},
        "shape": {"batch": rung.plan.batch, "isl": rung.isl, "osl": rung.osl},
        "scheme": {"spec": pair.spec, "kv_spec": pair.kv},
    }


def seconds(rung: Rung, pair: Pair) -> float:
    """A guess for the time left, from the bytes of weights and the operations at rates of a modest machine or card."""
    config, plan = rung.config, rung.plan
    parameters = config.layers * config.block_parameters() + config.vocab * config.hidden
    read, rate = (1e12, 1e14) if rung.where.type == "cuda" else (1e10, 1e11)
    step = 2 * parameters / read + 2 * parameters * task.BATCH / rate + config.layers * 3e-4
    questions = len(rung.task.items)
    steps = questions / task.BATCH * rung.osl + min(plan.answers, questions) / task.BATCH * plan.answer_limit
    tokens = 2 * len(rung.ids) + questions * rung.isl + 2 * (plan.rounds + 1) * plan.batch * rung.isl
    waves = 0.0 if rung.where.type == "cuda" else 12 * (plan.batch * rung.isl * 2 * parameters / rate)
    sides = 1 if pair.plain else 2
    return 2.0 + sides * (steps + plan.rounds * rung.osl) * step + tokens * 2 * parameters / rate + waves


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
