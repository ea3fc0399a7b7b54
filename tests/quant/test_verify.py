"""verify finds every planted fault, and none where there is none."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from percard.formats.checkpoint import Checkpoint
from percard.formats.spec import FormatError
from percard.quant import fidelity, promote, quantize
from percard.quant.methods import rotate
from percard.quant.pair import Pair, _widths
from percard.quant.progress import Progress
from percard.quant.recipe import Recipe
from percard.quant.report import Report
from percard.quant.transforms import FILE, Transforms
from percard.quant.verify import verify

Tiny = Callable[..., Path]
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def pair(tiny: Tiny, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """`pair(spec, kind)` -> (source, quantised)."""

    def make(spec: str = "w4a16-g64", kind: str = "llama") -> tuple[Path, Path]:
        src = tiny(kind)
        quantize.run(src, tmp_path / "out", Recipe.from_flags(spec=spec))
        return src, tmp_path / "out"

    return make


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrites the one shard of `folder` after `change`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("spec", ["w4a16-g64", "w4a16-g64-asym", "w8a8", "w4a8-g64", "w3a16-g64"])
@pytest.mark.parametrize("level", ["bytes", "weights"])
def test_what_we_write_is_green(pair: Callable[..., tuple[Path, Path]], spec: str, level: str) -> None:
    src, dst = pair(spec)
    seen: list[Progress] = []
    report = verify(dst, src, level=level, progress=seen.append)
    assert report.status == "green" and not report.failures and not report.flags and report.verb == "verify"
    assert len(report.modules) == 14 and report.checks["quantised"] == 14
    assert all((m.sqnr is not None) == (level == "weights") for m in report.modules)
    assert set(report.checks["side_files"]) == {"LICENSE", "tokenizer.json"}
    assert seen[-1].done == seen[-1].total


def swap_rows(tensors: dict[str, torch.Tensor]) -> None:
    for suffix in ("weight_packed", "weight_scale"):
        tensors[f"{UP}.{suffix}"] = tensors[f"{UP}.{suffix}"].roll(1, 0).contiguous()


FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str, str]] = {
    "norm changed": (lambda t: t["model.norm.weight"].add_(1), "bytes", "model.norm.weight differs"),
    "one bit of an embedding": (
        lambda t: t["model.embed_tokens.weight"].view(torch.int16)[95, 127:].bitwise_xor_(1),
        "bytes", "embed_tokens.weight differs",
    ),
    "tensor missing": (lambda t: t.pop("model.norm.weight"), "bytes", "model.norm.weight is missing"),
    "scale missing": (lambda t: t.pop(f"{UP}.weight_scale"), "bytes", "weight_scale is missing"),
    "tensor too many": (lambda t: t.update(extra=torch.ones(1)), "bytes", "extra should not be there"),
    "packed too narrow": (
        lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"][:, 1:].contiguous()}), "bytes", "expected",
    ),
    "scale in another dtype": (
        lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"].float()}), "bytes", "is torch.float32",
    ),
    "wrong shape said": (lambda t: t[f"{UP}.weight_shape"].add_(1), "weights", "weight_shape says [257, 129]"),
    "scale of NaN": (lambda t: t[f"{UP}.weight_scale"][2:3].fill_(float("nan")), "weights", "NaN or Inf"),
    "scale of zero": (lambda t: t[f"{UP}.weight_scale"][2:3].zero_(), "weights", "not finite and above zero"),
    "scale negative": (lambda t: t[f"{UP}.weight_scale"][2:3].neg_(), "weights", "not finite and above zero"),
    "rows shifted": (swap_rows, "weights", "SQNR"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults(pair: Callable[..., tuple[Path, Path]], name: str) -> None:
    src, dst = pair()
    change, level, says = FAULTS[name]
    edit(dst, change)
    report = verify(dst, src, level=level)
    texts = [*report.failures, *report.flags]
    assert report.status == "red" and len(texts) == 1, texts
    assert says in texts[0] and (UP in texts[0] or "model." in texts[0] or "extra" in texts[0])


def test_swapped_experts_are_loud(pair: Callable[..., tuple[Path, Path]]) -> None:
    src, dst = pair(kind="qwen3_moe")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        one, two = (f"model.layers.1.mlp.experts.{e}.up_proj." for e in (0, 2))
        for suffix in ("weight_packed", "weight_scale"):
            tensors[one + suffix], tensors[two + suffix] = tensors[two + suffix], tensors[one + suffix]

    edit(dst, swap)
    report = verify(dst, src)
    assert report.status == "red" and len(report.flags) == 2 and all("experts" in f for f in report.flags)


def test_methods_that_spend_weight_error_for_output_error_have_another_limit(
    pair: Callable[..., tuple[Path, Path]],
) -> None:
    src, dst = pair("w4a16-g128", "llama")
    edit(dst, lambda t: t[f"{UP}.weight_scale"].mul_(1.4))  # about 8 dB
    said = Report.load(dst / "report.json")
    assert len(verify(dst, src).flags) == 1
    methods = {"rtn": 1, "gptq": 0, "awq+gptq": 0}
    for method, flags in methods.items():
        named = tuple(dataclasses.replace(m, method=method) for m in said.modules)
        assert len(verify(dst, src, said=dataclasses.replace(said, modules=named)).flags) == flags
    edit(dst, lambda t: t[f"{UP}.weight_scale"].mul_(1.4))  # about 0 dB
    assert len(verify(dst, src, said=dataclasses.replace(said, modules=named)).flags) == 1


def test_whole_experts_swapped_are_loud_without_a_text(pair: Callable[..., tuple[Path, Path]]) -> None:
    src, dst = pair("w8a8", "qwen3_moe")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".experts.0." in n]:
            other = name.replace(".experts.0.", ".experts.1.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    edit(dst, swap)
    report = verify(dst, src, level="weights")
    found = {f.partition(":")[0] for f in report.flags}
    assert report.status == "red"
    assert found == {f"model.layers.1.mlp.experts.{e}.{n}_proj" for e in (0, 1) for n in ("gate", "up", "down")}


def test_side_files_and_config(pair: Callable[..., tuple[Path, Path]]) -> None:
    src, dst = pair()
    (dst / "tokenizer.json").write_text("{}")
    (dst / "LICENSE").unlink()
    config = json.loads((dst / "config.json").read_text())
    (dst / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    texts = verify(dst, src, level="bytes").failures
    assert len(texts) == 3
    for word in ("tokenizer.json: differs", "LICENSE: is missing", "differs from the source in rope_theta"):
        assert any(word in text for text in texts), texts


def test_the_wrong_source(pair: Callable[..., tuple[Path, Path]], tiny: Tiny) -> None:
    _, dst = pair()

    def other(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            tensors[name] = tensors[name].flip(0).contiguous()

    report = verify(dst, tiny(name="other", change=other))
    assert len(report.flags) == 14 and "right source" in report.flags[0]


def test_folders_that_are_no_pair(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    src, dst = pair()
    with pytest.raises(FormatError, match=r"config\.json: no quantization_config"):
        verify(src, src)
    with pytest.raises(FormatError, match="already quantised"):
        verify(dst, dst)
    with pytest.raises(FormatError, match="no such folder"):
        verify(tmp_path / "nowhere", src)
    with pytest.raises(ValueError, match="bytes, weights, blocks, model"):
        verify(dst, src, level="all")
    for level in ("blocks", "model"):
        with pytest.raises(FormatError, match="--text FILE"):
            verify(dst, src, level=level)


# -- transformed weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def transformed(tiny: Tiny, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """`transformed(kind)` -> (source, quantised after scales were moved, which lie beside it)."""

    def make(kind: str) -> tuple[Path, Path]:
        src = tiny(kind, max_position_embeddings=64)
        pair = Pair.open(quantised(src, tmp_path / "plain"), src)
        random = torch.Generator().manual_seed(5)
        kv, group, d = pair.transforms.kv
        scales = {}
        for key, size in _widths(pair.found).items():
            scale = torch.rand(size, generator=random) + 0.5
            if key.endswith("v_proj"):
                scale = scale.view(kv, group, d)[:, :1].expand(kv, group, d).reshape(-1).contiguous()
            scales[key] = scale
        moved = Transforms(pair.transforms.kv, scales)

        def change(tensors: dict[str, torch.Tensor]) -> None:
            before = dict(tensors)
            for name, tensor in before.items():
                if moved.touches(name):
                    tensors[name] = moved.apply(name, tensor, before.__getitem__).to(tensor.dtype)

        twin = tiny(kind, name="twin", change=change, max_position_embeddings=64)
        quantised(twin, tmp_path / "out")
        (tmp_path / "out" / FILE).write_bytes(moved.to_bytes())
        return src, tmp_path / "out"

    return make


def quantised(src: Path, dst: Path, spec: str = "w4a16-g64") -> Path:
    quantize.run(src, dst, Recipe.from_flags(spec=spec))
    return dst


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe", "llama"])
def test_transformed_weights_are_compared_with_the_transformed_source(
    transformed: Callable[[str], tuple[Path, Path]], kind: str
) -> None:
    src, dst = transformed(kind)
    report = verify(dst, src)
    assert report.status == "green", (report.failures, report.flags)
    # norms; with qwen2 the bias of v, with experts the router
    assert report.checks["transformed"] == {"qwen2": 6, "qwen3_moe": 5, "llama": 4}[kind]
    bare = dst.parent / "bare"
    shutil.copytree(dst, bare)
    (bare / FILE).unlink()
    report = verify(bare, src)
    assert report.status == "red" and len(report.failures) == {"qwen2": 6, "qwen3_moe": 5, "llama": 4}[kind]


@pytest.mark.parametrize(
    "name",
    ["input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.v_proj.bias", "self_attn.k_proj.bias"],
)
def test_what_a_transform_touched_is_held_to_the_last_bit(
    transformed: Callable[[str], tuple[Path, Path]], name: str
) -> None:
    src, dst = transformed("qwen2")
    edit(dst, lambda t: t[f"model.layers.1.{name}"].view(torch.int16)[3:4].bitwise_xor_(1))
    (text,) = verify(dst, src, level="bytes").failures
    assert f"model.layers.1.{name} differs from the source's" in text
    assert ("after the transforms" in text) == ("k_proj" not in name)


def test_scales_of_another_model_are_refused(transformed: Callable[[str], tuple[Path, Path]]) -> None:
    src, dst = transformed("llama")
    good = Transforms.read_scales(dst)
    (dst / FILE).write_bytes(Transforms((1, 1, 1), {**good, "model.layers.9.mlp.up_proj": torch.ones(4)}).to_bytes())
    with pytest.raises(FormatError, match=r"layers\.9\.mlp\.up_proj has 4 scales"):
        verify(dst, src)


@pytest.fixture
def rotated(tiny: Tiny, tmp_path: Path) -> Callable[[str], tuple[Path, Path, Report]]:
    """`rotated(kind)` -> (source, quantised after a rotation and scales, its report); a tied head is untied."""

    def make(kind: str) -> tuple[Path, Path, Report]:
        src = tiny(kind, max_position_embeddings=64, dtype=torch.float32)
        source = Checkpoint.open(src)
        random = torch.Generator().manual_seed(5)
        scales = {"model.layers.1.mlp.up_proj": torch.rand(256, generator=random) + 0.5} if kind != "qwen3_moe" else {}
        turned = Transforms((2, 2, 32), scales, rotate.plan(128, 4, 2, 32, 2, seed=3, values=True))
        tied = bool(source.config["tie_word_embeddings"])

        def change(tensors: dict[str, torch.Tensor]) -> None:
            before = dict(tensors)
            if tied:
                before["lm_head.weight"] = before["model.embed_tokens.weight"]
            for name, tensor in before.items():
                tensors[name] = turned.apply(name, tensor, before.__getitem__)

        twin = tiny(
            kind, name="twin", change=change, max_position_embeddings=64, dtype=torch.float32, tie_word_embeddings=False
        )
        out = quantised(twin, tmp_path / "out", "w8a16")
        (out / FILE).write_bytes(turned.to_bytes())
        said = Report.load(out / "report.json")
        stage = {"spec": "w8a16", "methods": [{"rotate": {"seed": 3, "values": True, "untie": tied}}, {"rtn": {}}]}
        return src, out, dataclasses.replace(said, recipe={"stages": [{"quantize": stage}]})

    return make


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_rotated_weights_are_compared_with_the_rotated_source(
    rotated: Callable[[str], tuple[Path, Path, Report]], kind: str
) -> None:
    src, dst, said = rotated(kind)
    report = verify(dst, src, said=said)
    assert report.status == "green", (report.failures, report.flags)
    (dst / "report.json").write_text(said.to_json())
    ids = torch.randint(0, 96, (100,), generator=torch.Generator().manual_seed(2))
    found = fidelity.measure(Pair.open(dst, src), list(ids.split(64)), falls=True)
    assert found.gate is not None and found.gate.kl < 1e-4 and found.gate.top1 > 0.95
    assert all((layer.error or 1) < 0.05 for layer in found.layers)  # blocks are compared where the rotation put them
    for layer in found.layers:
        gained = sum(fall.now - fall.then for fall in found.falls if fall.block == layer.index)
        assert gained == pytest.approx(layer.noise, rel=0.5)
    edit(dst, lambda t: t["model.norm.weight"].mul_(1.5))
    assert "model.norm.weight differs" in verify(dst, src).failures[0]


def test_a_rotation_that_nobody_mentions_is_loud(rotated: Callable[[str], tuple[Path, Path, Report]]) -> None:
    src, dst, _ = rotated("llama")
    report = verify(dst, src)
    assert report.status == "red" and any("embed_tokens" in text for text in report.failures) and report.flags


def test_a_head_that_was_untied_is_compared_too(
    rotated: Callable[[str], tuple[Path, Path, Report]], tmp_path: Path
) -> None:
    src, dst, said = rotated("qwen3")
    promote.rewrite(dst, src, tmp_path / "new", {"model.layers.0.mlp.down_proj": None}, said=said)
    assert verify(tmp_path / "new", src, said=said).status == "green"
    edit(dst, lambda t: t["lm_head.weight"].mul_(1.5))
    (text,) = verify(dst, src, said=said).failures
    assert "lm_head.weight differs" in text


# -- with a text --------------------------------------------------------------------------------------------------------

TRAINED = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised(TRAINED, tmp_path_factory.mktemp("trained") / "w4", "w4a16-g64")


def test_a_text_adds_layers_and_a_gate(trained: Path) -> None:
    text = TRAINED / "heldout.txt"
    report = verify(trained, TRAINED, level="model", text=text, tokens=600)
    assert report.status == "green" and report.gate is not None and report.gate.gate == "green"
    assert 0.001 < report.gate.kl < 0.03 and report.gate.text == "heldout.txt" and report.gate.spec == "w4a16-g64"
    assert report.gate.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert [layer.index for layer in report.layers] == list(range(8))
    assert all(0.01 < (layer.error or 0) < 0.5 and layer.noise for layer in report.layers)
    engines = {row["engine"]: row for row in report.accepts}
    assert engines["vllm"]["spec"] == "w4a16-g64" and engines["vllm"]["versions"].startswith("==")
    blocks = verify(trained, TRAINED, level="blocks", text=text, tokens=600)
    assert blocks.gate is None and blocks.level == "blocks" and len(blocks.layers) == 8


def test_a_report_of_another_tool_is_not_read(trained: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(trained, tmp_path / "made"))
    (made / "report.json").write_text('{"mood": 3}')
    report = verify(made, TRAINED, level="bytes")
    assert report.status == "green" and "is not known" in report.warnings[-1]
    recipe = {"stages": [{"quantize": {"methods": [{"rotate": {"seed": "x"}}]}}]}
    with pytest.raises(FormatError, match="its recipe cannot be read"):
        verify(made, TRAINED, said=dataclasses.replace(Report.load(trained / "report.json"), recipe=recipe))


def test_three_bits_are_never_green(tiny: Tiny, tmp_path: Path) -> None:
    src = tiny("llama", max_position_embeddings=64)
    (tmp_path / "held.jsonl").write_text(json.dumps({"ids": [i % 96 for i in range(100)]}))
    quantised(src, tmp_path / "out", "w3a16-g64")
    report = verify(tmp_path / "out", src, level="model", text=tmp_path / "held.jsonl")
    assert report.gate is not None and report.gate.gate == "none" and report.status == "none"
    assert report.gate.kl > 0 and report.gate.reasons == (
        "3-bit weights have no gate: figures are printed, never green",
    )


def test_a_missed_gate_is_red(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fidelity.THRESHOLDS, 4, {"kl": 1e-4, "top1": 0.0, "perplexity": 1.0})
    report = verify(trained, TRAINED, level="model", text=TRAINED / "heldout.txt", tokens=300)
    assert report.status == "red" and not report.flags and not report.failures
    assert report.gate is not None and "KL" in report.gate.reasons[0]


def test_the_calibration_text_is_no_held_out_text(trained: Path) -> None:
    text = TRAINED / "heldout.txt"
    said = Report.load(trained / "report.json")
    said = dataclasses.replace(
        said, calibration={"source": str(text), "sha256": hashlib.sha256(text.read_bytes()).hexdigest()}
    )
    report = verify(trained, TRAINED, level="model", text=text, tokens=200, said=said)
    assert report.status == "red" and "the text is the calibration text" in report.flags[0]
    assert report.gate is not None and report.gate.gate == "green"


def test_broken_files_are_not_run(trained: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(trained, tmp_path / "bad"))
    edit(bad, lambda t: t["model.norm.weight"].add_(1))
    report = verify(bad, TRAINED, level="model", text=TRAINED / "heldout.txt", tokens=200)
    assert report.status == "red" and report.gate is None and "level model was not reached" in report.warnings[-1]
