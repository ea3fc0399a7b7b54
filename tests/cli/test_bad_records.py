"""Records that are cut, edited or of another version: every verb that reads them ends in a line with a remedy."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("demo.jsonl", "ops-cpu-native.jsonl", "attention-decode-native.jsonl")
VALUES = (None, "x", 3, -1, 0, [], {}, True, [None], {"a": 1}, [3, 2], "", 1e300, [["x"]])
VERBS = {
    "report": ("bench", "report"),
    "compare": ("bench", "compare", str(ROOT / "bench/results/demo.jsonl")),
    "plan --check": ("plan", "--check"),
}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / "bench/results" / name).read_text().splitlines()[:4]]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda line: line.replace('"schema":1', '"schema":0'),
            "schema 0 is older than 1 and is not read; measure again",
        ),
        (
            lambda line: line.replace('"schema":1', '"schema":1,"colour":2'),
            "unknown keys colour for schema 1; remove them",
        ),
        (
            lambda line: line.replace('"schema":1', '"schema":"one"'),
            "has no schema number; it is not a record; give the JSONL",
        ),
        (lambda line: line[: len(line) // 2], "not JSON"),
        (lambda line: "{}", "has no schema number"),
        (lambda line: line.replace('"level":"model"', '"level":"galaxy"'), "level 'galaxy' is not one of"),
        (lambda line: line.replace('"latency_us":{', '"latency_us":{"samples":"many","old":{'), "not JSON"),
        (
            lambda line: line.replace('"threads":2', '"threads":"two"'),
            "cpu.threads is 'two'; expected a number; remove the row",
        ),
        (lambda line: "[" * 100_000, "not JSON (too deep)"),
    ],
)
def test_a_row_that_is_wrong_is_named(verb, change, words, tmp_path, percard):
    good = (ROOT / "bench/results/demo.jsonl").read_text().splitlines()[0]
    bad = change(good)
    assert bad != good
    path = tmp_path / "records.jsonl"
    path.write_text(f"{good}\n{bad}\n")
    ran = percard(*VERBS[verb], path)
    assert ran.code == 2 and f"{path}:2: " in ran.error and words in ran.error


@pytest.mark.parametrize("verb", VERBS)
def test_files_that_hold_no_records(verb, tmp_path, percard):
    for text, words in (("", "holds no record"), ("\n\n", "holds no record")):
        path = tmp_path / "records.jsonl"
        path.write_text(text)
        ran = percard(*VERBS[verb], path)
        assert ran.code == 2 and words in ran.error


def test_a_cut_last_line_is_left_out(tmp_path, percard):
    lines = (ROOT / "bench/results/demo.jsonl").read_text()
    path = tmp_path / "records.jsonl"
    path.write_text(lines + lines.splitlines()[0][:300])
    ran = percard("bench", "compare", ROOT / "bench/results/demo.jsonl", path)
    assert ran.code == 0 and "no regression; 11 same" in ran.out


@pytest.mark.parametrize("seed", range(6))
def test_edited_rows_are_read_or_refused_in_a_line(seed, tmp_path, percard):
    """Fields taken away or of another type, at random: a verb works, or says in one line what is wrong; it never breaks."""
    draw, path, refused = random.Random(seed), tmp_path / "records.jsonl", 0
    for turn in range(10):
        mutated = rows(FILES[turn % len(FILES)])
        for _ in range(draw.randint(1, 2)):
            row = draw.choice(mutated)
            target = draw.choice([row, *(v for v in row.values() if isinstance(v, dict) and v)])
            key = draw.choice(list(target))
            if draw.random() < 0.3:
                del target[key]
            else:
                target[key] = draw.choice(VALUES)
        path.write_text("".join(json.dumps(row) + "\n" for row in mutated))
        for verb, words in VERBS.items():
            ran = percard(*words, path)
            assert ran.code in (0, 2, 3, 4), f"{verb}: {ran.err}\n{mutated}"
            if ran.code == 2:
                refused += 1
                assert ";" in ran.error, ran.error
    assert 0 < refused < 30
