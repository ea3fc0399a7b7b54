"""The row of this machine: planted bodies and a fake clock give the figures that they should."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
import torch

from percard.bench import card, card_row, card_table, efficiency
from percard.bench.card_row import Body
from percard.cli import run
from percard.formats.spec import FormatError

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of 20 and 15 GB/s, two int8 bodies and a broken one, small weights, and no A/A run."""
    monkeypatch.setattr(card, "bandwidths", lambda device: {"read": 20e9, "copy": 15e9})
    monkeypatch.setattr(card_row.roof, "noise_floor", lambda device: 1.5)
    monkeypatch.setattr(card_row, "DECODE", {"cpu": (256, 128)})
    monkeypatch.setattr(card_row, "_DECODE_BYTES", 2**17)
    monkeypatch.setattr(card_row, "SHAPES", {"cpu": ((2, 1000, 1000), (4, 1000, 1000))})

    def broken(m: int, n: int, k: int, device: torch.device) -> card_row.Call:
        raise RuntimeError("no such units\nreally")

    def nothing(m: int, n: int, k: int, device: torch.device) -> card_row.Call:
        return lambda: None

    found = [Body("int8", "a", nothing), Body("bf16", "b", nothing), Body("fp16", "gone", broken)]
    monkeypatch.setattr(card_row, "bodies", lambda device: iter(found))


def ticking() -> object:
    """Each look at the clock is 1 ms after the one before."""
    ticks = count()
    return lambda: next(ticks) / 1000


@pytest.mark.usefixtures("machine")
def test_a_row_has_the_fields_of_the_table_and_says_where_each_figure_is_from() -> None:
    said: list[str] = []
    row = card_row.measure(CPU, say=said.append, now=ticking(), command="percard bench card --id x")  # type: ignore[arg-type]
    fields = json.loads(card._CARDS.read_text())["schema"]["fields"]
    assert set(row) == set(fields) | {"measured"}
    assert (row["bandwidth_gbs"], row["measured"]["read_gbs"], row["measured"]["noise_floor_pct"]) == (20.0, 20.0, 1.5)
    # 2 x 4 x 1000 x 1000 operations in a millisecond
    assert row["int8_tops"] == row["bf16_tflops"] == 0.008
    assert row["measured"]["products"]["int8"] == {"a": {"2x1000x1000": 0.004, "4x1000x1000": 0.008}}
    assert row["fp8_tflops"] is None and row["measured"]["absent"] == {"gone": "no such units really"}
    assert row["confidence"] == "measured" and "percard bench card --id x" in row["source"]
    assert torch.__version__ in row["source"] and row["measured"]["date"] in row["source"]
    assert set(row["measured"]["decode_gbs"]) == {"bf16", "w8a16", "w4a16-g128", "w8a8", "w4a8-g128"}
    assert row["arch"] == "cpu" and row["device_names"] == [card.cpu()["model"]] and efficiency.is_cpu(row["id"])
    assert row["memory_mib"] * 2**20 == pytest.approx(row["memory_gb"] * 1e9, rel=1e-3)
    assert any("gone: absent" in words for words in said)
    held = card_table.card_of(row, "row")  # the planner takes it
    assert (held.arch, held.confidence, held.bandwidth_gbs, held.memory_mib) == (
        "cpu",
        "measured",
        20.0,
        row["memory_mib"],
    )
    words = "\n".join(card_row.lines(row))
    assert "20.0 GB/s read" in words and "by a at 4x1000x1000" in words and "absent      gone" in words


def test_names_are_slugs() -> None:
    assert card_row._slug("Intel(R) Xeon(R) Gold 6430 CPU @ 2.10GHz") == "intel-xeon-gold-6430"
    assert card_row._slug("AMD EPYC 9654 96-Core Processor") == "amd-epyc-9654-96-core"


def test_writing_replaces_the_row_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cards.json"
    for id, rate in (("a", 1), ("b", 2), ("a", 3)):
        card_row.write(path, {"id": id, "bandwidth_gbs": rate})
    held = json.loads(path.read_text())["cards"]
    assert held == [{"id": "b", "bandwidth_gbs": 2}, {"id": "a", "bandwidth_gbs": 3}]
    path.write_text("[]")
    with pytest.raises(FormatError, match="no card table"):
        card_row.write(path, {"id": "a"})
    path.write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        card_row.write(path, {"id": "a"})
    assert path.read_text() == "{"


def test_a_body_without_units_is_called_once() -> None:
    calls = count()
    slow = iter([0.0, 0.0, 10.0])  # the end of the budget, start and end of one call
    assert card_row._best([lambda: next(calls)], CPU, 1.0, lambda: next(slow)) == 10.0
    assert next(calls) == 2  # one that warms up, one that is timed


@pytest.mark.usefixtures("machine")
def test_the_verb_writes_what_plan_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "card.json"
    assert run(["bench", "card", "--device", "cpu", "--id", "cpu-mine", "--quick", "--out", str(path)]) == 0
    assert json.loads(path.read_text())["cards"][0]["id"] == "cpu-mine"
    assert "percard plan MODEL --card-file" in capsys.readouterr().out
    assert run(["bench", "card", "--device", "tpu"]) == 2


def test_every_body_multiplies_here() -> None:
    """The real bodies at a small shape: each gives [m, n]."""
    for body in card_row.bodies(CPU):
        assert tuple(body.make(32, 256, 256, CPU)().shape) == (32, 256), body.name
