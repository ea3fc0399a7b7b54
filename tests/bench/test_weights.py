"""What the engine runs: real, quantised and synthetic weights, the int8 head, and what it refuses to read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from percard.bench.engine import load, load_config, shape_names
from percard.bench.engine.config import parse_config
from percard.bench.engine.weights import join
from percard.formats import affine, compressed_tensors
from percard.formats.spec import FormatError, QuantSpec
from percard.formats.tensor import QuantTensor

BIG = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 64}
IDS = torch.arange(1, 25)[None]


def quantised_copy(source, target, spec: QuantSpec):
    """A compressed-tensors checkpoint of `source`, and the same weights dequantised in 16 bits."""
    tensors, raw = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    config = parse_config(raw, "x")
    modules = [f"model.layers.{i}.{m}" for i in range(config.layers) for m in config.linears()]
    plain, packed = dict(tensors), dict(tensors)
    for module in modules:
        qt = affine.quantize(tensors[f"{module}.weight"], spec, affine.scale_dtype_of(spec, torch.bfloat16))
        plain[f"{module}.weight"] = affine.dequantize(qt, torch.float32)
        del packed[f"{module}.weight"]
        for suffix, tensor in compressed_tensors.write(qt, torch.bfloat16).items():
            packed[f"{module}.{suffix}"] = tensor.contiguous()
    section = {"quantization_config": compressed_tensors.config(dict.fromkeys(modules, spec), ["lm_head"])}
    for folder, held, extra in ((target / "plain", plain, {}), (target / "packed", packed, section)):
        folder.mkdir(parents=True)
        save_file(held, str(folder / "model.safetensors"), metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(raw | extra))
    return target / "packed", target / "plain"


@pytest.mark.parametrize("name", ["w4a16-g64", "w4a16-g128-asym", "w4a16-g32", "w8a16-g128", "w8a16-asym"])
def test_a_quantised_checkpoint_runs_as_its_dequantised_twin(checkpoint, tmp_path, name):
    spec = QuantSpec.parse(name)
    packed, plain = quantised_copy(checkpoint("qwen2", **BIG), tmp_path, spec)
    ours = load(packed, device="cpu", dtype=torch.float32, impl="reference")
    twin = load(plain, device="cpu", dtype=torch.float32)
    assert ours.spec == spec and isinstance(ours.weights.blocks[0].qkv, QuantTensor)
    assert ours.kernel == f"matmul_{name[:5]}.reference"
    assert torch.allclose(ours.logits(IDS), twin.logits(IDS), atol=2e-3)
    assert ours.generate([[1, 2, 3]], 8, stop=()) == twin.generate([[1, 2, 3]], 8, stop=())


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a8-g64", "w4a16-g128", "w8a16-g64"])
def test_the_served_body_equals_the_reference(checkpoint, name):
    folder, spec = checkpoint("qwen3", **BIG), QuantSpec.parse(name)
    served = load(folder, spec=spec, device="cpu", head="int8-row")
    judge = load(folder, spec=spec, device="cpu", head="int8-row", impl="reference")
    assert ".cpu" in served.kernel and served.isa
    p, q = served.logits(IDS).log_softmax(-1), judge.logits(IDS).log_softmax(-1)
    # An activation that lies on a rounding edge may fall either way, so not bit for bit.
    assert (p.exp() * (p - q)).sum(-1).mean() < 1e-3


@pytest.mark.parametrize("name", ["w8a8", "w4a8-g64"])
def test_fused_producers_change_nothing(checkpoint, monkeypatch, name):
    """Norm, sum and SiLU in one op with the quantisation: by reference the very bits of the separate operations."""
    for dtype in (torch.float32, torch.bfloat16):
        folder = checkpoint("qwen3", **BIG)
        model = load(folder, spec=QuantSpec.parse(name), device="cpu", dtype=dtype, impl="reference")
        served = load(folder, spec=QuantSpec.parse(name), device="cpu", dtype=dtype)
        assert model.kernel.startswith("rmsnorm_quantize.reference + silu_mul_quantize.reference")
        cache = model.new_cache(1, 30)
        fused = [model.logits(IDS), model.prefill(IDS, cache), model.step(IDS[:, 3], cache), served.logits(IDS)]
        with monkeypatch.context() as patch:
            patch.setattr("percard.bench.engine.model.quantizes", lambda *args, **kwargs: False)
            cache = model.new_cache(1, 30)
            apart = [model.logits(IDS), model.prefill(IDS, cache), model.step(IDS[:, 3], cache), served.logits(IDS)]
        assert all(torch.equal(a, b) for a, b in zip(fused[:3], apart[:3], strict=True))
        p, q = fused[3].log_softmax(-1), apart[3].log_softmax(-1)
        assert (p.exp() * (p - q)).sum(-1).mean() < 1e-3


def test_quantised_models_stay_near_and_are_smaller(checkpoint):
    folder = checkpoint("qwen3", dtype=torch.float32, **BIG)
    exact = load(folder, device="cpu")
    p = exact.logits(IDS).log_softmax(-1)
    for name, worst in (("w8a8", 0.02), ("w4a16-g64", 0.5)):
        model = load(folder, spec=QuantSpec.parse(name), device="cpu")
        kl = (p.exp() * (p - model.logits(IDS).log_softmax(-1))).sum(-1).mean()
        assert 0 < kl < worst, f"{name}: {kl}"
        assert model.nbytes < exact.nbytes


def test_a_spec_without_a_kernel_is_dequantised_and_says_so(checkpoint):
    model = load(checkpoint("llama", **BIG), spec=QuantSpec.parse("w3a16-g64"), device="cpu")
    assert isinstance(model.weights.blocks[0].down, torch.Tensor)
    assert model.kernel == "torch, dequantised"
    assert any(note.startswith("w3a16-g64: dequantised to float32") for note in model.notes)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-untied"])
def test_int8_head_is_counted_and_the_embedding_stays(checkpoint, kind):
    model = load(checkpoint(kind, dtype=torch.bfloat16, torch_dtype="bfloat16", **BIG), device="cpu")
    int8 = model.with_head("int8-row")
    vocab, hidden = model.config.vocab, model.config.hidden
    assert isinstance(int8.weights.head, QuantTensor) and int8.head == "int8-row"
    assert int8.weights.embedding is model.weights.embedding
    replaced = 0 if model.config.tied else 2 * vocab * hidden
    assert vocab * hidden + 4 * vocab <= int8.nbytes - model.nbytes + replaced <= 1.5 * vocab * hidden
    error = (int8.logits(IDS) - model.logits(IDS)).abs().max()
    assert 0 < error < 0.5
    with pytest.raises(ValueError, match="16-bit head is gone"):
        int8.with_head("16bit")


def test_another_dtype_shares_quantised_weights(checkpoint):
    model = load(checkpoint("qwen2", **BIG), spec=QuantSpec.parse("w4a16-g64"), device="cpu", dtype=torch.bfloat16)
    wide = model.with_dtype(torch.float32)
    assert wide.weights.blocks[1].down.data.data_ptr() == model.weights.blocks[1].down.data.data_ptr()
    assert wide.weights.head is wide.weights.embedding and wide.logits(IDS).dtype == torch.float32
    p, q = wide.logits(IDS).log_softmax(-1), model.logits(IDS).log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.02


def test_joining_is_exact_and_a_mixture_is_dequantised():
    spec, notes = QuantSpec.parse("w4a16-g32-asym"), {}
    parts = [affine.quantize(torch.randn(n, 64), spec) for n in (8, 24)]
    joined = join(parts, torch.float32, notes)
    expected = torch.cat([affine.dequantize(part) for part in parts])
    assert torch.equal(affine.dequantize(joined), expected) and not notes
    mixed = join([parts[0], torch.ones(4, 64)], torch.float32, notes)
    assert isinstance(mixed, torch.Tensor) and mixed.shape == (12, 64) and len(notes) == 1


def test_synthetic_sides_start_from_equal_weights(monkeypatch, tmp_path):
    shape = json.loads((load_config.__globals__["SHAPES"] / "qwen3-0.6b.json").read_text())
    (tmp_path / "small.json").write_text(
        json.dumps(shape | BIG | {"num_key_value_heads": 1, "vocab_size": 300, "torch_dtype": "float32"})
    )
    monkeypatch.setitem(load_config.__globals__, "SHAPES", tmp_path)
    exact = load("shape:small", device="cpu")
    again, other = load("shape:small", device="cpu"), load("shape:small", device="cpu", seed=1)
    assert torch.equal(exact.weights.blocks[1].down, again.weights.blocks[1].down)
    assert not torch.equal(exact.weights.blocks[1].down, other.weights.blocks[1].down)
    assert not torch.equal(exact.weights.blocks[0].down, exact.weights.blocks[1].down)
    assert exact.weights.blocks[0].gate_up.std() == pytest.approx(128**-0.5, rel=0.05)
    spec = QuantSpec.parse("w8a8")
    coarse = load("shape:small", spec=spec, device="cpu", share=exact)
    assert coarse.weights.embedding is exact.weights.embedding and coarse.synthetic
    assert 35 < coarse.weights.sqnr_db < 55
    assert (coarse.logits(IDS) - exact.logits(IDS)).abs().max() < 0.5
    one = load("shape:small", layers=1, device="cpu")
    assert len(one.weights.blocks) == 1 and torch.equal(one.weights.blocks[0].o, exact.weights.blocks[0].o)


def test_every_shipped_shape_parses():
    sizes = {
        "qwen3-0.6b": 0.6e9,
        "qwen3-8b": 8.2e9,
        "qwen2.5-72b": 72.7e9,
        "llama-3.1-8b": 8.0e9,
        "qwen2.5-0.5b": 0.49e9,
    }
    assert set(sizes) <= set(shape_names())
    for name in shape_names():
        config = load_config(f"shape:{name}")
        total = config.layers * config.block_parameters() + config.vocab * config.hidden * (1 if config.tied else 2)
        if name in sizes:
            assert total == pytest.approx(sizes[name], rel=0.03), name
    with pytest.raises(FormatError, match=r"known: .*qwen3-8b"):
        load("shape:qwen9-9b")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "known: llama, qwen2, qwen3"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "known: default, linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor"),
        ({"hidden_act": "gelu"}, "known: silu"),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "sliding-window"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "not a multiple of 3"),
        ({"torch_dtype": "int8"}, "known: float32"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"head_dim": 33}, "odd"),
    ],
)
def test_a_config_that_would_run_wrongly_is_refused(checkpoint, change, words):
    raw = json.loads((checkpoint("llama") / "config.json").read_text())
    with pytest.raises(FormatError, match=r"here/config\.json: ") as error:
        parse_config(raw | change, "x", "here/config.json")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_both_forms_of_rope_settings_mean_the_same(checkpoint):
    raw = json.loads((checkpoint("llama3-rope") / "config.json").read_text())
    new = {k: v for k, v in raw.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = raw["rope_scaling"] | {"rope_theta": raw["rope_theta"]}
    assert parse_config(new, "x").rope == parse_config(raw, "x").rope


def test_bad_checkpoints_are_named(checkpoint, tmp_path):
    source = checkpoint("qwen3")
    raw, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")

    def write(name: str, held: dict, config: dict):
        folder = tmp_path / name
        folder.mkdir()
        save_file(held, str(folder / "model.safetensors"), metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    less = {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load(write("less", less, raw), device="cpu")
    with pytest.raises(FormatError, match=r"config\.json says"):
        load(write("wide", tensors, raw | {"intermediate_size": 161}), device="cpu")
    with pytest.raises(FormatError, match="quant_method 'gguf' is not known"):
        load(write("other", tensors, raw | {"quantization_config": {"quant_method": "gguf"}}), device="cpu")
    with pytest.raises(FormatError, match=r"layers=4 is outside 1 \.\. 3"):
        load(source, layers=4, device="cpu")
    with pytest.raises(FormatError, match="nothere"):
        load(tmp_path / "nothere", device="cpu")
    with pytest.raises(FormatError, match="not divisible by group 64"):
        load(source, spec=QuantSpec.parse("w4a16-g64"), device="cpu")


def test_a_quantised_checkpoint_cannot_become_another_spec(checkpoint, tmp_path):
    packed, _ = quantised_copy(checkpoint("qwen2", **BIG), tmp_path, QuantSpec.parse("w8a8"))
    assert load(packed, device="cpu", spec=QuantSpec.parse("w8a8")).spec == QuantSpec.parse("w8a8")
    with pytest.raises(FormatError, match="is w8a8 already, not w4a8"):
        load(packed, device="cpu", spec=QuantSpec.parse("w4a8"))
