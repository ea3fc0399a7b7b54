"""Rotation: the same logits from rotated tensors, for every family; outliers spread over all channels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from percard.formats import affine
from percard.formats.checkpoint import Checkpoint
from percard.formats.spec import FormatError, QuantSpec
from percard.kernels.rows import quantize
from percard.quant.methods import rotate
from percard.quant.methods.rotate import Orthogonal, Rotation

Tiny = Callable[..., Path]
KINDS = ["qwen2", "qwen3", "llama", "mistral", "qwen3_moe"]


def plan_of(config: dict, **options: object) -> Rotation:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    layers = config["num_hidden_layers"]
    return rotate.plan(hidden, heads, config["num_key_value_heads"], head_dim, layers, **options)


def rotated(folder: Path, out: Path, **options: object) -> Path:
    """The checkpoint in `folder` with every tensor rotated, untied where it was tied."""
    source = Checkpoint.open(folder)
    plan = plan_of(source.config, **options)
    tensors = {name: plan.apply(name, source.read(name), source.read).contiguous() for name in source.names}
    config = dict(source.config)
    if config["tie_word_embeddings"]:
        embeddings = source.read("model.embed_tokens.weight")
        tensors["lm_head.weight"] = plan.apply("lm_head.weight", embeddings, source.read)
        config["tie_word_embeddings"] = False
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    experts = "experts" in "".join(load_file_of(folder))  # torch multiplies all of them at once, not in fp64
    dtype = torch.float32 if experts else torch.float64
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_the_same(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    over = {} if kind == "llama" else {"hidden_size": 192}  # 64 x 3: an odd part as well
    folder = tiny(kind, dtype=torch.float32, **over, **({"head_dim": 48} if kind == "mistral" else {}))
    out = rotated(folder, tmp_path / "rotated", seed=3)
    ids = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(0))
    want, got = logits(folder, ids), logits(out, ids)
    assert float(want.abs().max()) > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    before, after = load_file_of(folder), load_file(out / "model.safetensors")
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert len(changed) >= 0.7 * len(before)
    kept = {n.rpartition("self_attn.")[2] for n in before if n not in changed}
    assert kept <= {"q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias"}
    assert all(bool((after[n] == 1).all()) for n in after if n.endswith("norm.weight") and "self_attn" not in n)


def load_file_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def test_biases_of_o_gate_up_and_down_are_turned_too(tiny: Tiny, tmp_path: Path) -> None:
    def biased(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            rows = tensors[name].shape[0]
            tensors[name.replace(".weight", ".bias")] = torch.randn(rows, generator=torch.Generator().manual_seed(rows))

    folder = tiny("llama", dtype=torch.float32, attention_bias=True, mlp_bias=True, change=biased)
    out = rotated(folder, tmp_path / "rotated")
    ids = torch.arange(24).view(2, 12)
    want = logits(folder, ids)
    torch.testing.assert_close(logits(out, ids), want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_values_may_stay_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen2", dtype=torch.float32)
    out = rotated(folder, tmp_path / "rotated", values=False)
    name = "model.layers.0.self_attn.v_proj.bias"
    assert torch.equal(load_file(out / "model.safetensors")[name], load_file_of(folder)[name])
    ids = torch.arange(12).view(1, 12)
    want = logits(folder, ids)
    torch.testing.assert_close(logits(out, ids), want, rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("size", [1, 2, 7, 64, 96, 128, 448, 3584])
def test_orthogonal_matrices(size: int) -> None:
    r = Orthogonal.random(size, 5)
    if size < 1000:
        m = r.matrix(torch.float64)
        torch.testing.assert_close(m @ m.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
        x = torch.randn(3, size, dtype=torch.float64)
        torch.testing.assert_close(r.right(x), x @ m, rtol=0, atol=1e-12)
        torch.testing.assert_close(r.left(x.T), m.T @ x.T, rtol=0, atol=1e-12)
        torch.testing.assert_close(r.left(x[0]), x[0] @ m, rtol=0, atol=1e-12)
    one = torch.zeros(1, size)
    one[0, size // 2] = 1  # an outlier channel is spread over all blocks of m
    out = r.right(one).view(-1, r.odd.shape[0])
    power = out.square().sum(1)
    torch.testing.assert_close(power, torch.full_like(power, 1 / len(power)), rtol=1e-5, atol=1e-7)


def test_seeds_decide_everything() -> None:
    first, again, other = (rotate.plan(96, 4, 2, 32, 2, seed=s) for s in (1, 1, 2))
    w, norm = torch.randn(64, 96), torch.rand(96)
    v = "model.layers.1.self_attn.v_proj.weight"
    a, b, c = (p.apply(v, w, lambda name: norm) for p in (first, again, other))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)
    assert not torch.allclose(a, first.apply(v.replace("1", "0"), w, lambda name: norm))  # each layer has its own R2


def test_row_ranges_can_come_alone_where_by_rows_says_so() -> None:
    plan = rotate.plan(96, 4, 2, 32, 2)
    norm, w = torch.rand(96), torch.randn(40, 96)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.gate_proj.weight"):
        assert plan.by_rows(name)
        whole = plan.apply(name, w, lambda n: norm)
        parts = [plan.apply(name, piece, lambda n: norm) for piece in w.split(13)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    for name in ("self_attn.o_proj.weight", "self_attn.v_proj.weight", "mlp.experts.3.down_proj.weight"):
        assert not plan.by_rows(f"model.layers.0.{name}")


def test_an_unknown_tensor_is_an_error() -> None:
    plan = rotate.plan(96, 4, 2, 32, 2)
    for name in (
        "model.layers.0.mlp.shared_expert_gate.weight",
        "visual.patch.weight",
        "model.layers.0.eh_proj.weight",
    ):
        with pytest.raises(FormatError, match=f"tensor {name} is unknown"):
            plan.apply(name, torch.randn(1, 96), lambda n: torch.ones(96))
    with pytest.raises(ValueError, match="no model"):
        rotate.plan(96, 3, 2, 32, 2)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama"}, None),
        ({"model_type": "qwen3", "tie_word_embeddings": True, "vocab_size": 10, "hidden_size": 4}, "of 40 weights"),
        ({"model_type": "gemma2"}, "1 \\+ weight"),
        ({"model_type": "mamba"}, "unknown model type"),
        ({"model_type": "qwen2_5_vl", "vision_config": {}}, "vision tower"),
        ({"model_type": "deepseek_v3", "num_nextn_predict_layers": 1}, "MTP"),
    ],
)
def test_refusals(config: dict, words: str | None) -> None:
    said = rotate.refusal(config)
    if words is None:
        assert said is None
    else:
        assert said is not None
        assert re.search(words, said)
    if "tie_word_embeddings" in config:
        assert rotate.refusal(config, untie=True) is None


def test_outlier_channels_cost_less_once_rotated() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(512, 448, generator=random)
    x[:, [5, 77, 300]] *= 60
    w = torch.randn(256, 448, generator=random) * 0.02
    w[:, [9, 100]] *= 12
    r = Orthogonal.random(448, 0)
    spec = QuantSpec.parse("w4a16")

    def errors(x: torch.Tensor, w: torch.Tensor) -> tuple[float, float]:
        exact = x @ w.T
        codes, scale, _ = quantize(x)
        four = affine.dequantize(affine.quantize(w, spec))
        return (
            float(((codes.float() * scale[:, None]) @ w.T - exact).square().mean()),
            float((w - four).square().mean()),
        )

    plain, turned = errors(x, w), errors(r.right(x), r.right(w))
    assert turned[0] < 0.1 * plain[0]  # int8 tokens
    assert turned[1] < 0.35 * plain[1]  # int4 rows
