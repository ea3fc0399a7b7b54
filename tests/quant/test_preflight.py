"""The dry run: counts, bytes, memory, disk, tensor parallelism and engines, from headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from percard.formats.checkpoint import Checkpoint
from percard.formats.spec import FormatError
from percard.quant import preflight, quantize
from percard.quant.recipe import Recipe, RecipeError

Tiny = Callable[..., Path]


def check(src: Path, spec: str = "w4a16-g64", dst: Path | None = None, **over: Any) -> preflight.Preflight:
    return preflight.check(src, Recipe.from_flags(spec=spec, **over), dst)


@pytest.mark.parametrize(("kind", "spec"), [("qwen3", "w4a16-g64-asym"), ("llama", "w8a8"), ("qwen3_moe", "w3a16-g64")])
def test_what_it_says_is_what_happens(tiny: Tiny, tmp_path: Path, kind: str, spec: str) -> None:
    src = tiny(kind)
    plan = check(src, spec, tmp_path / "out")
    report = quantize.run(src, tmp_path / "out", Recipe.from_flags(spec=spec))
    made = Checkpoint.open(tmp_path / "out")
    assert plan.ok and plan.bytes_output == made.nbytes and plan.bytes_source == Checkpoint.open(src).nbytes
    assert {n: (t.dtype, t.shape) for n, t in made.tensors.items()} == plan.tensors
    assert sum(g.modules for g in plan.groups) == len(report.modules)
    assert [(g.spec, g.bytes_after) for g in plan.groups] == [(spec, report.bytes["quantised_after"])]
    written = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert written <= plan.disk


def test_it_makes_nothing_and_reads_no_weight(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a weight was read")

    for name in ("read", "read_rows", "raw"):
        monkeypatch.setattr(Checkpoint, name, never)
    src = tiny()
    before = sorted(tmp_path.rglob("*"))
    check(src, dst=tmp_path / "deep" / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_person_reads_and_what_a_program_reads(tiny: Tiny, tmp_path: Path) -> None:
    plan = check(tiny(), layers={r"re:.*\.layers\.0\.mlp\.down_proj$": "w8a16-g128"}, dst=tmp_path / "out")
    text = "\n".join(plan.show())
    for word in (
        "Llama",
        "13 modules -> w4a16-g64 (rtn)",
        "1 modules -> w8a16-g128",
        "lm_head$: output head",
        "memory at most",
    ):
        assert word in text
    tree = json.loads(json.dumps(plan.to_dict()))
    assert tree["ok"] and {g["spec"]: g["modules"] for g in tree["groups"]} == {"w4a16-g64": 13, "w8a16-g128": 1}
    assert list(tree["kept"]) == ["lm_head"] and tree["disk"]["free"] > tree["disk"]["needed"]


def test_no_room(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tiny()
    monkeypatch.setattr(preflight, "disk_free", lambda dst: 1000)
    monkeypatch.setattr(preflight, "_memory_free", lambda: 1000)
    plan = check(src, dst=tmp_path / "out")
    assert not plan.ok and len(plan.refusals) == 2
    assert "1 kB are free; free some or choose another --out" in plan.refusals[0] and "memory" in plan.refusals[1]
    with pytest.raises(preflight.Refused, match=r"refused: .*of disk") as caught:
        quantize.run(src, tmp_path / "out", Recipe.from_flags(spec="w8a8"))
    assert caught.value.code == 3 and caught.value.preflight.refusals and not (tmp_path / "out").exists()


def test_tensor_parallel(tiny: Tiny) -> None:
    src = tiny()  # intermediate 256, 4 heads x 32, 2 KV heads
    assert check(src, "w4a16-g64", tp=2).ok
    plan = check(src, "w4a16-g128", tp=2)
    assert len(plan.refusals) == 1 and "o_proj" in plan.refusals[0] and "give o_proj g64" in plan.refusals[0]
    assert check(src, "w4a16-g128", tp=2, layers={r"re:.*\.o_proj$": "w4a16-g64"}).ok
    assert check(src, "w4a16-g128", tp=2, ignore=[r"re:.*\.o_proj$"]).ok
    assert any("heads do not divide" in text for text in check(src, "w8a8", tp=3).refusals)
    assert any(
        "down_proj" in text and "pad" in text for text in check(tiny(name="odd", intermediate_size=320), tp=2).refusals
    )


def test_engines(tiny: Tiny) -> None:
    plan = check(tiny(), "w4a16-g128", engine="vllm==0.33.0", sm=90)
    assert (
        plan.ok and plan.engine[0]["verdict"] == "runs" and "vllm 0.33.0: w4a16-g128 for dense: runs" in plan.show()[-1]
    )
    assert "needs sm_75, the card is sm_70" in check(tiny(), "w4a16-g128", engine="vllm==0.33.0", sm=70).refusals[0]
    moe = check(tiny("qwen3_moe", name="moe"), "w4a8-g64", engine="vllm==0.33.0")
    assert (
        len(moe.refusals) == 1
        and "for experts is refused" in moe.refusals[0]
        and {r["modules"] for r in moe.engine}
        == {
            "dense",
            "experts",
        }
    )
    unknown = check(tiny(), "w4a16-g128", engine="vllm==0.1.0")
    assert unknown.ok and unknown.engine[0]["verdict"] == "unknown"
    for engine, says in (("vllm", "needs a version"), ("llamafile==1", "unknown engine")):
        with pytest.raises(RecipeError, match=says):
            check(tiny(), engine=engine)


def test_bad_input_raises(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="groups that fit: g32"):
        check(tiny(intermediate_size=160), "w4a16-g64")
    with pytest.raises(FormatError, match="no such folder"):
        check(tmp_path / "nowhere")


def test_a_quantised_head_is_warned_about(tiny: Tiny) -> None:
    plan = preflight.check(tiny(), Recipe.parse("stages: [{quantize: {spec: w8a16, ignore!: []}}]"))
    assert any("lm_head becomes w8a16" in text for text in plan.warnings)
