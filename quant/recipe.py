"""Recipe: what to do with a checkpoint. Frozen, read from YAML (or made from flags), every key and number checked.

    model: Qwen/Qwen3-8B                     # or a folder
    serve: {engine: vllm==0.33.0, sm: 90, tp: 2}
    stages:
      - quantize:
          spec: w4a16-g128
          methods: [awq, {gptq: {damp: 0.01}}]   # any number of transforms, one rounding
          layers: {'re:.*\\.layers\\.(0|35)\\..*': w8a16-g128}
          ignore: [lm_head]                  # adds to the family's list; `ignore!` replaces it
          experts: blend                     # what the last matrix of an expert learns from: routed, blend, all
    calibration: {source: calib.jsonl, samples: 256, seq_len: 2048, seed: 0}     # no source: a small built-in text
    run: {pass: sublayer, target: float}       # sublayer: each linear sees what the quantised ones before it make
    verify: {level: model, text: heldout.txt, on_red: promote, max_extra: 0.05}
    output: {dir: ./out, to: compressed-tensors, card: true}

Names in `layers` and `ignore` are module names of the checkpoint, whole, or `re:` and a regex that Python's `match`
holds against them. The first entry of `layers` that matches wins. An unknown key is an error that names the nearest
known one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..formats.spec import FormatError, QuantSpec
from ..formats.targets import guarded
from . import fields
from .fields import RecipeError
from .methods import METHODS
from .progress import Callback, Progress
from .text import Calibration

__all__ = ["Calibration", "Callback", "Progress", "Recipe", "RecipeError", "Serve", "Step", "compiled"]

MAX_BYTES = 1 << 20
_NAME = 64  # characters of a module name that every regex of a recipe must be able to match in time; a longer one checks again
VERIFY_LEVELS = ("none", "bytes", "weights", "blocks", "model")
EXPERTS = ("blend", "routed", "all")
PASSES = ("sublayer", "block")
TARGETS = ("float", "chain")
DTYPES = ("auto", "float32", "model")
# What `--method` means: a transform brings the rounding that goes best with it (docs/quantize.md).
FLAG_METHODS = {"awq": ("awq", "gptq"), "smoothquant": ("smoothquant", "gptq"), "rotate": ("rotate", "gptq")}
CONTAINERS = ("compressed-tensors",)
OTHER_STAGES = ("prune", "capture", "distill", "verify", "bench")  # of percard run (stages.py)


@dataclass(frozen=True)
class Step:
    """A method and its options, in the order in which the recipe names them; every option is present."""

    method: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, method: str, options: Mapping[str, Any] | None = None, where: str = "methods") -> Step:
        """The step with defaults filled in; RecipeError for an unknown method or option or a number out of range."""
        if method not in METHODS:
            raise RecipeError(
                f"{where}: unknown method {method!r}{fields.nearest(method, METHODS)}; known: {', '.join(METHODS)}"
            )
        known = METHODS[method].options
        given = dict(options or {})
        fields.only(given, known, f"{where}.{method}")
        values = []
        for name, option in known.items():
            value = given.get(name, option.default)
            place = f"{where}.{method}.{name}"
            if option.kind is bool:
                value = fields.flag(value, place)
            elif option.kind in (int, float):
                value = fields.number(value, place, option.kind, option.low, option.high)
            else:
                value = fields.text(value, place)
            values.append((name, value))
        return cls(method, tuple(values))


@dataclass(frozen=True)
class Serve:
    """Where the result will be served: engine and version, compute capability times ten, tensor-parallel size."""

    engine: str | None = None
    sm: int | None = None
    tp: int = 1


@dataclass(frozen=True)
class Run:
    """How calibrated methods go through a block. passes: "sublayer" (four forward passes, each linear sees the inputs
    that quantised ones make) or "block" (one). target, of sublayer passes: "float" = each linear is drawn to what the float model
    makes of its own input (GPTQ only; a second chain), "chain" = to itself on the quantised input. dtype: of the arithmetic; auto = the model's where this machine multiplies
    16-bit numbers as fast, else fp32."""

    passes: str = "sublayer"
    target: str = "float"
    dtype: str = "auto"


@dataclass(frozen=True)
class Verify:
    """What is checked at the end. text: held-out text for levels blocks and model. on_red: "promote" gives the worst
    layers more bits until `max_extra` (share of the file) is spent, "stop" does not."""

    level: str = "weights"
    text: str | None = None
    on_red: str = "promote"
    max_extra: float = 0.05


@dataclass(frozen=True)
class Recipe:
    """What `quantize` does. Made by `load`, `parse` or `from_flags`, which check; `to_yaml` is their inverse."""

    spec: QuantSpec
    steps: tuple[Step, ...] = field(default_factory=lambda: (Step.of("rtn"),))
    layers: tuple[tuple[str, QuantSpec], ...] = ()
    ignore: tuple[str, ...] = ()
    replace_ignore: bool = False
    model: str | None = None
    serve: Serve = Serve()
    calibration: Calibration = field(default_factory=Calibration)
    experts: str = "blend"
    run: Run = Run()
    verify: Verify = Verify()
    out: str | None = None
    container: str = "compressed-tensors"
    card: bool = True

    def __post_init__(self) -> None:
        roundings = [s.method for s in self.steps if METHODS[s.method].kind == "rounding"]
        if len(roundings) != 1:
            found = " and ".join(roundings) or "none"
            raise RecipeError(f"methods: {found} would round each weight, expected exactly one of {_roundings()}")
        steps = [s.method for s in self.steps]
        if len(set(steps)) < len(steps):
            raise RecipeError(f"methods: {', '.join(steps)}: a method stands there twice; keep one")
        if METHODS[steps[-1]].kind != "rounding":
            raise RecipeError(
                f"methods: {steps[-1]} comes after {roundings[0]}, which has rounded by then; put it first"
            )
        if METHODS[roundings[0]].whole and len(steps) > 1:
            raise RecipeError(
                f"methods: {roundings[0]} takes the model as it is on the disk; leave {', '.join(steps[:-1])} out"
            )
        for place, spec in (("spec", self.spec), *((f"layers.{name!r}", spec) for name, spec in self.layers)):
            for step in self.steps:
                if (reason := METHODS[step.method].serves(spec)) is not None:
                    raise RecipeError(f"{place}: {reason}; {METHODS[step.method].remedy}")
        if self.verify.level in ("blocks", "model") and self.verify.text is None:
            raise RecipeError(
                f"verify.text is missing: level {self.verify.level} runs both models over a held-out text"
            )
        for place, names in (("layers", [n for n, _ in self.layers]), ("ignore", self.ignore)):
            for name in names:
                compiled(name, place)

    @property
    def rounding(self) -> Step:
        """The one step that finds codes."""
        return next(s for s in self.steps if METHODS[s.method].kind == "rounding")

    @property
    def transforms(self) -> tuple[Step, ...]:
        """The steps before it, in order."""
        return tuple(s for s in self.steps if METHODS[s.method].kind == "transform")

    @property
    def calibrated(self) -> bool:
        """Whether a text goes through the model."""
        return any(METHODS[s.method].calibrated for s in self.steps)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """The recipe in a YAML file of at most 1 MB; RecipeError names the file."""
        text = read_text(path)
        try:
            return cls.parse(text)
        except RecipeError as error:
            raise RecipeError(f"{Path(path)}: {error}") from None

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe that a YAML text says."""
        if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
            raise RecipeError(f"a recipe has at most {MAX_BYTES} bytes")
        return of_tree(fields.load(text))

    @classmethod
    def from_flags(
        cls,
        *,
        spec: str,
        method: str = "rtn",
        options: Mapping[str, Any] | None = None,
        layers: Mapping[str, str] | None = None,
        ignore: Sequence[str] = (),
        calibration: str | os.PathLike[str] | None = None,
        samples: int | None = None,
        seq_len: int | None = None,
        seed: int = 0,
        experts: str = "blend",
        model: str | None = None,
        engine: str | None = None,
        sm: int | None = None,
        tp: int = 1,
        verify: str | None = None,
        text: str | os.PathLike[str] | None = None,
        out: str | None = None,
        card: bool = True,
    ) -> Recipe:
        """The recipe that flags mean; the same checks as for a file. FormatError for a spec that does not exist."""
        first, *rest = FLAG_METHODS.get(method, (method,))
        steps = (Step.of(first, options, where="--method"), *(Step.of(name) for name in rest))
        if calibration is not None and not any(METHODS[s.method].calibrated for s in steps):
            raise RecipeError(f"--calibration: {method} reads no text; leave --calibration out")
        given = {"source": calibration, "samples": samples, "seq_len": seq_len, "seed": seed}
        return cls(
            spec=QuantSpec.parse(spec),
            steps=steps,
            calibration=calibration_of({k: str(v) if k == "source" else v for k, v in given.items() if v is not None}),
            experts=fields.choice(experts, "experts", EXPERTS),
            layers=tuple((name, QuantSpec.parse(value)) for name, value in (layers or {}).items()),
            ignore=tuple(ignore),
            model=model,
            serve=serve_of({"engine": engine, "sm": sm, "tp": tp}),
            verify=_verify(
                {k: v for k, v in (("level", verify), ("text", text and str(text))) if v is not None},
            ),
            out=out,
            card=card,
        )

    def with_ignore(self, *names: str) -> Recipe:
        """The same recipe with more modules left alone."""
        return replace(self, ignore=(*self.ignore, *names))

    def to_dict(self) -> dict[str, Any]:
        """The tree that `parse` reads; every default written out, so that two equal recipes print alike."""
        stage: dict[str, Any] = {
            "spec": str(self.spec),
            "methods": [{s.method: dict(s.options)} for s in self.steps],
        }
        if self.layers:
            stage["layers"] = {name: str(spec) for name, spec in self.layers}
        if self.ignore or self.replace_ignore:
            stage["ignore!" if self.replace_ignore else "ignore"] = list(self.ignore)
        if self.calibrated:
            stage["experts"] = self.experts
        tree: dict[str, Any] = {} if self.model is None else {"model": self.model}
        serve = {"engine": self.serve.engine, "sm": self.serve.sm, "tp": self.serve.tp}
        tree["serve"] = {key: value for key, value in serve.items() if value is not None}
        tree["stages"] = [{"quantize": stage}]
        if self.calibrated:
            tree["calibration"] = {k: v for k, v in vars(self.calibration).items() if v is not None}
            tree["run"] = {"pass": self.run.passes, "target": self.run.target, "dtype": self.run.dtype}
        tree["verify"] = {k: v for k, v in vars(self.verify).items() if v is not None}
        where = {} if self.out is None else {"dir": self.out}
        tree["output"] = {**where, "to": self.container, "card": self.card}
        return tree

    def to_yaml(self) -> str:
        """YAML that `parse` reads back to an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120, allow_unicode=True)


def compiled(pattern: str, where: str = "pattern") -> Callable[[str], bool]:
    """Whether a module name is meant by `pattern`: the whole name, or `re:` and a regex (matched from the front).

    RecipeError for a regex that is none, or that could take forever on a name: recipes are handed around, as configs are.
    """
    if not pattern.startswith("re:"):
        return lambda name: name == pattern

    def regex(length: int) -> re.Pattern[str]:
        try:
            return guarded(pattern[3:], length, f"{where}:")
        except FormatError as error:
            raise RecipeError(str(error)) from None

    regex(_NAME)
    return lambda name: regex(max(_NAME, 1 << len(name).bit_length())).match(name) is not None


def read_text(path: str | os.PathLike[str]) -> str:
    """What a recipe file holds, at most 1 MB; RecipeError names it."""
    file = Path(path)
    if not file.is_file():
        raise RecipeError(f"{file}: no such recipe file; give the path of a YAML file, or say --spec instead")
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise RecipeError(f"{file}: {size} bytes, a recipe has at most {MAX_BYTES}; is this the right file?")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read as UTF-8 text ({error})") from None


def of_tree(tree: Any) -> Recipe:
    """The recipe that a tree of keys and values says."""
    top = fields.mapping(tree, "recipe", ("model", "serve", "stages", "calibration", "run", "verify", "output"))
    stages = top.get("stages")
    verbs = [_verb(entry) for entry in stages] if isinstance(stages, list) else []
    if any(verb in OTHER_STAGES for verb in verbs):
        raise RecipeError(f"stages: {', '.join(verbs)}: this is a recipe of several stages; give it to percard run")
    if not isinstance(stages, list) or len(stages) != 1:
        raise RecipeError("stages: expected a list with one stage, `- quantize: {spec: ...}`")
    stage = fields.mapping(
        fields.mapping(stages[0], "stages[0]", ("quantize",)).get("quantize"), "quantize", _STAGE_KEYS
    )
    if "spec" not in stage:
        raise RecipeError("quantize.spec is missing; say one, such as w4a16-g128 or w8a8 (there is no default)")
    if "ignore" in stage and "ignore!" in stage:
        raise RecipeError("quantize: `ignore` adds to the family's list and `ignore!` replaces it; keep one of them")
    how = fields.mapping(top.get("run"), "run", ("pass", "target", "dtype"))
    output = fields.mapping(top.get("output"), "output", ("dir", "to", "card"))
    layers = fields.mapping(stage.get("layers"), "quantize.layers", None)
    return Recipe(
        spec=_spec(stage["spec"], "quantize.spec"),
        steps=_steps(stage.get("methods", ["rtn"])),
        layers=tuple(
            (fields.text(k, "quantize.layers"), _spec(v, f"quantize.layers.{k!r}")) for k, v in layers.items()
        ),
        ignore=fields.texts(stage.get("ignore!", stage.get("ignore", [])), "quantize.ignore"),
        replace_ignore="ignore!" in stage,
        model=fields.maybe_text(top.get("model"), "model"),
        serve=serve_of(fields.mapping(top.get("serve"), "serve", ("engine", "sm", "tp"))),
        calibration=calibration_of(
            fields.mapping(top.get("calibration"), "calibration", ("source", "samples", "seq_len", "seed"))
        ),
        experts=fields.choice(stage.get("experts", "blend"), "quantize.experts", EXPERTS),
        run=Run(
            fields.choice(how.get("pass", "sublayer"), "run.pass", PASSES),
            fields.choice(how.get("target", "float"), "run.target", TARGETS),
            fields.choice(how.get("dtype", "auto"), "run.dtype", DTYPES),
        ),
        verify=_verify(fields.mapping(top.get("verify"), "verify", ("level", "text", "on_red", "max_extra"))),
        out=fields.maybe_text(output.get("dir"), "output.dir"),
        container=fields.choice(output.get("to", "compressed-tensors"), "output.to", CONTAINERS),
        card=fields.flag(output.get("card", True), "output.card"),
    )


def _verb(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(next(iter(entry), "")) if isinstance(entry, dict) else ""


_STAGE_KEYS = ("spec", "methods", "layers", "ignore", "ignore!", "experts")


def _steps(value: Any) -> tuple[Step, ...]:
    if not isinstance(value, list) or not value:
        raise RecipeError("quantize.methods: expected a list, such as [rtn] or [{rtn: {search: false}}]")
    steps = []
    for entry in value:
        if isinstance(entry, str):
            entry = {entry: None}
        if not isinstance(entry, dict) or len(entry) != 1:
            raise RecipeError(f"quantize.methods: {entry!r} is not a method; write `rtn` or `rtn: {{search: false}}`")
        ((name, options),) = entry.items()
        steps.append(
            Step.of(fields.text(name, "quantize.methods"), fields.mapping(options, f"methods.{name}", None), "methods")
        )
    return tuple(steps)


def serve_of(tree: Mapping[str, Any]) -> Serve:
    """Where it will be served."""
    sm, tp = tree.get("sm"), tree.get("tp", 1)
    return Serve(
        fields.maybe_text(tree.get("engine"), "serve.engine"),
        None if sm is None else int(fields.number(sm, "serve.sm", int, 50, 999)),
        int(fields.number(tp, "serve.tp", int, 1, 1024)),
    )


def calibration_of(tree: Mapping[str, Any]) -> Calibration:
    """Which text."""
    default = Calibration()
    return Calibration(
        fields.maybe_text(tree.get("source"), "calibration.source"),
        int(fields.number(tree.get("samples", default.samples), "calibration.samples", int, 1, 1 << 20)),
        int(fields.number(tree.get("seq_len", default.seq_len), "calibration.seq_len", int, 2, 1 << 20)),
        int(fields.number(tree.get("seed", 0), "calibration.seed", int, 0, 1 << 31)),
    )


def _verify(tree: Mapping[str, Any]) -> Verify:
    held_out = fields.maybe_text(tree.get("text"), "verify.text")
    level = tree.get("level", "weights" if held_out is None else "model")
    return Verify(
        fields.choice(level, "verify.level", VERIFY_LEVELS),
        held_out,
        fields.choice(tree.get("on_red", "promote"), "verify.on_red", ("promote", "stop")),
        float(fields.number(tree.get("max_extra", 0.05), "verify.max_extra", float, 0.0, 1.0)),
    )


def _spec(value: Any, where: str) -> QuantSpec:
    try:
        return QuantSpec.parse(fields.text(value, where))
    except FormatError as error:
        raise RecipeError(f"{where}: {error}") from None


def _roundings() -> str:
    return ", ".join(m.name for m in METHODS.values() if m.kind == "rounding")
