"""examples/synthetic_checkpoint.py: what it writes is a checkpoint that the engine loads, and no two tensors are equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from percard.bench.engine import load
from percard.formats.checkpoint import Checkpoint

SCRIPT = Path(__file__).parents[2] / "examples" / "synthetic_checkpoint.py"
DENSE = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 127,
}
MOE = DENSE | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_it_loads_and_tensors_differ(tmp_path: Path, config: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "config.json"), str(tmp_path / "out")]
    done = subprocess.run([*command, "--layers", "2", "--vocab", "70"], capture_output=True, text=True, check=True)
    assert "wrote" in done.stdout
    found = Checkpoint.open(tmp_path / "out")
    assert found.config["num_hidden_layers"] == 2 and found.config["vocab_size"] == 70
    assert found.info("lm_head.weight").shape == (70, 64) and not any("layers.2" in name for name in found.names)
    assert ("model.layers.0.mlp.experts.3.down_proj.weight" in found.names) == (config is MOE)
    assert "model.layers.1.mlp.down_proj.weight" in found.names
    drawn = [found.read(name) for name in found.names if "norm" not in name]
    assert len({bytes(t.flatten().view(torch.uint8).tolist()[:64]) for t in drawn}) == len(drawn)
    for t in drawn:
        assert abs(float(t.float().std()) * t.shape[-1] ** 0.5 - 1) < 0.15
    logits = load(tmp_path / "out", dtype=torch.float32, device="cpu").logits(torch.arange(6)[None])
    assert logits.shape == (1, 6, 70) and bool(torch.isfinite(logits).all())
