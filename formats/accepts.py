"""Which engine loads which container: the rows of accepts.json, each with the place it was read from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .spec import FormatError, QuantSpec

VERDICTS = ("runs", "decompresses", "differs", "depends", "refused")


@dataclass(frozen=True)
class Row:
    """One fact. `versions` is "==0.33.*" or "==0.5.23"; `modules` is "dense" or "experts"; `needs` an architecture."""

    engine: str
    versions: str
    specs: tuple[str, ...]
    container: str
    modules: str
    verdict: str
    needs: str | None
    reason: str
    checked: str
    source: str


@cache
def rows() -> tuple[Row, ...]:
    """All rows, in the order of the file."""
    data = json.loads((Path(__file__).parent / "accepts.json").read_text(encoding="utf-8"))
    return tuple(Row(**{**row, "specs": tuple(row["specs"])}) for row in data["rows"])


def _version_matches(versions: str, version: str) -> bool:
    wanted = versions.removeprefix("==")
    if wanted.endswith(".*"):
        return version == wanted[:-2] or version.startswith(wanted[:-1])
    return version == wanted


def lookup(engine: str, version: str, spec: QuantSpec, modules: str = "dense") -> Row | None:
    """The row for a spec in an engine of a version, or None: nobody has looked. FormatError for an unknown engine."""
    engines = sorted({row.engine for row in rows()})
    if engine not in engines:
        raise FormatError(f"unknown engine {engine!r}; accepts.json knows {', '.join(engines)}")
    for row in rows():
        if (
            row.engine == engine
            and row.modules == modules
            and str(spec) in row.specs
            and _version_matches(row.versions, version)
        ):
            return row
    return None
