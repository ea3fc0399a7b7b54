"""Writes a checkpoint of random weights at the true shapes of a model, in shards, without the model.

    python examples/synthetic_checkpoint.py qwen3-8b /tmp/qwen3-8b                      # 16 GB of bf16
    python examples/synthetic_checkpoint.py qwen3-8b /tmp/small --layers 2              # the same shapes, two layers
    python examples/synthetic_checkpoint.py qwen3-30b-a3b /tmp/moe --layers 24          # 31 GB, a tensor per expert
    python examples/synthetic_checkpoint.py qwen3-8b /tmp/tiny --layers 1 --vocab 4096

For trying how fast and in how much memory `percard quantize` streams a model that does not fit. Each linear is normal with
standard deviation 1/sqrt(inputs); norms are ones. Shapes are those of `shape:<name>` (percard.bench), or of any config.json
of a dense Qwen2, Qwen3, Llama or Mistral, or of a Qwen3-MoE.

Drawing 16 billion normal numbers takes longer than writing them. So 16.8 million are drawn once, and each tensor is a
stretch of them, around the end and on where it is longer, from a place of its own: no two tensors are equal, nor two
rows at the same place of two tensors, and the same arguments give the same bytes. Nothing but copying is left: a disk
that takes 200 MB/s has 30 GB in two and a half minutes, in half a gigabyte of memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track

from percard.bench.engine.config import SHAPES, shape_names
from percard.formats.checkpoint import Writer

_POOL = 16_777_259  # a prime: a stretch that goes around the end meets no row at the same place
_STEP = 6_700_417  # a prime: from one tensor's place to the next one's


def tensors(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a decoder, in the order of the layers; experts one by one, as on the hub."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kind = config["num_attention_heads"], config["model_type"]
    head = config.get("head_dim") or hidden // heads
    q, kv = heads * head, config.get("num_key_value_heads", heads) * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
            if kind == "qwen2":
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, q)
        if kind.startswith("qwen3"):
            shapes |= {f"{layer}.self_attn.{name}_norm.weight": (head,) for name in "qk"}
        prefixes, width = [f"{layer}.mlp"], inner
        if is_sparse(config, i):
            shapes[f"{layer}.mlp.gate.weight"] = (config["num_experts"], hidden)
            prefixes = [f"{layer}.mlp.experts.{e}" for e in range(config["num_experts"])]
            width = config["moe_intermediate_size"]
        for prefix in prefixes:
            shapes |= {f"{prefix}.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
            shapes[f"{prefix}.down_proj.weight"] = (hidden, width)
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def is_sparse(config: dict, layer: int) -> bool:
    """Whether block `layer` holds experts."""
    if config["model_type"] != "qwen3_moe" or layer in config.get("mlp_only_layers", []):
        return False
    return (layer + 1) % config.get("decoder_sparse_step", 1) == 0


class Pool:
    """Normal numbers, drawn once, in bf16, a copy for each standard deviation that is asked for."""

    def __init__(self, seed: int = 0):
        self._normal = torch.randn(_POOL, generator=torch.Generator().manual_seed(seed))
        self._bytes: dict[int, memoryview] = {}

    def stretch(self, index: int, shape: tuple[int, ...]) -> Iterator[memoryview]:
        """The bytes of tensor number `index`: numbers from a place of its own on, divided by sqrt(inputs)."""
        inputs = shape[-1]
        if inputs not in self._bytes:
            scaled = (self._normal * inputs**-0.5).to(torch.bfloat16)
            self._bytes[inputs] = scaled.view(torch.uint8).numpy().data
        held = self._bytes[inputs]
        at, left = 2 * (index * _STEP % _POOL), 2 * torch.Size(shape).numel()
        while left:
            piece = held[at : at + left]
            yield piece
            at, left = 0, left - len(piece)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", help=f"{', '.join(shape_names())}, or the path of a config.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="write only so many layers")
    parser.add_argument("--vocab", type=int, help="cut the vocabulary to so many words")
    parser.add_argument("--max-shard-gb", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = SHAPES / f"{args.shape}.json" if args.shape in shape_names() else Path(args.shape)
    config = json.loads(path.read_text())
    if args.layers:
        config["num_hidden_layers"] = args.layers
    if args.vocab:
        config["vocab_size"] = args.vocab
        config |= {name: 0 for name in ("bos_token_id", "eos_token_id") if config.get(name, 0) is not None}
    shapes, pool = tensors(config), Pool(args.seed)
    plan = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    Writer.clean_unfinished(args.out)
    with Writer(args.out, plan, max_shard=args.max_shard_gb * 1e9) as writer:
        total = writer.nbytes
        for i, (name, shape) in enumerate(track(shapes.items(), description=f"{total / 1e9:.1f} GB")):
            if name.endswith("norm.weight"):
                writer.add(name, torch.ones(shape, dtype=torch.bfloat16))
            else:
                writer.add_raw(name, pool.stretch(i, shape))
        writer.finish(config)
    print(f"wrote {args.out}: {len(shapes)} tensors, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
