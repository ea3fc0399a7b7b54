"""`percard run` ended by kill -9 again and again: no stage is lost, none is done from something half-written, the same bytes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from percard import cli

from .conftest import Ran

Run = Callable[..., Ran]
KILLED = -signal.SIGKILL


def started(words: list[str], said: Path, kill: float) -> int:
    """Exit code of a command line in a process of its own, which gets a SIGKILL after so many seconds."""
    child = os.fork()
    if not child:
        try:
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(file, stream)
            torch.set_num_threads(1)
            os._exit(cli.run(words))
        finally:
            os._exit(99)
    began = time.monotonic()
    while time.monotonic() - began < kill:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.full
def test_killed_at_any_time_it_ends_with_the_same_bytes(checkpoint: Path, percard: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    stages = [
        {"prune": {"ffn": 128, "group": 64, "tp": 1}},
        {"distill": {"teacher": "source", "data": str(text), "seq_len": 32, "batch": 2, "steps": 20, "every": 5}},
        {"quantize": {"spec": "w4a16-g64"}},
    ]
    recipe = tmp_path / "recipe.yaml"
    calibration = {"source": str(text), "samples": 8, "seq_len": 32}
    recipe.write_text(json.dumps({"model": str(checkpoint), "stages": stages, "calibration": calibration}))
    began = time.monotonic()
    assert percard("run", recipe, "--out", tmp_path / "whole").code == 0
    seconds = time.monotonic() - began
    words = ["run", str(recipe), "--out", str(tmp_path / "killed")]
    codes = [started(words, tmp_path / "said", seconds * (0.1 + 0.09 * kill)) for kill in range(10)]
    assert codes[0] == KILLED and set(codes) <= {KILLED, 0}, (codes, (tmp_path / "said").read_text())
    assert started(words, tmp_path / "said", 600.0) == 0, (tmp_path / "said").read_text()
    for stage in ("prune", "distill", "quantize"):
        one, two = (tmp_path / name / stage for name in ("whole", "killed"))
        names = sorted(p.name for p in one.iterdir())
        assert names == sorted(p.name for p in two.iterdir())
        for name in names:
            if name.endswith((".safetensors", "config.json")):
                assert (one / name).read_bytes() == (two / name).read_bytes(), (stage, name)
    assert not list((tmp_path / "killed").glob(".*percard-*"))
