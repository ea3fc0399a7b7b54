"""Cards as data: rows of cards/cards.json and of a user's file, checked; one card found by its name, never by guessing.

A row is described in the "fields" of cards.json. A user's file holds one row, a list of rows, or {"cards": [rows]}:

    {"id": "mycard-48", "name": "My card", "arch": "ada", "sm": 89, "memory_mib": 46068, "bandwidth_gbs": 864,
     "bf16_tflops": 119.5, "int8_tops": 239, "source": "its datasheet, page 3"}

Needed: id, name, arch, source, bandwidth_gbs, bf16_tflops, and memory_mib or memory_gb. What is not known stays out or null.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats.spec import FormatError, QuantSpec
from .card import published

ARCHES = ("ampere", "ada", "hopper", "blackwell", "cpu", "unknown")
CONFIDENCE = ("datasheet", "secondary", "disputed", "measured", "user")
# field -> (unit, least, most): what a card of today can have; a slip of a unit lands outside
RANGES: dict[str, tuple[str, float, float]] = {
    "memory_gb": ("GB", 0.25, 16_384),
    "memory_mib": ("MiB", 256, 16_777_216),
    "bandwidth_gbs": ("GB/s", 1, 100_000),
    "bf16_tflops": ("TFLOPS", 0.001, 100_000),
    "fp8_tflops": ("TFLOPS", 0.001, 200_000),
    "int8_tops": ("TOPS", 0.001, 200_000),
    "int4_tops": ("TOPS", 0.001, 400_000),
    "tdp_w": ("W", 1, 20_000),
    "power_cap_w": ("W", 1, 20_000),
    "link_gbs": ("GB/s one way", 0.1, 10_000),
}
_NEEDED = ("id", "name", "arch", "source", "bandwidth_gbs", "bf16_tflops")
_WORDS = ("id", "name", "arch", "memory_type", "source", "confidence", "notes")
_KNOWN = {*RANGES, *_WORDS, "device_names", "sm", "unverified", "alternatives", "measured"}
_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
# One way between cards of one host, GB/s: half of the two-way NVLink figures of the vendor's pages (A100 600, H100 900,
# B200 1800); cards with GDDR have none and meet over PCIe (4.0 x16: 32; Blackwell 5.0 x16: 64). None measured here.
_NVLINK = {"ampere": 300.0, "hopper": 450.0, "blackwell": 900.0}
_PCIE = {"blackwell": 64.0}


@dataclass(frozen=True)
class Card:
    """One row. Rates are 1e12 a second and dense, bandwidth and link 1e9 bytes a second; None = not known, or none there."""

    id: str
    name: str
    arch: str
    memory_gb: float | None
    memory_mib: float | None
    bandwidth_gbs: float
    bf16_tflops: float
    fp8_tflops: float | None
    int8_tops: float | None
    source: str
    confidence: str
    memory_type: str = ""
    link_gbs: float | None = None
    unverified: tuple[str, ...] = ()
    alternatives: tuple[tuple[str, tuple[float, ...]], ...] = ()
    notes: str = ""

    @property
    def memory(self) -> float:
        """Bytes: what the driver reports, else nominal gigabytes."""
        return self.memory_mib * 2**20 if self.memory_mib else (self.memory_gb or 0) * 1e9

    @property
    def memory_basis(self) -> str:
        """Which of the two `memory` is, in words."""
        if self.memory_mib:
            return f"{self.memory_mib:.0f} MiB as the system reports"
        return f"{self.memory_gb:g} GB nominal (no reported size is known)"

    def doubtful(self, *fields: str) -> bool:
        """Whether the row is disputed, or one of these fields has other published values."""
        return self.confidence == "disputed" or any(key in fields for key, _ in self.alternatives)

    def link(self) -> tuple[float, str]:
        """(bytes a second one way between two cards of a host, where that is from)."""
        if self.link_gbs:
            return self.link_gbs * 1e9, "link_gbs of the row"
        if self.memory_type.startswith("HBM"):
            return _NVLINK.get(self.arch, 32.0) * 1e9, f"assumed: NVLink of {self.arch} cards"
        return _PCIE.get(self.arch, 32.0) * 1e9, "assumed: PCIe x16, no NVLink"

    def rate(self, spec: QuantSpec | None) -> tuple[float, str] | None:
        """(operations a second, the field they stand in) that products of a spec run at; None = the card has no such rate."""
        field = rate_field(spec)
        value = getattr(self, field)
        return None if value is None else (value * 1e12, field)


def rate_field(spec: QuantSpec | None) -> str:
    """The field of the rate a spec multiplies at: bf16 for 16-bit activations, int8 for 8-bit ones, fp8 for fp8."""
    if spec is None or spec.act_bits == 16:
        return "bf16_tflops"
    return "int8_tops" if spec.float_format is None else "fp8_tflops"


def cards(files: Sequence[str | Path] = ()) -> dict[str, Card]:
    """Every card by its id: the shipped ones, then those of the user's files. FormatError for a row that is wrong or a second one."""
    found = {row["id"]: card_of(row, f"cards.json: {row['id']}") for row in published()}
    for file in files:
        for number, row in enumerate(_rows(Path(file)), 1):
            card = card_of(row, f"{file}: card {number}")
            if card.id in found:
                raise FormatError(f"{file}: card {number}: the id {card.id!r} is taken; give it another one")
            found[card.id] = card
    return found


def find(name: str, among: Mapping[str, Card]) -> Card:
    """The one card of a name: its id, or words of its id and name that no other card has. FormatError lists the ids."""
    wanted = name.strip().lower()
    if wanted in among:
        return among[wanted]
    words = _tokens(wanted) - {"nvidia", "geforce"}
    hits = [c for c in among.values() if words and words <= _tokens(c.id) | _tokens(c.name)]
    if len(hits) == 1:
        return hits[0]
    if hits:
        ids = ", ".join(c.id for c in hits)
        raise FormatError(f"card {name!r} is ambiguous, it may be {ids}; give one of these ids with --card")
    raise FormatError(
        f"no card {name!r}; known: {', '.join(among)}; add one with --card-file FILE.json (docs/plan.md says how)"
    )


def card_of(row: Any, where: str) -> Card:
    """A row as a Card, each field checked. `where` begins the errors."""
    if not isinstance(row, Mapping):
        raise FormatError(f"{where}: is {type(row).__name__}, expected an object with the fields of a card")
    if unknown := [str(key) for key in row if key not in _KNOWN]:
        raise FormatError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(sorted(_KNOWN))}")
    if missing := [key for key in _NEEDED if row.get(key) is None]:
        raise FormatError(f"{where}: {missing[0]} is missing; a card needs {', '.join(_NEEDED)} and a memory size")
    for key in _WORDS:
        if not isinstance(row.get(key, ""), str):
            raise FormatError(f"{where}: {key} is {row[key]!r}, expected words")
    if not _ID.fullmatch(row["id"]) or row["id"] == "all":
        raise FormatError(f"{where}: id {row['id']!r}, expected small letters, digits, '.', '_' and '-', at most 64")
    for key, known in (("arch", ARCHES), ("confidence", CONFIDENCE)):
        if row.get(key, known[-1]) not in known:
            raise FormatError(f"{where}: {key} is {row[key]!r}, expected one of {', '.join(known)}")
    numbers = {key: _number(row.get(key), key, where) for key in RANGES}
    if numbers["memory_mib"] is None and numbers["memory_gb"] is None:
        raise FormatError(f"{where}: memory_mib is missing; nvidia-smi prints it (or give memory_gb, as sold)")
    _check_lists(row, where)
    return Card(
        row["id"],
        row["name"],
        row["arch"],
        numbers["memory_gb"],
        numbers["memory_mib"],
        numbers["bandwidth_gbs"] or 0.0,
        numbers["bf16_tflops"] or 0.0,
        numbers["fp8_tflops"],
        numbers["int8_tops"],
        row["source"],
        row.get("confidence", "user"),
        row.get("memory_type", ""),
        numbers["link_gbs"],
        tuple(row.get("unverified") or ()),
        tuple((key, tuple(values)) for key, values in (row.get("alternatives") or {}).items()),
        row.get("notes", ""),
    )


def _check_lists(row: Mapping[str, Any], where: str) -> None:
    for key in ("device_names", "unverified"):
        value = row.get(key) or []
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise FormatError(f"{where}: {key} is {value!r}, expected a list of words")
    others = row.get("alternatives") or {}
    if not isinstance(others, Mapping) or not all(isinstance(v, list) for v in others.values()):
        raise FormatError(f"{where}: alternatives is {others!r}, expected {{field: [values]}}")
    for key, values in others.items():
        if key not in RANGES:
            raise FormatError(f"{where}: alternatives of {key!r}, expected a field with a number")
        for value in values:
            _number(value, key, f"{where}: alternatives")
    sm = row.get("sm")
    if sm not in (None, 0) and (type(sm) is not int or not 50 <= sm <= 200):
        raise FormatError(f"{where}: sm is {sm!r}, expected a compute capability such as 90 for 9.0, or null")
    if not isinstance(row.get("measured") or {}, Mapping):
        raise FormatError(
            f"{where}: measured is {row['measured']!r}, expected what `percard bench card` wrote, or nothing"
        )


def _number(value: Any, key: str, where: str) -> float | None:
    """A number in the range of its field, None for null."""
    if value is None:
        return None
    unit, least, most = RANGES[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FormatError(f"{where}: {key} is {value!r}, expected a number of {unit}")
    if not least <= value <= most:
        raise FormatError(f"{where}: {key} is {value:g} {unit}, expected {least:g} to {most:g}; is the unit right?")
    return float(value)


def _rows(path: Path) -> list[Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: not there; --card-file takes a JSON file with rows as in cards.json") from None
    except (ValueError, OSError) as error:
        raise FormatError(f"{path}: not readable as JSON ({error}); see docs/plan.md for a row to start from") from None
    rows = data["cards"] if isinstance(data, Mapping) and "cards" in data else data
    rows = [rows] if isinstance(rows, Mapping) else rows
    if not isinstance(rows, list) or not rows:
        raise FormatError(f"{path}: holds no card; expected one row, a list of rows, or {{'cards': [rows]}}")
    return rows


def _tokens(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))
