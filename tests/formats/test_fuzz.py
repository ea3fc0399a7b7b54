"""Hostile files: the fuzz target (fuzz.py) in a process of its own, and each thing it has found, held down."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.bench.engine.config import parse_config
from percard.formats import compressed_tensors as ct
from percard.formats.checkpoint import MARKER, Checkpoint, Writer
from percard.formats.header import read_json
from percard.formats.spec import FormatError, QuantSpec
from percard.formats.targets import matches, patience
from percard.quant.recipe import Recipe, RecipeError, compiled

FUZZ = Path(__file__).with_name("fuzz.py")


def run(folder: Path, count: int, seed: int, limit_s: float) -> dict[str, Any]:
    """One run of the fuzz target; what it found, after the checks that hold for every run."""
    command = [sys.executable, "-X", "faulthandler", str(FUZZ), "--count", str(count), "--seed", str(seed)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command += ["--work", str(folder / f"fuzz-{seed}")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit_s)
    assert done.stdout, f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(done.stdout)
    assert not found["findings"], "\n".join(found["findings"])
    assert done.returncode == 0 and found["accepted"] + found["refused"] == found["cases"] == count
    # A target that refuses everything, or nothing, tests nothing.
    assert found["accepted"] > count / 20 and found["refused"] > count / 2
    return found


def test_a_few_hundred_mutations(tmp_path: Path) -> None:
    found = run(tmp_path, 300, seed=1, limit_s=600)
    assert {"plain refused", "quantized refused", "recipe refused", "quantize accepted", "cache refused"} <= set(
        found["by"]
    )


@pytest.mark.full
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_many_mutations(tmp_path: Path, seed: int) -> None:
    run(tmp_path, 4000, seed, limit_s=3000)


def test_the_fuzz_target_notices(tmp_path: Path) -> None:
    """Each watch of the target, proven on something that does what no input may make it do."""
    (tmp_path / "evil_module.py").write_text("")
    script = f"""
import sys, pickle, subprocess
sys.path[:0] = [{str(FUZZ.parent)!r}, {str(tmp_path)!r}]
import fuzz, torch
from pathlib import Path
guard = fuzz.Guard([Path({str(tmp_path / "in")!r})])
def pickled(): pickle.loads(pickle.dumps(fuzz.FormatError("x")))
def outside(): open({str(tmp_path / "x")!r}, "w")
def renamed(): Path({str(tmp_path / "in" / "a")!r}).rename({str(tmp_path / "b")!r})
def removed(): Path({str(tmp_path / "in" / ".." / "b")!r}).unlink()
def imported(): import evil_module
def started(): subprocess.Popen(["true"])
def loaded(): torch.load("x")
def hung():
    while True: pass
fuzz.LIMIT_S = 0.2
for act in (pickled, outside, renamed, removed, imported, started, loaded, hung):
    try:
        with guard.watching():
            act()
    except (fuzz.Touched, fuzz.Hang) as error:
        print(act.__name__, type(error).__name__)
with guard.watching():
    Path({str(tmp_path / "in" / "fine")!r}).write_text("x")
"""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("x")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    said = done.stdout.split("\n")
    names = ("pickled", "outside", "renamed", "removed", "imported", "started", "loaded")
    assert said == [*(f"{name} Touched" for name in names), "hung Hang", ""], done.stderr


# -- what it has found ---------------------------------------------------------------------------------------------------


def section(**group: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {"g": {"targets": ["Linear"], "weights": weights | group.pop("weights", {}), **group}}
    return {
        "model_type": "qwen3",
        "quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups},
    }


HOSTILE = [
    "(a+)+$", "(a|a)*$", "(.*)*x", "(([a-z_.0-9])+)+!", ".*" * 30 + "x", "a?" * 40 + "a" * 40, "(.|..)" * 40 + "!", "(?=(.+)+!)",
    "(a{1,30}){1,30}!", "(x?(a+)+|b)!", "(?:(?:a*)*)*!",
]  # fmt: skip


@pytest.mark.parametrize("pattern", HOSTILE)
def test_regexes_that_would_never_end(pattern: str) -> None:
    """A target of a config is a regex of a stranger."""
    began = time.process_time()
    with pytest.raises(FormatError, match="could take forever"):
        ct.specs(section(targets=["re:" + pattern]), ["a" * 40 + ".weight_packed"])
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize("pattern", HOSTILE)
def test_regexes_of_a_recipe_that_would_never_end(pattern: str) -> None:
    """Recipes are handed around as configs are; `layers` and `ignore` hold regexes against every module's name."""
    began = time.process_time()
    for flags in ({"layers": {"re:" + pattern: "w8a16"}}, {"ignore": ["re:" + pattern]}):
        with pytest.raises(RecipeError, match="could take forever"):
            Recipe.from_flags(spec="w4a16-g64", **flags)
    assert time.process_time() - began < 5.0


def test_a_regex_of_a_recipe_is_held_against_long_names_with_care() -> None:
    meant = compiled("re:" + r".*\.mlp.*\.experts.*\.(gate|up)_proj.*", "layers")  # four loops
    assert meant("model.layers.3.mlp.experts.12.gate_proj") and not meant("model.layers.3.mlp.experts.12.down_proj")
    with pytest.raises(RecipeError, match=r"layers: .* could take forever"):
        meant("a" * 5000)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.(0|35)\..*", r"(.*\.)?layers\.\d+\.mlp\.(gate|up)_proj$", r"^(?!.*vision).*proj$", ".*mlp[.]experts.*",
        r".*self_attn\.(q|k|v)_proj", r"(model\.)*layers.*", r"model\.layers\.(" + "|".join(map(str, range(96))) + r")\..*",
    ],
)  # fmt: skip
def test_regexes_of_real_configs_stay(pattern: str) -> None:
    name = "model.layers.35.mlp.gate_proj"
    assert matches(name, ["re:" + pattern]) == (re.match(pattern, name) is not None)


@pytest.mark.parametrize("pattern", ["(", "[a", "a{99999999999999999999}", "(" * 5000 + ")" * 5000, "*"])
def test_regexes_that_are_none(pattern: str) -> None:
    with pytest.raises(FormatError, match="is not a regex"):
        matches("x", ["re:" + pattern])


def test_a_config_of_slow_regexes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0.0, 1.0, 61.0))
    monkeypatch.setattr(time, "process_time", lambda: next(now))
    modules = patience(["a", "b"])
    assert next(modules) == "a"
    with pytest.raises(FormatError, match="take minutes"):
        next(modules)


@pytest.mark.parametrize("bits", [4.0, "4", None, [4], True])
def test_bits_of_another_kind(bits: Any) -> None:
    with pytest.raises(FormatError, match=r"num_bits is .*, expected a whole number"):
        ct.specs(section(weights={"num_bits": bits}), ["a.weight_packed"])


@pytest.mark.parametrize(
    "stated",
    [torch.tensor([1 << 40, 32]), torch.tensor([float("nan"), 32.0]), torch.tensor([-1, 32]), torch.zeros(1 << 20, dtype=torch.int64)],
    ids=["terabytes", "not a number", "negative", "many"],
)  # fmt: skip
def test_stated_shape_is_not_believed(stated: torch.Tensor) -> None:
    """One scale for all rows is spread over them, so the rows have to be there."""
    parts = {
        "weight_packed": torch.zeros(4, 4, dtype=torch.int32),
        "weight_scale": torch.ones(1),
        "weight_shape": stated,
    }
    with pytest.raises(FormatError, match=r"weight_shape says|weight_packed is"):
        ct.read(parts, QuantSpec.parse("w4a16"))


@pytest.mark.parametrize("name", [".", "./a", "a/../b", "/a", "..", "a//b", "", "a\0", "\ud800"])
def test_marker_that_names_more_than_its_folder(tmp_path: Path, name: str) -> None:
    """`<folder>.tmp` stands beside the folder."""
    folder, beside = tmp_path / "out", tmp_path / "out.tmp"
    folder.mkdir()
    beside.write_text("mine")
    (folder / MARKER).write_text(json.dumps({"made_folder": True, "files": [name]}))
    with pytest.raises(FormatError, match="not a marker of percard"):
        Writer.clean_unfinished(folder)
    assert beside.read_text() == "mine" and folder.is_dir()


def test_json_from_what_has_no_end(tmp_path: Path) -> None:
    pipe, device = tmp_path / "pipe", tmp_path / "zero"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for path in (pipe, device, tmp_path):
        with pytest.raises(FormatError, match="is not a file"):
            read_json(path)
    with pytest.raises(FormatError, match="is missing"):
        read_json(tmp_path / "nothing")


def test_messages_stay_short(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"x" * 1_000_000: "y" * 1_000_000}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError) as error:
        Checkpoint.open(tmp_path)
    text = str(error.value)
    assert len(text) < 2100 and text.startswith(str(tmp_path)) and text.endswith("beside the index")


def test_recipe_of_half_characters() -> None:
    with pytest.raises(RecipeError):
        Recipe.parse("model: \udc80")


CONFIG = {
    "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "vocab_size": 40,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"eos_token_id": "float"}, {"eos_token_id": [[1]]}, {"rms_norm_eps": "tensor"}, {"rms_norm_eps": [1]}, {"torch_dtype": ["x"]},
        {"rope_theta": {}, "rope_scaling": {"rope_type": "linear", "factor": []}}, {"rope_scaling": [1]}, {"rope_theta": "x"},
        {"rope_scaling": {"rope_type": ["x"]}}, {"layer_types": 3}, {"use_sliding_window": True, "sliding_window": "x"},
        {"num_hidden_layers": "x", "use_sliding_window": True}, {"rms_norm_eps": 10**400}, {"rope_theta": float("nan")},
    ],
)  # fmt: skip
def test_config_values_of_another_kind(change: dict[str, Any]) -> None:
    parse_config(CONFIG, "fine")
    with pytest.raises(FormatError, match=r"^config\.json: "):
        parse_config(CONFIG | change, "x")


def test_nothing_is_unpickled_and_no_code_is_run(tmp_path: Path) -> None:
    """A pickle and a module beside the weights stay unopened, also where they are all there is."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path / "bombed").write_text, ("x",)

    folder = tmp_path / "m"
    folder.mkdir()
    pickle_bytes = pickle.dumps(Bomb())
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle_bytes)
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"auto_map": {"AutoModel": "modeling_evil.Evil"}}))
    with pytest.raises(FormatError, match="pickle checkpoint"):
        Checkpoint.open(folder)
    command = [
        sys.executable,
        "-m",
        "percard",
        "quantize",
        str(folder),
        "--spec",
        "w8a16",
        "--out",
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "pickle" in done.stderr, done.stderr
    assert not (tmp_path / "bombed").exists() and not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    assert "modeling_evil" not in sys.modules
