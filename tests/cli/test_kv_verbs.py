"""Caches on the command line: generate, verify and bench model with --kv; what they print, their JSON, their exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from percard.bench import quality

from .conftest import Ran, write

Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held.txt"
    path.write_text("def add(a, b):\n    return a + b\n" * 8)
    return path


@pytest.fixture(scope="module")
def quantised(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from percard import cli

    out = tmp_path_factory.mktemp("quantised") / "w8a8"
    assert cli.run(["quantize", str(checkpoint), "--spec", "w8a8", "--out", str(out)]) == 0
    return out


def test_generate_over_a_cache(checkpoint: Path, percard: Run) -> None:
    plain = json.loads(percard("generate", checkpoint, "--prompt", "def f", "--max-new", 8, "--json").out)
    ran = percard("generate", checkpoint, "--prompt", "def f", "--max-new", 8, "--json", "--kv", "int8")
    told = json.loads(ran.out)
    assert ran.code == 0 and (plain["kv"], told["kv"]) == ("bf16", "int8") and told["tokens"] == 8
    assert (
        "bfloat16, int4 cache]" in percard("generate", checkpoint, "--prompt", "x", "--max-new", 2, "--kv", "int4").err
    )


@pytest.mark.parametrize("verb", ["generate", "verify", "bench"])
def test_a_cache_that_is_not_known(checkpoint: Path, text: Path, percard: Run, verb: str) -> None:
    words: dict[str, list[object]] = {
        "generate": ["generate", checkpoint, "--prompt", "x"],
        "verify": ["verify", checkpoint, "--against", checkpoint, "--text", text],
        "bench": ["bench", "model", "shape:qwen3-0.6b", "--specs", "w8a8"],
    }
    ran = percard(*words[verb], "--kv", "int5")
    assert ran.code == 2 and "cache spec 'int5' is not one; known: bf16, int8, k8v4, int4" in ran.error


def test_heads_that_no_cache_fits(tmp_path: Path, text: Path, percard: Run) -> None:
    import torch

    from .conftest import CONFIG, tensors

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24}
    weights = {n: t for n, t in tensors().items() if "self_attn" not in n}
    for i in range(CONFIG["num_hidden_layers"]):
        for name, shape in (("q_proj", (48, 128)), ("k_proj", (24, 128)), ("v_proj", (24, 128)), ("o_proj", (128, 48))):
            weights[f"model.layers.{i}.self_attn.{name}.weight"] = torch.randn(shape, dtype=torch.bfloat16) / 11
        weights |= {f"model.layers.{i}.self_attn.{n}_norm.weight": torch.ones(24, dtype=torch.bfloat16) for n in "qk"}
    odd = write(tmp_path / "odd", weights, **heads)
    for words in (
        ["generate", odd, "--prompt", "x"],
        ["bench", "model", odd, "--text", text],
        ["verify", odd, "--against", odd, "--text", text],
    ):
        ran = percard(*words, "--kv", "int8")
        assert ran.code == 2 and "heads of 24 numbers have no int8 cache, expected a multiple of 16" in ran.error


def test_calibrated_needs_a_calibration(checkpoint: Path, percard: Run) -> None:
    ran = percard("generate", checkpoint, "--prompt", "x", "--kv", "calibrated")
    assert ran.code == 2 and "percard_kv.json: is missing; percard calibrate-kv" in ran.error


def test_verify_over_caches(checkpoint: Path, quantised: Path, text: Path, percard: Run) -> None:
    ran = percard("verify", quantised, "--against", checkpoint, "--text", text, "--kv", "int8,int4", "--json")
    told = json.loads(ran.out)
    assert [found["kv"] for found in told["caches"]] == ["int8", "int4"] and told["gates"]
    int8, int4 = told["caches"]
    assert (
        0 < int8["kl"] < int4["kl"] and int8["bytes_per_token"] == 2 * 132 and int8["bytes_per_token_bf16"] == 2 * 256
    )
    assert int4["notes"] == ["cache int4: bf16 in layer 0"] and int8["source_perplexity"] > 1
    assert ran.code == (4 if told["status"] == "red" else 0)
    assert told["status"] == "red" or "red" not in (int8["gate"], int4["gate"])


def test_verify_of_16_bit_weights_is_about_the_cache(checkpoint: Path, text: Path, percard: Run) -> None:
    ran = percard("verify", checkpoint, "--against", checkpoint, "--text", text, "--kv", "int8")
    assert ran.code in (0, 4) and "int8 cache, 264 bytes a token (1.94 x fewer)" in ran.out
    assert "against bf16" in ran.out and "cache int8 green" in ran.out
    assert percard("verify", checkpoint, "--against", checkpoint, "--kv", "int8").error.endswith("--text FILE")


def test_a_red_cache_is_exit_code_4(
    checkpoint: Path, text: Path, percard: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quality.CACHES, "int8", {"kl": 0.0, "top1": 1.0, "perplexity": 0.0})
    ran = percard("verify", checkpoint, "--against", checkpoint, "--text", text, "--kv", "int8")
    assert ran.code == 4 and "cache int8 red (cache int8: KL" in ran.out
    told = percard("verify", checkpoint, "--against", checkpoint, "--text", text, "--kv", "int8", "--json").out
    assert json.loads(told)["status"] == "red"


def test_bench_model_over_caches_and_contexts(
    checkpoint: Path, text: Path, tmp_path: Path, percard: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"kl": 9.0, "top1": 0.0, "perplexity": 9.0}  # a red row has no speed
    monkeypatch.setitem(quality.THRESHOLDS, 8, wide)
    for name in ("int8", "int4"):
        monkeypatch.setitem(quality.CACHES, name, wide)
    out = tmp_path / "records.jsonl"
    few = ["--prompt", 8, "--new", 2, "--rounds", 2, "--text", text, "--out", out, "--head", "16bit"]
    ran = percard("bench", "model", checkpoint, "--specs", "w8a8", "--kv", "bf16,int8,int4", "--context", "16,32", *few)
    assert ran.code == 0, ran.err
    table = [line.split() for line in ran.out.splitlines() if line.strip().startswith(("w8a8", "bf16", "fp32", "fp16"))]
    assert {tuple(row[1:3]) for row in table} >= {(kv, depth) for kv in ("int8", "int4") for depth in ("16", "32")}
    assert "decode over caches and contexts" in ran.out and "KV B/token" in ran.out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    int8 = [r for r in rows if r["scheme"]["kv_spec"] == "int8"]
    assert [r["shape"]["kv_len"] for r in int8] == [16, 32] and all(".tg2.d" in r["case"] for r in int8)
    assert all(r["memory"]["kv_bytes_per_token"] == 264 and r["memory"]["kv"] == 264 * 64 for r in int8)
    assert any(words.startswith("cache int8 against bf16: KL") for words in int8[0]["quality"]["reasons"])
    again = percard("bench", "report", out)
    assert again.code == 0 and "decode over caches and contexts" in again.out


@pytest.mark.parametrize(
    ("context", "why"),
    [
        ("8m", "context '8m' is not a number of tokens"),
        ("0", "context '0' is not"),
        ("1k", "do not fit the context of 64"),
    ],
)
def test_contexts_that_cannot_be(checkpoint: Path, text: Path, percard: Run, context: str, why: str) -> None:
    ran = percard("bench", "model", checkpoint, "--specs", "w8a8", "--text", text, "--context", context)
    assert ran.code == 2 and why in ran.error
