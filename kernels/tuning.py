"""How a Triton body finds its Config: given > tuned.json for this card and this Triton > the op's pure heuristic.

Nothing times itself at a request. A tuned entry holds for the exact weight and for one bucket of M, never for "the nearest
M": bucket b is 2^(b-1) < M <= 2^b.

    tuned.json   {"schema": 1, "entries": [{"card": "NVIDIA H200", "triton": "3.9", "m_bucket": 4, "n": 4096, "k": 4096,
                  "group": 128, "dtype": "bfloat16", "config": {"block_n": 128, ...}}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from .device import Card

SCHEMA = 1
Config = TypeVar("Config")
Table = dict[tuple, dict[str, Any]]


class Shape(NamedTuple):
    """One problem as a heuristic sees it. `group` is the codes that share a scale, K or more for one scale per row."""

    m: int
    n: int
    k: int
    group: int
    dtype: torch.dtype


def bucket(m: int) -> int:
    """Number of the bucket that M falls into: 0 for 1, 1 for 2, 2 for 3 and 4, 3 for 5 to 8 ..."""
    return max(m - 1, 0).bit_length()


def in_bucket(shape: Shape) -> Shape:
    """The largest problem of the bucket: what a heuristic answers for, so that a Config holds for all of the bucket."""
    return shape._replace(m=1 << bucket(shape.m))


def load(path: Path, triton_version: str) -> Table:
    """The entries of a tuned.json that hold for this Triton: (card, bucket, n, k, group, dtype) -> fields of a Config."""
    file = json.loads(path.read_text())
    if file.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: schema is {file.get('schema')!r}, expected {SCHEMA}; tune again")
    release = ".".join(triton_version.split(".")[:2])
    keys = ("card", "m_bucket", "n", "k", "group", "dtype")
    return {tuple(e[key] for key in keys): e["config"] for e in file["entries"] if e["triton"] == release}


def choose(
    table: Table, shape: Shape, card: Card, make: type[Config], heuristic: Callable[[Shape, Card], Config]
) -> Config:
    """The measured Config of this problem, or what the heuristic says for its bucket."""
    key = (card.name, bucket(shape.m), shape.n, shape.k, shape.group, str(shape.dtype).removeprefix("torch."))
    fields = table.get(key)
    return heuristic(in_bucket(shape), card) if fields is None else make(**fields)


def split_k(tiles: int, steps: int, shape: Shape, card: Card) -> int:
    """Into how many parts K is cut so that a small problem fills the card: 1, 2, 4, 8 or 16.

    The smallest number that gives nine programs for ten SMs, with at least 4 steps each, and with M * split <= K / 64:
    the partial sums stay under a quarter of the bytes of a 4-bit weight.
    """
    most = min(steps // 4, shape.k // (64 * shape.m), 16)
    split = 1
    while 2 * split <= most and 10 * tiles * split < 9 * card.sms:
        split *= 2
    return split


def cut(steps: int, split: int) -> tuple[int, int]:
    """(steps of each part, parts that have any) of a loop of `steps` cut into at most `split` parts."""
    each = -(-steps // split)
    return each, -(-steps // each)
