"""What a measuring verb does with its cells: skips those that are in the file, appends, tells, goes on after a failure.

A cell is the least that is measured at once: one op at one case, one model in one spec. Its keys (record.cell_key) are the
whole state: a file of records that holds a settled row for each key of a cell has that cell, and nothing else is kept.

    cells.run([Cell("w8a8 down", (key,), 3.0, measure, row)], Path("out.jsonl"), say=print)

    3/12 25 % ETA 0:01:20  w8a8 down: 41.0 us, 1.93 x torch bfloat16

The slot has a machine of its own (runner.py): deadlines, stages, a worker process. Both skip by the same words of status.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from . import record
from .record import FAILURES, SETTLED, Record
from .worker import is_poison, outcome_of

Say = Callable[[str], None]
ENDINGS = (*FAILURES, "refused")  # of a row after which a cell made no other


class Cut(RuntimeError):
    """The run ended early and what is in the file is valid; the text says why. Exit code 5."""

    code = 5


@dataclass(frozen=True)
class Cell:
    """One cell of a verb.

    `keys` are the cell_keys of all records that it makes, `seconds` what it is predicted to take, `run` measures and gives
    the records (a generator has each one written as it comes), `row` is what the row of a cell that fails says of itself:
    level and case at least, and any other section of a Record.
    """

    name: str
    keys: tuple[str, ...]
    seconds: float
    run: Callable[[], Iterable[Record]]
    row: Mapping[str, Any]


def run(
    cells: Sequence[Cell],
    out: Path | None,
    *,
    say: Say,
    retry: bool = False,
    force: bool = False,
    dry_run: bool = False,
    now: Callable[[], float] = time.monotonic,
) -> list[Record]:
    """Records of all cells, in their order: those that `out` holds already and those that were measured now.

    `retry` measures failed cells again, `force` all; `dry_run` tells what would be measured and gives what is there. A
    cell that raises is a row that says so. A disk without room (OSError), an interrupt, and an error after which the card
    answers every call with the same one (Cut) end the run; what was measured stays in `out`, and a note on the exception
    says how many cells that are.
    """
    known = {} if force else settled(out, retry=retry)
    found: list[list[Record]] = [rows_of(cell, known) for cell in cells]
    waiting = [i for i, rows in enumerate(found) if not rows]
    if len(waiting) < len(cells):
        say(f"{len(cells) - len(waiting)} of {len(cells)} cells are in {out}; --force measures them again")
    if dry_run:
        for i in waiting:
            say(f"{cells[i].name}: about {cells[i].seconds:.1f} s")
        say(f"{len(waiting)} cells to measure, about {_clock(sum(cells[i].seconds for i in waiting))}")
        return [row for rows in found for row in rows]
    done = len(cells) - len(waiting)
    spent = predicted = 0.0
    for place, i in enumerate(waiting):
        with _keeping(out, done, len(cells)):
            began = now()
            found[i] = _measure(cells[i], out, now)
            done += 1
        spent, predicted = spent + now() - began, predicted + cells[i].seconds
        left = sum(cells[j].seconds for j in waiting[place + 1 :])
        left *= spent / predicted if predicted > 0 else 1.0
        eta = f" ETA {_clock(left)}" if place + 1 < len(waiting) else ""
        words = in_words(found[i][-1]) if found[i] else "gave no record"
        say(f"{done}/{len(cells)} {100 * done // len(cells)} %{eta}  {cells[i].name}: {words}")
        if left and found[i] and is_poison(found[i][-1].error):
            with _keeping(out, done, len(cells)):
                raise Cut(f"{cells[i].name} left the card's context unusable; the cells after it need a new process")
    return [row for rows in found for row in rows]


def settled(out: Path | None, *, retry: bool = False) -> dict[str, Record]:
    """The last row of each key in `out`, where that row is settled; with `retry` failures are not."""
    known: dict[str, Record] = {}
    if out is None or not out.is_file():
        return known
    for row in record.read(out):
        if row.status in SETTLED and not (retry and row.status in FAILURES):
            known[row.cell_key] = row
        else:
            known.pop(row.cell_key, None)
    return known


def rows_of(cell: Cell, known: Mapping[str, Record]) -> list[Record]:
    """The rows of a cell that need not be measured again: one for each key, or up to the one that says why it failed."""
    rows = [known[key] for key in cell.keys if key in known]
    ended = rows and rows[-1].status in ENDINGS and {row.cell_key for row in rows} == set(cell.keys[: len(rows)])
    return rows if ended or len(rows) == len(cell.keys) else []


def in_words(row: Record) -> str:
    """The figures of a row in a few words, or why there are none."""
    quality, latency, tokens = row.quality or {}, row.latency_us or {}, row.tokens or {}
    if row.error is not None:
        return f"{row.status}: {row.error.get('message', '')}"
    if quality.get("gate") == "red":
        return f"gate red: {'; '.join(quality.get('reasons') or [])}"
    parts = []
    if rate := tokens.get("tok_s") or tokens.get("tok_s_in"):
        parts.append(f"{rate:.1f} tok/s")
    elif median := latency.get("median"):
        parts.append(f"{median:.1f} us")
        if moved := (row.roofline or {}).get("bytes"):
            parts.append(f"{moved / median / 1e3:.1f} GB/s")
    base = next((rival for rival in row.against or () if rival["status"] == "ok"), None)
    if base is not None:
        parts.append(f"{base['ratio']:.2f} x {base['impl']}")
    if quality.get("kl") is not None:
        parts.append(f"KL {quality['kl']:.5f}, top-1 {quality['top1']:.2%}")
    return ", ".join(parts) or row.status


def _measure(cell: Cell, out: Path | None, now: Callable[[], float]) -> list[Record]:
    """The rows of one cell, each on the disk before the next is asked for; the last one says why it failed."""
    rows: list[Record] = []

    def keep(row: Record) -> None:
        rows.append(row)
        if out is not None:
            record.append(out, row)

    began = now()
    try:
        made = iter(cell.run())
    except Exception as error:
        keep(_failed(cell, rows, error, now() - began))
        return rows
    while True:
        try:
            row = next(made)
        except StopIteration:
            return rows
        except Exception as error:
            keep(_failed(cell, rows, error, now() - began))
            return rows
        keep(row)


def _failed(cell: Cell, rows: Sequence[Record], error: Exception, seconds: float) -> Record:
    """The row under the first key that has no row yet."""
    outcome = outcome_of(error)
    made = {row.cell_key for row in rows}
    key = next((key for key in cell.keys if key not in made), cell.keys[0])
    about = {"status": outcome.status, "error": outcome.error, "seconds": round(seconds, 3)}
    return Record(**{**cell.row, "cell_key": key, **about})  # type: ignore[arg-type]


@contextmanager
def _keeping(out: Path | None, done: int, total: int) -> Any:
    """An interrupt or a disk without room says what stays."""
    try:
        yield
    except (KeyboardInterrupt, OSError, Cut) as error:
        if out is None:
            error.add_note("nothing was kept: --out FILE.jsonl keeps what is measured")
        else:
            error.add_note(f"{done} of {total} cells are in {out} and stay there; the same command goes on")
        raise


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
