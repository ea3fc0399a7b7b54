"""How a verb speaks: progress, one-line errors, exit codes. Imports neither torch nor a floor of the house.

Results go to stdout, everything else to stderr. With --json both are JSON, one object a line. Exit codes are the same
for every verb: 0 done, 1 error, 2 bad input, 3 refused by preflight or not comparable, 4 gate red, 5 cut but valid,
130 interrupted.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .quant.progress import Progress

DONE, ERROR, BAD_INPUT, REFUSED, GATE_RED, CUT, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

_PLAIN_EVERY_S = 5.0
# By name: the floors that raise them are not imported to print an error.
_REFUSALS = ("Refused", "NotComparable", "Cut", "Diverged")  # with exit codes of their own


def plain_data(value: Any) -> Any:
    """Dataclasses, paths, specs and tuples as JSON knows them; NaN and infinities become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if hasattr(value, "weight_bits"):  # a QuantSpec prints as its name
            return str(value)
        return {field.name: plain_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_data(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def emit_json(value: Any) -> None:
    """One line of JSON on stdout."""
    print(json.dumps(plain_data(value)), flush=True)


def show(part: RenderableType) -> None:
    """A part of a result on stdout. Without a terminal it is 120 columns wide and has no colour; words are no markup."""
    from rich.console import Console

    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    screen.print(part, markup=not isinstance(part, str), soft_wrap=isinstance(part, str) and not sys.stdout.isatty())


def show_records(records: Sequence[Any], as_json: bool, render: Callable[[Any], Iterable[RenderableType]]) -> int:
    """Records of a bench on stdout, a JSON line each or as `render` has them; the exit code: red when a gate is."""
    if as_json:
        for record in records:
            print(record.to_json(), flush=True)
    else:
        for part in render(records):
            show(part)
    return GATE_RED if any((record.quality or {}).get("gate") == "red" for record in records) else DONE


def show_kernels(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of kernels/inspection.py, a line of figures under the name of each kernel."""
    for arch in dict.fromkeys(row["arch"] for row in rows):
        mine = [row for row in rows if row["arch"] == arch]
        show(f"\n{arch}, Triton {mine[0]['triton']}")
        for row in mine:
            per_weight = row["instructions_per_weight"]
            figures = [f"{row['registers']} registers", f"{row['spilled_bytes']} bytes spilled"]
            figures.append(f"{row['shared_bytes']} bytes shared")
            if row["mma"]:
                figures += [row["mma"], f"weight from {row['weight_operand']}", f"{per_weight} instructions per weight"]
            show(f"  {row['config']}\n      {', '.join(figures)}")


@contextmanager
def showing_progress(as_json: bool) -> Iterator[Callable[[Progress], None]]:
    """A callback for Progress events: bars on a terminal, plain lines elsewhere, JSON lines with --json."""
    if as_json:
        yield _json_line
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _PlainLines()


def _json_line(event: Progress) -> None:
    print(json.dumps({"event": "progress", **plain_data(event)}), file=sys.stderr, flush=True)


def showing_steps(as_json: bool) -> Callable[[str], None]:
    """A callback for verbs that tell their steps in words."""
    if as_json:
        return lambda words: print(json.dumps({"event": "step", "step": words}), file=sys.stderr, flush=True)
    return lambda words: print(f"  {words}", file=sys.stderr, flush=True)


def amount(count: float, unit: str) -> str:
    """12.3 MB for bytes, `7 blocks` otherwise."""
    if unit != "bytes":
        return f"{count:.0f} {unit}"
    for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {name}"
    return f"{count:.0f} B"


def clock(seconds: float | None) -> str:
    """Seconds as m:ss or h:mm:ss; `?` when nobody knows."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _PlainLines:
    """A line every five seconds, and one when a phase ends: a log stays short, and short work says little."""

    def __init__(self) -> None:
        self._phase, self._last, self._ended = "", time.monotonic(), False

    def __call__(self, event: Progress) -> None:
        now, ends = time.monotonic(), event.total > 0 and event.done >= event.total
        if event.phase != self._phase:
            self._phase, self._ended = event.phase, False
        if self._ended or (not ends and now - self._last < _PLAIN_EVERY_S):
            return
        self._last, self._ended = now, ends
        share = f"{event.done / event.total:4.0%}" if event.total else "    "
        size = f"{amount(event.done, event.unit)} of {amount(event.total, event.unit)}" if event.total else ""
        tail = "done" if ends else f"{event.label}  ETA {clock(event.eta_s)}"
        print(f"{event.phase:10} {share}  {size}  {tail}", file=sys.stderr, flush=True)


@contextmanager
def _bars() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[size]}"),
        TextColumn("ETA {task.fields[eta]}"),
        TextColumn("[dim]{task.fields[label]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:

        def show(event: Progress) -> None:
            if event.phase not in tasks:
                tasks[event.phase] = bars.add_task(event.phase, total=event.total or None, size="", eta="?", label="")
            size = f"{amount(event.done, event.unit)} of {amount(event.total, event.unit)}"
            bars.update(
                tasks[event.phase],
                completed=event.done,
                total=event.total or None,
                size=size,
                eta=clock(event.eta_s),
                label=event.label[-48:],
            )

        yield show


def fail(error: BaseException, verb: str, as_json: bool) -> int:
    """Prints one line that says what went wrong, and returns the exit code."""
    code, text = describe(error)
    if os.environ.get("PERCARD_TRACEBACK") == "1":
        traceback.print_exception(error)
    line = "; ".join([" ".join(text.split()), *getattr(error, "__notes__", [])])
    if as_json:
        print(json.dumps({"event": "error", "verb": verb, "message": line, "exit": code}), file=sys.stderr, flush=True)
    else:
        print(f"{verb}: {line}", file=sys.stderr, flush=True)
    return code


def describe(error: BaseException) -> tuple[int, str]:
    """(exit code, text) of an exception.

    All errors that percard raises on purpose for bad input are ValueErrors (FormatError, RecipeError) or
    NotImplementedErrors (Unsupported: nothing here can serve this model or machine).
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; nothing that looks finished was left behind"
    if type(error).__name__ in _REFUSALS:
        return getattr(error, "code", REFUSED), str(error)
    if hasattr(error, "format_message"):  # a usage error of the argument parser
        return BAD_INPUT, f"{error.format_message().rstrip('.')}; `--help` shows what it takes"
    if isinstance(error, OSError):
        return _describe_os_error(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return ERROR, f"the package {error.name} is missing; pip install {error.name.split('.')[0]}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ERROR, f"out of memory ({error}); close other programs or use a machine with more"
    if isinstance(error, ValueError | NotImplementedError) and str(error):
        return BAD_INPUT, str(error)
    hint = "set PERCARD_TRACEBACK=1 to see where, and please report it"
    return ERROR, f"unexpected {type(error).__name__}: {error}; {hint}"


def _describe_os_error(error: OSError) -> tuple[int, str]:
    name = f"{error.filename}: " if error.filename is not None else ""
    said = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        kept = getattr(error, "__notes__", [])  # it says what stays
        free = "free some space or name another --out" + ("" if kept else "; the unfinished output was removed")
        return ERROR, f"{name}disk full ({said}); {free}"
    if error.errno == errno.EROFS:
        return ERROR, f"{name}{said}; name another --out"
    if isinstance(error, FileNotFoundError):
        return BAD_INPUT, f"{name}{said}; check the path" if name else said
    if isinstance(error, FileExistsError):
        return BAD_INPUT, f"{name}{said}; choose another output, or --force to replace it" if name else said
    if isinstance(error, NotADirectoryError | IsADirectoryError):
        return BAD_INPUT, f"{name}{said}; check the path"
    if isinstance(error, PermissionError):
        return ERROR, f"{name}{said}; check who owns it"
    return ERROR, f"{name}{said}"
