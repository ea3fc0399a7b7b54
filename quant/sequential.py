"""Calibrated quantisation, one decoder block at a time: what a text shows, transforms, rounding, and on to the next block.

    for each block:   1. statistics of every input in the untouched block       (only when transforms, or pass: block)
                      2. transforms: scales between norms and linears, applied to the weights
                      3. per stage {q,k,v}, {o}, {gate,up}, {down}: statistics of its input as the linears rounded so
                         far make it, against the same input in the float model, then rounding
                      4. the block's output through quantised weights is the next block's input

Weights of one block are in memory, activations lie on disk. A finished block is in the output and in the journal before
the next one starts.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..formats import affine
from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError, QuantSpec
from . import blocks, calibrate, rounding
from .blocks import Block, Frame
from .calibrate import Collector
from .methods import METHODS
from .methods.records import LinearGroup, Stats
from .progress import Meter
from .recipe import Recipe, Step
from .rounding import Done, Wanted
from .spill import Spill, SpillWriter
from .transforms import INPUT_NORM, POST_NORM, UP, Transforms, V, settled
from .walk import Assignment, Linear, Map

FLOAT = "float"  # the chain of the model as it was
TOKENS_AT_ONCE = 2048  # of one forward call
BLEND_TOKENS = 256  # pseudo-tokens that an expert is given of what all tokens would show it


@dataclass(eq=False)
class Made:
    """What became of a block: its rounded weights in order, what transforms say of each module, tokens per expert, and
    the sha256 of what the next block reads."""

    done: list[Done] = field(default_factory=list)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)


class Sequential:
    """Quantises the blocks of `source` by `recipe`, in order. `transforms` grows as it goes.

    ids int64 [n, T]: the calibration windows. work: a folder for activations.
    """

    def __init__(
        self,
        source: Checkpoint,
        found: Map,
        assignment: Assignment,
        recipe: Recipe,
        transforms: Transforms,
        ids: torch.Tensor,
        dtype: torch.dtype,
        work: Path,
        meter: Meter,
    ) -> None:
        self.source, self.found, self.specs, self.recipe = source, found, assignment.specs, recipe
        self.transforms, self.ids, self.dtype, self.work, self.meter = transforms, ids, dtype, work, meter
        where = str(source.path)
        blocks.check(source.config, found, where)
        self.frame = Frame(source.config, found, dtype, where)
        self.batch = max(1, TOKENS_AT_ONCE // ids.shape[1])
        self.shape = (ids.shape[0], ids.shape[1], int(source.config["hidden_size"]))
        # A second chain, of the float model, to make good for what the blocks before have spoilt.
        corrects = METHODS[recipe.rounding.method].correct is not None
        self.beside = recipe.run.target == "float" and recipe.run.passes == "sublayer" and corrects
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    # -- activations

    def file(self, index: int, chain: str = "act") -> Path:
        """The input of block `index`, for all windows."""
        return self.work / f"{chain}-{index:05d}.safetensors"

    def files(self, index: int) -> list[Path]:
        """The inputs of block `index` in all chains."""
        return [self.file(index, chain) for chain in (("act", FLOAT) if self.beside else ("act",))]

    def begin(self) -> None:
        """Writes the first block's input."""
        embedding = self.read("model.embed_tokens.weight")
        with SpillWriter(self.file(0), self.dtype, self.shape) as out:
            for start in range(0, self.shape[0], self.batch):
                out.add(self.frame.start(self.ids[start : start + self.batch], embedding)[0])
        if self.beside:
            shutil.copyfile(self.file(0), self.file(0, FLOAT))

    def _batches(self, index: int, chain: str = "act") -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """(input [B, T, H], arguments) of block `index`, window after window."""
        spill = Spill(self.file(index, chain))
        for start in range(0, self.shape[0], self.batch):
            x = spill.read(start, min(self.shape[0], start + self.batch))
            if len(x) not in self._arguments:
                self._arguments[len(x)] = self.frame.arguments(len(x), self.shape[1])
            yield x, self._arguments[len(x)][index]

    def _show(self, block: Block, watchers: dict[str, Collector], stop_at: str | None = None) -> None:
        """Runs the block over all windows; watchers see the inputs of linears, nothing behind `stop_at` runs."""

        def watch(name: str) -> Callable[[torch.Tensor], None]:
            def see(x: torch.Tensor) -> None:
                if name in watchers:
                    watchers[name].add(x)
                if name == stop_at:
                    raise blocks.Stop

            return see

        names = [*watchers, *([stop_at] if stop_at is not None and stop_at not in watchers else [])]
        with block.watching({name: watch(name) for name in names}):
            for x, arguments in self._batches(block.index):
                try:
                    block.forward(x, arguments)
                except blocks.Stop:
                    pass
                except FormatError as error:
                    raise FormatError(f"{self.source.path}: block {block.index}: {error}") from None

    # -- weights

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the transformed model in the dtype of the arithmetic."""
        if self.transforms.touches(name):
            return self.exact(name).to(self.dtype)
        return self.source.read(name).to(self.dtype)

    def exact(self, name: str) -> torch.Tensor:
        """The same in fp32."""
        return self.transforms.apply(name, self.source.read(name), self.source.read)

    # -- a block

    def block(self, index: int) -> Made:
        """Quantises block `index` and writes the next one's input; every step is a function of the text and the recipe."""
        block = self.frame.block(index, self.read)
        made = Made()
        stages = self._stages(block)
        early: dict[str, Stats] = {}
        bounds: dict[str, torch.Tensor] = {}
        if self.recipe.transforms or self.recipe.run.passes == "block":
            early = self._early(block, stages)
            bounds = self._transform(block, early, made)
        float_block = self.frame.block(index, self.read) if self.beside else None  # transformed, not rounded
        for number, stage in enumerate(stages):
            specs = {self.specs[x.name] for x in stage if x.name in self.specs}
            members = [x for x in stage if x.name in self.specs]
            self.meter.add(0, f"block {index + 1} of {len(self.frame)}, {_leaves(stage)}")
            if not members:
                continue
            (spec,) = specs
            if _is_down(stage):
                self._experts_down(block, members, spec, early, bounds, made)
                continue
            key = _input(block, stage)
            stats = early.get(key) if number == 0 or self.recipe.run.passes == "block" else None
            shift = None
            if float_block is not None:
                stats, shift = self._against_float(block, float_block, key, self._seed(index, number))
            elif stats is None:
                watcher = Collector(stage[0].shape[1], self._seed(index, number))
                self._show(block, {key: watcher}, stop_at=key)
                stats = watcher.stats()
            early[key] = stats
            self._round(block, members, stats, spec, bounds, made, shift)
        self._advance(block, made, float_block)
        return made

    def _against_float(self, block: Block, beside: Block, key: str, seed: int) -> tuple[Stats, torch.Tensor]:
        """Statistics of an input x' of the chain that is quantised so far, and sum x x'^T - x' x'^T, fp32 [K, K], with x
        the same input in the float model."""
        shift: torch.Tensor | None = None
        watcher: Collector | None = None
        for (x, arguments), (y, _) in zip(self._batches(block.index), self._batches(block.index, FLOAT), strict=True):
            ours, theirs = self._input_at(block, key, x, arguments), self._input_at(beside, key, y, arguments)
            if watcher is None or shift is None:
                watcher = Collector(ours.shape[1], seed)
                shift = torch.zeros(ours.shape[1], ours.shape[1])
            try:
                watcher.add(ours)
            except FormatError as error:
                raise FormatError(f"{self.source.path}: block {block.index}: {error}") from None
            shift.addmm_((theirs - ours).T, ours)
        assert watcher is not None and shift is not None
        return watcher.stats(), shift

    def _input_at(self, block: Block, key: str, x: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """What the linear `key` reads when the block reads x: fp32 [tokens, K]."""
        seen: list[torch.Tensor] = []

        def see(value: torch.Tensor) -> None:
            seen.append(value.reshape(-1, value.shape[-1]).float())
            raise blocks.Stop

        with block.watching({key: see}), contextlib.suppress(blocks.Stop):
            block.forward(x, arguments)
        return seen[0]

    def _seed(self, index: int, number: int) -> int:
        return self.recipe.calibration.seed * 1_000_003 + index * 1009 + number

    def _stages(self, block: Block) -> list[list[Linear]]:
        """The linears of a block by common input, in order of execution; of a mixture all gates and ups, then all downs."""
        mine = [x for x in self.found.linears if x.block == block.index]
        dense: dict[str, list[Linear]] = {}
        for x in mine:
            kind = x.together
            if ".experts." in x.name:
                kind += " down" if x.name.endswith("down_proj") else " gate_up"
            dense.setdefault(kind, []).append(x)
        return list(dense.values())

    def _round(
        self,
        block: Block,
        members: list[Linear],
        stats: Stats,
        spec: QuantSpec,
        bounds: dict[str, torch.Tensor],
        made: Made,
        shift: torch.Tensor | None = None,
    ) -> None:
        wanted = [Wanted(x, lambda x=x: self.exact(x.tensor), bounds.get(x.name)) for x in members]  # type: ignore[misc]
        for done in rounding.round_all(self.recipe.rounding, wanted, stats, spec, self.found.dtype, shift):
            self._take(block, done, made)

    def _take(self, block: Block, done: Done, made: Made) -> None:
        block.put(done.linear.name, done.tensor)
        made.done.append(done)
        self.meter.add(self.source.info(done.linear.tensor).nbytes, f"block {block.index + 1}: {done.linear.name}")

    def _experts_down(
        self,
        block: Block,
        members: list[Linear],
        spec: QuantSpec,
        early: dict[str, Stats],
        bounds: dict[str, torch.Tensor],
        made: Made,
    ) -> None:
        """The last matrix of each expert, by what its own tokens show, or all tokens, or both (recipe: experts)."""
        assert block.experts is not None
        experts, policy, whole = block.experts, self.recipe.experts, f"{block.prefix}mlp.experts"
        if self.recipe.run.passes == "block":
            by_expert = {x.name: early[x.name] for x in members}
        else:
            by_expert = self._expert_stats(block, members)
        counts = experts.tokens.tolist()
        made.tokens = counts
        mean: torch.Tensor | None = None
        if policy == "blend":  # gate and up are kept at 16 bits: nobody has looked at their input yet
            mean = (early[whole] if whole in early else self._sample_of(block, whole)).sample
        for x in members:
            stats, expert = by_expert[x.name], int(x.name.split(".")[-2])
            if mean is not None:
                seen = Collector(x.shape[1], self._seed(block.index, 7))
                seen.add(experts.inner(expert, mean.to(self.dtype)))
                stats = calibrate.blended(stats, seen.stats(), BLEND_TOKENS)
            few = policy == "routed" and counts[expert] < max(32, x.shape[1] // 64)
            if few:
                stats = Stats(torch.zeros_like(stats.gram), stats.absmax, stats.absmean, stats.sample[:0], 0)
            self._round(block, [x], stats, spec, bounds, made)
            if few:
                made.done[-1].facts.setdefault("fallbacks", [])
                made.done[-1].facts["fallbacks"] = [f"{counts[expert]} tokens reached it: rounded to nearest"]

    def _sample_of(self, block: Block, name: str) -> Stats:
        watcher = Collector(self.shape[2], self._seed(block.index, 8), gram=False)
        self._show(block, {name: watcher}, stop_at=name)
        return watcher.stats()

    def _expert_stats(self, block: Block, members: list[Linear]) -> dict[str, Stats]:
        """What each expert's last matrix sees: of its own tokens, or of all (policy `all`)."""
        assert block.experts is not None
        experts = block.experts
        watchers = {x.name: Collector(x.shape[1], self._seed(block.index, 6)) for x in members}
        experts.tokens.zero_()
        if self.recipe.experts != "all":
            self._show(block, watchers)
            return {name: w.stats() for name, w in watchers.items()}

        class Everywhere(Collector):
            """Sends all tokens through every expert."""

            def add(self, x: torch.Tensor) -> None:
                for name, watcher in watchers.items():
                    watcher.add(experts.inner(int(name.split(".")[-2]), x))

        self._show(block, {f"{block.prefix}mlp.experts": Everywhere(self.shape[2], 0, gram=False)})
        return {name: w.stats() for name, w in watchers.items()}

    def _advance(self, block: Block, made: Made, float_block: Block | None) -> None:
        """Writes the input of the next block, in the float chain too."""
        if block.index + 1 == len(self.frame):
            return
        for one, chain in ((block, "act"), (float_block, FLOAT)):
            if one is None:
                continue
            with SpillWriter(self.file(block.index + 1, chain), self.dtype, self.shape) as out:
                for x, arguments in self._batches(block.index, chain):
                    y = one.forward(x, arguments)
                    if not bool(torch.isfinite(y).all()):
                        raise FormatError(
                            f"{self.source.path}: block {block.index} gives NaN or Inf; its weights do not fit "
                            f"{self.dtype}, say run: {{dtype: float32}} in the recipe, or repair the source"
                        )
                    out.add(y)
            made.activations.append(out.sha256)

    # -- transforms

    def _early(self, block: Block, stages: list[list[Linear]]) -> dict[str, Stats]:
        """Statistics of every input in the untouched block, one pass."""
        watchers: dict[str, Collector] = {}
        for number, stage in enumerate(stages):
            if _is_down(stage):
                watchers |= {x.name: Collector(x.shape[1], self._seed(block.index, number)) for x in stage}
            else:
                watchers[_input(block, stage)] = Collector(stage[0].shape[1], self._seed(block.index, number))
        if block.experts is not None:
            block.experts.tokens.zero_()
        self.meter.add(0, f"block {block.index + 1} of {len(self.frame)}, statistics")
        self._show(block, watchers)
        return {name: w.stats() for name, w in watchers.items()}

    def _pairs(
        self, block: Block, stages: list[list[Linear]], early: dict[str, Stats]
    ) -> Iterator[tuple[str, LinearGroup]]:
        """(key of the scale, readers and statistics) of each place where a scale can stand between two tensors."""
        p, heads = block.prefix, self.transforms.kv

        def group(members: list[Linear], key: str, others: tuple[str, ...] = (), **more: Any) -> LinearGroup:
            readers = {x.name: self.exact(x.tensor) for x in members}
            readers |= {name: self.exact(f"{name}.weight") for name in others}
            specs = {x.name: self.specs[x.name] for x in members if x.name in self.specs}
            return LinearGroup(readers, specs, early[key], **more)

        for stage in stages:
            first = stage[0]
            leaf = first.name.rpartition(".")[2]
            names = tuple(x.name for x in stage)
            if leaf == "q_proj":
                yield (
                    f"{p}{INPUT_NORM}",
                    group(stage, first.name, clips=tuple(n for n in names if n.endswith("v_proj"))),
                )
            elif leaf == "o_proj":
                yield f"{p}{V}", group(stage, first.name, ties=heads, clips=names)
            elif leaf == "gate_proj":
                router = (f"{p}mlp.gate",) if ".experts." in first.name else ()
                yield f"{p}{POST_NORM}", group(stage, _input(block, stage), router, clips=names)
            elif leaf == "down_proj":
                for x in stage:
                    yield f"{x.name.removesuffix('down_proj')}{UP}", group([x], x.name, clips=(x.name,))

    def _transform(self, block: Block, early: dict[str, Stats], made: Made) -> dict[str, torch.Tensor]:
        """Finds and applies the scales of a block; the bounds for rounding by module name. `early` becomes scaled."""
        bounds: dict[str, torch.Tensor] = {}
        stages = self._stages(block)
        for step in self.recipe.transforms:
            method = METHODS[step.method]
            if method.kind != "transform" or step.method == "rotate":
                continue
            for key, pair in self._pairs(block, stages, early):
                spec = next(iter(pair.specs.values()), None)
                if spec is None or not _suits(step.method, key):
                    continue
                dtype = affine.scale_dtype_of(spec, self.found.dtype)
                found = method.run(pair, spec, scale_dtype=dtype, **self._options(step))
                before = self.transforms.scales.pop(key, torch.ones_like(found.scale))
                whole = before * found.scale
                if key.endswith((INPUT_NORM, POST_NORM)):
                    kind = self.source.info(f"{key}.weight").dtype
                    whole = settled(self.exact(f"{key}.weight").to(kind), whole)
                self.transforms.scales[key] = whole
                bounds |= dict(found.bounds)
                for name in pair.specs:
                    made.notes.setdefault(name, {})[step.method] = found.facts
                for name in {*pair.readers, _input_of(block, next(iter(pair.readers)))} & early.keys():
                    early[name] = early[name].scaled(whole / before)
        for name in self._touched(block):
            block.put(
                name.removesuffix(".weight") if name.removesuffix(".weight") in block.slots else name, self.read(name)
            )
        return bounds

    def _options(self, step: Step) -> dict[str, Any]:
        """The options of a transform; AWQ weighs errors as the rounding that follows does, and leaves to it what it searches."""
        options, rounding_ = dict(step.options), self.recipe.rounding
        if options.get("loss") == "auto":
            options["loss"] = "gptq" if rounding_.method == "gptq" else "gram"
            options["clip"] &= dict(rounding_.options).get("scales") != "weighted"
        return options

    def _touched(self, block: Block) -> list[str]:
        return [n for n in self.source.names if n.startswith(block.prefix) and self.transforms.touches(n)]


def _suits(method: str, key: str) -> bool:
    """SmoothQuant stands between norms and linears only."""
    return method != "smoothquant" or key.endswith((INPUT_NORM, POST_NORM))


def _is_down(stage: list[Linear]) -> bool:
    return ".experts." in stage[0].name and stage[0].name.endswith("down_proj")


def _input(block: Block, stage: list[Linear]) -> str:
    """Where the input of a stage is seen."""
    return _input_of(block, stage[0].name)


def _input_of(block: Block, name: str) -> str:
    if ".experts." in name and not name.endswith("down_proj"):
        return f"{block.prefix}mlp.experts"
    return name


def _leaves(stage: list[Linear]) -> str:
    return ", ".join(dict.fromkeys(x.name.rpartition(".")[2].removesuffix("_proj") for x in stage))
