"""The comparison with llm-compressor, with stand-ins for its process and for `percard quantize`."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers

from percard.bench import llmcompressor, llmcompressor_sides
from percard.bench.llmcompressor import OURS, PAIRS, THEIRS, Plan, Way
from percard.formats import compressed_tensors as ct
from percard.formats.affine import quantize
from percard.formats.checkpoint import Checkpoint, Writer
from percard.formats.spec import QuantSpec
from percard.quant.recipe import Recipe

from .conftest import write_checkpoint

STAND_IN = """
import json, os, shutil, sys
for line in sys.stdin:
    c = json.loads(line)
    if c["do"] == "version":
        answer = {"llmcompressor": "0.0", "torch": "x"}
    elif any(name == "AWQModifier" for name, _ in c["recipe"]) and c["pin"]:
        answer = {"error": "RuntimeError: no card (cache.py, in _pin)"}
    else:
        rounding = c["recipe"][-1][1]
        assert rounding["ignore"] == ["lm_head"] and rounding["scheme"]["weights"]["num_bits"] in (3, 4, 8)
        if c["windows"] is not None:
            rows = [json.loads(line)["ids"] for line in open(c["windows"])]
            assert len(rows) == 3 and {len(row) for row in rows} == {16}
        weights = rounding["scheme"]["weights"]
        name = f"w{weights['num_bits']}a{8 if 'input_activations' in rounding['scheme'] else 16}"
        name += f"-g{weights['group_size']}" if "group_size" in weights else ""
        shutil.copytree(os.path.join(os.path.dirname(c["model"]), "done", name), c["out"])
        with open(os.path.join(os.path.dirname(c["model"]), "calls"), "a") as file:
            file.write("x")
        answer = {"seconds": 2.0, "phases": {}, "warnings": ["Hessian inversion failed", "No accelerator"]}
    print(json.dumps(answer), flush=True)
"""
SPECS = ("w4a16-g64", "w8a8")


def quantized(source: Path, out: Path, spec: QuantSpec) -> None:
    """All linears of a checkpoint, rounded to nearest."""
    found = Checkpoint.open(source)
    tensors: dict[str, torch.Tensor] = {}
    specs = {}
    for name in found.names:
        tensor = found.read(name)
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            specs[module] = spec
            parts = ct.write(quantize(tensor, spec, torch.float32), torch.float32)
            tensors |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
        else:
            tensors[name] = tensor
    with Writer(out, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish(found.config | {"quantization_config": ct.config(specs, ["lm_head"])})


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A small model, its texts, what both sides 'make' of it, and stand-ins that hand it out."""
    model = write_checkpoint(tmp_path / "model", "qwen3", intermediate_size=128, hidden_size=128)
    for spec in SPECS:
        quantized(model, tmp_path / "done" / spec, QuantSpec.parse(spec))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(model / "tokenizer.json"))
    (tmp_path / "calibration.txt").write_text(" ".join(f"w{i * 7 % 200}" for i in range(16 * 9 + 5)))
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * 3 % 200}" for i in range(60)))
    script = tmp_path / "side.py"
    script.write_text(STAND_IN)

    def ours(
        model: Path, out: Path, spec: str, methods: Any, windows: Path | None, samples: int, seq_len: int
    ) -> float:
        if "awq" in methods:
            raise llmcompressor.Absent("percard quantize ended with 2: unknown method")
        assert (windows is None) == (tuple(methods) == ("rtn",)) and (samples, seq_len) == (3, 16)
        shutil.copytree(model.parent / "done" / spec, out)
        with (model.parent / "ours").open("a") as file:
            file.write("x")
        return 1.0

    monkeypatch.setattr(llmcompressor, "SIDE", script)
    monkeypatch.setattr(llmcompressor_sides, "SIDE", script)
    monkeypatch.setattr(llmcompressor, "install", lambda folder, say: Path(sys.executable))
    monkeypatch.setattr(llmcompressor, "ours", ours)
    return Plan(model, tmp_path / "calibration.txt", tmp_path / "text.txt", 2, 3, 16, SPECS)


def test_every_pair_is_a_row_and_errors_are_said(plan: Plan, tmp_path: Path) -> None:
    found = json.loads(json.dumps(llmcompressor.compare(plan, tmp_path / "out", lambda words: None)))
    rows = found["rows"]
    promised = [(m, s) for m, specs, _, t in PAIRS for s in specs if s in SPECS and THEIRS[t].pin]
    assert [(r["method"], r["spec"]) for r in rows] == [*promised, ("best recipe", "w4a16-g64")]
    gptq = next(r for r in rows if r["method"] == "GPTQ")
    assert gptq["ratio"] == pytest.approx(1.0) and gptq["verdict"] == "held" and gptq["limit"] == 1.02
    assert gptq["theirs"]["seeds"] == 2 and gptq["theirs"]["kl"] > 0 and gptq["theirs"]["warnings"] == 2
    assert next(r for r in rows if "searched" in r["method"])["verdict"] == ""
    awq = next(r for r in rows if r["method"] == "AWQ")
    assert (
        "no card" in awq["theirs"]["error"]
        and "unknown method" in awq["ours"]["error"]
        and awq["verdict"] == "ours failed"
    )
    assert found["theirs"] == {"llmcompressor": "0.0", "torch": "x"} and found["perplexity_reference"] > 1
    page = llmcompressor.markdown(found)
    assert "percard beside llm-compressor 0.0" in page and "no card" in page and page.count("\n| ") == len(rows) + 2
    shown = io.StringIO()
    Console(width=250, file=shown).print(llmcompressor.shown(found))
    assert "theirs does not run" in shown.getvalue() or "ours failed" in shown.getvalue()


def test_finished_cells_are_not_done_again(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say = lambda words: None  # noqa: E731
    first = llmcompressor.compare(plan, tmp_path / "out", say)
    theirs, mine = (len((tmp_path / name).read_text()) for name in ("calls", "ours"))
    assert llmcompressor.compare(plan, tmp_path / "out", say)["rows"] == first["rows"]
    assert [len((tmp_path / name).read_text()) for name in ("calls", "ours")] == [theirs, mine]
    monkeypatch.setattr(llmcompressor, "our_source", lambda: "another")  # ours has changed: only ours is done again
    llmcompressor.compare(plan, tmp_path / "out", say)
    assert [len((tmp_path / name).read_text()) for name in ("calls", "ours")] == [theirs, 2 * mine]
    assert not any((tmp_path / "out" / "work").iterdir())
    assert Plan(**{**vars(plan), "samples": 4}).digest() != plan.digest()


def test_a_result_of_another_spec_is_an_error(plan: Plan, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "done" / "w8a8")
    shutil.copytree(tmp_path / "done" / "w4a16-g64", tmp_path / "done" / "w8a8")
    found = llmcompressor.compare(plan, tmp_path / "out", lambda words: None)
    row = next(r for r in found["rows"] if (r["method"], r["spec"]) == ("RTN", "w8a8"))
    assert "holds w4a16-g64, expected w8a8" in row["theirs"]["error"]


def test_windows_are_drawn_by_seed_without_overlap() -> None:
    ids = torch.arange(100)
    one, other = (llmcompressor.draw_windows(ids, 8, 5, seed) for seed in (0, 1))
    assert one == llmcompressor.draw_windows(ids, 8, 5, 0) and one != other
    for windows in (one, other):
        starts = [window[0] for window in windows]
        assert len(set(starts)) == 5 and all(w == list(range(w[0], w[0] + 8)) and w[0] % 8 == 0 for w in windows)
    with pytest.raises(ValueError, match="has 12 windows of 8 tokens, 13 are asked for"):
        llmcompressor.draw_windows(ids, 8, 13, 0)


def test_recipes_of_both_sides() -> None:
    recipe = llmcompressor.their_recipe(THEIRS["smoothquant .8 + gptq"], QuantSpec.parse("w8a8"))
    assert [name for name, _ in recipe] == ["SmoothQuantModifier", "GPTQModifier"]
    assert recipe[0][1] == {"smoothing_strength": 0.8}
    scheme = recipe[1][1]["scheme"]
    assert scheme["weights"] == {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    assert scheme["input_activations"]["strategy"] == "token" and scheme["input_activations"]["dynamic"] is True
    recipe = llmcompressor.their_recipe(THEIRS["gptq, mse observer"], QuantSpec.parse("w3a16-g64"))
    assert recipe[0][1]["scheme"]["weights"]["observer"] == "memoryless_mse" and "observer" not in recipe[0][1]
    assert recipe[0][1]["scheme"]["weights"]["group_size"] == 64
    text = llmcompressor_sides.our_recipe("w4a16-g128", ["awq", "gptq"], Path("/x/y.jsonl"), 64, 512)
    tree = yaml.safe_load(text)
    assert tree["calibration"] == {"source": "/x/y.jsonl", "samples": 64, "seq_len": 512, "seed": 0}
    for way in OURS.values():  # every recipe of ours is one that percard reads
        windows = Path("/x/y.jsonl") if way.calibrated else None
        Recipe.parse(llmcompressor_sides.our_recipe("w8a8", way.recipe, windows, 64, 512))


def test_mean_over_seeds() -> None:
    cells = [{"kl": kl, "top1": 0.9, "perplexity": 10.0, "seconds": 1.0} for kl in (0.1, 0.3)]
    found = llmcompressor.summary(cells)
    assert (found["kl"], found["kl_lo"], found["kl_hi"], found["seeds"]) == (pytest.approx(0.2), 0.1, 0.3, 2)
    assert llmcompressor.verdict({"kl": 1.03}, {"kl": 1.0}, 1.02)["verdict"] == "missed"
    assert llmcompressor.verdict({"kl": 1.03}, {"kl": 1.0}, None) == {"ratio": 1.03, "limit": None, "verdict": ""}
    assert llmcompressor.verdict({"kl": 1.0}, {"error": "x"}, 1.0)["verdict"] == "theirs does not run"


def test_an_environment_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "env"

    def create(where: Path, **options: Any) -> None:
        (where / "bin").mkdir(parents=True, exist_ok=True)
        (where / "bin" / "python").write_text("#!/bin/sh\necho 'ERROR: No matching distribution' >&2\nexit 1\n")
        (where / "bin" / "python").chmod(0o755)

    monkeypatch.setattr(llmcompressor_sides.venv, "create", create)
    said: list[str] = []
    with pytest.raises(llmcompressor.Absent, match="could not install llm-compressor: ERROR: No matching distribution"):
        llmcompressor_sides.install(folder, said.append)
    assert "llmcompressor==0.14" in said[0] and not (folder / "percard.json").exists()
    build = f"torch=={torch.__version__}"
    (folder / "percard.json").write_text(json.dumps([*llmcompressor_sides.PACKAGES, build]))
    assert llmcompressor_sides.install(folder, said.append) == folder / "bin" / "python" and len(said) == 1


def test_what_a_command_of_ours_says_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(llmcompressor.Absent, match=r"percard quantize ended with 2: .*no such folder"):
        llmcompressor_sides.ours(tmp_path / "nothing", tmp_path / "out", "w8a8", ["rtn"], None, 1, 2)


def test_a_process_that_dies_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "side.py"
    script.write_text("import sys\nsys.stdin.readline()\nraise SystemExit(3)")
    monkeypatch.setattr(llmcompressor_sides, "SIDE", script)
    side = llmcompressor_sides.Side(Path(sys.executable))
    with pytest.raises(llmcompressor.Absent, match="ended with 3 during 'version'"):
        side.version()
    script.write_text('import sys\nfor line in sys.stdin: print(\'{"llmcompressor": "1"}\', flush=True)')
    assert side.version() == {"llmcompressor": "1"}
    side.close()


def test_the_two_sides_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    class Stub:
        def __init__(self, python: Path):
            pass

        def quantize(self, model: Path, out: Path, recipe: Any, windows: Path, pin: bool) -> dict[str, Any]:
            rows = [json.loads(line)["ids"] for line in windows.read_text().splitlines()]
            assert sum(map(len, rows)) == 8192 and max(map(max, rows)) < 96
            turns.append("theirs")
            return {"seconds": 0.001, "phases": {}, "warnings": []}

        def version(self) -> dict[str, Any]:
            return {"llmcompressor": "0.0"}

        def close(self) -> None:
            pass

    def ours(*arguments: Any) -> float:
        assert arguments[2:4] == ("w4a16-g128", ["gptq"])
        turns.append("ours")
        return 1.0

    def layer(folder: Path) -> Path:
        return write_checkpoint(folder, "qwen3", vocab_size=96) if not folder.exists() else folder

    monkeypatch.setattr(llmcompressor_sides, "install", lambda folder, say: Path(sys.executable))
    monkeypatch.setattr(llmcompressor_sides, "Side", Stub)
    monkeypatch.setattr(llmcompressor_sides, "ours", ours)
    monkeypatch.setattr(llmcompressor_sides, "write_layer", layer)
    found = json.loads(json.dumps(llmcompressor_sides.throughput(tmp_path, rounds=2, say=lambda words: None)))
    assert turns == ["theirs", "ours"] * 2 and len(found["seconds"]["ours"]) == 2
    assert found["ratios"]["theirs_inner"] == [pytest.approx(1000.0)] * 2 and len(found["lines"]) == 5


def test_a_way_has_a_name_for_a_file() -> None:
    names = {f"{way.name}".replace(" ", "").replace(",", "-").replace("+", "-") for way in THEIRS.values()}
    assert len(names) == len(THEIRS) and all("/" not in name for name in names)
    assert Way("x", ("rtn",)).calibrated
