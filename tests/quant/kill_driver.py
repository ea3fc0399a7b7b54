"""Runs `quantize` again and again, ends each run with SIGKILL, and looks at what is left. A program of its own:

    python kill_driver.py SRC FOLDER random COUNT SEED      kills at random times
    python kill_driver.py SRC FOLDER calls STEP             kills before every STEP-th call that changes the file system

torch is imported once; every run is a forked process. Ends with status 1 and a line for the first broken promise.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from percard.formats.checkpoint import Checkpoint
from percard.quant import quantize, walk
from percard.quant.recipe import Recipe

WATCHED = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "open"}
OLD, NEW = Recipe.from_flags(spec="w8a8"), Recipe.from_flags(spec="w4a16-g64", options={"search": False})


def weights(folder: Path) -> dict[str, str]:
    """sha256 of what a reader loads."""
    names = [p for p in folder.iterdir() if p.name.endswith((".safetensors", "config.json", "index.json"))]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(names)}


def forked(work: Callable[[], object]) -> int:
    """Process id of a child that does `work` and ends with status 0, or 1 if it raised."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Exit status of a child; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(call: int) -> None:
    """SIGKILL for this process right before its `call`-th call that changes the file system."""
    left = call

    def hook(event: str, args: tuple) -> None:
        nonlocal left
        if event not in WATCHED or (
            event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR))
        ):
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def check(folder: Path, good: list[dict[str, str]], must_be: bool, when: str) -> None:
    """Every folder that looks finished is one of the `good` ones; with `must_be` there is always one."""
    complete = []
    for path in folder.iterdir():
        if not path.is_dir() or not (path / "config.json").exists() or (path / ".percard-unfinished").exists():
            continue
        if weights(path) not in good:
            sys.exit(f"{when}: {path.name} looks finished and is not: {sorted(p.name for p in path.iterdir())}")
        Checkpoint.open(path)
        complete.append(path.name)
    out = folder / "out"
    if out.exists() and not (out / "config.json").exists():
        sys.exit(f"{when}: out stands there without being finished")
    if must_be and not complete:
        sys.exit(f"{when}: the old output is gone and the new one is not there")


def main() -> None:
    src, folder, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    walk.ROW_WEIGHTS = 32 * 128
    out = folder / "out"

    def run(dying_at: int = 0) -> None:
        if dying_at:
            die_at(dying_at)
        quantize.run(src, out, NEW, force=True)

    def reset() -> None:
        for path in list(folder.iterdir()):
            shutil.rmtree(path)
        shutil.copytree(kept, out)

    assert ended(forked(lambda: quantize.run(src, out, OLD))) == 0
    old = weights(out)
    kept = folder.with_name("old")
    shutil.copytree(out, kept)
    start = time.monotonic()
    assert ended(forked(run)) == 0
    spent, new = time.monotonic() - start, weights(out)
    assert old != new
    killed = calls = 0
    if mode == "random":
        dice = random.Random(int(sys.argv[5]))
        for turn in range(int(sys.argv[4])):
            if turn % 2:
                reset()
            child = forked(run)
            time.sleep(dice.uniform(0, 1.1 * spent))
            os.kill(child, signal.SIGKILL)
            killed += ended(child) == -signal.SIGKILL
            check(folder, [old, new], True, f"kill {turn}")
    else:
        step = int(sys.argv[4])
        calls = 1
        while True:
            if calls % 3 == 1:  # mostly onto what the last killed run left, sometimes onto a clean folder
                reset()
            status = ended(forked(lambda call=calls: run(dying_at=call)))  # type: ignore[misc]
            check(folder, [old, new], True, f"killed at call {calls}")
            if status == 0:
                break
            assert status == -signal.SIGKILL, status
            killed, calls = killed + 1, calls + step
    assert ended(forked(run)) == 0
    assert weights(out) == new and [p.name for p in folder.iterdir()] == ["out"], sorted(folder.iterdir())
    print(f"killed {killed} runs, {calls} calls")


if __name__ == "__main__":
    main()
