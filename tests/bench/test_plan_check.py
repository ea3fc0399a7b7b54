"""Predictions beside planted measurements: the ratios are those that were planted, and what is not predicted says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from percard.bench import card_table, efficiency, plan, plan_check, record
from percard.bench.card_table import Card
from percard.bench.efficiency import Efficiency
from percard.bench.plan_parts import load_shape
from percard.bench.record import Record
from percard.formats.kvcache import BF16
from percard.formats.spec import QuantSpec
from percard.planning_check import run

CPU = "Planted CPU"
CARD = Card("cpu-planted-2t", f"{CPU}, 2 threads", "cpu", 24.0, None, 20.0, 1.5, None, 3.0, "planted", "measured")
CARDS = {CARD.id: CARD}
SHIPPED = efficiency.PACKAGED
MODELS, SPECS = ("qwen2.5-0.5b", "qwen3-1.7b", "qwen3-0.6b"), ("bf16", "w8a8", "w4a16-g128", "w4a8-g128")


@pytest.fixture(autouse=True)
def nothing_packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of real machines would lend to planted ones."""
    (tmp_path / "none.json").write_text('{"version": 1, "rows": []}')
    monkeypatch.setattr(efficiency, "PACKAGED", tmp_path / "none.json")
    efficiency._known.cache_clear()


def seconds(model: str, spec: str, phase: str, e_bw: float, e_fl: float, layers: int = 28) -> float:
    """What the planner says of a machine with these shares."""
    shape, parsed = load_shape(f"shape:{model}").with_layers(layers), None if spec == "bf16" else QuantSpec.parse(spec)
    head = "16bit" if parsed is None else "int8-row"
    shares = Efficiency(e_bw, e_fl, "measured", (0, 0), "planted")
    call = plan.predict_decode if phase == "decode" else plan.predict_prefill
    tokens = 528 if phase == "decode" else 512  # 16 steps into 32
    return call(shape, parsed, BF16, 1, tokens, CARD, head=head, find=lambda *a: shares).seconds  # type: ignore[operator]


def row(model: str, spec: str, phase: str, time: float, **more: object) -> Record:
    case = f"{model}.model.{'pp512' if phase == 'prefill' else 'tg32.d512'}.b1"
    return Record(
        cell_key=f"{case} {spec}", level="model", case=case, latency_us={"median": time * 1e6},
        cpu={"model": CPU, "threads": 2}, model={"id": model, "layers_run": 28, "layers": 28},
        shape={"batch": 1, "isl": 512, "osl": 32, "kv_len": 512}, body={"impl": "cpu", "dtype": "bf16"},
        scheme={"spec": spec, "kv_spec": "bf16", "head": "16bit" if spec == "bf16" else "int8-row"}, **more,
    )  # fmt: skip


def test_a_perfect_machine_has_the_ratio_that_was_planted() -> None:
    """Measured 1.25 times as long as the default shares say: each ratio is 0.8."""
    rows = [
        row(m, s, p, 1.25 * seconds(m, s, p, 0.8, 0.6)) for m in MODELS for s in SPECS for p in ("decode", "prefill")
    ]
    found = plan_check.check(rows, CARDS)
    assert len(found) == 24 and not any(one.reason for one in found)
    assert [one.ratio for one in found] == pytest.approx([0.8] * 24)
    assert {one.basis for one in found} == {"brochure"} and {one.bound for one in found} == {"memory", "compute"}
    assert all(one.inside for one in found)  # a rate 20 % lower lies in -50 % / +15 %
    assert plan_check.medians(found) == {
        ("model", "decode"): (12, pytest.approx(0.2), pytest.approx(0.2), 12),
        ("model", "prefill"): (12, pytest.approx(0.2), pytest.approx(0.2), 12),
    }
    assert plan_check.geometric(found) == pytest.approx(0.8)
    assert plan_check.overall(found) == pytest.approx(0.2)


def test_shares_that_were_fitted_on_some_shapes_predict_another(tmp_path: Path) -> None:
    def measured(model: str) -> list[Record]:
        return [row(model, s, p, seconds(model, s, p, 0.55, 0.35)) for s in SPECS for p in ("decode", "prefill")]

    file = tmp_path / "e.json"
    some = measured("qwen2.5-0.5b") + measured("qwen3-1.7b")
    efficiency.save(file, efficiency.fit(plan_check.points(some, CARDS)))
    shares = {r.of: (r.bucket, r.e_bw, r.e_fl, r.n) for r in efficiency.read(file)}
    assert shares["decode.w8a8"] == (1, pytest.approx(0.55), None, 2)
    assert shares["prefill.w4a8-g128"] == (512, None, pytest.approx(0.35), 2)
    found = plan_check.check(measured("qwen3-0.6b"), CARDS, files=[file])
    assert [one.ratio for one in found] == pytest.approx([1.0] * 8, rel=1e-3)
    assert {one.basis for one in found} == {"measured"} and not any(one.own for one in found)
    # what was fitted on itself is no evidence
    again = plan_check.check(some, CARDS, files=[file])
    assert all(one.own for one in again) and plan_check.medians(again) == {} and plan_check.overall(again) is None
    assert "16 rows are of models that their shares were fitted on" in "\n".join(plan_check.lines(again))


def test_layers_are_added_up_to_a_model() -> None:
    whole = seconds("qwen3-0.6b", "w8a8", "decode", 0.8, 0.6)
    head = 0.001

    def part(case: str, time: float, spec: str, head: str) -> Record:
        base = row("qwen3-0.6b", spec, "decode", time)
        return replace(base, level="layer", case=f"qwen3-0.6b.{case}", scheme={**base.scheme, "head": head})

    rows = [part("layer.tg.d512.b1", (whole - head) / 28, "w8a8", "16bit"), part("head.b1", head, "w8a8", "int8-row")]
    (found,) = plan_check.check(rows, CARDS)
    # at a depth of 512, where the model's steps go on to 544
    assert found.level == "layer" and 0.97 < found.ratio < 1
    assert found.measured == pytest.approx(whole)
    (alone,) = plan_check.check(rows[:1], CARDS)
    assert "no record of a int8-row head" in alone.reason


def test_attention_of_prompts_has_a_share_of_its_own(tmp_path: Path) -> None:
    """Linears at half of the rate, attention at a twentieth of bf16: both are found again, and predict another shape."""

    def shares(card: str, of: str, bucket: int | None = None) -> Efficiency:
        return Efficiency(
            1.0, 0.05 if of.startswith("attention") else 0.5, "measured", (0, 0), "x", "measured", "measured"
        )

    def layer(model: str, spec: str) -> list[Record]:
        shape = load_shape(f"shape:{model}").with_layers(28)
        alone = shape.heads * 2 * shape.head_dim * 512**2 / (1.5e12 * 0.05)
        head, parsed = ("16bit", None) if spec == "bf16" else ("int8-row", QuantSpec.parse(spec))
        whole = plan.predict_prefill(shape, parsed, BF16, 1, 512, CARD, head=head, find=shares)
        base = replace(row(model, spec, "prefill", (whole.seconds - 0.01) / 28), level="layer")
        base = replace(base, scheme={**base.scheme, "head": head})
        parts = {f"{model}.layer.pp512.b1": base, f"{model}.head.b1": replace(base, latency_us={"median": 1e4})}
        parts[f"{model}.attention.pp512.b1"] = replace(base, latency_us={"median": alone * 1e6})
        return [replace(one, case=case) for case, one in parts.items()]

    some = [one for spec in ("bf16", "w8a8") for one in layer("qwen2.5-0.5b", spec)]
    rows = efficiency.fit(plan_check.points(some, CARDS))
    shares_of = {r.of: round(r.e_fl or 0, 4) for r in rows}
    assert shares_of == {"attention.prefill": 0.05, "prefill.bf16": 0.5, "prefill.w8a8": 0.5}
    efficiency.save(tmp_path / "e.json", rows)
    (found,) = plan_check.check(layer("qwen3-0.6b", "w8a8"), CARDS, files=[tmp_path / "e.json"])
    assert found.ratio == pytest.approx(1.0, rel=1e-3)


def test_a_whole_run_is_its_prompt_and_the_steps_after_the_first_token() -> None:
    prompt, step = (seconds("qwen3-0.6b", "w8a8", phase, 0.8, 0.6) for phase in ("prefill", "decode"))
    whole = replace(row("qwen3-0.6b", "w8a8", "decode", prompt + 31 * step), case="qwen3-0.6b.model.mix512x32.b1")
    (found,) = plan_check.check([whole], CARDS)
    assert found.phase == "whole" and found.ratio == pytest.approx(1.0)
    assert plan_check.points([whole], CARDS) == []


def test_linears_and_torch_beside_them() -> None:
    one = Record(
        cell_key="x", level="op", case="qwen3-0.6b.down.decode.b16.g64", cpu={"model": CPU, "threads": 2},
        latency_us={"median": 500.0}, shape={"M": 16, "N": 1024, "K": 3072}, scheme={"spec": "w4a8-g64"},
        roofline={"bytes": 4_000_000, "flops": 100_000_000},
        against=[
            {"impl": "torch float32", "status": "ok", "median": 900.0},
            {"impl": "torch bfloat16 mv", "status": "ok", "median": 700.0},
            {"impl": "torch._int_mm alone", "status": "ok", "median": 100.0},
        ],
    )  # fmt: skip
    found = plan_check.check([one], CARDS)
    assert [(f.spec, f.phase, f.measured) for f in found] == [
        ("w4a8-g64", "linear", 500e-6),
        ("bf16", "linear", 700e-6),
    ]
    assert found[0].predicted == pytest.approx(4e6 / (20e9 * 0.8))
    assert [(p.of, p.tokens) for p in plan_check.points([one], CARDS)] == [("linear.w4a8-g64", 16), ("linear.bf16", 16)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": "failed", "latency_us": None}, "has no time: status failed"),
        ({"latency_us": None, "quality": {"gate": "red"}}, "gate red"),
        ({"source": "vllm"}, "measured by vllm"),
        ({"level": "serve"}, "waves of requests"),
        ({"model": {"id": "my-own", "layers_run": 2}}, "my-own"),
        ({"model": {"id": "qwen3-0.6b", "layers_run": 28, "shard": "4:0"}}, "shard"),
        ({"body": {"impl": "torch, dequantised"}}, "dequantised"),
        ({"cpu": {"model": "Other", "threads": 2}}, "no card is called 'Other, 2 threads'"),
        ({"scheme": {"spec": "w8a8", "kv_spec": "calibrated"}}, "cache calibrated"),
        ({"shape": {"batch": 1}}, "neither the prompt nor the depth"),
    ],
)
def test_what_is_not_predicted_says_why(change: dict, words: str) -> None:
    (found,) = plan_check.check([replace(row("qwen3-0.6b", "w8a8", "decode", 0.02), **change)], CARDS)
    assert words in found.reason
    assert plan_check.points([replace(row("qwen3-0.6b", "w8a8", "decode", 0.02), **change)], CARDS) == []
    (told,) = (line for line in plan_check.lines([found]))
    assert told.startswith("not predicted: qwen3-0.6b.model.tg32.d512.b1: ")


def test_a_card_that_did_not_measure_it_is_refused() -> None:
    one = row("qwen3-0.6b", "w8a8", "decode", 0.02)
    other = replace(CARD, id="cpu-other", name="Other, 2 threads")
    (found,) = plan_check.check([one], CARDS | {other.id: other}, card_id="cpu-other")
    assert "measured on Planted CPU, 2 threads, which is not cpu-other" in found.reason


def test_the_verb_prints_fits_and_says_when_there_is_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = tmp_path / "card.json"
    cards.write_text(
        f'{{"id": "cpu-planted-2t", "name": "{CARD.name}", "arch": "cpu", "memory_gb": 24, "bandwidth_gbs": 20, '
        '"bf16_tflops": 1.5, "int8_tops": 3, "source": "planted", "confidence": "measured"}'
    )
    for spec in SPECS:
        record.append(
            tmp_path / "m.jsonl", row("qwen3-0.6b", spec, "decode", seconds("qwen3-0.6b", spec, "decode", 0.4, 0.6))
        )
    told = {"card_files": [cards], "fit": tmp_path / "e.json", "table": tmp_path / "t.md"}
    assert run([tmp_path / "m.jsonl"], **told) == 0  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    assert "model decode: median error 50.0%" in printed and "fitted decode.w8a8 at M=1: e_bw 0.40" in printed
    assert "| model | qwen3-0.6b.model.tg32.d512.b1 | w8a8 |" in (tmp_path / "t.md").read_text()
    assert run([tmp_path / "m.jsonl"]) == 3
    assert "percard bench card --out FILE" in capsys.readouterr().out


def test_the_committed_measurements_are_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares fitted on layers of two other shapes predict whole Qwen3-0.6B models: median error under 20 %."""
    results = Path(__file__).resolve().parents[2] / "bench" / "results"
    monkeypatch.setattr(efficiency, "PACKAGED", SHIPPED)
    efficiency._known.cache_clear()
    known = card_table.cards([results / "cards" / "cpu-intel-xeon-amx-int8-2t.json"])
    layers = list(record.read(results / "layers-cpu-native.jsonl"))
    assert {row.model["id"] for row in layers} == {"qwen2.5-0.5b", "qwen3-1.7b"}
    fitted = {(row.of, row.bucket): row for row in efficiency.fit(plan_check.points(layers, known))}
    shipped = [row for row in efficiency.read(SHIPPED) if row.card == "cpu-intel-xeon-amx-int8-2t"]
    for row in shipped:  # what is packaged is what these records say
        again = fitted[row.of, row.bucket]
        assert (again.e_bw or again.e_fl) == pytest.approx(row.e_bw or row.e_fl, abs=1e-4)
    whole = list(record.read(results / "model-qwen3-0.6b-cpu-native.jsonl"))
    found = plan_check.check(whole, known)
    assert len(found) == 19 and not any(one.reason or one.own for one in found)
    assert (plan_check.overall(found) or 1) < 0.20
    assert all(median < 0.20 for _, median, _, _ in plan_check.medians(found).values())
