"""report.json: round trip, other schemas, unknown keys."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from percard.formats.spec import FormatError
from percard.quant.report import Gate, Layer, Licence, Module, Promotion, Report, card, human, sqnr


def make() -> Report:
    return Report(
        verb="quantize",
        source="a",
        output="b",
        level="weights",
        modules=(Module("m", "w8a8", "rtn", (2, 4), 41.5, 16, 12), Module("n", "w8a8", "rtn", (2, 4), None, 16, 12)),
        kept={"lm_head": "rule"},
        bytes={"source": 2000, "output": 1200},
        seconds={"quantize": 1.0},
    )


def test_round_trip_and_unknown_keys(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(make().to_json())
    assert Report.load(file) == make()
    tree = {**json.loads(file.read_text()), "mood": "fine"}
    file.write_text(json.dumps(tree))
    assert Report.load(file).warnings == ("report.json: unknown key 'mood' was not read",)
    for broken in ("{", "[]", json.dumps({**tree, "schema": 2}), json.dumps({"schema": 1})):
        file.write_text(broken)
        with pytest.raises(FormatError, match=r"report\.json"):
            Report.load(file)


def test_card_of_a_folder_names_no_hub_model() -> None:
    text = card(make(), "my-folder", {})
    assert "base_model" not in text and "`my-folder`" in text and "41.5" in text
    assert "base_model: a/b" in card(make(), "a/b", {})


GATE = Gate(
    "green", 0.0123, 0.951, 10.1, 10.0, 800, "800 tokens in 2 windows of 401", "w8a8",
    limits={"kl": 0.03, "top1": 0.93}, text="held.txt", sha256="ab" * 32,
)  # fmt: skip


def full() -> Report:
    """A report with all that one can hold."""
    return dataclasses.replace(
        make(),
        level="model",
        fingerprints={"source": "aa"},
        calibration={
            "source": "/home/me/calib.jsonl",
            "sha256": "cd" * 32,
            "windows_used": 8,
            "window": 512,
            "seed": 3,
        },
        layers=(Layer(0, 0.05, 0.001), Layer(1, 0.25, 0.002, (40, 3, 0))),
        gates=(dataclasses.replace(GATE, gate="red", kl=0.2, reasons=("KL 0.2 is above 0.03",)), GATE),
        promotions=(Promotion(1, ("m", "n"), "w4a16", "w8a16-g128", 3000, 0.4),),
        accepts=({"engine": "vllm", "versions": "==1.*", "spec": "w8a8", "modules": "dense", "verdict": "runs"},),
        warnings=("look here",),
        checks={"transformed": 4},
    )


def test_all_of_it_comes_back_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(full().to_json())
    assert Report.load(tmp_path / "report.json") == full()
    tree = json.loads(full().to_json())
    assert [layer["starved"] for layer in tree["layers"]] == [None, 2] and tree["status"] == "green"
    tree["layers"][0]["colour"] = tree["gates"][0]["colour"] = tree["modules"][0]["colour"] = 1
    (tmp_path / "report.json").write_text(json.dumps(tree))
    warned = Report.load(tmp_path / "report.json").warnings
    assert [w for w in warned if "colour" in w] == [
        f"report.json: unknown key '{key}.colour' was not read" for key in ("modules", "layers", "gates")
    ]


def test_a_report_of_before_layers_and_gates_is_read(tmp_path: Path) -> None:
    tree = json.loads(make().to_json())
    for key in ("layers", "gates", "promotions", "accepts", "fingerprints", "calibration"):
        del tree[key]
    (tmp_path / "report.json").write_text(json.dumps(tree))
    assert Report.load(tmp_path / "report.json") == make()


def test_the_last_gate_decides_and_a_figure_that_is_no_number_is_null(tmp_path: Path) -> None:
    broken = dataclasses.replace(GATE, gate="red", kl=math.nan, perplexity=math.inf)
    report = dataclasses.replace(full(), gates=(GATE, broken))
    assert report.status == "red" and report.gate is broken
    (tmp_path / "report.json").write_text(report.to_json())
    assert "NaN" not in report.to_json() and json.loads(report.to_json())["gates"][1]["kl"] is None
    found = Report.load(tmp_path / "report.json").gate
    assert found is not None and math.isnan(found.kl) and found.gate == "red"


def test_the_card_says_what_a_user_asks() -> None:
    text = card(full(), "org/model", {"vllm 0.33": "vllm serve x"}, Licence("apache-2.0", "LICENSE"))
    for words in (
        "license: apache-2.0\nbase_model: org/model\nbase_model_relation: quantized\ntags: [compressed-tensors, quantized, w8a8]",
        "2 kB became 1.2 kB",
        "Licence of the source: apache-2.0, file `LICENSE`.",
        "| mean KL of the next token, nats | 0 | 0.01230 | at most 0.03 |",
        "| same likeliest next token | 100 % | 95.10% | at least 93% |",
        "| perplexity | 10.000 | 10.100 (+1.00%) | not gated in so small a model |",
        "Gate: **green**. Text: `held.txt`, sha256 abababababababab.",
        "Protocol: 800 tokens in 2 windows of 401.",
        "off by 25.0% of what the block adds at worst (block 1)",
        "Before layers were given more bits: KL 0.20000",
        "vllm 0.33:\n\n```\nvllm serve x\n```",
        "| w8a8 | 2 | rtn | 41.5 | 41.5 | `m` |",
        "Calibration text: `calib.jsonl`, sha256 cdcdcdcdcdcdcdcd, 8 windows of 512 tokens, seed 3.",
        "2 of 3 experts met fewer than 32 of its tokens.",
        "| 1 | `m` and 1 more | w4a16 | w8a16-g128 | 3 kB |",
        "- 1 x rule",
        "norms (where a method moved scales between weights, changed with them)",
        "- look here",
    ):
        assert words in text, words
    assert "\n\n\n" not in text
    bare = card(make(), "folder", {})
    assert "was not measured: no held-out text" in bare and "(level weights): **green**" in bare
    assert "license" not in bare and "Licence" not in bare and "No calibration text" in bare
    red = card(dataclasses.replace(full(), flags=("m: SQNR 3 dB",)), "x", {})
    assert "The report as a whole is **red**" in red and "- m: SQNR 3 dB" in red


@pytest.mark.parametrize(
    ("readme", "name"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# x\n", "apache-2.0"),
        ("---\r\nlanguage: en\r\nlicense: 'mit'\r\n---\r\n", "mit"),
        ("license: mit\n", ""),
        ("---\ntitle: x\n---\nlicense: mit\n", ""),
        ("---\nlicense: [a,\n  b]\n---\n", ""),
        ("", ""),
    ],
)
def test_the_licence_of_a_source(tmp_path: Path, readme: str, name: str) -> None:
    assert Licence.of(tmp_path) == Licence()
    (tmp_path / "README.md").write_bytes(readme.encode())
    assert Licence.of(tmp_path) == Licence(name)
    (tmp_path / "LICENSE.txt").write_text("x")
    assert Licence.of(tmp_path) == Licence(name, "LICENSE.txt")
    assert str(Licence.of(tmp_path)) == (f"{name}, " if name else "") + "file `LICENSE.txt`"


def test_numbers() -> None:
    assert sqnr(100.0, 1.0) == pytest.approx(20) and sqnr(1.0, 0.0) is None and sqnr(0.0, 0.0) is None
    assert math.isinf(sqnr(float("inf"), 1.0) or 0)
    assert [human(n) for n in (7, 1500, 16.4e9, 2e15)] == ["7 B", "1.5 kB", "16.4 GB", "2e+03 TB"]
