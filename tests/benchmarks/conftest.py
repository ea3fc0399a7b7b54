"""What the benchmarks share: correct first, then timed by pytest-benchmark, with what was measured beside the times.

`make bench` runs them. --benchmark-save NAME keeps a run, --benchmark-compare=NAME --benchmark-compare-fail=median:20% holds the
next one against it; `percard bench compare` does the same for records, with intervals.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from percard.bench import card, record
from percard.kernels import conformance
from percard.kernels.op import Op

WARM_UP, ROUNDS = 2, 20


@pytest.fixture
def device() -> torch.device:
    """The card if there is one."""
    return card.default_device()


@pytest.fixture
def timed(benchmark: Any, device: torch.device) -> Callable[..., None]:
    """timed(call, case, spec, nbytes, flops): times a call, on a card a replay of its CUDA graph until the card is done."""

    def run(call: Callable[[], Any], case: str, spec: str, nbytes: int, flops: int, rounds: int = ROUNDS) -> None:
        key = record.cell_key(level="op", case=case, spec=spec, device=device.type)
        benchmark.extra_info |= {"case": case, "spec": spec, "bytes": nbytes, "flops": flops, "cell_key": key}
        with torch.inference_mode():
            benchmark.pedantic(replay(call, device), rounds=rounds, iterations=1, warmup_rounds=WARM_UP)

    return run


@pytest.fixture
def timed_op(timed: Callable[..., None], device: torch.device) -> Callable[..., None]:
    """timed_op(op, cases, case, spec): compares an op's body with its reference at this very case, then times it."""

    def run(op: Op, cases: Any, case: Any, spec: str, rounds: int = ROUNDS) -> None:
        body = op.body_on(device.type).name
        args = cases.inputs(case, 0, device.type)
        assert conformance.faults(op, body, args) == []
        ready = conformance.packed(op, body, args)
        cost = op.contract.cost(*op.contract.unwrap(*ready))
        timed(functools.partial(op, *ready, impl=body), case.name, spec, cost.bytes, cost.flops, rounds)

    return run


def replay(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call itself on a CPU; on a card its graph, replayed and waited for."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):  # compiles, and makes what a library makes at a first call, before the capture
        for _ in range(3):
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()

    def again() -> None:
        graph.replay()
        torch.cuda.synchronize(device)

    return again
