"""Report: what a verb did, module by module, as `report.json` (schema 1) and as the model card beside it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..formats.spec import FormatError

SCHEMA = 1
REPORT_NAME = "report.json"
CARD_NAME = "README.md"
SECOND_CARD_NAME = "percard-card.md"  # when the source brings a README.md of its own, which stays as it is
OUR_FILES = (REPORT_NAME, CARD_NAME, SECOND_CARD_NAME)


@dataclass(frozen=True)
class Module:
    """One quantised linear: shape (out, in), spec, method, SQNR in dB against the source, bytes before and after."""

    name: str
    spec: str
    method: str
    shape: tuple[int, int]
    sqnr: float | None
    bytes_before: int
    bytes_after: int
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What happened. status is "red" with a failure (wrong bytes) or a flag (a module below its SQNR), else "green".

    bytes: source, output, quantised_before, quantised_after, copied. kept: module -> rule that left it alone.
    seconds: by phase. checks: what `verify` compared. versions: percard, torch, python.
    """

    verb: str
    source: str
    output: str
    level: str
    modules: tuple[Module, ...]
    kept: dict[str, str]
    bytes: dict[str, int]
    seconds: dict[str, float]
    checks: dict[str, Any] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    recipe: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=lambda: versions())
    schema: int = SCHEMA

    @property
    def status(self) -> str:
        return "red" if self.failures or self.flags else "green"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; keys in the order of the fields, `status` first."""
        return {"status": self.status, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> Report:
        """The report in a file; FormatError for another schema. Unknown keys are named in `warnings`, not refused."""
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(tree, dict) or tree.get("schema") != SCHEMA:
                raise FormatError(f"{path}: not a report of schema {SCHEMA}; made by another version of percard?")
            tree.pop("status", None)
            known = {f.name for f in fields(cls)}
            unknown = sorted(set(tree) - known)
            tree = {k: v for k, v in tree.items() if k in known}
            tree["modules"] = tuple(Module(**{**m, "shape": tuple(m["shape"])}) for m in tree["modules"])
            for key in ("failures", "flags", "warnings"):
                tree[key] = tuple(tree[key])
            tree["warnings"] += tuple(f"{path.name}: unknown key {key!r} was not read" for key in unknown)
            return cls(**tree)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise FormatError(f"{path}: not a report ({error}); run `percard verify` again") from None


def versions() -> dict[str, str]:
    """Versions that can change the bytes."""
    try:
        ours = importlib.metadata.version("percard")
    except importlib.metadata.PackageNotFoundError:
        ours = "unknown"
    return {"percard": ours, "torch": torch.__version__, "python": platform.python_version()}


def sqnr(signal: float, noise: float) -> float | None:
    """Signal to quantisation noise in dB; None when there is no signal or no noise to speak of."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def human(size: float) -> str:
    """Bytes for people: 1.6 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def card(report: Report, base: str, serve: Mapping[str, str]) -> str:
    """The model card in Markdown. base: name of the source; serve: engine -> the command that serves it."""
    specs = Counter(m.spec for m in report.modules)
    before, after = report.bytes["source"], report.bytes["output"]
    # A folder name is no hub id, and the hub would make a dead link of it.
    front = [
        "---",
        *([f"base_model: {base}"] if _is_hub_id(base) else []),
        "tags: [compressed-tensors, quantized]",
        "---",
        "",
    ]
    lines = [
        *front,
        f"# {base.rsplit('/', 1)[-1]}, {', '.join(specs)}",
        "",
        f"Quantised from `{base}` by percard {report.versions['percard']}: {human(before)} became {human(after)}.",
        "",
        "| spec | modules | method | SQNR median, dB | lowest, dB | module |",
        "|---|---|---|---|---|---|",
    ]
    for spec, count in specs.items():
        mine = [m for m in report.modules if m.spec == spec]
        measured = sorted((m for m in mine if m.sqnr is not None), key=lambda m: m.sqnr or 0.0)
        middle = f"{statistics.median([m.sqnr or 0.0 for m in measured]):.1f}" if measured else "exact"
        lowest = f"{measured[0].sqnr:.1f} | `{measured[0].name}`" if measured else "exact | "
        lines.append(f"| {spec} | {count} | {', '.join(sorted({m.method for m in mine}))} | {middle} | {lowest} |")
    lines += ["", f"Check after writing (level {report.level}): **{report.status}**.", ""]
    lines += [f"- {text}" for text in (*report.failures, *report.flags, *report.warnings)]
    lines += ["", "## Serve", ""]
    for engine, command in serve.items():
        lines += [f"{engine}:", "", "```", command, "```", ""]
    lines += ["## Left alone", ""]
    rules = Counter(report.kept.values())
    lines += [f"- {count} x {rule}" for rule, count in rules.items()]
    lines += ["- embeddings, norms and every file that is not a weight: byte by byte as in the source", ""]
    lines.append("Details per module: `report.json`. SQNR compares weights; it is no measure of what the model says.")
    return "\n".join(lines) + "\n"


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
