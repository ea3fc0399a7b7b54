"""On a card: every way of a linear in a CUDA graph, nothing asked of the host, no memory but outputs and named workspaces."""

from __future__ import annotations

import pytest
import torch

from percard.formats import affine
from percard.formats.spec import QuantSpec
from percard.kernels import tuner, tuning
from percard.kernels.linear import linear, prepare

SPECS = ("w8a8", "w8a16", "w8a16-g128", "w4a16-g128", "w4a16-g64-asym", "w4a8", "w4a8-g128")
TOKENS = (1, 16, 64, 130, 1030)  # streaming, split K, square tiles, a weight made whole
pytestmark = pytest.mark.gpu


def weight(spec: str, n: int = 1024, k: int = 4096):
    return prepare(affine.quantize(torch.randn(n, k, device="cuda") / k**0.5, QuantSpec.parse(spec)), "cuda")


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_capture_replay_new_inputs(spec: str, invariant: bool) -> None:
    w = weight(spec)
    for m in TOKENS:
        x, new = (torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        linear(x, w, batch_invariant=invariant)  # compiles, and makes torch's workspaces
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x, w, batch_invariant=invariant)
        x.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, linear(new, w, batch_invariant=invariant)), f"M = {m}"


@pytest.mark.parametrize("spec", SPECS)
def test_the_host_is_asked_nothing(spec: str) -> None:
    w = weight(spec)
    xs = [torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16) for m in TOKENS]
    for x in xs:
        linear(x, w)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in xs:
            linear(x, w)
            linear(x, w, batch_invariant=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("spec", SPECS)
def test_memory_is_outputs_and_a_bounded_workspace(spec: str) -> None:
    w = weight(spec)
    for m in TOKENS:
        x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
        linear(x, w)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = linear(x, w)
        torch.cuda.synchronize()
        held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        assert held <= y.nbytes + 1024, "nothing stays but the output"
        rows = m * (4096 + 16) if "a8" in spec else 0  # int8 rows, their scales and sums
        parts, chunk = 16 * min(m, 256) * 1024 * 4, 33 << 20
        assert peak <= y.nbytes + rows + max(parts, chunk if m >= 1024 else 0) + (1 << 16), f"M = {m}"


def test_the_clock_and_the_gates_of_the_tuner(tmp_path) -> None:
    """One small problem for real: compiled, compared, timed, written."""
    machine = tuner.CardMachine()
    (problem, *_) = [p for p in tuner.problems([tuner.subject("matmul_w4a16")], "qwen3-0.6b") if p.case.m == 1]
    (outcome,) = tuner.run([problem], machine, tmp_path)
    assert outcome.status in ("tuned", "kept") and outcome.entry is not None, outcome.words
    assert 1 < outcome.entry["us"] < 1000 and outcome.entry["floor_us"] > 1
    assert len(tuning.read(tmp_path / "matmul_w4a16.json")) == 1
