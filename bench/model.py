"""`percard bench model`: prefill and decode of a whole model, FP16 against quantised, A B A B in one process.

    1  a one-layer probe per phase finds the fastest float dtype of torch: that is the baseline, and it is named
    2  baseline and variants are loaded side by side through the same engine
    3  real weights pass the quality gate first (bench/quality.py); red = the row has no speed. Synthetic weights have
       no quality: their rows say so, or carry the gate that was measured on another model. Each side must be the same
       model by prompt and by step (bench/soundness.py)
    4  at each batch of the ladder a prompt, then `new` greedy steps from that depth, or from the depths asked for, over each
       cache asked for (bench/contexts.py): rounds in turn, median and spread
    5  the noise floor: the baseline against itself, in the same rounds

One Record per side, phase, depth and batch, written as soon as its rounds are done: a second call with the same `out` times
what is missing, beside a fresh baseline. Loading and packing lie outside the timed region, quantising activations inside.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..formats.spec import FormatError, QuantSpec
from ..kernels.op import native_isa
from . import card, cells, clock, contexts, energy, model_ratios, model_rows, ops, quality, record, roof
from .cells import Cell
from .engine import Model
from .engine import kv as caches
from .engine.cache import Cache
from .fair import NotComparable, Plan, budget, cache_noise, choose_layers, memory_fits
from .model_rows import Machine, Measured, Setting
from .model_sides import (
    BASELINE,
    Side,
    Wanted,
    judge,
    layers_of,
    load_sides,
    needed,
    probes_of,
    settled,
    sources,
    wanted,
    weights_hash,
)
from .record import Record
from .worker import Outcome, outcome_of

__all__ = ["BASELINE", "NotComparable", "Plan", "Side", "quality", "run"]

_RUNS = {"prefill": "prefill", "decode": "decode", "mixed": "decode"}  # the model that serves a phase


@dataclass(frozen=True)
class Group:
    """What is timed in the same rounds: a phase at a depth (of a prefill: the prompt) and a batch."""

    phase: str
    depth: int
    batch: int


def run(
    source: str | Path,
    specs: Sequence[str | QuantSpec] = (),
    *,
    plan: Plan | None = None,
    against: str | Path | None = None,
    text: str | Path | None = None,
    gates: Mapping[str, Mapping[str, Any]] | None = None,
    out: str | Path | None = None,
    impl: str | None = None,
    device: torch.device | None = None,
    progress: Callable[[str], None] | None = None,
    command: str = "",
    retry: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> list[Record]:
    """Times `source` (a checkpoint, or `shape:<name>`) in 16 bits and in each of `specs`; records baseline first.

    A quantised checkpoint is its own spec and needs `against`, the 16-bit checkpoint it came from, or the one that this was pruned
    from; with `against` a 16-bit checkpoint is such a child too. Real weights need
    `text`, a held-out UTF-8 file for the gate; `gates` {spec or "baseline": quality section} brings one measured
    elsewhere (the section names its model). `out` appends each record to a JSONL file as it is made, and what is in it is not
    measured again (`retry`: failed rows are; `force`: all); `dry_run` only tells what would be. `progress` gets a line of words
    per step. FormatError for bad input, NotComparable when a fair comparison is not possible here.
    """
    plan, say = plan or Plan(), progress or (lambda words: None)
    where, path = device or card.default_device(), None if out is None else Path(out)
    parsed = [QuantSpec.parse(s) if isinstance(s, str) else s for s in specs]
    reference, parsed, config = sources(source, parsed, against)
    if not str(source).startswith("shape:") and text is None and gates is None:
        raise FormatError(f"{source}: real weights need a held-out text for the quality gate; give --text FILE")
    if plan.ladder[0] < 1:
        raise FormatError(f"batch {plan.ladder[0]}: expected at least 1")
    contexts.fits_model(plan, config)
    for name in plan.kv:  # what is not known or does not fit is told before anything is timed
        caches.of(name, config, str(source))
    if plan.prompt + plan.new > config.context:
        if plan.new >= config.context:
            raise FormatError(f"{source}: {plan.new} new tokens do not fit the context of {config.context}; give fewer")
        plan = replace(plan, prompt=config.context - plan.new)
        say(f"prompt cut to {plan.prompt} tokens: the context is {config.context}")
    memory, probes = budget(plan, where), None
    if plan.budget_s is not None and plan.layers is None:
        probes = probes_of(config, parsed, plan, where, impl, say)
    config, plan = choose_layers(config, probes or {}, plan)
    this = roof.identity(where.type)
    machine = {"same": this["same"], "uuid": this["uuid"], "isa": [card.torch_isa(), native_isa()]}
    code, gate = ops.source_hash(*ops.OPS), _of(text)
    setting = Setting(config, plan, str(source), memory, machine, code, weights_hash(source), gate, impl)
    asked = wanted(parsed, plan, config, source, child=not parsed and str(reference) != str(source))
    known = {} if force else cells.settled(path, retry=retry)
    bench = _Bench(setting, asked, where, source, reference, parsed, text, gates or {}, impl, say, command)
    todo = list(_cells(bench, known))
    missing = {side.name for one in todo for side in one.missing}
    if missing and not dry_run:
        bench.load(missing, probes)
        bench.kept.update(known)
    records = cells.run([one.cell for one in todo], path, say=say, retry=retry, force=force, dry_run=dry_run)
    order = {key: i for i, key in enumerate(bench.keys())}
    records = sorted({r.cell_key: r for r in records}.values(), key=lambda r: order.get(r.cell_key, len(order)))
    return model_ratios.completed(records, plan.bound, memory)


def _of(text: str | Path | None) -> str | None:
    """Hash of the text that gates; a missing file is told when it is read."""
    with suppress(OSError):
        return None if text is None else hashlib.sha256(Path(text).read_bytes()).hexdigest()
    return None


@dataclass(frozen=True)
class _Todo:
    """A cell, and which sides it is there to measure (none: the file has it)."""

    cell: Cell
    missing: tuple[Wanted, ...]


def _cells(bench: _Bench, known: Mapping[str, Record]) -> Iterator[_Todo]:
    """A cell for each group: of all that is known, and of the baseline with all that is missing."""
    for group in bench.groups():
        sides = bench.sides_of(group)
        keys = {side.name: bench.keys_of(side, group) for side in sides}
        missing = tuple(side for side in sides if not all(key in known for key in keys[side.name]))
        rest = [side for side in sides if side not in missing]
        fresh = [sides[0], *(side for side in missing if side.name != BASELINE)] if missing else []
        for some in (fresh, [side for side in rest if side not in fresh]):
            if some:
                flat = tuple(key for side in some for key in keys[side.name])
                name = bench.setting.case(group.phase, group.depth, group.batch)
                row = bench.setting.about(some[0], group.phase, group.depth, group.batch)
                seconds = bench.predicted(group, some)

                def measure(group: Group = group, some: list[Wanted] = some) -> Iterator[Record]:
                    return bench.measure(group, [side.name for side in some])

                yield _Todo(Cell(name, flat, seconds, measure, row), tuple(fresh) if some is fresh else ())


@dataclass
class _Bench:
    """One call of `run`: what is asked for, and once loaded the sides, the machine and what was measured so far."""

    setting: Setting
    asked: list[Wanted]
    device: torch.device
    source: str | Path
    reference: str | Path
    specs: list[QuantSpec]
    text: str | Path | None
    gates: Mapping[str, Mapping[str, Any]]
    impl: str | None
    say: Callable[[str], None]
    command: str
    sides: dict[str, Side] = field(default_factory=dict)
    machine: Machine | None = None
    kept: dict[str, Record] = field(default_factory=dict)
    joules: energy.Source | str = "energy was not asked for"
    idle_w: float | None = None

    @property
    def plan(self) -> Plan:
        return self.setting.plan

    def groups(self) -> Iterator[Group]:
        """Smallest batch first: the rows of the last batch have all ratios."""
        for batch in self.plan.ladder:
            yield Group("prefill", self.plan.prompt, batch)
            for depth in contexts.depths(self.plan):
                yield Group("decode", depth, batch)

    def prefills(self, side: Wanted) -> bool:
        bound = self.plan.bound
        return not side.twin and (not side.more or (bound is not None and bound.ttft_s is not None))

    def sides_of(self, group: Group) -> list[Wanted]:
        """The baseline first."""
        if group.phase == "prefill":
            return [side for side in self.asked if self.prefills(side)]
        return [side for side in self.asked if not side.twin or group.depth == contexts.depths(self.plan)[0]]

    def phases(self, side: Wanted, group: Group) -> list[str]:
        """Rows that a side gets of a group: a decode after the prompt that was timed gives the whole as well."""
        whole = group.phase == "decode" and group.depth == self.plan.prompt and self.prefills(side)
        return [group.phase, "mixed"] if whole else [group.phase]

    def keys_of(self, side: Wanted, group: Group) -> list[str]:
        return [self.setting.key(side, phase, group.depth, group.batch) for phase in self.phases(side, group)]

    def keys(self) -> Iterator[str]:
        """All keys, side by side."""
        for side in self.asked:
            for group in self.groups():
                if side in self.sides_of(group):
                    yield from self.keys_of(side, group)

    def predicted(self, group: Group, sides: Sequence[Wanted]) -> float:
        """Seconds of a cell: from bytes for steps and operations for prompts, at rates of a slow machine of its kind."""
        config, plan = self.setting.config, self.plan
        gbs, tops = (1500.0, 200.0) if self.device.type == "cuda" else (10.0, 0.1)
        weights = config.layers * config.block_parameters() + config.vocab * config.hidden
        turns = (plan.rounds + 1) * (len(sides) + (group.phase == "decode"))
        if group.phase == "prefill":
            work = 2 * group.batch * plan.prompt * model_rows.active_parameters(config)
            return turns * work / (tops * 1e12)
        steps = turns * plan.new * max(2 * weights / (gbs * 1e9), 2 * weights * group.batch / (tops * 1e12))
        return steps + (energy.MIN_S * len(sides) if self.device.type == "cuda" and plan.energy else 0.0)

    def load(self, names: Iterable[str], probes: Mapping[str, Any] | None) -> None:
        """Everything of these sides into memory, judged; and what this machine is."""
        plan, config, where, say = self.plan, self.setting.config, self.device, self.say
        asked = needed(self.asked, set(names))
        specs = [spec for spec in self.specs if any(side.spec == spec for side in asked)]
        probes = probes or probes_of(config, specs, plan, where, self.impl, say)
        memory_fits(config, specs, where)
        layers = layers_of(self.source, self.reference, config)
        by_batch = settled(self.reference, probes[BASELINE], config, layers, plan, where, say)
        noisy = card.noise(where) + cache_noise(config, where)
        longest = max(plan.prompt, *contexts.depths(plan)) + plan.new
        max_len = max(longest, 0 if self.text is None else min(config.context, 2048))
        given = (self.source, self.reference, asked, config, plan, probes, by_batch, max_len, where, self.impl, say)
        sides = load_sides(*given)
        able = [side for side in sides if side.ended is None]
        largest = replace(plan, batch=plan.ladder[-1])
        contexts.fits_memory([side.model("decode", largest.batch) for side in able], largest, where)
        judge(sides, self.reference, self.text, self.gates, plan.ladder, say)
        self.sides = {side.name: side for side in sides}
        self.machine = self._machine(noisy)
        if plan.energy:
            try:
                self.joules = energy.source(where, self.machine.sections["card"].get("uuid"))
                self.idle_w = energy.idle_power(self.joules)
            except energy.NoCounter as error:
                self.joules = str(error)

    def _machine(self, noisy: list[str]) -> Machine:
        self.say("measuring the roofs of this machine")
        found = card.fingerprint(self.device)
        rate, tops = card.read_bandwidth(self.device) / 1e9, roof.float_rate(self.device)
        published = card.published_row(found["card"]["name"], found["card"]["mem_mib"]) if found["card"] else None
        if self.device.type == "cuda":
            found["card"] |= {"roof": {"copy_gbs": rate, "bf16": tops}}
        else:
            found["cpu"] = found["cpu"] | {"read_gbs": rate}
        found["code"] = record.code_section(self.command) | {"op_source_hash": self.setting.sources}
        how = {"l2": "warm", "rounds": self.plan.rounds, "calls_per_sample": 1, "warmup": 1, "noisy": noisy}
        spec = {"spec_gbs": published["bandwidth_gbs"], "spec_tops": published["bf16_tflops"]} if published else {}
        return Machine(found, how | {"power": "sustained"}, rate, tops, **spec)

    def measure(self, group: Group, names: Sequence[str]) -> Iterator[Record]:
        """The rows of a group, timed, red or failed, in the order of the cell's keys."""
        begin = perf_counter()
        sides = [self.sides[name] for name in names]
        timed = [side for side in sides if side.timed]
        found = self._timed(group, timed, begin) if timed else {}
        rows = []
        for side in sides:
            for phase in self.phases(side.wanted, group):
                seen = found.get((side.name, phase))
                rows.append(seen if isinstance(seen, Record) else self._without(group, side, phase))
        if group.batch == self.plan.ladder[-1]:
            before = [r for key, r in self.kept.items() if key not in {row.cell_key for row in rows}]
            rows = model_ratios.completed([*before, *rows], self.plan.bound, self.setting.budget)[len(before) :]
        self.kept.update({row.cell_key: row for row in rows})
        yield from rows

    def _without(self, group: Group, side: Side, phase: str) -> Record:
        """The row of a side that was not timed: its gate is red, or it could not be loaded."""
        assert self.machine is not None
        if side.ended is None:
            return model_rows.red(self.setting, self.machine, side, phase, group.depth, group.batch)
        at = (phase, group.depth, group.batch)
        return model_rows.failed(self.setting, side.wanted, *at, side.ended, side.quality)

    def _timed(self, group: Group, sides: Sequence[Side], begin: float) -> dict[tuple[str, str], Record]:
        """Rows by (side, phase). When the rounds of all fail, each variant is timed alone beside the baseline."""
        try:
            return self._rounds(group, sides, begin)
        except (RuntimeError, NotImplementedError, MemoryError, ValueError) as error:
            if len(sides) == 1:
                raise
            if len(sides) == 2:
                outcome, lost = outcome_of(error), sides[1].wanted
                base = self._timed(group, sides[:1], begin)
                at = (group.depth, group.batch, outcome)
                phases = self.phases(lost, group)
                return base | {(lost.name, p): model_rows.failed(self.setting, lost, p, *at) for p in phases}
        found: dict[tuple[str, str], Record] = {}
        for side in sides[1:]:
            found |= self._timed(group, [sides[0], side], begin)
        return found

    def _rounds(self, group: Group, sides: Sequence[Side], begin: float) -> dict[tuple[str, str], Record]:
        """A B A B of these sides, baseline first, as rows."""
        plan, run_id = replace(self.plan, batch=group.batch), uuid.uuid4().hex[:12]
        models = {side.name: side.model(_RUNS[group.phase], group.batch) for side in sides}
        self.say(
            f"timing {self.setting.case(group.phase, group.depth, group.batch)}, {plan.rounds} rounds of {len(sides)}"
        )
        kv_bytes: Mapping[str, int] = {}
        joules: dict[str, dict[str, Any]] = {}
        machine = self.machine
        assert machine is not None
        if group.phase == "prefill":
            samples, extra = _time_prefill(models, plan, self.device)
            graph = False
        else:
            self.say(f"{plan.new} decode steps at depth {group.depth}")
            seen = contexts.time_decode(models, plan, group.depth, self.device, self._windows(plan, joules))
            samples, kv_bytes, extra = seen.samples, seen.kv_bytes, seen.extra
            graph = self.device.type == "cuda" and not seen.words
            machine = _noted(machine, seen)
        found: dict[tuple[str, str], Record] = {}
        base = sides[0]
        ours: dict[str, tuple[clock.Sample | None, clock.Sample | None]] = {}
        for side in sides:
            first = samples[side.name] if group.phase == "prefill" else self._prompt_of(side.wanted, group.batch)
            ours[side.name] = first, None if group.phase == "prefill" else samples[side.name]
        for side in sides:
            first, step = ours[side.name]
            words = base.probes[group.batch].words(_RUNS[group.phase])
            for phase in self.phases(side.wanted, group):
                sample, against = samples[side.name], samples[base.name]
                if phase == "mixed":
                    theirs = ours[base.name][0]
                    if first is None or step is None or theirs is None:
                        error = {"type": "Missing", "message": "its prompt was not timed", "stage": "prefill"}
                        at = (phase, group.depth, group.batch)
                        ended = Outcome("failed", error)
                        found[side.name, phase] = model_rows.failed(self.setting, side.wanted, *at, ended)
                        continue
                    sample = model_rows.whole(first, step, plan.new)
                    against = model_rows.whole(theirs, samples[base.name], plan.new)
                    few = min(len(sample.samples), len(against.samples))
                    sample, against = (clock.Sample.of(s.samples[:few]) for s in (sample, against))
                row = Measured(
                    side, base, phase, group.depth, group.batch, sample, against, first, step,
                    kv_bytes=kv_bytes.get(side.name), extra=extra.get(side.name), energy=joules.get(side.name) if phase == "decode" else None,
                    graph=graph and phase == "decode", run_id=run_id, seconds=perf_counter() - begin,
                )  # fmt: skip
                found[side.name, phase] = model_rows.row(self.setting, machine, row, words)
        return found

    def _prompt_of(self, side: Wanted, batch: int) -> clock.Sample | None:
        """Seconds of the prompt at this batch, measured before (in this call or an earlier one)."""
        if not self.prefills(side):
            return None
        held = self.kept.get(self.setting.key(side, "prefill", self.plan.prompt, batch))
        if held is None or not held.latency_us:
            return None
        return clock.Sample.of([t / 1e6 for t in held.latency_us["samples"]])

    def _windows(self, plan: Plan, joules: dict[str, dict[str, Any]]) -> Callable[[str, Callable[[], Any]], None]:
        """Fills the energy section of each side: a window of MIN_S where there is a counter, else the reason."""

        def window(name: str, call: Callable[[], Any]) -> None:
            if isinstance(self.joules, str):
                joules[name] = energy.missing(self.device, self.joules)
                return
            made, begin = 0, perf_counter()
            with energy.measured(self.device, found=self.joules, idle_w=self.idle_w) as meter:
                while perf_counter() - begin < 1.02 * energy.MIN_S:
                    call()
                    clock.synchronize(self.device)
                    made += plan.batch * plan.new
            joules[name] = meter.section(made)

        return window


def _noted(machine: Machine, seen: contexts.Timed) -> Machine:
    """The machine with the noise floor of these rounds and what went otherwise."""
    sections = dict(machine.sections)
    name = "card" if sections["card"] else "cpu"
    sections[name] = sections[name] | {"noise_floor_pct": seen.floor_pct}
    how = dict(machine.clock)
    how["noisy"] = [*how["noisy"], *(words for words in seen.words if words not in how["noisy"])]
    return replace(machine, sections=sections, clock=how)


def _time_prefill(
    models: Mapping[str, Model], plan: Plan, device: torch.device
) -> tuple[dict[str, clock.Sample], dict[str, int | None]]:
    """Seconds of a prompt of each side, and its extra bytes."""
    ids: dict[str, torch.Tensor] = {}
    held: dict[str, Cache] = {}
    calls: dict[str, Callable[[], Any]] = {}
    peaks = contexts.Peaks(device)
    for name, model in models.items():
        held[name] = model.new_cache(plan.batch, plan.prompt)

        def prefill(model: Model = model, name: str = name) -> None:
            model.prefill(ids[name], held[name])

        calls[name] = prefill

    def before(name: str, turn: int) -> None:
        ids[name] = contexts.tokens_of(models[name].config.vocab, (plan.batch, plan.prompt), turn, device)
        held[name].rewind()
        peaks.before(name, turn)

    found = clock.ab(calls, rounds=plan.rounds, device=device, before=before)
    return found, peaks.extra
