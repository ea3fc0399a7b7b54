"""`percard tune`: which Config each op takes on this card, measured when asked and never while serving."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .kernels import device, dispatch, tuner, tuning
from .quant.progress import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType

MOST_MINUTES = 24 * 60.0


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
    return Tuned(machine.card.name, machine.triton, folder, tuple(lines), now() - began)


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
