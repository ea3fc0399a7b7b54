"""Parameters by part against transformers' modules, bytes of a cache against what the engine allocates, files on disk."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from percard.bench import plan_parts, plan_rows
from percard.bench.engine import load_config
from percard.bench.engine.cache import Cache
from percard.bench.engine.config import MODEL_TYPES, shape_names
from percard.bench.engine.kv import of as layers_of
from percard.bench.plan_parts import kv_bytes_per_token, load_shape, names, shape_of
from percard.formats.kvcache import SPECS, KVSpec
from percard.formats.spec import FormatError, QuantSpec


def modules(raw: dict) -> int:
    """Parameters, and buffers that are stored, of transformers' modules for a config; no memory is taken."""
    config = transformers.AutoConfig.for_model(**{k: v for k, v in raw.items() if k != "num_nextn_predict_layers"})
    kind = transformers.AutoModelForCausalLM
    if raw["model_type"] == "qwen2_5_vl":
        kind = transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        model = kind.from_config(config)
    held = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")
    }
    return sum(t.numel() for t in held.values())


@pytest.mark.parametrize("name", names())
def test_parameters_are_those_of_transformers(name):
    shape = load_shape(name)
    assert shape.params == modules(dict(shape.raw))


@pytest.mark.parametrize(
    "name, billions, active, mtp, kv",
    [
        ("qwen3-235b-a22b", 235.09, 21.6, 0, 192_512),
        ("deepseek-r1", 671.03, 36.6, 13.46, 70_272),
        ("qwen2.5-vl-72b", 73.41, 71.5, 0, 327_680),
        ("qwen3-30b-a3b", 30.53, 3.0, 0, 98_304),
        ("llama-3.1-8b", 8.03, 7.5, 0, 131_072),
    ],
)
def test_published_counts(name, billions, active, mtp, kv):
    shape = load_shape(name)
    assert shape.params / 1e9 == pytest.approx(billions, abs=0.005)
    assert shape.active / 1e9 == pytest.approx(active, abs=0.05)
    assert shape.mtp_params / 1e9 == pytest.approx(mtp, abs=0.005)
    assert kv_bytes_per_token(shape, KVSpec()) == kv


@pytest.mark.parametrize("name", names())
def test_configs_as_transformers_writes_them_today_say_the_same(name):
    """Nested text configs, rope_parameters, num_local_experts: other keys, the same model."""
    shape = load_shape(name)
    written = transformers.AutoConfig.for_model(**shape.raw).to_dict()
    found = shape_of(json.loads(json.dumps(written, default=str)), name)
    assert (found.params, found.active) == (shape.params, shape.active)
    assert kv_bytes_per_token(found, KVSpec()) == kv_bytes_per_token(shape, KVSpec())


def test_fewer_layers_are_counted_too():
    for name in ("qwen3-0.6b", "deepseek-r1"):
        shape = load_shape(name)
        few, more = shape.with_layers(4), shape.with_layers(5)
        assert shape.params == few.params + (shape.layers - 4) * (more.params - few.params), name


@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize("name", shape_names())
def test_bytes_of_a_token_are_what_the_engine_allocates(name, kv):
    config, shape = load_config(f"shape:{name}"), load_shape(name)
    asked = layers_of(kv, config)
    cache = Cache.new(config, 1, 64, torch.bfloat16, torch.device("meta"), specs=asked.specs)
    assert kv_bytes_per_token(shape, KVSpec.parse(kv)) == cache.token_bytes
    assert kv_bytes_per_token(shape, KVSpec(), 4) == 2 * kv_bytes_per_token(shape, KVSpec())


def test_shapes_for_plans_only_are_refused_by_the_engine():
    only = set(names()) - set(shape_names())
    assert {"deepseek-r1", "qwen2.5-vl-3b", "qwen2.5-vl-72b"} <= only
    for name in only:
        assert load_shape(name).family not in MODEL_TYPES
        with pytest.raises(FormatError, match=r"for `percard plan` only.*known: .*qwen3-8b"):
            load_config(f"shape:{name}")
    with pytest.raises(FormatError, match="not there"):
        load_config("shape:qwen9-9b")


def test_every_promised_shape_is_there():
    wanted = {f"qwen2.5-{s}" for s in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")}
    wanted |= {f"qwen3-{s}" for s in ("0.6b", "1.7b", "4b", "8b", "14b", "32b", "30b-a3b", "235b-a22b")}
    wanted |= {f"qwen2.5-vl-{s}" for s in ("3b", "7b", "32b", "72b")}
    wanted |= {"deepseek-r1", "llama-3.1-8b", "llama-3.1-70b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.3-70b"}
    assert wanted <= set(names())


def test_names_and_files_lead_to_the_same_shape(tmp_path):
    raw = json.loads((plan_parts.SHAPES / "qwen3-8b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    text = {k: v for k, v in raw.items() if k not in ("model_type", "architectures")}
    (tmp_path / "nested.json").write_text(json.dumps({"model_type": "qwen3", "text_config": text}))
    found = [load_shape(n) for n in ("qwen3-8b", "shape:qwen3-8b", "Qwen/Qwen3-8B", tmp_path, tmp_path / "nested.json")]
    assert {shape.params for shape in found} == {8_190_735_360}
    for wrong in ("qwen9-9b", "./models/qwen3-8b", "/data/qwen3-8b", "../qwen3-8b"):
        with pytest.raises(FormatError, match=rf"no model '{wrong}'.*known names: .*qwen3-8b"):
            load_shape(wrong)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "rwkv"}, "model_type 'rwkv' is not one that can be planned; known: llama"),
        ({"hidden_size": None}, "hidden_size is missing; a plan needs it"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3, expected a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a whole number from 1 to 2000"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_key_value_heads": 5}, "not a multiple of 5 key-value heads"),
        ({"head_dim": None, "hidden_size": 4095}, "no multiple of 32 heads"),
    ],
)
def test_configs_that_cannot_be_planned(change, words):
    raw = dict(load_shape("qwen3-8b").raw) | change
    with pytest.raises(FormatError) as error:
        shape_of(raw, "x", "there/config.json")
    assert words in str(error.value) and str(error.value).startswith("there/config.json: ")


def test_files_that_are_no_config(tmp_path):
    bad = tmp_path / "config.json"
    for text, words in (("[1]", "holds list"), ("{", "not readable as JSON")):
        bad.write_text(text)
        with pytest.raises(FormatError, match=words):
            load_shape(bad)
    with pytest.raises(FormatError, match="not there"):
        load_shape(tmp_path.joinpath("empty").mkdir() or tmp_path / "empty")


def test_a_folder_says_its_bytes_exactly(checkpoint_folder, tmp_path):
    folder = checkpoint_folder
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    shape = load_shape(folder)
    disk = plan_rows.stored(str(folder), shape)
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in folder.glob("*.safetensors"))
    assert (disk.nbytes, disk.spec, disk.mtp) == (size - headers, None, 0)
    assert plan_rows.stored("qwen3-8b", shape) is None
    config = json.loads((folder / "config.json").read_text())
    for quantised, spec in (
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, "w4a16-g128"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "w4a16-g64-asym"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8-block"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
        found = plan_rows.stored(str(folder), shape)
        assert (found.spec, found.act_order) == (QuantSpec.parse(spec), "desc_act" in quantised)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mystery"}}))
    with pytest.raises(FormatError, match=r"mystery.*plan its 16-bit source"):
        plan_rows.stored(str(folder), shape)


@pytest.fixture
def checkpoint_folder(tmp_path):
    """A tiny checkpoint of transformers' own writing, in two shards."""
    raw = {k: v for k, v in load_shape("qwen3-0.6b").raw.items() if k != "architectures"}
    raw |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    raw |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320, "eos_token_id": 0, "bos_token_id": 0}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="300KB")
    shape = load_shape(tmp_path / "model")
    assert shape.params == sum(p.numel() for p in model.parameters())
    return tmp_path / "model"
