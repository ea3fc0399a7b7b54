"""After a red gate: more bits for the layers that lose most, as few bytes as will do.

    rank      every fused set ({q,k,v}, {o}, {gate,up}, {down}, a layer's experts) by how much noise its block loses when
              the set alone stands at 16 bits, per byte that its next rung adds
    rungs     3 and 4 bits -> w8a16-g128 (w8a16 where that group does not divide) -> 16 bits; int8 activations -> 16 bits
    stop      when the gate is predicted green, or `max_extra` of the file is spent

The prediction takes noise of blocks to add up and KL to be in proportion to it; a second look at the written file, and up
to three rounds, make up for what it misses. Promoted weights are rounded to nearest from the (transformed) source; all
else is copied from the red checkpoint byte by byte.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..formats import accepts, affine, compressed_tensors
from ..formats.checkpoint import INDEX, Writer
from ..formats.header import nbytes_of
from ..formats.spec import FormatError, QuantSpec
from ..formats.tensor import QuantTensor
from . import engines, fidelity, heldout, output, report, transforms, verify, walk
from .fidelity import Fall
from .methods import rtn
from .pair import Pair
from .progress import Callback, Meter
from .recipe import Serve
from .report import Gate, Module, Promotion, Report
from .walk import HEAD, Assignment, Linear

ROUNDS = 3
SURE = 0.9  # of a limit is aimed at, so that a prediction that is a little off does not cost a round
SIXTEEN = "16 bit"
_WORK = ".percard-promoted"  # folder inside of the red checkpoint where the next one is written


@dataclass(frozen=True)
class Rung:
    """What a set may become (None = 16 bits), bytes of the whole set then, share of its fall that is gained by then."""

    spec: QuantSpec | None
    bytes: int
    gain: float


@dataclass(frozen=True)
class Choice:
    """A fused set: what its block's noise would lose at 16 bits, and its rungs; the first is where it stands (gain 0)."""

    together: str
    modules: tuple[str, ...]
    fall: float
    rungs: tuple[Rung, ...]


@dataclass(frozen=True)
class Plan:
    """`changes`: module -> new spec, None = 16 bits. `steps`: set -> (before, after). share: noise that is left of all."""

    changes: dict[str, QuantSpec | None]
    steps: dict[str, tuple[Choice, Rung]]
    share: float
    bytes: int


def plan(choices: Sequence[Choice], noise: float, gate: Gate, extra: int) -> Plan:
    """Climbs, each time the rung with the most gain per byte, until `gate` is predicted to pass or `extra` bytes are spent.

    noise: of all blocks together, as it is. Pure: no file, no model.
    """
    at = dict.fromkeys((c.together for c in choices), 0)
    by_name = {c.together: c for c in choices}
    spent, gained = 0, 0.0

    def share() -> float:
        return max(0.0, 1 - gained / noise) if noise > 0 else 0.0

    while not predicted(gate, share()):
        best, value = None, 0.0
        for choice in choices:
            for next_at in range(at[choice.together] + 1, len(choice.rungs)):
                here, there = choice.rungs[at[choice.together]], choice.rungs[next_at]
                cost, gain = there.bytes - here.bytes, choice.fall * (there.gain - here.gain)
                if spent + cost <= extra and gain > 0 and gain / max(cost, 1) > value:
                    best, value = (choice.together, next_at, cost, gain), gain / max(cost, 1)
        if best is None:
            break
        name, at[name], cost, gain = best
        spent, gained = spent + cost, gained + gain
    steps = {name: (by_name[name], by_name[name].rungs[i]) for name, i in at.items() if i}
    changes = {module: rung.spec for choice, rung in steps.values() for module in choice.modules}
    return Plan(changes, steps, share(), spent)


def predicted(gate: Gate, share: float) -> bool:
    """Whether the gate would pass with `share` of the noise: KL and the rise of perplexity follow it, disagreement its
    square root (it counts how often noise is larger than the distance of the two likeliest tokens)."""
    limits = gate.limits
    good = gate.kl * share <= SURE * limits["kl"] and (1 - gate.top1) * math.sqrt(share) <= SURE * (1 - limits["top1"])
    return good and ("perplexity" not in limits or gate.rise * share <= SURE * limits["perplexity"])


def choices(pair: Pair, falls: Iterable[Fall], serve: Serve | None = None) -> list[Choice]:
    """The rungs of every fused set that was tried, as far as the engine of `serve` loads them."""
    serve = serve or Serve()
    linears = {x.name: x for x in pair.linears}
    out = []
    for fall in falls:
        members = [linears[name] for name in fall.modules]
        spec = pair.specs[members[0].name]
        specs = [spec, *(s for s in _above(spec, members) if _loads(s, members, pair, serve))]
        rungs = tuple(Rung(s, _size(members, s, pair), _gain(spec, s)) for s in specs)
        rungs = rungs[:1] + tuple(r for r in rungs[1:] if r.bytes > rungs[0].bytes)
        out.append(Choice(fall.together, fall.modules, max(0.0, fall.now - fall.then), rungs))
    return out


def _above(spec: QuantSpec, members: Sequence[Linear]) -> list[QuantSpec | None]:
    """The rungs above a spec."""
    if spec.act_bits == 8 or spec.weight_bits == 8:
        return [None]
    divides = all(x.shape[1] % 128 == 0 for x in members)
    return [QuantSpec(8, 16, 128 if divides else None), None]


def _gain(now: QuantSpec, then: QuantSpec | None) -> float:
    """Share of a fall to 16 bits: each bit halves the error, a quarter of the noise stays."""
    if now == then:
        return 0.0
    return 1.0 if then is None else 1 - 4.0 ** (now.weight_bits - then.weight_bits)


def _loads(spec: QuantSpec | None, members: Sequence[Linear], pair: Pair, serve: Serve) -> bool:
    """Whether the engine that the recipe names is known to load `spec` here, on its card and over its split."""
    if spec is None:
        return True
    kind = "experts" if ".experts." in members[0].name else "dense"
    if serve.engine is not None:
        engine, _, version = serve.engine.partition("==")
        row = accepts.lookup(engine, version, spec, kind)
        if (
            row is None
            or row.verdict == "differs"
            or engines.refusals([{**vars(row), "version": version, "spec": spec}], serve.sm)
        ):
            return False
    if serve.tp > 1:
        assignment = Assignment({x.name: spec for x in members}, {})
        return not engines.splits(pair.source.config, pair.found, assignment, serve.tp)
    return True


def _size(members: Iterable[Linear], spec: QuantSpec | None, pair: Pair) -> int:
    if spec is None:
        return sum(pair.source.info(x.tensor).nbytes for x in members)
    parts = [compressed_tensors.plan(x.shape, spec, pair.found.dtype) for x in members]
    return sum(nbytes_of(kind, shape) for part in parts for kind, shape in part.values())


def rewrite(
    red: str | os.PathLike[str],
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    changes: Mapping[str, QuantSpec | None],
    *,
    said: Report | None = None,
    progress: Callback | None = None,
) -> dict[str, Module | None]:
    """Writes the checkpoint `red` again as `out` with other specs for the modules in `changes` (None = 16 bits).

    Weights of `changes` come from the source, after the transforms; every other tensor is copied byte by byte. What became
    of each changed module comes back, None = it is not quantised any more. FormatError where engines fuse unlike specs.
    """
    pair = Pair.open(red, src, said)
    unknown = sorted(set(changes) - set(pair.specs))
    if unknown:
        raise FormatError(f"{pair.made.path}: {unknown[0]} is not quantised there, so it cannot get more bits")
    specs = {name: changes.get(name, spec) for name, spec in pair.specs.items()}
    kept = {name: spec for name, spec in specs.items() if spec is not None}
    ignored = sorted({*pair.made.config["quantization_config"].get("ignore", []), *(set(specs) - set(kept))})
    section = compressed_tensors.config(kept, ignored)
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, info in pair.source.tensors.items():
        module, _, leaf = name.rpartition(".")
        spec = kept.get(module) if leaf == "weight" else None
        if spec is None:
            tensors[name] = (info.dtype, tuple(info.shape))
        else:
            parts = compressed_tensors.plan((info.shape[0], info.shape[1]), spec, pair.found.dtype)
            tensors |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
    if pair.untied:
        tensors[HEAD] = (pair.made.info(HEAD).dtype, tuple(pair.made.info(HEAD).shape))
    linears = {x.tensor: x for x in pair.linears}
    meter = Meter("promote", sum(nbytes_of(kind, shape) for kind, shape in tensors.values()), progress)
    done: dict[str, Module | None] = {}
    with Writer(Path(out), tensors) as writer:
        for name in [*pair.source.names, *([HEAD] if pair.untied else [])]:
            linear = linears.get(name)
            if linear is None or linear.name not in changes:
                same = [name] if linear is None else [f"{linear.name}.{s}" for s in _suffixes(linear, pair)]
                for part in same:
                    writer.add_raw(part, pair.made.raw(part))
                    meter.add(pair.made.info(part).nbytes, part)
                continue
            pieces, done[linear.name] = _rounded(linear, changes[linear.name], pair)
            for suffix, piece in pieces.items():
                writer.add(f"{linear.name}.{suffix}", piece)
                meter.add(piece.nbytes, linear.name)
        writer.copy_side_files(_Sides(pair))
        config = {k: v for k, v in pair.made.config.items() if k != "quantization_config"}
        writer.finish({**config, "quantization_config": section})
    return done


class _Sides:
    """The side files that a rewritten checkpoint takes along: the source's, and the scales of the transforms."""

    def __init__(self, pair: Pair) -> None:
        names = {p.relative_to(pair.source.path) for p in pair.source.side_files} - {Path(report.REPORT_NAME)}
        names.add(Path(transforms.FILE))
        self.path = pair.made.path
        self.side_files = [p for p in pair.made.side_files if p.relative_to(self.path) in names]


def _suffixes(linear: Linear, pair: Pair) -> Iterable[str]:
    return compressed_tensors.plan(linear.shape, pair.specs[linear.name], pair.found.dtype)


def _rounded(linear: Linear, spec: QuantSpec | None, pair: Pair) -> tuple[dict[str, torch.Tensor], Module | None]:
    """The tensors of a promoted weight, and what the report says about it."""
    if spec is None:
        return {"weight": pair.stored(linear.tensor)}, None
    weight = pair.expected(linear.tensor)
    kind = affine.scale_dtype_of(spec, pair.found.dtype)
    parts: list[QuantTensor] = []
    signal = noise = 0.0
    for start, stop in walk.row_ranges(linear.shape):
        rounded = rtn.rtn(weight[start:stop].float(), None, spec, scale_dtype=kind)
        parts.append(rounded.tensor)
        signal, noise = signal + rounded.facts["signal"], noise + rounded.facts["noise"]
    whole = QuantTensor(
        torch.cat([p.data for p in parts]), torch.cat([p.scale for p in parts]), None, spec, "plain", linear.shape
    )
    pieces = compressed_tensors.write(whole, pair.found.dtype)
    size = sum(t.nbytes for t in pieces.values())
    before = pair.source.info(linear.tensor).nbytes
    facts = {"promoted_from": str(pair.specs[linear.name])}
    return pieces, Module(linear.name, str(spec), "rtn", linear.shape, report.sqnr(signal, noise), before, size, facts)


def until_green(
    folder: Path,
    src: Path,
    done: Report,
    text: heldout.HeldOut,
    *,
    max_extra: float = 0.05,
    serve: Serve | None = None,
    work: Path | None = None,
    progress: Callback | None = None,
) -> tuple[Report, Path]:
    """Promotes the checkpoint in `folder` until its gate is green, at most ROUNDS times: (its report, where it lies).

    done: the report of `folder` after a check at level model. What comes out lies in a hidden folder inside of `folder`
    (`replace` puts it in its place), or is `folder` itself when nothing was promoted. What cannot be made green is as good
    as it became, its report red.
    """
    at, budget = folder, int(max_extra * done.bytes["output"])
    for left in folder.glob(f"{_WORK}-*"):  # by a run that was killed
        output.discard(left)
    for number in range(1, ROUNDS + 1):
        if done.gate is None or done.gate.gate != "red" or done.failures:
            break
        pair = Pair.open(at, src, done)
        found = fidelity.measure(pair, text.pieces, level="blocks", falls=True, work=work, progress=progress)
        noise = sum(layer.noise or 0.0 for layer in found.layers)
        made = plan(choices(pair, found.falls, serve), noise, done.gate, budget)
        if not made.changes:
            note = (
                f"the gate is red, and no promotion fits into what is left of max_extra ({max_extra:.0%} of the file)"
            )
            return dataclasses.replace(done, warnings=(*done.warnings, note)), at
        budget -= made.bytes
        new = folder / f"{_WORK}-{number}"
        try:
            modules = rewrite(at, src, new, made.changes, said=done, progress=progress)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            note = f"the gate is red, and promotion found no room on the disk ({report.human(pair.made.nbytes)} are needed)"
            return dataclasses.replace(done, warnings=(*done.warnings, note)), at
        steps = tuple(_step(number, choice, rung, noise) for choice, rung in made.steps.values())
        better = _checked(new, src, _renewed(done, modules, steps), text, work, progress)
        if better.gate is not None and not better.gate.kl <= done.gate.kl:
            output.discard(new)
            note = f"round {number} of promotion made the model no better ({better.gate.show()}); it was dropped"
            return dataclasses.replace(done, warnings=(*done.warnings, note)), at
        if at != folder:
            output.discard(at)
        done, at = better, new
    return done, at


def _step(number: int, choice: Choice, rung: Rung, noise: float) -> Promotion:
    first = choice.rungs[0]
    share = choice.fall / noise if noise else 0.0
    return Promotion(
        number, choice.modules, str(first.spec), str(rung.spec or SIXTEEN), rung.bytes - first.bytes, share
    )


def _checked(
    folder: Path, src: Path, done: Report, text: heldout.HeldOut, work: Path | None, progress: Callback | None
) -> Report:
    """`done` with what a look at the rewritten files and at the model says."""
    checked = verify.verify(folder, src, level="weights", said=done, progress=progress)
    if checked.failures:
        raise RuntimeError(f"{folder}: the checkpoint read back is not what was written: {checked.failures[0]}")
    pair = Pair.open(folder, src, done)
    again = verify.compared(pair, dataclasses.replace(checked, level="model"), text, work=work, progress=progress)
    ours = tuple(f for f in done.flags if f.startswith(f"{text.name}:"))
    return verify.merged(dataclasses.replace(done, flags=ours), dataclasses.replace(again, warnings=()))


def _renewed(done: Report, modules: Mapping[str, Module | None], steps: tuple[Promotion, ...]) -> Report:
    """The report after a promotion: changed modules replaced, those at 16 bits left out and named in `kept`."""
    listed = (modules.get(m.name, m) for m in done.modules)
    gone = {name: "promoted to 16 bits after a red gate" for name, module in modules.items() if module is None}
    return dataclasses.replace(
        done,
        modules=tuple(m for m in listed if m is not None),
        kept={**done.kept, **gone},
        promotions=(*done.promotions, *steps),
    )


def replace(folder: Path, new: Path) -> None:
    """Puts the checkpoint `new`, which lies inside of `folder`, in the place of the one in `folder`.

    config.json goes first and comes last: killed in between, the folder looks like no model.
    """
    (folder / "config.json").unlink(missing_ok=True)
    for old in [*folder.glob("*.safetensors"), folder / INDEX]:
        old.unlink(missing_ok=True)
    files = [p.relative_to(new) for p in new.rglob("*") if p.is_file()]
    for name in sorted(files, key=lambda p: (p.name == "config.json", str(p))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).replace(folder / name)
    output.discard(new)
    output.sync(folder)
