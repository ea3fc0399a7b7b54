"""Distilling in two processes: the curve of one, kills of both and of one alone, errors of one that the other must not wait for."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from percard import cli
from percard.formats.checkpoint import Checkpoint
from percard.quant import distill, distill_report, distill_state, distill_train
from percard.quant.distill_plan import Wish

from .test_distill import curve, models, wish

Tiny = Callable[..., Path]
LIMIT = 600.0  # seconds in which a pair must have ended, whatever happened: it takes about two
KILLED = -signal.SIGKILL


def words(student: Path, teacher: Path, out: Path, asked: Wish) -> list[str]:
    """A wish as the command line has it."""
    flags = {"teacher": teacher, "out": out}
    usual = Wish()
    for field in dataclasses.fields(Wish):
        if field.name != "checkpointing" and getattr(asked, field.name) != getattr(usual, field.name):
            flags[field.name.replace("_", "-")] = getattr(asked, field.name)
    return ["distill", str(student), *(str(w) for name, value in flags.items() for w in (f"--{name}", value))]


def pair(
    command: list[str], folder: Path, hook: Callable[[int], None] = lambda rank: None, kill: float | None = None
) -> tuple[list[int], list[str]]:
    """Runs the command line in two forked processes as torchrun would start them; (exit codes, what each said on stderr).

    hook(rank) is called in each before; kill: seconds after which both get a SIGKILL. A process that does not end fails the test.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    errors = [folder / f"stderr-{rank}.txt" for rank in (0, 1)]
    children = []
    for rank, path in enumerate(errors):
        child = os.fork()
        if not child:
            try:
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                for stream in (1, 2):
                    os.dup2(file, stream)
                sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
                who = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
                os.environ.update({k: str(v) for k, v in who.items()}, MASTER_ADDR="127.0.0.1")
                torch.set_num_threads(1)
                hook(rank)
                os._exit(cli.run(command))
            finally:
                os._exit(99)
        children.append(child)
    codes: dict[int, int] = {}
    began = time.monotonic()
    while len(codes) < 2:
        found, status = os.waitpid(-1, os.WNOHANG)
        if found in children:
            codes[found] = os.waitstatus_to_exitcode(status)
        late = time.monotonic() - began
        if late > LIMIT or (kill is not None and late > kill):
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
            assert late < LIMIT, f"only {len(codes)} of 2 ended: {[p.read_text() for p in errors]}"
        time.sleep(0.01)
    return [codes[child] for child in children], [path.read_text() for path in errors]


def dies(rank: int, behind: int = 0, where: str = "step") -> Callable[[int], None]:
    """A hook: process `rank` kills itself when it begins a step behind so many of its own, or saves a state (2: both do)."""

    def hook(mine: int) -> None:
        if rank not in (mine, 2):
            return
        module, name = (distill_train, "_step") if where == "step" else (distill_state.checkpoint, "save")
        real, left = getattr(module, name), [behind]

        def fatal(*args: Any, **more: Any) -> Any:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*args, **more)

        setattr(module, name, fatal)

    return hook


def work(out: Path) -> Path:
    return out.with_name(f".{out.name}.percard-unfinished") / ".percard-work"


def states(out: Path) -> list[int]:
    return [int(p.name[6:]) for p in distill_state.states(work(out))]


def test_two_processes_give_the_curve_of_one(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = models(tiny, hidden_size=64)
    asked = wish(student, hidden="mse", hidden_blocks="1:2", hard=0.1)
    distill.run(student, teacher, tmp_path / "one", asked)
    codes, said = pair([*words(student, teacher, tmp_path / "two", asked), "--json"], tmp_path)
    assert codes == [0, 0], said
    assert json.loads(said[0].splitlines()[-1])["processes"] == 2 and not said[1]
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=1e-4)
    one, two = (Checkpoint.open(tmp_path / name) for name in ("one", "two"))
    assert one.names == two.names and not (tmp_path / "two" / ".percard-work").exists()


def test_a_pair_that_is_killed_repeats_its_curve_and_its_bytes(tiny: Tiny, tmp_path: Path) -> None:
    """Both die, either dies alone between states, either dies while a state is written: the other ends and says so."""
    student, teacher = models(tiny)
    asked, out = wish(student, steps=9), tmp_path / "killed"
    command = words(student, teacher, out, asked)
    assert pair(words(student, teacher, tmp_path / "whole", asked), tmp_path)[0] == [0, 0]
    for hook, dead, stays in (
        (dies(2, 3), (0, 1), [2]),
        (dies(1, 3), (1,), [4]),
        (dies(0, 1), (0,), [4]),
        (dies(1, 0, "state"), (1,), [4]),
        (dies(0, 1, "state"), (0,), [6]),
    ):
        codes, said = pair(command, tmp_path, hook)
        assert codes == [KILLED if rank in dead else 1 for rank in (0, 1)], said
        assert states(out) == stays and not out.exists(), said
        if dead == (1,):
            assert "another process of this run ended" in said[0] and "what is finished is kept" in said[0], said
            assert "Traceback" not in said[0] + said[1]
    codes, said = pair(command, tmp_path)
    assert codes == [0, 0], said
    assert curve(out) == curve(tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not work(out).parent.exists()


def test_one_process_goes_on_where_two_were_killed(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = models(tiny)
    asked, out = wish(student, steps=5), tmp_path / "out"
    distill.run(student, teacher, tmp_path / "one", asked)
    assert pair(words(student, teacher, out, asked), tmp_path, dies(2, 4))[0] == [KILLED, KILLED]
    assert max(states(out)) == 4
    distill.run(student, teacher, out, asked)
    assert curve(out) == pytest.approx(curve(tmp_path / "one"), abs=1e-4)


def test_an_error_of_the_first_process_ends_both_with_one_line(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = models(tiny)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    codes, said = pair(words(student, teacher, tmp_path / "out", wish(student)), tmp_path)
    assert codes[0] == 2 and codes[1] != 0
    assert said[0].count("\n") == 1 and "output exists" in said[0] and "--force" in said[0]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    codes, said = pair(words(student, teacher, tmp_path / "odd", wish(student, batch=3)), tmp_path)
    assert codes == [2, 2] and "2 processes share it, take a multiple of 2" in said[0] and not said[1]
    assert not (tmp_path / "odd").exists()


@pytest.mark.full
def test_ten_kills_at_any_time(tiny: Tiny, tmp_path: Path) -> None:
    student, teacher = models(tiny)
    asked, out = wish(student, steps=60), tmp_path / "killed"
    began = time.monotonic()
    assert pair(words(student, teacher, tmp_path / "whole", asked), tmp_path)[0] == [0, 0]
    whole = time.monotonic() - began
    for kill in range(10):
        codes, said = pair(words(student, teacher, out, asked), tmp_path, kill=whole * (0.15 + 0.1 * kill))
        if codes == [0, 0]:
            break
        assert codes == [KILLED, KILLED] and not out.exists(), said
    else:
        assert pair(words(student, teacher, out, asked), tmp_path)[0] == [0, 0]
    assert curve(out) == curve(tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.full
def test_torchrun_starts_them_and_ends_them(tiny: Tiny, tmp_path: Path) -> None:
    """The launcher itself: a run through, and one whose second process is killed from outside."""
    student, teacher = models(tiny)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "percard"]
    asked = wish(student, steps=150)
    begun = subprocess.Popen(
        [*command, *words(student, teacher, tmp_path / "out", asked)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not states(tmp_path / "out"):
        assert begun.poll() is None, begun.communicate()[0].decode()
        time.sleep(0.05)
    os.kill(max(_children(begun.pid)), signal.SIGKILL)
    said = begun.communicate(timeout=LIMIT)[0].decode()
    assert begun.returncode == 1 and states(tmp_path / "out") and not (tmp_path / "out").exists(), said
    done = subprocess.run(
        [*command, *words(student, teacher, tmp_path / "out", asked), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["processes"] == 2
    assert len(json.loads((tmp_path / "out" / distill_report.NAME).read_text())["curve"]) == 150


def _children(parent: int) -> list[int]:
    """Processes that a process started."""
    return [int(n) for n in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
