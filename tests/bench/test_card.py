"""The table of cards, and what the machine says of itself."""

from __future__ import annotations

import subprocess
import sys

import torch

from percard.bench import card

CPU = torch.device("cpu")


def test_the_table_is_well_formed():
    ids = [row["id"] for row in card.published()]
    names = [name for row in card.published() for name in row["device_names"]]
    assert len(set(ids)) == len(ids) >= 15 and len(set(names)) == len(names)
    for row in card.published():
        assert row["source"] and row["confidence"] in ("datasheet", "secondary", "disputed"), row["id"]
        assert 80 <= row["sm"] <= 130 and row["arch"] in ("ampere", "ada", "hopper", "blackwell"), row["id"]
        assert 100 < row["bandwidth_gbs"] < 20_000 and 20 < row["bf16_tflops"] < 10_000, row["id"]
        assert row["memory_mib"] is None or abs(row["memory_mib"] / 1024 / row["memory_gb"] - 1) < 0.12, row["id"]
        assert set(row["unverified"]) <= set(row), row["id"]
        if row["id"] != "b300-288-sxm":  # its row says why INT8 is the slow path there
            assert row["int8_tops"] >= row["bf16_tflops"], row["id"]


def test_a_row_is_found_by_exact_name_and_memory():
    assert card.published_row("NVIDIA H20", 97871)["id"] == "h20-96"
    assert card.published_row("NVIDIA H20", 143771) is None
    assert card.published_row("NVIDIA H200 NVL", 143771) is None
    assert card.published_row("NVIDIA H2", 97871) is None


def test_the_machine_is_described():
    found = card.fingerprint(CPU)
    assert found["card"] == {}
    assert found["cpu"]["threads"] == torch.get_num_threads() and found["cpu"]["model"]
    assert found["env"]["torch"] == torch.__version__
    assert found["cpu"]["torch_isa"] in card.describe(CPU)


def test_caps_of_the_instruction_set_are_said(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert card.torch_isa().endswith("ONEDNN_MAX_CPU_ISA=AVX2")


def test_bandwidth_is_a_rate(monkeypatch):
    monkeypatch.setattr(card, "last_level_cache", lambda device: 0)
    assert 1e8 < card.read_bandwidth(CPU, seconds=0) < 1e13


def test_a_busy_machine_is_noisy(monkeypatch):
    monkeypatch.setattr(card, "cpu", lambda: {"virtual": False, "governor": "powersave", "affinity": 2})
    monkeypatch.setattr(card.os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    assert card.noise(CPU) == ["governor powersave", "load 9.0 on 2 cores"]
    monkeypatch.setattr(card.os, "getloadavg", lambda: (0.1, 9.0, 9.0))
    monkeypatch.setattr(card, "cpu", lambda: {"virtual": False, "governor": "performance", "affinity": 2})
    assert card.noise(CPU) == []


def test_importing_the_bench_touches_no_card_and_no_triton():
    modules = ["engine", "clock", "card", "quality", "record", "report", "probe", "model"]
    words = "; ".join(f"import percard.bench.{name}" for name in modules)
    code = f"import sys, torch; {words}; assert 'triton' not in sys.modules; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code + "; assert 'matplotlib' not in sys.modules"], check=True)
