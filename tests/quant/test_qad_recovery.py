"""What training after quantising brings back: tiny-qwen3 at W4 and W3, its scales and 16-bit parameters, its own 16-bit self as teacher.

The control has the very same start, GPTQ's values, as 16-bit weights that nothing rounds, and trains all of them with the same
tokens: what rounding costs while training is what the other arm is behind it.

    pytest -m full -s tests/quant/test_qad_recovery.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from percard.bench import engine, quality, recovery
from percard.formats import affine
from percard.formats.tensor import QuantTensor
from percard.quant import distill, quantize
from percard.quant.distill_plan import Wish
from percard.quant.pair import Pair
from percard.quant.recipe import Recipe

ROOT = Path(__file__).parents[2]
EXAMPLE, RECORD = ROOT / "examples" / "tiny-qwen3", ROOT / "bench" / "results" / "qad-tiny-qwen3.json"
BATCH, WINDOW, HELD_OUT, CHARACTERS = 16, 256, 16_384, 6_500_000
OF_RTN = 0.5  # share of RTN's KL that may be left
# spec -> steps, rate of the scales, share of GPTQ's KL that has to go, rate of the control
CASES = {"w4a16-g64": (240, 2e-3, 0.25, 5e-5), "w3a16-g64": (400, 3e-3, 0.30, 5e-5)}


def free(made: Path, out: Path) -> Path:
    """The values of a quantised checkpoint as a 16-bit one."""
    pair = Pair.open(made, EXAMPLE)
    found = {name: pair.read(name) for name in pair.source.names}
    plain = {n: affine.dequantize(t) if isinstance(t, QuantTensor) else t for n, t in found.items()}
    out.mkdir()
    # Codes of 4 bits times scales of bf16 need more digits than bf16 has.
    save_file({n: t.half().contiguous() for n, t in plain.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps({**pair.source.config, "dtype": "float16", "torch_dtype": "float16"}))
    (out / "tokenizer.json").write_bytes((EXAMPLE / "tokenizer.json").read_bytes())
    return out


@pytest.mark.full
@pytest.mark.parametrize("spec", CASES)
def test_training_brings_back_a_part_of_what_rounding_lost(tmp_path: Path, spec: str) -> None:
    steps, rate, falls, plain_rate = CASES[spec]
    text = EXAMPLE / "calibration.txt"
    gptq = Recipe.from_flags(spec=spec, method="gptq", calibration=text, samples=64, seq_len=WINDOW)
    quantize.run(EXAMPLE, tmp_path / "gptq", gptq)
    quantize.run(EXAMPLE, tmp_path / "rtn", Recipe.from_flags(spec=spec, method="rtn"))
    recovery.write_texts(EXAMPLE, tmp_path, CHARACTERS)
    arms: dict[str, tuple[Path, dict[str, Any]]] = {
        "trained": (tmp_path / "gptq", {"lr": rate, "scales_only": True, "train_rest": True}),
        "control": (free(tmp_path / "gptq", tmp_path / "free"), {"lr": plain_rate}),
    }
    for name, (start, over) in arms.items():
        wish = Wish(
            str(tmp_path / "train.jsonl"), steps=steps, batch=BATCH, seq_len=WINDOW, every=1000, checkpointing=False,
            device="cpu", **over,
        )  # fmt: skip
        distill.run(start, EXAMPLE, tmp_path / name, wish)
    reference = engine.load(EXAMPLE, dtype=torch.float32)
    ids = quality.read_ids(EXAMPLE / "heldout.txt", EXAMPLE, HELD_OUT)
    found = {name: recovery.score(tmp_path / name, reference, ids) for name in ("rtn", "gptq", "trained", "control")}
    for name, cell in found.items():
        gone = 1 - cell["kl"] / found["gptq"]["kl"]
        print(f"{spec} {name}: KL {cell['kl']:.5f} ({gone:.1%} below GPTQ's), top-1 {cell['top1']:.2%}", flush=True)
    assert found["trained"]["kl"] <= (1 - falls) * found["gptq"]["kl"]
    assert found["trained"]["kl"] <= OF_RTN * found["rtn"]["kl"]
    assert found["trained"]["top1"] >= found["gptq"]["top1"]


@pytest.mark.parametrize("spec", CASES)
def test_the_record_holds_what_is_asked_and_docs_say_the_same(spec: str) -> None:
    steps, rate, falls, plain_rate = CASES[spec]
    found = json.loads(RECORD.read_text())
    arms = {arm["arm"]: arm for arm in found["arms"] if arm["spec"] == spec}
    rtn, gptq, trained = (arms[name] for name in ("rtn", "gptq", "trained"))
    assert found["data"]["characters"] == CHARACTERS and all(arm["tokens"] == 16_320 for arm in arms.values())
    assert (trained["steps"], trained["lr"], trained["batch"], trained["window"]) == (steps, rate, BATCH, WINDOW)
    fall = 1 - trained["kl"] / gptq["kl"]
    assert fall >= falls and trained["kl"] <= OF_RTN * rtn["kl"] and trained["top1"] >= gptq["top1"]
    control = arms["control"]
    assert (control["steps"], control["lr"]) == (steps, plain_rate)
    bound = f"{1 - control['kl'] / gptq['kl']:.0%}"
    kl = " | ".join(f"{arm['kl']:.5f}" for arm in (rtn, gptq, trained))
    row = f"| {spec} | {steps} | {rate:g} | {kl} | {fall:.0%} | {bound} | {gptq['top1']:.1%} -> {trained['top1']:.1%} |"
    assert row in (ROOT / "docs" / "distill.md").read_text(), row
