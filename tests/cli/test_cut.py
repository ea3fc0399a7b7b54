"""Verbs that measure cells, ended in the middle: by kill -9, by an interrupt, by a disk that is full. Nothing is lost.

The same command afterwards measures what is missing, and the file then holds the cells of a run that was never cut.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.bench import attention, cells, here, ladder, ops, record

from .conftest import Ran

Run = Callable[..., Ran]
VERBS = ("ops", "attention", "ladder")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def command(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path) -> list[str]:
    """A small run of the verb named by the test's parameter."""
    questions = tmp_path / "task.jsonl"
    lines = [{"prompt": f"x = {i} + ", "expected": str(i), "max_new": 2} for i in range(4)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    few = ["--task", str(questions), "--models", str(checkpoint), "--specs", "w8a8,w4a16-g128,w8a16", "--quick"]
    return {
        "ops": ["bench", "ops", "--specs", "w8a8", "--tokens", "1", "--rounds", "1"],
        "attention": [
            "bench",
            "attention",
            "--heads",
            "4/2/32",
            "--context",
            "300,400",
            "--batch",
            "1",
            "--rounds",
            "1",
        ],
        "ladder": ["bench", "ladder", *few, "--batch", "2"],
    }[request.param]


def cases(percard: Run, command: list[str]) -> int:
    """How many cells the command has, by its own dry run."""
    told = percard(*command, "--dry-run")
    assert told.code == 0
    return int(told.out.splitlines()[-1].split()[0])


def rows(out: Path) -> list[record.Record]:
    return list(record.read(out)) if out.exists() else []


@pytest.mark.parametrize(
    "command",
    [pytest.param("ops", marks=pytest.mark.full), pytest.param("attention", marks=pytest.mark.full), "ladder"],
    indirect=True,
)
def test_killed_in_the_middle_and_gone_on(command: list[str], percard: Run, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "percard", *command, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not rows(out):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = rows(out)
    total = cases(percard, command)
    assert 1 <= len(before) < total

    ran = percard(*command, "--out", out)
    after = rows(out)
    assert ran.code in (0, 4) and f"of {total} cells are in {out}" in ran.err  # random weights may be red in 4 bits
    assert after[: len(before)] == before and len(after) == total == len({row.cell_key for row in after})
    assert not [row.error for row in after if row.error and row.error["type"] != "Conformance"]
    again = percard(*command, "--out", out)
    assert rows(out) == after and again.out == ran.out  # the whole table, from the file


def raising(function: Callable[..., Any], error: BaseException, after: int) -> Callable[..., Any]:
    """`function`, which raises from its so many-th call on."""
    calls = iter(range(1 << 30))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= after:
            raise error
        return function(*args, **kwargs)

    return call


MEASURES = {"ops": (ops, "gate"), "attention": (attention, "gate"), "ladder": (ladder, "judge")}


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roofs that need no measuring, caches that one copy of a weight is larger than."""

    def measure(device: str) -> Iterator[dict[str, Any]]:
        yield {**here.card.fingerprint(torch.device(device)), "noisy": [], "words": "a machine"}

    monkeypatch.setattr(here.roof, "measure", measure)
    monkeypatch.setattr(here.card, "last_level_cache", lambda where: 1)
    monkeypatch.setattr(ops, "_SAMPLE_S", 1e-4)


@pytest.mark.parametrize("command", VERBS, indirect=True)
def test_an_interrupt_keeps_what_was_measured(
    command: list[str], percard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, light: None
) -> None:
    out = tmp_path / "r.jsonl"
    where, name = MEASURES[command[1]]
    with monkeypatch.context() as patch:
        patch.setattr(where, name, raising(getattr(where, name), KeyboardInterrupt(), 1))
        ran = percard(*command, "--out", out)
    kept, total = rows(out), cases(percard, command)
    last = ran.err.splitlines()[-1]
    assert ran.code == 130 and 1 <= len(kept) < total
    assert last.startswith(f"percard bench {command[1]}: interrupted") and "the same command goes on" in last
    assert f"{len(kept)} of {total} cells are in {out}" in last
    assert percard(*command, "--out", out).code in (0, 4)
    assert rows(out)[: len(kept)] == kept and len(rows(out)) == total


@pytest.mark.parametrize("command", VERBS, indirect=True)
def test_a_full_disk_is_told_and_loses_nothing(
    command: list[str], percard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, light: None
) -> None:
    out = tmp_path / "r.jsonl"
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr(cells.record.os, "fsync", raising(os.fsync, full, 1))
        ran = percard(*command, "--out", out)
    (kept,), last = rows(out), ran.err.splitlines()[-1]
    total = cases(percard, command)
    assert ran.code == 1 and f"{out}: disk full (No space left on device)" in last
    assert f"1 of {total} cells are in {out} and stay there; the same command goes on" in last
    assert out.read_bytes().endswith(b"\n")
    assert percard(*command, "--out", out).code in (0, 4)
    assert rows(out)[0] == kept and len(rows(out)) == total


@pytest.mark.full
def test_ctrl_c_of_a_process(tmp_path: Path) -> None:
    """The signal itself, through the parser: exit code 130, and a line that tells what is kept."""
    out = tmp_path / "r.jsonl"
    words = ["bench", "attention", "--heads", "4/2/32", "--context", "300,400,500,600", "--batch", "1", "--rounds", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "percard", *words, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not rows(out):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "of 16 cells are in" in err.splitlines()[-1] and 1 <= len(rows(out)) < 16


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bench", "ops", "--quick", "--full"], "--quick and --full say opposite things"),
        (["bench", "ops", "--retry", "all"], "the one choice is failed"),
        (["bench", "ops", "--tokens", "1,x"], "--tokens 1,x: expected whole numbers above 0"),
        (["bench", "attention", "--batch", "0"], "--batch 0: expected whole numbers above 0"),
        (["bench", "ops", "--models", "qwen9"], "no cases for model 'qwen9'"),
        (["bench", "ladder", "--task", "none.jsonl", "--models", "x"], "none.jsonl: No such file"),
    ],
)
def test_bad_words(percard: Run, words: list[str], told: str) -> None:
    ran = percard(*words)
    assert ran.code == 2 and told in ran.error


def test_a_ladder_on_the_command_line(percard: Run, checkpoint: Path, tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"prompt": "x is ", "expected": "a", "score": "choice", "choices": ["a", "b"]}\n')
    ask = ["bench", "ladder", "--task", questions, "--models", checkpoint, "--specs", "w8a8", "--quick", "--batch", "1"]
    out = tmp_path / "l.jsonl"
    ran = percard(*ask, "--usd-hour", 2, "--out", out)
    assert ran.code in (0, 4) and "$/Mtok" in ran.out and "at $2 a card and hour; cheapest first" in ran.out
    assert "timed: 1 at once" in ran.out and "q.b1" in ran.out
    free = percard(*ask, "--out", out)
    assert "no price was given (--usd-hour X)" in free.out and "$/Mtok" not in free.out
    shown = percard("bench", "report", out)
    assert shown.code == 0 and "q.b1" in shown.out and "$/Mtok" in shown.out
    as_json = [json.loads(line) for line in percard(*ask, "--out", out, "--json").out.splitlines()]
    assert [row["quality"]["task"]["n"] for row in as_json] == [1, 1]
    quantised = tmp_path / "w8a8"
    assert percard("quantize", checkpoint, "--spec", "w8a8", "--out", quantised).code == 0
    refused = percard(*ask[:5], quantised)
    assert refused.code == 2 and "is quantised already; give its 16-bit source" in refused.error


def test_a_cell_that_was_measured_again_is_shown_once(percard: Run, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    about: dict[str, Any] = {"level": "op", "case": "m.down.decode.b1", "scheme": {"spec": "w8a8"}, "shape": {"M": 1}}
    error = {"type": "RuntimeError", "message": "broke once", "stage": "run"}
    latency = {"median": 7.5, "lo": 7.0, "hi": 8.0}
    record.append(out, record.Record(cell_key="k", status="failed", error=error, **about))
    assert "broke once" in percard("bench", "report", out).out
    record.append(out, record.Record(cell_key="k", latency_us=latency, **about))
    shown = percard("bench", "report", out).out
    assert shown.count("m.down.decode.b1") == 1 and "7.5" in shown and "broke once" not in shown
