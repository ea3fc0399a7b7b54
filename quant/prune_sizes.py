"""The sizes of a decoder, and which of them a child may have so that it stays servable: quantised in groups and split over cards.

    size                     multiple of                                  and
    ffn, expert ffn          max(group, 64) x tp                          the same in all blocks
    hidden                   lcm(256, group); group below 1024            one set of channels for the whole model
    query heads              as many in each KV group                     heads x D / tp a multiple of the group (o_proj)
    KV heads                 of tp, or a divisor of it                    a KV head goes with all its query heads
    experts                  lcm(ep, 8); ep below 64 experts              at least as many as a token visits
    layers                   any                                          the first two and the last two stay

A size that is asked for is rounded up to the next one that is allowed. Multiples of group x tp: a row-parallel linear is cut
along its groups, and a group that lies on two cards is refused by every engine (vllm-project/vllm#17569, #13640).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..formats.spec import FormatError

ENDS = 2  # blocks at each end that are never dropped
NAMES = ("layers", "hidden", "heads", "kv_heads", "ffn", "experts", "expert_ffn")


@dataclass(frozen=True)
class Rule:
    """For what a child is aligned: the group of its quantisation, cards of tensor and of expert parallelism."""

    group: int = 128
    tp: int = 2
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("group", "tp", "ep"):
            if getattr(self, name) < 1:
                raise FormatError(f"--{name} {getattr(self, name)}: expected a whole number above 0")


@dataclass(frozen=True)
class Sizes:
    """Numbers of a decoder. `ffn` of its dense blocks; experts and expert_ffn 0 = it has none; `per_token` experts a token visits."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    experts: int = 0
    expert_ffn: int = 0
    per_token: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> Sizes:
        """From a config.json; FormatError names what is missing."""

        def number(key: str, default: int | None = None) -> int:
            value = config.get(key)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise FormatError(
                    f"{where}: {key} is {value!r}, expected a whole number above 0; config.json is broken"
                )
            return value

        hidden, heads = number("hidden_size"), number("num_attention_heads")
        found = cls(
            number("num_hidden_layers"),
            hidden,
            heads,
            number("num_key_value_heads", heads),
            number("head_dim", max(hidden // heads, 1)),
            number("intermediate_size"),
        )
        if config.get("moe_intermediate_size") is None:
            return found
        key = expert_key(config)
        sizes = number(key), number("moe_intermediate_size"), number("num_experts_per_tok")
        return replace(found, experts=sizes[0], expert_ffn=sizes[1], per_token=sizes[2])

    @property
    def per_group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads


def expert_key(config: Mapping[str, Any]) -> str:
    """Under which name a config counts experts; transformers 5 writes another than its checkpoints came with."""
    return "num_local_experts" if config.get("num_experts") is None else "num_experts"


def multiple(name: str, source: Sizes, rule: Rule) -> int:
    """What a size must be a multiple of."""
    if name in ("ffn", "expert_ffn"):
        return max(rule.group, 64) * rule.tp
    if name == "hidden":
        return math.lcm(256, rule.group) if source.hidden >= 1024 else rule.group
    if name == "experts":
        return math.lcm(rule.ep, 8) if source.experts >= 64 else rule.ep
    return 1


def align(source: Sizes, asked: Mapping[str, int], rule: Rule) -> Sizes:
    """The child's sizes for what was asked, each rounded up to the next allowed one; FormatError where there is none."""
    given = source
    for name in NAMES:
        if asked.get(name) is None:
            continue
        have, want = getattr(source, name), asked[name]
        if have == 0:
            raise FormatError(f"{name} {want}: this model has no experts; take ffn, layers, heads or hidden")
        if want > have:
            raise FormatError(
                f"{name} {want}: the source has {have}; pruning makes a model smaller, give at most {have}"
            )
        if want < 1:
            raise FormatError(f"{name} {want}: expected at least 1")
        step = multiple(name, source, rule)
        given = replace(given, **{name: min(have, -(-want // step) * step)})
    given = _heads(source, given, asked, rule)
    if given.layers < min(source.layers, 2 * ENDS):
        raise FormatError(
            f"layers {given.layers}: the first {ENDS} and the last {ENDS} blocks stay; give at least {min(source.layers, 2 * ENDS)}"
        )
    if given.experts < given.per_token:
        raise FormatError(f"experts {given.experts}: a token visits {given.per_token}; give at least so many")
    if given == source:
        words = ", ".join(
            f"{n} {v} (of {getattr(source, n)}, in steps of {multiple(n, source, rule)})" for n, v in asked.items()
        )
        raise FormatError(
            f"{words or 'no size asked for'}: nothing would be cut; ask for less, or a smaller --group or --tp"
        )
    return given


def _heads(source: Sizes, given: Sizes, asked: Mapping[str, int], rule: Rule) -> Sizes:
    """Heads of a child: whole KV groups, or as many query heads less in each."""
    if "kv_heads" in asked and "heads" not in asked:
        given = replace(given, heads=given.kv_heads * source.per_group)
    if given.heads % given.kv_heads:
        near = [n for n in range(given.kv_heads, source.heads + 1, given.kv_heads) if n >= given.heads] or [
            source.heads
        ]
        raise FormatError(
            f"heads {given.heads}: {given.kv_heads} KV heads need as many query heads each "
            f"({given.heads / given.kv_heads:g} here); the next such number is {near[0]}"
        )
    if given.heads == source.heads and given.kv_heads == source.kv_heads:
        return given
    columns, tp = given.heads * given.head_dim, rule.tp
    wrong = None
    if given.heads % tp or not (given.kv_heads % tp == 0 or tp % given.kv_heads == 0):
        wrong = f"do not divide over {tp} cards"
    elif columns % (tp * rule.group):
        wrong = f"give o_proj {columns} columns, no multiple of {tp} x {rule.group}"
    if wrong:
        raise FormatError(
            f"heads {given.heads}, kv_heads {given.kv_heads}: {wrong}; give others, or a smaller --tp or --group"
        )
    return given


def path(source: Sizes, rule: Rule) -> Iterator[Sizes]:
    """Ever smaller children, for a target: of a mixture fewer experts down to half; else a narrower ffn down to half, and then
    fewer layers too (down to half). Width before depth: at equal size it keeps more (arXiv 2408.11796)."""
    if source.experts:
        step = multiple("experts", source, rule)
        least = max(source.per_token, source.experts // 2)
        for count in range((source.experts - 1) // step * step, least - 1, -step):
            yield replace(source, experts=count)
        return
    step = multiple("ffn", source, rule)
    narrow = source
    for ffn in range((source.ffn - 1) // step * step, max(step, source.ffn // 2) - 1, -step):
        narrow = replace(source, ffn=ffn)
        yield narrow
    for layers in range(source.layers - 1, max(2 * ENDS, source.layers // 2) - 1, -1):
        yield replace(narrow, layers=layers)


def changed(source: Sizes, given: Sizes) -> dict[str, tuple[int, int]]:
    """Name -> (before, after) of every size that differs."""
    both = ((f.name, getattr(source, f.name), getattr(given, f.name)) for f in fields(Sizes))
    return {name: (before, after) for name, before, after in both if before != after}
