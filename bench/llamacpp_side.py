"""llama.cpp's side of bench/llamacpp.py: a script that runs in the rival's own environment and knows nothing of percard.

Commands come as JSON lines on stdin, one answer per line on stdout:

    {"do": "write", "path": F, "config": {HF config}, "linears": "Q4_0", "head": "Q8_0", "seed": 0}  -> {"bytes": n}
    {"do": "load", "path": F, "threads": 2, "context": 600}                                         -> {"system": text}
    {"do": "prefill", "path": F, "tokens": [...]}      one batch of prompt tokens, cache emptied first  -> {}
    {"do": "decode", "path": F, "depth": 512, "new": 64}      greedy steps behind `depth` cached tokens -> {}

The file holds random weights at the model's shapes: speed does not depend on their values. The head is the embedding's
matrix in type `head`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np


def write(path: str, config: dict[str, Any], linears: str, head: str, seed: int) -> dict[str, Any]:
    """A GGUF file of a Qwen3 config with random weights."""
    random = np.random.default_rng(seed)
    hidden, ffn, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path + ".part", "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")

    def add(name: str, rows: int, columns: int, kind: str) -> None:
        to = getattr(gguf.GGMLQuantizationType, kind)
        values = (random.standard_normal((rows, columns), dtype=np.float32)) / np.sqrt(columns, dtype=np.float32)
        writer.add_tensor(name + ".weight", gguf.quants.quantize(values, to), raw_dtype=to)

    def ones(name: str, count: int) -> None:
        writer.add_tensor(name + ".weight", np.ones(count, dtype=np.float32))

    add("token_embd", config["vocab_size"], hidden, head)
    ones("output_norm", hidden)
    for i in range(config["num_hidden_layers"]):
        at = f"blk.{i}."
        ones(at + "attn_norm", hidden)
        ones(at + "ffn_norm", hidden)
        ones(at + "attn_q_norm", size)
        ones(at + "attn_k_norm", size)
        add(at + "attn_q", heads * size, hidden, linears)
        add(at + "attn_k", kv * size, hidden, linears)
        add(at + "attn_v", kv * size, hidden, linears)
        add(at + "attn_output", hidden, heads * size, linears)
        add(at + "ffn_gate", ffn, hidden, linears)
        add(at + "ffn_up", ffn, hidden, linears)
        add(at + "ffn_down", hidden, ffn, linears)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = Path(path + ".part").replace(path)
    return {"bytes": whole.stat().st_size}


class Loaded:
    """A model and a context of one sequence."""

    def __init__(self, path: str, threads: int, context: int):
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = False  # so that weights may be laid out anew for this CPU
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot read {path}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        chosen = llama_cpp.llama_context_default_params()
        chosen.n_ctx, chosen.n_batch, chosen.n_ubatch = context, context, context
        chosen.n_threads = chosen.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, chosen)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {context} tokens for {path}")
        self.batch = llama_cpp.llama_batch_init(context, 0, 1)

    def feed(self, tokens: list[int]) -> int:
        """Appends tokens to the cache; the likeliest next one, from the logits of the last."""
        batch, first = self.batch, self.cached()
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, first + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i + 1 == len(tokens)
        failed = llama_cpp.llama_decode(self.context, batch)
        if failed:
            raise RuntimeError(f"llama_decode says {failed}")
        logits = ctypes.cast(llama_cpp.llama_get_logits_ith(self.context, -1), ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())

    def keep(self, tokens: int) -> None:
        """Forgets all but the first `tokens` of the cache."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), 0, tokens, -1)

    def cached(self) -> int:
        return llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(self.context), 0) + 1

    def prefill(self, tokens: list[int]) -> None:
        self.keep(0)
        self.feed(tokens)

    def decode(self, depth: int, new: int) -> None:
        if self.cached() < depth:
            self.prefill([1] * depth)
        self.keep(depth)
        token = 1
        for _ in range(new):
            token = self.feed([token])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints does not belong among the answers
    loaded: dict[str, Loaded] = {}
    llama_cpp.llama_backend_init()
    for line in sys.stdin:
        command = json.loads(line)
        what, path = command.pop("do"), command.pop("path")
        try:
            answer: dict[str, Any] = {}
            if what == "write":
                answer = write(path, **command)
            elif what == "load":
                loaded[path] = Loaded(path, **command)
                system = llama_cpp.llama_print_system_info().decode()
                answer = {"system": system, "version": llama_cpp.__version__}
            else:
                getattr(loaded[path], what)(**command)
        except Exception as error:  # the other side prints it and stops
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
