"""`percard bench report`, and the figures of the readme."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from percard import compose
from percard.bench.model import Plan, run

from .conftest import Ran

Run = Callable[..., Ran]
ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "bench" / "results" / "demo.jsonl"


@pytest.fixture(scope="module")
def measured(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of a short run of the small random model."""
    out = tmp_path_factory.mktemp("measured") / "records.jsonl"
    plan = Plan(prompt=16, new=4, rounds=1)
    run(checkpoint, ["w8a8"], plan=plan, gates={"w8a8": {"gate": "green", "model": "tiny"}}, out=out)
    return out


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="bench/results/demo.jsonl: no demo has been published yet")
def test_the_readme_shows_the_committed_records_and_nothing_else() -> None:
    found = compose.BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found is not None
    assert found[0] == found[1] + compose.block(compose.read_records(PUBLISHED)) + found[2]


def test_report_prints_the_table_again_and_writes_the_block(measured: Path, tmp_path: Path, percard: Run) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- demo -->\nstale figures\n<!-- /demo -->\nafter\n")
    ran = percard("bench", "report", measured, "--readme", page)
    assert ran.code == 0 and "w8a8" in ran.out
    text = page.read_text()
    assert "stale" not in text and "| w8a8 | green |" in text
    assert text.startswith("before\n<!-- demo -->\n") and text.endswith("<!-- /demo -->\nafter\n")


@pytest.mark.parametrize("content", [None, ""])
def test_records_that_are_not_there(content: str | None, tmp_path: Path, percard: Run) -> None:
    path = tmp_path / "records.jsonl"
    if content is not None:
        path.write_text(content)
    ran = percard("bench", "report", tmp_path)
    assert ran.code == 2 and "records.jsonl" in ran.error


def test_a_page_without_the_block(measured: Path, tmp_path: Path, percard: Run) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    ran = percard("bench", "report", measured, "--readme", page)
    assert ran.code == 2 and "<!-- demo -->" in ran.error


def test_a_page_of_several_runs(measured: Path, tmp_path: Path, percard: Run) -> None:
    out = tmp_path / "page"
    ran = percard("bench", "report", measured, PUBLISHED, "--out", out)
    assert ran.code == 0 and f"wrote {out}/report.html" in ran.err and str(measured) in ran.out
    text = (out / "report.html").read_text()
    assert "qwen3-0.6b (synthetic), whole model" in text and "batch 1 / 1" in text
    assert (out / "table.csv").read_text().count("\n") == 1 + len((out / "records.jsonl").read_text().splitlines())
    again = percard("bench", "report", out, "--json")  # the folder is a folder of records itself
    assert again.code == 0 and len(again.out.splitlines()) == len((out / "records.jsonl").read_text().splitlines())
