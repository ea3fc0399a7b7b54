"""Both models side by side: the engine's figures without the engine, the errors of blocks, the thresholds of the gate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from percard.bench import engine, quality
from percard.formats import affine
from percard.formats.spec import FormatError, QuantSpec
from percard.quant import fidelity, heldout, quantize
from percard.quant.pair import Pair
from percard.quant.progress import Progress
from percard.quant.recipe import Recipe
from percard.quant.report import Gate

from .conftest import CONFIGS

Tiny = Callable[..., Path]
TRAINED = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen3"
GOOD = Gate("none", 0.001, 0.99, 10.01, 10.0, 1000, "", "")


def windows(count: int, length: int, last: int = 0) -> list[torch.Tensor]:
    """Random ids of the small models; `last` tokens of a shorter window at the end."""
    ids = torch.randint(0, 96, (count * length + last,), generator=torch.Generator().manual_seed(7))
    return list(ids.split(length))


def made(tiny: Tiny, tmp_path: Path, kind: str, spec: str, **over: object) -> Pair:
    src = tiny(kind, max_position_embeddings=64, **over)
    quantize.run(src, tmp_path / "out", Recipe.from_flags(spec=spec))
    return Pair.open(tmp_path / "out", src)


@pytest.mark.parametrize("spec", ["w4a16-g64", "w8a8"])
def test_a_trained_model_gets_the_figures_of_the_engine(tmp_path: Path, spec: str) -> None:
    quantize.run(TRAINED, tmp_path / "out", Recipe.from_flags(spec=spec))
    pair = Pair.open(tmp_path / "out", TRAINED)
    ids = quality.read_ids(TRAINED / "heldout.txt", TRAINED, 2600)
    text = heldout.read(TRAINED / "heldout.txt", TRAINED, 4096, fidelity.window_of(pair.source.config), 2600)
    assert torch.equal(text.ids, ids) and [len(p) for p in text.pieces] == [len(p) for p in quality.windows(ids, 512)]
    found = fidelity.measure(pair, text.pieces).gate
    reference, model = (engine.load(p, dtype=torch.float32, device="cpu") for p in (TRAINED, tmp_path / "out"))
    expected = quality.compare(reference, model, ids)
    assert found is not None and found.kl == pytest.approx(expected.kl, abs=1e-5) and found.kl > 1e-4
    assert found.top1 == pytest.approx(expected.top1, abs=2e-3) and found.tokens == expected.tokens
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-3)
    assert found.perplexity_reference == pytest.approx(expected.perplexity_reference, rel=1e-6)
    assert found.protocol == f"{expected.protocol}, block by block"


@pytest.mark.parametrize("kind", [k for k in CONFIGS if k != "mistral"])  # which the engine does not run
@pytest.mark.parametrize("spec", ["w4a16-g64", "w8a8"])
def test_every_family_gets_the_figures_of_the_engine(tiny: Tiny, tmp_path: Path, kind: str, spec: str) -> None:
    pair = made(tiny, tmp_path, kind, spec)
    pieces = windows(3, 64, 20)
    found = fidelity.measure(pair, pieces).gate
    reference, model = (engine.load(p, dtype=torch.float32, device="cpu") for p in (pair.source.path, pair.made.path))
    expected = quality.compare(reference, model, torch.cat(pieces))
    assert found is not None and found.kl == pytest.approx(expected.kl, abs=1e-5) and found.kl > 0
    assert found.top1 == pytest.approx(expected.top1, abs=0.01) and found.tokens == expected.tokens == 208


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_errors_of_blocks_are_what_they_are_said_to_be(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    pair = made(tiny, tmp_path, kind, "w4a16-g64", dtype=torch.float32)
    pieces = windows(2, 32)
    found = fidelity.measure(pair, pieces, level="blocks")
    assert found.gate is None and [layer.index for layer in found.layers] == [0, 1]
    from transformers import AutoModelForCausalLM

    models = []
    for fake in (False, True):
        model = AutoModelForCausalLM.from_pretrained(pair.source.path, dtype=torch.float32).eval()
        if fake:
            for linear in pair.linears:
                value = affine.dequantize(pair.read(linear.tensor))
                _put(model, linear.name, value)
        models.append(model)
    ids = torch.stack(pieces)
    with torch.no_grad():
        states = models[0](input_ids=ids, output_hidden_states=True).hidden_states
    seen: list[torch.Tensor] = []
    block = models[1].model.layers[0]
    block.register_forward_hook(lambda module, given, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        models[1](input_ids=ids)
    x, y, ours = states[0], states[1], seen[0]
    assert found.layers[0].error == pytest.approx(float((ours - y).norm() / (y - x).norm()), rel=1e-3)
    noise = (ours - y).square().sum(-1) / y.square().sum(-1)
    assert found.layers[0].noise == pytest.approx(float(noise.mean()), rel=1e-3)


def _put(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """A weight into transformers' model, which holds the experts of a layer as one tensor."""
    path, _, leaf = name.rpartition(".")
    if ".experts." not in path:
        model.get_submodule(name).weight.data.copy_(value)
        return
    experts = model.get_submodule(path.rpartition(".")[0])
    e, half = int(path.rpartition(".")[2]), value.shape[0]
    if leaf == "down_proj":
        experts.down_proj.data[e].copy_(value)
    else:
        start = 0 if leaf == "gate_proj" else half
        experts.gate_up_proj.data[e, start : start + half].copy_(value)


def test_hidden_states_in_files_give_the_same_numbers(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = made(tiny, tmp_path, "llama", "w4a16-g64")
    pieces = windows(5, 32, 9)
    held = fidelity.measure(pair, pieces)
    monkeypatch.setattr(fidelity, "IN_MEMORY", 0)
    monkeypatch.setattr(fidelity, "_BATCH", 64)
    work = tmp_path / "work"
    work.mkdir()
    files: list[int] = []
    seen: list[Progress] = []

    def watch(event: Progress) -> None:
        seen.append(event)
        files.append(sum(1 for p in work.rglob("*.safetensors")))

    spilled = fidelity.measure(pair, pieces, work=work, progress=watch)
    assert files == [2, 2] and not list(work.iterdir())  # one a chain; gone at the end
    assert [(e.done, e.total, e.unit) for e in seen] == [(1, 2, "blocks"), (2, 2, "blocks")]
    assert spilled.gate is not None and held.gate is not None
    assert spilled.gate.kl == pytest.approx(held.gate.kl, rel=1e-4)
    for a, b in zip(spilled.layers, held.layers, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-4)


def test_a_model_against_itself_is_perfect(tiny: Tiny, tmp_path: Path) -> None:
    pair = made(tiny, tmp_path, "llama", "w4a16-g64", dtype=torch.float32)

    def rounded(tensors: dict[str, torch.Tensor]) -> None:
        for linear in pair.linears:
            tensors[linear.tensor] = affine.dequantize(pair.read(linear.tensor))

    twin = tiny("llama", name="twin", dtype=torch.float32, change=rounded, max_position_embeddings=64)
    found = fidelity.measure(Pair.open(pair.made.path, twin), windows(1, 64))
    gate = found.gate
    assert gate is not None and gate.kl == 0 and gate.top1 == 1 and gate.perplexity == gate.perplexity_reference
    assert all(layer.error == 0 and layer.noise == 0 for layer in found.layers)


def test_falls_name_every_set_and_what_16_bits_would_gain(tiny: Tiny, tmp_path: Path) -> None:
    pair = made(tiny, tmp_path, "qwen3_moe", "w4a8-g64", dtype=torch.float32)
    found = fidelity.measure(pair, windows(2, 64), level="blocks", falls=True)
    names = [fall.together.removeprefix("model.layers.") for fall in found.falls]
    assert names == [
        "0.self_attn.q_proj", "0.self_attn.o_proj", "0.mlp.gate_proj", "0.mlp.down_proj",
        "1.self_attn.q_proj", "1.self_attn.o_proj", "1.mlp.experts",
    ]  # fmt: skip
    assert [len(fall.modules) for fall in found.falls] == [3, 1, 2, 1, 3, 1, 9]
    for fall in found.falls:
        assert fall.now == found.layers[fall.block].noise and 0 <= fall.then < fall.now
    # All sets at 16 bits leave nothing: the falls of a block add up to about its noise.
    for layer in found.layers:
        total = sum(fall.now - fall.then for fall in found.falls if fall.block == layer.index)
        assert total == pytest.approx(layer.noise, rel=0.3)


def test_the_thresholds_are_those_of_the_bench() -> None:
    assert fidelity.THRESHOLDS == quality.THRESHOLDS and fidelity.SMALL == quality.SMALL
    for spec in ("w8a8", "w4a16-g128", "w3a16-g64", "w4a8-g64"):
        for change in (
            {},
            {"kl": 0.02},
            {"kl": 0.04},
            {"top1": 0.95},
            {"top1": 0.9},
            {"perplexity": 10.15},
            {"kl": math.nan},
        ):
            for small in (False, True):
                ours = fidelity.judged(dataclasses.replace(GOOD, **change), QuantSpec.parse(spec), small)
                both = quality.Quality(**({k: getattr(GOOD, k) for k in ("kl", "top1", "perplexity", "perplexity_reference", "tokens", "protocol")} | change))  # fmt: skip
                word, reasons = quality.gate(both, spec, small)
                assert (ours.gate, list(ours.reasons)) == (word, reasons), (spec, change, small)
    assert fidelity.judged(GOOD, QuantSpec.parse("w3a16-g64"), False).gate == "none"
    assert set(fidelity.judged(GOOD, QuantSpec.parse("w8a8"), True).limits) == {"kl", "top1"}


def test_texts_that_cannot_be_scored(tiny: Tiny, tmp_path: Path) -> None:
    pair = made(tiny, tmp_path, "llama", "w8a8")
    with pytest.raises(FormatError, match="token 96, the model knows 96"):
        fidelity.measure(pair, [torch.tensor([1, 96])])
    with pytest.raises(FormatError, match="fewer than 2 tokens"):
        fidelity.measure(pair, [torch.tensor([1])])


def test_a_quantised_head_is_scored_with_its_values(tiny: Tiny, tmp_path: Path) -> None:
    src = tiny("llama", max_position_embeddings=64, dtype=torch.float32)
    recipe = dataclasses.replace(Recipe.from_flags(spec="w8a8", ignore=["model.norm"]), replace_ignore=True)
    quantize.run(src, tmp_path / "out", recipe)
    pair = Pair.open(tmp_path / "out", src)
    assert "lm_head" in pair.specs
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    scale = x.abs().amax(1, keepdim=True) / 127
    expected = F.linear((x / scale).round() * scale, affine.dequantize(pair.read("lm_head.weight")))
    torch.testing.assert_close(fidelity._head(pair.read, "lm_head.weight")(x), expected, rtol=1e-5, atol=1e-5)
    gate = fidelity.measure(pair, windows(1, 64)).gate
    assert gate is not None and "head w8a8" in gate.protocol


def test_memory_and_disk_follow_the_text(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = made(tiny, tmp_path, "qwen3_moe", "w8a8")
    block = max(sum(4 * n * k for n, k in (x.shape for x in b)) for b in pair.found.blocks())
    states = 2 * 4 * 1000 * 128
    held = fidelity.memory(pair.source, pair.found, 1000)
    assert held > 2 * block + states and fidelity.disk(pair.source, 1000) == 0
    monkeypatch.setattr(fidelity, "IN_MEMORY", states - 1)
    assert fidelity.memory(pair.source, pair.found, 1000) == held - states
    assert fidelity.disk(pair.source, 1000) == 2 * states
