"""`percard plan`: tables, JSON, exit codes, and one clear line for what cannot be meant."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Ran

Run = Callable[..., Ran]
GOLDEN = ("plan", "qwen3-235b-a22b", "--card", "h20-96", "--users", "32", "--ctx", "8k")


def rows(ran: Ran) -> list[dict]:
    return [json.loads(line) for line in ran.out.splitlines()]


def test_the_table_says_cards_rate_basis_and_demand(percard: Run) -> None:
    ran = percard(*GOLDEN, "--usd-hour", "2")
    assert ran.code == 0
    for words in ("bf16", "TP8", "w8a8", "TP4", "w4a16-g128", "TP2", "brochure -60 +38", "656,359", "$/Mtok", "memory"):
        assert words in ran.out
    best = next(line for line in ran.out.splitlines() if line.startswith("best: "))
    assert "2 x h20-96 for qwen3-235b-a22b in w4a16-g128 over a cache of bf16, 32 users x 8192 tokens" in best
    assert "90% of 97871 MiB" in best and "less 2 GB a card" in best
    assert max(len(line.rstrip()) for line in ran.out.splitlines()[:8]) <= 120


def test_json_rows_are_complete_and_no_rate_has_three_digits(percard: Run) -> None:
    found = rows(percard(*GOLDEN, "--kv", "bf16,int8", "--usd-hour", "2", "--json"))
    assert [(r["spec"], r["kv"]) for r in found][:4] == [
        ("bf16", "bf16"), ("bf16", "int8"), ("fp8-block", "bf16"), ("fp8-block", "int8"),
    ]  # fmt: skip
    for row in found:
        assert row["status"] == "serves" and row["cards"] in (2, 4, 8) and row["band"] and row["basis"] == "brochure"
        for key in ("tok_s_per_card", "tok_s_per_user", "tpot_ms", "ttft_s"):
            assert row[key] == float(f"{row[key]:.2g}"), key
        assert row["tokens_per_user"] == row["kv_tokens"] // 32 >= 8192
        assert sum(row["parts_bytes"].values()) == pytest.approx(row["weights_bytes"], abs=10)
        assert set(row["usd_per_mtok"]) == {"in", "out"} and row["demand"]["users"] == 32
        assert row["decode"]["sources"]["bandwidth"].startswith("4000 GB/s") and row["card_source"]
    weights, experts = found[0]["weights_bytes"], found[0]["parts_bytes"]["experts"]
    assert (weights, experts) == (470_187_269_120, 94 * 128 * 3 * 4096 * 1536 * 2)


def test_what_only_loads_is_said_with_its_remedy_and_exits_3(percard: Run) -> None:
    ran = percard("plan", "deepseek-r1", "--card", "h20-96", "--cards", "8", "--spec", "fp8-block")
    assert ran.code == 3
    assert "fp8-block over bf16: loads only: 61242 tokens of cache fit, 32 users x 8192 are 262144" in ran.out
    assert "--users 7" in ran.out and "best:" not in ran.out
    ran = percard("plan", "qwen3-235b-a22b", "--card", "h20-96", "--cards", "6", "--spec", "w8a8")
    assert ran.code == 3 and "vocabulary 151936 does not divide by TP 6; take one of 1, 2, 4, 8" in ran.out


def test_a_refused_split_is_named_beside_what_replaced_it(percard: Run) -> None:
    ran = percard("plan", "qwen3-235b-a22b", "--card", "h20-96", "--cards", "8", "--spec", "fp8-block")
    assert ran.code == 0 and "TP8 EP8" in ran.out and "1536 / TP 8 = 192 is not a multiple of 128" in ran.out


def test_all_cards_the_fewest_first(percard: Run) -> None:
    ran = percard("plan", "qwen3-32b", "--card", "all", "--spec", "fp8-block,w4a16-g128", "--usd-hour", "1")
    lines = ran.out.splitlines()
    cards = [int(found[1]) for line in lines if (found := re.search(r" TP(\d+) ", line))]
    assert ran.code == 0 and cards == sorted(cards) and len(cards) >= 14
    assert max(len(line.rstrip()) for line in lines[: len(cards) + 3]) <= 120
    found = rows(percard("plan", "qwen3-32b", "--card", "all", "--spec", "fp8-block,w4a16-g128", "--json"))
    assert len(found) == 2 * len({row["card"] for row in found}) >= 30


def test_explain_names_every_source(percard: Run) -> None:
    ran = percard("plan", "qwen3-8b", "--card", "l20-48", "--spec", "w4a16-g128", "--cards", "2", "--explain")
    for words in ("technical.city", "disputed", "others publish 59.8", "e_bw 0.80, e_fl 0.60: e_bw: default 0.80",
                  "46068 MiB as the system reports", "assumed: PCIe", "shape:qwen3-8b", "147,456 held once",
                  "compute-bound at", "gain nothing over bf16 from"):  # fmt: skip
        assert words in ran.out, words


def test_bounds_that_are_met_and_not(percard: Run) -> None:
    met = percard("plan", "qwen3-32b", "--card", "h100-80-sxm", "--spec", "w8a8", "--tpot", "10s", "--ttft", "100s")
    assert met.code == 0 and "over the whole band" in met.out
    late = percard("plan", "qwen3-32b", "--card", "h100-80-sxm", "--spec", "w8a8", "--tpot", "0.1ms")
    assert late.code == 3 and "too slow: TPOT" in late.out and "is above 0.1 ms" in late.out


def test_a_folder_is_planned_with_its_exact_bytes(percard: Run, checkpoint: Path) -> None:
    (row,) = rows(
        percard(
            "plan", str(checkpoint), "--card", "l4-24", "--spec", "as stored", "--users", "2", "--ctx", "64", "--json"
        )
    )
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in checkpoint.glob("*.safetensors"))
    assert row["spec"] == "bf16 (as stored)"
    assert row["weights_bytes"] == sum(f.stat().st_size for f in checkpoint.glob("*.safetensors")) - headers
    assert (
        "as the headers of the files say"
        in percard("plan", str(checkpoint), "--card", "l4-24", "--spec", "as stored").out
    )


def test_a_card_of_ones_own(percard: Run, tmp_path: Path) -> None:
    mine = {"id": "mine", "name": "M", "arch": "cpu", "memory_gb": 64, "bandwidth_gbs": 30, "bf16_tflops": 1.5,
            "int8_tops": 3.0, "source": "measured", "confidence": "measured"}  # fmt: skip
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(mine))
    flags = ("--card", "mine", "--card-file", str(file), "--spec", "bf16,w8a8", "--users", "1", "--ctx", "1k")
    ran = percard("plan", "qwen3-0.6b", *flags)
    assert ran.code == 0 and "64 GB nominal" in ran.out
    file.write_text(json.dumps({**mine, "bandwidth_gbs": -1}))
    ran = percard("plan", "qwen3-0.6b", *flags)
    assert (ran.code, ran.out) == (2, "") and "bandwidth_gbs is -1 GB/s, expected 1 to 100000" in ran.err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["qwen3-8b", "--card", "H20"], "ambiguous, it may be h20-96, h20-141"),
        (["qwen3-8b", "--card", "mi300"], "no card 'mi300'; known: a10-24"),
        (["qwen3-8b"], "--card is missing"),
        (["--card", "h20-96"], "MODEL is missing"),
        (["qwen9", "--card", "h20-96"], "no model 'qwen9'"),
        (["qwen3-8b", "--check", "r.jsonl"], "MODEL qwen3-8b beside --check"),
        (["qwen3-8b", "--card", "h20-96", "--fit", "e.json"], "--fit and --table go with --check"),
        (["--check", "none.jsonl"], "none.jsonl"),
        (["qwen3-8b", "--card", "h20-96", "--spec", "w5a16"], "unknown spec 'w5a16'"),
        (["qwen3-8b", "--card", "h20-96", "--spec", ","], "names nothing"),
        (["qwen3-8b", "--card", "h20-96", "--spec", "as stored"], "needs a folder"),
        (["qwen3-8b", "--card", "h20-96", "--kv", "int3"], "cache spec 'int3'"),
        (["qwen3-8b", "--card", "h20-96", "--users", "0"], "--users is 0, expected 1 to 1000000"),
        (["qwen3-8b", "--card", "h20-96", "--users", "99999999"], "--users is 99999999"),
        (["qwen3-8b", "--card", "h20-96", "--ctx", "many"], "--ctx many: expected tokens"),
        (["qwen3-8b", "--card", "h20-96", "--ctx", "999999999"], "--ctx is 999999999"),
        (["qwen3-8b", "--card", "h20-96", "--cards", "0"], "--cards is 0"),
        (["qwen3-8b", "--card", "h20-96", "--cards", "100000"], "--cards is 100000"),
        (["qwen3-8b", "--card", "h20-96", "--util", "1.1"], "--util is 1.1"),
        (["qwen3-8b", "--card", "h20-96", "--overhead-gb", "-1"], "--overhead-gb is -1"),
        (["qwen3-8b", "--card", "h20-96", "--tpot", "50"], "--tpot 50: expected a time with its unit"),
        (["qwen3-8b", "--card", "h20-96", "--usd-hour", "0"], "--usd-hour is 0"),
        (["qwen3-8b", "--card", "h20-96", "--card-file", "none.json"], "none.json: not there"),
        (["qwen3-8b", "--card", "h20-96", "--efficiency", "none.json"], "none.json: not there"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_exit_2(percard: Run, arguments: list[str], words: str) -> None:
    ran = percard("plan", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err and ran.err.startswith("percard plan: ") and len(ran.err.strip().splitlines()) == 1


def test_a_config_without_a_needed_field(percard: Run, tmp_path: Path, checkpoint: Path) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    del raw["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ran = percard("plan", str(tmp_path / "config.json"), "--card", "l4-24")
    assert ran.code == 2 and "num_hidden_layers is missing; a plan needs it, fetch the whole config.json" in ran.err


def test_the_page_shows_what_the_verb_prints(percard: Run) -> None:
    """Blocks of docs/plan.md that begin with a command hold lines of its output."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    blocks = [block.splitlines() for block in re.findall(r"```\n\$ percard (.*?)```", page, re.DOTALL)]
    assert len(blocks) >= 3
    for command, *shown in blocks:
        printed = [line.rstrip() for line in percard(*command.split()).out.splitlines()]
        missing = [line for line in shown if line.rstrip() not in printed]
        assert not missing, command
