"""`percard prune` on the command line: tables, JSON, exit codes; and what a score is worth against a random choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Ran

Run = Callable[..., Ran]
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
SCORED = ["--group", 64, "--tp", 1, "--calibration", EXAMPLE / "calibration.txt", "--seq-len", 256]


def test_dry_run_reads_no_weights_and_tells_what_a_card_gains(percard: Run) -> None:
    ran = percard("prune", EXAMPLE, "--ffn", 500, *SCORED, "--dry-run", "--card", "h20-96", "--spec", "w4a16-g64")
    assert ran.code == 0 and "5,772,544 (78.6%)" in ran.out and "tok/s on h20-96" in ran.out
    told = json.loads(percard("prune", EXAMPLE, "--ffn", 500, *SCORED, "--dry-run", "--json").out)
    assert told["cuts"] == {"ffn": [768, 512]} and [row["spec"] for row in told["sizes"]] == [
        "bf16",
        "w8a8",
        "w4a16-g128",
    ]


def test_a_child_is_written_and_held_against_its_source(percard: Run, tmp_path: Path) -> None:
    words = ["prune", EXAMPLE, "--ffn", 576, *SCORED, "--samples", 4, "--out", tmp_path / "child"]
    held = tmp_path / "held.txt"
    held.write_text((EXAMPLE / "heldout.txt").read_text()[:2000])
    ran = percard(*words, "--text", held)
    assert ran.code == 0 and "logits equal the source's with the cut parts zeroed" in ran.out
    assert "against the source: KL 0.0" in ran.out and "score" in ran.err
    again = percard(*words)
    assert again.code == 2 and "output exists" in again.error


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--ffn", 99999], "the source has 768"),
        (["--layers", 3], "the first 2 and the last 2 blocks stay"),
        (["--experts", 2], "this model has no experts"),
        ([], "say how small"),
        (["--target-params", 0.2], "smaller than one round of pruning goes"),
        (["--target-cost", 0.8], "name it with --card"),
        (["--target-cost", 0.8, "--card", "h9000"], "no card 'h9000'"),
        (["--ffn", 512, "--mask", "wanda"], "--mask leaves all sizes as they are"),
        (["--mask", "wanda", "--sparsity", "4:2", "--out", "x"], "expected a share of zeros"),
        (["--ffn", 512], "--out is missing"),
    ],
)
def test_bad_input(percard: Run, words: list, error: str) -> None:
    dry = [] if "--out" in words or words == ["--ffn", 512] else ["--dry-run"]
    ran = percard("prune", EXAMPLE, *words, "--group", 64, "--tp", 1, *dry)
    assert ran.code == 2 and error in ran.error


@pytest.mark.full
@pytest.mark.parametrize("cut", [("--layers", 6), ("--ffn", 576)], ids=["layers", "ffn"])
def test_scores_beat_a_random_choice(percard: Run, tmp_path: Path, cut: tuple) -> None:
    """Mean KL over three seeds right after pruning: of two blocks of eight, and of a quarter of the channels."""
    sums = []
    for control in ([], ["--depth-score", "random", "--width-score", "random"]):
        sums.append(0.0)
        for seed in range(3):
            words = [
                "prune",
                EXAMPLE,
                *cut,
                *SCORED,
                "--samples",
                32,
                "--seed",
                seed,
                "--text",
                EXAMPLE / "heldout.txt",
            ]
            ran = percard(*words, *control, "--no-check", "--force", "--json", "--out", tmp_path / "child")
            sums[-1] += json.loads(ran.out)["quality"]["kl"] / 3
    print(f"{cut[0]}: KL {sums[0]:.4f} by score, {sums[1]:.4f} at random")
    assert sums[0] < sums[1] / 3
