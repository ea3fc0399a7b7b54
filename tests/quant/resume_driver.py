"""Quantises a checkpoint with a kill -9 again and again until it is through, and compares with an undisturbed run:

    python resume_driver.py SRC FOLDER METHOD SPEC KILLS SEED

Every run is a forked process that dies behind a finished unit, at a random one of its calls that change the file system,
or at a random moment.
Nothing is cleaned up in between, so each run goes on with what the last one left. Ends with status 1 and a line for the
first broken promise.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from kill_driver import die_at, ended, forked

from percard.quant import quantize, sequential
from percard.quant.recipe import Recipe


def files(folder: Path) -> dict[str, str]:
    """sha256 of every file; of the reports only what does not tell the time."""
    out = {}
    for path in sorted(folder.iterdir()):
        if path.name == ".percard-work":  # of a run that was killed behind its last rename; the next one removes it
            continue
        data = path.read_bytes()
        if path.name == "report.json":
            tree = json.loads(data)
            data = json.dumps({k: v for k, v in tree.items() if k not in ("seconds", "output")}).encode()
        if path.name != "README.md" and not path.name.endswith("card.md"):
            out[path.name] = hashlib.sha256(data).hexdigest()
    return out


def die_behind(units: int) -> None:
    """SIGKILL for this process when it is about to note one more finished unit than `units`."""
    left = units + 1

    def hook(event: str, args: tuple) -> None:
        nonlocal left
        if event == "open" and str(args[0]).endswith("journal.jsonl") and args[2] & os.O_APPEND:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main() -> None:
    src, folder, method, spec = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    kills, dice = int(sys.argv[5]), random.Random(int(sys.argv[6]))
    torch.set_num_threads(1)
    quantize.UNIT = 20_000
    sequential.TOKENS_AT_ONCE = 64
    more = {} if method in ("rtn", "hqq") else {"calibration": src / "calibration.jsonl", "samples": 6, "seq_len": 32}
    recipe = Recipe.from_flags(spec=spec, method=method, **more)
    whole, out = folder / "whole" / "out", folder / "killed" / "out"

    def undisturbed() -> None:
        quantize.run(src, whole, recipe)

    start = time.monotonic()
    assert ended(forked(undisturbed)) == 0
    spent = time.monotonic() - start
    good = files(whole)
    killed = resumed = 0
    hidden = out.parent / ".out.percard-unfinished" / ".percard-work" / "journal.jsonl"
    while killed < kills:
        before = len(hidden.read_bytes().splitlines()) if hidden.exists() else 0
        if killed % 3 == 0:
            child = forked(lambda: (die_behind(1), quantize.run(src, out, recipe)))
        elif killed % 3 == 1:
            call = dice.randint(1, 60)
            child = forked(lambda call=call: (die_at(call), quantize.run(src, out, recipe)))  # type: ignore[misc]
        else:
            child = forked(lambda: quantize.run(src, out, recipe))
            time.sleep(dice.uniform(0.2, 0.9) * spent)
            os.kill(child, signal.SIGKILL)
        status = ended(child)
        if status == 1:
            sys.exit(f"run {killed}: failed by itself")
        killed += status == -signal.SIGKILL
        after = len(hidden.read_bytes().splitlines()) if hidden.exists() else 0
        if status == 0 or (out / "config.json").exists():  # it got through before the kill: look at it and start anew
            if files(out) != good:
                sys.exit("a run that was killed before ended with other bytes")
            shutil.rmtree(out)
        elif after < before:
            sys.exit(f"finished units were forgotten: {before} lines of the journal, then {after}")
        resumed += before > 1
    assert out.exists() or ended(forked(lambda: quantize.run(src, out, recipe))) == 0
    found = files(out)
    if found != good:
        sys.exit(f"other bytes than without a kill: {[n for n in good if good[n] != found.get(n)]}")
    if [p.name for p in out.parent.iterdir()] != ["out"] or (out / ".percard-work").exists():
        sys.exit(f"left behind: {sorted(p.name for p in out.parent.iterdir())}")
    print(f"killed {killed} runs, {resumed} went on with finished units")


if __name__ == "__main__":
    main()
