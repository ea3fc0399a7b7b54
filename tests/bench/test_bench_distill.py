"""`bench distill`: sides that say the same, the gate before the clock, rivals that do not fit or do not agree, rows and tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.bench import distill, slot, slot_report
from percard.bench.distill import Problem, Sides
from percard.bench.record import Record
from percard.formats.spec import FormatError
from percard.kernels.distill_loss.contract import KINDS

CPU = torch.device("cpu")
SMALL = Problem("fkl", 40, 300, 16, "fp32")


@pytest.mark.parametrize("dtype", distill.DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_torchs_composition_says_the_same(kind: str, dtype: str) -> None:
    sides = Sides.drawn(replace(SMALL, kind=kind, dtype=dtype), CPU, 3)
    assert distill._apart(sides.ours("cpu"), sides.torchs(), distill._AGREES[dtype]) is None
    assert distill.gate(sides, "cpu", 3) == []


def row_of(p: Problem = SMALL, **more: Any) -> dict[str, Any]:
    return {**p.sections(), **next(distill.cell(**vars(p), device="cpu", rounds=2, **more))}


def test_a_row_is_a_record_and_stands_in_the_table() -> None:
    row = row_of()
    assert "x torch composition" in row.pop("words")
    record = Record(cell_key="k", **row)
    sides = {r["impl"]: r for r in record.against or ()}
    assert sides["torch composition"]["ratio"] > 0 and sides["liger-kernel"]["reason"] == "serves a CUDA card"
    assert record.memory is None, "too small for a peak to be seen"
    table = slot_report.of_records([record])
    assert "| fkl | 40 | 300 | 16 | fp32 |" in table and "Linears" not in table


def test_a_red_gate_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Sides.ours
    monkeypatch.setattr(Sides, "ours", lambda self, impl=None: tuple(1.01 * t for t in right(self, impl)))
    row = row_of()
    assert row["status"] == "failed" and row["quality"]["gate"] == "red" and "latency_us" not in row
    assert "loss is off by 1.00%, 0.10% are allowed" in row["error"]["message"]


def test_a_rival_that_does_not_fit_or_does_not_agree_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "absent", lambda p, where, name: None)
    monkeypatch.setattr(Sides, "ligers", lambda self: (2 * self.torchs()[0], *self.torchs()[1:]))
    sides = {r["impl"]: r for r in row_of()["against"]}
    assert sides["torch composition"]["status"] == "ok"
    assert sides["liger-kernel"]["status"] == "suspect" and "its loss is" in sides["liger-kernel"]["reason"]

    def out_of_memory(self: Sides) -> distill.Answer:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Sides, "ligers", out_of_memory)
    sides = {r["impl"]: r for r in row_of()["against"]}
    assert (sides["liger-kernel"]["status"], sides["liger-kernel"]["reason"]) == ("failed", "out of memory")
    monkeypatch.undo()
    monkeypatch.setattr(distill.card, "free_bytes", lambda where: 100_000)
    why = {r["impl"]: r for r in row_of()["against"]}["torch composition"]
    assert why["status"] == "absent" and why["reason"].startswith("its logits take about")


def test_no_peak_of_a_large_problem_goes_unseen() -> None:
    """Logits of 300 MB: what ours holds is measured, and is no more than the chunk that it may take and what torch needs for it."""
    p = Problem("fkl", 2500, 30001, 8, "fp32")
    row = row_of(p)
    said = {text.split(":")[0]: text for text in row["quality"]["reasons"][1:]}
    assert set(said) == {"percard", "torch composition"}
    assert 0 < row["memory"]["peak"] <= 1.1 * distill.distill.CHUNK_BYTES


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"kinds": ["kl"]}, "no divergence 'kl'; known: fkl, rkl, jsd, topk"),
        ({"dtype": "fp8"}, "dtype 'fp8': expected fp32 or bf16"),
        ({"tokens": [0]}, "expected 1 or more"),
        ({"kinds": ["topk"], "vocab": 64}, "vocab above 64"),
    ],
)
def test_bad_input(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        distill.plan(**asked)


@pytest.mark.parametrize("device", slot.DEVICES)
def test_cells_of_a_slot(device: str, tmp_path: Path) -> None:
    cells = distill.slot_cells(device, 1, {})
    assert (
        len({json.dumps(cell.identity, sort_keys=True) for cell in cells})
        == len(cells)
        == (5 if device == "cuda" else 2)
    )
    for cell in cells:
        json.dumps(cell.arguments)
        cut = {"status": "cut", "error": {"type": "Cut", "message": "", "stage": "deadline"}, "seconds": 0.0}
        slot.completed(tmp_path, {}, {**cell.row, **cut, "cell_key": "k"})
    if device == "cpu":
        assert [next(distill.cell(**cell.arguments))["quality"]["gate"] for cell in cells] == ["synthetic"] * 2
