"""Small random checkpoints, scaled like trained models, for the tests of the bench."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from percard.bench.engine.config import Config, parse_config

BASE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 0,
    "bos_token_id": None,
}
KINDS: dict[str, dict] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "llama3-rope": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-linear-rope": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": 4,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen2-yarn": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 32,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen3-untied": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
}


def raw_config(kind: str, **changes: object) -> dict:
    """config.json of a small model."""
    return BASE | KINDS[kind] | changes


def tensors_of(config: Config, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under their names on disk: linears std 1/sqrt(K), norms near 1, biases large enough to matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    found = {"model.embed_tokens.weight": normal(config.vocab, config.hidden, std=1.0)}
    if config.tied:  # logits of a trained model are a few units wide, so a tied embedding is small
        found["model.embed_tokens.weight"] *= 2 / math.sqrt(config.hidden)
    else:
        found["lm_head.weight"] = normal(config.vocab, config.hidden, std=2 / math.sqrt(config.hidden))
    found["model.norm.weight"] = 1 + normal(config.hidden, std=0.2)
    has_bias = dict.fromkeys("qkv", config.qkv_bias) | {"o": config.o_bias}
    has_bias |= dict.fromkeys(("gate", "up", "down"), config.mlp_bias)
    for layer in range(config.layers):
        start = f"model.layers.{layer}."
        if config.experts is not None and config.is_sparse(layer):  # logits a few units wide: experts differ in weight
            found[f"{start}mlp.gate.weight"] = normal(
                config.experts.count, config.hidden, std=2 / math.sqrt(config.hidden)
            )
        for module, (n, k) in config.linears(layer).items():
            found[f"{start}{module}.weight"] = normal(n, k, std=1 / math.sqrt(k))
            kind = module.rpartition(".")[2].removesuffix("_proj")
            if has_bias[kind]:
                # trained Qwen2.5 models have a key bias of tens of units
                found[f"{start}{module}.bias"] = normal(n, std=8.0 if kind == "k" else 0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{start}{name}.weight"] = 1 + normal(config.hidden, std=0.2)
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                found[f"{start}self_attn.{name}.weight"] = 1 + normal(config.head_dim, std=0.2)
    return found


def write_checkpoint(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A checkpoint folder of a small random model."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = raw_config(kind, **changes)
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = {name: t.to(dtype).contiguous() for name, t in tensors_of(parse_config(raw, kind)).items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """`checkpoint(kind, **changes)` -> folder, made once per session and kind."""
    made: dict[str, Path] = {}

    def make(kind: str, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        key = json.dumps([kind, str(dtype), changes], sort_keys=True)
        if key not in made:
            made[key] = write_checkpoint(tmp_path_factory.mktemp("models") / kind, kind, dtype, **changes)
        return made[key]

    return make


def write_biased(
    folder: Path,
    *,
    still: tuple[int, ...] = (),
    turning: tuple[int, ...] = (),
    bias: tuple[float, float] = (30.0, 100.0),
    layers: int = 4,
) -> Path:
    """A random Qwen2 with key biases of `bias` times the size of a key, as Qwen2.5 has them, in a few channels of some layers.

    `still` layers have them in channels that RoPE hardly turns: 8 pairs of the slow end, which go 0.1 of a radian at most in
    256 tokens, so that the bias is still there after RoPE, as an offset that all keys share. `turning` layers have them in
    fast channels: one pair turns by a radian a token, the bias becomes a wave, and no static offset takes it off.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers}
    raw = raw_config("qwen2", **sizes)
    config = parse_config(raw, "qwen2")
    made = tensors_of(config)
    half, generator = config.head_dim // 2, torch.Generator().manual_seed(5)
    for layer in range(layers):
        b = torch.randn(config.kv_heads, config.head_dim, generator=generator) / 2
        slow = [*range(half - 8, half), *range(2 * half - 8, 2 * half)]
        for channels in [slow] * (layer in still) + [[0, 1, half, half + 1]] * (layer in turning):
            size = torch.empty(config.kv_heads, len(channels)).uniform_(*bias, generator=generator)
            sign = torch.randint(0, 2, size.shape, generator=generator) * 2 - 1
            b[:, channels] = size * sign
        made[f"model.layers.{layer}.self_attn.k_proj.bias"] = b.flatten()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(
        {n: t.contiguous() for n, t in made.items()}, str(folder / "model.safetensors"), metadata={"format": "pt"}
    )
    return folder
