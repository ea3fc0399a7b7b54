"""Weights: the frozen record of tensors that one model is, real (a checkpoint) or synthetic (drawn at true shapes).

Q, K and V are one matrix, and so are gate and up: fewer and larger calls on both sides of every comparison. Rows of a
quantised weight have their own scales, so joining plain QuantTensors along N is exact; packing comes after. Weights
are built block by block: while quantising, one block exists in 16 bits.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from ...formats import affine, compressed_tensors, layout
from ...formats.checkpoint import Checkpoint
from ...formats.spec import FormatError, QuantSpec
from ...formats.tensor import ExpertsTensor, QuantTensor
from ...kernels.linear import ops_of, prepare, prepare_experts
from ...kernels.op import Unsupported
from .config import Config
from .experts import Moe

Weight = torch.Tensor | QuantTensor
EXPERT_BITS = ((4, 16), (8, 8))  # weights and activations that moe_matmul serves
INT8_ROW = QuantSpec(8, 8)  # how a head="int8-row" is held: int8, one scale per row, served like any w8a8 weight
_ATTENTION = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",)}
_FUSED = _ATTENTION | {"gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)}


@dataclass(frozen=True)
class Block:
    """One decoder block. Linears [N, K] (tensor or packed QuantTensor) with bias [N] or None; norms [hidden].

    `qk_norm` is [heads + kv_heads, head_dim]: the query norm repeated per query head, then the key norm, so that one
    call scales both. A block has either gate_up and down, or `moe`.
    """

    input_norm: torch.Tensor
    qkv: Weight
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    o: Weight
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: Weight | None = None
    gate_up_bias: torch.Tensor | None = None
    down: Weight | None = None
    down_bias: torch.Tensor | None = None
    moe: Moe | None = None


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
        values: list[Any] = [self.embedding, self.norm, self.head]
        values += [value for block in self.blocks for value in vars(block).values()]
        for value in values:
            for part in _parts(value):
                if part.data_ptr() not in seen:
                    seen.add(part.data_ptr())
                    yield part

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


def _parts(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of one field of a Block."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, QuantTensor | ExpertsTensor):
        yield from (part for part in (value.data, value.scale, value.zero) if part is not None)
    elif isinstance(value, Moe):
        for inner in (value.router, value.w13, value.w2):
            yield from _parts(inner)


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
        if module.startswith("model.layers.0.") and (".experts." not in module or ".experts.0." in module):
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
        blocks.append(_block(config, source, index, dtype, device, impl, notes))
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
    return _block(config, source, 0, dtype, device, impl, {})


def copied(block: Block) -> Block:
    """The same block in memory of its own."""

    def one(value: Any) -> Any:
        if isinstance(value, QuantTensor | ExpertsTensor):
            zero = None if value.zero is None else value.zero.clone()
            return replace(value, data=value.data.clone(), scale=value.scale.clone(), zero=zero)
        if isinstance(value, Moe):
            return replace(value, router=one(value.router), w13=one(value.w13), w2=one(value.w2))
        return None if value is None else value.clone()

    return Block(**{name: one(value) for name, value in vars(block).items()})


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The same weights with every 16-bit or fp32 tensor in `dtype`; quantised ones are shared, a tied head stays tied."""

    def one(value: Any) -> Any:
        if isinstance(value, Moe):
            return replace(value, router=one(value.router), w13=one(value.w13), w2=one(value.w2))
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
    index: int,
    dtype: torch.dtype,
    device: torch.device,
    impl: str | None,
    notes: dict[str, None],
) -> Block:
    prefix, shapes = f"model.layers.{index}.", config.linears(index)
    has_bias = {"qkv": config.qkv_bias, "o": config.o_bias, "gate_up": config.mlp_bias, "down": config.mlp_bias}
    linears: dict[str, Weight] = {}
    biases: dict[str, torch.Tensor | None] = {}
    for name, members in (_ATTENTION if config.is_sparse(index) else _FUSED).items():
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
        gate_up=linears.get("gate_up"),
        gate_up_bias=biases.get("gate_up"),
        down=linears.get("down"),
        down_bias=biases.get("down"),
        moe=_moe(config, source, f"{prefix}mlp.", shapes, dtype, device, impl, notes)
        if config.is_sparse(index)
        else None,
    )


def _moe(
    config: Config,
    source: Source,
    prefix: str,
    shapes: dict[str, tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    impl: str | None,
    notes: dict[str, None],
) -> Moe:
    """The experts of one block, read one by one and stacked."""
    assert config.experts is not None
    count = config.experts.count

    def members(*names: str) -> Iterator[Weight]:
        for e in range(count):
            modules = [f"experts.{e}.{name}_proj" for name in names]
            yield join([source.linear(prefix + m, shapes[f"mlp.{m}"]) for m in modules], dtype, notes)

    def stacked(*names: str) -> torch.Tensor | ExpertsTensor:
        found = members(*names)
        first = next(found)
        if isinstance(first, QuantTensor):
            every = itertools.chain([first], (_of_spec(w, first.spec, prefix) for w in found))
            return _ready_experts(layout.stack_experts(every, count), dtype, device, impl, notes)
        stack = first.new_empty((count, *first.shape))
        stack[0] = first
        for e, weight in enumerate(found, 1):
            stack[e] = affine.dequantize(weight, dtype) if isinstance(weight, QuantTensor) else weight
        return stack

    router = source.tensor(f"{prefix}gate.weight", (count, config.hidden))
    w13, w2 = stacked("gate", "up"), stacked("down")
    if isinstance(w13, ExpertsTensor) and isinstance(w2, ExpertsTensor) and w13.spec.act_bits == w2.spec.act_bits:
        return Moe(router, w13, w2, config.experts.per_token, config.experts.normalized)
    w13, w2 = (_dequantised(w, dtype) if isinstance(w, ExpertsTensor) else w for w in (w13, w2))
    return Moe(router, w13, w2, config.experts.per_token, config.experts.normalized)


def _of_spec(weight: Weight, spec: QuantSpec, where: str) -> QuantTensor:
    """`weight` if it is quantised as the first expert of its layer is; FormatError otherwise."""
    if not isinstance(weight, QuantTensor) or weight.spec != spec:
        found = weight.spec if isinstance(weight, QuantTensor) else "16-bit"
        raise FormatError(f"{where}experts: the first is {spec}, another {found}; all experts of a layer have one spec")
    return weight


def _dequantised(experts: ExpertsTensor, dtype: torch.dtype) -> torch.Tensor:
    """[E, N, K] in `dtype`, expert by expert."""
    out = torch.empty(experts.shape, dtype=dtype, device=experts.data.device)
    for e in range(experts.shape[0]):
        out[e] = affine.dequantize(layout.repack(experts.expert(e), "plain"), dtype)
    return out


def _ready_experts(
    experts: ExpertsTensor, dtype: torch.dtype, device: torch.device, impl: str | None, notes: dict[str, None]
) -> torch.Tensor | ExpertsTensor:
    """Quantised experts packed for their body, or dequantised with a note when no kernel serves their spec."""
    if experts.spec.float_format is None and (experts.spec.weight_bits, experts.spec.act_bits) in EXPERT_BITS:
        return prepare_experts(experts, device, impl)
    words = f"experts in {experts.spec}: dequantised to {str(dtype).removeprefix('torch.')} at load"
    notes.setdefault(f"{words} (moe_matmul serves w4a16 and w8a8)")
    return _dequantised(experts, dtype)


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
