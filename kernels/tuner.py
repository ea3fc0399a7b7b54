"""`percard tune`: measures which Config an op should take for real layers on the card that is there.

    problem     one layer and bucket of M of the op's cases.py, its largest M
    candidates  gpu.candidates(shape, card), beside the heuristic's Config: pure, at most 24
    gates       compiled (no spill, shared memory that the card has), then compared with the reference
    times       CUDA graphs on copies that leave the L2 cold, in turn; the three best then again, longer, beside the heuristic
                timed twice, whose difference from itself is the noise
    entry       the winner if it is better than the heuristic by more than noise, else the heuristic; written at once

Names no op: it is handed one (`subject(name)` loads a folder). An entry that is there is not measured again.
"""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from ..formats.affine import dequantize
from ..formats.spec import FormatError, QuantSpec
from ..formats.tensor import QuantTensor
from . import conformance, device, inspection, tuning
from .device import Card
from .inspection import triton_version
from .op import Op, Unsupported
from .shapes import Case

__all__ = ["Problem", "Subject", "plan", "problems", "run", "subject", "triton_version"]

FIRST_ROUNDS, FINAL_ROUNDS, FINALISTS = 3, 9, 3
WORTH = (1, 16, 256, 64, 4, 1024, 4096, 512, 16384)  # M in the order in which their figures decide something
BASE, AGAIN, FLOOR = "heuristic", "heuristic again", "torch bfloat16"
WHY_CARD = "needs a CUDA card; run it on the machine that will serve, or list what it would do with --dry-run"


@dataclass(frozen=True)
class Subject:
    """An op with a Triton body, and the modules of its folder."""

    op: Op
    gpu: ModuleType
    cases: ModuleType

    @property
    def version(self) -> int:
        """OP_VERSION of gpu.py: entries of another version do not hold."""
        return self.gpu.OP_VERSION

    @property
    def packaged(self) -> Path:
        return Path(self.gpu.__file__ or "").with_name("tuned.json")

    @property
    def names(self) -> Sequence[str]:
        """Fields of the op's shape, M first."""
        return getattr(self.gpu, "Shape", tuning.Shape)._fields

    def shape(self, case: Case) -> Any:
        """The problem of a case as the heuristic sees it; an op with more sizes says so itself (gpu.shape_of)."""
        if hasattr(self.gpu, "shape_of"):
            return self.gpu.shape_of(case)
        group = (QuantSpec.parse(case.spec).group if case.spec else None) or case.k
        return tuning.Shape(case.m, case.n, case.k, group, case.dtype)


@dataclass(frozen=True)
class Problem:
    """A case of an op at the largest M of its bucket."""

    subject: Subject
    case: Case
    shape: Any

    def __str__(self) -> str:
        return f"{self.subject.op.name} {self.case.name}"

    def key(self, card: Card, triton: str) -> dict[str, Any]:
        """What an entry holds for."""
        sizes = zip(self.subject.names[1:], self.shape[1:], strict=True)
        return {
            "card": card.name,
            "triton": tuning.release(triton),
            "op_version": self.subject.version,
            "m_bucket": tuning.bucket(self.shape.m),
            **{name: tuning.plain(value) for name, value in sizes},
        }


class Machine(Protocol):
    """What the tuner needs of a machine; tests hand in one with a fake clock."""

    card: Card
    triton: str
    where: torch.device

    def refuses(self, launches: Sequence[Any]) -> str | None:
        """None, or why kernels should not be started: spills, too much shared memory, no compilation."""
        ...

    def time(self, turns: tuning.Turns, rounds: int) -> dict[str, list[float]]:
        """Seconds per call by name and round, in turn."""
        ...


class CardMachine:
    """The CUDA device that is there. Unsupported when there is none."""

    def __init__(self, index: int = 0):
        if not device.has_card():
            raise Unsupported(WHY_CARD)
        self.card, self.where = device.card(index), torch.device("cuda", index)
        self.triton, self.refuses = triton_version(), functools.partial(inspection.refuses, self.card)
        self.time = tuning.CardClock(self.where)


@dataclass(frozen=True)
class Outcome:
    """What became of a problem: "tuned" (another Config won), "kept" (the heuristic), "there" (an entry was there),
    "cut" (no time was left), "failed" (not even the heuristic's Config works here)."""

    problem: Problem
    status: str
    words: str
    entry: dict[str, Any] | None = None


def subject(name: str) -> Subject:
    """The op of that name; ValueError lists those that can be tuned."""
    if name not in names():
        raise ValueError(f"no op {name!r} that can be tuned; known: {', '.join(names())}")
    package = importlib.import_module(f".{name}", __package__)
    gpu, cases = (importlib.import_module(f".{name}.{part}", __package__) for part in ("gpu", "cases"))
    return Subject(getattr(package, name), gpu, cases)


def names() -> list[str]:
    """The ops with a Triton body that lists candidates."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*/gpu.py")):
        if "def candidates(" in path.read_text(encoding="utf-8"):
            found.append(path.parent.name)
    return found


def problems(which: Iterable[Subject], model: str | None = None) -> list[Problem]:
    """Real cases, one per layer and bucket, by worth: M as in WORTH, then the largest layers. FormatError for a model
    that no op has cases of."""
    subjects = list(which)
    found: dict[tuple, Problem] = {}
    for each in subjects:
        for case in each.cases.CASES:
            if not case.real or (model is not None and not case.name.startswith(f"{model}.")):
                continue
            shape = tuning.in_bucket(each.shape(case))
            top = replace(case, m=shape.m)
            found.setdefault((each.op.name, shape), Problem(each, top, shape))
    if model is not None and not found:
        known = sorted({case.name.split(".")[0] for each in subjects for case in each.cases.CASES if case.real})
        raise FormatError(f"no cases for model {model!r}; known: {', '.join(known)}")
    places = {m: place for place, m in enumerate(WORTH)}
    size = lambda p: (places.get(p.shape.m, len(WORTH)), -max(p.case.n, 1) * p.case.k, p.subject.op.name)  # noqa: E731
    return sorted(found.values(), key=size)


def plan(
    found: Sequence[Problem], out: Path, card: Card, triton: str, again: bool = False
) -> list[tuple[Problem, bool]]:
    """(problem, is to be measured): those with an entry for this card, Triton and op version are not, unless `again`."""
    there: dict[Path, list[dict[str, Any]]] = {}
    for problem in found:
        path = file_of(problem.subject, out)
        there.setdefault(path, tuning.read(path))

    def held(problem: Problem) -> bool:
        key = problem.key(card, triton)
        return any(key == {name: e.get(name) for name in key} for e in there[file_of(problem.subject, out)])

    return [(problem, again or not held(problem)) for problem in found]


def file_of(which: Subject, out: Path) -> Path:
    """The file of an op in a folder of tuned files."""
    return out / f"{which.op.name}.json"


def run(
    found: Sequence[Problem],
    machine: Machine,
    out: Path,
    *,
    again: bool = False,
    seconds: float | None = None,
    seed: int = 0,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[Outcome]:
    """Measures problems in order, an outcome each as it comes; entries are in the files of `out` before it is told.

    After `seconds` nothing new is begun: what is left is "cut".
    """
    end = None if seconds is None else now() + seconds
    longest = 0.0
    for problem, wanted in plan(found, out, machine.card, machine.triton, again):
        if not wanted:
            yield Outcome(problem, "there", "measured before")
            continue
        if end is not None and now() + longest >= end:
            yield Outcome(problem, "cut", "no time was left")
            continue
        began = now()
        try:
            outcome = measure(problem, machine, seed)
        except torch.OutOfMemoryError as error:
            outcome = Outcome(problem, "failed", f"out of memory: {' '.join(str(error).split())[:200]}")
        longest = max(longest, now() - began)
        if outcome.entry is not None:
            tuning.store(file_of(problem.subject, out), outcome.entry)
        yield outcome


@torch.inference_mode()
def measure(problem: Problem, machine: Machine, seed: int = 0) -> Outcome:
    """Gates and times the candidates of one problem."""
    which, card = problem.subject, machine.card
    op, gpu = which.op, which.gpu
    base = gpu.heuristic(problem.shape, card)
    others = [c for c in gpu.candidates(problem.shape, card) if c != base][: tuning.MOST_CANDIDATES]
    args = which.cases.inputs(problem.case, seed, machine.where.type)
    expected = conformance.expectation(op, args)
    copies = _copies(conformance.packed(op, "triton", args), card.l2_bytes)
    flats = [op.contract.unwrap(*each) for each in copies]
    rejected: dict[str, str] = {}
    passed: dict[str, Any] = {}
    for name, config in {BASE: base, **{f"{i}": c for i, c in enumerate(others)}}.items():
        why = _fault(problem, machine, copies[0], flats[0], config, expected)
        if why is None:
            passed[name] = config
        else:
            rejected[name] = why
    if BASE in rejected:
        return Outcome(problem, "failed", f"the heuristic's own Config fails: {rejected[BASE]}")

    def turn(config: Any) -> list[Callable[[], Any]]:
        return [functools.partial(gpu.run, *flat, card=card, config=config) for flat in flats]

    first = machine.time({name: turn(config) for name, config in passed.items()}, FIRST_ROUNDS)
    best = sorted((n for n in passed if n != BASE), key=lambda n: statistics.median(first[n]))[:FINALISTS]
    final: dict[str, Sequence[Callable[[], Any]]] = {n: turn(passed[n]) for n in (BASE, *best)}
    final[AGAIN] = turn(base)
    floor = _floor(args, card)
    if floor:
        final[FLOOR] = floor
    times = machine.time(final, FINAL_ROUNDS)
    winner, noise = BASE, 0.0
    for name in best:
        won, _, noise = tuning.faster(times[BASE], times[AGAIN], times[name])
        if won and statistics.median(times[name]) < statistics.median(times[winner]):
            winner = name
    us = {name: round(statistics.median(taken) * 1e6, 3) for name, taken in times.items()}
    entry = problem.key(card, machine.triton) | {
        "config": asdict(passed[winner]),
        "us": us[winner],
        "heuristic_us": us[BASE],
        "floor_us": us.get(FLOOR),
        "noise_pct": round(100 * noise, 2),
        "candidates": len(others),
        "rejected": len(rejected),
    }
    words = f"{us[winner]:.1f} us" + (f", heuristic {us[BASE]:.1f}" if winner != BASE else ", the heuristic's")
    words += f", bf16 {us[FLOOR]:.1f}" if floor else ""
    return Outcome(problem, "kept" if winner == BASE else "tuned", words, entry)


def best_way(ways: Mapping[str, Sequence[Callable[[], Any]]], machine: Machine) -> tuple[str, dict[str, float], float]:
    """(the way to take, microseconds by name, noise) of calls that mean the same product, the standing way first.

    It stays unless another is faster by more than noise. FLOOR among the names is timed and never taken.
    """
    first, *others = [name for name in ways if name != FLOOR]
    times = machine.time({**ways, AGAIN: ways[first]}, FINAL_ROUNDS)
    way, noise = first, 0.0
    for name in others:
        won, _, noise = tuning.faster(times[first], times[AGAIN], times[name])
        if won and statistics.median(times[name]) < statistics.median(times[way]):
            way = name
    us = {name: round(statistics.median(taken) * 1e6, 3) for name, taken in times.items() if name != AGAIN}
    return way, us, noise


def copies(value: Any, l2_bytes: int) -> list[Any]:
    """A weight and as many clones of it as leave the cache cold."""
    return [each[0] for each in _copies((value,), l2_bytes)]


def _fault(
    problem: Problem,
    machine: Machine,
    args: tuple[Any, ...],
    flat: tuple[Any, ...],
    config: Any,
    expected: conformance.Expectation,
) -> str | None:
    """None, or why a Config is not timed. `args` are packed, and `flat` is the same."""
    gpu, op = problem.subject.gpu, problem.subject.op
    try:
        why = machine.refuses(gpu.plan(machine.card, *flat, config=config)[1])
        if why is not None:
            return why
        found = conformance.faults(
            op, "triton", args, lambda *each: gpu.run(*each, card=machine.card, config=config), expected
        )
    except (ValueError, NotImplementedError) as error:  # plan refuses what the kernel cannot run
        return str(error)
    return "; ".join(found) or None


def _copies(args: tuple[Any, ...], l2_bytes: int) -> list[tuple[Any, ...]]:
    """The arguments with as many copies of the weight as leave the cache cold; of all tensors where there is no weight."""
    weights = [a for a in args if not isinstance(a, torch.Tensor) and hasattr(a, "nbytes")]
    turned: list[Any] = weights or [a for a in args if isinstance(a, torch.Tensor)]
    count = tuning.copies_for_cold_cache(sum(a.nbytes for a in turned), l2_bytes)
    ids = {id(a) for a in turned}
    return [args] + [tuple(_clone(a) if id(a) in ids else a for a in args) for _ in range(count - 1)]


def _clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    zero = None if value.zero is None else value.zero.clone()
    return replace(value, data=value.data.clone(), scale=value.scale.clone(), zero=zero)


def _floor(args: tuple[Any, ...], card: Card) -> list[Callable[[], Any]]:
    """torch's bf16 product of the same sizes, on copies: what a quantised layer must not fall far below."""
    weight = next((a for a in args if isinstance(a, QuantTensor)), None)
    x = args[0]
    if weight is None or not isinstance(x, torch.Tensor) or x.ndim != 2:
        return []
    dense = dequantize(weight, torch.bfloat16)
    rows = torch.randn(x.shape, device=x.device).to(torch.bfloat16)
    count = tuning.copies_for_cold_cache(dense.nbytes, card.l2_bytes)
    copies = [dense, *(dense.clone() for _ in range(count - 1))]
    return [functools.partial(torch.nn.functional.linear, rows, each) for each in copies]


def counts(outcomes: Iterable[Outcome]) -> Mapping[str, int]:
    """How many problems ended how."""
    found: dict[str, int] = {}
    for outcome in outcomes:
        found[outcome.status] = found.get(outcome.status, 0) + 1
    return found
