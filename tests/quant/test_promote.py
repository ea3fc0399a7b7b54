"""Promotion: the plan with made-up numbers, the rewriting of a checkpoint, and a red model that becomes green."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from percard.formats import compressed_tensors
from percard.formats.checkpoint import Checkpoint
from percard.formats.spec import FormatError, QuantSpec
from percard.quant import fidelity, heldout, promote, quantize
from percard.quant.fidelity import Fall
from percard.quant.pair import Pair
from percard.quant.promote import Choice, Rung, plan
from percard.quant.recipe import Recipe, Serve
from percard.quant.report import Gate, Module, Report
from percard.quant.transforms import FILE, Transforms
from percard.quant.verify import verify

Tiny = Callable[..., Path]
TRAINED = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"
W4, W8 = QuantSpec.parse("w4a16-g128"), QuantSpec.parse("w8a16-g128")
RED = Gate("red", 0.06, 0.95, 10.1, 10.0, 1000, "", "w4a16-g128", limits={"kl": 0.03, "top1": 0.93})


def choice(name: str, fall: float, size: int = 100) -> Choice:
    """A set of 4-bit weights: 8 bits cost as much as it has, 16 bits three times that."""
    return Choice(name, (name,), fall, (Rung(W4, size, 0.0), Rung(W8, 2 * size, 0.99), Rung(None, 4 * size, 1.0)))


def test_the_most_gain_per_byte_comes_first_and_no_more_than_needed() -> None:
    sets = [choice("big", 0.30, 1000), choice("small", 0.20, 100), choice("poor", 0.01, 100), choice("next", 0.25, 200)]
    made = plan(sets, 0.8, RED, 10_000)
    assert made.changes == {"small": W8, "next": W8}  # 0.55 of the noise is left: 0.06 * 0.44 < 0.9 * 0.03
    assert made.bytes == 300 and made.share == pytest.approx(1 - 0.45 * 0.99 / 0.8)
    harder = plan(sets, 0.8, dataclasses.replace(RED, kl=0.15), 10_000)
    assert harder.changes == {"small": W8, "next": W8, "big": W8}
    assert plan(sets, 0.8, dataclasses.replace(RED, kl=0.001), 10_000).changes == {}


def test_the_budget_is_kept_and_what_fits_is_taken() -> None:
    sets = [choice("big", 0.30, 1000), choice("small", 0.02, 100)]
    made = plan(sets, 0.4, RED, 999)
    assert made.changes == {"small": None} and made.bytes == 300  # "big" would cost 1000
    assert plan(sets, 0.4, RED, 299).changes == {"small": W8}
    assert plan(sets, 0.4, RED, 99).changes == {}
    assert plan(sets, 0.4, RED, 1400).bytes <= 1400


def test_a_second_rung_follows_when_the_first_does_not_do() -> None:
    made = plan([choice("a", 1.0)], 1.0, dataclasses.replace(RED, kl=4.0), 10_000)
    assert made.changes == {"a": None} and made.bytes == 300 and made.share == 0


def test_every_limit_of_the_gate_counts() -> None:
    assert promote.predicted(dataclasses.replace(RED, kl=0.01, top1=0.95), 1.0)
    assert not promote.predicted(dataclasses.replace(RED, kl=0.01, top1=0.90), 1.0)
    assert promote.predicted(dataclasses.replace(RED, kl=0.01, top1=0.90), 0.35)
    strict = dataclasses.replace(RED, kl=0.01, perplexity=10.3, limits={**RED.limits, "perplexity": 0.02})
    assert not promote.predicted(strict, 1.0) and promote.predicted(strict, 0.5)
    assert not promote.predicted(dataclasses.replace(RED, kl=float("nan")), 0.5)


def red(tiny: Tiny, tmp_path: Path, kind: str = "llama", spec: str = "w4a16-g64", **over: object) -> Pair:
    src, out = tiny(kind, max_position_embeddings=64, **over), tmp_path / f"red-{spec}"
    quantize.run(src, out, Recipe.from_flags(spec=spec))
    return Pair.open(out, src)


def falls(pair: Pair) -> list[Fall]:
    sets: dict[str, list[str]] = {}
    for linear in pair.linears:
        sets.setdefault(linear.together, []).append(linear.name)
    return [Fall(0, name, tuple(modules), 1.0, 0.5) for name, modules in sets.items()]


def rungs(found: list[Choice]) -> dict[str, list[str]]:
    return {c.together.removeprefix("model.layers.1."): [str(r.spec) for r in c.rungs] for c in found}


def test_rungs_by_spec_and_shape(tiny: Tiny, tmp_path: Path) -> None:
    mixture = red(tiny, tmp_path, "qwen3_moe", mlp_only_layers=[])
    found = rungs(promote.choices(mixture, falls(mixture)))
    assert found["self_attn.q_proj"] == ["w4a16-g64", "w8a16-g128", "None"]
    assert found["mlp.experts"] == ["w4a16-g64", "w8a16", "None"]  # down has 64 columns
    for spec in ("w8a8", "w4a8-g64", "w8a16"):
        pair = red(tiny, tmp_path, spec=spec)
        assert set(map(tuple, rungs(promote.choices(pair, falls(pair))).values())) == {(spec, "None")}


def test_rungs_that_the_engine_does_not_load_are_left_out(tiny: Tiny, tmp_path: Path) -> None:
    pair = red(tiny, tmp_path, "qwen3_moe", "w4a16-g64", mlp_only_layers=[])
    found = rungs(promote.choices(pair, falls(pair), Serve("sglang==0.5.23")))
    assert found["mlp.experts"] == ["w4a16-g64", "None"]  # sglang runs 8-bit experts not at all
    assert found["self_attn.o_proj"] == ["w4a16-g64", "w8a16-g128", "None"]
    assert rungs(promote.choices(pair, falls(pair), Serve("sglang==0.5.23", sm=75)))["self_attn.o_proj"] == [
        "w4a16-g64",
        "None",
    ]
    assert rungs(promote.choices(pair, falls(pair), Serve("vllm==9.9.9")))["self_attn.o_proj"] == ["w4a16-g64", "None"]
    split = rungs(promote.choices(pair, falls(pair), Serve(tp=2)))
    assert split["self_attn.o_proj"] == ["w4a16-g64", "None"]  # 128 columns on two cards cut a group of 128
    assert split["self_attn.q_proj"] == ["w4a16-g64", "w8a16-g128", "None"]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_a_rewritten_checkpoint_differs_in_what_was_promoted_only(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    pair = red(tiny, tmp_path, kind)
    o = "model.layers.0.self_attn.o_proj"
    last = [x.name for x in pair.linears if x.block == 1 and ".mlp." in x.name]
    changes: dict[str, QuantSpec | None] = {o: QuantSpec.parse("w8a16-g128"), **dict.fromkeys(last)}
    modules = promote.rewrite(pair.made.path, pair.source.path, tmp_path / "new", changes)
    report = verify(tmp_path / "new", pair.source.path)
    assert report.status == "green", (report.failures, report.flags)
    new = Pair.open(tmp_path / "new", pair.source.path)
    assert new.specs[o] == QuantSpec.parse("w8a16-g128") and not set(last) & set(new.specs)
    assert modules[last[0]] is None and (found := modules[o]) is not None
    assert found.spec == "w8a16-g128" and found.facts == {"promoted_from": "w4a16-g64"} and (found.sqnr or 0) > 40
    before, after = load_file(pair.made.path / "model.safetensors"), load_file(tmp_path / "new" / "model.safetensors")
    same = [n for n in before if n.rpartition(".")[0] not in changes]
    assert all(torch.equal(before[n], after[n]) for n in same) and len(same) > 20
    assert torch.equal(after[f"{last[0]}.weight"], pair.source.read(f"{last[0]}.weight"))
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == (pair.made.path / "tokenizer.json").read_bytes()
    ignored = new.made.config["quantization_config"]["ignore"]
    assert set(last) <= set(ignored) and "lm_head" in ignored


def test_promoted_weights_come_from_the_transformed_source(tiny: Tiny, tmp_path: Path) -> None:
    src = tiny("llama", max_position_embeddings=64)
    random = torch.Generator().manual_seed(3)
    scales = {"model.layers.0.mlp.up_proj": torch.rand(256, generator=random) + 0.5}
    moved = Transforms((2, 2, 32), scales)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        before = dict(tensors)
        for name in [n for n in before if moved.touches(n)]:
            tensors[name] = moved.apply(name, before[name], before.__getitem__).to(torch.bfloat16)

    twin = tiny("llama", name="twin", change=change, max_position_embeddings=64)
    quantize.run(twin, tmp_path / "red", Recipe.from_flags(spec="w4a16-g64"))
    (tmp_path / "red" / FILE).write_bytes(moved.to_bytes())
    down, up = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
    changes = {down: QuantSpec.parse("w8a16-g128"), up: None, "model.layers.0.mlp.gate_proj": None}
    promote.rewrite(tmp_path / "red", src, tmp_path / "new", changes)
    assert (tmp_path / "new" / FILE).read_bytes() == moved.to_bytes()
    report = verify(tmp_path / "new", src)
    assert report.status == "green" and report.checks["transformed"] == 1, (report.failures, report.flags)
    new = Pair.open(tmp_path / "new", src)
    assert torch.equal(new.made.read(f"{up}.weight"), moved.apply(f"{up}.weight", new.source.read(f"{up}.weight"), new.source.read).to(torch.bfloat16))  # fmt: skip


def test_changes_that_cannot_be(tiny: Tiny, tmp_path: Path) -> None:
    pair = red(tiny, tmp_path)
    with pytest.raises(FormatError, match="lm_head is not quantised there"):
        promote.rewrite(pair.made.path, pair.source.path, tmp_path / "new", {"lm_head": None})
    with pytest.raises(FormatError, match="engines fuse"):
        promote.rewrite(pair.made.path, pair.source.path, tmp_path / "new", {"model.layers.0.self_attn.q_proj": None})
    assert not (tmp_path / "new").exists()


def test_a_new_checkpoint_takes_the_place_of_the_old(tiny: Tiny, tmp_path: Path) -> None:
    pair = red(tiny, tmp_path)
    folder = pair.made.path
    (folder / ".work").mkdir()
    (folder / ".work" / "journal").write_text("stays")
    o = "model.layers.0.self_attn.o_proj"
    promote.rewrite(folder, pair.source.path, folder / ".new", {o: None})
    assert Pair.open(folder, pair.source.path).specs[o] == QuantSpec.parse("w4a16-g64")
    promote.replace(folder, folder / ".new")
    assert o not in Pair.open(folder, pair.source.path).specs and verify(folder, pair.source.path).status == "green"
    assert not (folder / ".new").exists() and (folder / ".work" / "journal").read_text() == "stays"


# -- the whole of it ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A trained model in per-row 4 bits, which is too coarse for it, and its report at level model."""
    folder = tmp_path_factory.mktemp("coarse") / "w4a16"
    quantize.run(TRAINED, folder, Recipe.from_flags(spec="w4a16", verify="none"))
    said = Report.load(folder / "report.json")
    found = verify(folder, TRAINED, level="model", text=TRAINED / "heldout.txt", tokens=1024)
    return folder, dataclasses.replace(said, gates=found.gates, layers=found.layers, level="model")


@pytest.fixture
def trained(coarse: tuple[Path, Report], tmp_path: Path) -> tuple[Path, Report, heldout.HeldOut]:
    """The same in a folder of its own, and the text."""
    text = heldout.read(TRAINED / "heldout.txt", TRAINED, 4096, 512, 1024)
    return Path(shutil.copytree(coarse[0], tmp_path / "out")), coarse[1], text


def test_a_red_model_becomes_green(
    trained: tuple[Path, Report, heldout.HeldOut], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, done, text = trained
    assert done.gate is not None
    limit = 0.6 * done.gate.kl
    monkeypatch.setitem(fidelity.THRESHOLDS, 4, {"kl": limit, "top1": 0.5, "perplexity": 1.0})
    first = dataclasses.replace(done.gate, gate="red", limits={"kl": limit, "top1": 0.5})
    done = dataclasses.replace(done, gates=(first,))
    report, where = promote.until_green(folder, TRAINED, done, text, max_extra=0.3)
    assert report.status == "green" and report.gate is not None and report.gate.kl <= limit < first.kl
    assert where.parent == folder and len(report.gates) >= 2 and report.promotions
    extra = Checkpoint.open(where).nbytes - Checkpoint.open(folder).nbytes
    assert 0 < extra <= 0.3 * done.bytes["output"]
    assert sum(p.bytes for p in report.promotions) == extra and report.bytes["output"] == done.bytes["output"] + extra
    changed = {m for p in report.promotions for m in p.modules}
    specs = compressed_tensors.specs(Checkpoint.open(where).config, Checkpoint.open(where).names)
    for module in report.modules:
        assert str(specs[module.name]) == module.spec
        assert (module.method == "rtn") and (module.spec != "w4a16") == (module.name in changed)
    promote.replace(folder, where)
    assert verify(folder, TRAINED).status == "green" and not list(folder.glob(".percard-promoted*"))


def test_what_cannot_become_green_stays_red_and_says_so(
    trained: tuple[Path, Report, heldout.HeldOut], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, done, text = trained
    assert done.gate is not None
    monkeypatch.setitem(fidelity.THRESHOLDS, 4, {"kl": 1e-9, "top1": 0.5, "perplexity": 1.0})
    first = dataclasses.replace(done.gate, gate="red", limits={"kl": 1e-9, "top1": 0.5})
    done = dataclasses.replace(done, gates=(first,))
    report, where = promote.until_green(folder, TRAINED, done, text, max_extra=0.02)
    assert report.status == "red" and report.gate is not None and report.gate.kl < first.kl
    assert any("max_extra" in w for w in report.warnings) or len({p.round for p in report.promotions}) == promote.ROUNDS
    assert Checkpoint.open(where).nbytes <= 1.02 * Checkpoint.open(folder).nbytes
    same, here = promote.until_green(folder, TRAINED, done, text, max_extra=0.0)
    assert here == folder and same.gates == done.gates and "no promotion fits" in same.warnings[-1]


def test_a_full_disk_leaves_the_red_checkpoint(
    trained: tuple[Path, Report, heldout.HeldOut], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, done, text = trained
    assert done.gate is not None
    first = dataclasses.replace(done.gate, gate="red", limits={"kl": 1e-9, "top1": 0.5})

    def full(*args: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(promote.Writer, "add_raw", full)
    report, where = promote.until_green(folder, TRAINED, dataclasses.replace(done, gates=(first,)), text)
    assert where == folder and report.status == "red" and "no room on the disk" in report.warnings[-1]
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []


def test_the_report_names_what_is_not_quantised_any_more() -> None:
    module = Module("a", "w4a16", "gptq", (2, 4), 20.0, 16, 4)
    done = Report("quantize", "s", "d", "model", (module, dataclasses.replace(module, name="b")), {}, {}, {})
    after = promote._renewed(done, {"a": None, "b": dataclasses.replace(module, name="b", spec="w8a16")}, ())
    assert [m.name for m in after.modules] == ["b"] and after.modules[0].spec == "w8a16"
    assert after.kept == {"a": "promoted to 16 bits after a red gate"}


def test_quantize_promotes_by_itself_and_leaves_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = tmp_path / "held.txt"
    held.write_text((TRAINED / "heldout.txt").read_text()[:2500])
    monkeypatch.setitem(fidelity.THRESHOLDS, 4, {"kl": 0.008, "top1": 0.5, "perplexity": 1.0})
    recipe = Recipe.from_flags(spec="w4a16-g128", options={"search": False}, verify="model", text=held)
    recipe = dataclasses.replace(recipe, verify=dataclasses.replace(recipe.verify, max_extra=0.2))
    done = quantize.run(TRAINED, tmp_path / "out", recipe)
    assert done.gates[0].gate == "red" and done.status == "green" and done.promotions
    assert Report.load(tmp_path / "out" / "report.json") == done
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    assert verify(tmp_path / "out", TRAINED).status == "green"
    card = (tmp_path / "out" / "percard-card.md").read_text()
    assert "Given more bits after a red gate" in card and "# tiny-qwen3, w4a16-g128, w8a16-g128" in card
