"""Calibrated quantisation of small random models of every family: what is written, by which statistics, and what it is worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from percard.formats import affine, compressed_tensors
from percard.formats.checkpoint import Checkpoint
from percard.formats.spec import FormatError, QuantSpec
from percard.quant import quantize, verify, walk
from percard.quant.blocks import Frame
from percard.quant.methods.gptq import gptq
from percard.quant.methods.records import Stats
from percard.quant.pair import Pair
from percard.quant.recipe import Recipe, RecipeError
from percard.quant.transforms import Transforms

from .conftest import CONFIGS
from .test_resume import with_text

Tiny = Callable[..., Path]


def recipe(src: Path, spec: str = "w4a16-g64", method: str = "gptq", **over: Any) -> Recipe:
    return Recipe.from_flags(
        spec=spec, method=method, calibration=src / "calibration.jsonl", seq_len=32, samples=64, **over
    )


def source(tiny: Tiny, kind: str, windows: int = 24, **over: Any) -> Path:
    return with_text(tiny(kind, max_position_embeddings=64, **over), windows)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("spec", ["w4a16-g64", "w8a8"])
def test_every_family_is_quantised_verified_and_loaded(tiny: Tiny, tmp_path: Path, kind: str, spec: str) -> None:
    from transformers import AutoModelForCausalLM

    src, out = source(tiny, kind), tmp_path / "out"
    report = quantize.run(src, out, recipe(src, spec))
    assert report.status == "green" and {m.method for m in report.modules} == {"gptq"}
    assert all(m.facts["loss"] >= 0 and m.facts["fallbacks"] == [] for m in report.modules)
    assert verify.verify(out, src, level="weights").status == "green"
    ids = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    if kind == "qwen3_moe" and spec == "w8a8":
        return  # compressed-tensors 0.19 loads no int8 experts
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32).eval()
    with torch.no_grad():
        a, b = model(input_ids=ids).logits, plain(input_ids=ids).logits
    assert float((a - b).norm() / b.norm()) < (0.35 if spec == "w4a16-g64" else 0.05)


def exact(src: Path, out: Path) -> Callable[[str], torch.Tensor]:
    """What the transforms made of a source tensor, by what lies beside the checkpoint."""
    made = Checkpoint.open(src)
    scales = Transforms.read_scales(out)
    kv = walk.kv_heads(made.config, "here")
    return lambda name: Transforms(kv, scales).apply(name, made.read(name), made.read)


METHODS = [("awq", "w4a16-g64"), ("awq", "w3a16-g64"), ("smoothquant", "w8a8"), ("smoothquant", "w4a8-g64")]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("method", "spec"), METHODS)
def test_transforms_keep_the_function(tiny: Tiny, tmp_path: Path, kind: str, method: str, spec: str) -> None:
    """With nothing rounded hard the transformed 16-bit weights give the source's logits: norms, biases and routers follow."""
    src, out = source(tiny, kind, dtype=torch.float32), tmp_path / "out"
    report = quantize.run(src, out, recipe(src, spec, method))
    assert report.status == "green" and {m.method for m in report.modules} == {f"{method}+gptq"}
    read = exact(src, out)
    made = Checkpoint.open(out)
    state = {n: read(n) for n in Checkpoint.open(src).names}
    for name in state:  # what lies in the output is what the scales say
        if name in made.tensors and name.removesuffix(".weight") not in {m.name for m in report.modules}:
            torch.testing.assert_close(made.read(name).float(), state[name], rtol=1e-6, atol=1e-7)
    ids = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    assert len(Transforms.read_scales(out)) > 0
    a, b = logits_of(src, Checkpoint.open(src).read, ids), logits_of(src, state.__getitem__, ids)
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_rotation(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """Streamed through rtn and through gptq; tied embeddings get a head of their own when told so."""
    src = source(tiny, kind, dtype=torch.float32)
    tied = Checkpoint.open(src).config["tie_word_embeddings"]
    tree = recipe(src, "w8a16-g128" if kind == "llama" else "w8a16").to_dict()
    for rounding in ("rtn", "gptq"):
        tree["stages"][0]["quantize"]["methods"] = [{"rotate": {"untie": tied}}, rounding]
        given = {k: v for k, v in tree.items() if rounding == "gptq" or k not in ("calibration", "run")}
        if rounding == "rtn":
            given["stages"][0]["quantize"].pop("experts", None)
        out = tmp_path / rounding
        report = quantize.run(src, out, Recipe.parse(yaml.safe_dump(given)))
        assert report.status == "green"
        from transformers import AutoModelForCausalLM

        ids = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))
        if kind == "qwen3_moe":
            continue
        with torch.no_grad():
            a, b = (
                AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval()(input_ids=ids).logits
                for f in (src, out)
            )
        assert float((a - b).norm() / a.norm()) < 0.05
    if tied:
        with pytest.raises(RecipeError, match="untie: true"):
            quantize.run(src, tmp_path / "x", recipe(src, "w8a16", "rotate"))


def logits_of(src: Path, read: Callable[[str], torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    made = Checkpoint.open(src)
    infos = made.tensors
    shapes, dtypes = {n: i.shape for n, i in infos.items()}, {n: i.dtype for n, i in infos.items()}
    frame = Frame(made.config, walk.survey(made.config, shapes, dtypes, "here"), torch.float32, "here")
    x, arguments = frame.start(ids, read("model.embed_tokens.weight"))
    for i in range(len(frame)):
        x = frame.block(i, read).forward(x, arguments[i])
    return F.linear(frame.normed(x, read), frame.head(read))


OUTLIERS = {5: 30.0, 40: 100.0, 99: 60.0}


def planted(tensors: dict[str, torch.Tensor]) -> None:
    """Activation channels 30 to 100 times as large as the rest, without another function: norms up, their readers down."""
    for name in list(tensors):
        if not name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            continue
        prefix = name.rpartition(".")[0].rpartition(".")[0]
        readers = ("self_attn.q", "self_attn.k", "self_attn.v") if "input" in name else ("mlp.gate", "mlp.up")
        for channel, factor in OUTLIERS.items():
            tensors[name][channel] *= factor
            for r in readers:
                tensors[f"{prefix}.{r}_proj.weight"][:, channel] /= factor


def test_smoothquant_and_rotation_against_planted_outliers(tiny: Tiny, tmp_path: Path) -> None:
    """W8A8 on a model with planted outlier channels: smoothing wins back at least 90 % of the KL, rotation most of it."""
    big = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for t in tensors.values():
            if t.dim() == 2:
                t *= 2.0  # logits that differ between tokens
        planted(tensors)

    src = source(tiny, "llama", dtype=torch.float32, change=change, **big)
    ids = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(8))
    reference = F.log_softmax(logits_of(src, Checkpoint.open(src).read, ids), -1)

    def kl(method: str, **options: Any) -> float:
        tree = recipe(src, "w8a8", "smoothquant").to_dict()
        tree["stages"][0]["quantize"]["methods"] = [{method: options}, "gptq"] if method else ["gptq"]
        out = tmp_path / (method or "plain")
        quantize.run(src, out, Recipe.parse(yaml.safe_dump(tree)))
        pair = Pair.open(out, src)
        found = F.log_softmax(logits_of(src, pair.read, ids), -1)
        return float((reference.exp() * (reference - found)).sum(-1).mean())

    plain, smooth, rotated = kl(""), kl("smoothquant"), kl("rotate")
    assert plain > 1e-4 and smooth < 0.1 * plain and rotated < 0.3 * plain, (plain, smooth, rotated)


def test_experts_report_their_tokens(tiny: Tiny, tmp_path: Path) -> None:
    src = source(tiny, "qwen3_moe")
    report = quantize.run(src, tmp_path / "out", recipe(src))
    assert report.layers[0].tokens == () and sum(report.layers[1].tokens) == 24 * 32 * 2


@pytest.mark.parametrize("experts", ["routed", "blend", "all"])
def test_policies_for_experts(tiny: Tiny, tmp_path: Path, experts: str) -> None:
    src = source(tiny, "qwen3_moe")
    report = quantize.run(src, tmp_path / "out", recipe(src, experts=experts))
    downs = [m for m in report.modules if ".experts." in m.name and m.name.endswith("down_proj")]
    assert len(downs) == 3 and report.status == "green"


def starved(tensors: dict[str, torch.Tensor]) -> None:
    """No token chooses expert 2."""
    tensors["model.layers.1.mlp.gate.weight"][2] = 0
    tensors["model.layers.1.post_attention_layernorm.weight"].fill_(1.0)
    gate = tensors["model.layers.1.mlp.gate.weight"]
    gate[0], gate[1] = gate[0] * 50, -gate[0] * 50  # one of the two is always above zero, the other far below


def test_an_expert_without_tokens_is_rounded_to_nearest_and_listed(tiny: Tiny, tmp_path: Path) -> None:
    src = source(tiny, "qwen3_moe", change=starved, num_experts_per_tok=1)
    report = quantize.run(src, tmp_path / "routed", recipe(src, experts="routed"))
    assert report.layers[1].tokens[2] == 0
    down = next(m for m in report.modules if m.name.endswith("experts.2.down_proj"))
    assert any("rounded to nearest" in words for words in down.facts["fallbacks"])
    blended = quantize.run(src, tmp_path / "blend", recipe(src, experts="blend"))
    down = next(m for m in blended.modules if m.name.endswith("experts.2.down_proj"))
    assert down.facts["fallbacks"] == [], "all tokens' mean stands in for the missing ones"


def attention_inputs(src: Path, ids: torch.Tensor) -> torch.Tensor:
    """What q, k and v of block 0 read: the normed embedding, fp32."""
    made = Checkpoint.open(src)
    x = F.embedding(ids, made.read("model.embed_tokens.weight").float())
    return F.rms_norm(x, x.shape[-1:], made.read("model.layers.0.input_layernorm.weight").float(), 1e-6).flatten(0, 1)


def test_codes_are_those_of_gptq_on_the_very_statistics(tiny: Tiny, tmp_path: Path) -> None:
    src = source(tiny, "llama", dtype=torch.float32)
    quantize.run(src, tmp_path / "out", recipe(src))
    rows = [json.loads(line)["ids"] for line in (src / "calibration.jsonl").read_text().splitlines()]
    x = attention_inputs(src, torch.tensor(rows))
    stats = Stats(x.T @ x, x.abs().amax(0), x.abs().mean(0), x[:512], len(x))
    spec, made = QuantSpec.parse("w4a16-g64"), Checkpoint.open(tmp_path / "out")
    for leaf in "qkv":
        name = f"model.layers.0.self_attn.{leaf}_proj"
        weight = Checkpoint.open(src).read(f"{name}.weight")
        parts = {s: made.read(f"{name}.{s}") for s in ("weight_packed", "weight_scale", "weight_shape")}
        found = compressed_tensors.read(parts, spec, tuple(weight.shape))  # type: ignore[arg-type]
        expected = gptq(weight.float(), stats, spec, scale_dtype=torch.float32).tensor
        assert (found.data == expected.data).float().mean() > 0.995
        torch.testing.assert_close(found.scale, expected.scale)


def test_a_linear_left_at_16_bits_keeps_its_bytes_and_the_rest_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    src = source(tiny, "qwen3")
    ignore = (r"re:.*\.self_attn\..*", "lm_head")
    report = quantize.run(src, tmp_path / "out", recipe(src, ignore=ignore))
    assert {m.name.split(".")[3] for m in report.modules} == {"mlp"}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(Checkpoint.open(src).read(name), Checkpoint.open(tmp_path / "out").read(name))


def test_mixed_bits(tiny: Tiny, tmp_path: Path) -> None:
    src = source(tiny, "llama")
    layers = {r"re:.*\.mlp\.down_proj": "w8a16-g128", r"re:.*\.layers\.1\.self_attn\.[qkv]_proj": "w3a16-g64"}
    report = quantize.run(src, tmp_path / "out", recipe(src, layers=layers))
    found = {m.name: m.spec for m in report.modules}
    assert found["model.layers.0.mlp.down_proj"] == "w8a16-g128"
    assert (
        found["model.layers.1.self_attn.k_proj"] == "w3a16-g64"
        and found["model.layers.0.self_attn.k_proj"] == "w4a16-g64"
    )
    assert verify.verify(tmp_path / "out", src).failures == ()


def test_block_pass_sees_the_untouched_block(tiny: Tiny, tmp_path: Path) -> None:
    src = source(tiny, "qwen3_moe")
    tree = recipe(src).to_dict() | {"run": {"pass": "block"}}
    report = quantize.run(src, tmp_path / "out", Recipe.parse(yaml.safe_dump(tree)))
    assert report.status == "green" and sum(report.layers[1].tokens) == 24 * 32 * 2


def test_the_same_twice_and_another_seed_differs(tiny: Tiny, tmp_path: Path) -> None:
    src = source(tiny, "llama", windows=24)
    folders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        given = recipe(src, seed=seed)
        text = given.to_yaml().replace("samples: 64", "samples: 8")
        quantize.run(src, tmp_path / name, Recipe.parse(text))
        folders.append(b"".join(p.read_bytes() for p in sorted((tmp_path / name).glob("*.safetensors"))))
    assert folders[0] == folders[1] != folders[2]


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)


def test_activations_that_overflow_stop_the_run(tiny: Tiny, tmp_path: Path) -> None:
    src = source(tiny, "llama", change=not_a_number, num_hidden_layers=3)
    with pytest.raises(FormatError, match=r"block 1 gives NaN or Inf|activations hold NaN or Inf|NaN or Inf"):
        quantize.run(src, tmp_path / "out", recipe(src))
    assert not list(tmp_path.glob(".out*")), "an error of the input leaves nothing behind"


def test_text_of_another_tokenizer(tiny: Tiny, tmp_path: Path) -> None:
    src = with_text(tiny("llama", max_position_embeddings=64), vocab=200)
    with pytest.raises(FormatError, match="vocabulary has 0 to 95"):
        quantize.run(src, tmp_path / "out", recipe(src))


def test_a_text_shorter_than_a_window(tiny: Tiny, tmp_path: Path) -> None:
    src = tiny("llama", max_position_embeddings=64)
    (src / "calibration.jsonl").write_text('{"ids": [1, 2, 3]}\n{"ids": [4, 5]}\n')
    with pytest.raises(FormatError, match=r"shorter than one window|needs|window"):
        quantize.run(src, tmp_path / "out", recipe(src))


def test_two_roundings_and_a_late_transform_are_refused(tiny: Tiny) -> None:
    head = "stages: [{quantize: {spec: w4a16-g64, methods: "
    with pytest.raises(RecipeError, match="gptq and rtn would round each weight"):
        Recipe.parse(head + "[gptq, rtn]}}]")


def along_the_chain(given: Recipe) -> Recipe:
    """The same without a look at the float model's inputs."""
    return Recipe.parse(yaml.safe_dump(given.to_dict() | {"run": {"target": "chain"}}))


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_a_target_in_the_float_model_brings_the_output_nearer_to_it(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """Random blocks spoil each other's inputs much: what comes out of the last one is nearer with the second chain."""
    src = source(tiny, kind, windows=48, dtype=torch.float32, num_hidden_layers=4)
    ids = torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(21))
    reference = logits_of(src, Checkpoint.open(src).read, ids)
    off = {}
    for name, given in (("float", recipe(src, "w3a16-g64")), ("chain", along_the_chain(recipe(src, "w3a16-g64")))):
        quantize.run(src, tmp_path / name, given)
        off[name] = float((logits_of(src, Pair.open(tmp_path / name, src).read, ids) - reference).norm())
    assert off["float"] < 0.99 * off["chain"], off


def test_values_in_the_chain_are_the_values_on_disk(tiny: Tiny, tmp_path: Path) -> None:
    """The statistics of block 1 come from block 0 as it was written: a gptq run of block 1 alone gives the same codes."""
    src = source(tiny, "llama", dtype=torch.float32)
    quantize.run(src, tmp_path / "out", along_the_chain(recipe(src)))
    made, spec = Checkpoint.open(tmp_path / "out"), QuantSpec.parse("w4a16-g64")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            module = name.removesuffix(".weight")
            if name.startswith("model.layers.0.") and f"{module}.weight_packed" in made.tensors:
                parts = {s: made.read(f"{module}.{s}") for s in ("weight_packed", "weight_scale", "weight_shape")}
                tensors[name] = affine.dequantize(compressed_tensors.read(parts, spec, tuple(tensors[name].shape)))  # type: ignore[arg-type]

    half = with_text(tiny("llama", name="half", dtype=torch.float32, max_position_embeddings=64, change=change), 24)
    ignore = (r"re:model\.layers\.0\..*", "lm_head")
    quantize.run(half, tmp_path / "again", along_the_chain(recipe(half, ignore=ignore)))
    again = Checkpoint.open(tmp_path / "again")
    for leaf in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.layers.1.{leaf}.weight_packed"
        assert torch.equal(made.read(name), again.read(name))
