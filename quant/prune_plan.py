"""What pruning would do, from config and headers alone: the wish, the sizes that it becomes, what a reader must know before."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError
from . import text, walk
from .methods import depth
from .prune_child import Child, Keep
from .prune_sizes import ENDS, Rule, Sizes, align, changed, path
from .text import Calibration
from .walk import Map

DEPTH_SCORES, WIDTH_SCORES = (*depth.SCORES, "random"), ("activation", "random")
MOST = 1 / 3  # of the parameters that should go in one round
Cost = Callable[[Mapping[str, Any]], float]  # of a child with this config.json, smaller is better


@dataclass(frozen=True)
class Wish:
    """What to make smaller. `sizes`: name of prune_sizes.NAMES -> size; or `target_params`, a share of the source's parameters
    (up to 1) or their number; or `target_cost`, a share of what the source costs by the `cost` that `run` is given.

    depth: bi, loss or random. width: activation or random (of channels, heads, experts). random is a control: what a score
    is worth is what it gains on it. check: whether the child is run against the source at the end.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    target_params: float | None = None
    target_cost: float | None = None
    rule: Rule = field(default_factory=Rule)
    depth: str = "bi"
    width: str = "activation"
    calibration: Calibration = field(default_factory=lambda: Calibration(samples=512))
    check: bool = True

    def __post_init__(self) -> None:
        asked = [bool(self.sizes), self.target_params is not None, self.target_cost is not None]
        if sum(asked) != 1:
            raise FormatError(
                "say how small: sizes such as --ffn and --layers, or --target-params, or --target-cost; one of them"
            )
        for name, value in (("target-params", self.target_params), ("target-cost", self.target_cost)):
            if value is not None and not 0 < value < float("inf"):
                raise FormatError(
                    f"--{name} {value}: expected a share such as 0.75{' or a number of parameters' if 'params' in name else ''}"
                )
        if self.target_cost is not None and self.target_cost >= 1:
            raise FormatError(
                f"--target-cost {self.target_cost}: expected a share of the source's cost below 1, such as 0.75"
            )
        for name, word, known in (("depth", self.depth, DEPTH_SCORES), ("width", self.width, WIDTH_SCORES)):
            if word not in known:
                raise FormatError(f"--{name}-score {word}: not known; choose one of {', '.join(known)}")


@dataclass(frozen=True)
class Plan:
    """What a run would do; no weight was read. `given`: the child's sizes. Parameters are numbers, sizes bytes."""

    source: Checkpoint = field(repr=False)
    found: Map = field(repr=False)
    wish: Wish
    sizes: Sizes
    given: Sizes
    parameters: int
    child_parameters: int
    windows: text.Windows | None = field(repr=False)
    warnings: tuple[str, ...] = ()

    @property
    def cuts(self) -> dict[str, tuple[int, int]]:
        """Name -> (before, after) of every size that changes."""
        return changed(self.sizes, self.given)

    @property
    def child_config(self) -> dict[str, Any]:
        """config.json of the child; lists of blocks are those of any choice of the right size."""
        keep = any_keep(self.sizes, self.given)
        return Child(self.found, self.source.config, self.sizes, self.given, keep).config(str(self.source.path))

    @property
    def scored(self) -> tuple[str, ...]:
        """Sizes whose parts are chosen by what a text shows."""
        names = set(self.cuts)
        chosen = ["layers"] if "layers" in names and self.wish.depth != "random" else []
        return tuple(
            chosen
            + [
                n
                for n in ("hidden", "heads", "kv_heads", "ffn", "experts", "expert_ffn")
                if n in names and self.wish.width != "random"
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "source": str(self.source.path),
            "family": self.found.family.name,
            "asked": dict(self.wish.sizes)
            or {"target_params": self.wish.target_params, "target_cost": self.wish.target_cost},
            "cuts": {name: list(both) for name, both in self.cuts.items()},
            "parameters": self.parameters,
            "child_parameters": self.child_parameters,
            "share": self.child_parameters / self.parameters,
            "rule": dataclasses.asdict(self.wish.rule),
            "scores": {"depth": self.wish.depth, "width": self.wish.width},
            "calibration": {}
            if self.windows is None
            else {**self.windows.facts, "windows_sha256": self.windows.sha256},
            "warnings": list(self.warnings),
        }


def plan(src: str | os.PathLike[str], wish: Wish, *, cost: Cost | None = None) -> Plan:
    """Checks source and wish. FormatError for what cannot be; a target is met by the largest child that meets it."""
    source = Checkpoint.open(Path(src))
    where = str(source.path)
    shapes = {n: i.shape for n, i in source.tensors.items()}
    if any(source.config.get(k) is not None for k in ("quantization_config", "compression_config")):
        raise FormatError(
            f"{where}: source is already quantised; prune the 16-bit checkpoint first, quantise the child after"
        )
    found = walk.of(source)
    sizes = Sizes.of(source.config, where)
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())

    def count(given: Sizes) -> int:
        child = Child(found, source.config, sizes, given, any_keep(sizes, given))
        return sum(int(np.prod(cut.shape(shapes[name]))) for name, cut in child.tensors(shapes))

    if "ffn" in wish.sizes and not any(n.endswith(".mlp.down_proj") for n in (x.name for x in found.linears)):
        raise FormatError(f"ffn {wish.sizes['ffn']}: every block of this model has experts; take expert_ffn or experts")
    if wish.sizes:
        given = align(sizes, wish.sizes, wish.rule)
    else:
        given = _meeting(
            wish,
            sizes,
            parameters,
            count,
            lambda g: Child(found, source.config, sizes, g, any_keep(sizes, g)).config(where),
            source,
            cost,
        )
    Child(found, source.config, sizes, given, any_keep(sizes, given)).config(where)  # refuses what cannot be cut
    small = count(given)
    planned = Plan(source, found, wish, sizes, given, parameters, small, None)
    windows = None
    if planned.scored:
        windows = text.windows(
            wish.calibration,
            source.path,
            int(source.config["vocab_size"]),
            source.config.get("max_position_embeddings"),
        )
    return dataclasses.replace(planned, windows=windows, warnings=_warnings(planned, windows))


def _meeting(
    wish: Wish,
    sizes: Sizes,
    parameters: int,
    count: Callable[[Sizes], int],
    config: Callable[[Sizes], Mapping[str, Any]],
    source: Checkpoint,
    cost: Cost | None,
) -> Sizes:
    """The first child along the path that meets the target."""
    if wish.target_params is not None:
        goal = wish.target_params * parameters if wish.target_params <= 1 else wish.target_params
        if goal >= parameters:
            raise FormatError(
                f"--target-params {wish.target_params:g}: the source has {parameters:,} parameters; ask for fewer"
            )
        measure: Callable[[Sizes], float] = count
        words = f"{goal:,.0f} parameters"
    else:
        if cost is None or wish.target_cost is None:
            raise FormatError("--target-cost needs a card to cost on; give --card")
        goal = wish.target_cost * cost(source.config)
        measure, words = (lambda given: cost(config(given))), f"{wish.target_cost:.0%} of the source's cost"
    last: tuple[Sizes, float] | None = None
    for given in path(sizes, wish.rule):
        last = given, measure(given)
        if last[1] <= goal:
            return given
    if last is None:
        raise FormatError(
            f"no smaller size is allowed with --group {wish.rule.group} --tp {wish.rule.tp}; give smaller ones"
        )
    reached = f"{last[1]:,.0f} parameters" if wish.target_params is not None else f"{last[1] / cost(source.config):.0%}"  # type: ignore[misc]
    raise FormatError(
        f"{words} is smaller than one round of pruning goes (half of a size at most: {reached}); prune, distil, and prune again, or give sizes"
    )


def any_keep(sizes: Sizes, given: Sizes) -> Keep:
    """A choice of the right sizes, for counting."""
    drop = sizes.layers - given.layers
    layers = (*range(ENDS), *range(ENDS + drop, sizes.layers)) if drop else tuple(range(sizes.layers))

    def first(name: str) -> torch.Tensor | None:
        return torch.arange(getattr(given, name)) if getattr(given, name) != getattr(sizes, name) else None

    def each(name: str) -> dict[int, torch.Tensor]:
        index = first(name)
        return {} if index is None else dict.fromkeys(layers, index)

    inner = first("expert_ffn")
    experts = {} if inner is None else {(i, e): inner for i in layers for e in range(sizes.experts)}
    return Keep(layers, first("hidden"), each("ffn"), each("heads"), each("kv_heads"), each("experts"), experts)


def _warnings(planned: Plan, windows: text.Windows | None) -> tuple[str, ...]:
    found = []
    gone = 1 - planned.child_parameters / planned.parameters
    if gone > MOST:
        found.append(f"{gone:.0%} of the parameters go at once; beyond a third, prune and distil in rounds")
    if set(planned.cuts) - {"experts"}:
        found.append(
            "a dense child without training fails the quality gate: distil it (percard distill) before it serves"
        )
    elif gone > 0.25:
        found.append(
            "more than a quarter of a mixture goes: measure it, or distil it (percard distill) before it serves"
        )
    if {"hidden", "heads", "kv_heads"} & set(planned.cuts) and planned.found.family.name == "Qwen2":
        found.append(
            "head_dim is written into the config; an engine that divides hidden_size by the heads misreads a Qwen2 child"
        )
    return (*found, *(windows.facts["notes"] if windows is not None else ()))
