"""Decode over several caches at several depths: what is timed, shared, gated and shown; no test asks how fast."""

from __future__ import annotations

import json

import pytest
import torch

from percard.bench import card, contexts, quality, report, report_caches
from percard.bench.engine import load, load_config
from percard.bench.fair import NotComparable
from percard.bench.model import Plan, run
from percard.formats.spec import FormatError

CPU = torch.device("cpu")
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 64, "vocab_size": 300}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
KV = ("bf16", "int8", "int4")


@pytest.fixture
def shape(tmp_path, monkeypatch) -> str:
    """A synthetic shape that is small enough for a test."""
    raw = json.loads((load_config.__globals__["SHAPES"] / "qwen3-0.6b.json").read_text())
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "small.json").write_text(json.dumps(raw | SMALL))
    monkeypatch.setitem(load_config.__globals__, "SHAPES", tmp_path / "shapes")
    return "shape:small"


def test_depths_in_words():
    assert contexts.parse("1k,8k,32k") == (1024, 8192, 32768)
    assert contexts.parse("512,1K,512") == (512, 1024) and contexts.parse("") == ()
    for wrong in ("1.5k", "-4", "k", "8m", "0"):
        with pytest.raises(FormatError, match="is not a number of tokens"):
            contexts.parse(wrong)


def test_every_cache_at_every_depth(shape):
    words: list[str] = []
    plan = Plan(prompt=16, new=2, rounds=2, kv=KV, contexts=(64, 200))
    records = run(shape, ["w8a8"], plan=plan, device=CPU, progress=words.append)
    decodes = [r for r in records if ".tg" in r.case]
    sides = [(r.scheme["spec"], r.scheme["head"], r.scheme["kv_spec"], r.shape["kv_len"]) for r in decodes]
    assert len(set(sides)) == len(sides) and len({r.cell_key for r in records}) == len(records)
    for depth in (64, 200):
        assert {s[2] for s in sides if s[:2] == ("w8a8", "int8-row") and s[3] == depth} >= {"int8", "int4"}
    assert [s[3] for s in sides if s[:2] == ("w8a8", "16bit")] == [64]  # the 16-bit head only beside the first
    assert len([r for r in records if ".pp" in r.case]) == 2  # prompts over the first cache alone
    assert len([w for w in words if "decode steps at depth" in w]) == 2
    for r in decodes:
        pages = -(-(r.shape["kv_len"] + 2) // 64)
        assert r.memory["kv"] == pages * 64 * r.memory["kv_bytes_per_token"]
        assert r.latency_us and r.tokens["vs_fp16"]["same_batch"]["baseline_key"] in {b.cell_key for b in decodes[:2]}
    int8 = next(r for r in decodes if r.scheme["kv_spec"] == "int8")
    assert int8.memory["kv_bytes_per_token"] == 3 * (2 * 64 + 4) and int8.scheme["kv_bits"] == 8
    int4 = next(r for r in decodes if r.scheme["kv_spec"] == "int4")
    assert int4.memory["kv_bytes_per_token"] == 4 * 64 + 2 * (64 + 8) and int4.scheme["notes"][-1].endswith(
        "in layer 0"
    )

    # the table of whole models shows the first cache at the first depth, the other table all of them
    main = report.rows(records)
    assert [row.spec for row in main][1:] == ["w8a8"] and main[1].cache is None and main[1].decode_tok_s_16bit_head
    shown = report_caches.rows(records)
    assert [row[1:3] for row in shown if row[0] == "w8a8" and row[1] in KV[1:]] == [
        (kv, str(depth)) for depth in (64, 200) for kv in KV[1:]
    ]
    assert len(shown) == 2 + 6 and all(row[-1] != "-" for row in shown)
    assert "| w8a8 | int4 | 200 | synthetic |" in report_caches.markdown(shown)
    assert any(words.startswith("w8a8, int4 KV: cache int4: bf16 in layer 0") for words in report.footnotes(records))


def test_the_16_bit_weights_over_caches(shape):
    records = run(shape, plan=Plan(prompt=8, new=2, rounds=2, kv=("bf16", "int8"), contexts=(70,)), device=CPU)
    assert [r.scheme["kv_spec"] for r in records if ".tg" in r.case][1:] == ["int8"]
    (base,) = report.rows(records)
    assert base.cache is None and len(report_caches.rows(records)) == 2


def test_one_cache_at_one_depth_has_no_second_table(shape):
    records = run(shape, ["w8a8"], plan=Plan(prompt=8, new=2, rounds=2), device=CPU)
    assert report_caches.rows(records) == [] and len(report.rows(records)) == 2


def test_sides_with_equal_caches_share_one(shape):
    base = load(shape, device="cpu", max_len=100)
    models = {"baseline": base, "other": load(shape, device="cpu", max_len=100, seed=1), "int8": base.with_kv("int8")}
    kinds = {contexts.kind_of(m) for m in models.values()}
    assert len(kinds) == 2
    found = contexts.time_decode(models, Plan(new=2, rounds=2), 60, CPU)
    assert set(found.samples) == {*models, contexts.AGAIN} and found.floor_pct >= 0
    assert found.kv_bytes["baseline"] == found.kv_bytes["other"] == 64 * base.kv_bytes_per_token
    assert found.kv_bytes["int8"] < found.kv_bytes["baseline"]


def test_caches_that_do_not_fit(shape, monkeypatch):
    model = load(shape, device="cpu")
    plan = Plan(batch=4, new=2, contexts=(200,))
    monkeypatch.setattr(card, "free_bytes", lambda device: 4 * 202 * model.kv_bytes_per_token + 100)
    contexts.fits_memory([model, model], plan, CPU)
    with pytest.raises(NotComparable, match="smaller --context or --batch, or fewer --kv"):
        contexts.fits_memory([model, model.with_kv("int8")], plan, CPU)
    with pytest.raises(FormatError, match="do not fit the context of 512"):
        run(shape, ["w8a8"], plan=Plan(contexts=(512,), new=1), device=CPU)


def test_a_cache_has_a_gate_of_its_own(checkpoint, monkeypatch):
    """Green weights over a red cache are red, and the reasons say which."""
    base = load(checkpoint("qwen2"), device="cpu")
    ids = torch.randint(1, 211, (200,), generator=torch.Generator().manual_seed(3))
    found, (word, reasons) = contexts.judged(base, base, ids, 100)
    assert word == "none" and found.kl == 0
    for name, limit in (("int8", 9.0), ("int4", 0.0)):
        monkeypatch.setitem(quality.CACHES, name, {"kl": limit, "top1": 0.0, "perplexity": 9.0})
    assert contexts.judged(base, base.with_kv("int8"), ids, 100)[1][0] == "green"
    word, reasons = contexts.judged(base, base.with_kv("int4"), ids, 100)[1]
    assert (
        word == "red" and reasons[0].startswith("cache int4: KL") and reasons[-1].startswith("cache int4 against bf16")
    )
    from dataclasses import replace

    from percard.formats.spec import QuantSpec

    monkeypatch.setitem(quality.THRESHOLDS, 8, {"kl": 9.0, "top1": 0.0, "perplexity": 9.0})
    rounded = replace(base, spec=QuantSpec.parse("w8a8"))  # named so: its weights' gate is asked
    assert contexts.judged(base, rounded, ids, 100)[1] == ("green", [])
    assert contexts.judged(base, rounded.with_kv("int8"), ids, 100)[1][0] == "green"
    assert contexts.judged(base, rounded.with_kv("int4"), ids, 100)[1][0] == "red"
