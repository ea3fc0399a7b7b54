"""`bench model` over a ladder of batches: three ratios in every row, roofs, memory, joules and dollars; resume, failures, soundness."""

from __future__ import annotations

import dataclasses
import errno
import json
import os

import pytest
import torch

from percard.bench import model as bench_model
from percard.bench import model_ratios, model_sides, ratios, record, report, report_ratios, soundness
from percard.bench.engine import load, load_config
from percard.bench.fair import Budget, Plan, budget
from percard.bench.model import run
from percard.bench.ratios import Bound
from percard.bench.record import Record, read
from percard.formats.spec import FormatError
from percard.kernels.op import Unsupported

CPU = torch.device("cpu")
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 64, "vocab_size": 300}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
PLAN = Plan(prompt=8, new=4, rounds=2, batches=(1, 2), bound=Bound(tpot_s=60.0), memory_gb=0.005, usd_hour=2.0)


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> str:
    """A synthetic shape that is small enough for a test."""
    raw = json.loads((load_config.__globals__["SHAPES"] / "qwen3-0.6b.json").read_text())
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "small.json").write_text(json.dumps(raw | SMALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(load_config.__globals__, "SHAPES", folder)
        yield "shape:small"


@pytest.fixture(scope="module")
def measured(shape, tmp_path_factory):
    """(file, records, words) of one run."""
    out, words = tmp_path_factory.mktemp("ladder") / "r.jsonl", []
    return out, run(shape, ["w8a8"], plan=PLAN, device=CPU, out=out, progress=words.append), words


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """Names of the sides that are loaded."""
    loaded: list[str] = []
    true = model_sides.load

    def load(source, **options):
        loaded.append(str(options.get("spec")))
        return true(source, **options)

    monkeypatch.setattr(model_sides, "load", load)
    return loaded


def cases(records) -> set[tuple[str, str, str]]:
    return {(r.case, r.scheme["spec"], r.scheme["head"]) for r in records}


def test_each_batch_has_a_prompt_steps_and_the_whole(measured):
    _, records, words = measured
    names = {r.case for r in records}
    assert names == {f"small.model.{what}.b{b}" for b in (1, 2) for what in ("pp8", "tg4.d8", "mix8x4")}
    assert len({r.cell_key for r in records}) == len(records) == 2 * (3 + 3 + 1)  # the head's twin decodes only
    for r in (r for r in records if ".mix" in r.case):
        kin = {
            p: next(x for x in records if f".{p}" in x.case and x.case.endswith(r.case[-3:]) and side(x) == side(r))
            for p in ("pp", "tg")
        }
        first, step = (kin[p].latency_us["samples"] for p in ("pp", "tg"))
        assert r.latency_us["samples"] == pytest.approx([a + 3 * b for a, b in zip(first, step, strict=True)])
        assert r.tokens["tok_s"] == pytest.approx(r.shape["batch"] * 4 / r.latency_us["median"] * 1e6)
        assert r.tokens["tok_s_in"] == pytest.approx(2 * r.tokens["tok_s"]) and set(r.tokens["e2e_s"]) == {
            "p50",
            "p90",
            "p99",
        }
    assert any(line.startswith("4/4 100 %") for line in words)


def side(r: Record) -> tuple[str, str]:
    spec = r.scheme["spec"]
    return "16bit" if spec in ("bf16", "fp32", "fp16") else spec, r.scheme["head"]


def test_every_row_of_the_ladder_has_three_ratios_and_what_they_are_of(measured):
    out, records, _ = measured
    for r in (r for r in records if ".pp" not in r.case):
        versus = r.tokens["vs_fp16"]
        assert set(versus) == {"same_batch", "same_bound", "max_fit"}
        assert versus["same_batch"]["batch"] == versus["same_batch"]["batch_fp16"] == r.shape["batch"]
        assert versus["max_fit"]["batch"] == 2 and versus["max_fit"]["fits"] >= 2 and versus["max_fit"]["ci95"]
        if side(r) != ("w8a8", "16bit"):
            assert versus["same_bound"]["batch"] == 2 and versus["same_bound"]["bound"]["tpot_ms"] == 6e4
        assert r.shape["bound"] == {"ttft_ms": None, "tpot_ms": 6e4, "quantile": 0.99}
    # In the file the rows of the last batch have them, the others say where they stand.
    on_disk = {r.cell_key: r for r in read(out)}
    first = next(r for r in on_disk.values() if ".tg4.d8.b1" in r.case)
    assert first.tokens["vs_fp16"]["max_fit"]["reason"] == "stands in the row of batch 2, the last of the ladder"
    last = next(r for r in on_disk.values() if ".tg4.d8.b2" in r.case and r.scheme["spec"] == "w8a8")
    assert last.tokens["vs_fp16"]["max_fit"]["ratio"] > 0
    assert model_ratios.completed(list(on_disk.values()))[0].cell_key == next(iter(on_disk))


def test_memory_that_is_left_is_the_formula(measured):
    for r in (r for r in measured[1] if ".pp" not in r.case):
        memory = r.memory
        assert memory["free_for_kv"] == int(0.9 * 5e6 - memory["weights"])
        assert memory["max_tokens"] == memory["free_for_kv"] // memory["kv_bytes_per_token"]
        assert memory["max_concurrency"] == memory["free_for_kv"] // (12 * memory["kv_bytes_per_token"])
        assert r.tokens["vs_fp16"]["max_fit"]["fits"] == memory["max_concurrency"]
        if memory["peak"] is not None:
            assert memory["peak"] == memory["weights"] + memory["kv"] + memory["activations"]
    small = next(r for r in measured[1] if side(r) == ("w8a8", "16bit"))
    large = next(r for r in measured[1] if side(r)[0] == "16bit" and ".tg" in r.case)
    assert small.memory["max_concurrency"] > large.memory["max_concurrency"]


def test_roofs_joules_and_dollars(measured):
    for r in measured[1]:
        roof = r.roofline
        if ".mix" in r.case:
            assert roof is None
            continue
        assert roof["bound"] in ("mem", "compute") and roof["pct_of_spec"] is None  # no published CPU
        assert roof["pct_of_roof"] == pytest.approx(100 * max(roof["mbu"], roof["mfu"]))
        seconds = r.latency_us["median"] / 1e6
        assert roof["mbu"] == pytest.approx(roof["bytes"] / seconds / (r.cpu["read_gbs"] * 1e9))
        if ".tg" in r.case:
            assert not r.energy["power_valid"] and r.energy["power_reason"] and r.energy["scope"] == "cpu_package"
            step = r.latency_us["median"] / 1e6
            price = r.money["usd_per_mtok"]["out"]
            assert price == pytest.approx(2.0 / 3600 * step / r.shape["batch"] * 1e6)
    config = load_config("shape:small")
    steps = next(r for r in measured[1] if ".tg4.d8.b2" in r.case)
    linears = 2 * 2 * (3 * config.block_parameters() + config.vocab * config.hidden)
    assert steps.roofline["flops"] == linears + 2 * 4 * config.heads * config.head_dim * 3 * (8 + 2)


def test_a_second_call_measures_only_what_is_missing(shape, measured, tmp_path, counted):
    out = tmp_path / "r.jsonl"
    out.write_bytes(measured[0].read_bytes())
    again = run(shape, ["w8a8"], plan=PLAN, device=CPU, out=out)
    assert counted == [] and out.read_bytes() == measured[0].read_bytes()
    assert cases(again) == cases(measured[1]) and [r.latency_us for r in again] == [r.latency_us for r in measured[1]]
    assert [r.tokens for r in again] == [r.tokens for r in measured[1]]

    wider = run(shape, ["w8a8", "w4a16-g64"], plan=PLAN, device=CPU, out=out)
    assert "w8a8" not in counted and "w4a16-g64" in counted
    rows = list(read(out))[len(measured[1]) :]
    assert {r.scheme["spec"] for r in rows} - {"w4a16-g64"} <= {"bf16", "fp32", "fp16"}, "beside a fresh baseline"
    assert {r.scheme["spec"] for r in wider} >= {"w8a8", "w4a16-g64"}
    assert all(r.tokens["vs_fp16"]["same_batch"]["ratio"] for r in wider)

    counted.clear()
    run(shape, ["w8a8", "w4a16-g64"], plan=dataclasses.replace(PLAN, batches=(1, 2, 3)), device=CPU, out=out)
    assert {r.shape["batch"] for r in list(read(out))[len(measured[1]) + len(rows) :]} == {3}


def test_force_dry_run_and_other_weights(shape, measured, tmp_path, counted):
    out, words = tmp_path / "r.jsonl", []
    assert run(shape, ["w8a8"], plan=PLAN, device=CPU, out=out, progress=words.append, dry_run=True) == []
    assert counted == [] and not out.exists() and words[-1].startswith("4 cells to measure")
    out.write_bytes(measured[0].read_bytes())
    run(shape, ["w8a8"], plan=dataclasses.replace(PLAN, batches=(1,)), device=CPU, out=out, force=True)
    assert len(list(read(out))) == len(measured[1]) + 7


def test_a_side_that_cannot_be_loaded_is_a_row_and_retry_measures_it(shape, tmp_path, monkeypatch):
    true, out = model_sides.load, tmp_path / "r.jsonl"

    def refuse(source, **options):
        if str(options.get("spec")) == "w8a8":
            raise Unsupported("matmul_w8a8: no body serves cpu: too old")
        return true(source, **options)

    plan = dataclasses.replace(PLAN, batches=(1,))
    with monkeypatch.context() as patch:
        patch.setattr(model_sides, "load", refuse)
        records = run(shape, ["w8a8", "w4a16-g64"], plan=plan, device=CPU, out=out)
    lost = [r for r in records if r.scheme["spec"] == "w8a8"]
    assert {r.status for r in lost} == {"refused"} and all(r.tokens is None and r.latency_us is None for r in lost)
    assert "too old" in lost[0].error["message"] and len(lost) == 4
    assert all(r.tokens for r in records if r.scheme["spec"] == "w4a16-g64")
    assert [row.spec for row in report.rows(records)][1:] == ["w4a16-g64"]
    assert any(words.startswith("w8a8: refused") for words in report.footnotes(records))
    settled = run(shape, ["w8a8", "w4a16-g64"], plan=plan, device=CPU, out=out, retry=True)
    assert {r.status for r in settled if r.scheme["spec"] == "w8a8"} == {"refused"}, "refused is settled, failed is not"


def test_a_side_that_fails_while_timed_leaves_the_others(shape, tmp_path, monkeypatch):
    true, out = bench_model.contexts.time_decode, tmp_path / "r.jsonl"

    def flaky(models, *args):
        if any("w8a8" in name for name in models):
            raise RuntimeError("illegal instruction in w8a8")
        return true(models, *args)

    plan = dataclasses.replace(PLAN, batches=(1,))
    with monkeypatch.context() as patch:
        patch.setattr(bench_model.contexts, "time_decode", flaky)
        records = run(shape, ["w8a8", "w4a16-g64"], plan=plan, device=CPU, out=out)
    failed = [r for r in records if r.status == "failed"]
    assert {(r.scheme["spec"], r.case.split(".")[2][:2]) for r in failed} == {("w8a8", "tg"), ("w8a8", "mi")}
    assert all("illegal" in r.error["message"] for r in failed)
    assert all(r.tokens for r in records if r.status == "ok") and len(records) == 3 + 5 + 3
    again = run(shape, ["w8a8", "w4a16-g64"], plan=plan, device=CPU, out=out, retry=True)
    assert {r.status for r in again} == {"ok"} and cases(again) == {
        (r.case, r.scheme["spec"], r.scheme["head"]) for r in records
    }


def test_an_interrupt_keeps_what_was_measured(shape, tmp_path, monkeypatch):
    true, out = bench_model.contexts.time_decode, tmp_path / "r.jsonl"

    def interrupted(models, plan, *args):
        if plan.batch == 2:
            raise KeyboardInterrupt
        return true(models, plan, *args)

    with monkeypatch.context() as patch:
        patch.setattr(bench_model.contexts, "time_decode", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            run(shape, ["w8a8"], plan=PLAN, device=CPU, out=out)
    assert caught.value.__notes__ == [f"3 of 4 cells are in {out} and stay there; the same command goes on"]
    kept = list(read(out))
    assert len(kept) == 7 + 2  # all of batch 1, the prompts of batch 2
    records = run(shape, ["w8a8"], plan=PLAN, device=CPU, out=out)
    assert list(read(out))[: len(kept)] == kept and len(records) == 14


def test_a_full_disk_loses_no_earlier_record(shape, tmp_path, monkeypatch):
    out, true, calls = tmp_path / "r.jsonl", record.os.fsync, iter(range(99))

    def fsync(file):
        if next(calls) >= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        true(file)

    with monkeypatch.context() as patch:
        patch.setattr(record.os, "fsync", fsync)
        with pytest.raises(OSError, match="No space") as caught:
            run(shape, ["w8a8"], plan=PLAN, device=CPU, out=out)
    assert caught.value.filename == str(out) and "the same command goes on" in caught.value.__notes__[0]
    kept = list(read(out))
    assert len(kept) == 5
    assert len(run(shape, ["w8a8"], plan=PLAN, device=CPU, out=out)) == 14 and list(read(out))[:5] == kept


def test_cut_layers_have_no_bound_and_fit_as_the_whole_model(shape):
    plan = dataclasses.replace(PLAN, layers=2, batches=(1,))
    records = run(shape, ["w8a8"], plan=plan, device=CPU)
    steps = [r for r in records if ".tg" in r.case]
    for r in steps:
        versus = r.tokens["vs_fp16"]
        assert versus["same_bound"]["ratio"] is None and versus["same_bound"]["reason"].startswith("2 of 3 layers ran")
        asked = versus["max_fit"]["memory"]
        assert asked["kv_per_token"] == r.memory["kv_bytes_per_token"] * 1.5
        assert r.memory["weights"] < asked["weights"] < 1.5 * r.memory["weights"]
    whole = load(
        "shape:small",
        device="cpu",
        dtype=getattr(torch, {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[steps[0].scheme["spec"]]),
    )
    assert steps[0].tokens["vs_fp16"]["max_fit"]["memory"]["weights"] == whole.nbytes


def test_another_budget_or_bound_is_another_answer_of_the_same_rows(shape, measured, tmp_path, counted):
    records = measured[1]
    tight = model_ratios.completed(records, Bound(tpot_s=1e-9), Budget(1e6, 0.9, 0.0, "given"))
    steps = next(r for r in tight if ".tg" in r.case and r.scheme["spec"] == "w8a8")
    assert steps.tokens["vs_fp16"]["same_bound"]["reason"].startswith("bound not met by FP16 at batch 1: TPOT")
    none = model_ratios.completed(records, None, Budget(4e5, 0.9, 0.0, "given"))
    steps = next(r for r in none if ".tg" in r.case and r.scheme["spec"] == "w8a8")
    assert steps.tokens["vs_fp16"]["max_fit"]["reason"] == ratios.NO_FIT
    out = tmp_path / "r.jsonl"
    out.write_bytes(measured[0].read_bytes())
    again = run(shape, ["w8a8"], plan=dataclasses.replace(PLAN, memory_gb=0.0004), device=CPU, out=out)
    assert counted == [] and again[-1].tokens["vs_fp16"]["max_fit"]["reason"] == ratios.NO_FIT


def test_what_is_no_plan(shape):
    for wrong, why in (
        ({"util": 1.5}, "--util"),
        ({"memory_gb": 0}, "--memory-gb"),
        ({"overhead_gb": -1.0}, "--overhead-gb"),
    ):
        with pytest.raises(FormatError, match=why):
            run(shape, ["w8a8"], plan=dataclasses.replace(PLAN, **wrong), device=CPU)
    with pytest.raises(FormatError, match="batch 0"):
        run(shape, [], plan=Plan(prompt=8, new=2, batches=(0, 1)), device=CPU)
    assert budget(Plan(), CPU).of == "this machine's memory" and "given" in str(budget(PLAN, CPU))


def test_a_step_that_is_another_model_than_its_prompt_is_unsound(shape, monkeypatch):
    base = load(shape, device="cpu")
    assert soundness.faults(base, base, 1) == soundness.faults(base, base.with_kv("int4"), 3) == []
    true = type(base).step
    monkeypatch.setattr(type(base), "step", lambda self, tokens, cache: true(self, tokens, cache).flip(-1))
    assert "is not the same model as its prompt" in soundness.faults(base, base, 2)[0]
    monkeypatch.setattr(type(base), "step", lambda self, tokens, cache: true(self, tokens, cache) * float("nan"))
    assert soundness.faults(base, base, 2) == ["logits of a step at batch 2 are NaN or Inf"]


def test_synthetic_weights_of_another_model_are_unsound_and_not_timed(shape, monkeypatch):
    true = model_sides.load

    def other(source, **options):
        return true(source, **(options | ({"seed": 5, "share": None} if options.get("spec") else {})))

    monkeypatch.setattr(model_sides, "load", other)
    records = run(shape, ["w8a8"], plan=dataclasses.replace(PLAN, batches=(1,), head="16bit"), device=CPU)
    red = [r for r in records if r.scheme["spec"] == "w8a8"]
    assert len(red) == 3 and all(r.quality["gate"] == "red" and r.tokens is None and r.latency_us is None for r in red)
    assert red[0].quality["reasons"][0].startswith("logits are unrelated to those of the 16-bit weights")


def test_tables_carry_batches_bound_and_memory(measured):
    three, ladder = report_ratios.tables(measured[1])
    assert [row[:4] for row in three.rows] == [("w8a8", "16bit", "synthetic", of) for of in ("tg4.d8", "mix8x4")]
    assert all("2/2" in cell for row in three.rows for cell in row[4:])
    assert "8 in and 4 out" in three.title and "bound p99 TPOT <= 60 s" in three.title and "(given)" in three.title
    assert {row[2] for row in ladder.rows} == {"1", "2"} and {row[0] for row in ladder.rows} == {"FP16", "w8a8"}
    assert any(note.startswith("no joules: ") for note in ladder.notes)
    assert "| w8a8 | 16bit | synthetic | tg4.d8 |" in report_ratios.markdown(three)
    assert report_ratios.table(three).row_count == 2
    old = [r for r in measured[1] if ".pp" in r.case]
    assert report_ratios.tables(old) == []
    none = model_ratios.completed(measured[1], None, Budget(4e5, 0.9, 0.0, "given"))
    assert "[1] baseline does not fit" in report_ratios.three(none).notes


def test_the_baseline_fits_as_the_float_type_that_holds_least(measured):
    """A CPU's baseline may step in fp32 at batch 1 and in fp16 at batch 2."""
    steps = [r for r in measured[1] if ".tg" in r.case and side(r)[0] == "16bit"]
    least = min(r.tokens["vs_fp16"]["max_fit"]["memory"]["weights"] for r in steps)
    versus = steps[0].tokens["vs_fp16"]["max_fit"]
    twice = dataclasses.replace(
        steps[0],
        tokens=steps[0].tokens
        | {
            "vs_fp16": steps[0].tokens["vs_fp16"]
            | {"max_fit": versus | {"memory": versus["memory"] | {"weights": 9 * least}}}
        },
    )
    found = model_ratios.completed([twice, *(r for r in measured[1] if r is not steps[0])])
    assert {r.tokens["vs_fp16"]["max_fit"]["fits_fp16"] for r in found if ".tg" in r.case} == {versus["fits_fp16"]}
