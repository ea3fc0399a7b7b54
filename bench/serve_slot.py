"""Requests in waves as cells of a slot: a few seconds of a card, in 16 bits and in each spec, over two caches."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from . import ops
from .cells import in_words
from .load import mix_of
from .ratios import Bound
from .serve import Plan, Session
from .serve_rows import about
from .serve_speed import Speed
from .stage import Cell

SPECS = (None, "w4a16-g128", "w8a8")
_SHARED = (
    "cell_key",
    "run_id",
    "ts",
    "schema",
    "code",
    "env",
    "cpu",
    "card",
    "seconds",
    "source",
)  # the slot fills these


def asked(device: str) -> dict[str, Any]:
    """What a slot serves: eight layers of Qwen3-8B on a card, on a CPU enough to try the run."""
    if device == "cuda":
        return {
            "source": "shape:qwen3-8b",
            "layers": 8,
            "requests": 64,
            "concurrency": [4, 64],
            "scale": 0.5,
            "rounds": 3,
        }
    return {"source": "shape:qwen3-0.6b", "layers": 1, "requests": 2, "concurrency": [2], "scale": 0.02, "rounds": 2}


def cells(device: str) -> list[Cell]:
    """A cell for each spec; a CPU tries one besides 16 bits."""
    given, code = asked(device), {"op_source_hash": ops.source_hash(*ops.OPS)}
    found = []
    for spec in SPECS if device == "cuda" else (None, "w8a8"):
        arguments = {**given, "spec": spec, "device": device}
        row = {**about(_session(json.dumps(given), device), None, "bf16", given["concurrency"][-1]), "code": code}
        row["scheme"] = {"spec": spec or "bf16"}
        name = f"{row['model']['id']} served {spec or 'bf16'}"
        identity = {"task": "serve", **{k: v for k, v in arguments.items() if k != "device"}, **code}
        found.append(Cell(name, f"{__name__}:cell", arguments, 8.0, identity, row, kind="serve"))
    return found


def cell(spec: str | None, device: str, **given: Any) -> Iterator[dict[str, Any]]:
    """Rows of one spec over both caches at each concurrency; the last one is the cell's own."""
    session = _session(json.dumps(given), device)
    parsed = None if spec is None else next(s for s in session.specs if str(s) == spec)
    rows = list(session.measured(parsed))
    for row in rows:
        found = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name not in _SHARED}
        found = {name: value for name, value in found.items() if value is not None}
        found["clock"] = {k: v for k, v in row.clock.items() if k != "noisy"}
        part = f"{row.scheme['kv_spec']} b{row.shape['batch']}"
        yield {**found, "words": in_words(row), **({} if row is rows[-1] else {"part": part})}


@functools.lru_cache(maxsize=1)
def _session(given: str, device: str) -> Session:
    """Shared by the cells of one process, so that the 16-bit side is loaded once."""
    asked: Mapping[str, Any] = json.loads(given)
    plan = Plan(
        mix_of("chat", asked["scale"]),
        specs=tuple(s for s in SPECS if s),
        kv=("bf16", "int8"),
        requests=asked["requests"],
        concurrency=tuple(asked["concurrency"]),
        bound=Bound(2.0, 0.05),
        rounds=asked["rounds"],
        layers=asked["layers"],
    )
    session = Session(asked["source"], plan, torch.device(device), lambda words: None)
    # No probe: a card has one float type for its 16-bit side, a CPU only tries the run.
    session.speed = Speed((session.whole.dtype,), frozenset(), "not probed", 0.0, {1: 0.0}, 0.0)
    return session
