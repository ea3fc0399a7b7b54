"""Writes a checkpoint of random weights at the true shapes of a model, in shards, without the model.

    python examples/synthetic_checkpoint.py qwen3-8b /tmp/qwen3-8b            # 16 GB of bf16
    python examples/synthetic_checkpoint.py qwen3-8b /tmp/small --layers 2    # the same shapes, two layers

For trying how fast and in how much memory `percard quantize` streams a model that does not fit. Each linear is drawn
normal with standard deviation 1/sqrt(inputs), seeded by its name; norms are ones. Shapes are those of `shape:<name>`
(percard.bench), or of any config.json of a dense Qwen2, Qwen3 or Llama.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import torch
from rich.progress import track

from percard.bench.engine.config import SHAPES, shape_names
from percard.formats.checkpoint import Writer


def tensors(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a dense decoder, in the order of the layers."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    q, kv = heads * head, config.get("num_key_value_heads", heads) * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
            if config["model_type"] == "qwen2":
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, q)
        if config["model_type"].startswith("qwen3"):
            shapes |= {f"{layer}.self_attn.{name}_norm.weight": (head,) for name in "qk"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bf16 weights, the same for the same name. Large ones repeat a drawn block, shifted: drawing is the slow part."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    block = torch.randn(min(1 << 22, max(1, torch.Size(shape).numel())), generator=generator)
    flat = (block * shape[-1] ** -0.5).to(torch.bfloat16)
    parts, missing = [], torch.Size(shape).numel()
    while missing > 0:
        parts.append(flat[:missing].roll(len(parts) * 7919))
        missing -= parts[-1].numel()
    return torch.cat(parts).view(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", help=f"{', '.join(shape_names())}, or the path of a config.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="write only so many layers")
    parser.add_argument("--max-shard-gb", type=float, default=5.0)
    args = parser.parse_args()
    path = SHAPES / f"{args.shape}.json" if args.shape in shape_names() else Path(args.shape)
    config = json.loads(path.read_text())
    if args.layers:
        config["num_hidden_layers"] = args.layers
    shapes = tensors(config)
    plan = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    Writer.clean_unfinished(args.out)
    with Writer(args.out, plan, max_shard=args.max_shard_gb * 1e9) as writer:
        for name, shape in track(shapes.items(), description=f"{writer.nbytes / 1e9:.1f} GB"):
            writer.add(name, draw(name, shape))
        writer.finish(config)
    print(f"wrote {args.out}: {len(shapes)} tensors, {writer.nbytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
