"""`percard bench model` through the command line: a planted broken kernel, a kill in the middle, a full disk, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.bench import model_choice
from percard.bench.record import Record, read
from percard.kernels import self_test
from percard.kernels.matmul_w8a8 import matmul_w8a8

from .conftest import Ran

Run = Callable[..., Ran]
ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-qwen3"
FEW = ("--prompt", 32, "--new", 4, "--rounds", 2, "--head", "16bit")
needs_example = pytest.mark.skipif(not TINY.is_dir(), reason="examples/tiny-qwen3 is not in this checkout")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A part of the held-out text: enough for a gate that a broken kernel cannot pass."""
    path = tmp_path / "text.txt"
    path.write_text((TINY / "heldout.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """`planted(m)`: the product of w8a8 has the wrong sign from m rows on."""
    body = next(b for b in matmul_w8a8.bodies if b.name == "cpu")
    if body.absent("cpu") is not None:
        pytest.skip("no C++ body on this machine")
    true = matmul_w8a8.run_of(body)

    def plant(rows: int) -> None:
        def broken(*flat: Any) -> Any:
            found = true(*flat)
            return -found if flat[0].shape[0] >= rows else found

        monkeypatch.setitem(matmul_w8a8._runs, "cpu", broken)
        monkeypatch.setattr(matmul_w8a8, "_ready", {})
        self_test.forget()

    yield plant
    self_test.forget()


@needs_example
@pytest.mark.parametrize("rows", [1, 18], ids=["the load finds it", "the text finds it"])
def test_a_planted_broken_kernel_turns_the_gate_red_and_no_speed_is_told(
    rows: int, planted: Callable[[int], None], text: Path, tmp_path: Path, percard: Run
) -> None:
    planted(rows)
    out = tmp_path / "r.jsonl"
    given = ("bench", "model", TINY, "--specs", "w8a8,w8a16", "--text", text, "--out", out, *FEW)
    ran = percard(*given)
    assert ran.code == 4, ran.err
    found = list(read(out))
    red = [r for r in found if r.scheme["spec"] == "w8a8"]
    assert len(red) == 3 and all(r.quality and r.quality["gate"] == "red" for r in red)
    assert all(r.tokens is None and r.latency_us is None and r.roofline is None and r.energy is None for r in red)
    why = red[0].quality or {}
    assert "failed its self-test" in why["reasons"][0] if rows == 1 else why["kl"] > 1
    # 8-bit weights pass their gate by far on so few tokens, in every float type; 4-bit ones stand at its edge.
    others = [r for r in found if r.scheme["spec"] != "w8a8"]
    assert others and not [(r.case, r.status, r.quality, r.error) for r in others if not r.tokens]
    lines = [line.split() for line in ran.out.splitlines() if line.startswith(" w8a8")]
    assert len(lines) == 1 and lines[0][1] == "red", "only the table with the gate names it"
    assert lines[0][6:11] == ["-"] * 5, "neither rate nor ratio"
    again = percard(*given, "--json")
    assert again.code == 4, "the file remembers it"
    told = [json.loads(line) for line in again.out.splitlines()]
    assert not any("tokens" in row or "latency_us" in row for row in told if row["scheme"]["spec"] == "w8a8")


@needs_example
@pytest.mark.full
def test_killed_in_the_middle_it_goes_on_with_the_same_cells(text: Path, tmp_path: Path) -> None:
    given = ["--specs", "w8a8", "--text", text, *FEW, "--batches", "1,2", "--no-energy"]

    def start(out: Path) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "percard", "bench", "model", TINY, *given, "--out", out]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([str(w) for w in words], cwd=ROOT, env=os.environ, **quiet)  # type: ignore[call-overload]

    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert start(whole).wait(300) == 0
    running = start(cut)
    while running.poll() is None and not (cut.is_file() and cut.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait(60)
    kept = list(read(cut))
    assert len(kept) >= 2
    assert start(cut).wait(300) == 0
    rows = list(read(cut))
    assert rows[: len(kept)] == kept, "what was there stays as it is"

    def keys(found: list[Record]) -> set[str]:
        return {r.cell_key for r in found}

    assert keys(rows) == keys(list(read(whole))) and all(r.status == "ok" for r in rows)


def test_a_disk_without_room_is_one_clear_line(percard: Run, checkpoint: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 20)
    ran = percard("bench", "model", checkpoint, "--text", text, "--prompt", 8, "--new", 2, "--out", "/dev/full")
    assert ran.code == 1
    last = ran.err.splitlines()[-1]
    assert "/dev/full: disk full (No space left on device)" in last and "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--bound", "tpot=fast"), "expected ttft=TIME or tpot=TIME"),
        (("--batch", 2, "--batches", "1,2"), "keep one"),
        (("--batches", "1,zero"), "expected whole numbers above 0"),
        (("--util", 0), "--util 0: expected a share"),
        (("--memory-gb", 0), "--memory-gb 0"),
        (("--quick", "--full"), "keep one"),
        (("--retry", "all"), "the one choice is failed"),
    ],
)
def test_flags_that_cannot_be(flags: tuple[object, ...], why: str, percard: Run) -> None:
    ran = percard("bench", "model", "shape:qwen3-0.6b", "--specs", "w8a8", "--layers", 1, *flags)
    assert ran.code == 2 and why in ran.error


def test_no_model_and_a_dry_run(percard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no model was named" in percard("bench", "model").error
    ran = percard("bench", "model", "shape:qwen3-0.6b", "--specs", "w8a8", "--batches", "1,4", "--dry-run")
    assert ran.code == 0 and ran.out.splitlines()[-1].startswith("4 cells to measure, about 0:")
    assert "qwen3-0.6b.model.tg32.d512.b4: about" in ran.out and ran.err == ""
    monkeypatch.chdir(tmp_path)
    assert "run --quick in a checkout" in percard("bench", "model", "--quick").error


def test_what_quick_and_full_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(model_choice.card, "default_device", lambda: torch.device("cpu"))
    quick = model_choice.of("quick", None)
    assert quick.source == "examples/tiny-qwen3" and quick.text is not None and quick.plan["batches"] == (1, 4)
    assert model_choice.of("full", "shape:qwen3-0.6b").plan["kv"] == ("bf16", "int8", "k8v4", "int4")
    assert model_choice.of(None, "DIR") == model_choice.Choice("DIR")
    monkeypatch.setattr(model_choice.card, "default_device", lambda: torch.device("cuda"))
    quick = model_choice.of("quick", None)
    assert (quick.source, quick.plan["layers"], quick.text) == ("shape:qwen3-8b", 8, None)
