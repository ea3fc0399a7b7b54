"""The output folder: it appears under its name in one rename, when it is complete; killed at any moment, it does not.

Work goes on in a hidden sibling, `.NAME.percard-unfinished`, on the same file system. A replaced folder waits as
`.NAME.percard-old` for the rename, so that there is always one complete folder. The next run goes on with what a killed
one left (journal.py), or removes it when it is told to start over. A lock on the sibling keeps two runs apart; the kernel drops it when a process dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from ..formats.spec import FormatError

WORK = ".percard-work"  # journal and activations, inside the hidden sibling
FINISHED = ("config.json", "capture.json")  # what a complete output holds one of, written last
MARKER = ".percard-unfinished"  # formats/checkpoint.py puts it into a folder that it has not finished
KEPT = "what is finished is kept: the same command goes on, --fresh starts over"


def refuse(src: Path, dst: Path, force: bool) -> None:
    """Raises, before anything is made, when `dst` cannot be the output: FileExistsError or FormatError with a remedy."""
    here, there = dst.resolve(), src.resolve()
    if here == there:
        raise FormatError(f"{dst}: output and source are the same folder; choose another --out")
    if there in here.parents or here in there.parents:
        raise FormatError(f"{dst}: output and source {src} lie inside each other; choose another --out")
    if dst.is_symlink():
        raise FileExistsError(f"{dst}: output is a symbolic link; name the folder itself, or choose another --out")
    for parent in dst.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise FormatError(f"{dst}: {parent} is a file, not a folder; choose another --out")
    _tidy(dst)
    if not dst.exists() or (dst.is_dir() and (not any(dst.iterdir()) or (dst / MARKER).exists())):
        return
    if not dst.is_dir():
        raise FileExistsError(f"{dst}: output exists and is a file; choose another --out")
    if not force:
        raise FileExistsError(
            f"{dst}: output exists and is not empty; choose another --out, or replace it with --force"
        )
    if not finished(dst):
        raise FileExistsError(
            f"{dst}: holds no config.json, so it is no checkpoint and --force does not replace it; remove it yourself"
        )


class Output:
    """Context manager: `.folder` is where to write, `publish()` gives it its name; leaving without that removes it.

    With `.keep` set, an error of the machine (a full disk, an interrupt, another process that died) or of arithmetic (a loss that
    is NaN) leaves it for the next run, and `.note` is said beside it; an error of the input does not, unless `.written` says that
    all of it was done by then. `fresh` removes what an earlier run left before the work starts.
    """

    def __init__(self, dst: Path, force: bool = False, fresh: bool = False) -> None:
        self.dst = dst.parent.resolve() / dst.name if dst.name not in ("", "..") else dst.resolve()
        self._force, self._fresh = force, fresh
        self.keep = self.written = False
        self.note = ""
        self.folder = self.dst.with_name(f".{self.dst.name}.percard-unfinished")
        self.work = self.folder / WORK
        self._old = self.dst.with_name(f".{self.dst.name}.percard-old")
        self._lock: int | None = None
        self._made: list[Path] = []
        self._published = False

    def __enter__(self) -> Output:
        try:
            self._prepare()
        except BaseException:
            self._close()
            self._remove_made()
            raise
        return self

    def _prepare(self) -> None:
        missing = [p for p in (self.dst.parent, *self.dst.parent.parents) if not p.exists()]
        for parent in reversed(missing):
            parent.mkdir()
            self._made.append(parent)
        self.folder.mkdir(exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"{self.dst}: another run is writing it; wait for it, or choose another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        if self._old.exists():  # killed between the two renames of `publish`, or while the old folder was removed
            if self.dst.exists() or not finished(self._old):
                discard(self._old)
            else:
                self._old.rename(self.dst)
                if not self._force:
                    raise FileExistsError(
                        f"{self.dst}: a killed run had moved the old output away, it is back; replace it with --force"
                    )
        if self._fresh or not self.work.is_dir():
            for leftover in list(self.folder.iterdir()):
                discard(leftover)
        self.work.mkdir(exist_ok=True)

    def publish(self) -> None:
        """Gives the complete folder its name, in place of what stood there.

        Journal and activations go after that: a run that is killed before finds all that was done.
        """
        sync(self.folder)
        if self.dst.exists():
            self.dst.rename(self._old)
        self.folder.rename(self.dst)
        self._published = True
        sync(self.dst.parent)
        _tidy(self.dst)
        if self._old.exists():
            discard(self._old)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = self.keep and (self.written or not isinstance(error, (ValueError, NotImplementedError)))
        if error is not None and kept and self.note and not self._published and not isinstance(error, ArithmeticError):
            error.add_note(self.note)
        if not self._published and not kept:
            if self._lock is not None:
                with contextlib.suppress(OSError):
                    discard(self.folder)
            self._remove_made()
        self._close()

    def _close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _remove_made(self) -> None:
        for parent in reversed(self._made):
            with contextlib.suppress(OSError):
                parent.rmdir()


def _tidy(dst: Path) -> None:
    """Removes journal and activations that a run leaves in its output when it is killed between the last rename and its end."""
    if finished(dst) and (dst / WORK).is_dir():
        shutil.rmtree(dst / WORK)


def finished(folder: Path) -> bool:
    """Whether a folder is an output of ours, or some checkpoint."""
    return any((folder / name).is_file() for name in FINISHED)


def unfinished(dst: Path, journal: str) -> int:
    """How many lines the journal of an unfinished run to `dst` has; 0 = there is none."""
    path = dst.with_name(f".{dst.name}.percard-unfinished") / WORK / journal
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def discard(path: Path) -> None:
    """Removes a file or a folder; the file of FINISHED goes first, so that what a kill leaves of it looks like no output."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    for name in FINISHED:
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path)


def sync(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, text: str) -> None:
    """A small text file, complete or not there."""
    part = path.with_name(path.name + ".tmp")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
