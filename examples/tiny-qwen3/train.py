"""Trains tiny-qwen3: a small Qwen3 on the source of Python's standard library, on a CPU, from nothing.

    python examples/tiny-qwen3/train.py                 # corpus -> tokenizer -> training -> model.safetensors
    python examples/tiny-qwen3/train.py --steps 200     # a short try

The architecture is Qwen3's (QK-norm, grouped-query attention, SwiGLU, rotary embeddings, tied embeddings), so the
result loads in transformers, in serving stacks and in percard's own engine. Matrices are trained with Muon
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), embeddings and norms with AdamW.

The order of the data is a function of the step number alone and the optimiser state is saved every `--save-every`
steps, so a run that was stopped goes on where it was. Needs torch, numpy, tokenizers, safetensors; about an hour on
two cores. Files in HELD_OUT are never trained on; model-card figures come from `evaluate.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

HERE = Path(__file__).resolve().parent

# Named files of the standard library that no training step ever sees (their tests are left out as well).
HELD_OUT = [
    "textwrap.py", "heapq.py", "csv.py", "queue.py", "graphlib.py", "bisect.py", "fnmatch.py", "shlex.py",
    "sched.py", "calendar.py", "json/decoder.py", "json/encoder.py", "wsgiref/handlers.py", "email/headerregistry.py",
]  # fmt: skip
# The part of them, about 100 kB, that is committed as heldout.txt.
HELD_OUT_TEXT = [
    "textwrap.py",
    "heapq.py",
    "queue.py",
    "graphlib.py",
    "bisect.py",
    "fnmatch.py",
    "shlex.py",
    "json/decoder.py",
]
# Training files whose text is also the calibration set of the quantisation methods.
CALIBRATION = ["dataclasses.py", "functools.py", "pathlib.py", "http/client.py", "logging/__init__.py"]
# Generated tables and data, which are not source that someone wrote.
SKIP_PARTS = {"site-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3", "turtledemo"}

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 8,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
# Steps after the clean ones: how many, noise strength (1 = that of 4-bit rounding), learning rate as a share of its peak.
NOISY_PHASES = ((400, 4.0, 0.5), (300, 6.0, 0.4))
END_OF_TEXT = "<|endoftext|>"


# ---------------------------------------------------------------- corpus
def stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def corpus() -> tuple[list[str], list[str]]:
    """(training texts, held-out texts) of the standard library of the running Python, in sorted order."""
    root = stdlib()
    held = set(HELD_OUT)
    held_tests = {"test_" + Path(name).stem for name in HELD_OUT if Path(name).stem not in {"decoder", "encoder"}}
    train = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIP_PARTS & set(name.parts) or name.as_posix() in held or path.stem in held_tests:
            continue
        if name.parts[0] in {"test", "idlelib"} and path.stat().st_size > 120_000:
            continue  # the very large tests are mostly tables
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # test files that are broken on purpose
        train.append(text)
        if "test" not in name.parts and "tests" not in name.parts:
            train.append(text)  # library code counts twice, test code once
    return train, [(root / name).read_text("utf-8") for name in HELD_OUT]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE. A line break and the indentation after it are one piece, which suits Python."""
    tokenizer = Tokenizer(models.BPE())
    pieces = r"\s*\n[ \t]*| ?_*\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids += encoding.ids
        ids.append(0)
    return np.array(ids, dtype=np.uint16)


# ---------------------------------------------------------------- model
class Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), CONFIG["rms_norm_eps"])


def rope_table(length: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    freq = CONFIG["rope_theta"] ** (-torch.arange(0, dim, 2).float() / dim)
    angle = torch.arange(length).float()[:, None] * freq
    return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()


def rotate(x, cos, sin):  # x [B, H, T, D]; halves, not interleaved
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        hidden, heads, kv, dim = (
            CONFIG[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        )
        self.q_proj = nn.Linear(hidden, heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv * dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, hidden, bias=False)
        self.q_norm, self.k_norm = Norm(dim), Norm(dim)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        shape = (batch, length, -1, CONFIG["head_dim"])
        q = rotate(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        share = CONFIG["num_attention_heads"] // CONFIG["num_key_value_heads"]
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(CONFIG["hidden_size"]), Norm(CONFIG["hidden_size"])
        self.self_attn, self.mlp = Attention(), MLP()

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = Norm(CONFIG["hidden_size"])


class TinyQwen3(nn.Module):
    """Parameter names are those of transformers' Qwen3ForCausalLM, so that the state dict is the checkpoint."""

    def __init__(self):
        super().__init__()
        self.model = Body()
        depth = 2 * CONFIG["num_hidden_layers"]
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                std = 0.02 if "embed" in name else weight.shape[1] ** -0.5
                nn.init.normal_(weight, std=std / (math.sqrt(depth) if "o_proj" in name or "down" in name else 1))
        cos, sin = rope_table(CONFIG["max_position_embeddings"], CONFIG["head_dim"])
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids, targets):
        x = self.model.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# ---------------------------------------------------------------- training
def batch_at(step: int, data: np.ndarray, batch: int, length: int) -> torch.Tensor:
    """[batch, length + 1] token ids: windows on a grid that is shuffled and shifted anew each epoch."""
    windows = (len(data) - 1) // length - 1
    rows = []
    for i in range(step * batch, (step + 1) * batch):
        epoch, index = divmod(i, windows)
        rng = np.random.default_rng(epoch)
        shift, order = rng.integers(length), rng.permutation(windows)
        start = int(order[index]) * length + int(shift)
        rows.append(data[start : start + length + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def phase_of(step: int, steps: int) -> tuple[float, float]:
    """(noise strength, learning rate as a share of its peak) at a step.

    Clean steps: warm-up over 2 %, flat to 45 %, then linear to 2 %. A noisy phase falls from its own share to 2 %.
    """
    if step < steps:
        warm, flat = 0.02 * steps, 0.45 * steps
        if step < warm:
            return 0.0, (step + 1) / warm
        return 0.0, 1.0 if step < flat else max(0.02, (steps - step) / (steps - flat))
    begin = steps
    for count, strength, share in NOISY_PHASES:
        if step < begin + count:
            done = step - begin
            return strength, min((done + 1) / 20, 1.0) * max(0.02, share * (1 - done / count))
        begin += count
    raise IndexError(f"step {step} is behind the last one")


@torch.no_grad()
def rounding_noise(matrices: list[torch.Tensor], step: int, level: float) -> list[torch.Tensor]:
    """Adds to each matrix what rounding to 4 bits in groups of 64 would, `level` times as strong; returns what was added.

    Uniform in half a step to each side. A small model that never met such noise is far more fragile than the large ones
    it stands for: without these steps 4-bit rounding moves 12 % of its answers, and no quality gate would pass.
    Pseudo quantisation noise: Defossez et al. 2021, arXiv 2104.09987.
    """
    generator = torch.Generator().manual_seed(step)
    added = []
    for weight in matrices:
        groups = weight.view(weight.shape[0], -1, 64)
        half = level * groups.abs().amax(-1, keepdim=True) / 7.5 / 2
        noise = torch.empty_like(groups).uniform_(-1, 1, generator=generator).mul_(half).view_as(weight)
        weight += noise
        added.append(noise)
    return added


@torch.no_grad()
def held_out_loss(model, data: np.ndarray, length: int) -> float:
    windows = (len(data) - 1) // length
    ids = torch.from_numpy(data[: windows * length + 1].astype(np.int64))
    losses = []
    with torch.autocast("cpu", torch.bfloat16):
        for start in range(0, windows, 16):
            rows = [ids[i * length : (i + 1) * length + 1] for i in range(start, min(start + 16, windows))]
            block = torch.stack(rows)
            losses += [model(block[:, :-1], block[:, 1:]).item()] * len(rows)
    return float(np.mean(losses))


def write_checkpoint(model: nn.Module, out: Path) -> None:
    tensors = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors.tmp", metadata={"format": "pt"})
    (out / "model.safetensors.tmp").replace(out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0}, indent=2) + "\n")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONFIG["max_position_embeddings"],
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="where the model goes (default: this folder)")
    parser.add_argument("--work", type=Path, default=Path("out/tiny-qwen3"), help="token file and resume state")
    parser.add_argument("--steps", type=int, default=1400, help="clean steps; 700 noisy ones follow")
    parser.add_argument(
        "--noise-steps", type=int, default=400, help="further steps, with rounding noise on the weights"
    )
    parser.add_argument("--noise", type=float, default=4.0, help="its strength; 1 is that of 4-bit rounding")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.006, help="of Muon; AdamW takes 0.4 of it")
    parser.add_argument("--save-every", type=int, default=50)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    length = CONFIG["max_position_embeddings"]
    torch.manual_seed(0)

    train_texts, held_texts = corpus()
    tokenizer_file = args.out / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(train_texts).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokens_file = args.work / "train.npy"
    if not tokens_file.exists():
        np.save(tokens_file, encode(tokenizer, train_texts))
    data, held = np.load(tokens_file), encode(tokenizer, held_texts)
    for name, files in (("calibration.txt", CALIBRATION), ("heldout.txt", HELD_OUT_TEXT)):
        (args.out / name).write_text("\n".join((stdlib() / file).read_text("utf-8") for file in files))

    model = TinyQwen3()
    total = sum(p.numel() for p in model.parameters())
    embedding = model.model.embed_tokens.weight.numel()
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        f"{len(data):,} training tokens, {len(held):,} held out, {total:,} parameters, {embedding / total:.1%} embedding"
    )
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers = [
        torch.optim.Muon(matrices, lr=args.lr, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr * 0.4, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]

    start, state_file = 0, args.work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        start = state["step"]
        print(f"goes on at step {start}")

    log = (args.work / "log.jsonl").open("a")
    began, first, mean = time.time(), start, None
    total_steps = args.steps + sum(count for count, _, _ in NOISY_PHASES)
    for step in range(start, total_steps):
        strength, share = phase_of(step, args.steps)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * share
        block = batch_at(step, data, args.batch, length)
        noise = rounding_noise(matrices, step, strength) if strength else []
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(block[:, :-1], block[:, 1:])
        loss.backward()
        with torch.no_grad():
            for weight, added in zip(matrices, noise, strict=False):
                weight -= added
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        last = step + 1 == total_steps
        if step % 10 == 0 or last:
            rate = (step - first + 1) * args.batch * length / (time.time() - began)
            left = (total_steps - step - 1) * args.batch * length / rate / 60
            print(f"step {step:5d}/{total_steps}  loss {mean:.4f}  {rate:7.0f} tok/s  {left:5.1f} min left", flush=True)
        if (step + 1) % args.save_every == 0 or last:
            held_loss = held_out_loss(model, held, length) if (step + 1) % (4 * args.save_every) == 0 or last else None
            log.write(json.dumps({"step": step + 1, "loss": round(mean, 4), "held_out": held_loss}) + "\n")
            log.flush()
            if held_loss is not None:
                print(f"  held-out loss {held_loss:.4f}, perplexity {math.exp(held_loss):.2f}", flush=True)
            state = {"model": model.state_dict(), "step": step + 1, "optimisers": [o.state_dict() for o in optimisers]}
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    write_checkpoint(model, args.out)
    print(f"wrote {args.out / 'model.safetensors'}")


if __name__ == "__main__":
    main()
