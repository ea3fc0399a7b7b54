"""Names to linears: every family, every rule, every way in which config and tensors can disagree."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.formats.checkpoint import Checkpoint
from percard.formats.spec import FormatError
from percard.quant import walk
from percard.quant.recipe import Recipe, RecipeError

Tiny = Callable[..., Path]
KINDS = ["qwen2", "qwen3", "llama", "mistral", "qwen3_moe"]


def survey(folder: Path) -> walk.Map:
    source = Checkpoint.open(folder)
    infos = source.tensors
    return walk.survey(
        source.config, {n: i.shape for n, i in infos.items()}, {n: i.dtype for n, i in infos.items()}, str(folder)
    )


def recipe(**inside: Any) -> Recipe:
    return Recipe.from_flags(spec="w4a16-g64", **inside)


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_is_a_linear_or_has_a_reason(tiny: Tiny, kind: str) -> None:
    found = survey(tiny(kind))
    matrices = {n for n, i in Checkpoint.open(tiny(kind)).tensors.items() if len(i.shape) == 2}
    expected = {n for n in matrices if "embed" not in n and not n.endswith("mlp.gate.weight")}
    assert {x.tensor for x in found.linears} == expected
    assert set(found.others) | expected == set(Checkpoint.open(tiny(kind)).names)
    assert found.dtype == torch.bfloat16


def test_order_is_that_of_execution(tiny: Tiny) -> None:
    blocks = survey(tiny("qwen2")).blocks()
    assert len(blocks) == 2
    assert [x.name.removeprefix("model.layers.1.") for x in blocks[1]] == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    assert [x.together.rpartition(".")[2] for x in blocks[0]] == [
        "q_proj", "q_proj", "q_proj", "o_proj", "gate_proj", "gate_proj", "down_proj",
    ]  # fmt: skip


def test_experts_of_a_layer_belong_together(tiny: Tiny) -> None:
    dense, sparse = survey(tiny("qwen3_moe")).blocks()
    assert not any("experts" in x.name for x in dense)
    experts = [x for x in sparse if "experts" in x.name]
    assert len(experts) == 9 and {x.together for x in experts} == {"model.layers.1.mlp.experts"}


def test_optional_tensor_of_old_exports(tiny: Tiny) -> None:
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    found = survey(tiny("llama", change=lambda t: t.update({extra: torch.ones(16)})))
    assert extra in found.others


def test_tied_head_may_be_stored_too(tiny: Tiny) -> None:
    def store_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    found = survey(tiny("qwen3", change=store_head))
    assert found.tied and "lm_head.weight" in found.others


@pytest.mark.parametrize(
    ("kind", "over", "says"),
    [
        ("llama", {"model_type": "gpt_neox"}, "unknown architecture (model_type 'gpt_neox'"),
        ("llama", {"model_type": None}, "known model types: qwen2, qwen3"),
        ("llama", {"model_type": ["llama"]}, "unknown architecture"),
        ("llama", {"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ("llama", {"num_hidden_layers": 1 << 31}, "model.layers.2.input_layernorm.weight is missing"),
        ("llama", {"num_hidden_layers": 1}, "belongs to no Llama model of this config.json (1 layers)"),
        ("llama", {"hidden_size": 256}, "has shape [128, 128], config.json says [128, 256]"),
        ("llama", {"hidden_size": "128"}, "hidden_size is '128', expected a whole number above 0"),
        ("llama", {"hidden_size": None}, "hidden_size is None"),
        ("llama", {"vocab_size": -1}, "vocab_size is -1"),
        ("llama", {"attention_bias": True}, "self_attn.q_proj.bias is missing"),
        ("qwen3_moe", {"num_experts": 1 << 31}, "mlp.experts.3.gate_proj.weight is missing"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "already quantised (quantization_config: gptq)"),
    ],
)
def test_config_against_tensors(tiny: Tiny, kind: str, over: dict[str, Any], says: str) -> None:
    folder = tiny(kind)
    config = folder / "config.json"

    config.write_text(json.dumps({**json.loads(config.read_text()), **over}))
    with pytest.raises(FormatError) as caught:
        survey(folder)
    assert says in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.pop("model.layers.1.mlp.down_proj.weight"), "down_proj.weight is missing"),
        (
            lambda t: t.update({"visual.patch.weight": torch.ones(4, 4)}),
            "tensor visual.patch.weight [4, 4] belongs to no",
        ),
        (lambda t: t.update({"model.layers.0.mlp.experts.down_proj": torch.ones(2, 4, 4)}), "3 dimensions"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(4)}), "already quantised"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(256, 128).int()}),
            "is int32, expected bfloat16",
        ),
    ],
)
def test_tensors_against_config(tiny: Tiny, change: Callable[[dict[str, torch.Tensor]], None], says: str) -> None:
    with pytest.raises(FormatError) as caught:
        survey(tiny("llama", change=change))
    assert says in str(caught.value)


def test_overrides_and_ignore(tiny: Tiny) -> None:
    found = survey(tiny("llama"))
    wish = recipe(
        layers={r"re:.*\.layers\.1\.mlp\.down_proj$": "w8a16-g128", r"re:.*\.mlp\.down_proj$": "w8a16"},
        ignore=[r"re:.*\.layers\.0\.self_attn\.(q|k|v)_proj$"],
    )
    got = walk.assign(found, wish)
    assert str(got.specs["model.layers.1.mlp.down_proj"]) == "w8a16-g128"  # the first rule that matches wins
    assert str(got.specs["model.layers.0.mlp.down_proj"]) == "w8a16"
    assert str(got.specs["model.layers.0.mlp.up_proj"]) == "w4a16-g64"
    assert set(got.kept) == {"lm_head", *(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")}
    assert "output head (family Llama)" in got.kept["lm_head"]
    assert got.kept["model.layers.0.self_attn.q_proj"].endswith(": recipe")
    assert len(got.specs) + len(got.kept) == len(found.linears)


def test_router_and_tied_head_are_on_the_list(tiny: Tiny) -> None:
    moe = walk.assign(survey(tiny("qwen3_moe")), recipe())
    assert "router" in moe.kept["model.layers.1.mlp.gate"] and "lm_head" in moe.kept
    assert "lm_head" in walk.assign(survey(tiny("qwen3", name="tied")), recipe()).kept


@pytest.mark.parametrize(
    ("inside", "says"),
    [
        ({"layers": {r"re:.*\.layers\.9\..*": "w8a8"}}, "matches no module that is left"),
        ({"ignore": ["model.layers.0.mlp.up_projj"]}, "matches no module that is left"),
        ({"layers": {r"re:.*\.k_proj$": "w8a16"}}, "are one matrix in engines and must share one spec"),
        ({"ignore": [r"re:.*\.up_proj$"]}, "are one matrix in engines and must share one spec"),
        ({"ignore": [r"re:.*_proj$"]}, "leaves nothing to quantise"),
    ],
)
def test_rules_that_cannot_be_meant(tiny: Tiny, inside: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        walk.assign(survey(tiny("llama")), recipe(**inside))
    assert says in str(caught.value)


def test_transformers_5_writes_the_number_of_experts_under_another_name(tiny: Tiny) -> None:
    folder = tiny("qwen3_moe")
    before = [x.name for x in survey(folder).linears]
    config = json.loads((folder / "config.json").read_text())
    config["num_local_experts"] = config.pop("num_experts")
    (folder / "config.json").write_text(json.dumps(config))
    assert [x.name for x in survey(folder).linears] == before


def test_one_expert_alone_is_refused(tiny: Tiny) -> None:
    with pytest.raises(RecipeError, match="must share one spec"):
        walk.assign(survey(tiny("qwen3_moe")), recipe(layers={r"re:.*\.experts\.2\.down_proj$": "w8a16"}))


def test_quantised_head(tiny: Tiny) -> None:
    replaced = Recipe.parse("stages: [{quantize: {spec: w8a16, ignore!: []}}]")
    assert "lm_head" in walk.assign(survey(tiny("llama")), replaced).specs
    with pytest.raises(RecipeError, match="shares its weight with the embeddings"):
        walk.assign(survey(tiny("qwen3", name="tied")), replaced)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 5000])
def test_row_ranges_cover_all_rows_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "ROW_WEIGHTS", 64 * 100)
    ranges = list(walk.row_ranges((rows, 100)))
    assert ranges[0][0] == 0 and ranges[-1][1] == rows
    assert all(a[1] == b[0] and a[1] % 32 == 0 for a, b in itertools.pairwise(ranges))
    assert list(walk.row_ranges((rows, 100), by_rows=False)) == [(0, rows)]
