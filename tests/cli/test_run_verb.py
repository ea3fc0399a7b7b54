"""`percard run`: stages in order, finished ones skipped, a killed one going on, the table at the end, and every exit code."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Ran

Run = Callable[..., Ran]
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny-qwen3"
LINEARS, WHOLE = 0.22, 0.35  # of the model's bytes that an INT4 child with three quarters of the parameters may have


def write(
    path: Path,
    model: Path,
    *,
    steps: int = 3,
    gate: str = "{kl: 100}",
    every: int = 100,
    bench: bool = False,
    more: str = "",
) -> Path:
    """A recipe for the random checkpoint of conftest.py, whose texts are bytes."""
    text = path.with_name("text.txt")
    if not text.is_file():
        text.write_text((EXAMPLE / "heldout.txt").read_text()[:6000])
    path.write_text(
        f"""
model: {model}
stages:
  - prune: {{ffn: 128}}
  - distill: {{teacher: source, data: {text}, steps: {steps}, batch: 2, seq_len: 32, every: {every}, device: cpu}}
  - quantize: {{spec: w4a16-g64}}
  - verify: {{level: weights}}
{"  - bench: {prompt: 8, new: 4, rounds: 1, of: last}" if bench else ""}
calibration: {{source: {text}, samples: 4, seq_len: 32}}
verify: {{text: {text}, tokens: 256, gate: {gate}}}
output: {{dir: {path.parent / "out"}}}
{more}
"""
    )
    return path


def marks(folder: Path) -> dict[str, str]:
    """sha256 of the weights of every stage."""
    found = sorted(folder.glob("*/*.safetensors"))
    return {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def begun(ran: Ran) -> list[str]:
    """Which stages a call worked on."""
    return [
        line.split()[2].rstrip(":") for line in ran.err.splitlines() if ": begins: " in line or ": goes on: " in line
    ]


def test_stages_tables_and_what_runs_again(percard: Run, checkpoint: Path, tmp_path: Path) -> None:
    recipe, out = write(tmp_path / "r.yaml", checkpoint, bench=True), tmp_path / "out"
    ran = percard("run", recipe, "--dry-run")
    assert ran.code == 0 and "ffn 256 -> 128" in ran.out and not out.exists(), ran.err
    told = json.loads(percard("run", recipe, "--dry-run", "--json").out)
    assert [stage["verb"] for stage in told["stages"]] == ["prune", "distill", "quantize", "verify", "bench"]
    ran = percard("run", recipe)
    assert ran.code == 0, ran.err
    assert begun(ran) == ["prune", "distill", "quantize", "verify", "bench"] and "stage 2/5 distill" in ran.err
    done = json.loads((out / "run.json").read_text())
    rows = {row["stage"]: row for row in done["rows"]}
    assert list(rows) == ["source", "prune", "distill", "quantize"]
    assert rows["quantize"]["parameters"] == rows["prune"]["parameters"] < rows["source"]["parameters"]
    assert rows["quantize"]["share"]["linears"] < 0.3 * rows["prune"]["share"]["linears"] < 0.3
    assert rows["quantize"]["tok_s"] > 0 and rows["quantize"]["ratio"] > 0 and rows["distill"]["tok_s"] is None
    assert 0 < rows["quantize"]["kl"] < 100 and rows["quantize"]["gate"] == "green"
    assert "| quantize | w4a16-g64 rtn |" in (out / "run.md").read_text() and "tok/s" in ran.out
    before = marks(out)
    ran = percard("run", recipe)
    assert ran.code == 0 and begun(ran) == [] and ran.err.count(": finished, ") == 5 and marks(out) == before
    write(recipe, checkpoint, steps=4, bench=True)
    ran = percard("run", recipe)
    assert ran.code == 2 and "settings changed" in ran.err and "--from distill" in ran.err and marks(out) == before
    ran = percard("run", recipe, "--from", "distill")
    assert ran.code == 0 and begun(ran) == ["distill", "quantize", "verify", "bench"], ran.err
    after = marks(out)
    assert {name.split("/")[0] for name in after if after[name] != before[name]} == {"distill", "quantize"}
    # Another gate: the figures stand, the verdict and with it the speed do not.
    write(recipe, checkpoint, steps=4, bench=True, gate="{kl: 0.000001}")
    ran = percard("run", recipe, "--only", "bench")
    assert ran.code == 4 and begun(ran) == ["bench"] and "gate red" in ran.out, ran.err
    rows = {row["stage"]: row for row in json.loads((out / "run.json").read_text())["rows"]}
    assert rows["quantize"]["gate"] == "red" and rows["quantize"]["tok_s"] is None and rows["quantize"]["reasons"]


def test_a_killed_run_goes_on_to_the_same_bytes(percard: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = write(tmp_path / "whole" / "r.yaml", checkpoint, steps=40, every=2)
    killed = write(tmp_path / "killed" / "r.yaml", checkpoint, steps=40, every=2)
    out = tmp_path / "killed" / "out"
    assert percard("run", whole).code == 0
    command = [sys.executable, "-m", "percard", "run", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    work = out / ".distill.percard-unfinished" / ".percard-work"
    end = time.monotonic() + 300
    while process.poll() is None and not any(work.glob("state-*[0-9]")) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and (out / "prune" / "config.json").is_file()
    assert not (out / "distill").exists() and not (out / "run.json").exists()
    ran = percard("run", killed)
    assert ran.code == 0 and begun(ran) == ["distill", "quantize", "verify"] and "distill: goes on" in ran.err, ran.err
    assert marks(out) == marks(tmp_path / "whole" / "out")


def test_killed_between_its_last_rename_and_the_journal(percard: Run, checkpoint: Path, tmp_path: Path) -> None:
    recipe, out = write(tmp_path / "r.yaml", checkpoint), tmp_path / "out"
    assert percard("run", recipe, "--only", "prune").code == 0
    journal = out / "run-journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["event"] == "done"
    journal.write_text("".join(lines[:-1]) + lines[-1][:5])  # and a line that was torn
    ran = percard("run", recipe, "--only", "distill")
    assert ran.code == 0 and begun(ran) == ["distill"], ran.err
    ran = percard("run", recipe)
    assert ran.code == 0 and begun(ran) == ["quantize", "verify"] and "prune: finished" in ran.err, ran.err


def test_refusals_have_their_codes(percard: Run, checkpoint: Path, tmp_path: Path) -> None:
    recipe, out = write(tmp_path / "r.yaml", checkpoint), tmp_path / "out"
    assert percard("run", tmp_path / "none.yaml").code == 2
    ran = percard("run", recipe, "--only", "distil")
    assert ran.code == 2 and "the recipe has prune, distill, quantize, verify" in ran.error
    assert percard("run", recipe, "--only", "prune", "--fresh").code == 2
    ran = percard("run", recipe, "--only", "quantize")
    assert ran.code == 2 and "distill: no such folder" in ran.err.splitlines()[-1]
    strange = out / "prune"
    strange.mkdir(parents=True)
    (strange / "config.json").write_text("{}")
    ran = percard("run", recipe)
    assert ran.code == 2 and "was not made by this recipe" in ran.err.splitlines()[-1]
    assert (strange / "config.json").read_text() == "{}"
    ran = percard("quantize", checkpoint, "--recipe", recipe, "--out", tmp_path / "q")
    assert ran.code == 2 and "give it to percard run" in ran.error
    write(recipe, checkpoint, more="serve: {engine: vllm==0.33.0, tp: 3}")
    ran = percard("run", recipe, "--dry-run")
    assert ran.code in (2, 3), ran.out


@pytest.mark.xdist_group("tiny-qwen3")
def test_an_int4_child_is_small_enough(percard: Run, tmp_path: Path) -> None:
    """Twenty steps of the example: sizes are those of the whole one, quality is not."""
    text = (ROOT / "examples" / "prune-distil-int4.yaml").read_text()
    short = {
        "steps: 150": "steps: 20", "batch: 8": "batch: 2", "      seq_len: 256": "      seq_len: 64", "samples: 64": "samples: 4",
        "seq_len: 256}": "seq_len: 64}", "tokens: 16384": "tokens: 1024", "[gptq]": "[rtn]", "- verify\n": "- verify: {level: weights}\n",
        "kl: 0.06, top1: 0.88": "kl: 1", "prompt: 128, new: 16": "prompt: 8, new: 4, rounds: 1, of: last",
        "examples/": f"{ROOT}/examples/",
    }  # fmt: skip
    for old, new in short.items():
        assert old in text, old
        text = text.replace(old, new)
    (tmp_path / "r.yaml").write_text(text)
    ran = percard("run", tmp_path / "r.yaml", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    child = json.loads((tmp_path / "out" / "run.json").read_text())["rows"][-1]
    assert child["share"]["linears"] <= LINEARS and child["share"]["bytes"] <= WHOLE
    assert f"({child['share']['linears']:.1%})" in ran.out and f"({child['share']['bytes']:.1%})" in ran.out


@pytest.mark.full
def test_the_example(percard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of examples/prune-distil-int4.yaml; docs/run.md has its table."""
    monkeypatch.chdir(ROOT)
    ran = percard("run", "examples/prune-distil-int4.yaml", "--out", tmp_path / "out")
    print(ran.out)
    assert ran.code == 0, ran.err
    rows = {row["stage"]: row for row in json.loads((tmp_path / "out" / "run.json").read_text())["rows"]}
    child, pruned = rows["quantize"], rows["prune"]
    assert child["share"]["linears"] <= LINEARS and child["share"]["bytes"] <= WHOLE
    assert child["gate"] == "green" and child["kl"] < pruned["kl"] / 2 and pruned["gate"] == "red"
    assert child["tok_s"] > 0 and pruned["tok_s"] is None
