"""The comparison with llama.cpp, with a stand-in for llama.cpp's process and for the engine."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from percard.bench import llamacpp

STAND_IN = """
import json, sys, pathlib
for line in sys.stdin:
    c = json.loads(line)
    answer = {}
    if c["do"] == "write":
        assert c["linears"] in ("Q4_0", "Q8_0") and c["head"] == "Q8_0" and c["config"]["vocab_size"]
        pathlib.Path(c["path"]).write_bytes(b"x" * 1000)
    elif c["do"] == "load":
        assert c["threads"] >= 1 and c["context"] == 12
        answer = {"system": "AVX2 = 1", "version": "0.0"}
    elif c["do"] == "prefill":
        assert len(c["tokens"]) == 8
    elif c["do"] == "decode":
        assert (c["depth"], c["new"]) == (8, 4)
    else:
        answer = {"error": "ValueError: " + c["do"]}
    print(json.dumps(answer), flush=True)
"""


class Engine:
    """Counts what it is asked."""

    def __init__(self, source: str, spec: str, prompt: int, new: int):
        assert source == "shape:qwen3-0.6b" and (prompt, new) == (8, 4)
        self.dtypes = {"prefill": torch.bfloat16, "decode": torch.float16}
        self.model = type("Model", (), {"step_bytes": staticmethod(lambda batch: 500), "isa": "avx2", "kernel": spec})
        self.models = {"prefill": self.model, "decode": self.model}

    def prefill(self, tokens: list[int]) -> None:
        assert len(tokens) == 8

    def decode(self, depth: int, new: int) -> None:
        assert (depth, new) == (8, 4)


@pytest.fixture
def side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "side.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(llamacpp, "_SIDE", script)
    monkeypatch.setattr(llamacpp, "install", lambda folder, isa, say: Path(sys.executable))
    monkeypatch.setattr(llamacpp, "Ours", Engine)
    monkeypatch.setattr(llamacpp, "REST_S", 0.0)
    monkeypatch.setattr(llamacpp.card, "read_bandwidth", lambda device: 1e10)
    return script


def run(folder: Path) -> dict[str, Any]:
    return llamacpp.compare("qwen3-0.6b", folder, "native", prompt=8, new=4, rounds=3, say=lambda words: None)


def test_both_sides_and_both_phases_are_timed(side: Path, tmp_path: Path) -> None:
    found = json.loads(json.dumps(run(tmp_path)))
    assert [(r["phase"], r["side"]) for r in found["rows"]] == [
        (phase, name) for phase in ("prefill", "decode") for name in ("w4a8-g64", "Q4_0", "w8a8", "Q8_0")
    ]
    for row in found["rows"]:
        assert len(row["samples_s"]) == 3 and row["lo"] <= row["tok_s"] <= row["hi"]
        assert row["step_bytes"] == (1000 if row["side"].startswith("Q") else 500)
    decode = next(r for r in found["rows"] if (r["phase"], r["side"]) == ("decode", "w8a8"))
    assert decode["against"] == "Q8_0" and decode["isa"] == "avx2" and decode["dtype"] == "float16"
    assert decode["share_of_read"] == pytest.approx(decode["tok_s"] * 500 / 1e10)
    shown = io.StringIO()
    Console(width=200, file=shown).print(llamacpp.table(found))
    assert "Q4_0" in shown.getvalue() and "llama-cpp-python 0.0" in shown.getvalue()


def test_what_llamacpp_says_is_passed_on(side: Path, tmp_path: Path) -> None:
    other = llamacpp.Side(Path(sys.executable))
    with pytest.raises(llamacpp.Absent, match=r"llama\.cpp, dance: ValueError: dance"):
        other("dance", tmp_path)
    other.close()
    side.write_text("raise SystemExit(3)")
    with pytest.raises(llamacpp.Absent, match="ended with 3 during 'load'"):
        llamacpp.Side(Path(sys.executable))("load", tmp_path)
