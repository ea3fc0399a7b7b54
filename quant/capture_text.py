"""What a teacher reads: tokens of a text as one row on the disk, where its documents end, and the windows it is cut into.

Of a text, documents are laid end to end without padding and cut into windows of one length; what is left at the end is not read.
Lines of ids that all have one length that fits are the windows themselves. Of completions, each is a window.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ..formats.spec import FormatError
from .sources import open_text
from .text import Encoder, Tally


@dataclass(frozen=True, eq=False)
class Stream:
    """tokens int32 [n] (a map of a file without a name); ends int64 [d]: where each document ends; begin int64 [w + 1]: where
    windows begin; window: their length, None where it differs; prompts int64 [w]: their tokens that are not trained on.

    facts: what capture.json says about the text. sha256: of all of it.
    """

    tokens: np.ndarray
    ends: np.ndarray
    begin: np.ndarray
    window: int | None
    prompts: np.ndarray
    facts: dict[str, Any]

    @property
    def rows(self) -> int:
        return int(self.begin[-1])

    @property
    def windows(self) -> int:
        return len(self.begin) - 1

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for part in (self.ends, self.begin, self.prompts):
            digest.update(len(part).to_bytes(8, "little") + part.astype("<i8").tobytes())
        for start in range(0, self.rows, 1 << 20):
            digest.update(np.ascontiguousarray(self.tokens[start : min(self.rows, start + (1 << 20))]).tobytes())
        return digest.hexdigest()

    def docs(self, start: int, stop: int) -> np.ndarray:
        """Which document each of the rows start .. stop - 1 belongs to: int32."""
        return np.searchsorted(self.ends, np.arange(start, stop), side="right").astype(np.int32)

    def over(self, start: int, stop: int) -> range:
        """The windows that hold any of the rows start .. stop - 1."""
        first = int(np.searchsorted(self.begin, start, side="right")) - 1
        return range(first, int(np.searchsorted(self.begin, stop, side="left")))

    def padded(self, windows: range) -> torch.Tensor:
        """Those windows as ids int64 [n, longest], zeros behind the shorter ones."""
        sizes = np.diff(self.begin[windows.start : windows.stop + 1])
        out = np.zeros((len(windows), int(sizes.max())), dtype=np.int64)
        for row, (index, size) in enumerate(zip(windows, sizes, strict=True)):
            at = int(self.begin[index])
            out[row, :size] = self.tokens[at : at + size]
        return torch.from_numpy(out)

    def counted(self) -> int:
        """Rows that are trained on, as capture_cache.Window has them."""
        inside = self.ends[:-1][
            self.ends[:-1] < self.rows
        ]  # a document's last row, unless it is a window's last as well
        borders = len(np.setdiff1d(inside, self.begin))
        prompts = int(np.maximum(0, self.prompts - 1).sum())
        return self.rows - self.windows - borders - prompts


def of_text(source: str, model_dir: Path, vocab: int, seq_len: int, positions: int | None) -> Stream:
    """A text that text.py can read. FormatError names file and line of what cannot be; for no text, and for less than one window."""
    if seq_len < 2:
        raise FormatError(f"--seq-len {seq_len}: a window has at least 2 tokens, one to see and one to predict")
    if positions is not None and seq_len > positions:
        raise FormatError(f"--seq-len {seq_len} is above the teacher's {positions} positions; lower it")
    text = open_text(source)
    encoder, tally, parts = Encoder(model_dir, vocab), Tally(), _Parts()
    for document in text.documents():
        tally.add(encoder.encode(document, tally), document.more)
        for part in tally.parts:
            parts.add(part)
        tally.parts.clear()
    if not tally.total:
        raise FormatError(f"{text.name}: {text.nothing(len(tally.sizes))}; give text for the teacher to read")
    window = min(tally.lengths) if tally.rows(seq_len) else seq_len
    count = tally.total // window
    if not count:
        raise FormatError(
            f"{text.name}: {tally.total} tokens are less than one window of {window}; give more text, or a --seq-len of at "
            f"most {tally.total}"
        )
    sizes = [size for size in tally.sizes if size]
    facts = {
        "source": text.name,
        "name": text.label,
        **text.digest(),
        "documents": len(sizes),
        "tokens": tally.total,
        "left_over": tally.total - count * window,
        "template": tally.template,
    }
    begin = np.arange(count + 1, dtype=np.int64) * window
    return Stream(parts.tokens(), np.cumsum(sizes), begin, window, np.zeros(count, dtype=np.int64), facts)


def of_sequences(sequences: Iterable[tuple[Sequence[int], int]], facts: dict[str, Any]) -> Stream:
    """(ids, tokens of its prompt) one after another: each a document and a window of its own."""
    parts, sizes, prompts = _Parts(), [], []
    for ids, prompt in sequences:
        parts.add(np.asarray(ids, dtype=np.int64))
        sizes.append(len(ids))
        prompts.append(prompt)
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    begin = np.concatenate([np.zeros(1, dtype=np.int64), ends])
    return Stream(parts.tokens(), ends, begin, None, np.asarray(prompts, dtype=np.int64), facts)


class _Parts:
    """Tokens as they come, four bytes each, in a file that goes when nobody reads it any more."""

    def __init__(self) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile()  # type: ignore[assignment]  # noqa: SIM115
        self._size = 0

    def add(self, ids: np.ndarray) -> None:
        self._file.write(ids.astype("<i4").tobytes())
        self._size += len(ids)

    def tokens(self) -> np.ndarray:
        """All of them."""
        self._file.flush()
        if not self._size:
            return np.zeros(0, dtype=np.int32)
        return np.memmap(self._file, dtype="<i4", mode="r", shape=(self._size,))
