"""Requests served end to end on the small trained model: records, gate, resume, what is refused; mixes and predictions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from percard.bench import load, ratios, report_ratios, report_serve, serve, serve_rows, serve_slot, soundness
from percard.bench import record as records_of
from percard.bench.engine import load_config
from percard.bench.load import Request, mix_of
from percard.bench.serve_speed import Speed
from percard.formats.spec import FormatError

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"
TEXT = TINY / "heldout.txt"


def small(**more: object) -> serve.Plan:
    plan = {"specs": ("w8a8",), "kv": ("bf16", "int8"), "requests": 5, "concurrency": (1, 3), "rounds": 2, "layers": 2}
    plan |= {"bound": ratios.Bound(1000.0, 1000.0), "gate_tokens": 300, "usd_hour": 2.0, "memory": 1e9}
    return serve.Plan(mix_of("chat", 0.02), **{**plan, **more})


@pytest.fixture(autouse=True)
def fixed_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No probe: times of this machine are not what is tested."""
    speed = Speed((torch.float32,), frozenset(), "none", 1e-4, {1: 1e-3, 3: 2e-3}, 0.1)
    monkeypatch.setattr(serve, "measure", lambda *given: speed)


def test_records_of_a_run_and_again(tmp_path: Path) -> None:
    out, said = tmp_path / "serve.jsonl", []
    made = serve.run("shape:qwen3-0.6b", small(layers=1, specs=(), kv=("bf16",), concurrency=(2,), rounds=1), out=None)
    assert [r.quality["gate"] for r in made] == ["synthetic"] and made[0].tokens["tok_s"] > 0
    made = serve.run(TINY, small(), text=TEXT, out=out, progress=said.append)
    assert [(r.scheme["spec"], r.scheme["kv_spec"], r.shape["batch"]) for r in made] == [
        ("fp32", "fp32", 1), ("fp32", "fp32", 3), ("fp32", "int8", 1), ("fp32", "int8", 3),
        ("w8a8", "bf16", 1), ("w8a8", "bf16", 3), ("w8a8", "int8", 1), ("w8a8", "int8", 3),
    ]  # fmt: skip
    assert {r.level for r in made} == {"serve"} and {r.status for r in made} == {"ok"}
    assert made[1].case == "tiny-qwen3.serve.chat*0.02.b3"
    requests = small().mix.draw(5, 0)
    for r in made:
        tokens, shape = r.tokens, r.shape
        assert (shape["isl"], shape["osl"]) == load.means(requests) and shape["load"]["mix"] == "chat*0.02"
        assert len(r.latency_us["samples"]) == 2 and tokens["concurrency"] == shape["batch"]
        walls = [s / 1e6 for s in r.latency_us["samples"]]
        rates = sorted(sum(q.answer for q in requests) / wall for wall in walls)
        assert rates[0] <= tokens["tok_s"] <= rates[1]
        for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
            assert 0 < tokens[name]["p50"] <= tokens[name]["p90"] <= tokens[name]["p99"]
        assert tokens["ttft_s"]["p99"] <= tokens["e2e_s"]["p99"] <= max(walls)
        assert tokens["goodput"] == pytest.approx(tokens["req_s"]) and tokens["req_s"] > 0
        versus = tokens["vs_fp16"]
        assert versus["same_batch"]["batch"] == versus["same_batch"]["batch_fp16"] == shape["batch"]
        assert versus["same_batch"]["baseline_key"] == made[0 if shape["batch"] == 1 else 1].cell_key
        assert versus["same_bound"]["batch"] == 3 and "capped" in versus["same_bound"]["reason"]
        assert r.money["usd_per_mtok"]["out"] > 0 and r.memory["max_concurrency"] == versus["max_fit"]["fits"]
        free = 0.9e9 - r.memory["weights"]
        assert r.memory["max_tokens"] == int(free / r.memory["kv_bytes_per_token"])
        assert r.energy["scope"] == "cpu_package" and r.model["layers_run"] == 2 and r.model["layers"] == 8
    assert [r.quality["gate"] for r in made[:2]] == ["none"] * 2
    assert all(r.quality["gate"] == "green" and r.quality["tokens"] > 200 for r in made[2:]), made[-1].quality
    assert made[0].cpu["noise_floor_pct"] == made[-1].cpu["noise_floor_pct"] >= 0
    assert made[6].memory["kv_bytes_per_token"] < 0.6 * made[4].memory["kv_bytes_per_token"]

    size = out.stat().st_size
    again = serve.run(TINY, small(), text=TEXT, out=out, progress=said.append)
    assert out.stat().st_size == size and [r.cell_key for r in again] == [r.cell_key for r in made]
    assert "2 of 2 cells are in" in said[-1]
    for lines in report_serve.tables(made):
        drawn = report_ratios.markdown(lines)
        assert "FP16" in drawn and "w8a8" in drawn
    assert max(len(line) for line in _console(made).splitlines()) <= 120


def _console(records: list) -> str:
    from rich.console import Console

    screen = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for lines in report_serve.tables(records):
        screen.print(report_ratios.table(lines))
    return screen.export_text()


def test_a_red_gate_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A side that is not sound is not timed, and neither is one whose text says no; the others are."""
    broken = lambda base, model, batch: ["a planted fault"] if model.spec and model.kv.quantised else []  # noqa: E731
    monkeypatch.setattr(soundness, "faults", broken)
    made = serve.run(TINY, small(concurrency=(2,), rounds=1), text=TEXT)
    gates = [(r.scheme["spec"], r.scheme["kv_spec"], r.quality["gate"]) for r in made]
    assert gates == [
        ("fp32", "fp32", "none"), ("fp32", "int8", "green"), ("w8a8", "bf16", "green"), ("w8a8", "int8", "red"),
    ]  # fmt: skip
    assert made[3].tokens is None and made[3].latency_us is None and made[3].money is None
    assert "a planted fault" in made[3].quality["reasons"]
    assert made[2].tokens["tok_s"] > 0
    assert "gate red" in report_ratios.markdown(report_serve.tables(made)[0])


def test_a_cell_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, loaded = tmp_path / "o.jsonl", serve.Session._load

    def refuse(self: serve.Session, spec: object, dtype: torch.dtype) -> object:
        if spec is not None:
            raise RuntimeError("no such luck")
        return loaded(self, spec, dtype)

    plan = small(concurrency=(2,), kv=("bf16",), rounds=1)
    with monkeypatch.context() as patched:
        patched.setattr(serve.Session, "_load", refuse)
        made = serve.run(TINY, plan, text=TEXT, out=out)
    assert [r.status for r in made] == ["ok", "failed"] and "no such luck" in made[1].error["message"]
    assert [r.status for r in serve.run(TINY, plan, text=TEXT, out=out)] == ["ok", "failed"]
    assert [r.status for r in serve.run(TINY, plan, text=TEXT, out=out, retry=True)] == ["ok", "ok"]
    assert len(list(records_of.read(out))) == 3


def test_what_is_refused(tmp_path: Path) -> None:
    shutil.copy(TINY / "model.safetensors", tmp_path)
    raw = json.loads((TINY / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "compressed-tensors"}
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(FormatError, match="is quantised already; give the 16-bit checkpoint"):
        serve.run(tmp_path, small(), text=TEXT)
    with pytest.raises(FormatError, match="give --text FILE"):
        serve.run(TINY, small())
    with pytest.raises(FormatError, match=r"layers=9 is outside 1 \.\. 8"):
        serve.run(TINY, small(layers=9), text=TEXT)
    with pytest.raises(FormatError, match="no request of long fits the context of 512"):
        serve.run(TINY, small(requests=3).__class__(mix_of("long"), requests=3), text=TEXT)
    with pytest.raises(FormatError, match="keeps its first layer bf16, and no more than that one runs"):
        serve.run(TINY, small(kv=("int4",), layers=1), text=TEXT)
    with pytest.raises(FormatError, match="cache spec 'int7' is not one"):
        serve.run(TINY, small(kv=("int7",)), text=TEXT)
    with pytest.raises(FormatError, match="expected DIR or shape:NAME, or --quick"):
        serve.choice(False, None)


def test_dry_run_measures_nothing() -> None:
    said: list[str] = []
    assert serve.run(TINY, small(), text=TEXT, progress=said.append, dry_run=True) == []
    assert "16-bit weights: about" in said[-3] and said[-1].startswith("2 cells to measure")


def test_killed_in_the_middle_and_again(tmp_path: Path) -> None:
    """kill -9 after the first cell: the same command measures the others and no more; the set of cells is that of one run."""
    out = tmp_path / "serve.jsonl"
    asked = [sys.executable, "-m", "percard", "bench", "serve", str(TINY), "--text", str(TEXT), "--out", str(out)]
    asked += ["--specs", "w8a8,w4a16-g64", "--scale", "0.02", "--requests", "4", "--concurrency", "2", "--rounds", "1"]
    asked += ["--layers", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(asked, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 500
    while not (out.exists() and out.stat().st_size) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    first = [r.cell_key for r in records_of.read(out)]
    assert first, "a record was kept"
    done = subprocess.run([*asked, "--json"], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 4), done.stderr
    keys = [json.loads(line)["cell_key"] for line in done.stdout.splitlines()]
    kept = [r.cell_key for r in records_of.read(out)]
    assert len(set(keys)) == 3 and sorted(kept) == sorted(keys), "each cell once"
    assert kept[: len(first)] == first


# ---- mixes and predictions ----------------------------------------------------------------------------------------


def test_mixes_are_seeded(tmp_path: Path) -> None:
    for name in load.named():
        mix = mix_of(name)
        drawn = mix.draw(400, 7)
        assert drawn == mix.draw(400, 7) and drawn[:50] == mix.draw(50, 7) and drawn != mix.draw(400, 8)
        row = load.named()[name]
        for part in ("prompt", "answer"):
            lengths = sorted(getattr(r, part) for r in drawn)
            # the median of 400 draws of a lognormal is off by 1.25 sigma / sqrt(400), four of that at most
            assert abs(lengths[200] / row[part]["median"] - 1) < 4 * 1.25 * row[part]["sigma"] / 20 * 1.3
    shorter = mix_of("chat", 0.1)
    assert shorter.name == "chat*0.1" and load.means(shorter.draw(50, 1))[0] < 200
    table = tmp_path / "mine.jsonl"
    table.write_text('{"prompt": 5, "answer": 2}\n\n{"prompt": 9, "answer": 1}\n')
    assert set(mix_of(str(table)).draw(30, 0)) == {Request(5, 2), Request(9, 1)}
    assert mix_of(str(table)).name == "mine"
    for text, why in (("{}", "mine.jsonl:1"), ('{"prompt": 0, "answer": 1}', "expected lengths"), ("", "no request")):
        table.write_text(text)
        with pytest.raises(FormatError, match=why):
            mix_of(str(table))
    with pytest.raises(FormatError, match="known: chat, code, long"):
        mix_of("essay")
    with pytest.raises(FormatError, match="scale 0"):
        mix_of("chat", 0)


def test_prompts_come_from_the_text() -> None:
    requests = [Request(4, 1), Request(25, 1)]
    text = torch.arange(100, 110)
    found = load.prompts(requests, 512, 3, text)
    assert [len(ids) for ids in found] == [4, 25] and all(set(ids.tolist()) <= set(text.tolist()) for ids in found)
    assert all(
        b == a + 1 or (a, b) == (109, 100) for a, b in zip(found[1].tolist(), found[1].tolist()[1:], strict=False)
    )
    again = load.prompts(requests, 512, 3)
    assert all(torch.equal(a, b) for a, b in zip(again, load.prompts(requests, 512, 3), strict=True))


def test_predicted_seconds_of_waves() -> None:
    speed = Speed((torch.float32,), frozenset(), "", 0.5, {1: 1.0, 3: 2.0}, 0.0)
    requests = [Request(10, 4), Request(2, 1), Request(4, 2), Request(6, 3)]
    # prompts 22 x 0.5; wave of 3: rows 2 until 2 tokens (1 step of 1.5), then 1 until 4 (2 of 1.0); then one alone (2 of 1.0)
    assert speed.serve_s(requests, 3) == pytest.approx(11 + 1.5 + 2.0 + 2.0)
    assert speed.serve_s(requests, 1) == pytest.approx(11 + 3 + 0 + 1 + 2)


def test_quick_is_the_small_model_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TINY.parents[1])
    if torch.cuda.is_available():
        pytest.skip("a card has another choice")
    source, plan, text = serve.choice(True, None, head="int8-row")
    assert load_config(source).name == "tiny-qwen3" and Path(text).is_file() and len(plan.specs) == 2
    assert serve.choice(True, None, kv=("int4",))[1].kv == ("int4",)
    assert serve_rows.walls([]) == []


def test_the_stage_of_a_slot() -> None:
    """What a worker of a slot runs: rows with parts, the last one the cell's own; the 16-bit side is loaded once."""
    made = []
    for cell in serve_slot.cells("cpu"):
        rows = list(serve_slot.cell(**cell.arguments))
        assert ["part" in row for row in rows] == [True] * (len(rows) - 1) + [False]
        made += rows
    assert [(row["scheme"]["spec"], row["scheme"]["kv_spec"]) for row in made] == [
        ("bf16", "bf16"), ("bf16", "int8"), ("w8a8", "bf16"), ("w8a8", "int8"),
    ]  # fmt: skip
    for row in made:
        row = {name: value for name, value in row.items() if name not in ("part", "words")}
        assert records_of.Record(**row, cell_key="k").tokens["tok_s"] > 0 and row["quality"]["gate"] == "synthetic"
