"""The folder of a run: manifest, files of rows, archives of finished stages. Valid at any moment, readable by parts.

A row is one line of JSON, written at once and fsynced; a manifest is replaced, never edited in place. What a killed
process can leave is a torn last line, which the next run cuts off.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
RECORDS = "records.jsonl"
MANIFEST = "manifest.json"


class BadFolder(ValueError):
    """The folder cannot take this run: other files, another machine, another run in progress."""


def open_manifest(folder: Path, about: Mapping[str, Any], identity: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The manifest of an old run in `folder`, or a new one. BadFolder says why a run cannot go on there."""
    path = folder / MANIFEST
    if not path.exists():
        return {
            "schema": SCHEMA,
            "state": "new",
            "started": timestamp(),
            "device": device,
            "machine": dict(identity),
            "about": dict(about),
            "calls": [],
            "stages": [],
            "row_files": [],
        }
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadFolder(f"{path}: not readable as JSON ({error}); choose a new folder") from None
    if manifest.get("schema") != SCHEMA:
        raise BadFolder(f"{path}: schema {manifest.get('schema')!r}, this percard writes {SCHEMA}; choose a new folder")
    if manifest["machine"] != dict(identity):
        differ = [k for k in {**manifest["machine"], **identity} if manifest["machine"].get(k) != identity.get(k)]
        old, new = ({k: m.get(k) for k in differ} for m in (manifest["machine"], identity))
        raise BadFolder(f"{folder}: holds a run on another machine ({old}, here {new}); choose a new folder")
    mend(folder / RECORDS)
    for name in manifest["row_files"]:
        mend(folder / name)
    code_changed = manifest["about"].get("sources") != about.get("sources")
    for entry in manifest["stages"]:
        for span in entry["ranges"]:
            if span[1] is None:  # the process was killed within this stage
                span[1] = (folder / RECORDS).stat().st_size if (folder / RECORDS).exists() else 0
        if code_changed and entry["state"] == "done":
            entry["state"] = "waiting"  # its cells are skipped one by one where their own code is the same
    manifest["about"] = dict(about)
    return manifest


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Holds `folder` for one run; makes it when it is not there. BadFolder when it holds something else."""
    if folder.exists() and not folder.is_dir():
        raise BadFolder(f"{folder}: is a file, expected a folder; choose another --out")
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    others = [p.name for p in folder.iterdir() if p.name not in (".lock", "worker.log", "triton-cache")]
    if others and not (folder / MANIFEST).exists():
        raise BadFolder(f"{folder}: holds files but no manifest.json ({others[0]}, ...); choose an empty folder")
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadFolder(f"{folder}: another run is writing there; wait for it or choose a new folder") from None
        try:
            yield
        finally:
            if fresh and not (folder / MANIFEST).exists():  # refused before anything was run: leave nothing
                for name in (".lock", "worker.log"):
                    (folder / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()


def pack_stage(folder: Path, entry: Mapping[str, Any]) -> str:
    """A stage's line of the manifest, its files and its rows of records.jsonl in one archive. Returns its name."""
    name = f"stage-{entry['number']}-{entry['name']}.tar.gz"
    temporary = folder / f"{name}.tmp"
    rows = b""
    if (folder / RECORDS).exists():
        data = (folder / RECORDS).read_bytes()
        rows = b"".join(data[start:end] for start, end in entry["ranges"])
    with tarfile.open(temporary, "w:gz") as archive:
        about = {key: value for key, value in entry.items() if key != "ranges"}
        _add(archive, "stage.json", json.dumps(about, indent=1).encode())
        if rows:
            _add(archive, RECORDS, rows)
        for file in entry["files"]:
            if (folder / file).exists():
                archive.add(folder / file, file)
    temporary.replace(folder / name)
    return name


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run, the last one per key: from records.jsonl, or from the archives where only those came back."""
    lines = list(read_lines(folder / RECORDS))
    if not lines:
        for path in sorted(folder.glob("stage-*.tar.gz")):
            lines += archived(path, RECORDS)
    latest: dict[str, dict[str, Any]] = {}
    for row in lines:
        latest[row["cell_key"]] = row
    return list(latest.values())


def archived(path: Path, name: str) -> list[dict[str, Any]]:
    """Rows of the file `name` in a stage's archive; [] when it is not there."""
    with tarfile.open(path, "r:gz") as archive:
        if name not in archive.getnames():
            return []
        member = archive.extractfile(name)
        assert member is not None
        return [json.loads(line) for line in member.read().splitlines() if line.strip()]


def cell_key(identity: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def merge(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`more` over `base`, dicts within dicts joined."""
    out = {key: dict(value) if isinstance(value, Mapping) else value for key, value in base.items()}
    for key, value in more.items():
        out[key] = merge(out[key], value) if isinstance(out.get(key), dict) and isinstance(value, Mapping) else value
    return out


def append_line(path: Path, line: str) -> None:
    """Adds one line, on disk when this returns. One write: a killed process leaves at most one torn line."""
    with path.open("ab", buffering=0) as file:
        file.write(line.encode() + b"\n")
        os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file of lines; nothing when it is not there. A torn last line is left out."""
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n")[:-1]:
        if line.strip():
            yield json.loads(line)


def mend(path: Path) -> None:
    """Cuts a torn last line off, so that the next row starts on a line of its own."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)


def replace(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), int(time.time())
    archive.addfile(info, io.BytesIO(data))


def timestamp() -> str:
    """Now, UTC, as ISO-8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
