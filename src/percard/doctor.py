"""What this machine is, which body of each op would serve here, and why the others refuse."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .kernels import conformance, device
from .kernels.op import Unsupported, native

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .kernels.op import Body, Op
    from .kernels.shapes import Case

PACKAGES = ("torch", "triton", "numpy", "transformers", "compressed-tensors", "huggingface_hub", "vllm", "sglang")
SERVES, STANDS_BY, ON_REQUEST, REFUSES = "serves", "stands by", "on request", "refuses"


@dataclass(frozen=True)
class Row:
    """One body of one op for tensors on `device`. `state` is one of the four words above; `reason` if it refuses."""

    op: str
    spec: str | None
    device: str
    body: str
    state: str
    reason: str | None


@dataclass(frozen=True)
class Diagnosis:
    """`machine` and `packages` are flat facts for people; `ops` has a row per op, device and body."""

    machine: dict[str, Any]
    packages: dict[str, str | None]
    ops: tuple[Row, ...]
    advice: tuple[str, ...]


def examine() -> Diagnosis:
    """Asks the machine; allocates a few kilobytes on a card when there is one."""
    rows = [row for op, cases in _ops() for case in cases for where in _devices() for row in _bodies(op, case, where)]
    machine = _machine()
    return Diagnosis(machine, {name: _version(name) for name in PACKAGES}, tuple(rows), tuple(_advice(machine, rows)))


def show(diagnosis: Diagnosis) -> list[RenderableType]:
    """What `percard doctor` prints: the machine, the packages, a table of ops, advice."""
    from rich.table import Table

    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in diagnosis.machine.items():
        facts.add_row(name.replace("_", " "), _words(value))
    versions = "  ".join(f"{name} {version}" for name, version in diagnosis.packages.items() if version)
    absent = ", ".join(name for name, version in diagnosis.packages.items() if not version)
    facts.add_row("packages", versions + (f"  (not installed: {absent})" if absent else ""))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("op", "spec", "on", "body", "", "why"):
        table.add_column(column, overflow="fold")
    last = None
    for row in diagnosis.ops:
        key = (row.op, row.spec, row.device)
        style = {SERVES: "green", REFUSES: "dim"}.get(row.state, "")
        names = ("", "", "") if key == last else (row.op, row.spec or "", row.device)
        table.add_row(*names, row.body, f"[{style}]{row.state}[/]" if style else row.state, row.reason or "")
        last = key
    return [facts, "", table, *(f"\n{line}" for line in diagnosis.advice)]


def summary(diagnosis: Diagnosis) -> list[RenderableType]:
    """The same in a few lines: the machine, what serves, and why the other bodies do not."""
    m = diagnosis.machine
    lines = [
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB; card: {_words(m['card'])}",
        f"python {m['python']}, torch {diagnosis.packages['torch']}, triton {_words(diagnosis.packages['triton'])}, "
        f"C++ bodies {_words(m['cpp_isa'])}",
    ]
    served: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for row in diagnosis.ops:
        if row.state == SERVES:
            served.setdefault(f"{row.body} on {row.device}", []).append(row.op)
        elif row.state == REFUSES and row.reason is not None:
            refused.setdefault(f"{row.body} on {row.device}: {row.reason}", []).append(row.op)
    lines += [f"serves: {where}: {', '.join(ops)}" for where, ops in served.items()]
    lines += [f"refuses: {why} ({', '.join(ops)})" for why, ops in refused.items()]
    return [*lines, *diagnosis.advice]


def _machine() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    try:
        module = native()
        facts["cpp_isa"] = module.isa()
        facts["cpp_isas_here"] = list(module.isas())
        facts["cpp_threads"] = module.threads()
    except Unsupported as error:
        facts["cpp_isa"] = None
        facts["cpp_missing"] = str(error)
    facts["cuda_build"] = torch.version.cuda
    if device.has_card():
        card = device.card()
        facts["card"] = f"{card.name}, sm_{card.sm}, {card.sms} SMs, {card.shared_bytes // 1024} kB shared memory"
        facts["cards"] = device.cards()
    else:
        facts["card"] = None
    return facts


def _ops() -> list[tuple[Op, list[Case]]]:
    """Every op folder, with a small problem for each spec of weight that the op takes; bf16 where there is one."""
    from . import kernels

    found = []
    for item in sorted(pkgutil.iter_modules(kernels.__path__), key=lambda i: i.name):
        if item.ispkg:
            package = f"{kernels.__name__}.{item.name}"
            small = importlib.import_module(f"{package}.cases").SMALL
            op = getattr(importlib.import_module(package), item.name)
            first: dict[str, Case] = {}
            for case in sorted(small, key=lambda c: c.dtype != torch.bfloat16):
                # Only experts lie packed in more than one way that a body reads.
                first.setdefault(case.spec.split("-")[0] if hasattr(op.contract, "PACKINGS") else "", case)
            found.append((op, list(first.values())))
    return found


def _devices() -> list[str]:
    return ["cpu", "cuda"] if device.has_card() else ["cpu"]


def _bodies(op: Op, case: Case, where: str) -> list[Row]:
    """A row per body; each is asked about a weight in the packing it wants, as `prepare` would hand it over."""
    rows, served = [], False
    for body in op.bodies:
        reason = _refusal(op, body, case, where)
        if body.name == "reference":
            state, reason = ON_REQUEST, "exact and slow: impl='reference'"
        elif reason is not None:
            state = REFUSES
        else:
            state, served = (STANDS_BY if served else SERVES), True
        rows.append(Row(op.name, case.spec or None, where, body.name, state, reason))
    return rows


def _refusal(op: Op, body: Body, case: Case, where: str) -> str | None:
    inputs = importlib.import_module(f"{op.contract.__package__}.cases").inputs
    try:
        ready = conformance.packed(op, body.name, inputs(case, 0, where))
        return body.refuses(*op.contract.unwrap(*ready))
    except (NotImplementedError, ValueError) as error:
        return str(error)


def _advice(machine: dict[str, Any], rows: list[Row]) -> list[str]:
    lines = []
    unserved = sorted(
        {f"{r.op} on {r.device}" for r in rows} - {f"{r.op} on {r.device}" for r in rows if r.state == SERVES}
    )
    if unserved:
        lines.append(f"Nothing serves {', '.join(unserved)}; the reasons stand in the table.")
    if machine["cpp_isa"] is None:
        lines.append("Without the C++ module a CPU only has the references; install percard where a C++17 compiler is.")
    if machine["card"] is None:
        build = (
            "has no CUDA in it"
            if machine["cuda_build"] is None
            else "sees no CUDA card; nvidia-smi says whether the driver does"
        )
        lines.append(f"No card: torch {torch.__version__} {build}. The CPU bodies serve.")
    return lines


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _words(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
