"""Report: what a verb did, module by module, as `report.json` (schema 1) and as the model card beside it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
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
STARVED = 32  # calibration tokens below which an expert's statistics are mostly borrowed


@dataclass(frozen=True)
class Module:
    """One quantised linear: shape (out, in), spec, method, SQNR in dB against the (transformed) source, bytes before and
    after. facts: what the methods say: loss, damp, fallbacks, alpha, clip share."""

    name: str
    spec: str
    method: str
    shape: tuple[int, int]
    sqnr: float | None
    bytes_before: int
    bytes_after: int
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """One decoder block. error: ||y_q - y|| / ||y - x||, FP and quantised block on the same FP input x: the share of what
    the block does that quantising it gets wrong. noise: mean over tokens of ||y_q - y||^2 / ||y||^2, the share of what goes
    on to the next block. tokens: how many calibration tokens each expert met, empty without experts."""

    index: int
    error: float | None = None
    noise: float | None = None
    tokens: tuple[int, ...] = ()

    @property
    def starved(self) -> int:
        """Experts that met fewer than STARVED tokens."""
        return sum(1 for n in self.tokens if n < STARVED)


@dataclass(frozen=True)
class Gate:
    """What the model says against its source, on a held-out text. kl: mean KL(reference || model) in nats per token; top1:
    share of tokens with the same likeliest next one; `spec`: whose thresholds judge, "" = 16-bit. text: name of the file."""

    gate: str
    kl: float
    top1: float
    perplexity: float
    perplexity_reference: float
    tokens: int
    protocol: str
    spec: str
    reasons: tuple[str, ...] = ()
    limits: dict[str, float] = field(default_factory=dict)
    text: str = ""
    sha256: str = ""

    @property
    def rise(self) -> float:
        """Of the perplexity, relative: 0.01 = one per cent worse than the source."""
        return self.perplexity / self.perplexity_reference - 1

    def show(self) -> str:
        """The figures in one line."""
        return (
            f"KL {self.kl:.5f}   top-1 {self.top1:.2%}   "
            f"perplexity {self.perplexity:.3f} (source {self.perplexity_reference:.3f})"
        )


@dataclass(frozen=True)
class Promotion:
    """A fused set that got more bits after a red gate. after: a spec, or "16 bit"; bytes: added; fall: what its block's
    noise lost when the set was tried at 16 bits, as a share of the noise of all blocks."""

    round: int
    modules: tuple[str, ...]
    before: str
    after: str
    bytes: int
    fall: float


@dataclass(frozen=True)
class Report:
    """What happened. status is "red" with a failure (wrong bytes), a flag (a module below its SQNR, a text that is no
    held-out one) or a last gate that is red; "none" when the model was run and nothing judges its spec; else "green".

    bytes: source, output, quantised_before, quantised_after, copied. kept: module -> rule that left it alone.
    seconds: by phase. checks: what `verify` compared. versions: of what can change the bytes. fingerprints: sha256 of
    source, calibration and what else the bytes depend on. calibration: name, sha256 and size of the text; empty = none read.
    gates: one per check with a text, the last is the one that counts. accepts: which engines load these containers.
    trained: tensors that are not quantised and were trained after it, so that they are not the source's any more.
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
    fingerprints: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()
    gates: tuple[Gate, ...] = ()
    promotions: tuple[Promotion, ...] = ()
    accepts: tuple[dict[str, Any], ...] = ()
    trained: tuple[str, ...] = ()
    schema: int = SCHEMA

    @property
    def gate(self) -> Gate | None:
        """The last one."""
        return self.gates[-1] if self.gates else None

    @property
    def status(self) -> str:
        word = self.gate.gate if self.gate is not None else "green"
        return "red" if self.failures or self.flags else word

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; keys in the order of the fields, `status` first."""
        tree = {"status": self.status, **asdict(self)}
        for layer, found in zip(tree["layers"], self.layers, strict=True):
            layer["starved"] = found.starved if found.tokens else None
        plain: dict[str, Any] = _finite(tree)
        return plain

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> Report:
        """The report in a file; FormatError for another schema. Unknown keys are named in `warnings`, not refused."""
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(tree, dict) or tree.get("schema") != SCHEMA:
                raise FormatError(f"{path}: not a report of schema {SCHEMA}; made by another version of percard?")
            tree.pop("status", None)
            unknown: dict[str, None] = {}
            tree = _known(cls, tree, "", unknown)
            for key, kind in _RECORDS.items():
                tree[key] = tuple(_record(kind, entry, key, unknown) for entry in tree.get(key, ()))
            for key in ("failures", "flags", "warnings", "accepts", "trained"):
                tree[key] = tuple(tree.get(key, ()))
            tree["warnings"] += tuple(f"{path.name}: unknown key {key!r} was not read" for key in unknown)
            return cls(**tree)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path}: not a report ({error}); run `percard verify` again") from None


_RECORDS: dict[str, type] = {"modules": Module, "layers": Layer, "gates": Gate, "promotions": Promotion}


def _record(kind: type, entry: dict[str, Any], where: str, unknown: dict[str, None]) -> Any:
    """One frozen record of a list; lists become tuples again, None a number that was not finite."""
    entry = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k != "starved"}
    if kind is Gate:
        entry = {k: math.nan if v is None else v for k, v in entry.items()}
    return kind(**_known(kind, entry, f"{where}.", unknown))


def _known(kind: Any, tree: dict[str, Any], where: str, unknown: dict[str, None]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    unknown.update({f"{where}{key}": None for key in tree if key not in names})
    return {k: v for k, v in tree.items() if k in names}


def _finite(value: Any) -> Any:
    """The same tree where a number that JSON does not know (NaN, Inf) is null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


@dataclass(frozen=True)
class Licence:
    """What a source says about its licence: a name such as apache-2.0 from the front of its README.md, a file beside it."""

    name: str = ""
    file: str = ""

    @classmethod
    def of(cls, folder: Path) -> Licence:
        """Both empty when it says nothing."""
        name, readme = "", folder / CARD_NAME
        if readme.is_file():
            with readme.open(encoding="utf-8", errors="replace") as file:
                front = file.read(1 << 16)
            found = re.match(r"---\r?\n(.*?\r?\n)---", front, re.DOTALL)
            line = re.search(r"^license:\s*[\"']?([\w.+-]{1,64})[\"']?\s*$", found[1], re.MULTILINE) if found else None
            name = line[1] if line else ""
        files = sorted(p.name for p in folder.iterdir() if re.match(r"(licen[cs]e|copying)", p.name, re.IGNORECASE))
        return cls(name, files[0] if files else "")

    def __str__(self) -> str:
        return ", ".join([*([self.name] if self.name else []), *([f"file `{self.file}`"] if self.file else [])])


def card(report: Report, base: str, serve: Mapping[str, str], licence: Licence | None = None) -> str:
    """The model card in Markdown. base: name of the source; serve: engine -> the command that serves it."""
    licence = licence or Licence()
    specs = dict(Counter(m.spec for m in report.modules).most_common())
    before, after = report.bytes["source"], report.bytes["output"]
    # A folder name is no hub id, and the hub would make a dead link of it.
    hub = [f"base_model: {base}", "base_model_relation: quantized"] if _is_hub_id(base) else []
    lines = [
        "---",
        *([f"license: {licence.name}"] if licence.name else []),
        *hub,
        f"tags: [compressed-tensors, quantized, {', '.join(specs)}]",
        "---",
        "",
        f"# {base.rsplit('/', 1)[-1]}, {', '.join(specs)}",
        "",
        f"Quantised from `{base}` by percard {report.versions['percard']}: {human(before)} became {human(after)}.",
        *([f"Licence of the source: {licence}."] if str(licence) else []),
        "",
        *_quality(report),
        "",
        *_serve(report, serve),
        "## What was done",
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
    lines += ["", *_calibration(report), *_promotions(report)]
    lines += ["Left as in the source:", ""]
    lines += [f"- {count} x {rule}" for rule, count in Counter(report.kept.values()).items()]
    touched = report.checks.get("transformed")
    norms = "norms (where a method moved scales between weights, changed with them)" if touched else "norms"
    if report.trained:
        lines += [
            f"- every file that is not a weight: byte by byte; {len(report.trained)} other tensors were trained",
            "",
        ]
    else:
        lines += [f"- embeddings, {norms} and every file that is not a weight: byte by byte", ""]
    notes = [*report.failures, *report.flags, *report.warnings]
    lines += ["To know:", "", *(f"- {text}" for text in notes), ""] if notes else []
    lines.append(
        "Details per module and per layer: `report.json`. SQNR compares weights; it is no measure of what the model says."
    )
    return "\n".join(lines) + "\n"


def _quality(report: Report) -> list[str]:
    """The gate as a table, or that there was none."""
    gate, lines = report.gate, ["## Quality against the source", ""]
    if gate is None:
        return [
            *lines,
            f"What the model says was not measured: no held-out text was given. Check of the files (level {report.level}): "
            f"**{report.status}**.",
        ]
    limit = lambda key, form: form.format(gate.limits[key]) if key in gate.limits else "not gated"  # noqa: E731
    # A small model's perplexity scatters more than quantising moves it.
    small = " in so small a model" if gate.limits and "perplexity" not in gate.limits else ""
    lines += [
        "| | source | this model | gate |",
        "|---|---|---|---|",
        f"| mean KL of the next token, nats | 0 | {gate.kl:.5f} | {limit('kl', 'at most {}')} |",
        f"| same likeliest next token | 100 % | {gate.top1:.2%} | {limit('top1', 'at least {:.0%}')} |",
        f"| perplexity | {gate.perplexity_reference:.3f} | {gate.perplexity:.3f} ({gate.rise:+.2%}) | "
        f"{limit('perplexity', 'rise at most {:.0%}')}{small} |",
        "",
        f"Gate: **{gate.gate}**{' (' + '; '.join(gate.reasons) + ')' if gate.reasons else ''}. "
        f"Text: `{gate.text}`, sha256 {gate.sha256[:16]}.",
        f"Protocol: {gate.protocol}.",
    ]
    worst = max((x for x in report.layers if x.error is not None), key=lambda x: x.error or 0.0, default=None)
    if worst is not None:
        lines.append(
            f"The output of a block is off by {worst.error:.1%} of what the block adds at worst (block {worst.index})."
        )
    if len(report.gates) > 1:
        lines.append(f"Before layers were given more bits: {report.gates[0].show()}.")
    if report.status != gate.gate and gate.gate != "none":
        lines.append(f"The report as a whole is **{report.status}**, see below.")
    return lines


def _serve(report: Report, serve: Mapping[str, str]) -> list[str]:
    lines = ["## Serve", ""]
    for engine, command in serve.items():
        lines += [f"{engine}:", "", "```", command, "```", ""]
    return lines


def _calibration(report: Report) -> list[str]:
    """Name, hash and size of the text; nothing for methods that read none."""
    said = report.calibration
    if not said:
        return ["No calibration text was read.", ""]
    tokens = f"{said['windows_used']} windows of {said['window']} tokens" if "windows_used" in said else ""
    extra = f", seed {said['seed']}" if "seed" in said else ""
    source = str(said.get("source"))
    name = source if source.startswith("hf:") else Path(source).name  # where it lay is nobody's business
    lines = [f"Calibration text: `{name}`, sha256 {str(said.get('sha256'))[:16]}, {tokens}{extra}."]
    starved = [x for x in report.layers if x.starved]
    if starved:
        count, of = sum(x.starved for x in starved), sum(len(x.tokens) for x in report.layers)
        lines.append(f"{count} of {of} experts met fewer than {STARVED} of its tokens.")
    return [*lines, ""]


def _promotions(report: Report) -> list[str]:
    if not report.promotions:
        return []
    lines = [
        "Given more bits after a red gate:",
        "",
        "| round | modules | from | to | bytes added |",
        "|---|---|---|---|---|",
    ]
    for p in report.promotions:
        names = f"`{p.modules[0]}`" + (f" and {len(p.modules) - 1} more" if len(p.modules) > 1 else "")
        lines.append(f"| {p.round} | {names} | {p.before} | {p.after} | {human(p.bytes)} |")
    return [*lines, ""]


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
