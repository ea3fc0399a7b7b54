"""Starts what must run in a process of its own: test_gpu_interpreted.py, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

SUITE = Path(__file__).with_name("test_gpu_interpreted.py")


def run_interpreted(**changes: str) -> None:
    command = [sys.executable, "-m", "pytest", str(SUITE), "-p", "no:cacheprovider", "-x"]
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | changes
    done = subprocess.run(command, env=env, cwd=SUITE.parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed; pip install triton")
def test_interpreted_kernels() -> None:
    run_interpreted()


@pytest.mark.full
def test_interpreted_kernels_with_the_oldest_triton() -> None:
    folder = os.environ.get("PERCARD_TRITON", "")
    if not (Path(folder) / "triton").is_dir():
        pytest.skip("Triton 3.6.0 is not here; make test-full brings it, or name its folder in PERCARD_TRITON")
    too_new = tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4)
    if too_new and not (Path(folder) / "numpy").is_dir():
        pytest.skip(f"the interpreter of Triton 3.6 needs numpy below 2.4 beside it, here is {numpy.__version__}")
    run_interpreted(PYTHONPATH=os.pathsep.join([folder, *(p for p in sys.path if p)]))
