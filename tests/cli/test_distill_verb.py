"""`percard distill` on the command line: the dry run and its question, a run with a held-out text, exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from .conftest import Ran

Run = Callable[..., Ran]
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
TEXT = ["--data", EXAMPLE / "calibration.txt", "--seq-len", 32, "--batch", 2, "--steps", 2]


def pruned(percard: Run, folder: Path) -> Path:
    """tiny-qwen3 with half of its channels, by seeded random ones: no text is read."""
    ran = percard(
        "prune",
        EXAMPLE,
        "--ffn",
        384,
        "--width-score",
        "random",
        "--group",
        64,
        "--tp",
        1,
        "--no-check",
        "--out",
        folder,
    )
    assert ran.code == 0, ran.err
    return folder


def test_dry_run_a_run_and_swapped_roles(percard: Run, tmp_path: Path) -> None:
    child, out = pruned(percard, tmp_path / "child"), tmp_path / "out"
    ran = percard("distill", child, "--teacher", EXAMPLE, *TEXT, "--dry-run")
    assert ran.code == 0 and "4,096 tokens in common" in ran.out and "memory without activations" in ran.out
    ran = percard("distill", EXAMPLE, "--teacher", child, *TEXT, "--dry-run")
    assert ran.code == 3 and "are they swapped?" in ran.out
    assert percard("distill", EXAMPLE, "--teacher", child, *TEXT, "--dry-run", "--yes").code == 0
    ran = percard("distill", EXAMPLE, "--teacher", child, *TEXT, "--out", out)
    assert ran.code == 3 and "are they swapped?" in ran.err and not out.exists()
    held = tmp_path / "held.txt"
    held.write_text((EXAMPLE / "heldout.txt").read_text()[:2000])
    ran = percard("distill", child, "--teacher", EXAMPLE, *TEXT, "--text", held, "--device", "cpu", "--out", out)
    assert ran.code == 0, ran.err
    assert "against the teacher: KL" in ran.out and "came back" in ran.out
    done = json.loads((out / "distill.json").read_text())
    assert len(done["curve"]) == 2 and done["quality"]["after"]["kl"] < done["quality"]["before"]["kl"]
    assert "| KL, nats |" in (out / "README.md").read_text() or "| KL, nats |" in (out / "percard-card.md").read_text()


def test_refusals_have_their_codes(percard: Run, tmp_path: Path) -> None:
    child = tmp_path / "child"
    shutil.copytree(EXAMPLE, child)
    ran = percard("distill", child, "--teacher", tmp_path / "none", *TEXT, "--out", tmp_path / "out")
    assert ran.code == 2 and "no such folder" in ran.err
    assert percard("distill", child, "--teacher", EXAMPLE, *TEXT).code == 2
    ran = percard("distill", child, "--teacher", EXAMPLE, *TEXT, "--loss", "magic", "--out", tmp_path / "out")
    assert ran.code == 2 and "choose one of fkl, rkl, jsd, topk, none" in ran.err
    words = json.loads((child / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    first, second = (next(w for w, i in vocabulary.items() if i == n) for n in (300, 301))
    vocabulary[first], vocabulary[second] = 301, 300
    (child / "tokenizer.json").write_text(json.dumps(words))
    ran = percard("distill", child, "--teacher", EXAMPLE, *TEXT, "--out", tmp_path / "out")
    assert ran.code == 2 and "id 300 is" in ran.err and "need one tokenizer" in ran.err
