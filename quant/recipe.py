"""Recipe: what to do with a checkpoint. Frozen, read from YAML (or made from flags), every key and number checked.

    model: Qwen/Qwen3-8B                     # or a folder
    serve: {engine: vllm==0.33.0, sm: 90, tp: 2}
    stages:
      - quantize:
          spec: w4a16-g128
          methods: [{rtn: {search: true, norm: 2}}]
          layers: {'re:.*\\.layers\\.(0|35)\\..*': w8a16-g128}
          ignore: [lm_head]                  # adds to the family's list; `ignore!` replaces it
    verify: {level: weights}
    output: {dir: ./out, to: compressed-tensors, card: true}

Names in `layers` and `ignore` are module names of the checkpoint, whole, or `re:` and a regex that Python's `match`
holds against them. The first entry of `layers` that matches wins. An unknown key is an error that names the nearest
known one.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..formats.spec import FormatError, QuantSpec
from .methods import METHODS
from .progress import Callback, Progress

__all__ = ["Callback", "Progress", "Recipe", "RecipeError", "Serve", "Step", "compiled"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
VERIFY_LEVELS = ("none", "bytes", "weights")
CONTAINERS = ("compressed-tensors",)


class RecipeError(ValueError):
    """A recipe that cannot be meant: an unknown key or method, a number out of range, rules that contradict."""


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
                f"{where}: unknown method {method!r}{_nearest(method, METHODS)}; known: {', '.join(METHODS)}"
            )
        known = METHODS[method].options
        given = dict(options or {})
        _only(given, known, f"{where}.{method}")
        values = []
        for name, option in known.items():
            value = given.get(name, option.default)
            place = f"{where}.{method}.{name}"
            if option.kind is bool:
                value = _bool(value, place)
            elif option.kind in (int, float):
                value = _number(value, place, option.kind, option.low, option.high)
            else:
                value = _text(value, place)
            values.append((name, value))
        return cls(method, tuple(values))


@dataclass(frozen=True)
class Serve:
    """Where the result will be served: engine and version, compute capability times ten, tensor-parallel size."""

    engine: str | None = None
    sm: int | None = None
    tp: int = 1


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
    verify: str = "weights"
    out: str | None = None
    container: str = "compressed-tensors"
    card: bool = True

    def __post_init__(self) -> None:
        roundings = [s.method for s in self.steps if METHODS[s.method].kind == "rounding"]
        if len(roundings) != 1:
            raise RecipeError(f"methods: {roundings or 'none'} round, expected exactly one of {_roundings()}")
        for place, spec in (("spec", self.spec), *((f"layers.{name!r}", spec) for name, spec in self.layers)):
            if (reason := METHODS[roundings[0]].serves(spec)) is not None:
                raise RecipeError(f"{place}: {reason}; take an integer spec, such as w4a16-g128 or w8a8")
        for place, names in (("layers", [n for n, _ in self.layers]), ("ignore", self.ignore)):
            for name in names:
                compiled(name, place)

    @property
    def rounding(self) -> Step:
        """The one step that finds codes."""
        return next(s for s in self.steps if METHODS[s.method].kind == "rounding")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """The recipe in a YAML file of at most 1 MB; RecipeError names the file."""
        file = Path(path)
        if not file.is_file():
            raise RecipeError(f"{file}: no such recipe file; give the path of a YAML file, or say --spec instead")
        try:
            size = file.stat().st_size
            if size > MAX_BYTES:
                raise RecipeError(f"{file}: {size} bytes, a recipe has at most {MAX_BYTES}; is this the right file?")
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{file}: cannot be read as UTF-8 text ({error})") from None
        try:
            return cls.parse(text)
        except RecipeError as error:
            raise RecipeError(f"{file}: {error}") from None

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe that a YAML text says."""
        if len(text.encode()) > MAX_BYTES:
            raise RecipeError(f"a recipe has at most {MAX_BYTES} bytes")
        try:
            _refuse_tricks(text)
            tree = yaml.load(text, Loader=_UniqueKeys)
        except yaml.YAMLError as error:
            raise RecipeError(f"not YAML: {' '.join(str(error).split())}") from None
        return _from_tree(tree)

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
        model: str | None = None,
        engine: str | None = None,
        sm: int | None = None,
        tp: int = 1,
        verify: str = "weights",
        out: str | None = None,
        card: bool = True,
    ) -> Recipe:
        """The recipe that flags mean; the same checks as for a file. FormatError for a spec that does not exist."""
        step = Step.of(method, options, where="--method")
        if calibration is not None and not METHODS[method].calibrated:
            raise RecipeError(f"--calibration: {method} reads no text; leave --calibration out")
        return cls(
            spec=QuantSpec.parse(spec),
            steps=(step,),
            layers=tuple((name, QuantSpec.parse(value)) for name, value in (layers or {}).items()),
            ignore=tuple(ignore),
            model=model,
            serve=_serve({"engine": engine, "sm": sm, "tp": tp}),
            verify=_choice(verify, "verify.level", VERIFY_LEVELS),
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
        tree: dict[str, Any] = {} if self.model is None else {"model": self.model}
        serve = {"engine": self.serve.engine, "sm": self.serve.sm, "tp": self.serve.tp}
        tree["serve"] = {key: value for key, value in serve.items() if value is not None}
        tree["stages"] = [{"quantize": stage}]
        tree["verify"] = {"level": self.verify}
        where = {} if self.out is None else {"dir": self.out}
        tree["output"] = {**where, "to": self.container, "card": self.card}
        return tree

    def to_yaml(self) -> str:
        """YAML that `parse` reads back to an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120, allow_unicode=True)


def compiled(pattern: str, where: str = "pattern") -> Callable[[str], bool]:
    """Whether a module name is meant by `pattern`: the whole name, or `re:` and a regex (matched from the front)."""
    if not pattern.startswith("re:"):
        return lambda name: name == pattern
    try:
        regex = re.compile(pattern[3:])
    except re.error as error:
        raise RecipeError(f"{where}: {pattern!r} is not a regex ({error})") from None
    return lambda name: regex.match(name) is not None


def _refuse_tricks(text: str) -> None:
    """Aliases could make a few bytes into gigabytes, deep nesting seconds into hours; a recipe needs neither."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError(f"line {line}: aliases (*{event.anchor}) are not read; write it out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RecipeError(f"line {line}: nested deeper than {MAX_DEPTH}; this is no recipe")


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: of two rules for one layer the first would vanish silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise RecipeError(f"line {key_node.start_mark.line + 1}: a key must be a word")
            if key in seen:
                raise RecipeError(f"line {key_node.start_mark.line + 1}: key {key!r} stands there twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _from_tree(tree: Any) -> Recipe:
    top = _map(tree, "recipe", ("model", "serve", "stages", "verify", "output"))
    stages = top.get("stages")
    if not isinstance(stages, list) or len(stages) != 1:
        raise RecipeError("stages: expected a list with one stage, `- quantize: {spec: ...}`")
    stage = _map(_map(stages[0], "stages[0]", ("quantize",)).get("quantize"), "quantize", _STAGE_KEYS)
    if "spec" not in stage:
        raise RecipeError("quantize.spec is missing; say one, such as w4a16-g128 or w8a8 (there is no default)")
    if "ignore" in stage and "ignore!" in stage:
        raise RecipeError("quantize: `ignore` adds to the family's list and `ignore!` replaces it; keep one of them")
    verify = _map(top.get("verify"), "verify", ("level",))
    output = _map(top.get("output"), "output", ("dir", "to", "card"))
    layers = _map(stage.get("layers"), "quantize.layers", None)
    return Recipe(
        spec=_spec(stage["spec"], "quantize.spec"),
        steps=_steps(stage.get("methods", ["rtn"])),
        layers=tuple((_text(k, "quantize.layers"), _spec(v, f"quantize.layers.{k!r}")) for k, v in layers.items()),
        ignore=_texts(stage.get("ignore!", stage.get("ignore", [])), "quantize.ignore"),
        replace_ignore="ignore!" in stage,
        model=_maybe_text(top.get("model"), "model"),
        serve=_serve(_map(top.get("serve"), "serve", ("engine", "sm", "tp"))),
        verify=_choice(verify.get("level", "weights"), "verify.level", VERIFY_LEVELS),
        out=_maybe_text(output.get("dir"), "output.dir"),
        container=_choice(output.get("to", "compressed-tensors"), "output.to", CONTAINERS),
        card=_bool(output.get("card", True), "output.card"),
    )


_STAGE_KEYS = ("spec", "methods", "layers", "ignore", "ignore!")


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
        steps.append(Step.of(_text(name, "quantize.methods"), _map(options, f"methods.{name}", None), "methods"))
    return tuple(steps)


def _serve(tree: Mapping[str, Any]) -> Serve:
    sm, tp = tree.get("sm"), tree.get("tp", 1)
    return Serve(
        _maybe_text(tree.get("engine"), "serve.engine"),
        None if sm is None else int(_number(sm, "serve.sm", int, 50, 999)),
        int(_number(tp, "serve.tp", int, 1, 1024)),
    )


def _spec(value: Any, where: str) -> QuantSpec:
    try:
        return QuantSpec.parse(_text(value, where))
    except FormatError as error:
        raise RecipeError(f"{where}: {error}") from None


def _roundings() -> str:
    return ", ".join(m.name for m in METHODS.values() if m.kind == "rounding")


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _only(tree: Mapping[Any, Any], known: Any, where: str) -> None:
    for key in tree:
        if key not in known:
            raise RecipeError(
                f"{where}: unknown key {key!r}{_nearest(str(key), known)}; known: {', '.join(known) or 'none'}"
            )


def _map(value: Any, where: str, known: tuple[str, ...] | None) -> dict[str, Any]:
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: found {type(value).__name__} {str(value)[:40]!r}, expected keys and values")
    if known is not None:
        _only(value, known, where)
    return value


def _number(value: Any, where: str, kind: type, low: float | None, high: float | None) -> int | float:
    right = isinstance(value, int) if kind is int else isinstance(value, (int, float))
    if not right or isinstance(value, bool):
        raise RecipeError(f"{where}: found {value!r}, expected {'a whole number' if kind is int else 'a number'}")
    if not ((low is None or value >= low) and (high is None or value <= high)):  # NaN fails too
        raise RecipeError(f"{where}: {value} is outside {low} .. {high}")
    return kind(value)


def _bool(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(f"{where}: found {value!r}, expected true or false")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RecipeError(f"{where}: found {value!r}, expected text")
    return value


def _maybe_text(value: Any, where: str) -> str | None:
    return None if value is None else _text(value, where)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise RecipeError(f"{where}: found {value!r}, expected a list of names")
    return tuple(_text(entry, where) for entry in value)


def _choice(value: Any, where: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise RecipeError(f"{where}: found {value!r}{_nearest(str(value), known)}; choose one of {', '.join(known)}")
    return str(value)
