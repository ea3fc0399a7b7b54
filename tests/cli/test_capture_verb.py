"""`percard capture` on the command line: a text, completions by the engine, dry runs, exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from percard.quant.capture_cache import Capture

from .conftest import Ran

Run = Callable[..., Ran]
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "t.txt").write_text((EXAMPLE / "heldout.txt").read_text()[:4000])
    return tmp_path / "t.txt"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "p.jsonl").write_text('{"prompt": "import "}\n{"prompt": "def add(a, b):"}\n')
    return tmp_path / "p.jsonl"


def test_a_text(percard: Run, text: Path, tmp_path: Path) -> None:
    words = ["capture", EXAMPLE, "--data", text, "--seq-len", 128, "--top-k", 8]
    told = json.loads(percard(*words, "--dry-run", "--json").out)
    ran = percard(*words, "--out", tmp_path / "d")
    assert ran.code == 0 and f"{told['tokens']:,} tokens, the 8 likeliest of 4,096 tokens and the rest" in ran.out
    found = Capture.open(tmp_path / "d", EXAMPLE)
    assert (found.tokens, found.k, len(found)) == (told["tokens"], 8, told["windows"])
    again = percard(*words, "--out", tmp_path / "d")
    assert again.code == 2 and "output exists" in again.error


def test_completions_of_the_engine_follow_from_the_seed(percard: Run, prompts: Path, tmp_path: Path) -> None:
    words = ["capture", EXAMPLE, "--generate", prompts, "--n", 2, "--max-new", 12, "--json"]
    told = json.loads(percard(*words, "--dry-run").out)
    assert told["completions"] == 4 and told["k"] == 0
    for name, more in (
        ("a", []),
        ("b", []),
        ("c", ["--seed", 1]),
        ("d", ["--keep", "(?s)import|return", "--top-k", 4]),
    ):
        ran = percard(*words, *more, "--out", tmp_path / name)
        assert ran.code == 0, ran.error
    a, b, c = ((tmp_path / name / "completions.jsonl").read_text() for name in "abc")
    assert a == b != c
    kept = [
        line for line in a.splitlines() if "import" in json.loads(line)["text"] or "return" in json.loads(line)["text"]
    ]
    assert (tmp_path / "d" / "completions.jsonl").read_text().splitlines() == kept and 0 < len(kept) < 4
    made = json.loads((tmp_path / "d" / "capture.json").read_text())
    assert made["completions"]["dropped"] == 4 - len(kept) and made["k"] == 4
    assert Capture.open(tmp_path / "d", EXAMPLE).tokens == made["tokens"] <= told["tokens"]


def test_a_completion_ends_with_the_id_that_ended_it(percard: Run, prompts: Path, tmp_path: Path) -> None:
    """Of several end-of-text ids the one that the teacher chose: a chat model's is not the first of its config."""
    teacher = tmp_path / "teacher"
    shutil.copytree(EXAMPLE, teacher)
    words = ["capture", teacher, "--generate", prompts, "--n", 1, "--temperature", 0, "--max-new", 12]
    assert percard(*words, "--out", tmp_path / "free").code == 0
    free = [json.loads(line) for line in (tmp_path / "free" / "completions.jsonl").read_text().splitlines()]
    new = [entry["ids"][entry["prompt_tokens"] :] for entry in free]
    last = new[0][5]
    never = next(i for i in range(4096) if all(i not in ids for ids in new))
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"eos_token_id": never}))
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": [never, last]}))
    assert percard(*words, "--out", tmp_path / "ended").code == 0
    ended = json.loads((tmp_path / "ended" / "completions.jsonl").read_text().splitlines()[0])
    wanted = new[0][: new[0].index(last) + 1]
    assert ended["ended"] and ended["ids"][ended["prompt_tokens"] :] == wanted


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "give --data with a text, or --generate with prompts"),
        (["--data", "t", "--generate", "p"], "one of them"),
        (["--data", "t"], "--out is missing"),
        (["--data", "t", "--keep", "x", "--dry-run"], "--keep is for --generate"),
        (["--generate", "p", "--seq-len", 64, "--dry-run"], "--seq-len is for --data"),
        (["--data", "nowhere.txt", "--dry-run"], "the text is not there"),
        (["--generate", "nowhere.jsonl", "--dry-run"], "prompts are not there"),
        (["--data", EXAMPLE / "heldout.txt", "--seq-len", 64, "--top-k", 4097, "--dry-run"], "choose 1 to 4096"),
        (["--data", EXAMPLE / "heldout.txt", "--seq-len", 513, "--dry-run"], "above the teacher's 512 positions"),
    ],
)
def test_bad_input(percard: Run, words: list, error: str) -> None:
    ran = percard("capture", EXAMPLE, *words)
    assert ran.code == 2 and error in ran.error
