"""Bad input: one line on stderr that names the file, what is wrong and the remedy; exit 2; nothing left behind."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .conftest import SHARDS, Ran, tensors, write

Run = Callable[..., Ran]
SPEC = "w4a16-g64"


def _edit(path: Path, change: Callable[[dict], object]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def _missing_shard(model: Path) -> None:
    (model / SHARDS[1]).unlink()


def _missing_tensor(model: Path) -> None:
    lost = "model.layers.1.mlp.down_proj.weight"
    write(model, {n: t for n, t in tensors().items() if n != lost})


def _truncated(model: Path) -> None:
    whole = (model / SHARDS[0]).read_bytes()
    (model / SHARDS[0]).write_bytes(whole[: len(whole) - 1000])


def _header_lies(model: Path) -> None:
    whole = (model / SHARDS[0]).read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    first = next(n for n in header if n != "__metadata__")
    header[first]["shape"][0] += 1
    text = json.dumps(header).encode()
    (model / SHARDS[0]).write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])


def _header_size_lies(model: Path) -> None:
    whole = (model / SHARDS[0]).read_bytes()
    (model / SHARDS[0]).write_bytes(struct.pack("<Q", 1 << 60) + whole[8:])


def _holds(value: float) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        weights = tensors()
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        write(model, weights)

    return spoil


def _unknown_architecture(model: Path) -> None:
    _edit(model / "config.json", lambda c: c.update(model_type="frobnicator", architectures=["FrobForCausalLM"]))


def _broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "qwen3",')


def _no_config(model: Path) -> None:
    (model / "config.json").unlink()


def _outside(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    _edit(index, lambda i: i["weight_map"].update({"model.norm.weight": "../../etc/passwd"}))


def _pickle(model: Path) -> None:
    for shard in SHARDS:
        (model / shard).unlink()
    (model / "model.safetensors.index.json").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def _already_quantised(model: Path) -> None:
    _edit(model / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}))


# what is wrong -> (how to break a good checkpoint, words that the line must hold)
BROKEN = {
    "missing shard": (_missing_shard, [SHARDS[1]]),
    "missing tensor": (_missing_tensor, ["model.layers.1.mlp.down_proj"]),
    "truncated safetensors": (_truncated, [SHARDS[0]]),
    "header that lies about a shape": (_header_lies, [SHARDS[0]]),
    "header that lies about its size": (_header_size_lies, [SHARDS[0]]),
    "NaN": (_holds(float("nan")), ["model.layers.1.mlp.up_proj", "NaN"]),
    "Inf": (_holds(float("inf")), ["model.layers.1.mlp.up_proj", "Inf"]),
    "unknown architecture": (_unknown_architecture, ["config.json", "frobnicator"]),
    "broken config.json": (_broken_config, ["config.json"]),
    "no config.json": (_no_config, ["config.json"]),
    "index that points outside": (_outside, ["model.safetensors.index.json"]),
    "pickle checkpoint": (_pickle, ["pytorch_model.bin", "safetensors"]),
    "already quantised": (_already_quantised, ["gptq"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_source_gets_one_line_and_leaves_nothing(
    name: str, broken: Path, tmp_path: Path, percard: Run
) -> None:
    spoil, words = BROKEN[name]
    spoil(broken)
    before = sorted(tmp_path.rglob("*"))
    ran = percard("quantize", broken, "--spec", SPEC, "--out", tmp_path / "out")
    assert ran.code == 2
    assert ran.error.startswith("percard quantize: ")
    assert all(word in ran.error for word in words)
    assert sorted(tmp_path.rglob("*")) == before
    assert ran.out == ""


def test_a_group_that_does_not_divide_offers_those_that_do(tmp_path: Path, percard: Run) -> None:
    weights = tensors()
    for i in range(2):  # ffn 224 = 7 x 32: g64 and g128 do not fit the inputs of down_proj
        for part in ("gate", "up"):
            weights[f"model.layers.{i}.mlp.{part}_proj.weight"] = torch.randn(224, 128).bfloat16()
        weights[f"model.layers.{i}.mlp.down_proj.weight"] = torch.randn(128, 224).bfloat16()
    model = write(tmp_path / "model", weights, intermediate_size=224)
    ran = percard("quantize", model, "--spec", "w4a16-g128", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "mlp.down_proj" in ran.error and "g32" in ran.error and "224" in ran.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spec", ["w5a16", "int4", "", "w8a8-g128"])
def test_an_unknown_spec_is_named(spec: str, checkpoint: Path, tmp_path: Path, percard: Run) -> None:
    ran = percard("quantize", checkpoint, "--spec", spec, "--out", tmp_path / "out")
    assert ran.code == 2
    assert "w8a8" in ran.error  # an example of what exists
    assert not (tmp_path / "out").exists()


def test_an_unknown_recipe_key_names_the_file_and_the_nearest_key(
    checkpoint: Path, tmp_path: Path, percard: Run
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages:\n- quantize: {spec: w8a8, layerz: {}}\n")
    ran = percard("quantize", checkpoint, "--recipe", recipe, "--out", tmp_path / "out")
    assert ran.code == 2
    assert str(recipe) in ran.error and "layerz" in ran.error and "layers" in ran.error


def test_an_output_that_exists_is_left_alone_without_force(checkpoint: Path, tmp_path: Path, percard: Run) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    ran = percard("quantize", checkpoint, "--spec", SPEC, "--out", out)
    assert ran.code == 2
    assert str(out) in ran.error and "--force" in ran.error
    assert [p.name for p in out.iterdir()] == ["precious.txt"]


def test_a_result_of_ours_is_not_quantised_again(checkpoint: Path, tmp_path: Path, percard: Run) -> None:
    assert percard("quantize", checkpoint, "--spec", "w8a8", "--out", tmp_path / "one").code == 0
    ran = percard("quantize", tmp_path / "one", "--spec", SPEC, "--out", tmp_path / "two")
    assert ran.code == 2
    assert "quantis" in ran.error
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "someone/some-model"])
def test_a_source_that_is_not_there(source: str, tmp_path: Path, percard: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    ran = percard("quantize", source, "--spec", SPEC, "--out", "out")
    assert ran.code == 2
    assert source in ran.error
    assert ("hf download" in ran.error) == (source == "someone/some-model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["frobnicate"], "frobnicate"),
        (["quantize"], "SRC"),
        (["quantize", "x"], "--spec"),
        (["quantize", "x", "--spec", "w8a8", "--recipe", "r.yaml"], "keep one"),
        (["quantize", "x", "--spec", "w8a8"], "--out"),
        (["quantize", "x", "--spec", "w8a8", "--out", "y", "--method", "magic"], "magic"),
        (["verify", "x"], "--against"),
        (["generate", "x", "--prompt", "a", "--max-new", "none"], "--max-new"),
        (["bench", "model", "shape:nothing", "--specs", "w8a8"], "nothing"),
    ],
)
def test_a_command_line_that_cannot_be_meant(arguments: list[str], word: str, percard: Run) -> None:
    ran = percard(*arguments)
    assert ran.code == 2
    assert word in ran.error


def test_with_json_the_error_is_one_json_line(tmp_path: Path, percard: Run) -> None:
    ran = percard("quantize", tmp_path / "no", "--spec", SPEC, "--out", tmp_path / "out", "--json")
    told = json.loads(ran.error)
    assert told["event"] == "error" and told["exit"] == ran.code == 2 and told["verb"] == "percard quantize"
    assert str(tmp_path / "no") in told["message"]
