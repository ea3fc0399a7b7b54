"""What stands under bench/results: every row reads, names its command and machine, and carries no figure that it may not."""

from __future__ import annotations

import datetime
import math
import statistics
from pathlib import Path

import pytest

from percard.bench import record

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
FILES = sorted(RESULTS.rglob("*.jsonl"))


def test_there_are_records():
    assert len(FILES) >= 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_committed_records_are_honest(path):
    text = path.read_text(encoding="utf-8")
    found = list(record.read(path))  # types, known keys, no speed beside a red gate
    assert found and text.endswith("\n") and len(found) == len(text.splitlines())
    for row in found:
        where = f"{path.name}: {row.case}"
        assert row.code.get("command", "").startswith("percard "), where
        assert row.card.get("name") or row.cpu.get("model"), where
        datetime.datetime.strptime(row.ts, "%Y-%m-%dT%H:%M:%SZ")
        gate, latency, tokens = (row.quality or {}).get("gate"), row.latency_us, row.tokens or {}
        if row.status != "ok" or gate == "red":
            assert not latency and not tokens, where
            assert row.error or gate == "red" or (row.quality or {}).get("reasons"), where
            continue
        if latency:
            assert gate in ("green", "synthetic", "none") and row.clock.get("mode") and row.clock.get("rounds"), where
            samples = latency["samples"]
            assert samples and all(math.isfinite(s) and s > 0 for s in samples), where
            assert latency["median"] == pytest.approx(statistics.median(samples), rel=1e-6), where
            assert latency["lo"] <= latency["median"] <= latency["hi"], where
        if row.level in ("model", "serve") and tokens:
            assert row.model.get("id") and row.model.get("weights") in ("real", "synthetic"), where
            for way, ratio in (tokens.get("vs_fp16") or {}).items():
                if ratio["ratio"] is None:
                    assert ratio.get("reason"), f"{where}: {way}"
                else:
                    assert ratio["batch"] and ratio["batch_fp16"] and ratio["baseline_key"], f"{where}: {way}"
        if row.energy and row.energy.get("power_valid") is False:
            assert row.energy["power_reason"] and row.energy.get("energy_j") is None, where
        for rival in row.against or ():
            assert rival["status"] == "ok" or rival.get("reason"), where
