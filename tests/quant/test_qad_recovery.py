"""What training after quantising brings back: tiny-qwen3 at W4 and W3, its scales and 16-bit parameters, its own 16-bit self as teacher.

Scales alone are 98,304 numbers beside 1.05 M of the embedding; one pass over 410,000 tokens. Measured (docs/distill.md): KL falls by
20 % at W4 and 23 % at W3. Asked is three quarters of the lesser one, since another Python has another library to train on.

    pytest -m full -s tests/quant/test_qad_recovery.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from percard.bench import engine, quality, recovery
from percard.quant import distill, quantize
from percard.quant.distill_plan import Wish
from percard.quant.recipe import Recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
STEPS, BATCH, WINDOW, HELD_OUT = 100, 16, 256, 16_384
FALLS, OF_RTN = 0.15, 0.5  # of GPTQ's KL; share of RTN's that may be left
RATES = {"w4a16-g64": 1e-3, "w3a16-g64": 2e-3}


@pytest.mark.full
@pytest.mark.parametrize("spec", RATES)
def test_scales_bring_back_a_part_of_what_rounding_lost(tmp_path: Path, spec: str) -> None:
    text, seq_len = EXAMPLE / "calibration.txt", WINDOW
    gptq = Recipe.from_flags(spec=spec, method="gptq", calibration=text, samples=64, seq_len=seq_len)
    quantize.run(EXAMPLE, tmp_path / "gptq", gptq)
    quantize.run(EXAMPLE, tmp_path / "rtn", Recipe.from_flags(spec=spec, method="rtn"))
    recovery.write_texts(EXAMPLE, tmp_path)
    wish = Wish(
        str(tmp_path / "train.jsonl"), steps=STEPS, batch=BATCH, seq_len=seq_len, lr=RATES[spec], every=1000,
        checkpointing=False, device="cpu", scales_only=True, train_rest=True,
    )  # fmt: skip
    distill.run(tmp_path / "gptq", EXAMPLE, tmp_path / "trained", wish)
    reference = engine.load(EXAMPLE, dtype=torch.float32)
    ids = quality.read_ids(EXAMPLE / "heldout.txt", EXAMPLE, HELD_OUT)
    rtn, start, trained = (recovery.score(tmp_path / name, reference, ids) for name in ("rtn", "gptq", "trained"))
    for name, found in (("rtn", rtn), ("gptq", start), ("trained", trained)):
        print(f"{spec} {name}: KL {found['kl']:.5f}, top-1 {found['top1']:.2%}", flush=True)
    assert trained["kl"] <= (1 - FALLS) * start["kl"]
    assert trained["kl"] <= OF_RTN * rtn["kl"]
    assert trained["top1"] >= start["top1"]
