"""Which tensors of a checkpoint are linears, which belong together, which stay as they are: by name, never by module.

A `Family` is one frozen record of name patterns. From it and config.json follow every tensor that must be there, with
its shape, so a checkpoint with a hole or a surprise is refused before work starts. No model code runs here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError, QuantSpec
from .recipe import Recipe, RecipeError, compiled

Shape = tuple[int, ...]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (QKV, ("self_attn.o_proj",))
DENSE_MLP = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
ROW_WEIGHTS = 1 << 21  # weights of one row range: 8 MB in fp32
ROW_MULTIPLE = 32  # packed zero points of 32 rows fill whole words at any bit width


@dataclass(frozen=True)
class Family:
    """How one family names its tensors.

    sets: the linears of a dense block in order of execution; members of a set read one input and are fused by engines,
    so they share one spec. keep: (regex over module names, reason) of what is never quantised unless `ignore!` says so.
    qkv_bias: True, or the config key that says so. qk_norm: norms per head on q and k. experts: sparse blocks.
    """

    name: str
    model_types: tuple[str, ...]
    qkv_bias: bool | str = False
    o_bias: str | None = None
    mlp_bias: str | None = None
    qk_norm: bool = False
    experts: bool = False
    block: str = "model.layers.{}."
    sets: tuple[tuple[str, ...], ...] = ATTENTION + DENSE_MLP
    keep: tuple[tuple[str, str], ...] = ((r"lm_head$", "output head"),)
    # Left behind by old exports, derived from the config: copied when there.
    optional: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$",)


FAMILIES = (
    Family("Qwen2", ("qwen2",), qkv_bias=True),
    Family("Qwen3", ("qwen3",), qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True),
    Family("Llama", ("llama",), qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    Family("Mistral", ("mistral",)),
    Family(
        "Qwen3-MoE",
        ("qwen3_moe",),
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        experts=True,
        keep=((r"lm_head$", "output head"), (r".*\.mlp\.gate$", "router")),
    ),
)


@dataclass(frozen=True)
class Linear:
    """A weight [out, in] that could be quantised. `tensor` is `name` + ".weight"; `together` names its fused set."""

    name: str
    shape: tuple[int, int]
    block: int | None
    together: str

    @property
    def tensor(self) -> str:
        return f"{self.name}.weight"


@dataclass(frozen=True)
class Map:
    """A checkpoint, understood: its family, every linear in order of execution, every other tensor."""

    family: Family
    linears: tuple[Linear, ...]
    others: Mapping[str, Shape]
    dtype: torch.dtype  # of the model: what the scales are stored in
    tied: bool

    def blocks(self) -> list[tuple[Linear, ...]]:
        """The linears of each decoder block, in order."""
        count = 1 + max((x.block for x in self.linears if x.block is not None), default=-1)
        return [tuple(x for x in self.linears if x.block == i) for i in range(count)]


@dataclass(frozen=True)
class Assignment:
    """Which spec each module gets, and which rule left the others alone (module name -> rule, with its reason)."""

    specs: Mapping[str, QuantSpec]
    kept: Mapping[str, str]


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json; FormatError for one that is not known, listing those that are."""
    kind = config.get("model_type")
    for family in FAMILIES:
        if kind in family.model_types:
            return family
    known = ", ".join(t for f in FAMILIES for t in f.model_types)
    names = config.get("architectures")
    found = f"model_type {kind!r}" + (f", architectures {names}" if names else "")
    raise FormatError(f"{where}/config.json: unknown architecture ({found}); known model types: {known}")


def refuse_quantised(config: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """FormatError when config or tensor names say that the source is not 16- or 32-bit any more."""
    found = next((k for k in ("quantization_config", "compression_config") if config.get(k) is not None), None)
    if found is not None:
        value = config[found]
        method = value.get("quant_method", "unknown") if isinstance(value, dict) else "unknown"
        raise FormatError(
            f"{where}: source is already quantised ({found}: {method}); take the 16-bit checkpoint as source"
        )
    tails = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".scales", ".qzeros")
    for name in names:
        if name.endswith(tails):
            raise FormatError(
                f"{where}: source is already quantised (tensor {name}); take the 16-bit checkpoint as source"
            )


def survey(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype], where: str
) -> Map:
    """Compares what config.json promises with the tensors that are there; FormatError names the first difference."""
    refuse_quantised(config, shapes, where)
    family = family_of(config, where)
    linears, rest, tied = _promised(config, family, shapes, where)
    promised: dict[str, Shape] = {x.tensor: x.shape for x in linears} | rest
    if tied and "lm_head.weight" in shapes:  # some exports store the tied head as well
        promised["lm_head.weight"] = promised["model.embed_tokens.weight"]
    fused = next((n for n in shapes if len(shapes[n]) == 3), None)
    if fused is not None and fused not in promised:
        raise FormatError(
            f"{where}: tensor {fused} has 3 dimensions {list(shapes[fused])}; experts must be stored one by one"
        )
    for name, shape in promised.items():
        _must_be(name, shapes, where)
        if tuple(shapes[name]) != shape:
            raise FormatError(
                f"{where}: tensor {name} has shape {list(shapes[name])}, config.json says {list(shape)}; "
                "the config belongs to another model"
            )
    optional = [re.compile(p) for p in family.optional]
    for name in shapes:
        if name not in promised and not any(p.match(name) for p in optional):
            raise FormatError(
                f"{where}: tensor {name} {list(shapes[name])} belongs to no {family.name} model of this config.json "
                f"({_integer(config, 'num_hidden_layers', where)} layers); it would be neither quantised nor understood"
            )
    for linear in linears:
        if dtypes[linear.tensor] not in (torch.bfloat16, torch.float16, torch.float32):
            raise FormatError(
                f"{where}: tensor {linear.tensor} is {str(dtypes[linear.tensor]).removeprefix('torch.')}, expected "
                "bfloat16, float16 or float32; take the 16-bit checkpoint as source"
            )
    taken = {x.tensor for x in linears}
    others = {name: tuple(shape) for name, shape in shapes.items() if name not in taken}
    return Map(family, tuple(linears), others, _model_dtype(config, [dtypes[x.tensor] for x in linears]), tied)


def of(source: Checkpoint) -> Map:
    """`survey` of an opened checkpoint."""
    infos = source.tensors.items()
    return survey(source.config, {n: i.shape for n, i in infos}, {n: i.dtype for n, i in infos}, str(source.path))


def assign(found: Map, recipe: Recipe) -> Assignment:
    """The spec of every linear. RecipeError for a rule that matches nothing or splits what engines fuse."""
    rules = (
        []
        if recipe.replace_ignore
        else [(f"re:{p}", f"{why} (family {found.family.name})") for p, why in found.family.keep]
    )
    rules += [(p, "recipe") for p in recipe.ignore]
    tests = [(compiled(p), p, why) for p, why in rules]
    layers = [(compiled(p), p, spec) for p, spec in recipe.layers]
    used: set[str] = set()
    specs: dict[str, QuantSpec] = {}
    kept: dict[str, str] = {}
    names = [x.name for x in found.linears]
    others = {n.removesuffix(".weight"): len(shape) for n, shape in found.others.items() if n.endswith(".weight")}
    for name in names:
        matches = [(p, why) for test, p, why in tests if test(name)]
        used.update(p for p, _ in matches)
        if matches:
            kept[name] = f"{matches[0][0]}: {matches[0][1]}"
            continue
        override = [(p, spec) for test, p, spec in layers if test(name)]
        used.update(p for p, _ in override)
        specs[name] = override[0][1] if override else recipe.spec
    for test, pattern, why in tests:  # an ignore may name what is no linear anyway: a router, a norm, a tied head
        hits = [n for n in {**others, "lm_head": 2} if test(n)]
        used.update([pattern] if hits else [])
        kept.update(
            {n: f"{pattern}: {why}" for n in hits if n not in specs and n not in kept and others.get(n, 2) == 2}
        )
    for pattern in [*recipe.ignore, *(p for p, _ in recipe.layers)]:
        if pattern not in used:
            raise RecipeError(f"{pattern!r} matches no module that is left; names look like {names[0]!r}")
    _refuse_split(found, specs, kept)
    if not specs:
        raise RecipeError("ignore leaves nothing to quantise; take rules out of it")
    if found.tied and not _keeps_head(tests):
        raise RecipeError(
            "lm_head shares its weight with the embeddings (tie_word_embeddings) and cannot be quantised alone; "
            "add lm_head to ignore"
        )
    return Assignment(specs, kept)


def block_of(found: Map, name: str) -> int | None:
    """The decoder block that a tensor belongs to, None = it stands around them."""
    head, tail = found.family.block.split("{}")
    number = name.removeprefix(head).partition(".")[0]
    return (
        int(number) if name.startswith(head) and number.isdigit() and name.startswith(f"{head}{number}{tail}") else None
    )


def finite(source: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of the source; FormatError when it holds NaN or Inf."""
    tensor = source.read(name)
    if not bool(torch.isfinite(tensor).all()):
        raise FormatError(
            f"{source.info(name).file}: tensor {name} holds NaN or Inf; repair the source or download it again"
        )
    return tensor


def kv_heads(config: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    """(key heads, query heads per key head, head size) of a config.json."""
    heads, hidden = (_integer(config, key, where) for key in ("num_attention_heads", "hidden_size"))
    kv = _integer(config, "num_key_value_heads", where, heads)
    return kv, heads // kv, _integer(config, "head_dim", where, max(hidden // heads, 1))


def row_ranges(shape: tuple[int, int], by_rows: bool = True) -> Iterator[tuple[int, int]]:
    """(start, stop) of row ranges of about ROW_WEIGHTS weights, each but the last a multiple of ROW_MULTIPLE rows."""
    rows, columns = shape
    step = max(1, ROW_WEIGHTS // max(columns, 1) // ROW_MULTIPLE) * ROW_MULTIPLE if by_rows else max(rows, 1)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _keeps_head(tests: list[tuple[Any, str, str]]) -> bool:
    return any(test("lm_head") for test, _, _ in tests)


def _refuse_split(found: Map, specs: Mapping[str, QuantSpec], kept: Mapping[str, str]) -> None:
    first: dict[str, Linear] = {}
    for linear in found.linears:
        other = first.setdefault(linear.together, linear)
        mine, theirs = (str(specs.get(x.name, "left alone")) for x in (linear, other))
        if mine != theirs:
            raise RecipeError(
                f"{other.name} ({theirs}) and {linear.name} ({mine}) are one matrix in engines and must share one "
                f"spec; name the whole set in the rule ({kept.get(linear.name) or kept.get(other.name) or 'layers'})"
            )


def _promised(
    config: Mapping[str, Any], family: Family, shapes: Mapping[str, Shape], where: str
) -> tuple[list[Linear], dict[str, Shape], bool]:
    """(linears in order, shapes of all other tensors, tied head) that config.json promises.

    Looks for a tensor of every block and expert on the way, so that a config that promises billions stops at once.
    """

    def number(key: str, default: int | None = None) -> int:
        return _integer(config, key, where, default)

    def flag(value: bool | str | None) -> bool:
        return bool(config.get(value, False)) if isinstance(value, str) else bool(value)

    hidden, heads, inner = number("hidden_size"), number("num_attention_heads"), number("intermediate_size")
    kv_heads = number("num_key_value_heads", heads)
    head = number("head_dim", max(hidden // heads, 1))
    vocabulary = number("vocab_size")
    query, key_value = heads * head, kv_heads * head
    sizes: dict[str, tuple[int, int]] = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    biased = {
        n for n in sizes if (flag(family.qkv_bias) and n in QKV) or (flag(family.o_bias) and n.endswith("o_proj"))
    }
    biased |= {n for n in sizes if flag(family.mlp_bias) and n.startswith("mlp.")}
    linears: list[Linear] = []
    rest: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for i in range(number("num_hidden_layers")):
        prefix = family.block.format(i)
        _must_be(f"{prefix}input_layernorm.weight", shapes, where)
        sparse = family.experts and _is_sparse(config, i, where)
        for members in family.sets if not sparse else ATTENTION:
            linears += [Linear(prefix + m, sizes[m], i, prefix + members[0]) for m in members]
            rest |= {f"{prefix}{m}.bias": (sizes[m][0],) for m in members if m in biased}
        if sparse:
            small = number("moe_intermediate_size")
            # transformers 5 writes num_experts under another name
            count = number("num_local_experts" if config.get("num_experts") is None else "num_experts")
            rest[f"{prefix}mlp.gate.weight"] = (count, hidden)
            for e in range(count):
                _must_be(f"{prefix}mlp.experts.{e}.gate_proj.weight", shapes, where)
                for m, shape in (("gate", (small, hidden)), ("up", (small, hidden)), ("down", (hidden, small))):
                    linears.append(Linear(f"{prefix}mlp.experts.{e}.{m}_proj", shape, i, f"{prefix}mlp.experts"))
        rest |= {f"{prefix}{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        if family.qk_norm:
            rest |= {f"{prefix}self_attn.{n}.weight": (head,) for n in ("q_norm", "k_norm")}
    tied = bool(config.get("tie_word_embeddings", False))
    if not tied:
        linears.append(Linear("lm_head", (vocabulary, hidden), None, "lm_head"))
    return linears, rest, tied


def _must_be(name: str, shapes: Mapping[str, Shape], where: str) -> None:
    if name not in shapes:
        raise FormatError(f"{where}: tensor {name} is missing; config.json promises it; download the checkpoint again")


def _is_sparse(config: Mapping[str, Any], layer: int, where: str) -> bool:
    """Whether a block of a Qwen3-MoE model holds experts (its config names the dense ones)."""
    dense = config.get("mlp_only_layers") or []
    step = _integer(config, "decoder_sparse_step", where, 1)
    return layer not in dense and (layer + 1) % step == 0


def _integer(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 32:
        raise FormatError(f"{where}: {key} is {value!r}, expected a whole number above 0; config.json is broken")
    return value


def _model_dtype(config: Mapping[str, Any], dtypes: list[torch.dtype]) -> torch.dtype:
    """What config.json says engines will compute in; where it is silent, what the linears are stored in."""
    word = config.get("dtype") or config.get("torch_dtype")
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return known.get(str(word).removeprefix("torch."), dtypes[0] if dtypes else torch.bfloat16)
