"""The baseline's float type: what comes near in one layer is settled by whole models."""

from __future__ import annotations

import pytest
import torch

from percard.bench import probe
from percard.bench.engine import load
from percard.bench.probe import Probe, settle

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def found(bf16: float, fp32: float) -> Probe:
    seconds = {"prefill": {BF16: bf16, FP32: fp32, FP16: 9.0}, "decode": {BF16: bf16, FP32: fp32, FP16: 9.0}}
    return Probe(seconds, {}, frozenset([BF16]))


def test_a_clear_winner_needs_no_model() -> None:
    one = found(1.0, 2.0)
    assert settle(one, lambda dtype: pytest.fail("nothing to settle"), prompt=8, batch=1) is one


def test_whole_models_settle_what_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, times = [], {BF16: [6.0, 8.0, 4.0], FP32: [2.0, 10.0]}  # prefill, decode, decode through torch.mv

    def model(dtype: torch.dtype) -> object:
        asked.append(dtype)
        return load("shape:qwen3-0.6b", dtype=dtype, layers=1, max_len=9)

    def best(function: object, device: torch.device, now: object) -> float:
        function()  # type: ignore[operator]
        return times[asked[-1]].pop(0)

    monkeypatch.setattr(probe, "_best", best)
    settled = settle(found(1.0, 1.1), model, prompt=8, batch=1)  # type: ignore[arg-type]
    assert asked == [BF16, FP32] and times == {BF16: [], FP32: []}
    assert settled.fastest("prefill") == FP32 and settled.fastest("decode") == BF16
    assert settled.mv == {BF16} and settled.seconds["decode"] == {BF16: 4.0, FP32: 10.0}
