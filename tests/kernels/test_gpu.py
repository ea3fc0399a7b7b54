"""Starts what must run in a process of its own: test_gpu_interpreted.py, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("test_gpu_interpreted.py")


def test_interpreted_kernels(run_interpreted: Callable[..., str]) -> None:
    run_interpreted(SUITE, "-x")


@pytest.mark.full
def test_interpreted_kernels_with_the_oldest_triton(run_interpreted: Callable[..., str], oldest_triton: Path) -> None:
    run_interpreted(SUITE, "-x", triton=oldest_triton)
