"""Which modules a target string of a compressed-tensors config means, and how to name a set of modules by a few of them.

A target is an exact name, `re:` and a regex (anchored in front only), or a class name. Engines ask with fused names
(`qkv_proj` for q, k and v), and fall back to the class before they look at the members; so a config with several groups
names all of its modules by regexes that hold a dot before the leaf (`re:.*v_proj$` would match `qkv_proj` as well).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from .spec import FormatError, QuantSpec

# Members of one fused linear in engines: they share a spec.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.[^.]+")


_WAYS = 1e8  # in which a regex may try to match one name: about a second
_PATIENCE_S = 60.0  # processor time that all regexes of a config may take; those of real ones take milliseconds


def patience(modules: Iterable[str]) -> Iterator[str]:
    """The modules of a config, one by one; FormatError once its regexes have taken a minute."""
    began = time.process_time()
    for module in modules:
        if time.process_time() - began > _PATIENCE_S:
            raise FormatError("quantization_config: its regexes take minutes; name the modules more simply")
        yield module


@lru_cache(maxsize=4096)
def guarded(pattern: str, length: int, where: str = "quantization_config: target") -> re.Pattern[str]:
    """A compiled regex that cannot take forever on a name of at most `length` characters; FormatError, with `where`, otherwise.

    A config comes from strangers, and `(a+)+$` takes years on a name of forty characters.
    """
    where = f"{where} {'re:' + pattern!r}"
    try:
        ways, regex = _ways(_parser.parse(pattern), length), re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(f"{where} is not a regex: {error}") from None
    if not ways <= _WAYS:
        raise FormatError(f"{where} could take forever: loops inside loops, or too many; name the modules more simply")
    return regex


def _ways(items: Iterable[tuple[Any, Any]], length: int) -> float:
    """About how many ways a backtracking matcher has to lay a parsed regex over `length` characters; inf = too many."""
    ways, loops = 1.0, 0
    for op, value in items:
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT):
            least, most, body = value
            inner, most = _ways(body, length), min(int(most), length)
            if most <= 1:
                ways *= 1 + inner
            elif inner > 1:  # a choice in each turn
                ways *= inner**most if most * math.log(inner) < 50 else math.inf
            else:
                ways *= max(1, most - int(least) + 1)
                loops += 1
        elif op is ops.BRANCH:
            ways *= sum(_ways(branch, length) for branch in value[1])
        elif op in (ops.SUBPATTERN, ops.ASSERT, ops.ASSERT_NOT):
            ways *= _ways(value[-1], length)
        elif op is ops.ATOMIC_GROUP:
            ways *= _ways(value, length)
        elif op is ops.GROUPREF_EXISTS:
            ways *= sum(_ways(branch, length) for branch in value[1:] if branch)
    return ways / math.factorial(loops)  # loops side by side share the characters


def matches(name: str, targets: Iterable[str], kind: int | None = None) -> bool:
    """Whether module `name` is meant. kind: 0 exact names only, 1 regexes only, 2 the class Linear only, None all."""
    for target in targets:
        if target.startswith("re:"):
            if kind not in (None, 1):
                continue
            if guarded(target[3:], 1 << len(name).bit_length()).match(name):
                return True
        elif (kind in (None, 0) and target == name) or (kind in (None, 2) and target == "Linear"):
            return True
    return False


def check_fused(specs: Mapping[str, QuantSpec], ignore: Iterable[str]) -> None:
    """FormatError where modules that engines fuse into one do not share a spec, or only some of them have one."""
    ignore = [target for target in ignore if target != "Linear"]
    experts: dict[str, tuple[str, QuantSpec]] = {}
    for name, spec in specs.items():
        parent, _, leaf = name.rpartition(".")
        for members in FUSED:
            for other in members if leaf in members else ():
                sibling = f"{parent}.{other}" if parent else other
                if specs.get(sibling, spec) != spec:
                    raise FormatError(
                        f"{name} is {spec}, {sibling} is {specs[sibling]}; engines fuse {', '.join(members)}: one spec for all"
                    )
                if sibling not in specs and matches(sibling, ignore):
                    raise FormatError(
                        f"{name} is {spec}, {sibling} is ignored; engines fuse {', '.join(members)}: one for all"
                    )
        match = _EXPERT.fullmatch(name)
        if match:
            first, expected = experts.setdefault(match[1], (name, spec))
            if spec != expected:
                raise FormatError(f"{first} is {expected}, {name} is {spec}; all experts of a layer have one spec")


def _parts(name: str) -> tuple[str, str, str, str] | None:
    """(names before the layer number, number, names between as a regex, leaf) of `model.layers.3.mlp.up_proj`."""
    pieces = name.split(".")
    at = next((i for i, piece in enumerate(pieces) if piece.isascii() and piece.isdigit()), None)
    if not at or at + 1 >= len(pieces):
        return None
    between = [r"\d+" if piece.isascii() and piece.isdigit() else re.escape(piece) for piece in pieces[at + 1 : -1]]
    return ".".join(pieces[:at]), pieces[at], r"\.".join(between), pieces[-1]


def targets_of(specs: Mapping[str, QuantSpec], spec: QuantSpec) -> list[str]:
    """Targets that mean the modules of `spec` and no other module of `specs`; `["Linear"]` if all have that spec."""
    if all(other == spec for other in specs.values()):
        return ["Linear"]
    layers: dict[tuple[str, str, str], dict[str, bool]] = {}  # (before, between, leaf) -> {layer number: has the spec}
    exact = []
    for name, other in specs.items():
        parts = _parts(name)
        if parts is None:
            exact += [name] if other == spec else []
            continue
        before, number, between, leaf = parts
        layers.setdefault((before, between, leaf), {})[number] = other == spec
    leaves: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}  # same place, same layers -> leaves
    for (before, between, leaf), numbers in layers.items():
        chosen = tuple(sorted((n for n, has in numbers.items() if has), key=int))
        if chosen:
            where = () if len(chosen) == len(numbers) else chosen
            leaves.setdefault((before, between, where), []).append(leaf)
    regexes = []
    for (before, between, where), names in leaves.items():
        number = r"\d+" if not where else where[0] if len(where) == 1 else f"({'|'.join(where)})"
        leaf = re.escape(names[0]) if len(names) == 1 else f"({'|'.join(re.escape(n) for n in sorted(names))})"
        middle = rf"\.{between}" if between else ""
        # Only the last name before the number: engines rename what stands before it (model. <-> language_model.model.).
        short = rf"re:(.*\.)?{re.escape(before.rpartition('.')[2])}\.{number}{middle}\.{leaf}$"
        full = rf"re:{re.escape(before)}\.{number}{middle}\.{leaf}$"
        clash = any(other != spec and matches(name, [short], 1) for name, other in specs.items())
        regexes.append(full if clash else short)
    return sorted(exact) + sorted(regexes)
