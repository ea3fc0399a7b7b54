"""The `bench model` verb on small models: what is timed, gated, refused and written; no test asks how fast."""

from __future__ import annotations

import json
import re

import pytest
import torch

from percard.bench import fair, report
from percard.bench import model as bench_model
from percard.bench import probe as probe_module
from percard.bench.engine import load_config
from percard.bench.model import NotComparable, Plan, run
from percard.bench.probe import Probe
from percard.bench.record import read
from percard.formats.spec import FormatError, QuantSpec

CPU = torch.device("cpu")
PLAN = Plan(prompt=16, new=3, rounds=3)
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64, "vocab_size": 300}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}


@pytest.fixture
def shape(tmp_path, monkeypatch) -> str:
    """A synthetic shape that is small enough for a test."""
    raw = json.loads((load_config.__globals__["SHAPES"] / "qwen3-0.6b.json").read_text())
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "small.json").write_text(json.dumps(raw | SMALL))
    monkeypatch.setitem(load_config.__globals__, "SHAPES", tmp_path / "shapes")
    return "shape:small"


@pytest.fixture
def texts(checkpoint, tmp_path):
    """A real checkpoint with a tokenizer, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = checkpoint("qwen3", dtype=torch.bfloat16, torch_dtype="bfloat16", **SMALL)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{(7 * i * i + 3) % 300}" for i in range(400)))
    return folder, text


def by_case(records) -> dict:
    return {(r.scheme["spec"], r.scheme["head"], ".pp" in r.case): r for r in records if ".mix" not in r.case}


def test_synthetic_weights_both_phases_both_heads(shape, tmp_path):
    out, words = tmp_path / "records.jsonl", []
    records = run(shape, ["w8a8", "w4a16-g64"], plan=PLAN, device=CPU, out=out, progress=words.append, command="c")
    kept = {r.cell_key: r for r in read(out)}
    assert len(kept) == len(records) and all(kept[r.cell_key].latency_us == r.latency_us for r in records)
    heads = [(r.scheme["spec"], r.scheme["head"]) for r in records if ".tg3.d16.b1" in r.case]
    assert heads[1:] == [("w8a8", "int8-row"), ("w8a8", "16bit"), ("w4a16-g64", "int8-row"), ("w4a16-g64", "16bit")]
    assert len([r for r in records if ".pp16.b1" in r.case]) == 3  # the 16-bit-head twins decode only
    base = records[0]
    assert base.body["baseline_dtype"] == base.scheme["spec"] and base.body["impl"] == "torch"
    assert re.match(r"(fp32|bf16|fp16)( mv)? [\d.]+ ms", base.body["baseline_probe"])  # those that came near
    for record in records:
        assert record.quality["gate"] == "synthetic" and record.model["weights"] == "synthetic"
        assert len(record.latency_us["samples"]) == 3 and record.code["command"] == "c"
        phase = "tok_s_in" if ".pp" in record.case else "tok_s"
        per_call = 16 if ".pp" in record.case else 3 if ".mix" in record.case else 1
        assert record.tokens[phase] == pytest.approx(per_call / record.latency_us["median"] * 1e6)
        assert record.tokens["vs_fp16"]["same_batch"]["batch_fp16"] == 1
    assert len({record.cell_key for record in records}) == len(records)
    found = by_case(records)
    quantised = found["w8a8", "int8-row", False]
    fused = "rmsnorm_quantize.cpu + silu_mul_quantize.cpu + quantize_rows.cpu + matmul_w8a8.cpu"
    assert quantised.body["impl"] == fused and not quantised.body["same_fusions"]
    assert quantised.quality["sqnr_db"] > 30
    assert quantised.memory["weights"] > found["w8a8", "16bit", False].memory["weights"]  # tied: a copy is added
    assert any("probing" in line for line in words) and any("timing" in line for line in words)


def test_a_run_is_one_table_one_json_one_markdown(shape, tmp_path):
    records = run(shape, ["w4a8-g64"], plan=PLAN, device=CPU)
    found = report.rows(records)
    assert [row.spec for row in found][1:] == ["w4a8-g64"] and found[1].head == "int8-row"
    assert found[1].decode_tok_s["lo"] <= found[1].decode_tok_s["median"] <= found[1].decode_tok_s["hi"]
    assert found[1].decode_tok_s_16bit_head and found[0].decode_ratio["ratio"] == 1
    files = report.write(tmp_path / "out", records, sections={"One prompt": "text"})
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["baseline"].keys() == data["variants"][0].keys()
    for key in (
        "spec",
        "quality_model",
        "speed_model",
        "gate",
        "size_bytes",
        "perplexity",
        "kl",
        "top1",
        "kernel",
        "head",
    ):
        assert key in data["baseline"]
    assert set(data["variants"][0]["prefill_tok_s"]) == {"median", "lo", "hi"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| w4a8-g64 |" in text and "## One prompt" in text and "noise floor" in text
    assert "No pareto.png: fewer than two rows" in text and len(files) == 2


def test_real_weights_pass_the_gate_first(texts):
    folder, text = texts
    records = run(folder, ["w8a8"], plan=PLAN, text=text, device=CPU)
    base, quantised = report.rows(records)
    assert quantised.gate in ("green", "red") and 0 < quantised.kl < 0.1 and quantised.top1 > 0.8
    assert base.gate == "none" and base.kl == 0 and base.perplexity > 1
    assert quantised.quality_model == quantised.speed_model == base.quality_model
    assert "windows of 64" in records[-1].quality["protocol"]


def test_a_red_gate_has_no_speed(texts, monkeypatch):
    folder, text = texts
    monkeypatch.setitem(bench_model.quality.THRESHOLDS, 4, {"kl": 0.0, "top1": 1.0, "perplexity": 0.0})
    records = run(folder, ["w4a16-g64", "w8a8"], plan=PLAN, text=text, device=CPU)
    red = [r for r in records if r.scheme["spec"] == "w4a16-g64"]
    assert red and all(r.tokens is None and r.latency_us is None for r in red)
    assert red[0].quality["reasons"][0].startswith("KL")
    row = next(row for row in report.rows(records) if row.spec == "w4a16-g64")
    assert row.gate == "red" and row.decode_tok_s is None and report.cells(row)[6] == "-"


def test_a_gate_measured_elsewhere_is_carried_with_its_model(shape):
    gates = {"w8a8": {"gate": "green", "model": "tiny", "kl": 0.001, "top1": 0.99, "ppl": 3.0}}
    gates["baseline"] = {"gate": "none", "model": "tiny", "kl": 0.0, "top1": 1.0, "ppl": 2.9}
    base, row = report.rows(run(shape, ["w8a8"], plan=PLAN, gates=gates, device=CPU))
    assert (row.gate, row.quality_model, row.kl, row.perplexity) == ("green", "tiny", 0.001, 3.0)
    assert row.speed_model == "small (synthetic)" and base.perplexity == 2.9


def test_a_quantised_checkpoint_is_timed_against_its_source(texts, tmp_path):
    from safetensors.torch import load_file, save_file

    from percard.formats import affine, compressed_tensors

    folder, text = texts
    tensors, config = load_file(folder / "model.safetensors"), load_config(folder)
    spec = QuantSpec.parse("w4a16-g64")
    modules = [f"model.layers.{i}.{name}" for i in range(config.layers) for name in config.linears()]
    for module in modules:
        qt = affine.quantize(tensors.pop(f"{module}.weight"), spec)
        for suffix, tensor in compressed_tensors.write(qt, torch.bfloat16).items():
            tensors[f"{module}.{suffix}"] = tensor.contiguous()
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = compressed_tensors.config(dict.fromkeys(modules, spec), ["lm_head"])
    packed = tmp_path / "packed"
    packed.mkdir()
    save_file(tensors, str(packed / "model.safetensors"), metadata={"format": "pt"})
    (packed / "config.json").write_text(json.dumps(raw))
    with pytest.raises(FormatError, match="--against"):
        run(packed, plan=PLAN, text=text, device=CPU)
    with pytest.raises(FormatError, match="--specs has no meaning"):
        run(packed, ["w8a8"], plan=PLAN, against=folder, text=text, device=CPU)
    rows = report.rows(run(packed, plan=PLAN, against=folder, text=text, device=CPU))
    assert [row.spec for row in rows][1:] == ["w4a16-g64"] and rows[1].kernel.startswith("matmul_w4a16.cpu")


def test_a_pruned_child_is_timed_against_the_whole_original(texts, tmp_path):
    """Fewer blocks and a narrower ffn: the baseline keeps all of its own, and the child's gate is against it."""
    from safetensors.torch import load_file, save_file

    folder, text = texts
    tensors = load_file(folder / "model.safetensors")
    kept = {}
    for name, tensor in tensors.items():
        if ".layers.1." in name:
            continue
        narrow = tensor[:128] if "gate_proj" in name or "up_proj" in name else tensor
        kept[name] = (tensor[:, :128] if "down_proj" in name else narrow).contiguous()
    child = tmp_path / "pruned"
    child.mkdir()
    save_file(kept, str(child / "model.safetensors"), metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    changed = {"num_hidden_layers": 1, "intermediate_size": 128}
    changed |= {"layer_types": raw["layer_types"][:1]} if raw.get("layer_types") else {}
    (child / "config.json").write_text(json.dumps(raw | changed))
    with pytest.raises(FormatError, match="--specs has no meaning"):
        run(child, ["w8a8"], plan=PLAN, against=folder, text=text, device=CPU)
    records = [r for r in run(child, plan=PLAN, against=folder, text=text, device=CPU) if ".tg" in r.case]
    base, other = records
    assert (base.model["layers_run"], other.model["layers_run"], other.model["layers"]) == (2, 1, 1)
    assert other.scheme["spec"] == "child" and other.quality["kl"] > 0 and other.quality["gate"] == "none"
    assert base.memory["kv_bytes_per_token"] == 2 * other.memory["kv_bytes_per_token"]
    assert base.memory["weights"] > other.memory["weights"] and base.roofline["bytes"] > other.roofline["bytes"]
    assert [row.spec for row in report.rows(records)][1] == "child"


def test_what_is_refused(shape, texts, monkeypatch):
    with pytest.raises(FormatError, match="--text"):
        run(texts[0], ["w8a8"], plan=PLAN, device=CPU)
    with pytest.raises(FormatError, match="unknown spec"):
        run(shape, ["w5a5"], plan=PLAN, device=CPU)
    with pytest.raises(FormatError, match="do not fit the context of 64"):
        run(shape, [], plan=Plan(prompt=8, new=64), device=CPU)
    with pytest.raises(FormatError, match=r"layers=3 is outside 1 \.\. 2"):
        run(shape, [], plan=Plan(prompt=8, new=2, layers=3), device=CPU)
    monkeypatch.setattr(fair.card, "free_bytes", lambda device: 1000)
    with pytest.raises(NotComparable, match="--layers N"):
        run(shape, ["w8a8"], plan=PLAN, device=CPU)


def test_weights_that_fit_the_cache_are_refused_on_a_card_and_said_on_a_cpu(monkeypatch):
    config = load_config("shape:qwen3-0.6b")
    monkeypatch.setattr(fair.card, "last_level_cache", lambda device: 2**30)
    assert fair.cache_noise(config, CPU)[0].startswith("cache: weights of 840 MiB")
    with pytest.raises(NotComparable, match="stay in the 1024 MiB cache"):
        fair.cache_noise(config, torch.device("cuda"))
    monkeypatch.setattr(fair.card, "last_level_cache", lambda device: 2**25)
    assert fair.cache_noise(config, torch.device("cuda")) == []


def test_layers_are_cut_to_a_budget():
    config = load_config("shape:qwen3-0.6b")
    times = {"prefill": {torch.bfloat16: 0.1}, "decode": {torch.bfloat16: 0.001}}
    probes = {"baseline": Probe(times, {}), "w8a8": Probe(times, {})}

    def layers(**options) -> int:
        return fair.choose_layers(config, probes, Plan(**options))[0].layers

    assert layers() == 28 and layers(budget_s=1e9) == 28
    assert 2 < layers(budget_s=20.0) < 28
    assert layers(budget_s=1e-9) == 2
    assert layers(budget_s=1e-9, layers=5) == 5


def test_the_probe_names_the_fastest_and_what_failed(shape, monkeypatch):
    found = Probe({"prefill": {torch.float32: 2.0, torch.bfloat16: 3.0}, "decode": {torch.bfloat16: 0.5}}, {})
    assert found.fastest("prefill") == torch.float32 and found.words("prefill") == "fp32 2000.00 ms, bf16 3000.00 ms"
    assert Probe(found.seconds, {}, frozenset([torch.bfloat16])).words("decode") == "bf16 mv 500.00 ms"
    real = probe_module._one

    def one(config, spec, dtype, *rest):
        if dtype == torch.float16:
            raise RuntimeError("no fp16 here\nsecond line")
        return real(config, spec, dtype, *rest)

    monkeypatch.setattr(probe_module, "_one", one)
    config = load_config(shape)
    found = probe_module.probe(config, None, [torch.float16, torch.float32], device=CPU, prompt=8)
    assert found.failed == {torch.float16: "fp16: no fp16 here"} and found.fastest("decode") == torch.float32
    with pytest.raises(RuntimeError, match="no fp16 here"):
        probe_module.probe(config, None, [torch.float16], device=CPU, prompt=8).fastest("prefill")


def test_a_mixture_of_experts_is_compared_by_the_same_verb(tmp_path, monkeypatch):
    raw = json.loads((load_config.__globals__["SHAPES"] / "qwen3-30b-a3b.json").read_text())
    raw |= SMALL | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "mixture.json").write_text(json.dumps(raw))
    monkeypatch.setitem(load_config.__globals__, "SHAPES", tmp_path / "shapes")
    records = run("shape:mixture", ["w4a16-g64", "w8a8"], plan=PLAN, device=CPU)
    assert [r for r in records if r.status != "ok"] == []
    assert records[0].body["impl"] == "torch" and records[0].body["same_fusions"]
    found = by_case(records)
    four, eight = (found[spec, "int8-row", False] for spec in ("w4a16-g64", "w8a8"))
    assert four.body["impl"] == "matmul_w4a16.cpu + moe_matmul.cpu" and not four.body["same_fusions"]
    assert eight.body["impl"].endswith("quantize_rows.cpu + matmul_w8a8.cpu + moe_matmul.cpu")
    assert four.roofline["bytes"] < four.memory["weights"], "a step of one token reads two experts of six"
