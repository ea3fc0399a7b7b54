"""The ladder: pairs, gate before speed, costs, who passes and why others do not; what is refused before anything runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.bench import ladder, quality, record, task
from percard.bench.engine import Model
from percard.bench.ladder import Pair, Plan, Rung
from percard.bench.ladder_verdicts import drifts, short_texts, verdicts
from percard.bench.record import Record
from percard.bench.task import Item, Task
from percard.formats.spec import FormatError, QuantSpec

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"
CPU = torch.device("cpu")
SHORT = Plan(specs=("w8a8",), batch=2, rounds=2, answers=2, answer_limit=3)
pytestmark = pytest.mark.usefixtures("one_thread")


def questions() -> Task:
    words = [(" is ", "not"), ("def f(x):\n    ", "return x"), ("for i ", "in"), ("self.", "x")]
    spoken = [Item(i, "class A:\n" + p, e, max_new=3) for i, (p, e) in enumerate(words)]
    return Task("t", (*spoken, Item(9, "if x is ", "None", "choice", ("None", "for"))))


def test_sixteen_bits_come_first_and_once() -> None:
    found = ladder.pairs(Plan(specs=("w8a8", "bf16", "w8a8"), kv=("int8", "bf16")))
    assert found[0].plain and found == [
        Pair("bf16", "bf16"),
        Pair("w8a8", "int8"),
        Pair("w8a8", "bf16"),
        Pair("bf16", "int8"),
    ]
    assert ladder.pairs(Plan(specs=("w8a8",)))[0].plain
    assert ladder.pairs(Plan(specs=("w8a8",), kv=("calibrated",)))[1] == Pair("w8a8", "calibrated")
    with pytest.raises(FormatError):
        ladder.pairs(Plan(specs=("w9a1",)))
    with pytest.raises(FormatError):
        ladder.pairs(Plan(kv=("int9",)))


# ---- the verdict -----------------------------------------------------------------------------------------------------


def row(
    spec: str, score: float, usd: float | None, rate: float, gate: str = "green", model: str = "m", **more: Any
) -> Record:
    n = 100
    ci95 = list(task.wilson(round(score * n), n))
    made: dict[str, Any] = {
        "cell_key": f"{model}{spec}",
        "level": "model",
        "case": f"{model}.ladder.t.b1",
        "scheme": {"spec": spec, "kv_spec": "bf16"},
        "model": {"id": model},
        "quality": {"gate": gate, "reasons": ["KL 0.2"], "task": {"name": "t", "score": score, "n": n, "ci95": ci95}},
    }
    if gate != "red":
        made["tokens"] = {"tok_s_per_card": rate}
        made["money"] = None if usd is None else {"usd_per_mtok": {"total": usd}}
    return Record(**made | more)


def test_the_cheapest_that_passes_is_first() -> None:
    failed: dict[str, Any] = {"status": "oom", "error": {"type": "OOM", "message": "8 GiB", "stage": "x"}}
    rows = [
        row("bf16", 0.80, 4.0, 10, "none", "big"),
        row("w4a16-g128", 0.79, 1.0, 40, model="big"),
        row("w8a8", 0.80, 2.0, 20, model="big"),
        row("bf16", 0.70, 0.5, 80, "none", "small"),
        row("w8a8", 0.60, None, 0, "red", "small"),
        row("w3a16-g64", 0.80, 0.1, 400, "none", "big"),
        row("w4a8", 0.0, None, 0, model="big", quality=None, tokens=None, **failed),
    ]
    found, least = verdicts(rows, Plan(drop=0.01))
    assert least == pytest.approx(0.79)
    names = [(v.row.model["id"], v.row.scheme["spec"]) for v in found]
    assert names[:3] == [("big", "w4a16-g128"), ("big", "w8a8"), ("big", "bf16")]
    why = {name: v.why for name, v in zip(names, found, strict=True)}
    assert [why[name] for name in names[:3]] == ["", "", ""]
    assert why["small", "bf16"] == "score below 79.0%: 9 of 100 questions short"
    assert why["small", "w8a8"] == "gate red: KL 0.2" and why["big", "w4a8"] == "oom: 8 GiB"
    assert "KL 0.2" in why["big", "w3a16-g64"]  # nothing gates 3-bit weights: never a pass
    assert found[-1].row.scheme["spec"] == "w4a8"


def test_the_drop_is_of_the_best_and_a_hundredth_when_not_said() -> None:
    assert Plan().allowed(0.5) == pytest.approx(0.495) and Plan(drop=0.0).allowed(0.5) == 0.5
    rows = [row("bf16", 0.80, None, 1, "none"), row("w8a8", 0.79, None, 2), row("bf16", 0.50, None, 9, "none", "s")]
    found, least = verdicts(rows, Plan())
    assert least == pytest.approx(0.792) and [bool(v.why) for v in found] == [False, True, True]
    assert "1 of 100 questions short, inside its interval" in found[1].why
    assert found[2].why.endswith("30 of 100 questions short")
    assert [v.why for v in verdicts(rows, Plan(drop=0.4))[0]] == ["", "", ""]


def test_without_a_price_the_fastest_is_first() -> None:
    rows = [row("bf16", 0.8, None, 10, "none"), row("w8a8", 0.8, None, 20), row("w4a16-g64", 0.8, None, 15)]
    assert [v.row.scheme["spec"] for v in verdicts(rows, Plan())[0]] == ["w8a8", "w4a16-g64", "bf16"]


def test_a_machine_that_drifted_is_told() -> None:
    def timed(model: str, rate: float, ratio: float | None) -> Record:
        return row(
            "w8a8", 0.8, None, 1, model=model, tokens={"tok_s": rate, "vs_fp16": {"same_batch": {"ratio": ratio}}}
        )

    steady = [timed("m", 100, 1.0), timed("m", 204, 2.0), timed("m", 999, None), row("w4a8", 0.8, None, 0, "red")]
    assert not drifts(steady)
    (words,) = drifts([*steady, timed("n", 100, 1.0), timed("n", 240, 2.0)])
    assert words.startswith("n: 16 bits ran at 100 to 120 tok/s")


def test_few_tokens_are_told() -> None:
    def scored(tokens: int) -> Record:
        made = row("w8a8", 0.8, None, 1)
        return replace(made, quality={**made.quality, "tokens": tokens})

    assert not short_texts([scored(2000), row("bf16", 0.8, None, 1)]) and not short_texts([])
    assert "are of 300 tokens only" in short_texts([scored(5000), scored(300)])[0]


def test_costs_of_tokens() -> None:
    tokens = {"tok_s": 100.0, "tok_s_in": 4000.0}  # 4 x 100 in, 4 x 50 out: 0.1 s for prompts, 2 s in all
    found = ladder.priced(100, 50, 4, tokens, 3.6)
    assert found is not None and found["usd_per_card_hour"] == 3.6
    per = found["usd_per_mtok"]  # 0.001 dollars a second
    assert per["in"] == pytest.approx(0.1 * 0.001 / 400 * 1e6)
    assert per["out"] == pytest.approx(1.9 * 0.001 / 200 * 1e6)
    assert per["total"] == pytest.approx(2.0 * 0.001 / 600 * 1e6)
    assert ladder.priced(100, 50, 4, tokens, None) is None


# ---- the float type --------------------------------------------------------------------------------------------------


def test_the_float_type_that_answers_soonest(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that the waves move: half precision is hopeless, bf16 has slow prompts and fast steps."""
    prompt = {torch.float32: 1.0, torch.bfloat16: 2.0, torch.float16: 90.0}
    step = {torch.float32: 0.5, torch.bfloat16: 0.1, torch.float16: 0.1}
    clock, waves = [0.0], []

    def wave(model: Model, batch: int, isl: int, osl: int) -> None:
        waves.append((model.dtype, model.mv))
        clock[0] += prompt[model.dtype] + (osl - 1) * step[model.dtype] * (0.5 if model.mv else 1.0)

    monkeypatch.setattr(ladder, "_wave", wave)
    monkeypatch.setattr(ladder.time, "perf_counter", lambda: clock[0])
    model = Rung(TINY, questions(), SHORT, CPU).load
    assert model(Pair("bf16", "bf16")).dtype == torch.float32  # short answers
    assert waves.count((torch.float16, False)) == 1
    base = ladder.load(TINY, device=CPU)
    assert ladder.soonest(base, 2, 10, 100).dtype == torch.bfloat16
    assert ladder.soonest(base, 1, 10, 100).mv and not ladder.soonest(base, 2, 10, 100).mv


# ---- one model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rung() -> Rung:
    made = Rung(TINY, questions(), SHORT, CPU)
    made.__dict__["reference"] = ladder.load(TINY, dtype=torch.float32, device=CPU)
    return made


def w8a8(rung: Rung) -> Model:
    return ladder.load(rung.folder, spec=QuantSpec.parse("w8a8"), dtype=torch.float32, device=CPU, head="int8-row")


def test_a_red_pair_has_no_speed(rung: Rung, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: one block's down projection has the wrong sign."""
    broken = w8a8(rung)
    down = broken.weights.blocks[0].down
    wrong = replace(broken.weights.blocks[0], down=replace(down, scale=-down.scale))
    planted = replace(broken, weights=replace(broken.weights, blocks=(wrong, *broken.weights.blocks[1:])))
    monkeypatch.setattr(Rung, "load", lambda self, pair: planted)
    monkeypatch.setattr(ladder, "time_waves", lambda *args: pytest.fail("a red pair was timed"))
    about = {"level": "model", "case": "c", "scheme": {"spec": "w8a8", "kv_spec": "bf16"}, "shape": {}}
    made = ladder._measure(rung, Pair("w8a8", "bf16"), "k", "own", about, 1.0)
    assert made.quality["gate"] == "red" and made.tokens is None and made.latency_us is None and made.money is None
    assert any("KL" in reason for reason in made.quality["reasons"])


def test_score_and_length_decide_for_large_models_only(rung: Rung, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = rung.own_score
    worse = replace(scored, right=(False,) * len(scored.right))
    monkeypatch.setitem(rung.__dict__, "own_score", replace(scored, right=(True,) * len(scored.right)))
    monkeypatch.setitem(rung.__dict__, "own_lengths", [2, 2])
    monkeypatch.setattr(task, "score", lambda *args: worse)
    monkeypatch.setattr(Rung, "lengths", lambda self, model: [3, 3])
    model = w8a8(rung)
    small = ladder.judge(rung, model, False)
    assert small["gate"] == "green" and small["length_ratio"] == 1.5
    assert sum("does not decide" in reason for reason in small["reasons"]) == 2
    monkeypatch.setattr(quality, "is_small", lambda model: False)
    monkeypatch.setitem(quality.THRESHOLDS, 8, {"kl": 9.0, "top1": 0.0, "perplexity": 9.0})
    large = ladder.judge(rung, model, False)
    assert large["gate"] == "red" and len(large["reasons"]) == 2
    assert "1.50 times as long" in large["reasons"][0] and "score 0.0% is below 99.0%" in large["reasons"][1]


def test_what_a_rung_refuses(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"t line 1: .* do not fit the 512 tokens of tiny-qwen3"):
        Rung(TINY, Task("t", (Item(1, "x " * 600, "y"),)), SHORT, CPU)
    without = Path(shutil.copytree(TINY, tmp_path / "without"))
    (without / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"tokenizer\.json: not there"):
        Rung(without, questions(), SHORT, CPU)
    with pytest.raises(FormatError, match="models tiny-qwen3: given twice"):
        ladder.run([TINY, TINY], questions(), SHORT, device=CPU)


def test_a_checkpoint_that_is_quantised_is_refused(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(TINY, tmp_path / "q"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="is quantised already; give its 16-bit source"):
        Rung(copy, questions(), SHORT, CPU)


# ---- all of it -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Record]]:
    """Runs with the checkpoint's own float type: what is fastest is tested above."""
    monkeypatch.setattr(ladder, "soonest", lambda model, *sizes: model.with_dtype(torch.float32))

    def run(folders: list[Path], plan: Plan, **how: Any) -> list[Record]:
        return ladder.run(folders, questions(), plan, device=CPU, **how)

    return run


def test_records_of_two_models_and_going_on(tmp_path: Path, quickly: Callable[..., list[Record]]) -> None:
    child = Path(shutil.copytree(TINY, tmp_path / "child"))
    config = json.loads((child / "config.json").read_text()) | {"num_hidden_layers": 7}
    (child / "config.json").write_text(json.dumps(config))  # as one whose last block was pruned
    out, plan = tmp_path / "l.jsonl", replace(SHORT, kv=("bf16", "int8"))
    rows = quickly([TINY, child], plan, out=out, usd_hour=2.0)
    assert [(r.model["id"], r.scheme["spec"], r.scheme["kv_spec"]) for r in rows] == [
        (model, *pair)
        for model in ("tiny-qwen3", "child")
        for pair in (("bf16", "bf16"), ("w8a8", "bf16"), ("w8a8", "int8"))
    ]
    own, eight, cache = rows[:3]
    assert own.quality["gate"] == "none" and own.quality["task"]["n"] == 5 and own.quality["kl"] == 0.0
    assert eight.quality["gate"] == "green" and eight.scheme["head"] == "int8-row" and eight.scheme["weight_bits"] == 8
    assert cache.memory["kv_bytes_per_token"] < 0.6 * eight.memory["kv_bytes_per_token"]
    versus = eight.tokens["vs_fp16"]["same_batch"]
    assert versus["baseline_key"] == own.cell_key and versus["batch"] == versus["batch_fp16"] == 2
    assert eight.tokens["tok_s"] == pytest.approx(2 * eight.shape["osl"] / (eight.latency_us["median"] / 1e6))
    assert rows[3].model["layers"] == 7 and rows[3].quality["kl"] == 0.0  # its own reference

    said: list[str] = []
    again = quickly([TINY, child], plan, out=out, usd_hour=4.0, progress=said.append)
    assert said == [f"6 of 6 cells are in {out}; --force measures them again"]
    assert [r.cell_key for r in again] == [r.cell_key for r in rows]
    prices = [r.money["usd_per_mtok"]["total"] for r in (rows[1], again[1]) if r.money]
    assert prices[1] == pytest.approx(2 * prices[0])  # from the same rates
    assert len(list(record.read(out))) == 6
    quickly([TINY], replace(SHORT, batch=3), out=out, dry_run=True, progress=said.append)
    assert said[-1].startswith("2 cells to measure")  # another batch is another measurement
