"""A teacher's words on the disk: for each position of a text its k likeliest next tokens, their log-probabilities, and the rest.

    shard-00000.safetensors   rows = positions in order, the same number in each shard but the last
        tokens    int32 [n]      the text itself
        doc       int32 [n]      which document it belongs to, counted from 0
        ids       int32 [n, k]   the likeliest next tokens, by falling probability
        logp      fp16  [n, k]   their log-probabilities at temperature 1 over the true vocabulary (padded rows of the head: none)
        log_rest  fp16  [n]      log of the probability of all other tokens together; -inf where k is the whole vocabulary
    windows.safetensors       only where windows differ in length: length int32 [w], prompt int32 [w] (tokens that are not trained on)
    tokenizer.json            the teacher's
    capture.json              all facts, and sha256 of every file above; it comes last

8 + 6 k + 2 bytes a token: 394 at k = 64. A capture with k = 0 holds tokens and doc only. Row t is about token t + 1. The rows of a
window are what the teacher said with that window, and nothing before it, as its context; a window may lie over two shards.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ..formats.header import TensorInfo, print_header, read_header, read_json
from ..formats.spec import FormatError
from .vocabulary import Words

FACTS, WINDOWS, SCHEMA = "capture.json", "windows.safetensors", 1
_AGAIN = "capture it again"
_NUMPY = {torch.int32: "<i4", torch.float16: "<f2"}


def columns(k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> dtype and what follows the rows in its shape."""
    kept: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"tokens": (torch.int32, ()), "doc": (torch.int32, ())}
    if k:
        kept |= {"ids": (torch.int32, (k,)), "logp": (torch.float16, (k,)), "log_rest": (torch.float16, ())}
    return kept


def row_bytes(k: int) -> int:
    """Bytes of a position, headers apart."""
    return sum(dtype.itemsize * (width[0] if width else 1) for dtype, width in columns(k).values())


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """A context manager; `put` writes rows of some columns at their place. The file gets its name when the block ends well."""

    def __init__(self, path: Path, rows: int, k: int) -> None:
        self.path, self.rows = path, rows
        self._part = path.with_name(path.name + ".tmp")
        self._columns = columns(k)
        self._header, self._ranges = print_header({n: (d, (rows, *w)) for n, (d, w) in self._columns.items()})

    def __enter__(self) -> ShardWriter:
        self._file = self._part.open("wb")
        self._file.write(self._header)
        self._file.truncate(max(begin + size for begin, size in self._ranges.values()))
        return self

    def put(self, start: int, values: Mapping[str, torch.Tensor]) -> None:
        """Rows start, start + 1, ... of the shard: name -> [n] or [n, k], in any number type."""
        for name, value in values.items():
            dtype, _ = self._columns[name]
            begin, size = self._ranges[name]
            step = size // self.rows
            self._file.seek(begin + start * step)
            self._file.write(value.to(dtype).contiguous().numpy().tobytes())

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        if kind is None:
            self._part.rename(self.path)
        else:
            self._part.unlink()


@dataclass(frozen=True, eq=False)
class Window:
    """A stretch of text that the teacher read on its own; row t is about token t + 1.

    tokens int64 [T]; doc int32 [T]; counted bool [T]: whether row t is trained on: not the last one, not the last of a document, not
    one about a token of a prompt. ids int64 [T, k], logp fp16 [T, k], log_rest fp16 [T], or None where k = 0.
    """

    tokens: torch.Tensor
    doc: torch.Tensor
    counted: torch.Tensor
    ids: torch.Tensor | None
    logp: torch.Tensor | None
    log_rest: torch.Tensor | None


class Capture:
    """A capture, opened and checked; `windows(i)` reads what it needs and no more, so processes may share the folder.

    facts: capture.json. k: tokens kept (0: only the text). vocab: the true vocabulary. lengths int64 [w]: tokens of each window.
    sha256: of capture.json, and so of all of it.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts
        self.k, self.vocab = int(facts["k"]), int(facts["vocab"])
        self.sha256 = sha256_of(folder / FACTS)
        self._sums = [(str(e["file"]), str(e["sha256"])) for e in [*facts["shards"], *facts["files"]]]
        if (
            not facts["tokenizer"]["sha256"]
            or int(facts["tokenizer"]["tokens"]) != self.vocab
            or not 0 <= self.k <= self.vocab
        ):
            raise FormatError(
                f"{folder / FACTS}: vocab {self.vocab}, k {self.k} and a tokenizer of {facts['tokenizer']['tokens']} tokens do not "
                f"go together; {_AGAIN}"
            )
        self._shards = [_checked(folder / shard_name(i), int(s["rows"]), self.k) for i, s in enumerate(facts["shards"])]
        rows = [int(s["rows"]) for s in facts["shards"]]
        self._starts = np.concatenate([[0], np.cumsum(rows)])
        self.lengths, self._prompts = self._windows()
        self._begin = np.concatenate([[0], np.cumsum(self.lengths)])
        if int(self._begin[-1]) != int(self._starts[-1]):
            raise FormatError(
                f"{folder}: windows of {self._begin[-1]} tokens over shards of {self._starts[-1]}; {_AGAIN}"
            )

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None, *, verify: bool = True
    ) -> Capture:
        """tokenizer: the student's folder, refused when its ids mean other tokens. verify: read all files and compare their sha256.

        FormatError for a folder that is no capture, one that was cut or changed, and another tokenizer.
        """
        path = Path(folder)
        if not (path / FACTS).is_file():
            raise FormatError(
                f"{path}: no {FACTS}, so it is no finished capture; write one with percard capture TEACHER"
            )
        facts = read_json(path / FACTS)
        if facts.get("verb") != "capture" or facts.get("schema") != SCHEMA:
            raise FormatError(
                f"{path / FACTS}: schema {facts.get('schema')} of {facts.get('verb')!r}, expected {SCHEMA} of 'capture'; "
                "take the version of percard that wrote it, or capture it again"
            )
        try:
            found = cls(path, facts)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(
                f"{path / FACTS}: not as it was written ({type(error).__name__}: {error}); {_AGAIN}"
            ) from None
        if verify:
            found.verify()
        if tokenizer is not None:
            found.must_fit(tokenizer)
        return found

    def __len__(self) -> int:
        """Windows."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return int(self._begin[-1])

    def verify(self) -> None:
        """Reads every file; FormatError names the first whose sha256 is not the one that was written down."""
        for name, written in self._sums:
            path = self.folder / Path(name).name
            if not path.is_file():
                raise FormatError(f"{path}: missing; {_AGAIN}")
            if (found := sha256_of(path)) != written:
                raise FormatError(f"{path}: sha256 {found[:12]}, written was {written[:12]}: changed since; {_AGAIN}")

    def must_fit(self, model_dir: str | os.PathLike[str]) -> None:
        """FormatError when an id of this capture is another token, or none, in the tokenizer of `model_dir`."""
        theirs = Words.of(Path(model_dir))
        if theirs.sha256 == self.facts["tokenizer"]["sha256"]:
            return
        ours = Words.of(self.folder)
        ours.must_agree(theirs)
        if len(theirs) < len(ours):
            raise FormatError(
                f"{theirs.path}: {len(theirs)} tokens, the capture was made with {len(ours)}; capture with this tokenizer"
            )

    def windows(self, index: int) -> Window:
        """Window number `index`."""
        start, stop = int(self._begin[index]), int(self._begin[index + 1])
        table = {name: self._rows(name, start, stop) for name in columns(self.k)}
        doc, length = table["doc"], stop - start
        counted = torch.zeros(length, dtype=torch.bool)
        counted[:-1] = doc[:-1] == doc[1:]
        counted[: max(0, int(self._prompts[index]) - 1)] = False
        ids = table["ids"].long() if self.k else None
        return Window(table["tokens"].long(), doc, counted, ids, table.get("logp"), table.get("log_rest"))

    def __iter__(self) -> Iterator[Window]:
        return (self.windows(i) for i in range(len(self)))

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start .. stop - 1 of a column, from all shards that hold some."""
        parts = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            first = int(self._starts[shard])
            end = min(stop, int(self._starts[shard + 1]))
            info = self._shards[shard][name]
            width = info.nbytes // info.shape[0]
            count = (end - start) * width // info.dtype.itemsize
            flat = np.fromfile(info.file, _NUMPY[info.dtype], count, offset=info.begin + (start - first) * width)
            if len(flat) != count:
                raise FormatError(f"{info.file}: ends too early, it was cut while it was read; {_AGAIN}")
            parts.append(torch.from_numpy(flat).view(end - start, *info.shape[1:]))
            start, shard = end, shard + 1
        return torch.cat(parts)

    def _windows(self) -> tuple[np.ndarray, np.ndarray]:
        """Length and prompt of every window."""
        packing = self.facts["packing"]
        count = int(packing["windows"])
        if packing["window"] is not None:
            return np.full(count, int(packing["window"]), dtype=np.int64), np.zeros(count, dtype=np.int64)
        path = self.folder / WINDOWS
        if not path.is_file():
            raise FormatError(f"{path}: missing; {_AGAIN}")
        read_header(path)  # a cut file ends here
        table = load_file(path)
        if len(table["length"]) != count:
            raise FormatError(f"{path}: {len(table['length'])} windows, {FACTS} says {count}; {_AGAIN}")
        return table["length"].long().numpy(), table["prompt"].long().numpy()


def _checked(path: Path, rows: int, k: int) -> dict[str, TensorInfo]:
    """The header of a shard, which must be what capture.json says."""
    if not path.is_file():
        raise FormatError(f"{path}: missing; {_AGAIN}")
    found = read_header(path)
    wanted = {name: (dtype, (rows, *width)) for name, (dtype, width) in columns(k).items()}
    if {name: (info.dtype, info.shape) for name, info in found.items()} != wanted:
        shapes = ", ".join(f"{name} {list(info.shape)}" for name, info in sorted(found.items()))
        raise FormatError(f"{path}: holds {shapes}; {FACTS} says {rows} rows of k = {k}: another capture's; {_AGAIN}")
    return found
