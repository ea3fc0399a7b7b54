"""Shape: a model as the planner sees it, parameters by part, from a config.json alone. Wider than the engine: it runs nothing.

Known: Llama, Qwen2 and 2.5, Qwen3, Qwen3-MoE, Qwen2.5-VL (with its vision tower), DeepSeek-V3 and R1 (MLA, MTP). The names of
sizes are those of the published configs; tests hold the totals against transformers' modules.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats.kvcache import KVSpec, layer_specs
from ..formats.spec import FormatError, QuantSpec
from .engine.config import SHAPES
from .engine.kv import NOT_FOUR

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "qwen2_5_vl", "deepseek_v3")
# The largest of a size that is taken for one: ten times what any published model has.
_MOST = {"num_hidden_layers": 2_000, "vocab_size": 20_000_000, "max_position_embeddings": 1_000_000_000}
_MOST_ANY = 2_000_000
_HUB_ID = re.compile(r"[a-z0-9][a-z0-9_-]*/[a-z0-9][a-z0-9._-]*")  # Qwen/Qwen3-8B; a path that is not there is an error
SCALE_BYTES = 2  # bf16 or fp16 scales of groups and rows
BLOCK, BLOCK_SCALE_BYTES = 128, 4  # fp8-block: one fp32 scale for 128 x 128 weights


@dataclass(frozen=True)
class Linear:
    """`count` linears of one kind, [out, in] each. `split`: how TP cuts it, "column" (out), "row" (in) or "copy"."""

    name: str
    out: int
    into: int
    count: int
    split: str = "column"

    @property
    def params(self) -> int:
        return self.out * self.into * self.count


@dataclass(frozen=True)
class Part:
    """Linears that a spec quantises, and `other` parameters that stay 16-bit (norms, biases, tables, routers).

    `share` of it serves one token (1, or experts per token / experts); `steps` = False: held, not read by a decode step
    (input embedding, vision tower, MTP layer).
    """

    name: str
    linears: tuple[Linear, ...] = ()
    other: int = 0
    share: float = 1.0
    steps: bool = True

    @property
    def params(self) -> int:
        return sum(linear.params for linear in self.linears) + self.other

    def nbytes(self, spec: QuantSpec | None, plain: float = 2.0) -> float:
        """Bytes held in `spec` (None = as they are, `plain` bytes a parameter)."""
        return sum(linear_bytes(linear, spec, plain) for linear in self.linears) + plain * self.other


@dataclass(frozen=True)
class Shape:
    """Sizes in features, parts with their parameters. `latent` numbers of an MLA token, 0 = keys and values by head.

    `splits`: (name, size, "ffn"|"experts"|"shared") of the intermediate sizes that row-parallel linears take in.
    """

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    vocab: int
    tied: bool
    parts: tuple[Part, ...]
    splits: tuple[tuple[str, int, str], ...]
    experts: int = 0
    per_token: int = 0
    latent: int = 0
    source: str = ""
    raw: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def params(self) -> int:
        """All parameters but those of MTP layers."""
        return sum(part.params for part in self.parts if part.name != "mtp")

    @property
    def mtp_params(self) -> int:
        """Parameters of the layers that predict further tokens."""
        return self.part("mtp").params

    @property
    def head_params(self) -> int:
        """What a step reads to find the next token; the table itself when head and embedding are one."""
        return self.vocab * self.hidden

    @property
    def active(self) -> float:
        """Parameters that one token of a step is multiplied with."""
        own = sum(part.params * part.share for part in self.parts if part.steps and part.name != "head")
        return own + self.head_params

    def part(self, name: str) -> Part:
        """A part by name, an empty one when the model has none."""
        return next((part for part in self.parts if part.name == name), Part(name))

    def with_layers(self, layers: int) -> Shape:
        """The same model with so many blocks."""
        return shape_of({**self.raw, "num_hidden_layers": layers}, self.name, self.source)


def linear_bytes(linear: Linear, spec: QuantSpec | None, plain: float = 2.0) -> float:
    """Bytes of linears in a spec, scales and zero points included."""
    if spec is None:
        return linear.params * plain
    if spec.float_format == "fp8-block":
        blocks = -(-linear.out // BLOCK) * -(-linear.into // BLOCK) * linear.count
        return linear.params + blocks * BLOCK_SCALE_BYTES
    groups = linear.out * spec.groups(linear.into) * linear.count
    zeros = 0.0 if spec.symmetric else groups * spec.weight_bits / 8
    return linear.params * spec.weight_bits / 8 + groups * SCALE_BYTES + zeros


def kv_bytes_per_token(shape: Shape, kv: KVSpec, plain: int = 2) -> int:
    """Bytes of cache of one token over all layers, held once: as the engine allocates it (a 4-bit cache keeps layer 0 as it is).

    `plain` bytes of a number that is not rounded. FormatError for a rounded latent cache: none is written or read here.
    """
    if shape.latent:
        if kv.quantised:
            raise FormatError(f"{shape.name}: no cache of {kv} for a latent (MLA) cache here; take --kv bf16")
        return shape.layers * shape.latent * plain
    import torch

    dtype = torch.float32 if plain == 4 else torch.bfloat16
    four = 4 in (kv.k_bits, kv.v_bits)
    specs = layer_specs(shape.layers, kv, NOT_FOUR if four else ())
    return sum(spec.bytes_per_token(shape.head_dim, shape.kv_heads, dtype) for spec in specs)


def names() -> list[str]:
    """Built-in shapes, those that the engine does not run included."""
    return sorted(path.stem for path in SHAPES.glob("*.json"))


def load_shape(model: str | Path) -> Shape:
    """The Shape of a checkpoint folder, a config.json, or a built-in name (qwen3-8b, shape:qwen3-8b, Qwen/Qwen3-8B)."""
    text = str(model)
    path = Path(text)
    known = text.removeprefix("shape:").lower()
    known = known.rsplit("/", 1)[-1] if _HUB_ID.fullmatch(known) else known
    if text.startswith("shape:") or (known in names() and not path.exists()):
        if known not in names():
            raise FormatError(_unknown(text))
        path, text = SHAPES / f"{known}.json", f"shape:{known}"
    elif path.is_dir():
        path, known = path / "config.json", path.resolve().name
        text = str(path)
    elif path.exists():
        known = path.resolve().parent.name if path.name == "config.json" else path.stem
    else:
        raise FormatError(_unknown(text))
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: not there; a model is a config.json or the folder that holds it") from None
    except (ValueError, OSError) as error:
        raise FormatError(f"{path}: not readable as JSON ({error}); fetch the file again") from None
    return shape_of(raw, known, text)


def _unknown(text: str) -> str:
    return f"no model {text!r}: neither a folder, a config.json nor a built-in name; known names: {', '.join(names())}"


def shape_of(raw: Any, name: str, where: str = "config.json") -> Shape:
    """The Shape in a parsed config.json. FormatError names the file, the key, what was found and expected."""
    if not isinstance(raw, Mapping):
        raise FormatError(f"{where}: holds {type(raw).__name__}, expected a JSON object; fetch the file again")
    if isinstance(raw.get("text_config"), Mapping) and "hidden_size" not in raw:  # transformers 5 nests the decoder
        text = raw["text_config"]
        raw = {**text, **{k: v for k, v in raw.items() if k != "text_config"}}
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise FormatError(
            f"{where}: model_type {family!r} is not one that can be planned; known: {', '.join(FAMILIES)}"
        )
    found = _Sizes(raw, where)
    return _deepseek(found, name) if family == "deepseek_v3" else _grouped(found, name, family)


@dataclass(frozen=True)
class _Sizes:
    """Whole numbers of a config, checked."""

    raw: Mapping[str, Any]
    where: str

    def __call__(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise FormatError(f"{self.where}: {key} is missing; a plan needs it, fetch the whole config.json")
        most = _MOST.get(key, _MOST_ANY)
        if type(value) is not int or not least <= value <= most:
            raise FormatError(f"{self.where}: {key} is {value!r}, expected a whole number from {least} to {most}")
        return value

    def flag(self, key: str) -> bool:
        return bool(self.raw.get(key) or False)

    def inner(self, key: str) -> _Sizes:
        value = self.raw.get(key)
        if not isinstance(value, Mapping):
            raise FormatError(f"{self.where}: {key} is {type(value).__name__}, expected an object")
        return _Sizes(value, f"{self.where}: {key}")


def _mlp(hidden: int, ffn: int, count: int) -> tuple[Linear, ...]:
    return (
        Linear("gate_proj", ffn, hidden, count),
        Linear("up_proj", ffn, hidden, count),
        Linear("down_proj", hidden, ffn, count, "row"),
    )


def _grouped(size: _Sizes, name: str, family: str) -> Shape:
    """Decoders with keys and values by head: Llama and the Qwens."""
    hidden, heads, layers = size("hidden_size"), size("num_attention_heads"), size("num_hidden_layers")
    kv_heads, vocab = size("num_key_value_heads", heads), size("vocab_size")
    if heads % kv_heads:
        raise FormatError(f"{size.where}: {heads} query heads are not a multiple of {kv_heads} key-value heads")
    if size.raw.get("head_dim") is None and hidden % heads:
        raise FormatError(f"{size.where}: hidden_size {hidden} is no multiple of {heads} heads and head_dim is absent")
    head_dim = size("head_dim", hidden // heads)
    q, kv = heads * head_dim, kv_heads * head_dim
    bias = size.flag("attention_bias")
    qkv_bias = family in ("qwen2", "qwen2_5_vl") or bias
    o_bias = family not in ("qwen2", "qwen2_5_vl") and bias
    attention = (
        Linear("q_proj", q, hidden, layers),
        Linear("k_proj", kv, hidden, layers),
        Linear("v_proj", kv, hidden, layers),
        Linear("o_proj", hidden, q, layers, "row"),
    )
    biases = layers * ((q + 2 * kv if qkv_bias else 0) + (hidden if o_bias else 0))
    experts = per_token = dense = 0
    parts: list[Part] = [Part("embedding", other=vocab * hidden, steps=False)]
    parts.append(Part("attention", attention, biases))
    splits: list[tuple[str, int, str]] = []
    if family == "qwen3_moe":
        experts = size("num_local_experts" if size.raw.get("num_experts") is None else "num_experts")
        per_token, ffn = size("num_experts_per_tok"), size("moe_intermediate_size")
        if per_token > experts:
            raise FormatError(f"{size.where}: num_experts_per_tok {per_token} is more than {experts} experts")
        only, step = size.raw.get("mlp_only_layers") or [], size("decoder_sparse_step", 1)
        if not isinstance(only, list):
            raise FormatError(f"{size.where}: mlp_only_layers is {only!r}, expected a list of layer numbers")
        sparse = sum(1 for i in range(layers) if i not in only and (i + 1) % step == 0)
        dense = layers - sparse
        parts.append(Part("experts", _mlp(hidden, ffn, sparse * experts), share=per_token / experts))
        parts.append(Part("router", other=sparse * experts * hidden))
        splits.append(("moe_intermediate_size", ffn, "experts"))
    else:
        dense = layers
    if dense:
        ffn = size("intermediate_size")
        extra = dense * (2 * ffn + hidden) if family == "llama" and size.flag("mlp_bias") else 0
        parts.append(Part("mlp", _mlp(hidden, ffn, dense), extra))
        splits.append(("intermediate_size", ffn, "ffn"))
    qk = 2 * head_dim if family in ("qwen3", "qwen3_moe") else 0
    parts.append(Part("norms", other=layers * (2 * hidden + qk) + hidden))
    tied = size.flag("tie_word_embeddings")
    if not tied:
        parts.append(Part("head", other=vocab * hidden))
    if family == "qwen2_5_vl":
        parts.append(Part("vision", other=_vision(size.inner("vision_config"), hidden), steps=False))
    return Shape(
        name, family, layers, hidden, heads, kv_heads, head_dim, head_dim, vocab, tied, tuple(parts), tuple(splits),
        experts, per_token, 0, size.where, size.raw,
    )  # fmt: skip


def _vision(size: _Sizes, hidden: int) -> int:
    """Parameters of the vision tower of Qwen2.5-VL: patches, blocks of attention and gated MLP (biases), merger."""
    width, ffn, depth = size("hidden_size", 1280), size("intermediate_size", 3420), size("depth", 32)
    channels = size("in_channels" if size.raw.get("in_channels") is not None else "in_chans", 3)
    patch, time = size("patch_size", 14), size("temporal_patch_size", 2)
    merged = width * size("spatial_merge_size", 2) ** 2
    out = size("out_hidden_size", hidden)
    block = 2 * width + 3 * width * (width + 1) + width * (width + 1)  # two norms, qkv, proj
    block += 2 * ffn * (width + 1) + width * (ffn + 1)  # gate, up, down
    merger = width + merged * (merged + 1) + out * (merged + 1)
    return channels * time * patch * patch * width + depth * block + merger


def _deepseek(size: _Sizes, name: str) -> Shape:
    """DeepSeek-V3 and R1: attention through a latent of kv_lora_rank + rope numbers a token, shared experts, MTP layers."""
    hidden, heads, layers = size("hidden_size"), size("num_attention_heads"), size("num_hidden_layers")
    rank, rope = size("kv_lora_rank"), size("qk_rope_head_dim")
    nope, v_dim, vocab = size("qk_nope_head_dim"), size("v_head_dim"), size("vocab_size")
    q_rank = None if size.raw.get("q_lora_rank") is None else size("q_lora_rank")
    experts, per_token = size("n_routed_experts"), size("num_experts_per_tok")
    if per_token > experts:
        raise FormatError(f"{size.where}: num_experts_per_tok {per_token} is more than {experts} experts")
    ffn, moe = size("intermediate_size"), size("moe_intermediate_size")
    shared = size("n_shared_experts", 0, least=0) * moe
    dense = min(size("first_k_dense_replace", 0, least=0), layers)
    more = size("num_nextn_predict_layers", 0, least=0)

    def attention(count: int) -> tuple[Linear, ...]:
        qk = heads * (nope + rope)
        query = (
            (Linear("q_proj", qk, hidden, count),)
            if q_rank is None
            else (Linear("q_a_proj", q_rank, hidden, count, "copy"), Linear("q_b_proj", qk, q_rank, count))
        )
        return (
            *query,
            Linear("kv_a_proj_with_mqa", rank + rope, hidden, count, "copy"),
            Linear("kv_b_proj", heads * (nope + v_dim), rank, count),
            Linear("o_proj", hidden, heads * v_dim, count, "row"),
        )

    def norms(count: int) -> int:
        return count * (2 * hidden + (q_rank or 0) + rank)

    sparse = layers - dense
    parts = [
        Part("embedding", other=vocab * hidden, steps=False),
        Part("attention", attention(layers)),
        Part("experts", _mlp(hidden, moe, sparse * experts), share=per_token / experts),
        Part("router", other=sparse * experts * (hidden + 1)),  # and a bias that corrects the load
        Part("norms", other=norms(layers) + hidden),
    ]
    if shared:
        parts.append(Part("shared experts", _mlp(hidden, shared, sparse)))
    if dense:
        parts.append(Part("mlp", _mlp(hidden, ffn, dense)))
    tied = size.flag("tie_word_embeddings")
    if not tied:
        parts.append(Part("head", other=vocab * hidden))
    if more:
        linears = (
            *attention(more),
            *_mlp(hidden, moe, more * experts),
            *(_mlp(hidden, shared, more) if shared else ()),
        )
        linears += (Linear("eh_proj", hidden, 2 * hidden, more),)
        other = norms(more) + more * (
            experts * (hidden + 1) + 3 * hidden + 2 * vocab * hidden
        )  # embedding and head again
        parts.append(Part("mtp", linears, other, steps=False))
    splits = [("moe_intermediate_size", moe, "experts")]
    splits += [("n_shared_experts x moe_intermediate_size", shared, "shared")] if shared else []
    splits += [("intermediate_size", ffn, "ffn")] if dense else []
    return Shape(
        name, "deepseek_v3", layers, hidden, heads, heads, nope + rope, v_dim, vocab, tied, tuple(parts), tuple(splits),
        experts, per_token, rank + rope, size.where, size.raw,
    )  # fmt: skip
