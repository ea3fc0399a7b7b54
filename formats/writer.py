"""Writing a checkpoint: a folder that either is whole or does not load.

Every file goes to `<name>.tmp`, then fsync, then a rename; the index comes after the shards and config.json last. A marker
stands in the folder from the first byte to the last: the next run finds it and may clean up. All sizes follow from names,
shapes and dtypes, so the headers are written first and tensors may come in any order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Protocol

import torch

from .header import nbytes_of, print_header, read_json
from .spec import FormatError

INDEX = "model.safetensors.index.json"
MARKER = ".percard-unfinished"
_CHUNK = 16 << 20  # bytes per write


class SideFiles(Protocol):
    """What `copy_side_files` needs of a source: a Checkpoint has it."""

    @property
    def path(self) -> Path: ...

    @property
    def side_files(self) -> list[Path]: ...


class _Shard:
    """One output file: header first, then each tensor at its own place, in any order; renamed when all bytes are there."""

    def __init__(self, path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.path = path
        self.header, self.ranges = print_header(tensors)
        self.left = sum(nbytes for _, nbytes in self.ranges.values())
        self.open_names = set(tensors)
        self.fd = -1
        self.again = False  # goes on in a file that an earlier run left

    @property
    def temporary(self) -> Path:
        return self.path.with_name(self.path.name + ".tmp")

    def write(self, data: memoryview, at: int) -> None:
        """All of `data` at byte `at`."""
        if self.fd < 0:
            self.fd = os.open(self.temporary, os.O_WRONLY | os.O_CREAT | (0 if self.again else os.O_EXCL), 0o644)
            self.write(memoryview(self.header), 0)
        while data:
            count = os.pwrite(self.fd, data[:_CHUNK], at)
            data, at = data[count:], at + count

    def resume(self, done: Collection[str]) -> None:
        """Goes on where an earlier run stopped: the tensors `done` lie in the file as they should."""
        mine = self.open_names & set(done)
        if not mine:
            self.path.unlink(missing_ok=True)
            self.temporary.unlink(missing_ok=True)
            return
        self.open_names -= mine
        self.again = True
        if self.path.exists() and self.open_names:  # finished, and then killed before anybody noted it
            self.path.rename(self.temporary)
        if not self.path.exists():
            least = max(sum(self.ranges[name]) for name in mine)
            if not self.temporary.exists() or self.temporary.stat().st_size < least:
                raise FormatError(
                    f"{self.temporary}: {len(mine)} tensors of it were written by an earlier run and are gone; "
                    "start over with --fresh"
                )
            if not self.open_names:
                self.temporary.rename(self.path)

    def done(self, name: str) -> None:
        """Tensor `name` is complete; the last one finishes the file."""
        self.open_names.discard(name)
        if self.open_names:
            return
        self.write(memoryview(b""), 0)  # a shard of empty tensors has only a header
        os.fsync(self.fd)
        self.close()
        self.temporary.rename(self.path)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


class Writer:
    """Writes a checkpoint into a new or empty folder, as a stream, in bounded memory. A context manager:

        with Writer(dst, {"w": (torch.int32, (8, 16)), ...}) as writer:
            writer.add("w", tensor)             # or add_rows, add_raw; in any order
            writer.copy_side_files(checkpoint)
            writer.finish(config)

    `plan` says dtype and shape of every tensor, so that all shards are known before the first byte: at most `max_shard`
    bytes each, filled in the order of the plan. Leaving the block without `finish`, or by an exception, removes what was
    written. OSError (a full disk) passes through, after that.

    `resume` names the tensors that an earlier writer of the same plan has written here and that were `sync`ed; they are
    not added again. With it, even empty, the folder may hold what a writer left, and leaving the block removes nothing.
    """

    def __init__(
        self,
        dst: str | Path,
        plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        max_shard: float = 5e9,
        resume: Collection[str] | None = None,
    ) -> None:
        self.path = Path(dst)
        self._resume = resume
        self._files: list[str] = []
        self._made_folder = False
        self._made_parents: list[Path] = []  # from the inside out
        self._started = False
        self._finished = False
        self._rows: dict[str, int] = {}  # bytes that a tensor has got so far
        self._done: set[str] = set()
        self._plan = {name: (dtype, tuple(shape)) for name, (dtype, shape) in plan.items()}
        groups: list[list[str]] = []
        size = 0.0
        for name, (dtype, shape) in self._plan.items():
            nbytes = nbytes_of(dtype, shape)
            if not groups or (size + nbytes > max_shard and groups[-1]):
                groups.append([])
                size = 0.0
            groups[-1].append(name)
            size += nbytes
        if not groups:
            raise FormatError(f"{self.path}: a checkpoint without a tensor is not written")
        count = len(groups)
        self._shards: dict[str, _Shard] = {}
        self.shard_of: dict[str, str] = {}
        for i, names in enumerate(groups, 1):
            file = "model.safetensors" if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
            self._shards[file] = _Shard(self.path / file, {name: self._plan[name] for name in names})
            self.shard_of |= dict.fromkeys(names, file)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(len(shard.header) + shard.left for shard in self._shards.values())

    def __enter__(self) -> Writer:
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise FormatError(f"{self.path}: exists and is not a folder; choose a new one")
        if self._resume is None and self.path.exists() and any(self.path.iterdir()):
            unfinished = (self.path / MARKER).exists()
            remedy = "call Writer.clean_unfinished first" if unfinished else "choose a new or empty folder"
            raise FormatError(f"{self.path}: is not empty{' (an unfinished output)' if unfinished else ''}; {remedy}")
        self._made_folder = not self.path.exists()
        self._made_parents = [parent for parent in self.path.parents if not parent.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._started = True
        try:
            self._own(*self._shards)
            if self._resume is not None:
                self._done = self._plan.keys() & set(self._resume)
                for shard in self._shards.values():
                    shard.resume(self._done)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            self._leave()
            self._started = False

    def _leave(self) -> None:
        if self._resume is None:
            self._remove()
        for shard in self._shards.values():
            shard.close()

    def sync(self) -> None:
        """What was added so far survives a power cut."""
        for shard in self._shards.values():
            if shard.fd >= 0:
                os.fsync(shard.fd)

    def _own(self, *names: str) -> None:
        """Write `names` into the marker before any of these files exists, so that a later run knows what to remove."""
        self._files += [name for name in names if name not in self._files]
        text = json.dumps({"made_folder": self._made_folder, "files": self._files}, indent=1)
        self._write_whole(MARKER, text.encode())

    def _write_whole(self, name: str, data: bytes | Iterable[bytes]) -> None:
        """A small file or a stream, to `<name>.tmp`, fsync, rename, fsync of the folder."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            for piece in [data] if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        _sync_folder(path.parent)

    def _open_tensor(self, name: str) -> _Shard:
        if not self._started or self._finished:
            raise FormatError(f"{self.path}: tensor {name!r} is added outside of `with Writer(...)`")
        if name not in self._plan:
            raise FormatError(f"{self.path}: tensor {name!r} is not in the plan of this checkpoint")
        if name in self._done:
            raise FormatError(f"{self.path}: tensor {name!r} is added twice")
        return self._shards[self.shard_of[name]]

    def _append(self, shard: _Shard, name: str, data: memoryview) -> None:
        begin, nbytes = shard.ranges[name]
        at = self._rows.get(name, 0)
        if at + len(data) > nbytes:
            raise FormatError(f"{self.path}: tensor {name!r} gets {at + len(data)} bytes, the plan says {nbytes}")
        shard.write(data, begin + at)
        self._rows[name] = at + len(data)

    def _complete(self, shard: _Shard, name: str) -> None:
        self._done.add(name)
        shard.done(name)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """A whole tensor, of the dtype and shape that the plan says."""
        shard = self._open_tensor(name)
        if (tensor.dtype, tuple(tensor.shape)) != self._plan[name] or name in self._rows:
            raise FormatError(
                f"{self.path}: tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, the plan says {self._plan[name]}"
            )
        self._append(shard, name, _bytes_of(tensor))
        self._complete(shard, name)

    def add_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Rows of a tensor along its first dimension, one range after the other; the last one completes it."""
        shard = self._open_tensor(name)
        dtype, shape = self._plan[name]
        row = nbytes_of(dtype, shape[1:])
        if rows.dtype != dtype or tuple(rows.shape[1:]) != shape[1:] or start * row != self._rows.get(name, 0):
            raise FormatError(
                f"{self.path}: rows of {name!r}: {rows.dtype} {tuple(rows.shape)} at {start}, the plan says {dtype} {shape}, "
                f"next is byte {self._rows.get(name, 0)}"
            )
        self._append(shard, name, _bytes_of(rows))
        if start + rows.shape[0] == shape[0]:
            self._complete(shard, name)

    def add_raw(self, name: str, pieces: Iterable[bytes]) -> None:
        """The bytes of a tensor, as `Checkpoint.raw` gives them."""
        shard = self._open_tensor(name)
        for piece in pieces:
            self._append(shard, name, memoryview(piece))
        nbytes = shard.ranges[name][1]
        if self._rows.get(name, 0) != nbytes:
            raise FormatError(
                f"{self.path}: tensor {name!r} got {self._rows.get(name, 0)} bytes, the plan says {nbytes}"
            )
        self._complete(shard, name)

    def copy_side_files(self, source: SideFiles) -> None:
        """Tokenizer, chat template, licence and all other side files of a checkpoint, byte by byte."""
        names = [path.relative_to(source.path).as_posix() for path in source.side_files]
        self._own(*names)
        for name, path in zip(names, source.side_files, strict=True):
            with path.open("rb") as file:
                self._write_whole(name, iter(lambda file=file: file.read(_CHUNK), b""))  # type: ignore[misc]

    def finish(self, config: Mapping[str, Any], extra_files: Mapping[str, bytes] | None = None) -> None:
        """Write `extra_files` (name to bytes), then the index if there are several shards, then config.json: now it loads."""
        missing = [name for name in self._plan if name not in self._done]
        if missing:
            raise FormatError(
                f"{self.path}: {len(missing)} planned tensors were not added, the first is {missing[0]!r}"
            )
        extra = dict(extra_files or {})
        for name in extra:
            if not _plain(name) or name in (*self._shards, INDEX, MARKER, "config.json"):
                raise FormatError(f"{self.path}: {name!r} cannot be the name of an extra file")
        self._own(*extra, INDEX, "config.json")
        for name, data in extra.items():
            self._write_whole(name, data)
        if len(self._shards) > 1:
            total = sum(nbytes_of(dtype, shape) for dtype, shape in self._plan.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self.shard_of.items()))}
            self._write_whole(INDEX, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())
        self._write_whole("config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
        (self.path / MARKER).unlink()
        _sync_folder(self.path)
        self._finished = True

    def _remove(self) -> None:
        """Close and delete all that this writer made. Errors of the clean-up do not hide the first error."""
        for shard in self._shards.values():
            shard.close()
        if self._started:
            _remove_files(self.path, self._files, self._made_folder)
            for parent in self._made_parents:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()

    @staticmethod
    def clean_unfinished(dst: str | Path) -> bool:
        """Remove what an interrupted Writer left in `dst`, and only that. True if there was something to clean."""
        folder = Path(dst)
        marker = folder / MARKER
        half = folder / (MARKER + ".tmp")
        if not marker.exists():
            if half.exists():  # killed while it wrote its very first file
                half.unlink()
                return True
            return False
        found = read_json(marker)
        files = found.get("files")
        if not isinstance(files, list) or not all(isinstance(name, str) and _plain(name) for name in files):
            raise FormatError(f"{marker}: not a marker of percard; look into the folder and remove it by hand")
        _remove_files(folder, files, found.get("made_folder") is True)
        return True


def _plain(name: str) -> bool:
    """A relative file name, folders allowed, that cannot lead out of the folder."""
    path = PurePosixPath(name)
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and "\0" not in name and str(path) == name


def _remove_files(folder: Path, names: list[str], made_folder: bool) -> None:
    """Delete `names` and their temporaries, then the marker, then folders that became empty. config.json goes first."""
    parents: set[Path] = set()
    for name in sorted(names, key=lambda n: n != "config.json"):
        path = folder / name
        above = [parent for parent in path.parents if parent != folder and parent.is_relative_to(folder)]
        if any(parent.is_symlink() for parent in above):
            continue
        parents.update(above)
        for file in (path, path.with_name(path.name + ".tmp")):
            file.unlink(missing_ok=True)
    for file in (folder / (MARKER + ".tmp"), folder / MARKER):
        file.unlink(missing_ok=True)
    for parent in [*sorted(parents, key=lambda p: len(p.parts), reverse=True), *([folder] if made_folder else [])]:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
