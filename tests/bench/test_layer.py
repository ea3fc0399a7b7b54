"""One layer: what is measured and recorded, shards, resume, and whether layers add up to a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from percard.bench import cells, layer, layer_check, record
from percard.bench.engine import config as config_module
from percard.bench.engine.config import load_config
from percard.bench.layer import Plan, rank_of
from percard.bench.record import Record
from percard.cli import run as cli
from percard.formats.spec import FormatError, QuantSpec

CPU = torch.device("cpu")
SMALL = Plan((8,), (8,), (1, 2), ("bf16", "int8"), rounds=2, copies=2)


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A built-in shape small enough for a test."""
    raw = json.loads((config_module.SHAPES / "qwen3-0.6b.json").read_text())
    raw |= {"hidden_size": 128, "head_dim": 64, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 211}
    raw |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "small.json").write_text(json.dumps(raw))
    monkeypatch.setattr(config_module, "SHAPES", tmp_path / "shapes")


@pytest.mark.usefixtures("shapes")
def test_each_side_of_each_cell_is_a_record(tmp_path: Path) -> None:
    out = tmp_path / "l.jsonl"
    rows = layer.run(
        "shape:small", ["w8a8", "w4a16-g64"], plan=SMALL, device=CPU, out=out, command="percard bench layer"
    )
    cases = [
        f"small.{c}"
        for c in (
            "layer.pp8.b1",
            "layer.pp8.b2",
            "attention.pp8.b1",
            "attention.pp8.b2",
            "layer.tg.d8.b1",
            "layer.tg.d8.b2",
            "head.b1",
            "head.b2",
        )
    ]
    assert list(dict.fromkeys(row.case for row in rows)) == cases
    by_case = {case: [row for row in rows if row.case == case] for case in cases}
    assert [len(by_case[case]) for case in cases] == [3, 3, 1, 1, 5, 5, 2, 2]
    assert all(row.level == "layer" and row.latency_us and len(row.latency_us["samples"]) == 2 for row in rows)
    assert all((row.against is None) == (row.scheme["spec"] in ("bf16", "fp16", "fp32")) for row in rows)
    decode = by_case["small.layer.tg.d8.b2"]
    assert [row.scheme["kv_spec"] for row in decode][2::2] == ["int8", "int8"]
    config = load_config("shape:small")
    w8a8 = by_case["small.layer.pp8.b2"][1]
    assert w8a8.roofline and w8a8.roofline["flops"] == 2 * 16 * config.block_parameters() + 4 * 2 * 36 * config.q_size
    assert config.block_parameters() < w8a8.memory["weights"] < 1.2 * config.block_parameters()  # type: ignore[index]
    assert "matmul_w8a8.cpu" in w8a8.body["impl"] and w8a8.clock["copies"] == 2
    assert [row.scheme["head"] for row in by_case["small.head.b1"]] == ["16bit", "int8-row"]
    # again: nothing is measured, the same rows come
    said: list[str] = []
    again = layer.run("small", ["w8a8", "w4a16-g64"], plan=SMALL, device=CPU, out=out, progress=said.append)
    assert [row.run_id for row in again] == [row.run_id for row in rows] == [row.run_id for row in record.read(out)]
    assert "8 of 8 cells are in" in said[0]


@pytest.mark.usefixtures("shapes")
def test_a_dry_run_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "probe", lambda *a, **k: pytest.fail("measured"))
    said: list[str] = []
    assert layer.run("small", ["w8a8"], plan=SMALL, device=CPU, dry_run=True, progress=said.append) == []
    assert len(said) == 9 and said[0].startswith("small.layer.pp8.b1: about")


@pytest.mark.usefixtures("shapes")
def test_a_layer_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **how: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(layer, "one_block", broken)
    rows = layer.run("small", ["w8a8"], plan=Plan((8,), (8,), (1,), copies=1, rounds=1), device=CPU)
    failed = [row.case for row in rows if row.status == "failed"]
    assert failed == ["small.layer.pp8.b1", "small.attention.pp8.b1", "small.layer.tg.d8.b1"]
    assert rows[3].status == "ok" and rows[0].error and rows[0].error["message"] == "planted"


def test_a_rank_holds_its_share() -> None:
    whole = load_config("shape:qwen3-8b")
    part = rank_of(whole, "4:0", [QuantSpec.parse("w4a16-g128")])
    assert (part.heads, part.kv_heads, part.ffn, part.hidden) == (8, 2, 3072, 4096)
    assert 4 * part.block_parameters() == whole.block_parameters()
    copied = rank_of(whole, "16:15")
    assert (copied.heads, copied.kv_heads) == (2, 1)  # 8 key heads: each is on two of sixteen cards
    moe = rank_of(load_config("shape:qwen3-235b-a22b"), "4:1", [QuantSpec.parse("w4a16-g128")])
    assert moe.experts is not None and moe.experts.ffn == 384


@pytest.mark.parametrize(
    ("shape", "shard", "spec", "words"),
    [
        ("qwen3-8b", "4", "w8a8", "expected TP:RANK"),
        ("qwen3-8b", "4:4", "w8a8", "expected TP:RANK"),
        ("qwen3-8b", "0:0", "w8a8", "expected TP:RANK"),
        ("qwen3-8b", "3:0", "w8a8", "32 heads do not divide by tp 3"),
        ("qwen3-235b-a22b", "8:0", "w4a16-g128", "192 is not a multiple of 128"),
        ("qwen3-30b-a3b", "4:0", "w4a16-g128", "192 is not a multiple of 128"),
    ],
)
def test_a_shard_that_cannot_be_is_refused(shape: str, shard: str, spec: str, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        layer.run(f"shape:{shape}", [spec], plan=Plan(shard=shard), device=CPU)


def test_bad_input_is_told_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "run", lambda *a, **k: pytest.fail("started"))
    for arguments, words in (
        (("no-such", ["w8a8"]), "no-such"),
        (("qwen3-0.6b", ["w9a9"]), "w9a9"),
    ):
        with pytest.raises(FormatError, match=words):
            layer.run(*arguments, device=CPU)
    with pytest.raises(FormatError, match="do not fit the context"):
        layer.run("qwen3-0.6b", ["w8a8"], plan=Plan(depths=(1 << 20,)), device=CPU)
    with pytest.raises(FormatError, match="cache spec 'int3'"):
        layer.run("qwen3-0.6b", ["w8a8"], plan=Plan(kv=("int3",)), device=CPU)


def planted(
    level: str, case: str, us: float, spec: str, head: str = "16bit", dtype: str = "bf16", **more: object
) -> Record:
    shape: dict = {"batch": 1}
    if ".pp" in case:
        shape["isl"] = 512
    elif "head" not in case:
        shape["kv_len"] = 512
    return Record(
        cell_key=case + spec, level=level, case=f"m.{case}", shape=shape, latency_us={"median": us},
        model={"id": "m", "layers_run": 28, "layers": 28}, body={"dtype": dtype},
        scheme={"spec": spec, "head": head, "kv_spec": "bf16"}, **more,
    )  # fmt: skip


LAYERS = [
    planted("layer", "layer.pp512.b1", 1000, "w8a8"),
    planted("layer", "layer.tg.d512.b1", 100, "w8a8"),
    planted("layer", "layer.tg.d512.b1", 300, "bf16"),
    planted("layer", "head.b1", 2000, "w8a8", "int8-row"),
    planted("layer", "head.b1", 4000, "bf16"),
]


def test_layers_and_head_are_added_and_the_rest_is_flagged() -> None:
    models = [
        planted("model", "model.pp512.b1", 32000, "w8a8", "int8-row"),
        planted("model", "model.tg32.d512.b1", 6000, "w8a8", "int8-row"),
        planted("model", "model.tg32.d512.b1", 6800, "w8a8", "16bit"),
        planted("model", "model.tg32.d512.b1", 12000, "bf16"),
    ]
    found = layer_check.sums(LAYERS, models)
    assert [round(one.total * 1e6) for one in found] == [30000, 4800, 6800, 12400]
    assert [one.flagged for one in found] == [False, True, False, False]
    assert found[1].residual == pytest.approx(0.2)
    words = list(layer_check.lines(found))
    assert "28 x 0.100 + head 2.00 = 4.80 ms, residual +20.0 %  FLAG above 15 %".replace(" %", "%") in words[1]


def test_what_has_no_parts_says_why() -> None:
    models = [
        planted("model", "model.tg32.d512.b1", 6000, "w4a8-g64"),
        planted("model", "model.tg32.d512.b1", 6000, "fp32", dtype="fp32"),
    ]
    found = layer_check.sums(LAYERS, models)
    assert [one.reason for one in found] == [
        "no layer record of w4a8-g64",
        "the model's 16-bit side is fp32, the layer's is bf16",
    ]
    other = planted("model", "model.tg32.d512.b1", 6000, "w8a8")
    deep = replace(other, shape={"batch": 1, "kv_len": 4096})
    assert "no layer record at a depth of 4096" in layer_check.sums(LAYERS, [deep])[0].reason
    no_head = [row for row in LAYERS if "head" not in row.case]
    assert "no record of a 16bit head" in layer_check.sums(no_head, [other])[0].reason
    assert not any(one.flagged for one in found)


@pytest.mark.usefixtures("shapes")
def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, models = tmp_path / "l.jsonl", tmp_path / "m.jsonl"
    row = planted("model", "model.tg4.d64.b1", 1e9, "w8a8", "int8-row")
    record.append(models, replace(row, model={"id": "small", "layers_run": 3}, shape={"batch": 1, "kv_len": 64}))
    told = ["bench", "layer", "small", "--specs", "w8a8", "--quick", "--out", str(out), "--model-records", str(models)]
    assert cli(told) == 0
    printed = capsys.readouterr().out
    assert "layer.tg.d64.b1" in printed and "FLAG above 15%" in printed
    assert cli(["bench", "layer", "small", "--specs", "w8a8", "--shard", "x"]) == 2
