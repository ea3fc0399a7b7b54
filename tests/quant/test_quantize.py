"""The road from a checkpoint to a quantised one: what changes, what must not, and that bytes repeat."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from percard.formats import affine, compressed_tensors
from percard.formats.checkpoint import Checkpoint
from percard.formats.spec import QuantSpec
from percard.quant import quantize, walk
from percard.quant.progress import Progress
from percard.quant.recipe import Recipe
from percard.quant.report import Report

Tiny = Callable[..., Path]
DOWN = "model.layers.1.mlp.down_proj"


def recipe(spec: str = "w4a16-g64", **over: Any) -> Recipe:
    return Recipe.from_flags(spec=spec, **over)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the library that others read with."""
    out: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


def value(folder: Path, module: str, spec: QuantSpec, shape: tuple[int, int]) -> torch.Tensor:
    """A quantised weight as readers will see it, fp32."""
    prefix = module + "."
    parts = {n.removeprefix(prefix): t for n, t in tensors(folder).items() if n.startswith(prefix)}
    return affine.dequantize(compressed_tensors.read(parts, spec, shape))


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != "report.json"}


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("qwen2", "w8a8"),
        ("qwen3", "w4a16-g64"),
        ("qwen3", "w4a8-g64"),
        ("llama", "w4a16-g32-asym"),
        ("llama", "w3a16-g64"),
        ("mistral", "w8a16-g128"),
        ("mistral", "w4a8"),
        ("qwen3_moe", "w4a16-g64"),
        ("qwen3_moe", "w8a8"),
    ],
)
def test_linears_change_and_nothing_else(tiny: Tiny, tmp_path: Path, kind: str, spec: str) -> None:
    src, dst = tiny(kind), tmp_path / "out"
    report = quantize.run(src, dst, recipe(spec))
    before, after = tensors(src), tensors(dst)
    names = {m.name for m in report.modules}
    assert report.status == "green" and report.level == "weights" and len(names) >= 14
    for name, tensor in before.items():
        if name.removesuffix(".weight") in names:
            module = name.removesuffix(".weight")
            got = value(dst, module, QuantSpec.parse(spec), tuple(tensor.shape))  # type: ignore[arg-type]
            noise = (got - tensor.float()).square().sum() / tensor.float().square().sum()
            ratio = next(m.sqnr for m in report.modules if m.name == module)
            assert ratio == pytest.approx(-10 * float(noise.log10()), abs=1e-3)
            assert ratio > (30 if spec.startswith("w8") else 12)
        else:
            assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)
    old, new = (json.loads((f / "config.json").read_text()) for f in (src, dst))
    assert list(new) == [*old, "quantization_config"] and {k: new[k] for k in old} == old
    assert new["quantization_config"]["quant_method"] == "compressed-tensors"
    for name in ("tokenizer.json", "LICENSE"):
        assert (dst / name).read_bytes() == (src / name).read_bytes()
    assert sorted(p.name for p in dst.parent.iterdir()) == ["out", "src"]


def test_every_expert_is_in_the_report_and_the_router_is_not(tiny: Tiny, tmp_path: Path) -> None:
    report = quantize.run(tiny("qwen3_moe"), tmp_path / "out", recipe("w4a16-g64"))
    found = {m.name for m in report.modules if ".experts." in m.name}
    sides = ("gate_proj", "up_proj", "down_proj")
    assert found == {f"model.layers.1.mlp.experts.{e}.{side}" for e in range(3) for side in sides}
    assert "router" in report.kept["model.layers.1.mlp.gate"] and "lm_head" in report.kept
    after = tensors(tmp_path / "out")
    assert after["model.layers.1.mlp.gate.weight"].dtype == after["model.embed_tokens.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("spec", ["w4a16-g64", "w4a16-g64-asym", "w8a8", "w4a16"])
def test_codes_follow_from_the_stored_scale(tiny: Tiny, tmp_path: Path, spec: str) -> None:
    src, dst, kind = tiny(), tmp_path / "out", QuantSpec.parse(spec)
    quantize.run(src, dst, recipe(spec))
    weight = tensors(src)[DOWN + ".weight"].float()
    parts = {n.removeprefix(DOWN + "."): t for n, t in tensors(dst).items() if n.startswith(DOWN + ".")}
    made = compressed_tensors.read(parts, kind, (128, 256))
    assert made.scale.dtype == (torch.float32 if spec == "w8a8" else torch.bfloat16)
    assert torch.equal(made.data, affine.encode(weight, made.scale, made.zero, kind))


def test_two_level_scales(tiny: Tiny, tmp_path: Path) -> None:
    quantize.run(tiny(), tmp_path / "out", recipe("w4a8-g64"))
    scales = [t for n, t in tensors(tmp_path / "out").items() if n.endswith("_proj.weight_scale")]
    assert len(scales) == 14 and all(affine.two_level(s) is not None for s in scales)


def test_search_lowers_the_error(tiny: Tiny, tmp_path: Path) -> None:
    src = tiny()
    plain = quantize.run(src, tmp_path / "plain", recipe(options={"search": False}))
    searched = quantize.run(src, tmp_path / "searched", recipe())
    assert all((b.sqnr or 0) > (a.sqnr or 0) for a, b in zip(plain.modules, searched.modules, strict=True))


@pytest.mark.parametrize("spec", ["w4a16-g64-asym", "w3a16-g64", "w8a8"])
def test_bytes_repeat_and_do_not_depend_on_row_ranges(
    tiny: Tiny, tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = tiny()
    quantize.run(src, tmp_path / "a" / "out", recipe(spec))
    quantize.run(src, tmp_path / "b" / "out", recipe(spec))
    monkeypatch.setattr(walk, "ROW_WEIGHTS", 32 * 128)
    quantize.run(src, tmp_path / "c" / "out", recipe(spec))
    first = hashes(tmp_path / "a" / "out")
    shards = {n for n in first if n.endswith((".safetensors", "config.json"))}
    assert len(shards) == 2
    for other in ("b", "c"):
        again = hashes(tmp_path / other / "out")
        assert {n: again[n] for n in shards} == {n: first[n] for n in shards}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_are_stored_in_the_dtype_of_the_model(tiny: Tiny, tmp_path: Path, dtype: torch.dtype) -> None:
    quantize.run(tiny(dtype=dtype), tmp_path / "out", recipe())
    made = tensors(tmp_path / "out")
    assert made[DOWN + ".weight_scale"].dtype == dtype and made["model.norm.weight"].dtype == dtype


def test_layers_and_ignore_reach_the_config(tiny: Tiny, tmp_path: Path) -> None:
    wish = recipe(
        layers={r"re:.*\.layers\.0\.mlp\.down_proj$": "w8a16-g128"}, ignore=[r"re:.*\.layers\.1\.self_attn\..*"]
    )
    report = quantize.run(tiny(), tmp_path / "out", wish)
    made = Checkpoint.open(tmp_path / "out")
    specs = compressed_tensors.specs(made.config, made.names)
    assert set(specs) == {m.name for m in report.modules}
    assert str(specs["model.layers.0.mlp.down_proj"]) == "w8a16-g128"
    assert str(specs["model.layers.1.mlp.down_proj"]) == "w4a16-g64"
    assert not any("layers.1.self_attn" in n or n == "lm_head" for n in specs)
    assert report.kept["model.layers.1.self_attn.o_proj"] == r"re:.*\.layers\.1\.self_attn\..*: recipe"


def test_progress_goes_up_to_the_total(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "ROW_WEIGHTS", 32 * 128)
    seen: list[Progress] = []
    quantize.run(tiny(), tmp_path / "out", recipe(), progress=seen.append)
    for phase in ("quantize", "verify"):
        mine = [p for p in seen if p.phase == phase]
        counts = [p.done for p in mine]
        assert counts == sorted(counts) and counts[-1] == mine[-1].total and mine[-1].unit == "bytes"
        assert len(mine) > 20 and mine[-1].eta_s == 0.0 and (mine[3].eta_s or 0) > 0
        assert any("down_proj" in p.label for p in mine)


def test_report_and_card(tiny: Tiny, tmp_path: Path) -> None:
    src, dst = tiny(), tmp_path / "out"
    report = quantize.run(src, dst, recipe(model="acme/tiny-llama"))
    assert Report.load(dst / "report.json") == report
    tree = json.loads((dst / "report.json").read_text())
    assert tree["schema"] == 1 and tree["status"] == "green"
    assert Recipe.parse(json.dumps(tree["recipe"])) == recipe(model="acme/tiny-llama")
    assert (
        tree["bytes"]["output"] == Checkpoint.open(dst).nbytes < tree["bytes"]["source"] == Checkpoint.open(src).nbytes
    )
    assert set(tree["versions"]) == {"percard", "torch", "python"} and set(tree["seconds"]) == {"quantize", "verify"}
    assert tree["modules"][0].keys() >= {"name", "spec", "method", "shape", "sqnr", "bytes_before", "bytes_after"}
    card = (dst / "README.md").read_text()
    assert "base_model: acme/tiny-llama" in card and "w4a16-g64" in card and "lm_head" in card and "**green**" in card


def test_a_card_of_the_source_stays(tiny: Tiny, tmp_path: Path) -> None:
    src, dst = tiny(), tmp_path / "out"
    (src / "README.md").write_text("theirs\n")
    (src / "report.json").write_text("{}")
    quantize.run(src, dst, recipe())
    assert (dst / "README.md").read_text() == "theirs\n" and "w4a16-g64" in (dst / "percard-card.md").read_text()
    assert Report.load(dst / "report.json").verb == "quantize"
    quantize.run(src, tmp_path / "bare", Recipe.parse("stages: [{quantize: {spec: w8a8}}]\noutput: {card: false}"))
    assert not (tmp_path / "bare" / "percard-card.md").exists()


def test_pickles_are_left_out_and_said(tiny: Tiny, tmp_path: Path) -> None:
    src = tiny()
    (src / "training_args.bin").write_bytes(b"\x80\x04.")
    report = quantize.run(src, tmp_path / "out", recipe())
    assert not (tmp_path / "out" / "training_args.bin").exists()
    assert any("training_args.bin" in text for text in report.warnings)


def test_force_replaces_only_when_the_new_one_is_complete(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = tiny(), tmp_path / "out"
    quantize.run(src, dst, recipe("w8a8"))
    old = hashes(dst)
    with pytest.raises(FileExistsError, match="--force"):
        quantize.run(src, dst, recipe())
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "_quantise", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            quantize.run(src, dst, recipe(), force=True)
    assert hashes(dst) == old and sorted(p.name for p in tmp_path.iterdir()) == ["out", "src"]
    quantize.run(src, dst, recipe(), force=True)
    assert hashes(dst) != old and sorted(p.name for p in tmp_path.iterdir()) == ["out", "src"]
    assert Report.load(dst / "report.json").modules[0].spec == "w4a16-g64"


def test_a_flagged_module_makes_the_report_red_and_the_files_stay(tiny: Tiny, tmp_path: Path) -> None:
    def two_sizes(tensors: dict[str, torch.Tensor]) -> None:
        weight = torch.full((128, 256), 0.05)  # less than half a step of what a few large weights ask for
        weight[:, :4] = 1.0
        tensors[DOWN + ".weight"] = weight.to(torch.bfloat16)

    src = tiny(change=two_sizes)
    report = quantize.run(src, tmp_path / "out", recipe("w4a16"))
    assert report.status == "red" and len(report.flags) == 1 and not report.failures
    assert DOWN in report.flags[0] and "dB" in report.flags[0]
    assert (tmp_path / "out" / "config.json").exists() and "**red**" in (tmp_path / "out" / "README.md").read_text()
    assert quantize.run(src, tmp_path / "out8", recipe("w8a8")).status == "green"
