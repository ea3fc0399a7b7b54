"""What distilling brings back after pruning, and what scores gain on chance: the arms of bench/recovery.py, and what is asked of them.

    pytest -m full -s tests/quant/test_distill_recovery.py

The committed record was made by the same arms: `python -m percard.bench.recovery --out bench/results/recovery-tiny-qwen3.json`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from percard.bench.recovery import Cells
from percard.bench.recovery_arms import all_arms, checks

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"


def held(tmp_path: Path, count: int, *kinds: str) -> None:
    """Runs all arms of these kinds and what they need; every one of at least `count` questions must be answered well."""
    cells = Cells(all_arms(), EXAMPLE, tmp_path, lambda words: print(words, flush=True))
    for name in [arm.name for arm in cells.arms.values() if arm.kind in kinds]:
        cells.get(name)
    found = checks({name: cell for name in cells.arms if (cell := cells.finished(name)) is not None})
    print(*(f"{c['words']}: {c['value']:.3g}, limit {c['limit']:g}" for c in found), sep="\n", flush=True)
    assert len(found) >= count and [c for c in found if not c["held"]] == []


@pytest.mark.full
def test_scores_beat_chance_right_after_pruning(tmp_path: Path) -> None:
    held(tmp_path, 5, "prune", "choices")


@pytest.mark.full
def test_a_quarter_of_the_parameters_comes_back(tmp_path: Path) -> None:
    held(tmp_path, 10, "distil")
