"""A recipe of several stages, as `percard run` takes it: read from YAML, every key and value checked before anything runs.

    model: Qwen/Qwen3-8B                                    # or a folder; the original that every child is held against
    serve: {engine: vllm==0.33.0, tp: 2}
    stages:
      - prune: {ffn: 9216, layers: 32}
      - capture: {data: mix.jsonl, top_k: 64}
      - distill: {teacher: capture, steps: 2000, batch: 64, lr: 1.0e-4}
      - quantize: {spec: w4a16-g128, methods: [gptq]}
      - verify
      - bench: {prompt: 512, new: 32}
    calibration: {source: calib.jsonl, samples: 512, seq_len: 2048}
    verify: {text: heldout.txt, level: model, gate: {kl: 0.05, top1: 0.9}, on_red: report}
    output: {dir: ./out}

A stage works on the child of the stage before it, the first on the model. Its folder is `name` under output.dir: the verb, from
its second use on with a number (distill-2), or what `name:` says. A teacher is `source` (the model), an earlier
stage, or a folder; of distilling also a list of captures.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats.spec import FormatError, QuantSpec
from . import fields, prune_sizes, recipe
from .distill_plan import Wish as DistillWish
from .fields import RecipeError
from .keep import Keep
from .prune_plan import Wish as PruneWish
from .prune_sizes import Rule
from .recipe import Recipe, Serve
from .text import Calibration

KINDS = ("prune", "capture", "distill", "quantize", "verify", "bench")
MAKES_CHILD = ("prune", "distill", "quantize")
SOURCE = "source"
_CHECKS = ("text", "level", "against", "on_red", "max_extra", "tokens", "gate")
TOP = ("model", "serve", "stages", "calibration", "run", "verify", "output")
COST = {"card": None, "spec": "w4a16-g128", "users": 16, "ctx": 4096}  # of prune's target_cost
PRUNE = (
    *prune_sizes.NAMES,
    "target_params",
    "target_cost",
    "depth_score",
    "width_score",
    "score",
    "check",
    "group",
    "tp",
    "ep",
)
CAPTURE = {
    "top_k": int, "seq_len": int, "shard_tokens": int, "n": int, "max_new": int, "seed": int, "keep_timeout": float,
    "temperature": float, "top_p": float,
}  # fmt: skip
OF_TEXT, OF_PROMPTS = ("seq_len",), ("n", "max_new", "seed", "keep", "keep_timeout", "temperature", "top_p")
BENCH = {"prompt": int, "new": int, "batch": int, "rounds": int}
LEVELS = ("bytes", "weights", "blocks", "model")
# What a child is held to against the original when the recipe does not say: what 4-bit weights are held to (bench/quality.py).
GATE = {"kl": 0.03, "top1": 0.93, "perplexity": 0.02}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Stage:
    """One step. wish: what its verb takes: a Wish of pruning or distilling, a Recipe of quantising, else plain keys and values.

    teachers: each `source`, the name of an earlier stage or a folder; more than one only of distilling. cost: prune's card,
    spec, users, ctx.
    """

    kind: str
    name: str
    wish: Any
    teachers: tuple[str, ...] = ()
    cost: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def quantised(self) -> bool:
        """Whether its child is."""
        return self.kind == "quantize" or (self.kind == "distill" and self.wish.quantised)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: all that its result depends on but for its inputs."""
        wish = self.wish
        if isinstance(wish, Recipe):
            tree: Any = {k: v for k, v in wish.to_dict().items() if k not in ("model", "output")}
        elif isinstance(wish, Mapping):
            tree = dict(wish)
        else:
            tree = dataclasses.asdict(wish)
        return {self.kind: tree, "teachers": list(self.teachers), "cost": dict(self.cost)}


@dataclass(frozen=True)
class Check:
    """How children are judged. text: held out; tokens of it at most. gate: limits against the original: kl, top1, perplexity (a
    rise; None = not judged). on_red, of a stage that quantises or verifies: report, stop, or promote (worst layers get more bits, up
    to max_extra of the file)."""

    text: str | None = None
    level: str = "weights"
    on_red: str = "report"
    max_extra: float = 0.05
    tokens: int = 16384
    gate: Mapping[str, float | None] = dataclasses.field(default_factory=lambda: dict(GATE))


@dataclass(frozen=True)
class Stages:
    """What `percard run` does. Made by `load` or `parse`, which check."""

    model: str
    stages: tuple[Stage, ...]
    check: Check
    out: str | None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Stages:
        """The recipe in a YAML file of at most 1 MB; RecipeError names the file."""
        text = recipe.read_text(path)
        try:
            return cls.parse(text)
        except (RecipeError, FormatError) as error:
            raise RecipeError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, text: str) -> Stages:
        """The stages that a YAML text says."""
        top = fields.mapping(fields.load(text), "recipe", TOP)
        model = fields.maybe_text(top.get("model"), "model")
        if model is None:
            raise RecipeError("model is missing; name the folder or the hub id of the original")
        entries = top.get("stages")
        if not isinstance(entries, list) or not entries:
            raise RecipeError(f"stages: expected a list of {', '.join(KINDS)}, each with its settings")
        check = _check(fields.mapping(top.get("verify"), "verify", _CHECKS))
        serve = recipe.serve_of(fields.mapping(top.get("serve"), "serve", ("engine", "sm", "tp")))
        shared: dict[str, Any] = {k: top[k] for k in ("serve", "calibration", "run") if k in top}
        parser = _Parser(shared, serve, check, _group(entries))
        for number, entry in enumerate(entries):
            parser.add(number, entry)
        output = fields.mapping(top.get("output"), "output", ("dir", "card"))
        return cls(model, tuple(parser.stages), check, fields.maybe_text(output.get("dir"), "output.dir"))


def _split(entry: Any) -> tuple[str, Any]:
    """(verb, settings) of an entry of `stages`; ("", None) for what is none."""
    if isinstance(entry, str):
        return entry, None
    if isinstance(entry, dict) and len(entry) == 1:
        ((verb, settings),) = entry.items()
        return str(verb), settings
    return "", None


def _group(entries: list[Any]) -> int:
    """The group that children will be quantised in, as the first stage that quantises says; a wrong spec is told there."""
    for verb, settings in map(_split, entries):
        spec = settings.get("spec" if verb == "quantize" else "qad") if isinstance(settings, dict) else None
        if verb in ("quantize", "distill") and isinstance(spec, str):
            try:
                group = QuantSpec.parse(spec).group
            except FormatError:
                continue
            if group:
                return group
    return Rule().group


class _Parser:
    """Reads one stage after another; each may name those before it."""

    def __init__(self, shared: Mapping[str, Any], serve: Serve, check: Check, group: int) -> None:
        self.shared, self.serve, self.check, self.group = shared, serve, check, group
        self.stages: list[Stage] = []

    def add(self, number: int, entry: Any) -> None:
        """The next entry of `stages`."""
        kind, settings = _split(entry)
        if kind not in KINDS:
            found = repr(kind or entry)
            raise RecipeError(
                f"stages[{number}]: found {found}{fields.nearest(kind, KINDS)}; a stage is one of {', '.join(KINDS)}, "
                "such as `- prune: {ffn: 9216}`"
            )
        where = f"stages[{number}] {kind}"
        tree = fields.mapping(settings, where, None)
        name = self._name(kind, tree.pop("name", None), where)
        try:
            wish, teachers, cost = getattr(self, f"_{kind}")(tree, where)
        except (RecipeError, FormatError) as error:
            words = str(error)
            raise RecipeError(words if words.startswith("stages[") else f"{where}: {words}") from None
        self.stages.append(Stage(kind, name, wish, teachers, cost))

    def _name(self, kind: str, given: Any, where: str) -> str:
        taken = [stage.name for stage in self.stages]
        if given is None:
            count = sum(1 for stage in self.stages if stage.kind == kind)
            given = kind if not count else f"{kind}-{count + 1}"
        name = fields.text(given, f"{where}.name")
        if not _NAME.fullmatch(name) or name == SOURCE:
            raise RecipeError(
                f"{where}.name: {name!r} cannot be a folder here; use letters, digits, - and _, not {SOURCE!r}"
            )
        if name.lower() in [other.lower() for other in taken]:
            raise RecipeError(f"{where}: the folder {name} belongs to an earlier stage; give this one another `name`")
        return name

    def _teacher(self, value: Any, where: str) -> str:
        """`source`, the name of an earlier stage, or a folder that is looked for in the dry run."""
        teacher = fields.text(value, f"{where}.teacher")
        plain = teacher.rstrip("/")
        names = [stage.name for stage in self.stages]
        if plain == SOURCE or plain in names:
            stage = next((s for s in self.stages if s.name == plain), None)
            if stage is not None and stage.kind not in (*MAKES_CHILD, "capture"):
                raise RecipeError(f"{where}.teacher: the stage {plain} writes no model and no capture; take {SOURCE}")
            return plain
        if not Path(teacher).expanduser().is_dir() and "/" not in plain:
            known = [SOURCE, *names]
            raise RecipeError(
                f"{where}.teacher: {teacher!r} is no folder and no earlier stage{fields.nearest(plain, known)}; "
                f"known: {', '.join(known)}"
            )
        return teacher

    def _prune(self, tree: dict[str, Any], where: str) -> tuple[Any, tuple[str, ...], Mapping[str, Any]]:
        if "rounds" in tree:
            raise RecipeError(f"{where}.rounds: a round is a prune and a distill stage; write both once for each round")
        fields.only(tree, (*PRUNE, *COST, "calibration"), where)
        score = fields.mapping(tree.get("score"), f"{where}.score", prune_sizes.NAMES)
        depth = fields.text(tree.get("depth_score", score.get("layers", "bi")), f"{where}.depth_score")
        others = {_long(fields.text(v, f"{where}.score.{k}")) for k, v in score.items() if k != "layers"}
        if len(others) > 1:
            raise RecipeError(f"{where}.score: {' and '.join(sorted(others))}; widths are scored one way, keep one")
        width = _long(fields.text(tree.get("width_score", next(iter(others), "activation")), f"{where}.width_score"))
        targets = {
            n: number(tree[n], f"{where}.{n}", float, 0.0, None) for n in ("target_params", "target_cost") if n in tree
        }
        cost = {name: tree.get(name, usual) for name, usual in COST.items()}
        if "target_cost" in tree and cost["card"] is None:
            raise RecipeError(
                f"{where}.target_cost: is the cost of a token on a card; name it with card, such as h20-96"
            )
        usual = {"group": self.group, "tp": self.serve.tp, "ep": 1}
        rule = {n: int(number(tree.get(n, v), f"{where}.{n}", int, 1, None)) for n, v in usual.items()}
        wish = PruneWish(
            sizes={n: int(number(tree[n], f"{where}.{n}", int, None, None)) for n in prune_sizes.NAMES if n in tree},
            rule=Rule(**rule),
            depth=depth,
            width=width,
            calibration=self._calibration(tree.get("calibration"), where),
            check=fields.flag(tree.get("check", True), f"{where}.check"),
            **targets,
        )
        return wish, (), cost if cost["card"] is not None else {}

    def _calibration(self, own: Any, where: str) -> Calibration:
        """The stage's own text, or that of the recipe."""
        place = "calibration" if own is None else f"{where}.calibration"
        tree = self.shared.get("calibration") if own is None else own
        return recipe.calibration_of(fields.mapping(tree, place, ("source", "samples", "seq_len", "seed")))

    def _capture(self, tree: dict[str, Any], where: str) -> tuple[Any, tuple[str, ...], Mapping[str, Any]]:
        fields.only(tree, ("teacher", "data", "generate", "keep", *CAPTURE), where)
        wish: dict[str, Any] = {
            n: number(tree[n], f"{where}.{n}", kind, 0, None) for n, kind in CAPTURE.items() if n in tree
        }
        wish |= {n: fields.text(tree[n], f"{where}.{n}") for n in ("data", "generate", "keep") if n in tree}
        if ("data" in wish) == ("generate" in wish):
            raise RecipeError(f"{where}: give data with a text, or generate with prompts; one of them")
        wrong = [n for n in (OF_PROMPTS if "data" in wish else OF_TEXT) if n in wish]
        if wrong:
            raise RecipeError(f"{where}.{wrong[0]}: is for {'generate' if 'data' in wish else 'data'}; leave it out")
        Keep.parse(wish.get("keep"), wish.get("keep_timeout", 10.0))
        return wish, (self._teacher(tree.get("teacher", SOURCE), where),), {}

    def _distill(self, tree: dict[str, Any], where: str) -> tuple[Any, tuple[str, ...], Mapping[str, Any]]:
        kinds = {f.name: str(f.type) for f in dataclasses.fields(DistillWish)}
        fields.only(tree, (*kinds, "teacher", "train"), where)
        values: dict[str, Any] = {}
        for name, value in tree.items():
            place = f"{where}.{name}"
            if name in ("teacher", "train") or value is None:
                continue
            if name == "lr" and isinstance(value, list):
                value = _rate(value, place)
            kind = kinds[name]
            if "bool" in kind:
                values[name] = fields.flag(value, place)
            elif "int" in kind or "float" in kind:
                values[name] = number(value, place, int if "int" in kind else float, None, None)
            else:
                values[name] = fields.text(value, place)
        if "train" in tree:
            what = fields.choice(tree["train"], f"{where}.train", ("weights", "scales"))
            values["scales_only"] = what == "scales"
        if "teacher" not in tree:
            raise RecipeError(f"{where}.teacher is missing; say {SOURCE}, an earlier stage, or a folder")
        given = tree["teacher"] if isinstance(tree["teacher"], list) else [tree["teacher"]]
        teachers = tuple(self._teacher(one, where) for one in given)
        coded = any(s.quantised for s in self.stages)
        if values.get("qad") is not None and not coded and "calibration" not in values:  # GPTQ makes the codes first
            text = self._calibration(None, where)
            values |= {"calibration": text.source, "samples": values.get("samples", text.samples)}
        return DistillWish(**values), teachers, {}

    def _quantize(self, tree: dict[str, Any], where: str) -> tuple[Any, tuple[str, ...], Mapping[str, Any]]:
        check = self.check
        promote = check.on_red == "promote" and check.text is not None
        verify: dict[str, Any] = {"level": "weights"}
        if promote:
            verify = {"level": "model", "text": check.text, "on_red": "promote", "max_extra": check.max_extra}
        return recipe.of_tree({**self.shared, "stages": [{"quantize": tree}], "verify": verify}), (), {}

    def _verify(self, tree: dict[str, Any], where: str) -> tuple[Any, tuple[str, ...], Mapping[str, Any]]:
        fields.only(tree, ("level",), where)
        if not any(s.quantised for s in self.stages):
            raise RecipeError(f"{where}: there is nothing quantised to open yet; put it behind quantize")
        level = fields.choice(tree.get("level", self.check.level), f"{where}.level", LEVELS)
        _needs_text(level, self.check.text, f"{where}.level")
        return {"level": level, "text": self.check.text, "tokens": self.check.tokens}, (), {}

    def _bench(self, tree: dict[str, Any], where: str) -> tuple[Any, tuple[str, ...], Mapping[str, Any]]:
        fields.only(tree, (*BENCH, "head", "of"), where)
        if self.check.text is None:
            raise RecipeError(
                f"{where}: no figure of speed without quality beside it; give verify.text, a held-out text"
            )
        wish: dict[str, Any] = {n: number(tree[n], f"{where}.{n}", k, 1, None) for n, k in BENCH.items() if n in tree}
        wish["head"] = fields.choice(tree.get("head", "int8-row"), f"{where}.head", ("int8-row", "16bit"))
        wish["gate"] = dict(self.check.gate)
        wish["of"] = fields.choice(tree.get("of", "all"), f"{where}.of", ("all", "last"))
        if not any(stage.kind in MAKES_CHILD for stage in self.stages):
            raise RecipeError(f"{where}: there is no child to time yet; put it behind the stage that makes one")
        return wish, (), {}


def number(value: Any, where: str, kind: type, low: float | None, high: float | None) -> Any:
    """A number; 1e-4 and 2.5e9 too, which YAML takes for texts."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise RecipeError(f"{where}: found {value!r}, expected a number") from None
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: found {value}, expected a number")
    return fields.number(value, where, kind, low, high)


def _long(score: str) -> str:
    return "activation" if score == "act" else score


def _rate(value: list[Any], where: str) -> Any:
    """The peak of [peak, end]; the schedule ends at a tenth of it."""
    pair = [number(v, where, float, 0.0, None) for v in value]
    if len(pair) != 2 or abs(pair[1] - pair[0] / 10) > 1e-3 * pair[0]:
        raise RecipeError(
            f"{where}: {value} ends elsewhere than at a tenth, where every run ends; write the peak alone"
        )
    return pair[0]


def _needs_text(level: str, text: str | None, where: str) -> None:
    if level in ("blocks", "model") and text is None:
        raise RecipeError(f"{where}: {level} runs both models over a held-out text; give verify.text")


def _check(tree: Mapping[str, Any]) -> Check:
    text = fields.maybe_text(tree.get("text"), "verify.text")
    level = fields.choice(tree.get("level", "weights" if text is None else "model"), "verify.level", LEVELS)
    _needs_text(level, text, "verify.level")
    fields.choice(tree.get("against", SOURCE), "verify.against", (SOURCE,))
    limits = fields.mapping(tree.get("gate"), "verify.gate", tuple(GATE))
    gate: dict[str, float | None] = dict(GATE) if not limits else dict.fromkeys(GATE)
    gate |= {
        n: float(number(v, f"verify.gate.{n}", float, 0.0, 1.0 if n == "top1" else None)) for n, v in limits.items()
    }
    return Check(
        text,
        level,
        fields.choice(tree.get("on_red", "report"), "verify.on_red", ("report", "stop", "promote")),
        float(number(tree.get("max_extra", 0.05), "verify.max_extra", float, 0.0, 1.0)),
        int(number(tree.get("tokens", 16384), "verify.tokens", int, 2, None)),
        gate,
    )
