"""The slot's training stage: what it writes, which commands it gives, what becomes of their reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from percard.bench import slot, slot_qad, slot_report


@pytest.mark.parametrize("device", slot.DEVICES)
def test_cells(device: str) -> None:
    (cell,) = slot_qad.slot_cells(device, 1)
    json.dumps([cell.arguments, cell.identity])
    assert cell.arguments["device"] == device and slot.train_qad in [stage.run for stage in slot.STAGES]
    assert cell.arguments["changes"] == ({} if device == "cuda" else slot_qad._TINY)


def test_a_row_per_run(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []

    def percard(*words: Any) -> None:
        given.append([str(word) for word in words])
        assert Path(given[-1][1]).is_dir() or given[-1][1].endswith("quantised")
        if words[0] == "distill":
            folder = Path(words[-1])
            folder.mkdir()
            told = {"run": {"tokens_per_s": 100.0 / len(given), "seconds": 2.0}, "curve": [{"divergence": 0.5}]}
            name = "qad.json" if {"--qad", "--scales-only"} & set(words) else "distill.json"
            (folder / name).write_text(json.dumps(told))

    monkeypatch.setattr(slot_qad, "_percard", percard)
    rows = list(slot_qad.cell(**slot_qad.slot_cells("cpu", 1)[0].arguments))
    assert [words[0] for words in given] == ["quantize", "distill", "distill", "distill"]
    assert "--scales-only" in given[2] and given[3][given[3].index("--qad") + 1] == slot_qad.SPEC
    assert [row["run"] for row in rows] == list(slot_qad.RUNS) and ["part" in row for row in rows] == [
        True,
        True,
        False,
    ]
    assert rows[-1]["words"] == "25 tok/s, 0.50 of the 16-bit run's"
    table = slot_report._trained([{**row, "case": "qwen3-0.6b"} for row in rows])
    assert "| qwen3-0.6b | weights | 2 x 16 | 0.67 | 25 |" in table


def test_the_model_is_one_that_transformers_loads(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    slot_qad.write_model(tmp_path / "model", "qwen3-0.6b", slot_qad._TINY, 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.num_hidden_layers == 2 and model.config.vocab_size == 512
    tokens = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert tokens.encode("w3 w511").ids == [3, 511] and tokens.get_vocab_size() == 512


def test_a_command_that_fails_says_its_last_words() -> None:
    with pytest.raises(RuntimeError, match=r"percard quantize nowhere ended with 2: .*--spec is missing"):
        slot_qad._percard("quantize", "nowhere")


@pytest.mark.full
def test_the_stage_for_real_on_a_cpu() -> None:
    rows = list(slot_qad.cell(**slot_qad.slot_cells("cpu", 1)[0].arguments))
    assert [row["run"] for row in rows] == list(slot_qad.RUNS)
    assert all(row["tokens_per_s"] > 0 and row["seconds"] > 0 for row in rows)
