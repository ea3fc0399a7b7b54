"""The worker process: real processes that fail, die, hang, and whose parent dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from percard.bench.worker import Outcome, Worker, run_here

TASKS = """
import os, signal, sys, time

def rows(n, text=""):
    print("what a library prints goes to the log")
    sys.stdout.flush()
    for i in range(n):
        yield {"i": i, "pid": os.getpid(), "text": text}

def one():
    return {"env": os.environ.get("PERCARD_TRY")}

def fails():
    raise ValueError("two\\nlines")

def poisons():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def lost():
    raise RuntimeError("CUDA error: no CUDA-capable device is detected")

def refuses():
    raise NotImplementedError("no body serves this")

def memory():
    raise MemoryError

def leaves(code):
    yield {"i": 0}
    os._exit(code)

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def hangs():
    while True:
        time.sleep(1)
"""


class Try:
    """A worker that can import the tasks above, and what came of a cell."""

    def __init__(self, where: Path) -> None:
        (where / "worker_tasks.py").write_text(TASKS)
        path = os.pathsep.join([str(where), os.environ.get("PYTHONPATH", "")])
        self.log = where / "worker.log"
        self.worker = Worker(self.log, {"PYTHONPATH": path, "PERCARD_TRY": "7"})
        self.rows: list[dict[str, Any]] = []

    def __call__(self, name: str, timeout: float = 30.0, **arguments: Any) -> Outcome:
        self.rows.clear()
        return self.worker.run(f"worker_tasks:{name}", arguments, timeout, self.rows.append)


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[Try]:
    made = Try(tmp_path)
    yield made
    made.worker.close()


def test_rows_come_through_one_process(cell: Try) -> None:
    assert cell("rows", n=3, text="é" * 40000).status == "ok"
    assert [row["i"] for row in cell.rows] == [0, 1, 2] and cell.rows[2]["text"] == "é" * 40000
    pid = cell.rows[0]["pid"]
    assert cell("rows", n=1).status == "ok" and cell.rows[0]["pid"] == pid
    assert cell("one").status == "ok" and cell.rows == [{"env": "7"}]
    assert "what a library prints" in cell.log.read_text()


def test_errors_are_sorted(cell: Try) -> None:
    failed = cell("fails")
    assert failed.status == "failed" and failed.error is not None and not failed.poisoned
    assert (failed.error["type"], failed.error["message"]) == ("ValueError", "two lines")
    assert cell("refuses").status == "refused"
    assert cell("memory").status == "oom"
    assert cell("rows", n=1).status == "ok"
    pid = cell.rows[0]["pid"]
    poisoned = cell("poisons")
    assert poisoned.status == "failed" and poisoned.poisoned and not poisoned.lost_card
    assert cell("rows", n=1).status == "ok" and cell.rows[0]["pid"] != pid, "a poisoned process is not used again"
    assert cell("lost").lost_card
    assert cell("missing").status == "failed", "a task that is not there is a failed cell"


def test_death_costs_one_cell(cell: Try) -> None:
    died = cell("leaves", code=3)
    assert died.status == "died" and died.error is not None and "exit code 3" in died.error["message"]
    assert cell.rows == [{"i": 0}], "what it had told stays"
    killed = cell("killed")
    assert killed.error is not None and "SIGKILL" in killed.error["message"] and "memory" in killed.error["message"]
    assert cell("rows", n=1).status == "ok"
    os.kill(cell.rows[0]["pid"], signal.SIGKILL)  # dies between two cells
    time.sleep(0.2)
    assert cell("rows", n=1).status in ("ok", "died") and cell("rows", n=1).status == "ok"


def test_hanging_cell_is_ended(cell: Try) -> None:
    assert cell("rows", n=1).status == "ok"
    pid = cell.rows[0]["pid"]
    begin = time.monotonic()
    outcome = cell("hangs", timeout=0.5)
    assert outcome.status == "timeout" and time.monotonic() - begin < 10
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_first_task_runs_once_per_process(tmp_path: Path) -> None:
    made = Try(tmp_path)
    (tmp_path / "worker_tasks.py").write_text(
        TASKS + "\nstarted = []\ndef first():\n    started.append(1)\n"
        "def count():\n    return {'started': len(started)}\n"
    )
    made.worker = Worker(made.log, made.worker._env, first="worker_tasks:first")
    for _ in range(2):
        made.worker.ready()
        assert made("count").status == "ok" and made.rows == [{"started": 1}]
    assert made("killed").status == "died"
    made.worker.ready()
    assert made("count").status == "ok" and made.rows == [{"started": 1}], "a new process, warmed again"
    made.worker.close()


def test_stop_ends_a_cell(cell: Try) -> None:
    outcome = cell.worker.run("worker_tasks:hangs", {}, 60.0, cell.rows.append, lambda: True)
    assert outcome.status == "stopped"


def test_child_leaves_when_its_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "worker_tasks.py").write_text(TASKS)
    script = (
        "import pathlib, sys\n"
        "from percard.bench.worker import Worker\n"
        f"worker = Worker(pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "worker.run('worker_tasks:rows', {'n': 1}, 30, lambda row: print(row['pid'], flush=True))\n"
        "worker.run('worker_tasks:hangs', {}, 600, print)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if _is_zombie(child):  # in a container nobody may be there to take its exit code
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its parent")


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_run_here_names_the_function_that_raised() -> None:
    outcome = run_here("percard.bench.ops:case_of", {"op": "matmul_w8a8", "name": "nothing"}, print)
    assert outcome.status == "failed" and outcome.error is not None
    assert outcome.error["stage"] == "ops.case_of" and "nothing" in outcome.error["message"]
