"""The dry run of a recipe with several stages: every stage is checked before the first one starts, on models that are not there yet.

What a stage will write is known but for its weights: config, names, dtypes and shapes. So its dry run leaves a ghost behind, a
checkpoint whose files have true headers and no bytes (sparse: they take no room), and the next stage's own dry run reads that.
A capture leaves one as well: as many windows as the text has; of completions as many as there can be.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..formats.checkpoint import Checkpoint
from ..formats.header import nbytes_of, print_header, read_header
from ..formats.spec import FormatError
from ..kernels.op import Unsupported
from . import capture, completions, distill_plan, heldout, output, preflight, prune_plan, vocabulary
from .capture_cache import FACTS, SCHEMA, WINDOWS, columns, shard_name
from .distill_match import PRUNED
from .fidelity import window_of
from .fields import RecipeError
from .keep import Keep
from .prune_child import Child
from .prune_plan import Cost
from .report import human
from .stages import MAKES_CHILD, SOURCE, Stage, Stages

Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
SHAPE = ".weight_shape"
_SIDE = 64 << 20  # bytes of a side file that a ghost gets a copy of


class Refused(RuntimeError):
    """A dry run of one of the stages says no, or asks something. Exit code 3."""

    code = 3


@dataclass(frozen=True)
class Step:
    """What a stage would do. student: the stage whose child it works on, or `source`; origin: where that one's 16-bit weights are.
    Bytes: of its output, and of what it needs on the disk meanwhile. refusals: why the recipe should not start, with remedies."""

    stage: Stage
    words: str
    student: str
    origin: str
    bytes: int = 0
    work: int = 0
    quantised: bool = False
    refusals: tuple[str, ...] = ()
    question: str = ""
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "stage": self.stage.name,
            "verb": self.stage.kind,
            "of": self.student,
            "teachers": list(self.stage.teachers),
            "words": self.words,
            "bytes": self.bytes,
            "work_bytes": self.work,
            "refusals": list(self.refusals),
            "question": self.question,
            "warnings": list(self.warnings),
        }


@dataclass
class Planner:
    """Dry runs of all stages in order. source: folder of the model; out: where the stages' folders go; ghosts: an empty folder."""

    recipe: Stages
    source: Path
    out: Path
    ghosts: Path
    cost: Callable[[Mapping[str, Any]], Cost] | None = None  # card, spec, users, ctx -> what a child costs
    child: str = SOURCE
    origins: dict[str, str] = field(default_factory=dict)  # a quantised child -> where its 16-bit weights are
    places: dict[str, Path] = field(default_factory=dict)

    def run(self) -> list[Step]:
        """A Step for each stage. FormatError or RecipeError, with the stage in front, for what cannot be."""
        self.places[SOURCE] = self.source
        self._text()
        steps = []
        for number, stage in enumerate(self.recipe.stages, 1):
            try:
                if stage.kind in (*MAKES_CHILD, "capture"):
                    output.refuse(self.source, self.out / stage.name, force=True)
                step = getattr(self, f"_{stage.kind}")(stage)
            except (FormatError, RecipeError, Unsupported, FileExistsError) as error:
                words = str(error).replace(str(self.ghosts), str(self.out))
                raise type(error)(f"stage {number} of {len(self.recipe.stages)} ({stage.name}): {words}") from None
            steps.append(step)
            if stage.kind in MAKES_CHILD:
                self.child = stage.name
                if step.quantised:
                    self.origins[stage.name] = step.origin
        return steps

    def _text(self) -> None:
        """The held-out text is read to its end: it is short."""
        check = self.recipe.check
        if check.text is not None:
            opened = Checkpoint.open(self.source)
            vocab = int(opened.config.get("vocab_size") or 0)
            heldout.read(check.text, self.source, vocab, window_of(opened.config), check.tokens)

    def _step(self, stage: Stage, words: str, **more: Any) -> Step:
        return Step(stage, words, self.child, self.origins.get(self.child, self.child), **more)

    def _teachers(self, stage: Stage) -> list[Path]:
        folders = [self.places.get(name) or Path(name).expanduser() for name in stage.teachers]
        for name, folder in zip(stage.teachers, folders, strict=True):
            if not folder.is_dir():
                known = ", ".join(self.places)
                raise FormatError(f"teacher {name}: no such folder; give one, or one of {known}")
        return folders

    def _prune(self, stage: Stage) -> Step:
        cost = self.cost(stage.cost) if self.cost is not None and stage.cost else None
        plan = prune_plan.plan(self.places[self.child], stage.wish, cost=cost)
        source = plan.source
        keep = prune_plan.any_keep(plan.sizes, plan.given)
        child = Child(plan.found, source.config, plan.sizes, plan.given, keep)
        shapes = {n: i.shape for n, i in source.tensors.items()}
        tensors = {c.name: (source.info(n).dtype, c.shape(shapes[n])) for n, c in child.tensors(shapes)}
        report = {PRUNED: json.dumps({"kept_layers": list(keep.layers)})}
        size = self._ghost(stage.name, plan.child_config, tensors, source, report)
        cuts = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in plan.cuts.items())
        words = f"{cuts}; {plan.parameters:,} parameters become {plan.child_parameters:,} ({plan.child_parameters / plan.parameters:.1%})"
        later = [s.kind for s in self.recipe.stages[self.recipe.stages.index(stage) :]]
        told = tuple(w for w in plan.warnings if "distill" not in later or "distil it" not in w)
        return self._step(stage, words, bytes=size, warnings=told)

    def _capture(self, stage: Stage) -> Step:
        folder, wish = self._teachers(stage)[0], dict(stage.wish)
        if "data" in wish:
            text = capture.plan(folder, wish.pop("data"), **wish)
            windows, rows, k = text.stream.windows, text.stream.rows, text.k
            lengths = [text.stream.window] if text.stream.window else []
            teacher, work = text.teacher, text.to_dict()["work_bytes"]
            words = f"{rows:,} tokens in {windows:,} windows of {text.stream.window}, k = {k}"
            self._ghost_capture(stage.name, teacher, k, rows, lengths, windows)
        else:
            keep = Keep.parse(wish.pop("keep", None), wish.pop("keep_timeout", 10.0))
            plan = completions.plan(folder, wish.pop("generate"), keep=keep, **wish)
            lengths = [len(p.ids) + plan.room(p) for p in plan.prompts for _ in range(plan.n)]
            windows, rows, k, teacher, work = len(lengths), sum(lengths), plan.k, plan.teacher, 0
            words = f"{windows:,} completions of {len(plan.prompts):,} prompts, at most {rows:,} tokens, k = {k}"
            self._ghost_capture(stage.name, teacher, k, rows, lengths, windows)
        size = rows * capture.row_bytes(k)
        return self._step(stage, f"{stage.teachers[0]}: {words}", bytes=size, work=work)

    def _distill(self, stage: Stage) -> Step:
        plan = distill_plan.plan(self.places[self.child], self._teachers(stage), stage.wish)
        wish, steps = stage.wish, None
        if wish.steps is not None or wish.tokens is not None:
            steps = plan.steps(0)
        length = "once through the text" if steps is None else f"{steps:,} steps"
        need = plan.memory
        words = (
            f"{self.child} learns from {' and '.join(stage.teachers)}: {plan.objective.kind}, {length} of {wish.batch} x {plan.window} tokens; "
            f"memory {human(sum(need.values()))} without activations"
        )
        size = plan.student.nbytes
        if plan.qad is not None:
            words = f"{' and '.join(plan.qad.to_dict()['train'])} of {plan.qad.spec}, from {plan.qad.words}; {words}"
        if plan.qad is not None and plan.qad.recipe is not None:
            made = preflight.check(self.places[self.child], plan.qad.recipe)
            size = self._ghost(stage.name, made.config, made.tensors, plan.student)
        else:
            tensors = {name: (info.dtype, info.shape) for name, info in plan.student.tensors.items()}
            self._ghost(stage.name, plan.student.config, tensors, plan.student)
        told = plan.warnings
        states = 2 * 12 * plan.parameters[0]  # parameter and two moments in fp32; one state while the next is written
        return self._step(
            stage, words, bytes=size, work=states, question=plan.question, warnings=told, quantised=plan.qad is not None
        )

    def _quantize(self, stage: Stage) -> Step:
        plan = preflight.check(self.places[self.child], stage.wish, self.out / stage.name)
        size = self._ghost(stage.name, plan.config, plan.tensors, plan.source)
        groups = ", ".join(f"{g.modules} modules {g.spec} by {g.method}" for g in plan.groups)
        words = (
            f"{groups}; {human(plan.bytes_source)} -> {human(plan.bytes_output)}, memory at most {human(plan.memory)}"
        )
        return self._step(
            stage,
            words,
            bytes=size,
            work=max(0, plan.disk - size),
            refusals=plan.refusals,
            warnings=plan.warnings,
            quantised=True,
        )

    def _verify(self, stage: Stage) -> Step:
        if self.child not in self.origins:
            raise FormatError(
                f"{self.child} is not quantised, there is nothing to open again; put verify behind quantize"
            )
        words = f"{self.child} against {self.origins[self.child]}, level {stage.wish['level']}"
        return self._step(stage, words)

    def _bench(self, stage: Stage) -> Step:
        config = Checkpoint.open(self.source).config
        limit, wish = int(config.get("max_position_embeddings") or 0), stage.wish
        new = wish.get("new", 32)
        if limit and new >= limit:
            raise FormatError(f"new {new}: does not fit the context of {limit}; give fewer")
        found = self.child if wish["of"] == "last" else "every child"
        return self._step(stage, f"{found} against the model in FP16, {new} tokens a round")

    # Ghosts -------------------------------------------------------------------------------------------------------------

    def _ghost(
        self,
        name: str,
        config: Mapping[str, Any],
        tensors: Tensors,
        source: Checkpoint,
        extra: Mapping[str, str] | None = None,
    ) -> int:
        """A checkpoint without bytes that later dry runs read; the bytes of its tensors."""
        folder = self.places[name] = self.ghosts / name
        folder.mkdir()
        for path in source.side_files:
            if path.stat().st_size <= _SIDE:
                target = folder / path.relative_to(source.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        (folder / "config.json").write_text(json.dumps(config))
        for file, text in (extra or {}).items():
            (folder / file).write_text(text)
        weights = folder / "model.safetensors"
        _sparse(weights, tensors)
        _write_shapes(weights, source)
        return sum(nbytes_of(dtype, shape) for dtype, shape in tensors.values())

    def _ghost_capture(
        self, name: str, teacher: capture.Teacher, k: int, rows: int, lengths: list[int], windows: int
    ) -> None:
        """A capture without bytes. lengths: of each window, or the one that all have."""
        folder = self.places[name] = self.ghosts / name
        folder.mkdir()
        shutil.copyfile(teacher.words.path, folder / vocabulary.FILE)
        one = lengths[0] if len(lengths) == 1 and windows * lengths[0] == rows else None
        if one is None:
            counts = torch.tensor(lengths, dtype=torch.int32)
            save_file({"length": counts, "prompt": torch.zeros_like(counts)}, folder / WINDOWS)
        _sparse(folder / shard_name(0), {n: (d, (rows, *width)) for n, (d, width) in columns(k).items()})
        facts = {
            "schema": SCHEMA,
            "verb": "capture",
            "k": k,
            "vocab": teacher.vocab,
            "teacher": {"name": teacher.source.path.name, "sha256": str(teacher.source.path)},
            "tokenizer": {"sha256": teacher.words.sha256, "tokens": len(teacher.words)},
            "packing": {"window": one, "windows": windows},
            "shards": [{"file": shard_name(0), "rows": rows, "bytes": rows * capture.row_bytes(k), "sha256": ""}],
            "files": [],
        }
        (folder / FACTS).write_text(json.dumps(facts))


def _sparse(path: Path, tensors: Tensors) -> None:
    """A safetensors file with its header and its length; the bytes between take no room."""
    header, ranges = print_header(tensors)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max((begin + size for begin, size in ranges.values()), default=len(header)))


def _write_shapes(path: Path, source: Checkpoint) -> None:
    """Of packed weights the shape stands in a tensor of its own, which a ghost has to have. source: before or after packing."""
    with path.open("r+b") as file:
        for name, info in read_header(path).items():
            if not name.endswith(SHAPE):
                continue
            weight = name.removesuffix("_shape")
            held = source.read(name) if name in source.tensors else torch.tensor(source.info(weight).shape)
            file.seek(info.begin)
            file.write(held.to(info.dtype).numpy().tobytes())


def needs(steps: list[Step]) -> int:
    """Bytes of disk: what stays, and the most that a stage needs beside it."""
    return sum(step.bytes for step in steps) + max((step.work for step in steps), default=0)


def room(out: Path, steps: list[Step]) -> str:
    """Why there is too little of the disk, "" when there is enough."""
    free, need = preflight.disk_free(out), needs(steps)
    if need <= free:
        return ""
    return (
        f"{out}: all stages need {human(need)} of disk, {human(free)} are free; free some or choose another output.dir"
    )
