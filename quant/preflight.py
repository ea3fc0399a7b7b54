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
from . import delegate, engines, fidelity, rounding, text, walk, workers
from .methods import METHODS, autoround, rotate
from .recipe import Recipe, RecipeError
from .report import human
from .walk import Assignment, Linear, Map

RESIDENT = 500_000_000  # bytes of Python and torch, loaded
RESIDENT_CALIBRATED = 1_100_000_000  # and transformers, with a model of its own on meta
HELD_OUT_TOKENS = 300_000  # of a text that is not read yet: the usual ones are no longer
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
    config: Mapping[str, Any] = field(repr=False)  # of the output
    windows: text.Windows | None = field(default=None, repr=False)
    dtype: torch.dtype = torch.float32  # of the arithmetic of calibrated methods
    rotation: rotate.Rotation | None = field(default=None, repr=False)
    untied: bool = False  # the output gets a head of its own where the source's is its embedding

    @property
    def kv(self) -> tuple[int, int, int]:
        """(key heads, query heads per key head, head size)."""
        return walk.kv_heads(self.source.config, str(self.src))

    @property
    def calibration(self) -> dict[str, Any]:
        """What was read for statistics; empty for data-free methods."""
        return {} if self.windows is None else {**self.windows.facts, "windows_sha256": self.windows.sha256}

    def method_of(self, linear: Linear) -> str:
        """The methods of a weight as one word, such as awq+gptq."""
        if linear.block is None and METHODS[self.recipe.rounding.method].calibrated:
            return "rtn"
        return "+".join(s.method for s in self.recipe.steps)

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
            "calibration": self.calibration,
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
        if self.windows is not None:
            n, t = self.windows.ids.shape
            lines.append(
                f"  calibration {self.calibration.get('source')}: {n} windows of {t} tokens, "
                f"arithmetic in {str(self.dtype).removeprefix('torch.')}"
            )
        lines += [f"  engine {engines.line(row)}" for row in self.engine]
        lines += [f"  note: {text}" for text in self.warnings]
        return lines + [f"refused: {text}" for text in self.refusals]


def check(src: str | Path, recipe: Recipe, dst: str | Path | None = None) -> Preflight:
    """Looks at everything that can be known before work starts. FormatError or RecipeError for input that is wrong."""
    source = Checkpoint.open(src)
    found = walk.of(source)
    assignment = walk.assign(found, recipe)
    plan = _tensors(source, found, assignment)
    output = sum(nbytes_of(kind, shape) for kind, shape in plan.values())
    rotation, untie = _rotation(source, found, recipe)
    if untie:
        embedding = source.info("model.embed_tokens.weight")
        plan["lm_head.weight"] = (embedding.dtype, tuple(embedding.shape))
        output += embedding.nbytes
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    if untie:
        config["tie_word_embeddings"] = False
    config["quantization_config"] = compressed_tensors.config(dict(assignment.specs), sorted(assignment.kept))
    windows, dtype = None, torch.float32
    if recipe.calibrated:
        windows, dtype = _windows(source, recipe), dtype_of(recipe.run.dtype, found.dtype)
    sides = sum(p.stat().st_size for p in source.side_files)
    by_rows = METHODS[recipe.rounding.method].by_rows
    disk, memory = output + sides + DISK_MARGIN, _memory(found, assignment, plan, by_rows)
    if windows is not None:
        if METHODS[recipe.rounding.method].whole:
            dtype = torch.float32
            more = delegate.needs(source, found, assignment, recipe, windows)
            memory, disk = max(memory, RESIDENT_CALIBRATED + more[0]), disk + more[1]
        else:
            disk += 4 * windows.ids.numel() * int(source.config["hidden_size"]) * dtype.itemsize
            memory = max(memory, _memory_calibrated(source, found, recipe, dtype))
    if recipe.verify.level in ("blocks", "model"):
        tokens = HELD_OUT_TOKENS
        memory = max(memory, RESIDENT_CALIBRATED + fidelity.memory(source, found, tokens))
        disk += fidelity.disk(source, tokens)
        if recipe.verify.on_red == "promote":
            disk += 2 * output  # the red checkpoint stays until a better one is checked
    free_disk, free_memory = disk_free(Path(dst)) if dst is not None else None, _memory_free()
    rows = tuple(engines.rows(recipe.serve, found, assignment))
    refusals = engines.refusals(rows, recipe.serve.sm)
    if METHODS[recipe.rounding.method].whole and (reason := autoround.missing()) is not None:
        refusals.append(reason)
    if recipe.serve.tp > 1:
        refusals += engines.splits(source.config, found, assignment, recipe.serve.tp)
    if free_disk is not None and disk > free_disk:
        refusals.append(
            f"{dst}: needs {human(disk)} of disk, {human(free_disk)} are free; free some or choose another --out"
        )
    if free_memory is not None and memory > free_memory:
        remedy = ", or take --method gptq, one block at a time" if METHODS[recipe.rounding.method].whole else ""
        refusals.append(f"needs {human(memory)} of memory, {human(free_memory)} are free; close other programs{remedy}")
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
        config=config,
        windows=windows,
        dtype=dtype,
        rotation=rotation,
        untied=untie,
    )


def _rotation(source: Checkpoint, found: Map, recipe: Recipe) -> tuple[rotate.Rotation | None, bool]:
    """(the rotation that the recipe wants, whether it needs an output head of its own). RecipeError: not this model."""
    options = next((dict(s.options) for s in recipe.transforms if s.method == "rotate"), None)
    if options is None:
        return None, False
    why = rotate.refusal(source.config, untie=bool(options["untie"]))
    if why is not None:
        raise RecipeError(why)
    heads, group, d = walk.kv_heads(source.config, str(source.path))
    hidden, layers = int(source.config["hidden_size"]), int(source.config["num_hidden_layers"])
    made = rotate.plan(hidden, heads * group, heads, d, layers, seed=options["seed"], values=options["values"])
    return made, found.tied and "lm_head.weight" not in source.tensors


def dtype_of(wanted: str, model: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: `auto` is the model's where this machine multiplies such numbers faster than fp32."""
    if wanted == "float32" or model == torch.float32:
        return torch.float32
    if wanted == "model":
        return model
    cpu = torch.cpu
    fast = cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported() if model == torch.bfloat16 else False
    return model if fast else torch.float32


def _windows(source: Checkpoint, recipe: Recipe) -> text.Windows:
    """The calibration windows of a recipe. RecipeError or FormatError name what is wrong with the text."""
    config, positions = source.config, source.config.get("max_position_embeddings")
    found = text.windows(recipe.calibration, source.path, int(config["vocab_size"]), positions)
    if found.ids.numel() == 0:
        raise RecipeError("the calibration text gives no window; give more text")
    return found


def _memory_calibrated(source: Checkpoint, found: Map, recipe: Recipe, dtype: torch.dtype) -> int:
    """Peak of a calibrated run: a block in the dtype of the arithmetic, its codes, statistics, what is being rounded."""
    size, peak = dtype.itemsize, 0
    early = bool(recipe.transforms) or recipe.run.passes == "block"
    for block in found.blocks():
        weights = sum(x.shape[0] * x.shape[1] for x in block)
        inputs = {(x.together, x.shape[1]): x.shape[1] for x in block if ".experts." not in x.name}
        routed = [x.shape[1] for x in block if ".experts." in x.name and x.name.endswith("down_proj")]
        if routed:
            inputs["experts", 0] = next(x.shape[1] for x in block if x.name.endswith("gate_proj"))
        grams = sum(k * k for k in inputs.values()) if early else max(k * k for k in inputs.values())
        largest = max(k * k * (40 if k <= 4096 else 20) for k in inputs.values())  # being factored
        by_expert = sum(4 * k * k + 4 * 512 * k for k in routed)
        statistics = 4 * grams + 2 * by_expert  # as they are collected, and as they are handed on
        job = min(max(x.shape[0] * x.shape[1] for x in block), rounding.MOST_WEIGHTS)
        at_work = (workers.count() + 1) * 8 * 4 * job + 2 * 4 * max(x.shape[0] * x.shape[1] for x in block)
        beside = weights * size if recipe.run.target == "float" and recipe.run.passes == "sublayer" else 0
        shift = 4 * max(k * k for k in inputs.values()) if beside else 0  # between the inputs of both chains
        peak = max(peak, weights * (size + 1) + beside + shift + statistics + max(largest, at_work))
    embedding = source.info("model.embed_tokens.weight")
    return RESIDENT_CALIBRATED + max(peak, embedding.nbytes * (1 + size // embedding.dtype.itemsize))


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
        groups.append(Group(str(spec), "+".join(s.method for s in recipe.steps), len(members), before, after))
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


def disk_free(dst: Path) -> int:
    """Free bytes where `dst` will be: on the nearest folder above it that exists."""
    folder = dst.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _warnings(source: Checkpoint, found: Map, assignment: Assignment, recipe: Recipe) -> list[str]:
    notes = [f"{p.name} is left out: files of this kind are never opened" for p in source.skipped]
    if METHODS[recipe.rounding.method].whole:
        notes.append(f"{recipe.rounding.method} holds the whole model in memory at once, in fp32; nothing streams")
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
