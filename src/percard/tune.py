"""`percard tune`: which Config each op takes on this card, measured when asked and never while serving."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .formats.affine import dequantize
from .kernels import device, dispatch, tuner, tuning
from .kernels.linear import ALSO, prepare, ways
from .kernels.shapes import LAYERS, Case, generator, weight
from .quant.progress import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType

MOST_MINUTES = 24 * 60.0
ROUTE_TOKENS = (1, 16, 256, 1024, 4096)  # where a layer may change its ops


@dataclass(frozen=True)
class Tuned:
    """What a run of `percard tune` came to; a line per problem."""

    card: str
    triton: str
    folder: Path
    lines: tuple[dict[str, Any], ...]
    seconds: float
    dry: bool = False

    @property
    def exit_code(self) -> int:
        """0 done, 1 a problem failed, 5 cut by --minutes."""
        states = {line["status"] for line in self.lines}
        return 1 if "failed" in states else 5 if "cut" in states else 0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "folder": str(self.folder), "lines": list(self.lines)}

    def show(self) -> list[RenderableType]:
        """A line per problem, then the sum and where the entries are."""
        told = [f"  {line['op']:16} {line['case']:40} {line['status']:7} {line['words']}" for line in self.lines]
        states = [line["status"] for line in self.lines]
        sums = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)) or "nothing to do"
        where = f"{'would go to' if self.dry else 'entries in'} {self.folder}"
        return [*told, f"{sums} on {self.card}, Triton {self.triton}; {where}"]


def tune(
    ops: Sequence[str] = (),
    *,
    model: str | None = None,
    minutes: float | None = None,
    out: str | Path | None = None,
    dry_run: bool = False,
    again: bool = False,
    progress: Callable[[Progress], None] | None = None,
    machine: tuner.Machine | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Measures the Configs of `ops` (all by default) for the layers of `model` (all by default) into folder `out`.

    `out` None is the user's folder (~/.cache/percard/tuned, or PERCARD_TUNED), which every later process reads. What has an
    entry for this card, Triton and op version is skipped unless `again`. `minutes` bounds the run; the rest is "cut" and
    a later call goes on there. Unsupported without a card, unless `dry_run`: that lists the work, for the H200 that the
    kernels are drawn for where there is no card. ValueError for an unknown op, FormatError for an unknown model.
    """
    if minutes is not None and not 0 < minutes <= MOST_MINUTES:
        raise ValueError(f"--minutes {minutes:g} is outside 0 .. {MOST_MINUTES:g}")
    folder = Path(out) if out is not None else tuning.user_folder()
    subjects = [tuner.subject(name) for name in (ops or tuner.names())]
    found = tuner.problems(subjects, model)
    if dry_run:
        return _listed(found, folder, again)
    machine = machine or tuner.CardMachine()
    began, lines = now(), []
    limit = None if minutes is None else 60 * minutes
    for number, outcome in enumerate(
        tuner.run(found, machine, folder, again=again, seconds=limit, seed=int(time.time()) & 0xFFFF, now=now), 1
    ):
        lines.append(_line(outcome.problem, outcome.status, outcome.words))
        measured = sum(line["status"] not in ("there", "cut") for line in lines)
        if progress is not None:
            each = (now() - began) / measured if measured else None
            left = None if each is None else each * (len(found) - number)
            label = f"{outcome.problem}: {outcome.words}"
            progress(Progress("tune", number, len(found), "layers", label, left))
    if not ops:
        left = None if limit is None else limit - (now() - began)
        lines += _routes(model, machine, folder, again, left, now)
    return Tuned(machine.card.name, machine.triton, folder, tuple(lines), now() - began)


def _routes(
    model: str | None,
    machine: tuner.Machine,
    folder: Path,
    again: bool,
    seconds: float | None,
    now: Callable[[], float],
) -> list[dict[str, Any]]:
    """Layers whose packed copy allows two routes: which ops to take at each M, into dispatch.json of the folder."""
    end = None if seconds is None else now() + seconds
    file, lines = folder / "dispatch.json", []
    there = [{k: e.get(k) for k in ("card", "triton", "spec", "n", "k", "m_bucket")} for e in tuning.read(file)]
    for spec in [f"w{bits}a{act}" for bits, act in ALSO]:
        for m in ROUTE_TOKENS:
            for n, k in sorted(
                {size for name, layers in LAYERS.items() if model in (None, name) for size in layers.values()}
            ):
                key = {
                    "card": machine.card.name,
                    "triton": tuning.release(machine.triton),
                    "spec": spec,
                    "n": n,
                    "k": k,
                }
                key["m_bucket"] = tuning.bucket(m)
                line = {"op": "route", "case": f"{spec} n{n} k{k} m{m}"}
                if key in there and not again:
                    lines.append({**line, "status": "there", "words": "measured before"})
                elif end is not None and now() >= end:
                    lines.append({**line, "status": "cut", "words": "no time was left"})
                elif (entry := _route(Case(line["case"], m, n, k, spec), machine)) is not None:
                    tuning.store(file, {**key, **entry})
                    words = ", ".join(f"{name} {us:.1f} us" for name, us in entry["us"].items())
                    lines.append({**line, "status": "tuned", "words": f"{entry['way']}: {words}"})
    return lines


@torch.inference_mode()
def _route(case: Case, machine: tuner.Machine) -> dict[str, Any] | None:
    """The faster route of one layer with bf16 beside it; None when its copy allows one route only."""
    random = generator(case, 0, machine.where.type)
    x = torch.randn(case.m, case.k, generator=random, device=machine.where).to(torch.bfloat16)
    plain = weight(case, random)
    held = prepare(plain, machine.where)
    if len(ways(x, held)) < 2:
        return None
    turns: dict[str, list[Any]] = {}
    for copy in tuner.copies(held, machine.card.l2_bytes):
        for name, call in ways(x, copy).items():
            turns.setdefault(name, []).append(call)
    floor = [
        functools.partial(torch.nn.functional.linear, x, each)
        for each in tuner.copies(dequantize(plain, torch.bfloat16), machine.card.l2_bytes)
    ]
    way, us, noise = tuner.best_way({**turns, tuner.FLOOR: floor}, machine)
    floor_us = us.pop(tuner.FLOOR)
    return {"way": way, "us": us, "floor_us": floor_us, "noise_pct": round(100 * noise, 2)}


def _listed(found: Sequence[tuner.Problem], folder: Path, again: bool) -> Tuned:
    card = device.card() if device.has_card() else device.H200
    triton = tuner.triton_version()
    lines = []
    for problem, wanted in tuner.plan(found, folder, card, triton, again):
        gpu = problem.subject.gpu
        now = dispatch.config_words(gpu, problem.shape, card, triton)
        words = f"{len(gpu.candidates(problem.shape, card))} candidates; now {now}"
        lines.append(_line(problem, "to do" if wanted else "there", words))
    name = card.name if device.has_card() else f"{card.name} (no card here: as it would be there)"
    return Tuned(name, triton, folder, tuple(lines), 0.0, dry=True)


def _line(problem: tuner.Problem, status: str, words: str) -> dict[str, Any]:
    return {"op": problem.subject.op.name, "case": problem.case.name, "status": status, "words": words}
