"""The text that a student is trained on: tokens on the disk, windows of them, and batches in a seeded order.

The same kinds of text as calibration (text.py): *.jsonl with {"text"}, {"messages"} or {"ids"}, a text file, hf:NAME. Documents
are laid end to end and cut into windows; lines of ids that all have one length are the windows themselves. Which windows a
step takes follows from seed, step and batch alone, so a run that goes on sees what it would have seen. Captures bring windows of
their own; several of them, or a text and captures, are shuffled together.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..formats.spec import FormatError
from . import output
from .capture_cache import Capture
from .distill_losses import TopK
from .distill_models import Batch
from .sources import open_text
from .text import Encoder, Tally

TOKENS, FACTS = "tokens.i32", "tokens.json"
NEVER = -60000.0  # a logarithm that fp16 holds, and whose exponential is 0


@dataclass(frozen=True, eq=False)
class Row:
    """One window: tokens int64 [T]; counted bool [T]; kept: what a capture says about each position, None without one."""

    tokens: torch.Tensor
    counted: torch.Tensor
    kept: TopK | None = None


@dataclass(frozen=True, eq=False)
class TokenData:
    """tokens int32 [n, T] (a map of the file); facts for report and card: name, sha256, tokens, documents, windows, window."""

    tokens: np.ndarray
    facts: dict[str, Any]

    @property
    def windows(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each window."""
        return np.full(len(self.tokens), self.tokens.shape[1], dtype=np.int64)

    def row(self, index: int) -> Row:
        """Window number `index`."""
        ids = torch.from_numpy(self.tokens[index].astype(np.int64))
        counted = torch.ones(ids.shape, dtype=torch.bool)
        counted[-1] = False
        return Row(ids, counted)


@dataclass(frozen=True, eq=False)
class CapturedData:
    """Windows of a capture; k: how many of the kept ids are read, 0: its text alone.

    What is behind the k joins the rest, which is exact. A window whose capture keeps no probabilities says what came next: all
    of it on one token, so that the divergence there is cross-entropy, of which the teacher's samples give forward KL's gradient.
    """

    capture: Capture
    k: int
    vocab: int

    @property
    def windows(self) -> int:
        return len(self.capture)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each window."""
        return self.capture.lengths

    @property
    def facts(self) -> dict[str, Any]:
        """As of TokenData."""
        found = {"name": self.capture.folder.name, "sha256": self.capture.sha256, "tokens": self.capture.tokens}
        longest = int(self.capture.lengths.max())
        return {**found, "windows": len(self.capture), "window": longest, "k": self.capture.k}

    def row(self, index: int) -> Row:
        """Window number `index`."""
        found, kept = self.capture.windows(index), None
        if self.k and found.ids is not None and found.logp is not None and found.log_rest is not None:
            rest = torch.cat([found.logp[:, self.k :], found.log_rest[:, None]], 1)
            rest = rest[:, 0] if rest.shape[1] == 1 else rest.float().logsumexp(1).half()
            kept = TopK(found.ids[:, : self.k], found.logp[:, : self.k], rest)
        elif self.k:
            kept = certain(found.tokens.roll(-1), self.k, self.vocab)
        return Row(found.tokens, found.counted, kept)


def certain(ids: torch.Tensor, k: int, vocab: int) -> TopK:
    """All probability on one id: ids int64 [T]. The others of the k are distinct ids that have none."""
    logp = torch.full((len(ids), k), NEVER, dtype=torch.float16)
    logp[:, 0] = 0.0
    return TopK((ids[:, None] + torch.arange(k)) % vocab, logp, torch.full((len(ids),), -math.inf, dtype=torch.float16))


@dataclass(frozen=True, eq=False)
class Data:
    """Batches in a seeded order over the windows of all sources. Shorter windows are padded at the end, where nothing counts."""

    sources: Sequence[TokenData | CapturedData]
    seed: int

    @property
    def windows(self) -> int:
        return sum(source.windows for source in self.sources)

    @property
    def facts(self) -> dict[str, Any]:
        """Of the one source, or of all together with each of them."""
        each = [source.facts for source in self.sources]
        if len(each) == 1:
            return each[0]
        digest = hashlib.sha256("".join(str(facts["sha256"]) for facts in each).encode()).hexdigest()
        return {
            "name": " + ".join(str(facts["name"]) for facts in each),
            "sha256": digest,
            "tokens": sum(facts["tokens"] for facts in each),
            "windows": self.windows,
            "window": max(facts["window"] for facts in each),
            "sources": each,
        }

    def count(self, windows: int) -> int:
        """Tokens of the first so many windows of the walk."""
        lengths = np.concatenate([source.lengths for source in self.sources])
        return int(lengths[order(self.windows, self.seed, 0, windows)].sum())

    def batch(self, step: int, size: int) -> Batch:
        """Batch number `step`: each epoch goes through all windows in an order of its own."""
        rows = [self._row(i) for i in order(self.windows, self.seed, step * size, size)]
        length = max(len(row.tokens) for row in rows)

        def laid(parts: list[torch.Tensor]) -> torch.Tensor:
            out = parts[0].new_zeros(len(parts), length, *parts[0].shape[1:])
            for row, part in zip(out, parts, strict=True):
                row[: len(part)] = part
            return out

        said = [row.kept for row in rows if row.kept is not None]
        kept = None
        if said:  # of all rows or of none
            columns = ([getattr(s, name) for s in said] for name in ("ids", "logp", "log_rest"))
            kept = TopK(*(laid(column).flatten(0, 1) for column in columns))
        return Batch(laid([row.tokens for row in rows]), laid([row.counted for row in rows]), kept)

    def _row(self, index: int) -> Row:
        for source in self.sources:
            if index < source.windows:
                return source.row(index)
            index -= source.windows
        raise IndexError(index)


def order(windows: int, seed: int, start: int, count: int) -> list[int]:
    """Windows number start to start + count of an endless walk; a new permutation for each time through."""
    found: list[int] = []
    while len(found) < count:
        epoch, at = divmod(start + len(found), windows)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        found += torch.randperm(windows, generator=generator)[at : at + count - len(found)].tolist()
    return found


def digest(batch: Batch) -> str:
    """sha256 of a batch's ids, so that it can be found again."""
    return hashlib.sha256(np.ascontiguousarray(batch.ids.numpy(), dtype="<i8").tobytes()).hexdigest()[:16]


def write(source: str, folder: Path, model_dir: Path, vocab: int, length: int) -> None:
    """Tokenises the whole text into `folder`; facts come last, so that what is there is complete.

    FormatError names file and line of what cannot be read; for no text at all, and for less than one window.
    """
    text, encoder, tally = open_text(source), Encoder(model_dir, vocab), Tally()
    with (folder / TOKENS).open("wb") as file:
        for document in text.documents():
            tally.add(encoder.encode(document, tally), document.more)
            for part in tally.parts:
                file.write(part.astype("<i4").tobytes())
            tally.parts.clear()
        file.flush()
        os.fsync(file.fileno())
    length = _window(tally, length, text.name, text.nothing(len(tally.sizes)))
    facts = {
        "source": text.name,
        "name": text.label,
        **text.digest(),
        "documents": sum(1 for size in tally.sizes if size),
        "tokens": tally.total,
        "window": length,
        "windows": tally.total // length,
        "template": tally.template,
    }
    output.write(folder / FACTS, json.dumps(facts))


def opened(folder: Path) -> TokenData:
    """What `write` left."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    flat = np.memmap(folder / TOKENS, dtype="<i4", mode="r")
    used = facts["windows"] * facts["window"]
    return TokenData(flat[:used].reshape(facts["windows"], facts["window"]), facts)


def probe(source: str, model_dir: Path, vocab: int, length: int, batch: int) -> str:
    """Reads only the front of the text: FormatError when it cannot be read or holds less than one batch; its name."""
    text, encoder, tally = open_text(source), Encoder(model_dir, vocab), Tally()
    whole = True
    for document in text.documents():
        tally.add(encoder.encode(document, tally), document.more)
        if tally.total >= length * batch:
            whole = False
            break
    window = _window(tally, length, text.name, text.nothing(len(tally.sizes)))
    if whole and tally.total // window < batch:
        raise FormatError(
            f"{text.name}: {tally.total} tokens are {tally.total // window} windows of {window}, less than one batch of "
            f"{batch}; give more text, or a smaller --batch or --seq-len"
        )
    return str(text.label)


def _window(tally: Tally, length: int, name: str, nothing: str) -> int:
    """Tokens of a window; FormatError when there is not even one."""
    if not tally.total:
        raise FormatError(f"{name}: {nothing}; give text to train on")
    if tally.rows(length):
        return min(tally.lengths)
    if tally.total < length:
        raise FormatError(
            f"{name}: {tally.total} tokens are less than one window of {length}; "
            f"give more text, or a --seq-len of at most {tally.total}"
        )
    return length
