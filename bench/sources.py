"""Where records come from: a file, a folder that a bench wrote, or a file or folder of a git revision (REV:path)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..formats.spec import FormatError
from . import record
from .folder import RECORDS, rows_of
from .record import Record

REMEDY = "give a JSONL file of records, a folder that a bench wrote, or REV:PATH of a git revision"


def load(where: str | Path) -> list[Record]:
    """All records of a source, in order. FormatError when it is not there, holds none, or a row is not a record."""
    return [record for records in by_file(where).values() for record in records]


@contextmanager
def reading(where: object) -> Iterator[None]:
    """Around what makes tables of records of a file: FormatError for a row that lacks what every bench writes.

    A Record checks the types of what is there; what a table needs beside depends on the table.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise FormatError(
            f"{where}: a row lacks what its table needs ({type(error).__name__}: {error}); it was edited, or is of another "
            "version: remove it or measure it again; PERCARD_TRACEBACK=1 shows where"
        ) from error


def by_file(where: str | Path) -> dict[str, list[Record]]:
    """The same by name of file, which is "" where a source is one run.

    A folder gives its records.jsonl, or the packed stages of a slot, or all of its *.jsonl, each a run of its own.
    """
    path = Path(where)
    if path.is_dir():
        found = _folder(path)
    elif path.is_file():
        found = {"": list(record.read(path))}
    elif ":" in str(where):
        found = _revision(str(where))
    else:
        raise FormatError(f"{where}: not there; {REMEDY}")
    if not any(found.values()):
        raise FormatError(f"{where}: holds no record; {REMEDY}")
    return found


def _folder(path: Path) -> dict[str, list[Record]]:
    if (path / RECORDS).is_file():
        return {"": list(record.read(path / RECORDS))}
    if packed := rows_of(path):
        return {"": [Record.from_json(json.dumps(row), f"{path}: stage archive") for row in packed]}
    return {file.name: list(record.read(file)) for file in sorted(path.glob("*.jsonl"))}


def _revision(where: str) -> dict[str, list[Record]]:
    revision, _, name = where.partition(":")
    if not revision or revision.startswith("-"):
        raise FormatError(f"{where}: no git revision before the colon; {REMEDY}")
    commit = _git(where, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").strip()
    spec = f"{commit}:./{name.removeprefix('./').rstrip('/')}"  # ./ is the folder where the command runs
    if _git(where, "cat-file", "-t", spec).strip() != "tree":
        return {"": list(record.parse(_git(where, "show", spec), where))}
    inside = [line for line in _git(where, "ls-tree", "--name-only", spec).splitlines() if line.endswith(".jsonl")]
    found = {}
    for file in [RECORDS] if RECORDS in inside else sorted(inside):
        text = _git(where, "show", f"{spec}/{file}")
        found["" if file == RECORDS else file] = list(record.parse(text, f"{where.rstrip('/')}/{file}"))
    return found


def _git(where: str, *args: str) -> str:
    try:
        done = subprocess.run(["git", *args], capture_output=True, timeout=60, check=False)
        text = done.stdout.decode("utf-8")
    except FileNotFoundError:
        raise FormatError(f"{where}: no such file, and git is not installed to look for a revision; {REMEDY}") from None
    except UnicodeDecodeError:
        raise FormatError(f"{where}: not text; {REMEDY}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise FormatError(
            f"{where}: no such file here, nor in git ({said[0] if said else 'no such revision'}); {REMEDY}"
        )
    return text
