"""The dry run: what each module gets, what it costs and whether it can work, from config.json and headers alone.

Reads no weight and makes nothing. Bad input raises; what would work but not here or not there (no room on the disk, an
engine that does not load the result, a split over cards that cuts a group) is listed in `refusals`, each with a remedy.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..formats import compressed_tensors
from ..formats.checkpoint import Checkpoint
from ..formats.header import nbytes_of
from ..formats.spec import FormatError, QuantSpec
from . import engines, walk, workers
from .methods import METHODS
from .recipe import Recipe
from .report import human
from .walk import Assignment, Linear, Map

RESIDENT = 500_000_000  # bytes of Python and torch, loaded
DISK_MARGIN = 50_000_000  # headers, report, and what file systems keep to themselves

TensorPlan = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Refused(RuntimeError):
    """The preflight says no; `.preflight` says why. Exit code 3, or 1 when all that is wrong is a disk too full."""

    code = 3

    def __init__(self, preflight: Preflight) -> None:
        super().__init__("refused: " + "; ".join(preflight.refusals))
        self.preflight = preflight
        if preflight.disk_free is not None and preflight.disk > preflight.disk_free and len(preflight.refusals) == 1:
            self.code = 1


@dataclass(frozen=True)
class Group:
    """All modules of one spec: how many, bytes before and after."""

    spec: str
    method: str
    modules: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Preflight:
    """What a run would do. Bytes throughout; memory is the peak that the run stays under, disk what the output takes.

    kept: module -> the rule that leaves it alone. refusals: why it should not run (empty = go), each with its remedy.
    """

    src: Path
    recipe: Recipe
    family: str
    groups: tuple[Group, ...]
    kept: Mapping[str, str]
    bytes_source: int
    bytes_output: int
    memory: int
    memory_free: int | None
    disk: int
    disk_free: int | None
    engine: tuple[dict[str, Any], ...]
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]
    source: Checkpoint = field(repr=False)
    found: Map = field(repr=False)
    assignment: Assignment = field(repr=False)
    tensors: TensorPlan = field(repr=False)

    @property
    def ok(self) -> bool:
        return not self.refusals

    @property
    def base(self) -> str:
        """The name of the source, for the model card."""
        return self.recipe.model or self.src.resolve().name

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the weights' names."""
        return {
            "ok": self.ok,
            "source": str(self.src),
            "family": self.family,
            "recipe": self.recipe.to_dict(),
            "groups": [vars(g) for g in self.groups],
            "kept": dict(self.kept),
            "bytes": {"source": self.bytes_source, "output": self.bytes_output},
            "memory": {"needed": self.memory, "free": self.memory_free},
            "disk": {"needed": self.disk, "free": self.disk_free},
            "engine": list(self.engine),
            "refusals": list(self.refusals),
            "warnings": list(self.warnings),
        }

    def show(self) -> list[str]:
        """The same in lines for a terminal."""
        lines = [f"{self.src}: {self.family}, {human(self.bytes_source)}"]
        for g in self.groups:
            lines.append(
                f"  {g.modules:5} modules -> {g.spec} ({g.method}): {human(g.bytes_before)} -> {human(g.bytes_after)}"
            )
        for rule, count in Counter(self.kept.values()).items():
            lines.append(f"  {count:5} left alone by {rule}")
        free = lambda n: f" of {human(n)} free" if n is not None else ""  # noqa: E731
        lines.append(
            f"  output {human(self.bytes_output)} ({self.bytes_output / max(self.bytes_source, 1):.0%} of the source)"
        )
        lines.append(
            f"  memory at most {human(self.memory)}{free(self.memory_free)}, "
            f"disk {human(self.disk)}{free(self.disk_free)}"
        )
        lines += [f"  engine {engines.line(row)}" for row in self.engine]
        lines += [f"  note: {text}" for text in self.warnings]
        return lines + [f"refused: {text}" for text in self.refusals]


def check(src: str | Path, recipe: Recipe, dst: str | Path | None = None) -> Preflight:
    """Looks at everything that can be known before work starts. FormatError or RecipeError for input that is wrong."""
    source = Checkpoint.open(src)
    infos = source.tensors
    where = str(source.path)
    found = walk.survey(
        source.config, {n: i.shape for n, i in infos.items()}, {n: i.dtype for n, i in infos.items()}, where
    )
    assignment = walk.assign(found, recipe)
    plan = _tensors(source, found, assignment)
    output = sum(nbytes_of(kind, shape) for kind, shape in plan.values())
    sides = sum(p.stat().st_size for p in source.side_files)
    by_rows = METHODS[recipe.rounding.method].by_rows
    disk, memory = output + sides + DISK_MARGIN, _memory(found, assignment, plan, by_rows)
    free_disk, free_memory = _disk_free(Path(dst)) if dst is not None else None, _memory_free()
    rows = tuple(engines.rows(recipe.serve, found, assignment))
    refusals = engines.refusals(rows, recipe.serve.sm)
    if recipe.serve.tp > 1:
        refusals += engines.splits(source.config, found, assignment, recipe.serve.tp)
    if free_disk is not None and disk > free_disk:
        refusals.append(
            f"{dst}: needs {human(disk)} of disk, {human(free_disk)} are free; free some or choose another --out"
        )
    if free_memory is not None and memory > free_memory:
        refusals.append(f"needs {human(memory)} of memory, {human(free_memory)} are free; close other programs")
    return Preflight(
        src=source.path,
        recipe=recipe,
        family=found.family.name,
        groups=tuple(_groups(source, found, assignment, recipe)),
        kept=assignment.kept,
        bytes_source=source.nbytes,
        bytes_output=output,
        memory=memory,
        memory_free=free_memory,
        disk=disk,
        disk_free=free_disk,
        engine=rows,
        refusals=tuple(refusals),
        warnings=tuple(_warnings(source, found, assignment, recipe)),
        source=source,
        found=found,
        assignment=assignment,
        tensors=plan,
    )


def _tensors(source: Checkpoint, found: Map, assignment: Assignment) -> TensorPlan:
    """dtype and shape of every output tensor, in the order of the source. FormatError names what does not divide."""
    linears = {x.tensor: x for x in found.linears if x.name in assignment.specs}
    plan: TensorPlan = {}
    for name, info in source.tensors.items():
        if name not in linears:
            plan[name] = (info.dtype, tuple(info.shape))
            continue
        linear = linears[name]
        try:
            parts = compressed_tensors.plan(linear.shape, assignment.specs[linear.name], found.dtype)
        except FormatError as error:
            raise FormatError(f"{info.file}: tensor {name} {list(linear.shape)}: {error}") from None
        plan |= {f"{linear.name}.{suffix}": part for suffix, part in parts.items()}
    return plan


def _groups(source: Checkpoint, found: Map, assignment: Assignment, recipe: Recipe) -> list[Group]:
    by_spec: dict[QuantSpec, list[Linear]] = {}
    for linear in found.linears:
        if linear.name in assignment.specs:
            by_spec.setdefault(assignment.specs[linear.name], []).append(linear)
    groups = []
    for spec, members in by_spec.items():
        before = sum(source.info(x.tensor).nbytes for x in members)
        after = sum(_packed(x, spec, found.dtype) for x in members)
        groups.append(Group(str(spec), recipe.rounding.method, len(members), before, after))
    return groups


def _packed(linear: Linear, spec: QuantSpec, dtype: torch.dtype) -> int:
    return sum(nbytes_of(kind, shape) for kind, shape in compressed_tensors.plan(linear.shape, spec, dtype).values())


def _memory(found: Map, assignment: Assignment, plan: TensorPlan, by_rows: bool) -> int:
    """Peak of a run: one packed weight, and on every thread one row range in work (about eight fp32 copies)."""
    largest = 0
    for linear in found.linears:
        if linear.name not in assignment.specs:
            continue
        n, k = linear.shape
        packed = _packed(linear, assignment.specs[linear.name], found.dtype)
        rows = min(n * k, (workers.count() + 1) * walk.ROW_WEIGHTS) if by_rows else n * k
        largest = max(largest, 2 * packed + 8 * 4 * rows)
    return RESIDENT + largest + 300 * len(plan)


def _memory_free() -> int | None:
    """Bytes that Linux could hand out now; None where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _disk_free(dst: Path) -> int:
    """Free bytes where `dst` will be: on the nearest folder above it that exists."""
    folder = dst.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _warnings(source: Checkpoint, found: Map, assignment: Assignment, recipe: Recipe) -> list[str]:
    notes = [f"{p.name} is left out: files of this kind are never opened" for p in source.skipped]
    head = assignment.specs.get("lm_head")
    if head is not None:
        notes.append(f"lm_head becomes {head}: few engines load a quantised head; most keep it at 16 bits")
    if "torch_dtype" not in source.config and "dtype" not in source.config:
        notes.append(
            f"config.json names no dtype; scales are stored as the weights, {str(found.dtype).removeprefix('torch.')}"
        )
    if (source.path / "report.json").exists():
        notes.append("report.json of the source gives way to ours")
    return notes
