"""The runner of a bench with a deadline: stages, cells, one folder that is valid at any moment and can be resumed.

    manifest.json     what was asked, what each stage came to; replaced atomically
    records.jsonl     one row per measurement, flushed and fsynced as it is made; other files of rows likewise
    stage-<n>-<name>.tar.gz     all that a finished stage wrote, in one file

A cell is one task for the worker process (worker.py). It starts only when the time left in its stage is more than
1.3 x its predicted seconds, else its row says `cut`. Time that a stage leaves over goes to the stages after it.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .folder import (
    MANIFEST,
    RECORDS,
    SCHEMA,
    append_line,
    cell_key,
    merge,
    open_manifest,
    pack_stage,
    read_lines,
    replace,
    timestamp,
)
from .record import FAILURES, SETTLED
from .stage import Cell, Run, Stage
from .worker import Worker, WorkerLike

SHARE = 0.95  # of the minutes are for stages; the rest is the reserve
SHORT_MINUTES = 3.0  # below it only the essential stages run
MARGIN = 1.3
LEAST_TIMEOUT_S, TIMEOUT_FACTOR = 20.0, 5.0
DONE, ERROR, BAD_INPUT, RED, CUT, INTERRUPTED = 0, 1, 2, 4, 5, 130


class Runner:
    """Runs stages into a folder. `now` is seconds from a steady clock; `make_worker(log)` starts a worker."""

    def __init__(
        self,
        folder: Path,
        minutes: float,
        *,
        about: Mapping[str, Any],
        device: str,
        identity: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        complete: Callable[[dict[str, Any]], str] = json.dumps,
        report: Callable[[Path], None] = lambda folder: None,
        probe: Cell | None = None,
        retry: bool = False,
        now: Callable[[], float] = time.monotonic,
        make_worker: Callable[[Path, Mapping[str, str]], WorkerLike] = Worker,
        say: Callable[[str], None] = print,
        start: float | None = None,
        again: Sequence[str] = (),
        worker: WorkerLike | None = None,
    ) -> None:
        """`identity` is what machine this is, for keys; `about` what else the manifest tells. `complete` makes the line
        of records.jsonl from a row, `report` is called after every stage. `probe` asks whether the card still answers.
        `start` is when the minutes began; stages named in `again` are entered in every call (their cells decide).
        `worker` is one that is up already."""
        self.folder, self.minutes, self.now, self.about = folder, minutes, now, dict(about)
        self.start = now() if start is None else start
        self.stopped: str | None = None
        self.say = say
        self._identity, self._device, self._env = dict(identity), device, dict(env or {})
        self._complete, self._report, self._probe, self._again = complete, report, probe, again
        self._settled_words = tuple(w for w in SETTLED if not (retry and w in FAILURES))
        self._make_worker = make_worker
        self._worker = worker  # of the timed cells: it keeps what it loaded between cells
        self._correction: dict[str, float] = {}
        self._lock = threading.Lock()
        self._manifest = open_manifest(folder, about, self._identity, device)
        self._settled = {name: self._read_settled(name) for name in [RECORDS, *self._manifest.get("row_files", [])]}

    # The run ------------------------------------------------------------------------------------------------------

    def run(self, stages: Sequence[Stage]) -> int:
        """Runs the stages that are not done, in order. Returns the exit code."""
        chosen = [s for s in stages if self.minutes >= SHORT_MINUTES or s.essential] or list(stages)
        numbers = {stage.name: n for n, stage in enumerate(stages, 1)}
        scale = self.minutes * 60 * SHARE / sum(s.seconds for s in chosen)
        self._manifest["calls"].append({"started": timestamp(), "minutes": self.minutes})
        self._save("running")
        code, spent, trouble = DONE, 0.0, False
        with self._signals():
            try:
                for stage in chosen:
                    spent += stage.seconds * scale
                    entry = self._entry(stage, numbers[stage.name])
                    if entry["state"] == "done" and stage.name not in self._again:
                        self.say(f"{stage.name}: done in an earlier call")
                        continue
                    if self.stopped:
                        continue
                    end = self.start + (self.minutes * 60 * SHARE if stage.patient else spent)
                    trouble |= self._run_stage(stage, entry, end)
            except OSError as error:  # the disk is full, or the folder is gone: no row can be written any more
                self.say(f"stopped: {error}")
                code = ERROR
            finally:
                if self._worker is not None:
                    self._worker.close()
            code = code or self._code(chosen, trouble)
            self._close_call(code)
        return code

    def _run_stage(self, stage: Stage, entry: dict[str, Any], deadline: float) -> bool:
        """One stage, its archive and the report. True when the stage itself broke."""
        run = Run(self, self.folder, self._device, self._identity, files=list(entry["files"]), deadline=deadline)
        began = self.now()
        entry.update(state="running", budget_s=round(deadline - began, 1))
        entry["ranges"].append([self._size(), None])
        self._save("running")
        broke = None
        try:
            stage.run(run)
        except OSError:
            raise
        except Exception as error:  # a stage with a bug must not cost the stages after it
            broke = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self.say(f"{stage.name} broke: {broke}")
        tally = run.tally
        state = "done"
        if broke or (tally.failed and not tally.ok and not tally.skipped):
            state = "failed"
        if self.stopped or tally.cut:
            state = "cut"
        if tally.red:
            state = "red"
        entry["ranges"][-1][1] = self._size()
        entry.update(
            state=state,
            seconds=round(entry["seconds"] + self.now() - began, 1),
            cells=vars(tally),
            note=broke or self.stopped or "",
            files=run.files,
        )
        self._manifest["row_files"] = sorted(
            {*self._manifest.get("row_files", []), *(f for f in run.files if f.endswith(".jsonl"))}
        )
        entry["archive"] = pack_stage(self.folder, entry)
        self._save("running")
        self._write_report()
        self.say(f"{stage.name}: {tally.words()} in {self.now() - began:.0f} s")
        return state == "failed"

    def _code(self, chosen: Sequence[Stage], trouble: bool) -> int:
        states = {self._entry(stage, 0)["state"] for stage in chosen}
        if self.stopped == "SIGINT":
            return INTERRUPTED
        if "red" in states:
            return RED
        if self.stopped or "cut" in states or "waiting" in states:
            return CUT
        return ERROR if trouble or "failed" in states else DONE

    def _close_call(self, code: int) -> None:
        words = {DONE: "complete", ERROR: "error", RED: "red", CUT: "cut", INTERRUPTED: "interrupted"}
        self._manifest["calls"][-1].update(ended=timestamp(), exit_code=code, why=self.stopped or "")
        with contextlib.suppress(OSError):
            self._save(words[code])
            self._write_report()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT set a flag that every wait looks at, so that no row is torn. Main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: object) -> None:
            self.stopped = signal.Signals(number).name

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # Cells --------------------------------------------------------------------------------------------------------

    def key(self, cell: Cell, part: str = "") -> str:
        """sha256 over a cell's identity and the machine: the same measurement has the same key in any run."""
        return cell_key({"schema": SCHEMA, "machine": self._identity, "part": part, **cell.identity})

    def run_cells(self, run: Run, cells: Sequence[Cell], into: str, workers: int, env: dict[str, str]) -> None:
        """See Run.cells."""
        settled = self._settled.setdefault(into, {})
        if into != RECORDS and into not in run.files:
            run.files.append(into)
        waiting: queue.SimpleQueue[tuple[int, Cell, str]] = queue.SimpleQueue()
        for number, cell in enumerate(cells, 1):
            key = self.key(cell)
            status = settled.get(key)
            if status is None:
                waiting.put((number, cell, key))
            else:
                run.tally.red += status == "red"
                run.tally.failed += status in FAILURES
                run.tally.skipped += status != "red" and status not in FAILURES
        if waiting.empty():
            return

        def drain(worker: WorkerLike) -> None:
            while True:
                try:
                    number, cell, key = waiting.get_nowait()
                except queue.Empty:
                    return
                self._run_cell(run, worker, cell, key, into, f"{number}/{len(cells)}")

        if workers == 1 and not env:
            drain(self._timed_worker())
            return
        failures: list[BaseException] = []

        def own_worker() -> None:
            worker = self._make_worker(self.folder / "worker.log", {**self._env, **env})
            try:
                drain(worker)
            except BaseException as error:
                failures.append(error)
            finally:
                worker.close()

        threads = [threading.Thread(target=own_worker) for _ in range(min(workers, waiting.qsize()))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def ask(self, task: str, arguments: Mapping[str, Any], timeout: float) -> list[dict[str, Any]]:
        """See Run.ask. In the process of the timed cells, which has loaded all that planning needs."""
        rows: list[dict[str, Any]] = []
        outcome = self._timed_worker().run(task, arguments, timeout, rows.append, lambda: self.stopped is not None)
        if outcome.status != "ok":
            raise RuntimeError((outcome.error or {}).get("message", f"{task} ended with {outcome.status}"))
        return rows

    def _timed_worker(self) -> WorkerLike:
        if self._worker is None:
            self._worker = self._make_worker(self.folder / "worker.log", self._env)
        return self._worker

    def _run_cell(self, run: Run, worker: WorkerLike, cell: Cell, key: str, into: str, place: str) -> None:
        if self.stopped is None:
            worker.ready(lambda: self.stopped is not None)
        predicted = cell.seconds * self._correction.get(cell.kind, 1.0)
        if self.stopped or run.left() <= MARGIN * predicted:
            why = self.stopped or f"{max(0.0, run.left()):.1f} s left in the stage"
            self._cut(run, cell, key, into, predicted, why)
            return
        began = self.now()
        own: list[str] = []

        def on_row(row: dict[str, Any]) -> None:
            part, words = row.pop("part", ""), row.pop("words", "")
            full = {"status": "ok", **merge(cell.row, row), "seconds": round(self.now() - began, 3)}
            if not part:
                own.append("red" if _is_red(full) else full["status"])
            self.append({**full, "cell_key": self.key(cell, part)}, into)
            self.say(f"{place} {cell.name}{part and ' ' + part}: {words or _why(full) or full['status']}")

        timeout = min(max(LEAST_TIMEOUT_S, TIMEOUT_FACTOR * predicted), max(1.0, self._hard_left()))
        outcome = worker.run(cell.task, cell.arguments, timeout, on_row, lambda: self.stopped is not None)
        took = self.now() - began
        with self._lock:
            if outcome.status == "ok":
                seen = took / cell.seconds if cell.seconds else 1.0
                self._correction[cell.kind] = 0.5 * self._correction.get(cell.kind, seen) + 0.5 * seen
        if outcome.status == "stopped" or (outcome.status == "timeout" and self._hard_left() < 1.0):
            self._cut(run, cell, key, into, predicted, self.stopped or "the slot ended within the cell")
            return
        if not own:
            status = "failed" if outcome.status == "died" else outcome.status
            row = {**cell.row, "cell_key": key, "status": status, "error": outcome.error, "seconds": round(took, 3)}
            self.append(row, into)
            own.append(status)
            self.say(f"{place} {cell.name}: {_why(row) or status}")
        with self._lock:
            word = own[-1]
            self._settled[into][key] = word
            run.tally.red += word == "red"
            run.tally.ok += word in ("ok", "absent", "refused", "suspect")
            run.tally.failed += word in FAILURES
            run.tally.cut += word == "cut"
        if outcome.lost_card or (outcome.poisoned and self._probe is not None and not self._card_answers(worker)):
            self.stopped = "lost card"

    def _card_answers(self, worker: WorkerLike) -> bool:
        """True when a fresh process can still use the card."""
        assert self._probe is not None
        outcome = worker.run(
            self._probe.task, self._probe.arguments, 60.0, lambda row: None, lambda: bool(self.stopped)
        )
        return outcome.status in ("ok", "stopped")

    def _cut(self, run: Run, cell: Cell, key: str, into: str, predicted: float, why: str) -> None:
        error = {"type": "Cut", "message": f"{why}; predicted {predicted:.1f} s", "stage": "deadline"}
        self.append({**cell.row, "cell_key": key, "status": "cut", "error": error, "seconds": 0.0}, into)
        with self._lock:
            run.tally.cut += 1

    def _hard_left(self) -> float:
        """Seconds until the whole slot ends, less what the last report needs."""
        return self.start + self.minutes * 60 * (1 + SHARE) / 2 - self.now()

    # The folder ---------------------------------------------------------------------------------------------------

    def append(self, row: Mapping[str, Any], into: str) -> None:
        """One row, on disk when this returns. Rows of records.jsonl are completed to full records."""
        line = self._complete(dict(row)) if into == RECORDS else json.dumps({"ts": timestamp(), **row})
        with self._lock:
            append_line(self.folder / into, line)

    def _read_settled(self, name: str) -> dict[str, str]:
        """Key -> status of the rows that need not run again."""
        settled: dict[str, str] = {}
        for row in read_lines(self.folder / name):
            key, status = row.get("cell_key"), row.get("status")
            if key is None:
                continue
            if status in self._settled_words:
                settled[key] = "red" if _is_red(row) else str(status)
            else:
                settled.pop(key, None)
        return settled

    def _entry(self, stage: Stage, number: int) -> dict[str, Any]:
        """The stage's line in the manifest. A stage that a later version of the code adds is simply new."""
        for entry in self._manifest["stages"]:
            if entry["name"] == stage.name:
                return entry
        entry = {
            "name": stage.name,
            "number": number,
            "state": "waiting",
            "seconds": 0.0,
            "cells": {},
            "note": "",
            "files": [],
            "ranges": [],
            "archive": None,
        }
        self._manifest["stages"].append(entry)
        return entry

    def _size(self) -> int:
        path = self.folder / RECORDS
        return path.stat().st_size if path.exists() else 0

    def _save(self, state: str) -> None:
        self._manifest.update(state=state, updated=timestamp())
        replace(self.folder / MANIFEST, json.dumps(self._manifest, indent=1).encode())

    def _write_report(self) -> None:
        try:
            self._report(self.folder)
        except OSError:
            raise
        except Exception as error:  # the rows are the truth; a report can be written again from them
            self._manifest["report_error"] = f"{type(error).__name__}: {error}"
            self.say(f"the report could not be written: {error}")


def _is_red(row: Mapping[str, Any]) -> bool:
    return (row.get("quality") or {}).get("gate") == "red"


def _why(row: Mapping[str, Any]) -> str:
    return (row.get("error") or {}).get("message", "")
