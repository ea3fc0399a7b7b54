"""Checked values of a recipe: YAML without tricks, and each value of the kind and range that it should be.

Every check names the place of the value ("methods.gptq.damp"), what was found and what was expected.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import yaml

MAX_DEPTH = 16


class RecipeError(ValueError):
    """A recipe that cannot be meant: an unknown key or method, a number out of range, rules that contradict."""


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


def load(text: str) -> Any:
    """The tree of a YAML text; RecipeError with the line of what is wrong."""
    try:
        _refuse_tricks(text)
        return yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise RecipeError(f"not YAML: {' '.join(str(error).split())}") from None


def nearest(word: str, known: Any) -> str:
    """, did you mean 'x'?" with the known word that is most like it, or nothing."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def only(tree: Mapping[Any, Any], known: Any, where: str) -> None:
    """RecipeError for a key that is not known."""
    for key in tree:
        if key not in known:
            raise RecipeError(
                f"{where}: unknown key {key!r}{nearest(str(key), known)}; known: {', '.join(known) or 'none'}"
            )


def mapping(value: Any, where: str, known: tuple[str, ...] | None) -> dict[str, Any]:
    """Keys and values; nothing is an empty mapping."""
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: found {type(value).__name__} {str(value)[:40]!r}, expected keys and values")
    if known is not None:
        only(value, known, where)
    return value


def number(value: Any, where: str, kind: type, low: float | None, high: float | None) -> int | float:
    """A number of that kind within low .. high, both allowed."""
    right = isinstance(value, int) if kind is int else isinstance(value, (int, float))
    if not right or isinstance(value, bool):
        raise RecipeError(f"{where}: found {value!r}, expected {'a whole number' if kind is int else 'a number'}")
    if not ((low is None or value >= low) and (high is None or value <= high)):  # NaN fails too
        raise RecipeError(f"{where}: {value} is outside {low} .. {high}")
    return kind(value)


def flag(value: Any, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise RecipeError(f"{where}: found {value!r}, expected true or false")
    return value


def text(value: Any, where: str) -> str:
    """A text."""
    if not isinstance(value, str):
        raise RecipeError(f"{where}: found {value!r}, expected text")
    return value


def maybe_text(value: Any, where: str) -> str | None:
    """A text, or nothing."""
    return None if value is None else text(value, where)


def texts(value: Any, where: str) -> tuple[str, ...]:
    """A list of texts."""
    if not isinstance(value, list):
        raise RecipeError(f"{where}: found {value!r}, expected a list of names")
    return tuple(text(entry, where) for entry in value)


def choice(value: Any, where: str, known: tuple[str, ...]) -> str:
    """One of the known words."""
    if value not in known:
        raise RecipeError(f"{where}: found {value!r}{nearest(str(value), known)}; choose one of {', '.join(known)}")
    return str(value)
