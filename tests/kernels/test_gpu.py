"""Starts what must run in a process of its own: test_gpu_interpreted.py, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("test_gpu_interpreted.py")


def test_interpreted_kernels() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; pip install triton")
    command = [sys.executable, "-m", "pytest", str(SUITE), "-p", "no:cacheprovider", "-x"]
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=SUITE.parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
