"""kill -9 at any moment: what looks finished is, an old output is never lost, the next run cleans up."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("kill_driver.py")


def drive(tiny: Callable[..., Path], tmp_path: Path, *arguments: str) -> int:
    """How many runs were killed; fails with the driver's line."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    command = [sys.executable, str(DRIVER), str(tiny()), str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(re.search(r"killed (\d+) runs", done.stdout)[1])  # type: ignore[index]


def test_at_random_times(tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert drive(tiny, tmp_path, "random", "16", "7") >= 5


def test_before_calls_that_change_the_file_system(tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert drive(tiny, tmp_path, "calls", "3") >= 10


@pytest.mark.full
@pytest.mark.parametrize("seed", range(4))
def test_at_many_random_times(tiny: Callable[..., Path], tmp_path: Path, seed: int) -> None:
    assert drive(tiny, tmp_path, "random", "100", str(seed)) >= 30


@pytest.mark.full
def test_before_every_call(tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert drive(tiny, tmp_path, "calls", "1") >= 30
