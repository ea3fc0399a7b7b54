"""Activations on disk: one safetensors file with one tensor "x" [samples, T, H], written as a stream, read by ranges.

The file gets its name when it is complete; its sha256 is known by then. The chain of blocks always goes through such a
file, so a run that is resumed sees the very numbers of one that was not.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType

import torch

from ..formats.header import nbytes_of, print_header, read_header
from ..formats.spec import FormatError


class SpillWriter:
    """A context manager; `add` takes [n, T, H] in the dtype of the file, in order. `sha256` is there after the block."""

    def __init__(self, path: Path, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
        self.path, self.dtype, self.shape = path, dtype, shape
        self.sha256 = ""
        self._left = nbytes_of(dtype, shape)

    def __enter__(self) -> SpillWriter:
        header, _ = print_header({"x": (self.dtype, self.shape)})
        self._file = self.path.with_name(self.path.name + ".tmp").open("wb")
        self._hash = hashlib.sha256()
        self._put(header)
        return self

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)

    def add(self, x: torch.Tensor) -> None:
        data = x.detach().to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8).numpy().data
        self._left -= len(data)
        self._put(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._file.close()
            return
        assert self._left == 0, f"{self.path}: {self._left} bytes are missing"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.path.with_name(self.path.name + ".tmp").rename(self.path)
        self.sha256 = self._hash.hexdigest()


class Spill:
    """A complete file of activations. FormatError when it is not there or was cut."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FormatError(f"{path}: activations of an earlier run are gone; start over with --fresh")
        self.path, self._info = path, read_header(path)["x"]
        self.shape = tuple(self._info.shape)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Samples start..stop-1: [stop - start, T, H] in the dtype of the file."""
        row = self._info.nbytes // self.shape[0]
        data = torch.empty((stop - start) * row, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._info.begin + start * row)
            view, done = data.numpy().data, 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise FormatError(f"{self.path}: ends too early; start over with --fresh")
                done += count
        return data.view(self._info.dtype).view(stop - start, *self.shape[1:])
