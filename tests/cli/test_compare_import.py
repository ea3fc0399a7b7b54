"""`percard bench compare` and `percard bench import` from the command line: exit codes, JSON, and what one verb hands another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNS, FILES = ROOT / "tests/bench/runs", ROOT / "tests/bench/imports"


def test_exit_codes_of_compare(percard, tmp_path):
    same = percard("bench", "compare", RUNS / "a.jsonl", RUNS / "a.jsonl")
    assert same.code == 0 and "no regression; 20 same" in same.out
    slow = percard("bench", "compare", RUNS / "a.jsonl", RUNS / "slow.jsonl", "--fail", "5%")
    assert slow.code == 4 and "regression; 20 slower" in slow.out
    assert percard("bench", "compare", RUNS / "slow.jsonl", RUNS / "a.jsonl", "--fail", "5%").code == 0
    other = tmp_path / "other.jsonl"
    other.write_text((RUNS / "slow.jsonl").read_text().replace('"threads":1', '"threads":8'))
    apart = percard("bench", "compare", RUNS / "a.jsonl", other)
    assert apart.code == 3 and "1 threads and" in apart.out and "slower" not in apart.out
    across = percard("bench", "compare", RUNS / "a.jsonl", other, "--across")
    assert across.code == 3 and "slower" in across.out and "not comparable" in across.out
    assert percard("bench", "compare", RUNS / "a.jsonl", RUNS / "later.jsonl", RUNS / "slow.jsonl").code == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([RUNS / "a.jsonl"], "1 run given: expected a base and at least one more"),
        ([RUNS / "a.jsonl", "gone.jsonl"], "gone.jsonl: not there; give a JSONL file"),
        ([RUNS / "a.jsonl", RUNS / "b.jsonl", "--fail", "3"], "--fail 3: expected a share as 3% or 0.03"),
        (
            [RUNS / "a.jsonl", RUNS / "b.jsonl", "--group", "colour"],
            "--group colour: expected one of case, op, layer, model",
        ),
    ],
)
def test_bad_input_to_compare(percard, words, said):
    ran = percard("bench", "compare", *words)
    assert ran.code == 2 and said in ran.error


def test_compare_in_json(percard):
    ran = percard("bench", "compare", RUNS / "a.jsonl", RUNS / "slow.jsonl", "--group", "layer", "--json")
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert [line["kind"] for line in lines] == ["cell"] * 20 + ["group"] * 4 + ["verdict"]
    assert lines[-1]["exit"] == ran.code == 4 and lines[0]["ratio"] > 1 and lines[0]["run"].endswith("slow.jsonl")


def test_what_is_imported_is_reported_and_compared(percard, tmp_path):
    out = tmp_path / "served.jsonl"
    ran = percard(
        "bench", "import", "vllm-serve", FILES / "vllm-serve.json", "--spec", "w8a8", "--card", "h20-96", "--out", out
    )
    assert ran.code == 0 and "256.0 tok/s out" in ran.out and "not read: build" in ran.err
    assert (
        "0 of 1 records are new"
        in percard(
            "bench",
            "import",
            "vllm-serve",
            FILES / "vllm-serve.json",
            "--spec",
            "w8a8",
            "--card",
            "h20-96",
            "--out",
            out,
        ).err
    )
    assert percard("bench", "import", "sglang", FILES / "sglang.jsonl", "--out", out).code == 0
    assert percard("bench", "import", "llama-bench", FILES / "llama-bench.json", "--out", out, "--json").code == 0
    report = percard("bench", "report", out)
    assert report.code == 0 and all(word in report.out for word in ("vllm", "sglang", "llama-bench"))
    assert percard("bench", "compare", out, out).code == 0
    for words, said in (
        (["trt", FILES / "sglang.jsonl"], "no result files of 'trt' are read; known: vllm-serve, sglang, llama-bench"),
        (["sglang", FILES / "vllm-serve.json"], "it looks like one of vllm-serve"),
        (["vllm-serve", FILES / "vllm-serve.json", "--card", "h999"], "no card 'h999'"),
    ):
        ran = percard("bench", "import", *words, "--out", tmp_path / "x.jsonl")
        assert ran.code == 2 and said in ran.error and not (tmp_path / "x.jsonl").exists()
