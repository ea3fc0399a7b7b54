"""`percard calibrate-kv`: what it chooses, what it writes, and that all else stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from percard import calibrate_kv, cli
from percard.bench.engine import load
from percard.bench.quality import Quality
from percard.calibrate_kv import Choice, choose, hull
from percard.formats.kv_layers import FILES, LAYERS, OFFSETS, UNFINISHED, KVLayers
from percard.formats.kvcache import BF16, KVSpec
from percard.formats.spec import FormatError

from .conftest import write_biased

WHOLE = 512


def choice(name: str, kl: float, size: int) -> Choice:
    return Choice(KVSpec.parse(name), False, size, kl)


def quality(kl: float) -> Quality:
    return Quality(kl, 1.0, 2.0, 2.0, 10, "")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six windows of 256 ids, which need no tokenizer."""
    ids = torch.randint(0, 211, (6, 256), generator=torch.Generator().manual_seed(1)).tolist()
    path = tmp_path_factory.mktemp("text") / "ids.jsonl"
    path.write_text("".join(json.dumps({"ids": row}) + "\n" for row in ids))
    return path


@pytest.fixture(scope="module")
def bad_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 1 has biases that RoPE turns: nothing helps its keys but bits."""
    return write_biased(tmp_path_factory.mktemp("bad") / "model", turning=(1,))


@pytest.fixture(scope="module")
def found(bad_layer, text) -> calibrate_kv.KVCalibration:
    return calibrate_kv.calibrate(bad_layer, text, budget=0.03, specs=["int8", "int4"])


# ---- the choice -----------------------------------------------------------------------------------------------------


def test_only_what_is_ever_worth_it_is_a_choice():
    int8, k8v4, int4 = choice("int8", 0.001, 260), choice("k8v4", 0.0395, 200), choice("int4", 0.04, 136)
    as_it_is = Choice(BF16, False, WHOLE, 0.0)
    assert hull([int8, k8v4, int4], WHOLE) == (int4, int8, as_it_is)  # k8v4 lies above the line from int4 to int8
    k8v4 = choice("k8v4", 0.005, 200)
    assert hull([int8, k8v4, int4], WHOLE) == (int4, k8v4, int8, as_it_is)
    assert hull([choice("int4", float("nan"), 136)], WHOLE) == (as_it_is,)
    assert hull([choice("int8", 0.002, 260), choice("int4", 0.001, 136)], WHOLE) == (
        choice("int4", 0.001, 136),
        as_it_is,
    )
    assert hull([choice("int8", 0.0, 260)], WHOLE) == (choice("int8", 0.0, 260), as_it_is)


@pytest.mark.parametrize("off", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("budget", [0.0, 1e-5, 0.01, 0.05, 0.3, 10.0])
def test_the_cheapest_plan_that_measures_within_the_budget(budget, off):
    """However far the sum of single layers is from what all of them cost together."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for scale in torch.rand(12, generator=generator).tolist():
        rows.append(
            hull(
                [choice("int8", scale / 500, 260), choice("k8v4", scale / 40, 200), choice("int4", scale / 9, 136)],
                WHOLE,
            )
        )
    asked = []

    def measure(plan):
        asked.append(plan)
        return quality(off * sum(c.kl for c in plan))

    plan, measured, tried = choose(rows, budget, measure)
    assert measured.kl <= budget and measured.kl == off * sum(c.kl for c in plan)
    assert len(tried) == len(asked) == len(set(asked)) <= 12
    # No step back towards fewer bytes on the same road holds: the last gain bought was needed.
    if any(c is not row[0] for c, row in zip(plan, rows, strict=True)):
        gains = [
            ((row[row.index(c) - 1].kl - c.kl) / (c.bytes - row[row.index(c) - 1].bytes), layer)
            for layer, (c, row) in enumerate(zip(plan, rows, strict=True))
            if c is not row[0]
        ]
        last = min(gains)[1]
        cheaper = list(plan)
        cheaper[last] = rows[last][rows[last].index(plan[last]) - 1]
        assert off * sum(c.kl for c in cheaper) > budget
    else:
        assert off * sum(row[0].kl for row in rows) <= budget


def test_a_measurement_that_is_nan_is_not_within_any_budget():
    rows = [hull([choice("int4", 0.001, 136)], WHOLE)] * 3

    def measure(plan):
        return quality(float("nan") if any(c.spec != BF16 for c in plan) else 0.0)

    plan, measured, _ = choose(rows, 1.0, measure)
    assert measured.kl == 0 and all(c.spec == BF16 for c in plan)


# ---- the verb -------------------------------------------------------------------------------------------------------


def test_a_bad_layer_gets_its_bits_and_harmless_ones_four(found, bad_layer):
    specs = [str(c.spec) for c in found.plan]
    assert specs[1] in ("int8", "bf16") and specs[0] == specs[2] == specs[3] == "int4"
    assert found.quality.kl <= 0.03 < found.uniform["int4"].kl
    assert sum(c.bytes for c in found.plan) < found.whole / 2
    layers = KVLayers.load(bad_layer, layers=4, kv_heads=2, head_dim=64)
    assert [str(spec) for spec in layers.specs] == specs
    assert [mu is not None for mu in layers.mu] == [c.offset for c in found.plan]


def test_what_is_written_says_where_it_comes_from(found, bad_layer, text):
    said = KVLayers.load(bad_layer).calibration
    assert said == json.loads(json.dumps(found.record()))  # plain JSON, and all of it
    import hashlib

    assert said["text"] == "ids.jsonl" and said["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (said["tokens"], said["window"], said["windows_learnt_from"], said["windows_judged_on"]) == (1536, 256, 3, 3)
    assert said["budget"] == 0.03 and said["calibrated"]["kl"] == found.quality.kl
    assert said["bytes_per_token_as_it_is"] == 4 * 2 * 2 * 64 * 4  # layers, K and V, heads, D, fp32
    assert said["all_layers"]["int4"]["bytes_per_token"] == 4 * 2 * (32 + 32 + 8)
    for row, layer in zip(said["layers"], found.plan, strict=True):
        assert set(row["kl"]) == {"int8", "int4"} and row["spec"] == str(layer.spec)


def test_an_offset_is_kept_where_it_helps(tmp_path, text):
    """Layer 2 has biases in channels that RoPE hardly turns; it needs its offset, the others have none to speak of."""
    folder = write_biased(tmp_path / "model", still=(2,))
    found = calibrate_kv.calibrate(folder, text, budget=0.03, specs=["int4"])
    two = found.options[2][0]
    assert two.offset and two.kl_with < two.kl_without / 10
    assert str(found.plan[2].spec) == "int4" and found.plan[2].offset
    layers = KVLayers.load(folder)
    assert float(layers.mu[2].abs().max()) > 50
    for option in (row[0] for i, row in enumerate(found.options) if i != 2):
        assert option.offset == (option.kl_with <= 0.95 * option.kl_without)


def test_the_engine_runs_on_what_was_written(found, bad_layer):
    model = load(bad_layer, device="cpu", kv="calibrated")
    assert [str(spec) for spec in model.kv.specs] == [str(c.spec) for c in found.plan]
    cache = model.new_cache(1, 64)
    assert [str(pages.spec) for pages in cache.pages] == [str(c.spec) for c in found.plan]
    assert model.kv_bytes_per_token == sum(c.bytes for c in found.plan)


def test_the_command_line(bad_layer, text, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(bad_layer, folder, ignore=shutil.ignore_patterns("percard_kv.*"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = ["calibrate-kv", str(folder), "--text", str(text), "--tokens", "512", "--specs", "int8,int4"]
    assert cli.run([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4 layers, int8, int4 with and without an offset, on 512 tokens in windows of 256" in out
    assert {path.name for path in folder.iterdir()} == set(before)
    assert cli.run([*words, "--budget", "0", "--json"]) == 0
    ran = capsys.readouterr()
    said = json.loads(ran.out)
    assert [row["spec"] for row in said["layers"]] == ["bf16"] * 4 and said["calibrated"]["kl"] == 0
    events = [json.loads(line) for line in ran.err.splitlines()]
    assert events[-1]["done"] == events[-1]["total"] and events[0]["eta_s"] > 0
    assert {path.name for path in folder.iterdir()} == {*before, LAYERS, OFFSETS}
    assert all((folder / name).read_bytes() == data for name, data in before.items())
    assert cli.run(words) == 2
    assert "percard_kv.json: is there already; --force replaces it" in capsys.readouterr().err
    assert cli.run([*words, "--force", "--budget", "9"]) == 0
    out = capsys.readouterr().out
    assert "calibrated" in out and "wrote percard_kv.json and percard_kv.safetensors" in out
    assert str(KVLayers.load(folder).name) == "4 int4"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": -1.0}, "--budget -1.0 is no KL"),
        ({"budget": float("nan")}, "--budget nan is no KL"),
        ({"specs": ["int3"]}, "'int3' is not one"),
        ({"specs": ["bf16"]}, "names no spec that is rounded"),
        ({"specs": []}, "names no spec that is rounded"),
        ({"tokens": 31}, "31 tokens; two windows of 16 are needed"),
    ],
)
def test_bad_input(bad_layer, text, change, words):
    with pytest.raises(ValueError, match=words):
        calibrate_kv.calibrate(bad_layer, text, force=True, **change)


def test_a_cut_run_goes_on(found, bad_layer, text, tmp_path, capsys):
    """What single layers measured is kept, and nothing that looks finished; the same call ends with the same plan."""
    folder = tmp_path / "model"
    shutil.copytree(bad_layer, folder, ignore=shutil.ignore_patterns("percard_kv.*"))
    before = sorted(path.name for path in folder.iterdir())
    wish = {"budget": 0.03, "specs": ["int8", "int4"]}
    labels: list[str] = []

    def stop(event):
        labels.append(event.label)
        if event.label == stopping:
            raise KeyboardInterrupt

    stopping = "offsets of keys"
    with pytest.raises(KeyboardInterrupt):
        calibrate_kv.calibrate(folder, text, progress=stop, **wish)
    assert sorted(path.name for path in folder.iterdir()) == before
    stopping = "layer 2 in int4"
    with pytest.raises(KeyboardInterrupt) as error:
        calibrate_kv.calibrate(folder, text, progress=stop, **wish)
    assert error.value.__notes__ == ["2 measured layers are kept: the same command goes on"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, UNFINISHED])
    with (folder / UNFINISHED).open("a") as file:
        file.write('{"window": 0, "lay')  # a kill in the middle of a line
    stopping, labels[:] = "never", []
    again = calibrate_kv.calibrate(folder, text, progress=stop, **wish)
    assert labels.count("layer 0 in int8") == 2 and labels.count("layer 2 in int8") == 3  # of three windows
    assert again.record() == found.record()
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, LAYERS, OFFSETS])


def test_what_another_wish_measured_is_not_used(bad_layer, text, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bad_layer, folder, ignore=shutil.ignore_patterns("percard_kv.*"))
    calibrate_kv.calibrate(folder, text, tokens=512, specs=["int8"])
    right = KVLayers.load(folder).calibration
    lies = {"window": 0, "layer": 0, "kl": [1e9, 1e9]}
    for head in ({"percard": "another"}, None):
        lines = [json.dumps(head or lies), json.dumps(lies | {"kl": "x"}), ""]
        (folder / UNFINISHED).write_text("\n".join(lines))
        calibrate_kv.calibrate(folder, text, tokens=512, specs=["int8"], force=True)
        assert KVLayers.load(folder).calibration == right


def test_a_quantised_copy_does_not_carry_it_along(found, bad_layer, tmp_path):
    """What was measured on 16-bit weights says nothing of others."""
    assert cli.run(["quantize", str(bad_layer), "--spec", "w8a8", "--out", str(tmp_path / "w8")]) == 0
    assert not any((tmp_path / "w8" / name).exists() for name in FILES)
    for name in (LAYERS, OFFSETS):
        shutil.copy(bad_layer / name, tmp_path / "w8")
    with pytest.raises(FormatError, match="another config"):
        load(tmp_path / "w8", kv="calibrated")


def test_verify_and_generate_use_what_was_written(tmp_path, capsys):
    """The trained model, its own tokenizer, and a text as files of words."""
    folder = tmp_path / "tiny"
    shutil.copytree("examples/tiny-qwen3", folder)
    held = str(folder / "heldout.txt")
    words = ["calibrate-kv", str(folder), "--text", held, "--tokens", "512", "--specs", "k8v4", "--budget", "0.001"]
    assert cli.run([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    kinds = [row["spec"] for row in said["layers"]]
    assert {"bf16", "k8v4"} == set(kinds)
    assert (
        cli.run(["generate", str(folder), "--prompt", "def add(", "--max-new", "4", "--kv", "calibrated", "--json"])
        == 0
    )
    done = json.loads(capsys.readouterr().out)
    assert done["kv"] == "calibrated" and done["tokens"] == 4
    verify = ["verify", str(folder), "--against", str(folder), "--text", held, "--tokens", "512", "--kv", "calibrated"]
    assert cli.run([*verify, "--json"]) in (0, 4)
    found = json.loads(capsys.readouterr().out)
    (cache,) = found["caches"]
    assert cache["kv"] == "calibrated" and cache["bytes_per_token"] == said["calibrated"]["bytes_per_token"]
    assert cache["bytes_per_token_bf16"] == said["bytes_per_token_as_it_is"] and 0 < cache["kl"] < 0.003
    (folder / "percard_kv.safetensors").unlink()
    capsys.readouterr()
    assert cli.run(["generate", str(folder), "--prompt", "x", "--kv", "calibrated"]) == 2
    assert "percard_kv.safetensors: is missing" in capsys.readouterr().err
