"""The demo, with the small random model in place of the trained one and of the shapes that are timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from percard import compose
from percard.bench import model as bench_model
from percard.bench import quality

from .conftest import Ran, write

Run = Callable[..., Ran]
KEYS = {
    "spec", "quality_model", "speed_model", "gate", "size_bytes", "perplexity", "kl", "top1", "prefill_tok_s",
    "decode_tok_s", "kernel", "head",
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("small") / "tiny", max_position_embeddings=256)
    (folder / "heldout.txt").write_text("def add(a, b):\n    return a + b\n" * 20)
    return folder


@pytest.fixture
def small_shapes(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the demo times is the small model, not Qwen3-0.6B."""
    true = bench_model.run

    def run(shape: str, *args: Any, **options: Any) -> Any:
        assert shape.startswith("shape:qwen3-")
        return true(small, *args, **options)

    monkeypatch.setattr(bench_model, "run", run)


def loosen(monkeypatch: pytest.MonkeyPatch, top1: float) -> None:
    for bits in (4, 8):
        monkeypatch.setitem(quality.THRESHOLDS, bits, {"kl": 10.0, "top1": top1, "perplexity": 10.0})


def test_a_green_demo_has_a_row_per_spec_and_every_file(
    small: Path, small_shapes: None, tmp_path: Path, percard: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    loosen(monkeypatch, 0.0)
    ran = percard("demo", "--quick", "--model", small, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["spec"] for row in report["variants"]] == list(compose.SPECS)
    rows = [report["baseline"], *report["variants"]]
    assert all(set(row) >= KEYS and set(row) == set(rows[0]) for row in rows)
    for row in rows:
        for phase in ("prefill_tok_s", "decode_tok_s"):
            assert 0 < row[phase]["lo"] <= row[phase]["median"] <= row[phase]["hi"]
    assert all(row["gate"] == "green" and row["quality_model"] == "tiny" for row in report["variants"])
    assert all(spec in ran.out for spec in compose.SPECS)
    text = (tmp_path / "out" / "report.md").read_text()
    assert compose.PROMPT in text and all(f"{spec}:" in text for spec in compose.SPECS)
    assert all((tmp_path / "out" / "checkpoints" / spec / "config.json").is_file() for spec in compose.SPECS)


def test_a_red_gate_takes_the_speed_away_and_exits_4(
    small: Path, small_shapes: None, tmp_path: Path, percard: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    loosen(monkeypatch, 0.0)
    monkeypatch.setitem(quality.THRESHOLDS, 4, {"kl": 0.0, "top1": 1.0, "perplexity": 0.0})
    ran = percard("demo", "--quick", "--model", small, "--out", tmp_path / "out", "--json")
    assert ran.code == 4
    rows = {row["spec"]: row for row in json.loads(ran.out)["variants"]}
    assert rows["w4a16-g64"]["gate"] == rows["w4a8-g64"]["gate"] == "red"
    assert rows["w4a16-g64"]["decode_tok_s"] is rows["w4a16-g64"]["prefill_tok_s"] is None
    assert rows["w8a8"]["gate"] == "green" and rows["w8a8"]["decode_tok_s"] is not None


def test_without_the_model_the_demo_says_where_to_run_it(tmp_path: Path, percard: Run) -> None:
    ran = percard("demo", "--model", tmp_path / "nothing", "--out", tmp_path / "out")
    assert ran.code == 2 and "--model" in ran.error
