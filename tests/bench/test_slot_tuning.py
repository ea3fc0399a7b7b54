"""Stages of the slot that came with tuning: experts, Configs measured on the card, the tuned linears once more."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.bench import folder, moe, ops, slot, slot_report, slot_tasks
from percard.bench.record import Record
from percard.bench.runner import DONE
from percard.bench.stage import Cell, Stage
from percard.kernels import device, tuner

CUT = {"status": "cut", "error": {"type": "Cut", "message": "", "stage": "deadline"}, "seconds": 0.0}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


class Listing:
    """Stands for a Run: keeps the cells that a stage makes, answers what a worker would."""

    def __init__(self, where: Path, on: str) -> None:
        self.folder, self.device, self.runner = where, on, self
        self.about = {"uuid": "u", "arch": "sm_90"}
        self.made: list[Cell] = []
        self.options: list[dict[str, Any]] = []
        self.files: list[str] = []
        self.said: list[str] = []

    def cells(self, cells: list[Cell], **options: Any) -> None:
        self.made += cells
        self.options.append(options)

    def left(self) -> float:
        return 80.0

    def say(self, text: str) -> None:
        self.said.append(text)

    def ask(self, task: str, arguments: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
        module, name = task.split(":")
        return list(getattr(sys.modules[module], name)(**arguments))


@pytest.mark.parametrize("on", slot.DEVICES)
def test_cells_of_experts(tmp_path: Path, on: str) -> None:
    listing = Listing(tmp_path, on)
    slot.time_experts(listing)  # type: ignore[arg-type]
    assert len(listing.made) == (len(moe.TOKENS) * 2 if on == "cuda" else 2)
    assert len({json.dumps(c.identity, sort_keys=True) for c in listing.made}) == len(listing.made)
    for cell in listing.made:
        json.dumps(cell.arguments)
        Record.from_json(slot.completed(tmp_path, {}, {**cell.row, **CUT, "cell_key": "k"}))


@needs_triton
def test_cells_of_tuning(tmp_path: Path) -> None:
    listing = Listing(tmp_path, "cpu")
    slot.tune_configs(listing)  # type: ignore[arg-type]
    assert listing.made == [] and "no Configs" in listing.said[0]
    listing = Listing(tmp_path, "cuda")
    slot.tune_configs(listing)  # type: ignore[arg-type]
    compiles = [c for c in listing.made if c.task.endswith(":compile_candidates")]
    tunes = [c for c in listing.made if c.task.endswith(":tune")]
    assert next(c.arguments["case"] for c in tunes).startswith("qwen3-8b.gate_up.decode.b1"), "by worth"
    assert {c.arguments["op"] for c in tunes} <= set(slot.TUNED_OPS) and len(tunes) == 16
    assert 1 <= len(compiles) < len(tunes), "problems whose kernels are the same are compiled once"
    assert listing.options[0]["workers"] >= 2 and listing.options[1] == {"into": slot.TUNING}
    keys = [json.dumps(c.identity, sort_keys=True) for c in listing.made]
    assert len(set(keys)) == len(keys)


def test_only_winners_are_timed_once_more(tmp_path: Path) -> None:
    listing = Listing(tmp_path, "cuda")
    slot.time_tuned(listing)  # type: ignore[arg-type]
    assert listing.made == []
    rows = [
        {"op": "matmul_w4a16", "case": "qwen3-8b.o.decode.b16", "outcome": "tuned"},
        {"op": "matmul_w8a8", "case": "qwen3-8b.o.decode.b16", "outcome": "kept"},
    ]
    (tmp_path / slot.TUNING).write_text(
        "".join(json.dumps({"cell_key": str(i), **r}) + "\n" for i, r in enumerate(rows))
    )
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "matmul_w4a16.json").write_text("1")
    slot.time_tuned(listing)  # type: ignore[arg-type]
    (cell,) = listing.made
    assert cell.arguments["case"] == "qwen3-8b.o.decode.b16" and cell.arguments["spec"] == "w4a16-g128"
    assert listing.options[-1]["env"] == {"PERCARD_TUNED": str(tmp_path / "tuned")}
    assert cell.row["code"]["config_source"] == "tuned"
    first = Listing(tmp_path, "cuda")
    slot.time_ops(first)  # type: ignore[arg-type]
    (plain,) = [c for c in first.made if c.arguments == {**cell.arguments, "seed": c.arguments["seed"]}]
    assert plain.identity != cell.identity, "its row does not stand for the tuned one"
    assert "config_source" not in plain.row["code"]
    Record.from_json(slot.completed(tmp_path, {}, {**cell.row, **CUT, "cell_key": "k"}))


@needs_triton
def test_a_tune_task_tells_what_the_tuner_came_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Machine:
        card, triton, where = device.H200, "3.9.0", torch.device("cpu")

    def measured(problem: Any, machine: Any, seed: int) -> tuner.Outcome:
        entry = problem.key(machine.card, machine.triton) | {"config": {"block_n": 64}, "us": 1.0, "heuristic_us": 2.0}
        return tuner.Outcome(problem, status, "words of it", entry if status == "tuned" else None)

    monkeypatch.setattr(tuner, "CardMachine", Machine)
    monkeypatch.setattr(tuner, "measure", measured)
    case = {"op": "matmul_w8a8", "case": "qwen3-8b.o.decode.b1", "model": "qwen3-8b", "out": str(tmp_path), "seed": 1}
    status = "failed"
    (row,) = slot_tasks.tune(**case)
    assert row["quality"]["gate"] == "red" and "words of it" in row["error"]["message"]
    status = "tuned"
    (row,) = slot_tasks.tune(**case)
    assert row["outcome"] == "tuned" and row["entry"]["us"] == 1.0 and (tmp_path / "matmul_w8a8.json").exists()
    (row,) = slot_tasks.tune(**case)
    assert row["outcome"] == "there"


def test_a_layer_of_experts_for_real(tmp_path: Path) -> None:
    """On a CPU, through the runner and into the report."""
    if moe.moe_matmul.body("cpu").absent("cpu") is not None:
        pytest.skip("the C++ module is not built")
    stages = (
        Stage("fingerprint", 25, slot.fingerprint, essential=True, patient=True),
        Stage("experts", 100, slot.time_experts, essential=True),
    )
    out, said = tmp_path / "slot", []
    assert slot.run(out, 5, device="cpu", stages=stages, say=said.append) == DONE, said
    made = [Record.from_json(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [row.status for row in made] == ["ok", "ok"] and {row.level for row in made} == {"layer"}
    assert made[0].model["experts_touched"] == 4.0 and made[0].against[0]["impl"] == "torch bfloat16"
    assert "## Layers of experts" in (out / "report.md").read_text()
    assert made[0].case in (out / "table.csv").read_text()


def test_a_layer_that_is_wrong_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe.conformance, "faults", lambda *_: ["3 elements are off"])
    (row,) = moe.cell("tiny", "w8a8", 2, "cpu", rounds=1)
    assert row["quality"]["gate"] == "red" and "latency_us" not in row
    monkeypatch.setattr(moe.conformance, "faults", lambda *_: [])
    monkeypatch.setattr(moe, "moe", lambda x, *_: torch.zeros_like(x))
    (row,) = moe.cell("tiny", "w8a8", 2, "cpu", rounds=1)
    assert row["quality"]["gate"] == "red" and "is off by 100.00%" in row["error"]["message"]


def test_report_of_tuning(tmp_path: Path) -> None:
    entry = {"config": {"block_n": 64, "split_k": 2}, "us": 9.0, "heuristic_us": 10.0, "floor_us": None}
    rows = [
        {"cell_key": "a", "op": "matmul_w8a8", "case": "c", "status": "ok", "outcome": "tuned", "entry": entry},
        {"cell_key": "b", "op": "matmul_w8a8", "case": "d", **CUT},
    ]
    (tmp_path / "tuning.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = slot_report._tuning(list(folder.read_lines(tmp_path / "tuning.jsonl")))
    assert "| matmul_w8a8 | c | tuned | 9.0 | 10.0 |  | block_n=64 split_k=2 |" in text and "| d | cut |" in text


def test_the_ops_of_the_slot_are_those_that_are_timed() -> None:
    assert set(slot.TUNED_OPS) <= set(ops.OPS) and moe.SLOT_MODEL in moe.MODELS
