"""Weights: the frozen record of tensors that one model is, real (a checkpoint) or synthetic (drawn at true shapes).

Q, K and V are one matrix, and so are gate and up: fewer and larger calls on both sides of every comparison. Rows of a
quantised weight have their own scales, so joining plain QuantTensors along N is exact; packing comes after. Weights
are built block by block: while quantising, one block exists in 16 bits.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from ...formats import affine, compressed_tensors
from ...formats.checkpoint import Checkpoint
from ...formats.spec import FormatError, QuantSpec
from ...formats.tensor import QuantTensor
from ...kernels.linear import ops_of, prepare
from ...kernels.op import Unsupported
from .config import Config

Weight = torch.Tensor | QuantTensor
INT8_ROW = QuantSpec(8, 8)  # how a head="int8-row" is held: int8, one scale per row, served like any w8a8 weight
_FUSED = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",)}
_FUSED |= {"gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)}


@dataclass(frozen=True)
class Block:
    """One decoder block. Linears [N, K] (tensor or packed QuantTensor) with bias [N] or None; norms [hidden].

    `qk_norm` is [heads + kv_heads, head_dim]: the query norm repeated per query head, then the key norm, so that one
    call scales both.
    """

    input_norm: torch.Tensor
    qkv: Weight
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    o: Weight
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: Weight
    gate_up_bias: torch.Tensor | None
    down: Weight
    down_bias: torch.Tensor | None


@dataclass(frozen=True)
class Weights:
    """All tensors of a model: embedding [V, hidden], blocks, last norm, head [V, hidden] (the embedding when tied).

    `notes` says in words what a reader of a figure must know; `sqnr_db` is the quality of the synthetic quantisation.
    """

    embedding: torch.Tensor
    blocks: tuple[Block, ...]
    norm: torch.Tensor
    head: Weight
    notes: tuple[str, ...] = ()
    sqnr_db: float | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor once, in no promised order; a tied head is the embedding and comes once."""
        seen: set[int] = set()
        values: list[Weight | None] = [self.embedding, self.norm, self.head]
        values += [value for block in self.blocks for value in vars(block).values()]
        for value in values:
            parts = (value.data, value.scale, value.zero) if isinstance(value, QuantTensor) else (value,)
            for part in parts:
                if part is not None and part.data_ptr() not in seen:
                    seen.add(part.data_ptr())
                    yield part

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


class Source(Protocol):
    """Where tensors come from, by their name on disk. Linears come plain (not packed) when quantised."""

    def linear(self, module: str, shape: tuple[int, int]) -> Weight: ...

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor: ...


class RealSource:
    """A checkpoint: 16-bit, or quantised as compressed-tensors. With `spec`, 16-bit linears are rounded at load."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, spec: QuantSpec | None):
        self.checkpoint, self.path, self.dtype, self.device = checkpoint, checkpoint.path, dtype, device
        self.names = frozenset(checkpoint.names)
        self.spec = spec
        self.specs: dict[str, QuantSpec] = {}
        self.parts: dict[str, set[str]] = {}  # module -> suffixes of its tensors
        for module, _, suffix in (name.rpartition(".") for name in self.names):
            self.parts.setdefault(module, set()).add(suffix)
        if compressed_tensors.claims(checkpoint.config):
            self.specs = compressed_tensors.specs(checkpoint.config, list(checkpoint.names))
        elif quantised := checkpoint.config.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise FormatError(
                f"{self.path}/config.json: quant_method {method!r} is not known; known: compressed-tensors"
            )
        if self.specs and spec is not None and spec != self.main_spec:
            raise FormatError(f"{self.path}: is {self.main_spec} already, not {spec}; give the 16-bit checkpoint")

    @property
    def main_spec(self) -> QuantSpec | None:
        """The spec of most linears, None in a 16-bit checkpoint that is not rounded at load."""
        found = list(self.specs.values())
        return max(set(found), key=found.count) if found else self.spec

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self.names:
            raise FormatError(f"{self.path}: tensor {name} is missing; fetch the checkpoint again")
        found = tuple(self.checkpoint.info(name).shape)
        if found != shape:
            raise FormatError(f"{self.path}: {name} has shape {found}, config.json says {shape}")
        return self.checkpoint.read(name).to(self.device, self.dtype)

    def linear(self, module: str, shape: tuple[int, int]) -> Weight:
        if module in self.specs:
            parts = {suffix: self.checkpoint.read(f"{module}.{suffix}") for suffix in self.parts[module] - {"bias"}}
            return compressed_tensors.read(parts, self.specs[module], shape, module).to(self.device)
        weight = self.tensor(f"{module}.weight", shape)
        if self.spec is None or module == "lm_head" or self.specs:
            return weight
        return affine.quantize(weight, self.spec, affine.scale_dtype_of(self.spec, self.dtype))


class SyntheticSource:
    """Weights drawn normal with std 1/sqrt(K), as trained ones are scaled, and norms near 1; same seed, same weights.

    Each tensor has its own seed from its name, so the 16-bit side and every quantised side start from equal numbers.
    `lent` are weights of the same seed and dtype whose embedding and 16-bit head are taken instead of drawn again.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, spec: QuantSpec | None, seed: int, lent: Weights | None = None
    ):
        self.lent = lent
        self.dtype, self.device, self.spec, self.seed = dtype, device, spec, seed
        self.errors: list[float] = []  # SQNR in dB of the first block's linears

    def _normal(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        # One 32-bit number: torch's CPU generator takes no more of a seed than that.
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.seed}:{name}".encode()))
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name == "model.embed_tokens.weight" and self.lent is not None:
            return self.lent.embedding
        values = self._normal(name, shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.1 * values
        else:  # an embedding row or a bias
            values = values / math.sqrt(shape[-1])
        return values.to(self.dtype)

    def linear(self, module: str, shape: tuple[int, int]) -> Weight:
        if module == "lm_head" and self.lent is not None and isinstance(self.lent.head, torch.Tensor):
            return self.lent.head
        weight = (self._normal(f"{module}.weight", shape) / math.sqrt(shape[1])).to(self.dtype)
        if self.spec is None or module == "lm_head":
            return weight
        quantised = affine.quantize(weight, self.spec, affine.scale_dtype_of(self.spec, self.dtype))
        if module.startswith("model.layers.0."):
            exact = weight.float()
            noise = exact - affine.dequantize(quantised, torch.float32)
            self.errors.append(10 * math.log10(float(exact.square().sum() / noise.square().sum().clamp_min(1e-30))))
        return quantised


def build(
    config: Config,
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    impl: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """All weights of `config` from `source`, fused and packed for the body that will serve. `progress(done, blocks)`."""
    notes: dict[str, None] = {}  # an ordered set: every block says the same
    blocks = []
    for index in range(config.layers):
        blocks.append(_block(config, source, f"model.layers.{index}.", dtype, device, impl, notes))
        if progress is not None:
            progress(index + 1, config.layers)
    embedding = source.tensor("model.embed_tokens.weight", (config.vocab, config.hidden))
    norm = source.tensor("model.norm.weight", (config.hidden,))
    head: Weight = embedding
    if not config.tied:
        head = _ready(source.linear("lm_head", (config.vocab, config.hidden)), dtype, device, impl, notes)
    errors = getattr(source, "errors", None)
    return Weights(embedding, tuple(blocks), norm, head, tuple(notes), sum(errors) / len(errors) if errors else None)


def one_block(
    config: Config, source: Source, *, dtype: torch.dtype, device: torch.device, impl: str | None = None
) -> Block:
    """The first block alone, ready to run: for probes that need no whole model."""
    return _block(config, source, "model.layers.0.", dtype, device, impl, {})


def copied(block: Block) -> Block:
    """The same block in memory of its own."""

    def one(value: Any) -> Any:
        if isinstance(value, QuantTensor):
            zero = None if value.zero is None else value.zero.clone()
            return replace(value, data=value.data.clone(), scale=value.scale.clone(), zero=zero)
        return None if value is None else value.clone()

    return Block(**{name: one(value) for name, value in vars(block).items()})


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The same weights with every 16-bit or fp32 tensor in `dtype`; quantised ones are shared, a tied head stays tied."""

    def one(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    embedding = weights.embedding.to(dtype)
    head = embedding if weights.head is weights.embedding else one(weights.head)
    blocks = []
    for b in weights.blocks:
        parts = {name: one(value) for name, value in vars(b).items()}
        for name in _FUSED:
            if isinstance(getattr(b, name), QuantTensor):
                parts[f"{name}_bias"] = getattr(b, f"{name}_bias")
        blocks.append(Block(**parts))
    return replace(weights, embedding=embedding, blocks=tuple(blocks), norm=weights.norm.to(dtype), head=head)


def int8_head(weights: Weights, config: Config, dtype: torch.dtype, impl: str | None = None) -> Weights:
    """The same weights with a load-time int8 copy of the head, one scale per row; the embedding keeps its 16 bits."""
    head = weights.head
    if isinstance(head, QuantTensor):
        raise FormatError(f"the head is {head.spec} on disk already; an int8 copy is made of a 16-bit head only")
    quantised = affine.quantize(head, INT8_ROW, affine.scale_dtype_of(INT8_ROW, dtype))
    notes: dict[str, None] = dict.fromkeys(weights.notes)
    return replace(weights, head=_ready(quantised, dtype, head.device, impl, notes), notes=tuple(notes))


def _block(
    config: Config,
    source: Source,
    prefix: str,
    dtype: torch.dtype,
    device: torch.device,
    impl: str | None,
    notes: dict[str, None],
) -> Block:
    shapes = config.linears()
    has_bias = {"qkv": config.qkv_bias, "o": config.o_bias, "gate_up": config.mlp_bias, "down": config.mlp_bias}
    linears: dict[str, Weight] = {}
    biases: dict[str, torch.Tensor | None] = {}
    for name, members in _FUSED.items():
        parts = [source.linear(prefix + member, shapes[member]) for member in members]
        linears[name] = _ready(join(parts, dtype, notes), dtype, device, impl, notes)
        biases[name] = None
        if has_bias[name]:
            bias = torch.cat([source.tensor(f"{prefix}{m}.bias", (shapes[m][0],)) for m in members])
            # Quantised ops add their bias in fp32; torch's matmul wants the type of x.
            biases[name] = bias.float() if isinstance(linears[name], QuantTensor) else bias
    qk_norm = None
    if config.qk_norm:
        norms = [source.tensor(f"{prefix}self_attn.{n}_norm.weight", (config.head_dim,)) for n in "qk"]
        counts = (config.heads, config.kv_heads)
        qk_norm = torch.cat([norm.expand(count, -1) for norm, count in zip(norms, counts, strict=True)]).contiguous()
    return Block(
        input_norm=source.tensor(f"{prefix}input_layernorm.weight", (config.hidden,)),
        qkv=linears["qkv"],
        qkv_bias=biases["qkv"],
        qk_norm=qk_norm,
        o=linears["o"],
        o_bias=biases["o"],
        post_norm=source.tensor(f"{prefix}post_attention_layernorm.weight", (config.hidden,)),
        gate_up=linears["gate_up"],
        gate_up_bias=biases["gate_up"],
        down=linears["down"],
        down_bias=biases["down"],
    )


def join(parts: Sequence[Weight], dtype: torch.dtype, notes: dict[str, None]) -> Weight:
    """Weights stacked along N. Plain QuantTensors of one spec stay quantised; a mixture is dequantised, with a note."""
    if len(parts) == 1:
        return parts[0]
    quantised = [part for part in parts if isinstance(part, QuantTensor)]
    if len(quantised) == len(parts) and len({part.spec for part in quantised}) == 1:
        zeros = [part.zero for part in quantised if part.zero is not None]
        return QuantTensor(
            data=torch.cat([part.data for part in quantised]),
            scale=torch.cat([part.scale for part in quantised]),
            zero=torch.cat(zeros) if zeros else None,
            spec=quantised[0].spec,
            packing="plain",
            shape=(sum(part.shape[0] for part in quantised), quantised[0].shape[1]),
        )
    if quantised:
        notes.setdefault("fused linears of unlike specs are dequantised at load")
    return torch.cat([affine.dequantize(p, dtype) if isinstance(p, QuantTensor) else p for p in parts])


def _ready(
    weight: Weight, dtype: torch.dtype, device: torch.device, impl: str | None, notes: dict[str, None]
) -> Weight:
    """A quantised weight packed for its body, or dequantised with a note when no kernel serves its spec."""
    if not isinstance(weight, QuantTensor):
        return weight.contiguous()
    try:
        ops_of(weight.spec)
    except Unsupported as error:
        reason = str(error).split(";")[0]
        notes.setdefault(f"{weight.spec}: dequantised to {str(dtype).removeprefix('torch.')} at load ({reason})")
        return affine.dequantize(weight, dtype)
    return prepare(weight, device, impl=impl)
