"""`percard bench model`: prefill and decode of a whole model, FP16 against quantised, A B A B in one process.

    1  a one-layer probe per phase finds the fastest float dtype of torch: that is the baseline, and it is named
    2  baseline and variants are loaded side by side through the same engine
    3  real weights pass the quality gate first (bench/quality.py); red = the row has no speed. Synthetic weights have
       no quality: their rows say so, or carry the gate that was measured on another model
    4  prefill of `prompt` tokens, then `new` greedy steps from that depth, or from the depths asked for, over each cache
       asked for (bench/contexts.py): rounds in turn, median and spread
    5  the noise floor: the baseline against itself, in the same rounds

One Record per side and phase. Loading and packing lie outside the timed region, quantising activations inside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..formats import compressed_tensors
from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError, QuantSpec
from . import card, clock, contexts, quality, record
from .engine import Model, load, load_config
from .engine import kv as caches
from .engine.cache import Cache
from .engine.config import Config
from .fair import NotComparable, Plan, cache_noise, choose_layers, memory_fits
from .probe import FLOATS, PHASES, Probe, probe, settle
from .record import Record

__all__ = ["BASELINE", "NotComparable", "Plan", "Side", "run"]

BASELINE = "baseline"


@dataclass
class Side:
    """One line of the comparison: its models by phase (they share weights), how it is named, its quality section."""

    name: str
    spec: QuantSpec | None
    head: str
    models: dict[str, Model]
    quality: dict[str, Any]
    load_s: float
    twin: bool = False  # the 16-bit head beside an int8 one: decode only
    more: bool = False  # another cache beside the first one asked for: decode only

    @property
    def kv(self) -> caches.Layers:
        return self.models["decode"].kv

    @property
    def timed(self) -> bool:
        return self.quality.get("gate") != "red"


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
) -> list[Record]:
    """Times `source` (a checkpoint, or `shape:<name>`) in 16 bits and in each of `specs`; records baseline first.

    A quantised checkpoint is its own spec and needs `against`, the 16-bit checkpoint it came from. Real weights need
    `text`, a held-out UTF-8 file for the gate; `gates` {spec or "baseline": quality section} brings one measured
    elsewhere (the section names its model). `out` appends each record to a JSONL file as it is made. `progress` gets a
    line of words per step. FormatError for bad input, NotComparable when a fair comparison is not possible here.
    """
    plan = plan or Plan()
    say = progress or (lambda words: None)
    where = device or card.default_device()
    started = time.perf_counter()
    parsed = [QuantSpec.parse(s) if isinstance(s, str) else s for s in specs]
    reference, parsed, config = _sources(source, parsed, against)
    if not str(source).startswith("shape:") and text is None and gates is None:
        raise FormatError(f"{source}: real weights need a held-out text for the quality gate; give --text FILE")
    contexts.fits_model(plan, config)
    for name in plan.kv:  # what is not known or does not fit is told before anything is timed
        caches.of(name, config, str(source))
    if plan.prompt + plan.new > config.context:
        if plan.new >= config.context:
            raise FormatError(f"{source}: {plan.new} new tokens do not fit the context of {config.context}; give fewer")
        plan = replace(plan, prompt=config.context - plan.new)
        say(f"prompt cut to {plan.prompt} tokens: the context is {config.context}")
    probes = _probes(config, parsed, plan, where, impl, say)
    config, plan = choose_layers(config, probes, plan)
    memory_fits(config, parsed, where)
    say("timing the baseline in the float types that came near")
    whole: dict[str, Any] = {"layers": config.layers, "max_len": plan.prompt + 1, "device": where, "seed": plan.seed}
    probes[BASELINE] = settle(
        probes[BASELINE], lambda dtype: load(reference, dtype=dtype, **whole), prompt=plan.prompt, batch=plan.batch
    )
    noisy = card.noise(where) + cache_noise(config, where)
    depths = contexts.depths(plan)
    longest = max(plan.prompt, *depths) + plan.new
    max_len = max(longest, 0 if text is None else min(config.context, 2048))
    sides = _load_sides(source, reference, parsed, config, plan, probes, max_len, where, impl, say)
    contexts.fits_memory([side.models["decode"] for side in sides], plan, where)
    _gate(sides, reference, text, gates or {}, say)
    timed = {side.name: side for side in sides if side.timed}
    both = {name: side for name, side in timed.items() if not (side.twin or side.more)}
    say(f"timing prefill of {plan.prompt} tokens, {plan.rounds} rounds of {len(both)}")
    prefills = _time_prefill(both, plan, where)
    decodes = {}
    for depth in depths:
        models = {n: side.models["decode"] for n, side in timed.items() if depth == depths[0] or not side.twin}
        say(f"timing {plan.new} decode steps at depth {depth}, {plan.rounds} rounds of {len(models) + 1}")
        decodes[depth] = contexts.time_decode(models, plan, depth, where)
        noisy += [words for words in decodes[depth].words if words not in noisy]
    floor = max(found.floor_pct for found in decodes.values())
    seconds = time.perf_counter() - started

    shared = _shared(where, floor, command)
    shared["clock"] = {
        "mode": "graph" if where.type == "cuda" and not any(found.words for found in decodes.values()) else "wall",
        "l2": "warm",
        "rounds": plan.rounds,
        "calls_per_sample": 1,
        "warmup": 1,
    }
    shared["clock"] |= {"noisy": noisy, "power": "sustained"}
    records = []
    for side in sides:
        for part in _parts(side, plan, prefills, decodes):
            row = _record(side, part, sides[0], plan, config, probes, shared, seconds)
            records.append(row)
            if out is not None:
                record.append(out, row)
    return records


@dataclass(frozen=True)
class Part:
    """What one record is about: a phase, tokens in the cache before (of a prefill: the prompt), samples of all sides."""

    phase: str
    depth: int
    samples: Mapping[str, clock.Sample]
    kv_bytes: int | None


def _parts(
    side: Side, plan: Plan, prefills: Mapping[str, clock.Sample], decodes: Mapping[int, contexts.Timed]
) -> Iterator[Part]:
    if not (side.twin or side.more):
        yield Part("prefill", plan.prompt, prefills, None)
    for depth, found in decodes.items():
        if depth == next(iter(decodes)) or not side.twin:
            yield Part("decode", depth, found.samples, found.kv_bytes.get(side.name))


def _sources(
    source: str | Path, specs: list[QuantSpec], against: str | Path | None
) -> tuple[str | Path, list[QuantSpec], Config]:
    """(where the 16-bit weights are, specs to time, config of the source)."""
    if str(source).startswith("shape:"):
        if against is not None:
            raise FormatError(f"{source}: synthetic weights are their own 16-bit side; drop --against")
        return source, specs, load_config(source)
    config = load_config(source)
    opened = Checkpoint.open(Path(source))
    if not compressed_tensors.claims(opened.config):
        return source, specs, config
    if specs:
        raise FormatError(f"{source}: is quantised already, so --specs has no meaning; give the 16-bit checkpoint")
    if against is None:
        raise FormatError(f"{source}: is quantised; name the 16-bit checkpoint it came from with --against")
    found = list(compressed_tensors.specs(opened.config, opened.names).values())
    return against, [max(set(found), key=found.count)], config


def _probes(
    config: Config, specs: Sequence[QuantSpec], plan: Plan, device: torch.device, impl: str | None, say: Callable
) -> dict[str, Probe]:
    """A probe of the baseline over all float dtypes, and of each spec over those of 16 bits: each runs in its fastest."""
    floats = list(FLOATS) if device.type == "cpu" else [config.dtype]
    options: dict[str, Any] = {"device": device, "prompt": plan.prompt, "batch": plan.batch}
    say(f"probing one layer in {', '.join(FLOATS[d] for d in floats)}")
    found = {BASELINE: probe(config, None, floats, **options)}
    floats = [dtype for dtype in floats if dtype.itemsize == 2] or floats  # fp32 embeddings would take what we save
    for spec in specs:
        say(f"probing one layer in {spec}")
        found[str(spec)] = probe(config, spec, floats, impl=impl, **options)
    return found


def _load_sides(
    source: str | Path,
    reference: str | Path,
    specs: Sequence[QuantSpec],
    config: Config,
    plan: Plan,
    probes: Mapping[str, Probe],
    max_len: int,
    device: torch.device,
    impl: str | None,
    say: Callable,
) -> list[Side]:
    """Baseline, then each variant with the head asked for and, beside an int8 head, with the 16-bit one."""
    options: dict[str, Any] = {
        "layers": config.layers,
        "max_len": max_len,
        "device": device,
        "seed": plan.seed,
    }

    def models(where: str | Path, spec: QuantSpec | None, found: Probe) -> tuple[dict[str, Model], float]:
        begin = time.perf_counter()
        dtypes = {phase: found.fastest(phase) for phase in PHASES}
        lender = sides[0].models["decode"] if sides else None
        decode = load(where, spec=spec, dtype=dtypes["decode"], impl=impl if spec else None, share=lender, **options)
        prefill = decode.with_dtype(dtypes["prefill"])
        # Single 16-bit rows (a variant's head too) go the way that was faster for the baseline.
        decode = replace(decode, mv=decode.dtype in probes[BASELINE].mv)
        return {"prefill": prefill, "decode": decode}, time.perf_counter() - begin

    sides: list[Side] = []
    say(f"loading {reference} in 16 bits, {config.layers} layers")
    held, seconds = models(reference, None, probes[BASELINE])
    sides.append(Side(BASELINE, None, "16bit", held, {}, seconds))
    int8: Model | None = None
    wanted: list[QuantSpec | None] = list(specs)
    if reference != source:
        wanted = [None]  # the checkpoint knows its own spec

    def over(held: dict[str, Model], kv: str) -> dict[str, Model]:
        return {phase: model.with_kv(kv) for phase, model in held.items()}

    def add(name: str, spec: QuantSpec | None, head: str, held: dict[str, Model], seconds: float) -> None:
        """A side for each cache; the first one asked for also prefills."""
        for kv in plan.kv:
            plain = not caches.of(kv, config, str(source)).quantised
            if spec is None and plain:
                continue  # that is the baseline
            called = name if plain else f"{name}, {kv} cache"
            sides.append(Side(called, spec, head, over(held, kv), {}, seconds, more=kv != plan.kv[0]))

    if not wanted:
        add("16-bit weights", None, "16bit", sides[0].models, sides[0].load_s)
    for spec in wanted:
        say(f"loading {source} as {spec or 'what it is'}")
        held, seconds = models(source, spec, probes[str(spec or specs[0])])
        found = held["decode"].spec
        name = str(found)
        if plan.head == "int8-row":
            begin = time.perf_counter()
            if int8 is not None and int8.synthetic and int8.dtype == held["decode"].dtype:
                int8 = held["decode"].with_head_of(int8)
            else:
                int8 = held["decode"].with_head("int8-row")
            both = {"prefill": replace(int8, mv=False).with_dtype(held["prefill"].dtype), "decode": int8}
            add(name, found, "int8-row", both, seconds + time.perf_counter() - begin)
            beside = Side(f"{name} 16bit head", found, "16bit", over(held, plan.kv[0]), {}, seconds, twin=True)
            sides.insert(len(sides) - len(plan.kv) + 1, beside)
        else:
            add(name, found, "16bit", held, seconds)
    return sides


def _gate(
    sides: list[Side],
    reference: str | Path,
    text: str | Path | None,
    gates: Mapping[str, Mapping[str, Any]],
    say: Callable,
) -> None:
    """Fills the quality section of every side: measured on `text`, brought in `gates`, or synthetic."""
    base = sides[0].models["decode"]
    ids = None if text is None else quality.read_ids(text, reference, 16384)
    for side in sides:
        # A gate that was measured elsewhere was measured with a bf16 cache, unless it is named for another.
        kin = None if side.kv.quantised else str(side.spec) if side.spec else BASELINE
        brought = gates.get(side.name, gates.get(kin) if kin else None)
        weighed = side.spec is not None or side.kv.quantised
        if ids is not None and weighed:
            say(f"quality of {side.name} on {len(ids)} tokens")
            found, verdict = contexts.judged(base, side.models["decode"], ids, min(base.max_len, 2048))
            side.quality = quality.section(found, verdict, base.config.name)
            sides[0].quality = quality.reference_section(found, base.config.name)
        elif brought is not None:
            side.quality = dict(brought)
        elif base.synthetic and weighed:
            noise = side.models["decode"].weights.sqnr_db
            side.quality = {"gate": "synthetic", "reasons": ["speed at true shapes, quality not measured"]}
            side.quality |= {"model": None, "sqnr_db": noise}
        elif not side.quality:
            side.quality = {"gate": "synthetic" if base.synthetic else "none", "reasons": [], "model": None}


def _time_prefill(sides: Mapping[str, Side], plan: Plan, device: torch.device) -> dict[str, clock.Sample]:
    ids: dict[str, torch.Tensor] = {}
    caches: dict[str, Cache] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name, side in sides.items():
        model = side.models["prefill"]
        caches[name] = model.new_cache(plan.batch, plan.prompt)

        def prefill(model: Model = model, name: str = name) -> None:
            model.prefill(ids[name], caches[name])

        calls[name] = prefill

    def before(name: str, turn: int) -> None:
        ids[name] = contexts.tokens_of(
            sides[name].models["prefill"].config.vocab, (plan.batch, plan.prompt), turn, device
        )
        caches[name].rewind()

    return clock.ab(calls, rounds=plan.rounds, device=device, before=before)


def _shared(device: torch.device, noise_floor_pct: float, command: str) -> dict[str, dict[str, Any]]:
    """Sections that every record of this run has in common."""
    found = card.fingerprint(device)
    rate = card.read_bandwidth(device) / 1e9
    if device.type == "cuda":
        found["card"] |= {"roof": {"copy_gbs": rate}, "noise_floor_pct": noise_floor_pct}
    else:
        found["cpu"] = found["cpu"] | {"read_gbs": rate, "noise_floor_pct": noise_floor_pct}
    return found | {"code": record.code_section(command)}


def _record(
    side: Side,
    part: Part,
    base: Side,
    plan: Plan,
    config: Config,
    probes: Mapping[str, Probe],
    shared: Mapping[str, dict[str, Any]],
    seconds: float,
) -> Record:
    phase, samples = part.phase, part.samples
    model, spec = side.models[phase], side.spec
    baseline = FLOATS[base.models[phase].dtype]
    named = str(spec) if spec else FLOATS[model.dtype]
    case = f"pp{plan.prompt}.b{plan.batch}" if phase == "prefill" else f"tg{plan.new}.d{part.depth}.b{plan.batch}"
    case = f"{config.name}.model.{case}"
    shape = {"batch": plan.batch, "isl": plan.prompt, "osl": plan.new, "kv_len": part.depth}
    kept = {"kv": [str(spec) for spec in side.kv.specs]} if side.kv.quantised else {}
    identity: dict[str, Any] = {"case": case, "shape": shape, "spec": named, "head": side.head, "layers": config.layers}
    machine = shared["card"].get("uuid") or shared["cpu"]["model"]

    def key(of: str, head: str, **more: Any) -> str:
        found = identity | {"spec": of, "head": head} | more
        return record.cell_key(**found, machine=machine, torch=torch.__version__)

    sample = samples.get(side.name)
    tokens: dict[str, Any] | None = None
    latency: dict[str, Any] | None = None
    roofline: dict[str, Any] | None = None
    if sample is not None:
        work = plan.batch * (plan.prompt if phase == "prefill" else 1)
        gain = clock.ratio(samples[base.name], sample)
        versus = {"ratio": gain.median, "ci95": [gain.lo, gain.hi], "batch": plan.batch, "batch_fp16": plan.batch}
        rate = sample.rate(work).median
        tokens = {
            "tok_s_in" if phase == "prefill" else "tok_s": rate,
            "tok_s_per_card": rate,
            "vs_fp16": {"same_batch": versus | {"baseline_key": key(baseline, "16bit")}},
        }
        latency = {name: getattr(sample, name) * 1e6 for name in ("median", "lo", "hi", "iqr")}
        latency["samples"] = [t * 1e6 for t in sample.samples]
        roofline = _roofline(model, part, plan, sample, shared) if phase == "decode" else None
    return Record(
        cell_key=key(named, side.head, **kept),
        level="model",
        case=case,
        seconds=seconds,
        code=shared["code"],
        env=shared["env"],
        card=shared["card"],
        cpu=shared["cpu"],
        model={
            "id": config.name,
            "weights": "synthetic" if model.synthetic else "real",
            "layers_run": config.layers,
            "layers": load_config(model.source).layers,
        },
        shape=shape,
        scheme={
            "spec": named,
            "kv_spec": side.kv.name if side.kv.quantised else FLOATS[model.dtype],
            "kv_bits": side.kv.bits if side.kv.quantised else model.dtype.itemsize * 8,
            "weight_bits": spec.weight_bits if spec else model.dtype.itemsize * 8,
            "act_bits": spec.act_bits if spec else model.dtype.itemsize * 8,
            "group": spec.group if spec else None,
            "symmetric": spec.symmetric if spec else None,
            "head": side.head,
            "notes": list(model.notes),
        },
        body={
            "impl": model.kernel,
            "isa": model.isa,
            "dtype": FLOATS[model.dtype],
            "baseline_dtype": baseline,
            "baseline_probe": probes[BASELINE].words(phase),
            "same_fusions": model.same_fusions,
            "attention_body": model.attention(phase),
        },
        clock=shared["clock"] | {"drift": bool(sample and sample.drift)},
        latency_us=latency,
        tokens=tokens,
        roofline=roofline,
        memory={
            "weights": model.nbytes,
            "kv": part.kv_bytes or plan.batch * part.depth * model.kv_bytes_per_token,
            "kv_bytes_per_token": model.kv_bytes_per_token,
            "load_s": side.load_s,
        },
        quality=side.quality,
    )


def _roofline(
    model: Model, part: Part, plan: Plan, sample: clock.Sample, shared: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Bytes that one decode step reads at least, and its share of the read rate measured here."""
    depth = part.depth + plan.new / 2
    moved = model.step_bytes(plan.batch) + plan.batch * depth * model.kv_bytes_per_token
    roof = shared["cpu"].get("read_gbs") or shared["card"]["roof"]["copy_gbs"]
    return {"bytes": int(moved), "bound": "mem", "pct_of_roof": 100 * moved / sample.median / (roof * 1e9)}
