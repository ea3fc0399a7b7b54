"""What the tests of the kernels share: fresh random numbers in each run, bodies by name, and ISAs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy
import pytest
import torch

from percard.kernels import device, op
from percard.kernels.op import Op

OPS = (
    "quantize_rows",
    "matmul_w8a8",
    "matmul_w4a16",
    "matmul_w8a16",
    "matmul_w4a8",
)  # search_scale has a suite of its own

PRODUCERS = ("rmsnorm_quantize", "silu_mul_quantize")  # test_producers.py
ATTENTION = (
    "kv_append",
    "attention_decode",
    "gather_dequantize",
    "attention_prefill",
)  # test_attention.py, test_gather.py
DISTILLING = ("distill_loss",)  # test_distill_loss.py

os.environ.setdefault("PERCARD_TUNED", os.devnull)  # what a developer tuned must not decide what is tested


class Body(NamedTuple):
    """One body of one op as a test runs it: where, and with which instruction set (None: not a C++ body)."""

    op: Op
    cases: ModuleType
    name: str
    where: str
    isa: str | None

    def __str__(self) -> str:
        return "-".join(part for part in (self.op.name, self.name, self.isa) if part)


def bodies() -> list[Body]:
    """Every body but the references; the C++ body once for each instruction set that this CPU has."""
    found = []
    for name in OPS + PRODUCERS + ATTENTION + DISTILLING:
        package = importlib.import_module(f"percard.kernels.{name}")
        the_op, cases = getattr(package, name), importlib.import_module(f"percard.kernels.{name}.cases")
        for body in the_op.bodies:
            if body.name == "cpu":
                absent = body.absent("cpu") is not None
                found += [Body(the_op, cases, "cpu", "cpu", isa) for isa in ([None] if absent else op.native().isas())]
            elif body.name == "triton":
                found.append(Body(the_op, cases, "triton", "cuda" if device.has_card() else "cpu", None))
    return found


def absent(body: Body) -> str | None:
    """Why this machine does not have a body."""
    return body.op.body(body.name).absent(body.where)


def only(*ops: str) -> Callable[[Callable], Callable]:
    """A test for some ops; `pytest_generate_tests` reads it."""

    def mark(test: Callable) -> Callable:
        test.ops = ops  # type: ignore[attr-defined]
        return test

    return mark


def unserved(body: Body, dtype: torch.dtype) -> bool:
    """Whether the interpreter stands in for a card, and has no such dtype."""
    return body.name == "triton" and body.where == "cpu" and dtype == torch.bfloat16


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `body` run for every body that is here, tests that take `any_body` for all of them.

    On a machine with a card, Triton's bodies run there, as `gpu` tests.
    """
    if "any_body" in metafunc.fixturenames:
        metafunc.parametrize("any_body", bodies(), ids=str)
    if "body" in metafunc.fixturenames:
        on_card = metafunc.definition.get_closest_marker("gpu") is not None
        ops = getattr(metafunc.function, "ops", OPS)
        here = [b for b in bodies() if absent(b) is None and b.op.name in ops]
        chosen = [b for b in here if b.where == "cuda" or not on_card]
        marks = {"cuda": [pytest.mark.gpu], "cpu": []}
        given = [pytest.param(b, marks=marks[b.where], id=str(b)) for b in chosen]
        metafunc.parametrize("body", given, indirect=True)


@pytest.fixture
def body(request: pytest.FixtureRequest) -> Iterator[Body]:
    """A body that this machine has, with its instruction set in force."""
    chosen: Body = request.param
    if chosen.isa is None:
        yield chosen
        return
    before = op.native().isa()
    op.native().force_isa(chosen.isa)
    yield chosen
    op.native().force_isa(before)


@pytest.fixture
def seed() -> int:
    """New in every run and printed, so that a failure can be run again: PERCARD_TEST_SEED=..."""
    number = int(os.environ.get("PERCARD_TEST_SEED") or random.SystemRandom().randrange(1 << 20))
    print(f"PERCARD_TEST_SEED={number}")
    return number


@pytest.fixture(autouse=True)
def all_on_one_thread(one_thread: None) -> None:
    """For every test of a kernel."""


@pytest.fixture
def oldest_triton() -> Path:
    """The folder of the oldest Triton that the kernels support; make test-full brings it."""
    folder = Path(os.environ.get("PERCARD_TRITON", ""))
    if not (folder / "triton").is_dir():
        pytest.skip("Triton 3.6.0 is not here; make test-full brings it, or name its folder in PERCARD_TRITON")
    return folder


@pytest.fixture(scope="session")
def run_interpreted() -> Callable[..., str]:
    """run_interpreted(suites, *flags, triton=None): pytest in a process where Triton interprets its kernels; its report.

    A process of its own, because TRITON_INTERPRET must stand before triton is imported, and then no kernel of that process
    can be compiled any more. `triton` is the folder of another release, with the numpy that its interpreter needs.
    """

    def run(suites: Path | list[Path], *flags: str, triton: Path | None = None, must_pass: bool = True) -> str:
        if device.has_card():
            pytest.skip("a card is here: make test-gpu runs the compiled kernels")
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed; pip install triton")
        suites = [suites] if isinstance(suites, Path) else suites
        env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        if triton is not None:
            too_new = tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4)
            if too_new and not (triton / "numpy").is_dir():
                pytest.skip(
                    f"the interpreter of Triton 3.6 needs numpy below 2.4 beside it, here is {numpy.__version__}"
                )
            env["PYTHONPATH"] = os.pathsep.join([str(triton), *(p for p in sys.path if p)])
        command = [sys.executable, "-m", "pytest", *map(str, suites), *flags, "-p", "no:cacheprovider", "-n", "0"]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=600)
        if must_pass:
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
            assert " passed" in done.stdout
        return done.stdout + done.stderr[-3000:]

    return run
