"""What distilling brings back after pruning: tiny-qwen3 without a quarter of its parameters, forward KL beside hard labels.

Recovered cross-entropy alone proves little: a teacher that is not trained out lets plain labels win back more than was lost
while the student drifts away from it. So there are two measures, and a control arm with the same steps on the same data.

    pytest -m full -s tests/quant/test_distill_recovery.py
"""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from percard.bench import engine, quality
from percard.quant import distill, prune
from percard.quant.distill_plan import Wish
from percard.quant.prune_plan import Wish as PruneWish
from percard.quant.prune_sizes import Rule
from percard.quant.text import Calibration

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
STEPS, BATCH, WINDOW, RATE = 150, 8, 256, 5e-4
TRAINED_ON, HELD_OUT = 2_500_000, 16_384  # characters of the standard library; tokens of heldout.txt
CE_BACK, KL_BACK, AHEAD = 0.70, 0.65, 0.10  # shares of what was lost; KL ahead of hard labels


def corpus(path: Path) -> Path:
    """A part of what tiny-qwen3 was trained on, in a seeded order; none of the held-out files."""
    spec = importlib.util.spec_from_file_location("train_tiny_qwen3", EXAMPLE / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts, _ = module.corpus()
    random.Random(0).shuffle(texts)
    size = 0
    with path.open("w") as file:
        for text in texts:
            if size > TRAINED_ON:
                break
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text)
    return path


@torch.no_grad()
def said(folder: Path, reference: engine.Model | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy, KL to the reference) of every scored held-out token."""
    ids = quality.read_ids(EXAMPLE / "heldout.txt", EXAMPLE, HELD_OUT)
    model = engine.load(folder, dtype=torch.float32)
    ce, kl = [], []
    for part in ids.view(-1, 8, WINDOW):
        log_q = torch.log_softmax(model.logits(part)[:, :-1].float(), -1)
        ce.append(-log_q.gather(-1, part[:, 1:, None]).flatten())
        if reference is not None:
            log_p = torch.log_softmax(reference.logits(part)[:, :-1].float(), -1)
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1).flatten())
    return torch.cat(ce), torch.cat(kl) if kl else torch.zeros(1)


@pytest.mark.full
def test_a_quarter_of_the_parameters_comes_back(tmp_path: Path) -> None:
    text = Calibration(str(EXAMPLE / "calibration.txt"), 32, WINDOW)
    child = tmp_path / "child"
    done = prune.run(EXAMPLE, child, PruneWish(calibration=text, rule=Rule(64, 1), target_params=0.75))
    teacher = engine.load(EXAMPLE, dtype=torch.float32)
    ce_teacher, _ = said(EXAMPLE)
    ce_child, kl_child = said(child, teacher)
    lost = ce_child - ce_teacher
    assert float(lost.mean()) > 10 * float(lost.std()) / len(lost) ** 0.5, "prune more: too little was lost to measure"
    data = corpus(tmp_path / "train.jsonl")
    back: dict[str, dict[str, float]] = {}
    arms: dict[str, dict[str, Any]] = {"fkl": {"loss": "fkl"}, "hard": {"loss": "none", "hard": 1.0}}
    for arm, over in arms.items():
        wish = Wish(
            str(data), steps=STEPS, batch=BATCH, seq_len=WINDOW, lr=RATE, checkpointing=False, device="cpu",
            every=1000, **over,
        )  # fmt: skip
        distill.run(child, EXAMPLE, tmp_path / arm, wish)
        ce, kl = said(tmp_path / arm, teacher)
        back[arm] = {
            "ce": float((ce_child.mean() - ce.mean()) / lost.mean()),
            "kl": 1 - float(kl.mean() / kl_child.mean()),
        }
        print(
            f"ffn 448 of 768 ({done['share']:.1%} of the parameters) {arm}: CE {float(ce_teacher.mean()):.4f} -> "
            f"{float(ce_child.mean()):.4f} -> {float(ce.mean()):.4f} ({back[arm]['ce']:.0%} back), "
            f"KL {float(kl_child.mean()):.4f} -> {float(kl.mean()):.4f} ({back[arm]['kl']:.0%} back)",
            flush=True,
        )
    assert back["fkl"]["ce"] >= CE_BACK and back["fkl"]["kl"] >= KL_BACK
    assert back["fkl"]["kl"] >= back["hard"]["kl"] + AHEAD
