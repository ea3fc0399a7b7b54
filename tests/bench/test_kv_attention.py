"""`bench attention`: what is planned, caches that hold what was drawn, rivals that do the same, the gate before the clock, rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from percard.bench import attention, attention_rivals, ops, record, slot, slot_report
from percard.bench.attention import Problem
from percard.bench.attention_rivals import Rows
from percard.formats import kvcache
from percard.formats.spec import FormatError
from percard.kernels.gather_dequantize import gather_dequantize

CPU = torch.device("cpu")
SPECS = ("bf16", "int8", "k8v4", "int4")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rows in milliseconds: these tests look at what a row says, not at how fast anything is."""
    monkeypatch.setattr(ops, "_SAMPLE_S", 1e-4)
    monkeypatch.setattr(attention_rivals, "_MOST_BYTES", 1 << 17)
    monkeypatch.setattr(attention, "GATE", 100)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(op: str, kv: str = "int8", context: int = 100, batch: int = 2, tokens: int = 1) -> Problem:
    return Problem(op, kv, 4, 2, 32, context, batch, tokens)


def row_of(p: Problem, **more: Any) -> dict[str, Any]:
    (row,) = attention.cell(**vars(p), device="cpu", rounds=2, roof={"copy_gbs": 10.0}, **more)
    row.pop("words", None)
    record.Record(cell_key="x", **p.sections(), **row)  # every key is one that a record knows
    return row


def test_plan() -> None:
    found = attention.plan(["attention_decode", "kv_append"], SPECS, [8192, 32768], [1, 8], [(32, 8, 128)])
    assert len(found) == 2 * 4 * 2 * 2 and len({p.name for p in found}) == len(found)
    assert found[0].name == "attention_decode.32-8-128.s8192.b1.n1.bf16"
    assert attention.heads_of(["qwen3-8b", "64/8/128"]) == [(32, 8, 128), (64, 8, 128)]
    with pytest.raises(FormatError, match="expected Hq/Hkv/D"):
        attention.heads_of(["8"])


@pytest.mark.parametrize("kv", SPECS)
def test_pools_hold_the_rows_in_their_places(kv: str) -> None:
    """The cache unpacked is what was drawn, as its spec rounds it, for each sequence; pages lie in random order."""
    rows = Rows(problem("gather_dequantize", kv, context=150, batch=3), CPU, 1)
    pages, table = rows.pool()
    assert table.flatten().tolist() != sorted(table.flatten().tolist())
    lengths, starts = rows.lengths(), torch.arange(4, dtype=torch.int32) * 150
    found = gather_dequantize(pages, table, lengths, starts, 450, torch.float32, size=32, impl="reference")
    for got, want, bits in zip(found, rows.dense(torch.float32, heads_first=False), _bits(kv), strict=True):
        want = want.flatten(0, 1)
        if kv != "bf16":
            data, scale, offset = kvcache.quantize(want, bits)
            words = scale[..., None] if offset is None else torch.stack((scale, offset), -1)
            want = kvcache.dequantize(data, words, bits, 32)
        assert torch.equal(got, want)


def _bits(kv: str) -> tuple[int, int]:
    spec = kvcache.KVSpec.parse(kv)
    return spec.k_bits, spec.v_bits


def test_bytes_per_token_are_those_of_the_brief() -> None:
    """Measured from the tensors that were allocated, at D = 128 and 8 key heads."""
    for kv, held in (("bf16", 4096), ("int8", 2080), ("k8v4", 1600), ("int4", 1088), ("int4-sym", 1056)):
        pages, _ = Rows(replace(problem("attention_decode", kv), heads=8, kv_heads=8, size=128), CPU, 0).pool()
        assert pages.nbytes == held * pages.k.shape[0] * pages.page
        assert attention.work(problem("attention_decode", kv), held).bytes == 200 * held + 2 * 2 * 4 * 32 * 2


@pytest.mark.parametrize("tokens", [1, 5])
def test_the_folded_rival_is_attention(tokens: int) -> None:
    """Query heads as rows of one product give what torch gives with enable_gqa, bottom-right causal."""
    rows = Rows(problem("attention_decode", tokens=tokens), CPU, 2)
    calls = attention_rivals._sdpa(rows, torch.float32)
    got = attention._answer(rows, calls[0]()).view(2, tokens, 4, 32)
    k, v = rows.dense(torch.float32)
    q = rows.q.view(2, tokens, 4, 32).transpose(1, 2).float()
    mask = torch.arange(100) <= (100 - tokens + torch.arange(tokens))[:, None]
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(got, want, atol=1e-5)
    assert attention.apart(got, want)[0] < 1e-5 < attention.apart(got * 1.1, want)[0]


@pytest.mark.parametrize(
    ("op", "kv"),
    [
        ("attention_decode", "bf16"), ("attention_decode", "int8"), ("gather_dequantize", "bf16"),
        ("gather_dequantize", "int4"), ("kv_append", "bf16"), ("kv_append", "int8"), ("attention_prefill", "int8"),
    ],
)  # fmt: skip
def test_a_row_says_everything(op: str, kv: str) -> None:
    row = row_of(problem(op, kv, tokens=5 if op == "attention_prefill" else 1))
    assert row["body"]["impl"] == "cpu" and row["quality"]["gate"] == "synthetic"
    assert {r["status"] for r in row["against"]} == {"ok"}
    assert all(r["ratio"] > 0 and r["ci95"][0] <= r["ratio"] <= r["ci95"][1] for r in row["against"])
    assert row["against"] == sorted(row["against"], key=lambda r: r["median"])
    assert row["roofline"]["pct_of_roof"] > 0 and row["clock"]["copies"] >= 1
    assert row["memory"]["kv_bytes_per_token"] == problem(op, kv).spec.bytes_per_token(32, 2)
    if op == "attention_decode":
        assert row["quality"]["reasons"][1].startswith("rel L1 0.0")
        assert {r["impl"] for r in row["against"]} == {"torch bfloat16", "torch float32"}


def test_a_body_that_refuses_is_a_row_with_its_reason() -> None:
    row = row_of(problem("gather_dequantize"), impl="triton")
    assert row["status"] == "refused" and "needs a CUDA card" in row["error"]["message"] and "latency_us" not in row


def test_rounded_caches_are_told_apart_from_the_unquantised() -> None:
    """What the reference says is enough to see it: int4 is further off than int8, int8 further than bf16."""
    off = []
    for kv in ("bf16", "int8", "int4"):
        reasons = row_of(problem("attention_decode", kv), impl="reference")["quality"]["reasons"]
        off.append(float(reasons[1].split()[2].rstrip(",")))
    assert off[0] < off[1] < off[2] < 0.3


def test_a_wrong_body_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    body = gather_dequantize.body("cpu")
    run = gather_dequantize.run_of(body)
    monkeypatch.setitem(gather_dequantize._runs, "cpu", lambda *flat: tuple(t * 1.01 for t in run(*flat)))
    row = row_of(problem("gather_dequantize"))
    assert row["status"] == "failed" and row["quality"]["gate"] == "red" and "latency_us" not in row
    assert "elements are off" in row["error"]["message"]


def test_a_rival_that_does_something_else_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    true = attention_rivals._sdpa

    def off(rows: Rows, dtype: torch.dtype, backend: Any = None) -> Any:
        calls = true(rows, dtype, backend)
        return calls if dtype == torch.bfloat16 else [lambda: calls[0]() * 1.2]

    monkeypatch.setattr(attention_rivals, "_sdpa", off)
    against = row_of(problem("attention_decode", "bf16"))["against"]
    assert {r["impl"]: r["status"] for r in against} == {"torch bfloat16": "ok", "torch float32": "suspect"}
    assert "off by 20" in next(r["reason"] for r in against if r["status"] == "suspect")


def test_run_writes_records_and_a_table(tmp_path: Path) -> None:
    out, said = tmp_path / "a.jsonl", []
    todo = attention.plan(["gather_dequantize"], ["int8"], [100], [1], [(4, 2, 32)])
    found = attention.run(todo, rounds=2, out=out, progress=said.append, device=CPU)
    assert [r.case for r in record.read(out)] == [found[0].case] == ["gather_dequantize.4-2-32.s100.b1.n1.int8"]
    assert said[-1].startswith("1/1 100 %  gather_dequantize") and "GB/s" in said[-1]
    text = slot_report.of_records(found)
    assert "## Over a paged cache" in text and "| gather_dequantize | 4/2/32 | 100 | 1 | int8 |" in text
    assert "Linears" not in text


def test_what_is_installed_beside_torch_is_named_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of a card: torch's kernels, and the two libraries with the reason when they are not there."""
    monkeypatch.setattr(attention_rivals.importlib.util, "find_spec", lambda name: None)
    found, absent = attention_rivals._card_rivals(Rows(problem("attention_decode"), CPU, 0))
    assert list(found) == ["torch flash", "torch cudnn", "torch efficient"]
    assert [(a["impl"], a["reason"]) for a in absent] == [
        ("FlashAttention", "flash_attn is not installed"),
        ("FlashInfer", "flashinfer is not installed"),
    ]


class Listing:
    """Stands for a Run: keeps the cells that a stage makes."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder, self.made = device, folder, []  # type: ignore[var-annotated]

    def cells(self, cells: list[Any], **how: Any) -> None:
        self.made += cells


def test_a_slot_times_decode_in_every_spec_and_depth(tmp_path: Path) -> None:
    run = Listing("cuda", tmp_path)
    slot.time_attention(run)  # type: ignore[arg-type]
    names = [cell.name for cell in run.made]
    assert len(set(names)) == len(names) == len({json.dumps(cell.identity, sort_keys=True) for cell in run.made})
    decode = {(c.arguments["kv"], c.arguments["context"]) for c in run.made if c.arguments["op"] == "attention_decode"}
    assert decode == {(kv, s) for kv in SPECS for s in (8192, 32768, 131072)}
    assert {c.arguments["op"] for c in run.made} == {o for o in attention.OPERATIONS if o in ops.OPS}
    assert names[0] == "attention_decode.32-8-128.s32768.b1.n1.int8"
    tiny = Listing("cpu", tmp_path)
    slot.time_attention(tiny)  # type: ignore[arg-type]
    assert 0 < len(tiny.made) <= 10 and all(c.arguments["context"] <= 200 for c in tiny.made)
