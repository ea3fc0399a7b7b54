"""`percard bench slot`, `bench ops`, `attention` and `distill` at the command line: what they refuse, and with which code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from percard import cli


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["slot"], "--out"),
        (["slot", "--out", "x", "--minutes", "0"], "--minutes 0 is outside"),
        (["slot", "--out", "x", "--device", "tpu"], "known: cuda, cpu"),
        (["slot", "--out", "x", "--retry", "all"], "the one choice is failed"),
        (["ops", "--models", "nope"], "known: qwen3-0.6b"),
        (["ops", "--specs", "w9"], "unknown spec 'w9'"),
        (["ops", "--tokens", "one"], "whole numbers"),
        (["attention", "--kv", "int3"], "cache spec 'int3' is not one; known: bf16"),
        (["attention", "--context", "8k"], "--context 8k: expected whole numbers"),
        (["attention", "--heads", "32/8"], "expected Hq/Hkv/D such as 32/8/128, or one of qwen3-0.6b"),
        (["attention", "--heads", "32/5/128"], "heads 32/5/128: expected query heads, a divisor of them"),
        (["attention", "--op", "matmul_w8a8"], "no op 'matmul_w8a8' over a cache; known: attention_decode"),
        (["distill", "--loss", "kl"], "no divergence 'kl'; known: fkl, rkl, jsd, topk"),
        (["distill", "--tokens", "many"], "--tokens many: expected whole numbers"),
        (["ops", "--tokens", "3"], "no case of qwen3-0.6b has 3 tokens"),
    ],
)
def test_bad_input(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["bench", *arguments]) == 2
    err = capfd.readouterr().err.strip()
    assert words in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_slot_without_a_card(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "slot", "--out", str(tmp_path / "x")]) == 2
    assert "--device cpu" in capfd.readouterr().err
