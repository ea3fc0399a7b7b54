"""A random Qwen3 of a few hundred kilobytes in two shards, with a tokenizer, and a way to run the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from percard import cli

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "eos_token_id": None,
    "torch_dtype": "bfloat16",
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors() -> dict[str, torch.Tensor]:
    """Random weights, scaled as trained ones are."""
    generator = torch.Generator().manual_seed(0)
    hidden, ffn, dim = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    q, kv = CONFIG["num_attention_heads"] * dim, CONFIG["num_key_value_heads"] * dim
    shapes = {"model.embed_tokens": (CONFIG["vocab_size"], hidden), "model.norm": (hidden,)}
    for i in range(CONFIG["num_hidden_layers"]):
        block = f"model.layers.{i}."
        shapes |= {f"{block}{n}_layernorm": (hidden,) for n in ("input", "post_attention")}
        shapes |= {f"{block}self_attn.{n}_norm": (dim,) for n in "qk"}
        shapes |= {f"{block}self_attn.q_proj": (q, hidden), f"{block}self_attn.o_proj": (hidden, q)}
        shapes |= {f"{block}self_attn.{n}_proj": (kv, hidden) for n in "kv"}
        shapes |= {f"{block}mlp.{n}_proj": (ffn, hidden) for n in ("gate", "up")}
        shapes |= {f"{block}mlp.down_proj": (hidden, ffn)}
    made = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        values = 1 + 0.1 * values if len(shape) == 1 else values / shape[-1] ** 0.5
        made[f"{name}.weight"] = values.to(torch.bfloat16)
    return made


def write(folder: Path, weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """A checkpoint folder of two shards; `changes` to config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    weights = tensors() if weights is None else weights
    names = sorted(weights)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    for shard, part in zip(SHARDS, halves, strict=True):
        save_file({n: weights[n].contiguous() for n in part}, folder / shard, metadata={"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in weights.values())
    where = {n: shard for shard, part in zip(SHARDS, halves, strict=True) for n in part}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good one; copy it before you break it."""
    return write(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@dataclass(frozen=True)
class Ran:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr; there must not be another."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def percard(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Runs a command line in this process; no hub is asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: object) -> Ran:
        capfd.readouterr()
        code = cli.run([str(a) for a in arguments])
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return call
