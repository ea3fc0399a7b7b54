"""The text that a student is trained on: tokens on the disk, windows of them, and batches in a seeded order.

The same kinds of text as calibration (text.py): *.jsonl with {"text"}, {"messages"} or {"ids"}, a text file, hf:NAME. Documents
are laid end to end and cut into windows; lines of ids that all have one length are the windows themselves. Which windows a
step takes follows from seed, step and batch alone, so a run that goes on sees what it would have seen.
"""

from __future__ import annotations

import hashlib
import json
import os
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
from .sources import open_source
from .text import Encoder, Tally

TOKENS, FACTS = "tokens.i32", "tokens.json"


@dataclass(frozen=True, eq=False)
class TokenData:
    """tokens int32 [n, T] (a map of the file); facts for report and card: name, sha256, tokens, documents, windows, window."""

    tokens: np.ndarray
    facts: dict[str, Any]
    seed: int

    @property
    def windows(self) -> int:
        return len(self.tokens)

    def batch(self, step: int, size: int) -> Batch:
        """Batch number `step`: each epoch goes through all windows in an order of its own."""
        rows = [self.tokens[i] for i in order(self.windows, self.seed, step * size, size)]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        counted = torch.ones(ids.shape, dtype=torch.bool)
        counted[:, -1] = False
        return Batch(ids, counted)

    def count(self, windows: int) -> int:
        """Tokens of the first so many windows of the walk."""
        return windows * self.tokens.shape[1]


@dataclass(frozen=True, eq=False)
class CapturedData:
    """Windows of a capture, with what the teacher said about them. Shorter ones are padded at the end, where nothing counts."""

    capture: Capture
    soft: bool  # whether the kept probabilities are read
    seed: int

    @property
    def windows(self) -> int:
        return len(self.capture)

    @property
    def facts(self) -> dict[str, Any]:
        """As of TokenData."""
        found = {"name": self.capture.folder.name, "sha256": self.capture.sha256, "tokens": self.capture.tokens}
        return {**found, "windows": self.windows, "window": int(self.capture.lengths.max()), "k": self.capture.k}

    def count(self, windows: int) -> int:
        return int(self.capture.lengths[order(self.windows, self.seed, 0, windows)].sum())

    def batch(self, step: int, size: int) -> Batch:
        found = [self.capture.windows(i) for i in order(self.windows, self.seed, step * size, size)]
        length = max(len(w.tokens) for w in found)

        def laid(parts: list[torch.Tensor]) -> torch.Tensor:
            out = parts[0].new_zeros(len(parts), length, *parts[0].shape[1:])
            for row, part in zip(out, parts, strict=True):
                row[: len(part)] = part
            return out

        kept = None
        if self.soft:
            columns = [[getattr(w, name) for w in found] for name in ("ids", "logp", "log_rest")]
            kept = TopK(*(laid(c).flatten(0, 1) for c in columns))
        return Batch(laid([w.tokens for w in found]), laid([w.counted for w in found]), kept)


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
    text, encoder, tally = open_source(source), Encoder(model_dir, vocab), Tally()
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


def opened(folder: Path, seed: int) -> TokenData:
    """What `write` left."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    flat = np.memmap(folder / TOKENS, dtype="<i4", mode="r")
    used = facts["windows"] * facts["window"]
    return TokenData(flat[:used].reshape(facts["windows"], facts["window"]), facts, seed)


def probe(source: str, model_dir: Path, vocab: int, length: int, batch: int) -> str:
    """Reads only the front of the text: FormatError when it cannot be read or holds less than one batch; its name."""
    text, encoder, tally = open_source(source), Encoder(model_dir, vocab), Tally()
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
