"""One process that runs the cells of a bench, so that a CUDA error or a dying kernel costs one cell and not the run.

The parent (bench/runner.py) never touches a card. It sends a line of JSON for a cell, the child answers with lines:

    parent -> child   {"task": "percard.bench.ops:cell", "arguments": {...}}
    child -> parent   {"row": {...}}   any number of times        {"end": "ok", "error": null}   once

A task is a function that returns None, a dict, or yields dicts. What it prints goes to the log file.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

_POLL_S = 0.1
_GRACE_S = 2.0
_START_S = 120.0
# Texts of errors after which a CUDA context answers every call with the same error.
_POISON = ("cuda error", "cublas_status", "cudnn_status", "illegal memory access", "device-side assert", "misaligned")
_LOST = ("no cuda-capable device", "gpu is lost", "device unavailable", "devices unavailable", "fallen off the bus")


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: ok, failed, refused, oom, timeout, died, or stopped (the run is being cut).

    `error` is {type, message, stage} or None; `poisoned` says that the process is no longer to be trusted.
    """

    status: str
    error: dict[str, str] | None = None
    poisoned: bool = False
    lost_card: bool = False


class WorkerLike(Protocol):
    """What the runner needs of a worker; tests hand in one that moves a fake clock."""

    def run(
        self,
        task: str,
        arguments: Mapping[str, Any],
        timeout: float,
        on_row: Callable[[dict[str, Any]], None],
        stop: Callable[[], bool],
    ) -> Outcome: ...

    def ready(self, stop: Callable[[], bool]) -> None: ...

    def close(self) -> None: ...


class Worker:
    """A child process that runs one cell at a time. Started at its first cell, and again after it died.

    `first` is a task without arguments that a new process runs before any cell: loading torch takes seconds that no
    cell should answer for.
    """

    def __init__(self, log: Path, env: Mapping[str, str] | None = None, first: str | None = None) -> None:
        self._log, self._env, self._first = log, dict(env or {}), first
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""

    def ready(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Starts the process if it is not up. What goes wrong in its first task will show in the cell as well."""
        if self._first is not None and (self._process is None or self._process.poll() is not None):
            self.run(self._first, {}, _START_S, lambda row: None, stop)

    def run(
        self,
        task: str,
        arguments: Mapping[str, Any],
        timeout: float,
        on_row: Callable[[dict[str, Any]], None],
        stop: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Runs `task` ("package.module:function") for at most `timeout` seconds; `on_row` gets each row as it comes."""
        process = self._started()
        line = json.dumps({"task": task, "arguments": dict(arguments)}) + "\n"
        assert process.stdin is not None
        try:
            process.stdin.write(line.encode())
            process.stdin.flush()
        except OSError:  # died since the last cell
            return self._died()
        end = time.monotonic() + timeout
        while True:
            if stop():
                self.close()
                return Outcome("stopped", poisoned=True)
            if time.monotonic() > end:
                self.close()
                message = f"no answer within {timeout:.0f} s; the process was ended"
                return Outcome("timeout", {"type": "Timeout", "message": message, "stage": "run"}, poisoned=True)
            for answer in self._messages():
                if answer is None:
                    return self._died()
                if "row" in answer:
                    on_row(answer["row"])
                    continue
                error = answer["error"]
                poisoned = is_poison(error)
                if poisoned:
                    self.close()
                return Outcome(answer["end"], error, poisoned, _says(error, _LOST))

    def close(self) -> None:
        """Ends the process and all that it started."""
        process, self._process, self._pending = self._process, None, b""
        if process is None:
            return
        _signal_group(process, signal.SIGTERM)
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # a line that the dead child never read
                    stream.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        with self._log.open("ab") as log:
            # Its own session: Ctrl-C reaches the parent alone, which then ends the child and writes the row.
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self._env},
                start_new_session=True,
            )
        return self._process

    def _messages(self) -> Iterator[dict[str, Any] | None]:
        """Messages that have come within one poll; None when the child has closed its end."""
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(_POLL_S):
                return
        data = os.read(self._process.stdout.fileno(), 1 << 16)
        if not data:
            yield None
            return
        self._pending += data
        while b"\n" in self._pending:
            line, self._pending = self._pending.split(b"\n", 1)
            yield json.loads(line)

    def _died(self) -> Outcome:
        process = self._process
        assert process is not None
        try:
            code = process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        self.close()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "; the kernel's out-of-memory killer is one cause" if code == -signal.SIGKILL else ""
        message = f"the process that ran the cell ended with {how}{hint}; its last words are in {self._log.name}"
        return Outcome("died", {"type": "WorkerDied", "message": message, "stage": "run"}, poisoned=True)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def find(task: str) -> Callable[..., Any]:
    """The function behind "package.module:function"."""
    module, _, name = task.partition(":")
    return getattr(importlib.import_module(module), name)


def run_here(task: str, arguments: Mapping[str, Any], on_row: Callable[[dict[str, Any]], None]) -> Outcome:
    """Runs a cell in this process and sorts what went wrong; what the child does for each line it reads."""
    try:
        result = find(task)(**arguments)
        rows = result if inspect.isgenerator(result) else [] if result is None else [result]
        for row in rows:
            on_row(row)
    except Exception as error:
        return outcome_of(error)
    return Outcome("ok")


def outcome_of(error: Exception) -> Outcome:
    """What an exception of a cell means: oom, refused (nothing here serves it, or it cannot be compared), failed."""
    # By name where a class would have to be imported: cells without torch load no torch.
    name = type(error).__name__
    if isinstance(error, MemoryError) or name in ("OutOfMemoryError", "DefaultCPUAllocatorError"):
        return Outcome("oom", _told(error))
    if isinstance(error, NotImplementedError) or name == "NotComparable":  # Unsupported of kernels/op.py is one
        return Outcome("refused", _told(error))
    return Outcome("failed", _told(error))


def is_poison(error: Mapping[str, str] | None) -> bool:
    """Whether an error {type, message, stage} leaves a CUDA context that answers every call with it."""
    return _says(error, _POISON)


def _says(error: Mapping[str, str] | None, words: Sequence[str]) -> bool:
    text = "" if error is None else f"{error['type']}: {error['message']}".lower()
    return any(word in text for word in words)


def _told(error: BaseException) -> dict[str, str]:
    text = " ".join(str(error).split()) or "no message"
    return {"type": type(error).__name__, "message": text[:500], "stage": _where(error)}


def _where(error: BaseException) -> str:
    """Function of this package in which the error was raised, the innermost one."""
    where, trace = "run", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "percard" in code.co_filename or "bench" in code.co_filename or "kernels" in code.co_filename:
            where = f"{Path(code.co_filename).stem}.{code.co_name}"
        trace = trace.tb_next
    return where


def _leave_with_parent(parent: int) -> None:
    """Ends this process when its parent is gone: a killed bench must not leave a process on the card."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _answer(out: TextIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def main() -> None:
    """The child: reads cells from stdin until it closes."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print where they like; the answers keep their own line
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    for line in sys.stdin:
        cell = json.loads(line)
        outcome = run_here(cell["task"], cell["arguments"], lambda row: _answer(out, {"row": row}))
        if outcome.status == "oom":
            _free_memory()
        _answer(out, {"end": outcome.status, "error": outcome.error})


def _free_memory() -> None:
    import gc

    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()  # does nothing when CUDA was never used


if __name__ == "__main__":
    main()
