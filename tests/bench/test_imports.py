"""Result files of other programs as Records: units, definitions, what stays null, and files that are something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from percard.bench import imports, record
from percard.formats.spec import FormatError

HERE = Path(__file__).parent / "imports"


def load(tool, name, **said):
    heard = []
    return imports.load(
        tool, HERE / name, imports.Said(**said), say=heard.append, command="percard bench import"
    ), heard


def changed(tmp_path, name, **changes):
    """A fixture with other fields; None takes one away."""
    row = json.loads((HERE / name).read_text().splitlines()[0]) | changes
    path = tmp_path / name
    path.write_text(json.dumps({key: value for key, value in row.items() if value is not None}))
    return path


def test_vllm_in_seconds_and_with_what_the_user_says():
    (row,), heard = load("vllm-serve", "vllm-serve.json", spec="w4a16-g128", card="h20-96", cards=2, usd_hour=2.0)
    assert (row.source, row.level, row.case) == ("vllm", "serve", "qwen3-8b.serve.vllm.b8")
    tokens = row.tokens
    assert (tokens["tok_s"], tokens["tok_s_in"], tokens["tok_s_per_card"]) == (256.0, 2048.0, 128.0)
    assert tokens["ttft_s"] == pytest.approx({"p50": 0.18, "p90": 0.21, "p99": 0.26})
    assert tokens["tpot_s"] == pytest.approx({"p50": 0.0295, "p90": 0.031, "p99": 0.033})
    assert tokens["e2e_s"]["p99"] == pytest.approx(4.4) and tokens["tok_s_per_user"] == pytest.approx(1 / 0.0295)
    assert tokens["goodput"] is None and "vs_fp16" not in tokens
    assert row.shape["batch"] == 8 and row.shape["isl"] == 1024 and row.shape["osl"] == 128
    assert row.shape["load"] == {"mix": "vllm", "rate": "inf", "seed": None, "requests": 40}
    assert row.card == {"spec_id": "h20-96", "name": "NVIDIA H20 96GB", "cards": 2}
    assert row.scheme == {"spec": "w4a16-g128", "kv_spec": None}
    assert row.quality["gate"] == "none" and row.latency_us is None and row.ts == "2026-03-01T10:15:00"
    # 4 dollars an hour for 2304 tokens a second
    assert row.money["usd_per_mtok"]["total"] == pytest.approx(4 / (2304 * 3600) * 1e6)
    assert heard == [f"{HERE}/vllm-serve.json: row 1: not read: build"]


def test_sglang_one_record_a_line():
    rows, heard = load("sglang", "sglang.jsonl")
    assert [row.case for row in rows] == ["qwen3-8b.serve.random.b16", "qwen3-8b.serve.random.rateinf"] and not heard
    assert rows[0].model == {"id": "Qwen/Qwen3-8B", "weights": "real", "tp": 2}
    assert rows[0].tokens["e2e_s"] == pytest.approx({"p50": 2.6, "p90": 2.75, "p99": 2.9})
    assert rows[0].tokens["ttft_s"] == pytest.approx({"p50": 0.095, "p90": None, "p99": 0.14})
    assert rows[0].tokens["tok_s_per_card"] is None and not rows[0].card  # nobody said how many
    assert rows[1].shape["batch"] is None and rows[1].shape["load"]["rate"] == "inf"


def test_llama_bench_prefill_is_a_call_and_decode_a_step():
    rows, heard = load("llama-bench", "llama-bench.json", spec="w4a16-g32")
    prefill, decode = rows
    assert (prefill.case, decode.case) == ("qwen3-8b-q4_k_m.model.pp512.b1", "qwen3-8b-q4_k_m.model.tg128.d4096.b1")
    assert prefill.latency_us["samples"] == [100000.0, 101000.0, 99000.0] and prefill.tokens["tok_s_in"] == 5120.0
    assert decode.latency_us["samples"] == pytest.approx([10000.0, 10078.125, 9921.875])
    assert decode.tokens["tok_s"] == 100.0 and decode.shape["kv_len"] == 4096
    assert decode.scheme == {
        "spec": "w4a16-g32",
        "kv_spec": "fp16",
        "weight_bits": 5.0,
        "format": "qwen3 8B Q4_K - Medium",
    }
    assert decode.card == {"name": "NVIDIA H20", "cards": 1} and decode.memory == {"weights": 5e9}
    assert decode.env == {"rivals": {"llama.cpp": "0123abcd"}}
    assert heard == [
        f"{HERE}/llama-bench.json: row 3: 512 prompt and 128 new tokens: neither prefill nor decode alone, left out"
    ]
    (cpu,), _ = load("llama-bench", "llama-bench-cpu.jsonl")
    assert (
        cpu.card == {} and cpu.cpu == {"model": "Some Processor", "threads": 2} and cpu.tokens["tok_s_per_card"] is None
    )


def test_a_tpot_that_counts_the_first_token_is_refused_or_converted(tmp_path):
    """128 tokens: first after 1600 ms, then 20 ms each, so 4140 ms in all; counted in, a token takes 32.3 ms."""
    whole = {"mean_ttft_ms": 1600.0, "median_ttft_ms": 1600.0, "mean_e2el_ms": 4140.0, "median_e2el_ms": 4140.0}
    wrong = changed(tmp_path, "vllm-serve.json", **whole, mean_tpot_ms=4140 / 128, median_tpot_ms=4140 / 128)
    with pytest.raises(FormatError, match=r"counts the first token in .* --tpot-includes-first converts it"):
        imports.load("vllm-serve", wrong)
    (row,) = imports.load("vllm-serve", wrong, imports.Said(tpot_includes_first=True))
    assert row.tokens["tpot_s"] == pytest.approx({"p50": 0.020, "p90": None, "p99": None})
    right = changed(tmp_path, "vllm-serve.json", **whole, mean_tpot_ms=20.0, median_tpot_ms=20.0)
    assert imports.load("vllm-serve", right)[0].tokens["tpot_s"]["p50"] == pytest.approx(0.020)


def test_single_requests_decide_where_the_file_has_them(tmp_path):
    path = changed(
        tmp_path,
        "vllm-serve.json",
        itls=[[0.02, 0.02], [0.04], []],
        output_lens=[3, 2, 1],
        ttfts=[1, 1, 1],
        median_tpot_ms=99.0,
    )
    (row,) = imports.load("vllm-serve", path)
    assert row.tokens["tpot_s"]["p50"] == pytest.approx(0.03) and row.tokens["tpot_s"]["p99"] == pytest.approx(0.0398)


def test_what_a_file_does_not_say_stays_null(tmp_path):
    bare = dict.fromkeys(("median_tpot_ms", "p90_tpot_ms", "p99_tpot_ms", "median_itl_ms", "p90_itl_ms", "p99_itl_ms"))
    (row,) = imports.load(
        "vllm-serve", changed(tmp_path, "vllm-serve.json", **bare, max_concurrency=None, request_rate=4.0)
    )
    assert row.tokens["tpot_s"] is None and row.tokens["itl_s"] is None and row.tokens["tok_s_per_user"] is None
    assert row.case == "qwen3-8b.serve.vllm.rate4.0" and row.tokens["concurrency"] is None
    assert row.money is None and row.card == {}


def test_failed_requests_are_told(tmp_path):
    heard = []
    imports.load("vllm-serve", changed(tmp_path, "vllm-serve.json", failed=3), say=heard.append)
    assert "3 requests failed; rates are those of the 40 that completed" in heard[0]


@pytest.mark.parametrize(
    ("tool", "name", "changes", "words"),
    [
        ("vllm-serve", "sglang.jsonl", {}, "no total_token_throughput.*looks like one of sglang"),
        ("sglang", "llama-bench-cpu.jsonl", {}, "no mean_e2e_latency_ms.*looks like one of llama-bench"),
        ("vllm-serve", "vllm-serve.json", {"completed": 0}, "completed is 0; expected a number above 0"),
        (
            "vllm-serve",
            "vllm-serve.json",
            {"output_throughput": "fast"},
            "output_throughput is 'fast'; expected a number",
        ),
        ("vllm-serve", "vllm-serve.json", {"total_output_tokens": None}, "total_output_tokens is missing"),
        ("vllm-serve", "vllm-serve.json", {"model_id": None}, "does not name the model; give --model ID"),
        ("sglang", "sglang.jsonl", {"server_info": None}, "does not name the model"),
        ("llama-bench", "llama-bench-cpu.jsonl", {"samples_ns": "1 2"}, "samples_ns is no list of numbers"),
    ],
)
def test_files_that_are_wrong_say_so(tmp_path, tool, name, changes, words):
    with pytest.raises(FormatError, match=words):
        imports.load(tool, changed(tmp_path, name, **changes))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nothing that can be imported"),
        ("{", ":1: not JSON"),
        ("[]", "nothing that can"),
        ("[3]", "row 1 is no object"),
    ],
)
def test_files_that_are_no_result(tmp_path, text, words):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=words):
        imports.load("vllm-serve", path)
    path.write_bytes(b"\x80\x81")
    with pytest.raises(FormatError, match="not text"):
        imports.load("vllm-serve", path)
    with pytest.raises(FormatError, match="no result files of 'trt'"):
        imports.load("trt", path)


def test_imported_once_stays_once(tmp_path):
    out = tmp_path / "records.jsonl"
    rows, _ = load("llama-bench", "llama-bench.json")
    assert imports.append_new(out, rows) == 2 and imports.append_new(out, rows) == 0
    assert [r.case for r in record.read(out)] == [r.case for r in rows]
    assert imports.in_words(rows[1]) == "100.0 tok/s out, 100.0 tok/s per card; not stated: spec"
