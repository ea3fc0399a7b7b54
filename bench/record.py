"""Record: one measured cell, one JSON line, schema 1. Seconds, bytes and shares inside; ms and GB only on paper.

`null` means not measured; an absent section means not of this level. A file of records is appended to and fsynced row
by row, so a run that dies keeps what it has. Keys that schema 1 does not know are an error when a row says it is
schema 1, and a warning when it comes from a newer one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from ..formats.spec import FormatError
from . import record_types

SCHEMA = 1
LEVELS = ("op", "layer", "model", "serve")
STATUSES = ("ok", "absent", "refused", "failed", "timeout", "oom", "suspect", "cut")
# A cell whose row has one of these words is not measured again, unless failures are asked for once more.
FAILURES = ("failed", "timeout", "oom")
SETTLED = ("ok", "absent", "refused", "suspect", *FAILURES)
SOURCES = ("percard", "vllm", "sglang", "llama-bench")
GATES = ("green", "red", "synthetic", "none")

# What may stand in each section. One place: the reader checks against it, docs quote it.
SECTIONS: dict[str, frozenset[str]] = {
    name: frozenset(keys.split())
    for name, keys in {
        "error": "type message stage",
        "code": "percard git_sha dirty op_source_hash config_source config command",
        "env": "driver cuda torch triton python os container rivals env_vars byteorder",
        "card": "spec_id name uuid sm mem_mib vbios ecc mig power_cap_w nvlink pcie cards clocks temp_c throttle roof "
        "noise_floor_pct",
        "cpu": "model isa torch_isa sockets threads affinity governor virtual l2_bytes l3_bytes read_gbs noise_floor_pct",
        "model": "id config_hash weights weights_hash layers_run layers tp pp ep shard routing experts_touched",
        "shape": "M N K G H D T S P batch isl osl kv_len load bound",
        "scheme": "spec kv_spec weight_bits act_bits kv_bits group symmetric scale_dtype sparsity head format notes",
        "body": "impl isa dtype rejected same_fusions baseline_dtype baseline_probe attention_body",
        "clock": "mode l2 copies power burst sustained rounds calls_per_sample warmup_ms warmup drift noisy",
        "latency_us": "median lo hi iqr p10 p90 ci95 samples eager",
        "tokens": "ttft_s tpot_s itl_s e2e_s tok_s tok_s_in tok_s_per_card tok_s_per_user req_s goodput concurrency "
        "vs_fp16",
        "roofline": "bytes flops bound mbu mfu pct_of_roof pct_of_spec",
        "energy": "energy_j avg_power_w idle_power_w j_per_out_token scope power_valid power_reason",
        "money": "usd_per_card_hour usd_per_mtok",
        "memory": "weights kv kv_bytes_per_token activations graphs peak free_for_kv max_tokens max_concurrency load_s",
        "quality": "gate model protocol ppl ppl_rel kl top1 task length_ratio gate_key reasons sqnr_db tokens",
    }.items()
}


# One of Record.against: a rival timed in the same rounds. `ratio` is its time over ours, so above 1 we are faster.
RIVAL = frozenset(["impl", "version", "status", "reason", "median", "lo", "hi", "eager", "ratio", "ci95"])


@dataclass(frozen=True)
class Record:
    """One row. Sections are plain dicts whose keys `SECTIONS` lists; construction checks them (FormatError)."""

    cell_key: str
    level: str
    case: str
    status: str = "ok"
    seconds: float | None = None
    source: str = "percard"
    error: dict[str, Any] | None = None
    code: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    cpu: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=dict)
    scheme: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    clock: dict[str, Any] = field(default_factory=dict)
    latency_us: dict[str, Any] | None = None
    against: list[dict[str, Any]] | None = None
    tokens: dict[str, Any] | None = None
    roofline: dict[str, Any] | None = None
    energy: dict[str, Any] | None = None
    money: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    ts: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for name in ("case", "cell_key", "run_id", "ts"):
            if not isinstance(getattr(self, name), str):
                raise FormatError(f"record {self.case}: {name} is {getattr(self, name)!r}; expected a text")
        for name in SECTIONS:
            if fault := record_types.fault(name, getattr(self, name)):
                raise FormatError(f"record {self.case}: {fault}")
        if not isinstance(self.against, list | tuple | None):
            raise FormatError(f"record {self.case}: against is {self.against!r}; expected a list of objects")
        for rival in self.against or ():
            if fault := "one is null; expected objects" if rival is None else record_types.fault("against", rival):
                raise FormatError(f"record {self.case}: against: {fault}")
        if fault := record_types.ratio_fault(self.tokens):
            raise FormatError(f"record {self.case}: {fault}")
        for name, value, known in (
            ("level", self.level, LEVELS),
            ("status", self.status, STATUSES),
            ("source", self.source, SOURCES),
            ("quality.gate", (self.quality or {}).get("gate", "none"), GATES),
        ):
            if value not in known:
                raise FormatError(f"record {self.case}: {name} {value!r} is not one of {', '.join(known)}")
        for name, known_keys in SECTIONS.items():
            section = getattr(self, name)
            unknown = sorted(set(section or ()) - known_keys)
            if unknown and self.schema == SCHEMA:
                raise FormatError(
                    f"record {self.case}: {name} has unknown keys {', '.join(unknown)} for schema {SCHEMA}"
                )
        for rival in self.against or ():
            unknown = sorted(set(rival) - RIVAL)
            if unknown and self.schema == SCHEMA:
                raise FormatError(
                    f"record {self.case}: against has unknown keys {', '.join(unknown)} for schema {SCHEMA}"
                )
        if self.status == "ok" and (self.quality or {}).get("gate") == "red" and (self.tokens or self.latency_us):
            raise FormatError(
                f"record {self.case}: a red gate carries no speed figure; leave tokens and latency_us empty"
            )

    def to_json(self) -> str:
        """One line without a line break; sections that are None are left out, numbers that are not finite are null."""
        row = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps(_finite({k: v for k, v in row.items() if v is not None}), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str, where: str = "record") -> Record:
        """The Record in a line; FormatError names `where` and what is wrong."""
        try:
            row = _finite(json.loads(line))  # NaN and 1e999 are what the writer calls null: not measured
        except (ValueError, RecursionError) as error:
            said = error if isinstance(error, ValueError) else "too deep"
            raise FormatError(f"{where}: not JSON ({said}); a row cut by a crash may be deleted") from None
        if not isinstance(row, dict) or type(row.get("schema")) is not int:
            hint = "give the JSONL of a percard bench, or `percard bench import` what another tool wrote"
            raise FormatError(f"{where}: has no schema number; it is not a record; {hint}")
        if row["schema"] < SCHEMA:
            hint = "measure again, or read it with the percard that wrote it"
            raise FormatError(f"{where}: schema {row['schema']} is older than {SCHEMA} and is not read; {hint}")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(row) - known)
        if unknown:
            if row["schema"] == SCHEMA:
                hint = "remove them, or read it with the percard that wrote it"
                raise FormatError(f"{where}: unknown keys {', '.join(unknown)} for schema {SCHEMA}; {hint}")
            warnings.warn(f"{where}: schema {row['schema']} keys not read: {', '.join(unknown)}", stacklevel=2)
        missing = sorted({"cell_key", "level", "case"} - set(row))
        if missing:
            raise FormatError(f"{where}: keys {', '.join(missing)} are missing; remove the row or measure it again")
        try:
            return cls(**{k: v for k, v in row.items() if k in known and v is not None})
        except FormatError as error:
            raise FormatError(f"{where}: {error}; remove the row or measure it again") from None


def append(path: str | Path, record: Record) -> None:
    """Adds one line and waits until it is on the disk. Without room (OSError, names the file) the file is as before."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end and (file.seek(end - 1), file.read(1))[1] != b"\n":
            # A run died while it wrote this row: what is there of it is dropped, so that the file stays readable.
            file.seek(0)
            end = file.readall().rfind(b"\n") + 1
            file.truncate(end)
        line = memoryview(record.to_json().encode() + b"\n")
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(end)
            error.filename = str(target)
            raise


def read(path: str | Path) -> Iterator[Record]:
    """Every record of a file, in order. A last line without its line break was cut while written and is left out."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        hint = "give the JSONL of a percard bench"
        raise FormatError(f"{path}: not text ({error.reason} at byte {error.start}); {hint}") from None
    yield from parse(text, str(path))


def parse(text: str, where: str) -> Iterator[Record]:
    """The records in the text of a file that `where` names."""
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        if line.strip():
            yield Record.from_json(line, f"{where}:{number}")


def cell_key(**parts: Any) -> str:
    """sha256 of what makes two measurements the same cell: canonical JSON of the schema and all `parts`."""
    text = json.dumps({"schema": SCHEMA, **parts}, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def code_section(command: str = "") -> dict[str, Any]:
    """Version of this package and, in a checkout, its commit and whether files differ from it."""
    root = Path(__file__).resolve().parents[1]
    sha = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no") if sha else None
    try:
        version = metadata.version("percard")
    except metadata.PackageNotFoundError:
        version = None
    return {"percard": version, "git_sha": sha, "dirty": bool(changed) if sha else None, "command": command}


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _finite(value: Any) -> Any:
    """JSON has no NaN: such a number is written as null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
