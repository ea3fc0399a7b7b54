"""`bench ops`: what is planned, the gate before the clock, rivals, and rows that are valid records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from percard.bench import here, ops, record, rivals
from percard.formats.affine import dequantize
from percard.formats.spec import FormatError
from percard.kernels import conformance
from percard.kernels.op import Unsupported
from percard.kernels.shapes import activations, generator, small, weight

TINY = {"w8a8": "small.m16.n128.k256.w8a8.bf16.bias", "w4a16-g128": "small.m1.n64.k128.w4a16-g128.bf16"}


@pytest.fixture(autouse=True)
def few_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in milliseconds: these tests look at what a row says, not at how fast anything is."""
    monkeypatch.setattr(ops, "_SAMPLE_S", 1e-4)
    monkeypatch.setattr(ops, "_MOST_CPU_BYTES", 1 << 17)


def test_plan_is_whole_and_by_worth() -> None:
    models, specs = ("qwen3-8b", "qwen3-32b"), ("w4a16-g128", "w8a8", "w4a8-g128", "w4a8")
    found = ops.plan(models, specs)
    w8a8 = {(case.name.split(".")[0], case.name.split(".")[1], case.m) for spec, case in found if spec == "w8a8"}
    assert len(w8a8) == 2 * 4 * 7, "eight shapes at seven batches"
    assert [case.m for _, case in found] == sorted((c.m for _, c in found), key=ops.WORTH.index)
    assert found[0][0] == "w4a16-g128" and found[0][1].name.startswith("qwen3-8b") and found[0][1].m == 1
    assert {spec for spec, _ in found} == set(specs) and len(set(found)) == len(found)
    with pytest.raises(FormatError, match="no cases for model 'qwen9'"):
        ops.plan(("qwen9",), specs)
    with pytest.raises(Unsupported, match="w3a16"):
        ops.plan(models, ("w3a16-g64",))


def test_check_is_green_and_red(monkeypatch: pytest.MonkeyPatch) -> None:
    name = small(3, 37, 53, "w8a8", torch.float16, bias=True).name
    green = list(ops.check("matmul_w8a8", "cpu", name, "cpu", 7))
    assert [row["quality"]["gate"] for row in green] == ["green"]
    run = ops.OPS["matmul_w8a8"][0].run_of(ops.OPS["matmul_w8a8"][0].body("cpu"))
    monkeypatch.setitem(ops.OPS["matmul_w8a8"][0]._runs, "cpu", lambda *flat: run(*flat) * 1.01)
    red = list(ops.check("matmul_w8a8", "cpu", name, "cpu", 7))
    assert red[0]["status"] == "failed" and red[0]["quality"]["gate"] == "red"
    assert "elements are off" in red[0]["error"]["message"]


@pytest.mark.parametrize("spec", TINY)
def test_row_of_a_case_is_a_record(spec: str, quick: None) -> None:
    case = TINY[spec]
    (row,) = ops.time_case(spec, case, "cpu", rounds=2, roof={"copy_gbs": 10.0})
    words = row.pop("words")
    made = record.Record(cell_key="k", **ops.sections(spec, ops.case_of(ops.linear_ops(spec)[-1].name, case)), **row)
    assert record.Record.from_json(made.to_json()) is not None
    assert " us, " in words and made.body["impl"] == "cpu" and made.quality["gate"] == "synthetic"
    against = {rival["impl"]: rival for rival in made.against}
    assert {"torch float32", "torch bfloat16", "torch float16"} <= set(against)
    best = min((r for n, r in against.items() if n.startswith("torch ")), key=lambda r: r["median"])
    assert made.body["baseline_dtype"] == best["impl"].removeprefix("torch ")
    assert best["ci95"][0] <= best["ratio"] <= best["ci95"][1] and best["median"] > 0
    assert made.roofline["bytes"] > 0 and made.roofline["bound"] == "mem"
    ours = "torch._weight_int8pack_mm" if spec == "w8a8" else "torch._weight_int4pack_mm_for_cpu"
    assert against[ours]["status"] == "ok", against[ours]


def test_red_gate_has_no_figure(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    monkeypatch.setattr(conformance, "faults", lambda op, impl, args: [f"{op.name} {impl}: off"])
    (row,) = ops.time_case("w8a8", TINY["w8a8"], "cpu", rounds=1)
    assert row["quality"]["gate"] == "red" and "latency_us" not in row
    assert "quantize_rows cpu: off; matmul_w8a8 cpu: off" in row["error"]["message"]


def test_rival_with_another_product_is_suspect(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    wrong = rivals.Rival("wrong", 8, lambda x, w: None, lambda x, w: lambda: torch.zeros(x.shape[0], w.shape[0]))
    raises = rivals.Rival("raises", 8, lambda x, w: None, lambda x, w: lambda: torch.ops.aten.mm(x, x))
    monkeypatch.setattr(rivals, "QUANTISED", (wrong, raises))
    (row,) = ops.time_case("w8a8", TINY["w8a8"], "cpu", rounds=1)
    against = {rival["impl"]: rival for rival in row["against"]}
    assert against["wrong"]["status"] == "suspect" and "off by 100" in against["wrong"]["reason"]
    assert against["raises"]["status"] == "failed" and "median" not in against["raises"]


def test_int_mm_rival_multiplies_what_we_multiply() -> None:
    case = replace(ops.case_of("matmul_w8a8", TINY["w8a8"]), m=32)
    random = generator(case, 3)
    x, w = activations(case, random), weight(case, random)
    whole = next(rival for rival in rivals.QUANTISED if "quantize_rows" in rival.name)
    assert whole.absent(x, w) is None
    got, want = whole.make(x, w)().float(), x.float() @ dequantize(w).T
    assert float((got - want).norm() / want.norm()) < ops._AGREES
    bare = next(rival for rival in rivals.QUANTISED if "alone" in rival.name)
    assert bare.make(x, w)().dtype == torch.int32


def test_int_mm_says_where_a_card_refuses_it() -> None:
    class OnCard:
        is_cuda = True

        def __init__(self, *shape: int) -> None:
            self.shape = shape

    def weight_of(name: str) -> Any:
        case = small(16, 128, 256, name)
        return weight(case, generator(case, 1))

    w8, w4 = weight_of("w8a8"), weight_of("w4a8")
    assert "below 17" in (rivals._int_mm_absent(OnCard(16, 256), w8) or "")  # type: ignore[arg-type]
    assert rivals._int_mm_absent(OnCard(17, 256), w8) is None  # type: ignore[arg-type]
    assert "multiples of 8" in (rivals._int_mm_absent(OnCard(32, 255), w8) or "")  # type: ignore[arg-type]
    assert "w4a8" in (rivals._int_mm_absent(OnCard(32, 256), w4) or "")  # type: ignore[arg-type]


def test_roofline_takes_the_higher_bound() -> None:
    work = ops.Cost(flops=2 * 10**12, bytes=10**9)
    found = ops.roofline(work, 0.004, {"copy_gbs": 1000.0, "bf16": 1000.0, "int8": 2000.0}, 16)
    assert found["bound"] == "compute" and found["pct_of_roof"] == pytest.approx(50.0)
    assert ops.roofline(work, 0.004, {"copy_gbs": 1000.0, "int8": 4000.0}, 8)["bound"] == "mem"
    assert ops.roofline(work, 0.004, {}, 8)["pct_of_roof"] is None


def test_source_hash_follows_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "gpu.py").write_text(name)
    monkeypatch.setattr(ops, "_KERNELS", tmp_path)
    ops.source_hash.cache_clear()
    first = ops.source_hash("one")
    assert first != ops.source_hash("two") and first == ops.source_hash("one")
    (tmp_path / "one" / "gpu.py").write_text("changed")
    ops.source_hash.cache_clear()
    assert ops.source_hash("one") != first
    (tmp_path / "op.py").write_text("what all ops share")
    ops.source_hash.cache_clear()
    assert ops.source_hash("two") != first
    ops.source_hash.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose roofs are known at once."""
    row = {"env": {}, "cpu": {"model": "x"}, "card": {}, "noisy": [], "words": "a machine"}
    monkeypatch.setattr(here.roof, "measure", lambda device: iter([row]))


def test_run_writes_records_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, quick: None, measured: None
) -> None:
    case = ops.case_of("matmul_w8a8", TINY["w8a8"])
    todo = [("w8a8", case), ("w8a8", replace(case, name="not there"))]
    monkeypatch.setattr(ops, "plan", lambda *args: todo)
    said: list[str] = []
    how: dict[str, Any] = {"device": torch.device("cpu"), "out": tmp_path / "r.jsonl", "progress": said.append}
    chosen = ops.Choice(rounds=1)
    found = ops.run(chosen, **how)
    assert [row.status for row in found] == ["ok", "failed"] and "not there" in found[1].error["message"]
    assert found[1].error["stage"] == "ops.case_of" and found[1].env and found[1].code["op_source_hash"]
    assert [row.case for row in record.read(tmp_path / "r.jsonl")] == [case.name, "not there"]
    assert len({row.cell_key for row in found}) == 2 and len(said) == 3 and said[0] == "a machine"
    assert ops.run(chosen, **how) == found and len(said) == 4 and "2 of 2 cells" in said[3]
    assert len({row.cell_key for row in found + ops.run(replace(chosen, rounds=2), **how)}) == 4  # another measurement
    monkeypatch.setattr(ops, "source_hash", lambda *names: "changed")
    assert {row.cell_key for row in ops.run(chosen, **how)}.isdisjoint(row.cell_key for row in found)


def test_sizes_of_a_run() -> None:
    cpu, on_card, full = ops.choice("quick", "cpu"), ops.choice("quick", "cuda"), ops.choice("full", "cuda")
    assert ops.choice(None, "cpu") == ops.Choice()
    for chosen in (cpu, on_card):
        todo = ops.plan(chosen.models, chosen.specs, chosen.tokens, chosen.layers)
        assert {case.name.split(".")[-3] for _, case in todo} == {"gate_up", "down"} and not chosen.rivals
        per_spec = {spec: sum(s == spec for s, _ in todo) for spec, _ in todo}
        assert set(per_spec) == set(chosen.specs) and set(per_spec.values()) == {2 * len(chosen.tokens)}
    assert len(cpu.specs) == 2 and on_card.tokens == (1, 16, 256)
    matmuls = ("matmul_w8a8", "matmul_w4a16", "matmul_w8a16", "matmul_w4a8")
    known = {(case.spec, case.name) for name in matmuls for case in ops.OPS[name][1].CASES if case.real}
    assert {(spec, case.name) for spec, case in ops.plan(full.models, full.specs, full.tokens)} == known
