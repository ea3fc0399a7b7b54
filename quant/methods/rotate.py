"""Rotation of a decoder, folded into its weights: QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406), without
the parts that need a kernel at run time.

    R1 [hidden, hidden]  the residual stream: x becomes x R1. What reads it (q, k, v, gate, up, router, head) takes its
                         norm's weights into itself first, W -> (W * norm) R1; what writes it (embeddings, o, down)
                         writes x R1, W -> R1^T W, bias -> bias R1. The norm is left with ones: |x R1| = |x|.
    R2 [D, D]            one for each key head: v gives v R2, and o's columns of every query head that reads it follow.

    R = diag(signs) (Hadamard(2^k) kron Q)      hidden = 2^k m, m odd (3584 = 512 x 7); Q random orthogonal [m, m]

An outlier in one channel is spread over all. Signs and Q come from a seed, so no matrix is ever stored. One tensor is in
memory at a time; a product with R costs columns * (64 + 64 + m) a row, not columns^2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...formats.spec import FormatError, QuantSpec
from .records import Option

Read = Callable[[str], torch.Tensor]
MODEL_TYPES = ("qwen2", "qwen3", "llama", "mistral", "qwen3_moe")
OPTIONS = {
    "seed": Option(int, 0, "of the random signs", 0, 1 << 31),
    "values": Option(bool, True, "rotate values too, per key head (R2)"),
    "untie": Option(bool, False, "give a model with tied embeddings an output head of its own (costs its bytes)"),
}
_STEP = 64  # widest Hadamard matrix that is multiplied with; larger ones are products of it
_PIECE = 1 << 22  # numbers per step
_BLOCK = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
_SAME = re.compile(
    r"self_attn\.(q_norm|k_norm)\.weight|self_attn\.(q|k)_proj\.bias|self_attn\.rotary_emb\.inv_freq"
    r"|mlp\.(experts\.\d+\.)?(gate|up)_proj\.bias"
)


def serves(spec: QuantSpec) -> str | None:
    """None: rotated weights can be rounded to anything."""
    return None


def refusal(config: Mapping[str, Any], *, untie: bool = False) -> str | None:
    """Why a model with this config.json cannot be rotated, with the remedy; None when it can."""
    kind = str(config.get("model_type"))
    if "gemma" in kind:
        return f"rotate: norms of {kind} multiply by 1 + weight, which cannot be folded away; leave rotate out"
    if config.get("vision_config") is not None or "vision" in config:
        return f"rotate: a vision tower feeds the stream of {kind} and would have to be rotated too; leave rotate out"
    if config.get("num_nextn_predict_layers"):
        return f"rotate: prediction layers (MTP) of {kind} read the same stream; leave rotate out"
    if kind not in MODEL_TYPES:
        return f"rotate: unknown model type {kind!r}, known: {', '.join(MODEL_TYPES)}; leave rotate out"
    if config.get("tie_word_embeddings", False) and not untie:
        rows, columns = config.get("vocab_size"), config.get("hidden_size")
        size = f" of {rows * columns:,} weights" if isinstance(rows, int) and isinstance(columns, int) else ""
        return (
            "rotate: the output head is tied to the embeddings, but takes the last norm into itself and they do not; "
            f"say rotate: {{untie: true}} to write a head of its own{size}, or leave rotate out"
        )
    return None


def plan(
    hidden: int, heads: int, kv_heads: int, head_dim: int, layers: int, *, seed: int = 0, values: bool = True
) -> Rotation:
    """The rotation of a decoder of these sizes. Equal arguments give equal matrices."""
    if min(hidden, heads, kv_heads, head_dim, layers) < 1 or heads % kv_heads:
        raise ValueError(
            f"rotate: {heads} query and {kv_heads} key heads of {head_dim}, hidden {hidden}, {layers} layers is no model"
        )
    return Rotation(heads, kv_heads, head_dim, layers, seed, values, Orthogonal.random(hidden, seed))


@dataclass(frozen=True, eq=False)
class Orthogonal:
    """diag(signs) (Hadamard(2^k) / sqrt(2^k) kron odd). signs fp64 [size] of +-1; odd fp64 [m, m], m odd."""

    signs: torch.Tensor
    odd: torch.Tensor

    @staticmethod
    def random(size: int, seed: int) -> Orthogonal:
        source = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (size,), generator=source, dtype=torch.float64) * 2 - 1
        rest = size // (size & -size)
        q, r = torch.linalg.qr(torch.randn(rest, rest, generator=source, dtype=torch.float64))
        return Orthogonal(signs, q * r.diagonal().sign())

    @property
    def size(self) -> int:
        return self.signs.shape[0]

    def right(self, x: torch.Tensor) -> torch.Tensor:
        """x R of x [..., size], in the dtype of x."""
        flat = x.reshape(-1, self.size)
        out = torch.empty_like(flat)
        factors = [*_hadamards(self.size // self.odd.shape[0], x), self.odd.to(x)]
        signs = self.signs.to(x)
        step = max(1, _PIECE // self.size)
        for start in range(0, flat.shape[0], step):
            part = flat[start : start + step] * signs
            rows = part.shape[0]
            for factor in factors:  # each turns its axis and sends it to the end: after all, every axis is back
                part = part.view(rows, factor.shape[0], -1).transpose(1, 2).reshape(-1, factor.shape[0]) @ factor
                part = part.view(rows, self.size)
            out[start : start + step] = part
        return out.view(x.shape)

    def left(self, w: torch.Tensor) -> torch.Tensor:
        """R^T w of w [size, ...]."""
        return self.right(w.movedim(0, -1)).movedim(-1, 0).contiguous()

    def matrix(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """R itself, [size, size]."""
        return self.right(torch.eye(self.size, dtype=torch.float64)).to(dtype)


def _hadamards(size: int, like: torch.Tensor) -> list[torch.Tensor]:
    """Normalised Hadamard matrices of at most _STEP rows whose Kronecker product is the one of `size` = 2^k rows."""
    found = []
    while size > 1:
        width = min(size, _STEP)
        h = torch.ones(1, 1, dtype=torch.float64)
        while h.shape[0] < width:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        found.append((h / width**0.5).to(like))
        size //= width
    return found


@dataclass(frozen=True, eq=False)
class Rotation:
    """What becomes of each tensor of a decoder, by its name on disk. Made by `plan`."""

    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    seed: int
    values: bool
    stream: Orthogonal

    def apply(self, name: str, tensor: torch.Tensor, read: Read) -> torch.Tensor:
        """Tensor `name` of the rotated model, fp32 (fp64 of fp64): what it was is `tensor`, `read` gives other ones.

        For a head that is tied to the embeddings: apply("lm_head.weight", embeddings, read). Where `by_rows` says so, a
        range of rows may come alone. FormatError for a tensor that a rotation knows nothing about.
        """
        value = tensor if tensor.dtype == torch.float64 else tensor.float()
        block = _BLOCK.fullmatch(name)
        if block is not None:
            return self._in_block(name, int(block[1]), block[2], value, read)
        leaf = name.rpartition("model.")[2]
        if leaf == "embed_tokens.weight":
            return self.stream.right(value)
        if leaf == "norm.weight":
            return torch.ones_like(value)
        if leaf == "lm_head.weight":
            return self._reads(value, read("model.norm.weight"))
        raise FormatError(f"rotate: tensor {name} is unknown, it may read or write the rotated stream")

    def by_rows(self, name: str) -> bool:
        """Whether a range of rows of `name` can be rotated without the others."""
        return not name.endswith(("o_proj.weight", "down_proj.weight", "v_proj.weight", ".bias"))

    def _in_block(self, name: str, layer: int, leaf: str, value: torch.Tensor, read: Read) -> torch.Tensor:
        prefix = name[: -len(leaf)]
        module, _, kind = leaf.rpartition(".")
        if leaf in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            return torch.ones_like(value)
        if module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") and kind == "weight":
            value = self._reads(value, read(f"{prefix}input_layernorm.weight"))
            return self._values(layer, value) if module.endswith("v_proj") else value
        if leaf == "self_attn.v_proj.bias":
            return self._values(layer, value)
        if module == "self_attn.o_proj":
            return self.stream.left(self._value_columns(layer, value) if kind == "weight" else value)
        if module.startswith("mlp.") and module.endswith(".down_proj"):
            return self.stream.left(value)
        if module.startswith("mlp.") and module.endswith((".gate_proj", ".up_proj", "mlp.gate")) and kind == "weight":
            return self._reads(value, read(f"{prefix}post_attention_layernorm.weight"))
        if _SAME.fullmatch(leaf):
            return value
        raise FormatError(f"rotate: tensor {name} is unknown, it may read or write the rotated stream")

    def _reads(self, weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """A weight [N, hidden] that reads the stream behind `norm` [hidden]."""
        return self.stream.right(weight * norm.to(weight))

    def _heads(self, layer: int, like: torch.Tensor) -> torch.Tensor:
        """R2 of every key head of a layer: [kv_heads, D, D]."""
        first = (self.seed * 1_000_003 + layer + 1) * 4099
        return torch.stack(
            [Orthogonal.random(self.head_dim, first + h).matrix(torch.float64) for h in range(self.kv_heads)]
        ).to(like)

    def _values(self, layer: int, value: torch.Tensor) -> torch.Tensor:
        """Rows, or the bias, of v: what each key head gives is turned by its R2."""
        if not self.values:
            return value
        by_head = value.view(self.kv_heads, self.head_dim, -1)
        return torch.bmm(self._heads(layer, value).mT, by_head).view(value.shape)

    def _value_columns(self, layer: int, weight: torch.Tensor) -> torch.Tensor:
        """Columns of o: each query head reads what its key head gives."""
        if not self.values:
            return weight
        group = self.heads // self.kv_heads
        by_head = weight.view(-1, self.kv_heads, group, self.head_dim).permute(1, 0, 2, 3)
        turned = by_head.reshape(self.kv_heads, -1, self.head_dim) @ self._heads(layer, weight)
        shape = (self.kv_heads, weight.shape[0], group, self.head_dim)
        return turned.view(shape).permute(1, 0, 2, 3).reshape(weight.shape)
