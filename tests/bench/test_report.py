"""The report: one line per spec from two records per side, within 120 columns, honest about what is missing."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from percard.bench import report
from percard.bench.record import Record


def row(spec: str, phase: str, seconds: float, head: str = "16bit", **changes) -> Record:
    """A record of 64 prompt tokens or one step, three samples around `seconds`."""
    samples = [seconds * 1e6 * f for f in (1.1, 1.0, 0.9)]
    case = "m.model.pp64.b1" if phase == "prefill" else "m.model.tg8.d64.b1"
    return Record(
        **{
            "cell_key": f"{spec}{phase}{head}",
            "level": "model",
            "case": case,
            "cpu": {"model": "A processor", "threads": 2, "torch_isa": "AVX512", "noise_floor_pct": 1.25},
            "env": {"torch": "2.13"},
            "model": {"id": "m", "weights": "synthetic", "layers_run": 2, "layers": 28},
            "shape": {"batch": 1, "isl": 64, "osl": 8},
            "scheme": {"spec": spec, "head": head, "notes": []},
            "body": {"impl": "matmul_x.cpu", "isa": "avx2", "baseline_dtype": "bf16", "baseline_probe": "bf16 1.00 ms"},
            "clock": {"rounds": 3, "noisy": ["virtual machine"]},
            "latency_us": {"samples": samples},
            "tokens": {"tok_s": 1 / seconds, "vs_fp16": {"same_batch": {"ratio": 2.0, "ci95": [1.9, 2.1]}}},
            "memory": {"weights": 1_000_000},
            "quality": {
                "gate": "green",
                "model": "tiny",
                "kl": 0.0012,
                "top1": 0.981,
                "ppl": 3.5,
                "protocol": "p; reference in",
            },
        }
        | changes
    )


@pytest.fixture
def records() -> list[Record]:
    made = [row("w4a16-g128", "decode", 0.01, "int8-row"), row("w4a16-g128", "decode", 0.02, "16bit")]
    made += [row("w4a16-g128", "prefill", 0.5, "int8-row"), row("bf16", "prefill", 0.64), row("bf16", "decode", 0.04)]
    return made


def test_lines_are_joined_from_phases_and_heads(records):
    base, quantised = report.rows(records)
    assert base.spec == "bf16" and base.prefill_tok_s["median"] == pytest.approx(100)
    assert quantised.decode_tok_s["median"] == pytest.approx(100) and quantised.head == "int8-row"
    assert quantised.decode_tok_s["lo"] == pytest.approx(1 / 0.011)
    assert quantised.decode_tok_s_16bit_head["median"] == pytest.approx(50)
    assert quantised.speed_model == "m (synthetic, 2 of 28 layers)" and quantised.quality_model == "tiny"


def test_a_later_record_replaces_an_earlier_one(records):
    assert report.rows([*records, row("bf16", "decode", 0.08)])[0].decode_tok_s["median"] == pytest.approx(12.5)


def test_phases_in_unlike_float_types_are_said(records):
    base = report.rows([row("fp32", "prefill", 1.0, memory={"weights": 2_000_000}), row("bf16", "decode", 1.0)])[0]
    assert base.size_bytes == 1_000_000
    assert base.spec == "fp32/bf16" and base.notes == ("prefill in fp32, decode in bf16",)


def test_the_table_fits_120_columns(records):
    wide = row("w4a16-g128-asym", "decode", 1e-5, "int8-row", memory={"weights": 80_123_456_789})
    wide_prefill = row("w4a16-g128-asym", "prefill", 1e-5, "int8-row")
    out = io.StringIO()
    found = report.rows([*records, wide, wide_prefill])
    Console(file=out, width=report.WIDTH, force_terminal=False).print(report.table(found, report.title(records)))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    assert "2 of 28 layers" in out.getvalue() and "w4a16-g128-asym" in out.getvalue()
    assert "98.1%" in out.getvalue() and "matmul_x.cpu" in out.getvalue()


def test_markdown_and_footnotes_say_what_the_figures_are_of(records):
    text = report.markdown(report.rows(records), report.title(records), report.footnotes(records))
    for words in ("batch 1", "A processor, 2 threads", "differs from itself by 1.2 %", "noisy: virtual machine"):
        assert words in text
    assert "gate on tiny: p" in text and "our bodies avx2" in text and "the fastest (bf16 1.00 ms a layer)" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 4


def test_what_was_not_measured_is_a_dash(records):
    bare = row("w3a16-g64", "decode", 1.0, latency_us=None, tokens=None, quality={"gate": "none"})
    values = report.cells(report.rows([bare])[0])
    assert values[1:5] == ("none", "-", "-", "-") and values[6:10] == ("-",) * 4


def test_the_picture_is_drawn_or_its_absence_explained(records, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    files = report.write(tmp_path, records)
    assert files[-1].read_bytes().startswith(b"\x89PNG")
    assert "](pareto.png)" in files[0].read_text()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.picture(report.rows(records), tmp_path / "x.png", "") == (
        False,
        "No pareto.png: matplotlib is not installed (pip install 'percard[bench]').",
    )
