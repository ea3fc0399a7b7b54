"""Config: what a decoder is made of, read from a Hugging Face config.json without transformers.

Known architectures: Llama, Qwen2 and Qwen2.5 (bias on Q, K and V), Qwen3 (RMSNorm on each query and key head), Qwen3-MoE.
Anything that this engine would run wrongly is refused with the list of what it knows, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...formats.spec import FormatError

MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
SHAPES = Path(__file__).resolve().parents[1] / "shapes"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What each rope type reads besides its type and base: name -> default, None = must be there.
_ROPE_KEYS: dict[str, dict[str, float | None]] = {
    "default": {},
    "linear": {"factor": None},
    "llama3": {
        "factor": None,
        "low_freq_factor": None,
        "high_freq_factor": None,
        "original_max_position_embeddings": None,
    },
    "yarn": {"factor": None, "original_max_position_embeddings": 0.0, "beta_fast": 32.0, "beta_slow": 1.0},
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: type, base (theta), the numbers its type needs; yarn's factor on cos and sin, None = its rule."""

    type: str
    theta: float
    numbers: tuple[tuple[str, float], ...] = ()
    attention_factor: float | None = None


@dataclass(frozen=True)
class Experts:
    """A mixture: `count` experts of `ffn` features, `per_token` of them for each token.

    `normalized`: the weights of a token's experts sum to 1. Every `step`th block holds experts, but for those in `dense`.
    """

    count: int
    per_token: int
    ffn: int
    normalized: bool
    step: int = 1
    dense: tuple[int, ...] = ()


@dataclass(frozen=True)
class Config:
    """Sizes of a decoder; `experts` None = all blocks are dense. `hidden`, `ffn`, `head_dim` are features, `context` tokens, `norm_eps` of RMSNorm.

    `qkv_bias`, `o_bias`, `mlp_bias` say which linears have a bias; `qk_norm` whether each query and key head is
    normalised; `tied` whether the head is the embedding; `eos` the ids that end a text.
    """

    name: str
    model_type: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: Rope
    dtype: torch.dtype
    eos: tuple[int, ...] = ()
    experts: Experts | None = None

    @property
    def q_size(self) -> int:
        """Features of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Features of all key (or value) heads."""
        return self.kv_heads * self.head_dim

    def is_sparse(self, layer: int) -> bool:
        """Whether a block holds experts instead of one MLP."""
        e = self.experts
        return e is not None and layer not in e.dense and (layer + 1) % e.step == 0

    def linears(self, layer: int = 0) -> dict[str, tuple[int, int]]:
        """Linear layers of one block by their name on disk, with (out, in) features; a router is none."""
        attention = "self_attn."
        found = {
            f"{attention}q_proj": (self.q_size, self.hidden),
            f"{attention}k_proj": (self.kv_size, self.hidden),
            f"{attention}v_proj": (self.kv_size, self.hidden),
            f"{attention}o_proj": (self.hidden, self.q_size),
        }
        mlps, ffn = ["mlp."], self.ffn
        if self.experts is not None and self.is_sparse(layer):
            mlps, ffn = [f"mlp.experts.{e}." for e in range(self.experts.count)], self.experts.ffn
        for mlp in mlps:
            found |= {f"{mlp}{name}_proj": (ffn, self.hidden) for name in ("gate", "up")}
            found[f"{mlp}down_proj"] = (self.hidden, ffn)
        return found

    def block_parameters(self) -> int:
        """Weights in the linears of one block, of the average one when blocks differ."""
        kinds = [layer for layer in range(self.layers) if not self.is_sparse(layer)]
        sparse = self.layers - len(kinds)
        totals = 0
        if kinds:
            totals += len(kinds) * sum(n * k for n, k in self.linears(kinds[0]).values())
        if sparse:
            first = next(layer for layer in range(self.layers) if self.is_sparse(layer))
            totals += sparse * sum(n * k for n, k in self.linears(first).values())
        return totals // self.layers


def shape_names() -> list[str]:
    """Names that `shape:<name>` knows: the configurations shipped beside this package that the engine runs."""
    kinds = {
        path.stem: json.loads(path.read_text(encoding="utf-8")).get("model_type") for path in SHAPES.glob("*.json")
    }
    return sorted(name for name, kind in kinds.items() if kind in MODEL_TYPES)


def load_config(source: str | Path) -> Config:
    """The Config of a checkpoint folder, or of `shape:<name>`. FormatError names the file, the key and the remedy."""
    text = str(source)
    if text.startswith("shape:"):
        name = text.removeprefix("shape:").lower()
        path = SHAPES / f"{name}.json"
        if name not in shape_names():
            only = "is for `percard plan` only, the engine does not run it" if path.is_file() else "is not there"
            raise FormatError(f"shape {name!r} {only}; known: {', '.join(shape_names())}")
    else:
        folder = Path(source)
        path, name = folder / "config.json", folder.resolve().name
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: not there; a model is a folder with config.json and safetensors files") from None
    except (ValueError, OSError) as error:
        raise FormatError(f"{path}: not readable as JSON ({error}); fetch the file again") from None
    return parse_config(raw, name, str(path))


def parse_config(raw: Mapping[str, Any], name: str, where: str = "config.json") -> Config:
    """The Config in a parsed config.json. `where` names the file in errors."""
    if not isinstance(raw, Mapping):
        raise FormatError(f"{where}: holds {type(raw).__name__}, expected a JSON object; fetch the file again")
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise FormatError(f"{where}: model_type {kind!r} is not one the engine runs; known: {', '.join(MODEL_TYPES)}")

    def size(key: str, default: int | None = None) -> int:
        value = raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FormatError(f"{where}: {key} is {value!r}, expected a whole number above 0")
        return value

    def number(key: str, default: float) -> float:
        return _number(raw.get(key), default, key, where)

    act = raw.get("hidden_act", "silu")
    if act != "silu":
        raise FormatError(f"{where}: hidden_act {act!r} is not one the engine runs; known: silu")
    partial = raw.get("partial_rotary_factor", 1.0)
    if partial not in (None, 1, 1.0):
        raise FormatError(f"{where}: partial_rotary_factor {partial} is not one the engine runs; known: 1.0")
    _refuse_sliding_window(raw, where)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise FormatError(f"{where}: {heads} query heads are not a multiple of {kv_heads} key-value heads")
    if raw.get("head_dim") is None and hidden % heads:
        raise FormatError(f"{where}: hidden_size {hidden} is not a multiple of {heads} heads and head_dim is absent")
    head_dim = size("head_dim", hidden // heads)
    if head_dim % 2:
        raise FormatError(f"{where}: head_dim {head_dim} is odd, rotary embeddings need an even one")
    context = size("max_position_embeddings", 2048)
    bias = bool(raw.get("attention_bias", False))
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise FormatError(f"{where}: torch_dtype {dtype!r} is not known; known: {', '.join(_DTYPES)}")
    return Config(
        name=name,
        model_type=kind,
        layers=size("num_hidden_layers"),
        hidden=hidden,
        ffn=size("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=size("vocab_size"),
        context=context,
        norm_eps=number("rms_norm_eps", 1e-6),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or bias,
        o_bias=kind != "qwen2" and bias,
        mlp_bias=kind == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        rope=_rope(raw, where, context),
        dtype=_DTYPES[dtype],
        eos=_ids(raw.get("eos_token_id"), where),
        experts=_experts(raw, where, size) if kind == "qwen3_moe" else None,
    )


def _experts(raw: Mapping[str, Any], where: str, size: Callable[[str], int]) -> Experts:
    """The keys of Qwen3-MoE; transformers 5 writes num_experts as num_local_experts."""
    count = size("num_local_experts" if raw.get("num_experts") is None else "num_experts")
    per_token, dense = size("num_experts_per_tok"), raw.get("mlp_only_layers") or []
    if per_token > count:
        raise FormatError(
            f"{where}: num_experts_per_tok is {per_token}, expected at most {count}, as there are experts"
        )
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        raise FormatError(f"{where}: mlp_only_layers is {dense!r}, expected a list of layer numbers")
    step = 1 if raw.get("decoder_sparse_step") is None else size("decoder_sparse_step")
    normalized = bool(raw.get("norm_topk_prob", False))
    return Experts(count, per_token, size("moe_intermediate_size"), normalized, step, tuple(dense))


def _number(value: Any, default: float, key: str, where: str) -> float:
    """A finite number; `default` for None."""
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise FormatError(f"{where}: {key} is {value!r}, expected a number")
    return float(value)


def _ids(value: Any, where: str) -> tuple[int, ...]:
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in found):
        raise FormatError(f"{where}: eos_token_id is {value!r}, expected a token id or a list of them")
    return tuple(found)


def _refuse_sliding_window(raw: Mapping[str, Any], where: str) -> None:
    """Sliding windows change the result only when one is switched on for a layer of this model."""
    kinds = raw.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list):
            raise FormatError(f"{where}: layer_types is {kinds!r}, expected a list, one word for each layer")
        slides = any(kind != "full_attention" for kind in kinds)
    else:
        layers, untouched = (_number(raw.get(k), 0, k, where) for k in ("num_hidden_layers", "max_window_layers"))
        slides = bool(raw.get("use_sliding_window")) and layers > untouched
    context = _number(raw.get("max_position_embeddings"), 2048, "max_position_embeddings", where)
    if slides and _number(raw.get("sliding_window"), 0, "sliding_window", where) < context:
        raise FormatError(f"{where}: sliding-window attention is not one the engine runs; known: full attention")


def _rope(raw: Mapping[str, Any], where: str, context: int) -> Rope:
    """`rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise FormatError(f"{where}: rope_scaling is {found!r}, expected an object")
    kind = found.get("rope_type") or found.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise FormatError(f"{where}: rope type {kind!r} is not one the engine runs; known: {', '.join(ROPE_TYPES)}")
    theta = found.get("rope_theta") or raw.get("rope_theta") or 10000.0
    numbers = {}
    for key, default in _ROPE_KEYS[kind].items():
        if found.get(key) is None and default is None:
            raise FormatError(f"{where}: rope type {kind!r} needs {key}, found None")
        numbers[key] = _number(found.get(key), default or 0.0, key, where)
    factor = found.get("attention_factor")
    if kind == "yarn":
        if found.get("mscale") is not None or found.get("truncate") is False:
            raise FormatError(f"{where}: yarn with mscale or truncate=false is not one the engine runs")
        numbers["original_max_position_embeddings"] = numbers["original_max_position_embeddings"] or float(context)
    attention = None if factor is None else _number(factor, 1.0, "attention_factor", where)
    return Rope(kind, _number(theta, 10000.0, "rope_theta", where), tuple(sorted(numbers.items())), attention)
