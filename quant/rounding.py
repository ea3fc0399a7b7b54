"""Rounding many weights that read one input: their rows in equal shares on all cores, one factorisation for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..formats import affine
from ..formats.spec import FormatError, QuantSpec
from ..formats.tensor import QuantTensor
from .methods import METHODS
from .methods.records import Stats, signal_and_noise
from .recipe import Step
from .walk import Linear
from .workers import Workers, count

MOST_WEIGHTS = 1 << 23  # weights of one job: a job takes about eight fp32 copies of them


@dataclass(frozen=True, eq=False)
class Wanted:
    """A weight to round: `read` gives it, fp32 [N, K], already transformed; `bound` fp32 [N, groups] or None."""

    linear: Linear
    read: Callable[[], torch.Tensor]
    bound: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Done:
    """A rounded weight and what is known about it."""

    linear: Linear
    tensor: QuantTensor
    facts: dict[str, Any] = field(default_factory=dict)


Piece = tuple[int, int, int]  # which weight, first row, last row + 1


def jobs(rows: Iterable[int], columns: int, threads: int) -> list[list[Piece]]:
    """Row ranges of the weights, joined into jobs of about equal size; a weight may be cut."""
    sizes = list(rows)
    most = max(1, min(MOST_WEIGHTS // max(columns, 1), -(-sum(sizes) // threads)))
    found: list[list[Piece]] = []
    room = 0
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            if not room:
                found.append([])
                room = most
            stop = min(size, start + room)
            found[-1].append((index, start, stop))
            room -= stop - start
            start = stop
    return found


def round_all(
    step: Step,
    wanted: list[Wanted],
    stats: Stats | None,
    spec: QuantSpec,
    dtype: torch.dtype,
    shift: torch.Tensor | None = None,
) -> Iterator[Done]:
    """Rounds weights of one input K by the same statistics, in order. `dtype`: the model's. shift: Method.correct's."""
    method, options = METHODS[step.method], dict(step.options)
    prepared = None
    if method.prepare is not None:
        prepared = method.prepare(stats, **_known(method.prepare, options))
    parts = jobs([w.linear.shape[0] for w in wanted], wanted[0].linear.shape[1], count())
    given = {"scale_dtype": affine.scale_dtype_of(spec, dtype), **options}
    if method.prepare is not None:
        given["prepared"] = prepared

    def work(start: int, stop: int) -> list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None, dict]]:
        pieces = parts[start]
        weights = [wanted[i].read()[a:b] for i, a, b in pieces]
        bound = _stacked([wanted[i].bound for i, _, _ in pieces], pieces, spec.groups(weights[0].shape[1]))
        names = ", ".join(dict.fromkeys(wanted[i].linear.name for i, _, _ in pieces))
        if shift is not None and method.correct is not None:
            weights = [method.correct(weight, shift, prepared) for weight in weights]
        try:
            made = method.run(torch.cat(weights), stats, spec, bound=bound, **given)
        except FormatError as error:
            raise FormatError(f"{names}: {error}") from None
        found, at = [], 0
        for (i, a, b), weight in zip(pieces, weights, strict=True):
            here = slice(at, at + b - a)
            data, scale = made.tensor.data[here], made.tensor.scale[here]
            zero = None if made.tensor.zero is None else made.tensor.zero[here]
            facts = {k: v for k, v in made.facts.items() if k not in ("signal", "noise")}
            facts = {k: float(v[here].sum()) if isinstance(v, torch.Tensor) else v for k, v in facts.items()}
            facts |= signal_and_noise(weight, data, scale, zero, spec)
            found.append((i, data, scale, zero, facts))
            at += b - a
        return found

    held: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict]]] = {}
    following = 0
    with Workers() as workers:
        for found in workers.over(work, ((i, i + 1) for i in range(len(parts)))):
            for i, *rest in found:
                held.setdefault(i, []).append(tuple(rest))  # type: ignore[arg-type]
            while following < len(wanted) and _complete(held.get(following, []), wanted[following]):
                yield _joined(wanted[following].linear, held.pop(following), spec)
                following += 1


def _stacked(bounds: list[torch.Tensor | None], pieces: list[Piece], groups: int) -> torch.Tensor | None:
    """The bounds of a job's rows; rows without one may be as large as they are. None = no row has one."""
    if all(b is None for b in bounds):
        return None
    free = (torch.full((stop - start, groups), torch.inf) for _, start, stop in pieces)
    rows = zip(bounds, free, pieces, strict=True)
    return torch.cat([none if b is None else b[start:stop] for b, none, (_, start, stop) in rows])


def _complete(pieces: list[Any], wanted: Wanted) -> bool:
    return sum(p[0].shape[0] for p in pieces) == wanted.linear.shape[0]


def _joined(linear: Linear, pieces: list[Any], spec: QuantSpec) -> Done:
    """One weight from its pieces; facts that are sums are added, others taken from the first piece."""
    data, scale = (torch.cat([p[k] for p in pieces]) for k in (0, 1))
    zero = None if pieces[0][2] is None else torch.cat([p[2] for p in pieces])
    facts: dict[str, Any] = dict(pieces[0][3])
    for key in ("signal", "noise", "loss"):
        if key in facts:
            facts[key] = sum(p[3][key] for p in pieces)
    return Done(linear, QuantTensor(data, scale, zero, spec, "plain", linear.shape), facts)


def _known(call: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that `call` takes."""
    names = inspect.signature(call).parameters
    return {k: v for k, v in options.items() if k in names}
