"""report.json: round trip, other schemas, unknown keys."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from percard.formats.spec import FormatError
from percard.quant.report import Module, Report, card, human, sqnr


def make() -> Report:
    return Report(
        verb="quantize",
        source="a",
        output="b",
        level="weights",
        modules=(Module("m", "w8a8", "rtn", (2, 4), 41.5, 16, 12), Module("n", "w8a8", "rtn", (2, 4), None, 16, 12)),
        kept={"lm_head": "rule"},
        bytes={"source": 2000, "output": 1200},
        seconds={"quantize": 1.0},
    )


def test_round_trip_and_unknown_keys(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(make().to_json())
    assert Report.load(file) == make()
    tree = {**json.loads(file.read_text()), "mood": "fine"}
    file.write_text(json.dumps(tree))
    assert Report.load(file).warnings == ("report.json: unknown key 'mood' was not read",)
    for broken in ("{", "[]", json.dumps({**tree, "schema": 2}), json.dumps({"schema": 1})):
        file.write_text(broken)
        with pytest.raises(FormatError, match=r"report\.json"):
            Report.load(file)


def test_card_of_a_folder_names_no_hub_model() -> None:
    text = card(make(), "my-folder", {})
    assert "base_model" not in text and "`my-folder`" in text and "41.5" in text
    assert "base_model: a/b" in card(make(), "a/b", {})


def test_numbers() -> None:
    assert sqnr(100.0, 1.0) == pytest.approx(20) and sqnr(1.0, 0.0) is None and sqnr(0.0, 0.0) is None
    assert math.isinf(sqnr(float("inf"), 1.0) or 0)
    assert [human(n) for n in (7, 1500, 16.4e9, 2e15)] == ["7 B", "1.5 kB", "16.4 GB", "2e+03 TB"]
