"""Small random checkpoints of every family, written by the safetensors library, for the tests of the workshop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

BASE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **BASE},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **BASE, "tie_word_embeddings": True},
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **BASE},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **BASE, "head_dim": None},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **BASE,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
    },
}


def tensors_of(config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of a model of `config`, by hand: the names are the test's own knowledge of the families."""
    random = torch.Generator().manual_seed(seed)
    h, f, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    d = config["head_dim"] or h // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    out: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int) -> None:
        scale = 0.02 if len(shape) > 1 else 1.0
        out[name] = (torch.randn(*shape, generator=random) * scale).to(dtype)

    add("model.embed_tokens.weight", config["vocab_size"], h)
    for i in range(config["num_hidden_layers"]):
        b = f"model.layers.{i}."
        for n, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            add(f"{b}self_attn.{n}.weight", rows, h)
            if kind == "qwen2":
                add(f"{b}self_attn.{n}.bias", rows)
        add(f"{b}self_attn.o_proj.weight", h, q)
        if kind.startswith("qwen3"):
            add(f"{b}self_attn.q_norm.weight", d)
            add(f"{b}self_attn.k_norm.weight", d)
        if kind == "qwen3_moe" and i not in config["mlp_only_layers"]:
            add(f"{b}mlp.gate.weight", config["num_experts"], h)
            for e in range(config["num_experts"]):
                add(f"{b}mlp.experts.{e}.gate_proj.weight", config["moe_intermediate_size"], h)
                add(f"{b}mlp.experts.{e}.up_proj.weight", config["moe_intermediate_size"], h)
                add(f"{b}mlp.experts.{e}.down_proj.weight", h, config["moe_intermediate_size"])
        else:
            add(f"{b}mlp.gate_proj.weight", f, h)
            add(f"{b}mlp.up_proj.weight", f, h)
            add(f"{b}mlp.down_proj.weight", h, f)
        add(f"{b}input_layernorm.weight", h)
        add(f"{b}post_attention_layernorm.weight", h)
    add("model.norm.weight", h)
    if not config["tie_word_embeddings"]:
        add("lm_head.weight", config["vocab_size"], h)
    return out


def save(folder: Path, config: dict[str, Any] | None, tensors: dict[str, torch.Tensor], shards: int = 2) -> Path:
    """A checkpoint folder as the hub has them: shards with an index, a tokenizer and a licence beside."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    files = {n: f"model-{1 + i * shards // len(names):05d}-of-{shards:05d}.safetensors" for i, n in enumerate(names)}
    if shards == 1:
        files = dict.fromkeys(names, "model.safetensors")
    for file in set(files.values()):
        save_file({n: tensors[n].contiguous() for n in names if files[n] == file}, folder / file, {"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_bytes(b'{"odd":  "spacing stays\xc3\xa4"}\n')
    (folder / "LICENSE").write_text("as it was\n")
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """`tiny("qwen3", hidden_size=256, change=lambda tensors: ...)` -> folder of a random checkpoint."""

    def make(
        kind: str = "llama",
        *,
        name: str = "src",
        dtype: torch.dtype = torch.bfloat16,
        shards: int = 2,
        change: Callable[[dict[str, torch.Tensor]], None] | None = None,
        **over: Any,
    ) -> Path:
        config = {**CONFIGS[kind], "torch_dtype": str(dtype).removeprefix("torch."), **over}
        tensors = tensors_of(config, dtype)
        if change is not None:
            change(tensors)
        return save(tmp_path / name, config, tensors, shards)

    return make
