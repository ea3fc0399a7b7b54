"""The verbs from end to end on a small random model: what they print, their JSON, their exit codes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Ran, tensors, write

Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def quantised(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from percard import cli

    out = tmp_path_factory.mktemp("quantised") / "w8a8"
    assert cli.run(["quantize", str(checkpoint), "--spec", "w8a8", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held.txt"
    path.write_text("def add(a, b):\n    return a + b\n" * 8)
    return path


def test_quantize_says_what_it_did_and_leaves_a_checkpoint(checkpoint: Path, tmp_path: Path, percard: Run) -> None:
    ran = percard("quantize", checkpoint, "--spec", "w4a16-g64", "--out", tmp_path / "out")
    assert ran.code == 0
    assert "14 modules in w4a16-g64" in ran.out and "green" in ran.out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_quantize_json_is_the_report_on_stdout_and_events_on_stderr(
    checkpoint: Path, tmp_path: Path, percard: Run
) -> None:
    ran = percard("quantize", checkpoint, "--spec", "w8a8", "--out", tmp_path / "out", "--json")
    report = json.loads(ran.out)
    assert ran.code == 0 and report["status"] == "green" and len(report["modules"]) == 14
    events = [json.loads(line) for line in ran.err.splitlines()]
    assert {e["event"] for e in events} == {"progress"}
    assert events[-1]["done"] == events[-1]["total"]


def test_json_may_stand_before_the_verb(checkpoint: Path, percard: Run) -> None:
    ran = percard("--json", "quantize", checkpoint, "--spec", "w8a8", "--dry-run")
    assert ran.code == 0 and json.loads(ran.out)["ok"] is True


def test_force_replaces_a_checkpoint(quantised: Path, checkpoint: Path, tmp_path: Path, percard: Run) -> None:
    out = tmp_path / "out"
    assert percard("quantize", checkpoint, "--spec", "w8a8", "--out", out).code == 0
    assert percard("quantize", checkpoint, "--spec", "w4a8", "--out", out, "--force").code == 0
    assert "pack-quantized" in (out / "config.json").read_text()


def test_a_dry_run_writes_nothing_and_says_sizes(checkpoint: Path, tmp_path: Path, percard: Run) -> None:
    ran = percard("quantize", checkpoint, "--spec", "w4a16-g128", "--out", tmp_path / "out", "--dry-run")
    assert ran.code == 0
    assert "w4a16-g128" in ran.out and "memory" in ran.out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_that_is_refused_says_why_and_exits_3(
    checkpoint: Path, tmp_path: Path, percard: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from percard.quant import preflight

    monkeypatch.setattr(preflight, "disk_free", lambda path: 1000)
    ran = percard("quantize", checkpoint, "--spec", "w8a8", "--out", tmp_path / "out", "--dry-run")
    assert ran.code == 3 and "refused" in ran.out
    ran = percard(
        "quantize", checkpoint, "--spec", "w8a8", "--out", tmp_path / "out"
    )  # a disk that is full is an error
    assert ran.code == 1 and "disk" in ran.error and not (tmp_path / "out").exists()
    monkeypatch.setattr(preflight, "_memory_free", lambda: 1000)
    ran = percard("quantize", checkpoint, "--spec", "w8a8", "--out", tmp_path / "out")
    assert ran.code == 3 and "memory" in ran.error and not (tmp_path / "out").exists()


def test_a_printed_recipe_does_the_same(checkpoint: Path, tmp_path: Path, percard: Run) -> None:
    ran = percard("quantize", checkpoint, "--spec", "w4a16-g64", "--print-recipe")
    (tmp_path / "recipe.yaml").write_text(ran.out)
    assert percard("quantize", checkpoint, "--spec", "w4a16-g64", "--out", tmp_path / "a").code == 0
    assert percard("quantize", checkpoint, "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "b").code == 0
    for name in (p.name for p in (tmp_path / "a").glob("*.safetensors")):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_verify_is_green_for_what_we_wrote_and_red_for_another_source(
    quantised: Path, checkpoint: Path, tmp_path: Path, percard: Run
) -> None:
    assert percard("verify", quantised, "--against", checkpoint).code == 0
    other = write(tmp_path / "other", {n: t.flip(0).contiguous() for n, t in tensors().items()})
    ran = percard("verify", quantised, "--against", other)
    assert ran.code == 4 and "red" in ran.out


def test_verify_with_a_text_adds_the_gate(quantised: Path, checkpoint: Path, text: Path, percard: Run) -> None:
    ran = percard("verify", quantised, "--against", checkpoint, "--text", text, "--json")
    report = json.loads(ran.out)
    assert ran.code == 0, ran.err
    (gate,) = report["gates"]
    assert report["level"] == "model" and gate["gate"] == "green" and 0 < gate["kl"] < 0.01
    assert "windows of 64" in gate["protocol"] and gate["text"] == "held.txt"
    plain = percard("verify", quantised, "--against", checkpoint, "--text", text, "--tokens", 100)
    assert plain.code == 0
    for words in ("KL 0.0", "top-1", "perplexity", "98 tokens in 2 windows of 64", "gate green"):
        assert words in plain.out


def test_verify_at_level_blocks_needs_a_text_and_says_the_worst_block(
    quantised: Path, checkpoint: Path, text: Path, percard: Run
) -> None:
    ran = percard("verify", quantised, "--against", checkpoint, "--text", text, "--level", "blocks")
    assert ran.code == 0 and "error of a block's output" in ran.out and "KL" not in ran.out
    ran = percard("verify", quantised, "--against", checkpoint, "--level", "blocks")
    assert ran.code == 2 and "--text" in ran.error


def test_a_red_gate_exits_4(
    quantised: Path, checkpoint: Path, text: Path, percard: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from percard.quant import fidelity

    monkeypatch.setitem(fidelity.THRESHOLDS, 8, {"kl": 0.0, "top1": 1.0, "perplexity": 0.0})
    ran = percard("verify", quantised, "--against", checkpoint, "--text", text)
    assert ran.code == 4 and "gate red" in ran.out and "KL" in ran.out


def test_generate_is_greedy_by_default_and_seeded_otherwise(quantised: Path, percard: Run) -> None:
    def told(*more: object) -> str:
        ran = percard("generate", quantised, "--prompt", "def f", "--max-new", 8, "--json", *more)
        assert ran.code == 0, ran.err
        return str(json.loads(ran.out)["text"])

    assert told() == told()
    assert told("--temperature", 1.5, "--seed", 1) == told("--temperature", 1.5, "--seed", 1)
    assert len({told("--temperature", 1.5, "--seed", s) for s in range(4)}) > 1


def test_generate_stops_at_the_context(quantised: Path, percard: Run) -> None:
    ran = percard("generate", quantised, "--prompt", "x" * 60, "--max-new", 100, "--json")
    assert ran.code == 0 and json.loads(ran.out)["tokens"] <= 4
    ran = percard("generate", quantised, "--prompt", "x" * 64)
    assert ran.code == 2 and "64" in ran.error


def test_generate_without_a_tokenizer_names_the_file(quantised: Path, tmp_path: Path, percard: Run) -> None:
    import shutil

    bare = Path(shutil.copytree(quantised, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    ran = percard("generate", bare, "--prompt", "a")
    assert ran.code == 2 and "tokenizer.json" in ran.error


def test_doctor_names_every_body_and_gives_reasons(percard: Run) -> None:
    ran = percard("doctor", "--json")
    facts = json.loads(ran.out)
    assert ran.code == 0 and facts["machine"]["cores"] == os.cpu_count()
    states = {(r["op"], r["body"]): r for r in facts["ops"] if r["device"] == "cpu"}
    ops = Path(__file__).parents[2] / "kernels"
    for op in sorted(folder.parent.name for folder in ops.glob("*/contract.py")):
        assert states[op, "reference"]["state"] == "on request"
        assert states[op, "cpu"]["state"] in ("serves", "stands by", "refuses")
    assert all(r["reason"] for r in facts["ops"] if r["state"] == "refuses")
    plain = percard("doctor")
    assert plain.code == 0 and "matmul_w4a8" in plain.out


def test_a_full_disk_exits_1_with_one_line_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, percard: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from percard.formats import writer

    true, left = os.pwrite, [100_000]

    def pwrite(fd: int, data: bytes, at: int) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return true(fd, data, at)

    monkeypatch.setattr(writer.os, "pwrite", pwrite)
    ran = percard("quantize", checkpoint, "--spec", "w8a8", "--out", tmp_path / "out")
    assert ran.code == 1
    assert "disk full" in ran.error and "--out" in ran.error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_exits_130_with_one_line_and_leaves_nothing(number: int, checkpoint: Path, tmp_path: Path) -> None:
    # The verb is held at its first progress event, so that the signal surely meets it at work.
    code = (
        "import signal, time, sys\n"
        # A shell starts its background jobs with SIGINT ignored, and the tests may be such a job.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from percard import cli, console\n"
        "def hold(event):\n"
        "    print('at work', flush=True)\n"
        "    time.sleep(60)\n"
        "console._json_line = hold\n"
        f"sys.argv = ['percard', 'quantize', {str(checkpoint)!r}, '--spec', 'w8a8', '--out', 'out', '--json']\n"
        "cli.main()\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "at work\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in err.splitlines() if line.strip()] == err.strip().splitlines()[-1:]
    assert "interrupted" in err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_after_finished_blocks_says_how_to_go_on(
    checkpoint: Path, tmp_path: Path, percard: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from percard.quant import sequential

    true = sequential.Sequential.block

    def block(self: sequential.Sequential, index: int) -> sequential.Made:
        if index == 1:
            raise KeyboardInterrupt
        return true(self, index)

    ids = tmp_path / "ids.jsonl"
    ids.write_text("".join(json.dumps({"ids": list(range(i, i + 16))}) + "\n" for i in range(8)))
    words = (
        "quantize",
        checkpoint,
        "--spec",
        "w8a8",
        "--method",
        "gptq",
        "--calibration",
        ids,
        "--out",
        tmp_path / "out",
    )
    with monkeypatch.context() as patch:
        patch.setattr(sequential.Sequential, "block", block)
        ran = percard(*words)
    assert ran.code == 130 and "2 finished units are kept: the same command goes on, --fresh starts over" in ran.error
    ran = percard(*words, "--method", "rtn", "--fresh")
    assert ran.code == 2 and "rtn reads no text" in ran.error
    ran = percard(*words)
    assert ran.code == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["ids.jsonl", "out"]


def test_a_reader_that_goes_away_gets_no_traceback() -> None:
    command = f"{sys.executable} -m percard doctor --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert done.stdout.strip() in ("0", "1")  # 1: what the reader did not get
