"""The journal of a run: what is finished, so that a run that was killed goes on where it was.

    line 0    the fingerprint: all that the bytes depend on
    line n    one finished unit (a block, or a stretch of copied tensors), written after its bytes are on the disk

A torn last line is dropped: its unit is done again, over the same bytes. A fingerprint that differs is refused, and the
part that differs is named.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..formats.checkpoint import Checkpoint

NAME = "journal.jsonl"
_WORDS = {
    "source": "the source's files",
    "recipe": "the recipe",
    "calibration": "the calibration text",
    "text": "the text or what is made of it",
    "tokenizer": "the tokenizer",
    "teacher": "the teacher's files",
    "wish": "what is trained how",
    "percard": "the version of percard",
    "torch": "the version of torch",
    "transformers": "the version of transformers",
    "device": "the device",
    "threads": "the number of threads",
    "dtype": "the dtype of the arithmetic",
    "package": "the version of the package that the method calls",
}


class Journal:
    """`entries` holds the finished units in order. FileExistsError when an earlier run was another one."""

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.entries: list[dict[str, Any]] = []
        lines = whole_lines(path)
        if lines:
            self._compare(lines[0])
            self.entries = lines[1:]
        else:
            path.unlink(missing_ok=True)
            self._append(fingerprint)

    def _compare(self, found: dict[str, Any]) -> None:
        keys = dict.fromkeys([*found, *self.fingerprint])
        names = [_WORDS.get(k, k) for k in keys if found.get(k) != self.fingerprint.get(k)]
        if names:
            raise FileExistsError(
                f"{self.path.parent.parent}: an unfinished run lies there and this one differs from it in "
                f"{', '.join(names)}; say what it said to go on, or start over with --fresh"
            )

    def add(self, entry: dict[str, Any]) -> None:
        """One more finished unit; its bytes must be on the disk by now."""
        self._append(entry)
        self.entries.append(entry)

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are complete; what follows the last of them is cut off the file."""
    if not path.is_file():
        return []
    text, good, lines = path.read_bytes(), 0, []
    for line in text.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(entry, dict):
            break
        lines.append(entry)
        good += len(line)
    if good < len(text):
        os.truncate(path, good)
    return lines


def stretches(names: Iterable[str], size_of: Callable[[str], int], limit: int) -> list[list[str]]:
    """`names` in order, cut behind the first of them with which a stretch is above `limit` bytes."""
    found: list[list[str]] = []
    size = limit + 1
    for name in names:
        if size > limit:
            found.append([])
            size = 0
        found[-1].append(name)
        size += size_of(name)
    return found


def source_mark(source: Checkpoint) -> str:
    """sha256 over config.json and over header, size and time of every shard: which files these are, without reading them."""
    digest = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    files: dict[Path, list[str]] = {}
    for name, info in source.tensors.items():
        files.setdefault(info.file, []).append(f"{name} {info.dtype} {list(info.shape)} {info.begin}")
    for path, names in sorted(files.items()):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        digest.update("\n".join(names).encode())
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """The parts of a fingerprint that are the machine's."""
    return {"torch": torch.__version__, "device": "cpu", "threads": torch.get_num_threads()}
