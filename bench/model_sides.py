"""The sides of `bench model`: which are asked for, their models in memory, and what says that they are good enough to time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..formats import compressed_tensors
from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError, QuantSpec
from ..kernels.self_test import FAILED
from . import contexts, quality, soundness
from .engine import Model, load, load_config
from .engine import kv as caches
from .engine.config import Config
from .fair import Plan
from .probe import FLOATS, PHASES, Probe, probe, settle
from .worker import Outcome, outcome_of

BASELINE, CHILD = "baseline", "child"
_SAMPLE = 2**16  # bytes at each end of a shard that name the weights


@dataclass(frozen=True)
class Wanted:
    """One line of the comparison before it is loaded. `kv` None = a cache of 16 bits.

    `twin`: the 16-bit head beside an int8 one, decode only. `more`: another cache beside the first one asked for; it prefills
    only where a bound on the first token wants it. `child`: 16-bit weights that are not the baseline's, of a smaller model.
    """

    name: str
    spec: QuantSpec | None
    head: str
    kv: str | None = None
    twin: bool = False
    more: bool = False
    child: bool = False

    @property
    def label(self) -> str:
        """Of its weights, the same in every run: the baseline's type of float may differ."""
        return str(self.spec) if self.spec else CHILD if self.child else "16-bit weights" if self.kv else BASELINE


@dataclass
class Side:
    """A Wanted in memory: its models by phase (they share weights), the baseline's also by batch, its quality section.

    `ended` says why there is nothing to time: it could not be loaded.
    """

    wanted: Wanted
    models: dict[str, Model] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    load_s: float | None = None
    at: dict[tuple[str, int], Model] = field(default_factory=dict)
    probes: dict[int, Probe] = field(default_factory=dict)
    ended: Outcome | None = None

    @property
    def name(self) -> str:
        return self.wanted.name

    @property
    def timed(self) -> bool:
        return self.ended is None and self.quality.get("gate") != "red"

    def model(self, phase: str, batch: int) -> Model:
        """What runs a phase at a batch."""
        return self.at.get((phase, batch), self.models[phase])


def sources(
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
        if against is None or Path(against).resolve() == Path(source).resolve():
            return source, specs, config
        if specs:
            raise FormatError(
                f"{source}: with --against it is a child as it is, so --specs has no meaning; quantise it and give that"
            )
        return against, [], config
    if specs:
        raise FormatError(f"{source}: is quantised already, so --specs has no meaning; give the 16-bit checkpoint")
    if against is None:
        raise FormatError(f"{source}: is quantised; name the 16-bit checkpoint it came from with --against")
    found = list(compressed_tensors.specs(opened.config, opened.names).values())
    return against, [max(set(found), key=found.count)], config


def weights_hash(source: str | Path) -> str | None:
    """Names the weights in a folder: config, sizes and both ends of each shard. None for synthetic ones."""
    if str(source).startswith("shape:"):
        return None
    found = hashlib.sha256((Path(source) / "config.json").read_bytes())
    for path in sorted(Path(source).glob("*.safetensors")):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            found.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            found.update(file.read(_SAMPLE))
    return found.hexdigest()


def wanted(
    specs: Sequence[QuantSpec], plan: Plan, config: Config, source: str | Path, child: bool = False
) -> list[Wanted]:
    """Baseline, then each variant over each cache, with the head asked for and, beside an int8 head, with the 16-bit one.

    child: `source` holds 16-bit weights of its own, which are held against another model's.
    """
    found = [Wanted(BASELINE, None, "16bit")]
    if child:
        caching = [(name, caches.of(name, config, str(source)).quantised, i) for i, name in enumerate(plan.kv)]
        return found + [
            Wanted(
                f"{CHILD}, {name} cache" if held else CHILD,
                None,
                "16bit",
                name if held else None,
                more=i > 0,
                child=True,
            )
            for name, held, i in caching
        ]
    both: list[QuantSpec | None] = [*specs]
    for spec in both or [None]:
        head = plan.head if spec else "16bit"
        for i, name in enumerate(plan.kv):
            kv = name if caches.of(name, config, str(source)).quantised else None
            called = str(spec) if spec else "16-bit weights"
            if spec is not None or kv is not None:  # else that is the baseline
                found.append(Wanted(f"{called}, {kv} cache" if kv else called, spec, head, kv, more=i > 0))
            if spec is not None and i == 0 and head == "int8-row":
                found.append(Wanted(f"{called} 16bit head", spec, "16bit", kv, twin=True))
    return found


def probes_of(
    config: Config, specs: Sequence[QuantSpec], plan: Plan, device: torch.device, impl: str | None, say: Callable
) -> dict[str, Probe]:
    """A probe of the baseline over all float dtypes, and of each spec over those of 16 bits: each runs in its fastest."""
    floats = list(FLOATS) if device.type == "cpu" else [config.dtype]
    options: dict[str, Any] = {"device": device, "prompt": plan.prompt, "batch": plan.ladder[0]}
    say(f"probing one layer in {', '.join(FLOATS[d] for d in floats)}")
    found = {BASELINE: probe(config, None, floats, **options)}
    floats = [dtype for dtype in floats if dtype.itemsize == 2] or floats  # fp32 embeddings would take what we save
    for spec in specs:
        say(f"probing one layer in {spec}")
        found[str(spec)] = probe(config, spec, floats, impl=impl, **options)
    return found


def settled(
    reference: str | Path, first: Probe, config: Config, layers: int, plan: Plan, device: torch.device, say: Callable
) -> dict[int, Probe]:
    """The baseline's probe by batch, of whole models (`layers` of it) where layers came near each other.

    Prompts are bound by products at every batch, so the first batch says their type; a step's type is asked at each.
    """
    say("timing the baseline in the float types that came near")
    whole: dict[str, Any] = {"layers": layers, "max_len": plan.prompt + 1, "device": device, "seed": plan.seed}

    def model(dtype: torch.dtype) -> Model:
        return load(reference, dtype=dtype, **whole)

    found: dict[int, Probe] = {}
    for batch in plan.ladder:
        seen = first
        if found and device.type == "cpu":
            steps: dict[str, Any] = {"prompt": plan.prompt, "batch": batch, "phases": ("decode",)}
            seen = probe(config, None, list(FLOATS), device=device, **steps)
        elif found:  # a card has one float type
            found[batch] = found[plan.ladder[0]]
            continue
        done = settle(seen, model, prompt=plan.prompt, batch=batch)
        prefill = done.seconds["prefill"] or found[plan.ladder[0]].seconds["prefill"]
        found[batch] = replace(done, seconds=done.seconds | {"prefill": prefill})
    return found


def load_sides(
    source: str | Path,
    reference: str | Path,
    asked: Sequence[Wanted],
    config: Config,
    plan: Plan,
    probes: Mapping[str, Probe],
    by_batch: Mapping[int, Probe],
    max_len: int,
    device: torch.device,
    impl: str | None,
    say: Callable,
) -> list[Side]:
    """The baseline and every side of `asked`, weights held once. A variant that cannot be loaded is a side that says why."""
    options: dict[str, Any] = {"max_len": max_len, "device": device, "seed": plan.seed}
    first = by_batch[plan.ladder[0]]

    def models(where: str | Path, spec: QuantSpec | None, found: Probe, lender: Model | None) -> dict[str, Model]:
        dtypes = {phase: found.fastest(phase) for phase in PHASES}
        layers = config.layers if str(where) == str(source) else layers_of(source, where, config)
        decode = load(
            where,
            spec=spec,
            dtype=dtypes["decode"],
            impl=impl if spec else None,
            share=lender,
            layers=layers,
            **options,
        )
        prefill = decode.with_dtype(dtypes["prefill"])
        # Single 16-bit rows (a variant's head too) go the way that was faster for the baseline.
        return {"prefill": prefill, "decode": replace(decode, mv=decode.dtype in first.mv)}

    say(f"loading {reference} in 16 bits, {layers_of(source, reference, config)} layers")
    begin = time.perf_counter()
    base = Side(asked[0], models(reference, None, first, None), probes=dict(by_batch))
    base.load_s = time.perf_counter() - begin
    for batch, seen in by_batch.items():
        known = {model.dtype: model for model in (*base.models.values(), *base.at.values())}
        dtype = seen.fastest("decode")
        again = known.get(dtype) or base.models["decode"].with_dtype(dtype)
        base.at["decode", batch] = replace(again, mv=dtype in seen.mv)
    sides, heads = [base], Heads()
    for spec, child in dict.fromkeys((side.spec, side.child) for side in asked[1:]):
        mine = [side for side in asked[1:] if (side.spec, side.child) == (spec, child)]
        begin = time.perf_counter()
        try:
            if child:
                say(f"loading {source} in 16 bits")
                held = models(source, None, first, None)
            elif spec is None:
                held = base.models
            else:
                say(f"loading {source} as {spec if source == reference else 'what it is'}")
                own = spec if source == reference else None
                held = models(source, own, probes[str(spec)], base.models["decode"])
            made = [Side(one, _over(heads.of(held, one.head), one.kv)) for one in mine]
        except (RuntimeError, NotImplementedError, MemoryError, FormatError) as error:
            say(f"{spec or CHILD}: not loaded ({error})")
            sides += [_ended(Side(one), error) for one in mine]
            continue
        for side in made:
            side.load_s = base.load_s if spec is None and not child else time.perf_counter() - begin
        sides += made
    return sides


def layers_of(source: str | Path, reference: str | Path, config: Config) -> int:
    """Blocks of the baseline that run. All of them where all of the child's do: it may have been pruned."""
    if str(reference) == str(source):
        return config.layers
    whole = load_config(reference).layers
    return whole if config.layers == load_config(source).layers else min(whole, config.layers)


def _ended(side: Side, error: Exception) -> Side:
    """A side with nothing to time; its gate is red when a kernel gave wrong numbers."""
    side.ended, side.quality = outcome_of(error), {}
    if FAILED in str(error):
        side.quality = {"gate": "red", "reasons": [f"{side.name}: a kernel {FAILED}"]}
    return side


class Heads:
    """int8 heads, made once for all sides that can share one."""

    def __init__(self) -> None:
        self._int8: Model | None = None

    def of(self, held: Mapping[str, Model], head: str) -> dict[str, Model]:
        """The models of both phases with that head."""
        if head != "int8-row":
            return dict(held)
        decode, known = held["decode"], self._int8
        if known is not None and known.synthetic and known.dtype == decode.dtype and known.seed == decode.seed:
            int8 = decode.with_head_of(known)
        else:
            int8 = decode.with_head("int8-row")
        self._int8 = int8
        return {"prefill": replace(int8, mv=False).with_dtype(held["prefill"].dtype), "decode": int8}


def _over(held: Mapping[str, Model], kv: str | None) -> dict[str, Model]:
    return {phase: model.with_kv(kv) if kv else model for phase, model in held.items()}


def judge(
    sides: Sequence[Side],
    reference: str | Path,
    text: str | Path | None,
    gates: Mapping[str, Mapping[str, Any]],
    batches: Sequence[int],
    say: Callable,
) -> None:
    """Fills the quality section of every side: measured on `text`, brought in `gates`, or synthetic; red where it is unsound.

    A variant that cannot run is a side that says why.
    """
    ids = None if text is None else quality.read_ids(text, reference, 16384)
    base = sides[0].models["decode"]
    for side in sides:
        if side.ended is not None:
            continue
        try:
            _judge(sides[0], side, ids, gates, say)
            wrong = [words for batch in batches for words in soundness.faults(base, side.model("decode", batch), batch)]
        except (RuntimeError, NotImplementedError, MemoryError) as error:
            if side is sides[0]:
                raise
            say(f"{side.name}: does not run ({error})")
            _ended(side, error)
            continue
        if wrong:
            reasons = [*dict.fromkeys(wrong), *(side.quality.get("reasons") or ())]
            side.quality |= {"gate": "red", "reasons": reasons}


def _judge(
    base: Side, side: Side, ids: torch.Tensor | None, gates: Mapping[str, Mapping[str, Any]], say: Callable
) -> None:
    """The quality section of one side."""
    reference, model, quantised = base.models["decode"], side.models["decode"], side.wanted.kv is not None
    weighed = side.wanted.spec is not None or quantised or side.wanted.child
    # A gate that was measured elsewhere was measured with a bf16 cache, unless it is named for another.
    kin = None if quantised else side.wanted.label
    brought = gates.get(side.name, gates.get(kin) if kin else None)
    if ids is not None and weighed:
        say(f"quality of {side.name} on {len(ids)} tokens")
        found, verdict = contexts.judged(reference, model, ids, min(reference.max_len, 2048))
        side.quality = quality.section(found, verdict, reference.config.name)
        base.quality = quality.reference_section(found, reference.config.name)
    elif brought is not None:
        side.quality = dict(brought)
    elif reference.synthetic and weighed:
        side.quality = {"gate": "synthetic", "reasons": ["speed at true shapes, quality not measured"]}
        side.quality |= {"model": None, "sqnr_db": model.weights.sqnr_db}
    elif not side.quality:
        side.quality = {"gate": "synthetic" if reference.synthetic else "none", "reasons": [], "model": None}


def needed(sides: Sequence[Wanted], names: Collection[str]) -> list[Wanted]:
    """The baseline and the sides of these names."""
    return [side for side in sides if side.name in names or side.name == BASELINE]
