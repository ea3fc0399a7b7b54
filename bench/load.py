"""Request mixes: how long prompts and answers are, seeded, the same for every side of a comparison.

A mix is data (mixes.json beside this file, or a file of the user's): medians of two lognormal lengths and their spread, with the
source of each, or a table of lengths that are drawn from as they are. `scale` shortens all of it for a small machine, and
the mix then has another name: "chat*0.25".
"""

from __future__ import annotations

import functools
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..formats.spec import FormatError

_MIXES = Path(__file__).resolve().parent / "mixes.json"
_MOST = 2**20  # tokens of a line of a user's file; more is a mistake


@dataclass(frozen=True)
class Request:
    """Tokens of prompt and answer; `leaves` after so many answer tokens (0: before it began), None = stays to the end."""

    prompt: int
    answer: int
    leaves: int | None = None


@dataclass(frozen=True)
class Mix:
    """`name` as records have it; `source` says where lengths come from; either `table` or medians and spread of lognormals."""

    name: str
    source: str
    prompt: tuple[float, float] = (0.0, 0.0)
    answer: tuple[float, float] = (0.0, 0.0)
    table: tuple[tuple[int, int], ...] = ()
    scale: float = 1.0

    def draw(self, count: int, seed: int) -> list[Request]:
        """`count` requests; the same seed gives the same ones, and a longer list begins with the shorter one."""
        generator = random.Random(f"{seed}:{self.name}")
        found = []
        for _ in range(count):
            if self.table:
                sizes: Sequence[float] = generator.choice(self.table)
            else:
                sizes = [generator.lognormvariate(math.log(m), s) for m, s in (self.prompt, self.answer)]
            found.append(Request(*(max(1, round(size * self.scale)) for size in sizes)))
        return found


@functools.cache
def named() -> Mapping[str, Mapping[str, Any]]:
    """The rows of mixes.json by name."""
    return {row["name"]: row for row in json.loads(_MIXES.read_text(encoding="utf-8"))["mixes"]}


def mix_of(text: str, scale: float = 1.0) -> Mix:
    """The Mix of a name, or of a JSONL file with a line {"prompt": tokens, "answer": tokens} for each request.

    FormatError for a name that is not known, and for a file that is not like that.
    """
    if not 0 < scale <= 1:
        raise FormatError(f"scale {scale:g} of a mix; expected more than 0 and at most 1")
    suffix = "" if scale == 1 else f"*{scale:g}"
    row = named().get(text)
    if row is not None:
        prompt, answer = ((float(row[p]["median"]), float(row[p]["sigma"])) for p in ("prompt", "answer"))
        return Mix(text + suffix, row["source"], prompt, answer, scale=scale)
    path = Path(text)
    if not path.is_file():
        raise FormatError(f"mix {text!r} is not known; known: {', '.join(named())}, or a JSONL file of lengths")
    return Mix(path.stem + suffix, str(path), table=_table(path), scale=scale)


def _table(path: Path) -> tuple[tuple[int, int], ...]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = row["prompt"], row["answer"]
        except (ValueError, KeyError, TypeError):
            pair = (None, None)
        if not all(type(n) is int and 1 <= n <= _MOST for n in pair):
            wanted = '{"prompt": 512, "answer": 128}'
            raise FormatError(f"{path}:{number}: {line.strip()[:60]!r}; expected lengths in tokens, such as {wanted}")
        found.append(pair)
    if not found:
        raise FormatError(f"{path}: holds no request; expected a JSON line for each")
    return tuple(found)


def means(requests: Sequence[Request]) -> tuple[int, int]:
    """Mean tokens of prompt and answer, rounded."""
    return round(statistics.fmean(r.prompt for r in requests)), round(statistics.fmean(r.answer for r in requests))


def prompts(requests: Sequence[Request], vocab: int, seed: int, text: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Ids int64 [prompt] of each request: pieces of `text` (ids int64 [n]) from seeded places, or random ones."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for request in requests:
        if text is None:
            found.append(torch.randint(0, vocab, (request.prompt,), generator=generator))
            continue
        first = int(torch.randint(0, len(text), (1,), generator=generator))
        found.append(text.roll(-first).repeat(-(-request.prompt // len(text)))[: request.prompt])
    return found
