"""One decoder block and the head as plain functions over a frozen record of tensors.

FP16 and quantised runs take this very path; they differ in the weights handed to `kernels.linear.linear` (a tensor or
a QuantTensor) and in nothing else. Shapes: B batch, T new tokens, S cached length, H query heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ...formats.spec import QuantSpec
from ...formats.tensor import QuantTensor
from ...kernels.linear import linear, linear_quantized, ops_of, quantizes
from ...kernels.moe_matmul import moe_matmul
from ...kernels.op import native_isa
from ...kernels.quantize_rows import quantize_rows
from ...kernels.rmsnorm_quantize import rmsnorm_quantize
from ...kernels.silu_mul_quantize import silu_mul_quantize
from . import experts
from . import weights as weights_module
from .cache import Cache
from .config import Config
from .rope import rotate
from .sampling import Sampler
from .weights import Block, Weight, Weights

HEADS = ("16bit", "int8-row")
# (q [B,T,H,D], k [B,T,kv_heads,D], v, layer) -> [B,T,H*D]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]

# (x [..., K], weight [N, K], bias [N] or None) -> [..., N]
Matmul = Callable[..., torch.Tensor]


def one_row_linear(
    x: torch.Tensor,
    w: Weight,
    bias: torch.Tensor | None = None,
    *,
    impl: str | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """`linear`, but a single row times a 16-bit or fp32 weight is torch.mv.

    On some CPUs torch's bf16 matmul is up to twice as slow as its matrix-vector product. The probe of `bench model`
    finds out, so that the 16-bit side of a decode gets whichever is faster there.
    """
    if isinstance(w, QuantTensor) or x.numel() != x.shape[-1]:
        return linear(x, w, bias, impl=impl, batch_invariant=batch_invariant)
    y = torch.mv(w, x.reshape(-1))
    return (y if bias is None else y + bias).view(*x.shape[:-1], w.shape[0])


def block(
    x: torch.Tensor,
    add: torch.Tensor | None,
    b: Block,
    config: Config,
    layer: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    attend: Attend,
    matmul: Matmul = linear,
    impl: str | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One decoder block: x + add [B, T, hidden] (`add` None: x) to the same kind of pair. x may change in place.

    The sum is left to the norm that comes next: where a weight takes int8 rows, norm, sum and quantisation are one op.
    """
    batch, new, _ = x.shape
    how: dict[str, Any] = {"impl": impl, "batch_invariant": batch_invariant}
    qk_heads, eps = config.heads + config.kv_heads, config.norm_eps
    x, qkv = _norm_matmul(x, add, b.input_norm, eps, b.qkv, b.qkv_bias, matmul, how)
    qkv = qkv.view(batch, new, qk_heads + config.kv_heads, config.head_dim)
    qk, v = qkv[:, :, :qk_heads], qkv[:, :, qk_heads:]
    if b.qk_norm is not None:
        qk = F.rms_norm(qk, (config.head_dim,), None, eps) * b.qk_norm
    qk = rotate(qk, cos, sin)
    mixed = attend(qk[:, :, : config.heads], qk[:, :, config.heads :], v, layer)
    add = matmul(mixed, b.o, b.o_bias)

    if b.moe is not None:  # the router reads the normed rows as they are, so there is nothing to fuse
        x += add
        return x, experts.run(F.rms_norm(x, (config.hidden,), b.post_norm, eps), b.moe, matmul, **how)
    x, gate_up = _norm_matmul(x, add, b.post_norm, eps, b.gate_up, b.gate_up_bias, matmul, how)
    return x, _swiglu_matmul(gate_up, b.down, b.down_bias, matmul, how)


def _norm_matmul(
    x: torch.Tensor,
    add: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    w: Weight | None,
    bias: torch.Tensor | None,
    matmul: Matmul,
    how: Mapping[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + add, the normed sum times w), x [B, T, hidden]."""
    rows = x.view(-1, x.shape[-1])
    if isinstance(w, QuantTensor) and quantizes(rows, w, **how):
        if add is None:
            *made, _ = rmsnorm_quantize(rows, norm, eps, impl=how["impl"])
        else:
            *made, rows = rmsnorm_quantize(add.view(-1, x.shape[-1]), norm, eps, rows, impl=how["impl"])
        y = linear_quantized(tuple(made), w, bias, x.dtype, **how)
        return rows.view(x.shape), y.view(*x.shape[:-1], -1)
    if add is not None:
        x += add
    return x, matmul(F.rms_norm(x, norm.shape, norm, eps), w, bias)


def _swiglu_matmul(
    gate_up: torch.Tensor, w: Weight | None, bias: torch.Tensor | None, matmul: Matmul, how: Mapping[str, Any]
) -> torch.Tensor:
    """silu(gate) * up times w, gate_up [B, T, 2 ffn] -> [B, T, hidden]."""
    ffn = gate_up.shape[-1] // 2
    rows = gate_up.view(-1, 2 * ffn)
    if isinstance(w, QuantTensor) and quantizes(rows, w, **how):
        y = linear_quantized(silu_mul_quantize(rows, impl=how["impl"]), w, bias, gate_up.dtype, **how)
        return y.view(*gate_up.shape[:-1], -1)
    return matmul(F.silu(gate_up[..., :ffn]).mul_(gate_up[..., ffn:]), w, bias)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int = 0) -> torch.Tensor:
    """Attention of T tokens to themselves and those before, [B, T, H, D] -> [B, T, H*D]. Padding must be on the right."""
    grouped = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(2)


def prefill_into(cache: Cache) -> Attend:
    """Attention of whole prompts that leaves their keys and values in an empty cache."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        new = k.shape[1]
        cache.keys[layer, :, :, :new] = k.transpose(1, 2)
        cache.values[layer, :, :, :new] = v.transpose(1, 2)
        return causal(q, k, v)

    return attend


def step_into(cache: Cache, device: torch.device) -> Attend:
    """One new token per sequence at its own position. Equal lengths need no mask and no scatter."""
    length, batch = max(cache.lengths), cache.batch
    equal = length == min(cache.lengths)
    if not equal:
        at = torch.tensor(cache.lengths, device=device)
        heads = cache.keys.shape[2]
        slots = (at[:, None] + torch.arange(batch * heads, device=device).view(batch, heads) * cache.room).view(-1)
        mask = (torch.arange(length + 1, device=device) <= at[:, None])[:, None, None]  # [B, 1, 1, S]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        for pages, new in ((cache.keys[layer], k), (cache.values[layer], v)):
            if equal:
                pages[:, :, length] = new[:, 0]
            else:
                pages.view(-1, pages.shape[-1]).index_copy_(0, slots, new.reshape(-1, pages.shape[-1]))
        keys = cache.keys[layer, :, :, : length + 1]  # [B, kv_heads, S, D]
        values = cache.values[layer, :, :, : length + 1]
        # The query heads of one key head stand as its rows: one pass over the cache serves the whole group.
        rows = q.reshape(batch, keys.shape[1], -1, q.shape[-1])
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=None if equal else mask)
        return out.reshape(batch, 1, -1)

    return attend


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder that is ready to run. Build it with `bench.engine.load`.

    `spec` None = 16-bit (or fp32) weights; `head` is "16bit" or "int8-row"; `source` names the checkpoint or shape;
    `seed` is what synthetic weights were drawn with, None = they are real; `cos` and `sin` are rope tables
    [max_len, 1, D]; `mv` sends single rows through torch.mv (`one_row_linear`); `batch_invariant` is what every quantised
    product is asked for.
    """

    config: Config
    weights: Weights
    dtype: torch.dtype
    device: torch.device
    spec: QuantSpec | None
    head: str
    impl: str | None
    source: str
    seed: int | None
    cos: torch.Tensor
    sin: torch.Tensor
    mv: bool = False
    batch_invariant: bool = False

    def with_head_of(self, other: Model) -> Model:
        """The same blocks with the very head of `other`, so that two sides of a comparison hold it once."""
        if (other.config.vocab, other.config.hidden, other.seed) != (self.config.vocab, self.config.hidden, self.seed):
            raise ValueError(f"{other.source} and {self.source} do not have the same head")
        return replace(self, weights=replace(self.weights, head=other.weights.head), head=other.head)

    @torch.inference_mode()
    def with_dtype(self, dtype: torch.dtype) -> Model:
        """The same weights computing in another dtype: quantised ones are shared, the others cast."""
        if dtype == self.dtype:
            return self
        held = weights_module.cast(self.weights, dtype)
        return replace(self, weights=held, dtype=dtype, cos=self.cos.to(dtype), sin=self.sin.to(dtype))

    @property
    def synthetic(self) -> bool:
        return self.seed is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, the embedding and the head included."""
        return self.weights.nbytes

    def step_bytes(self, batch: int) -> int:
        """Bytes of weights that one decode step reads at least: blocks and head, not the embedding table.

        Of a mixture's experts those that `batch` tokens are expected to meet when each takes any with equal chance.
        """
        table = self.weights.embedding
        tied = self.weights.head is table
        found = self.nbytes - (0 if tied else table.numel() * table.element_size())
        if self.config.experts is not None:
            idle = (1 - self.config.experts.per_token / self.config.experts.count) ** batch
            found -= int(idle * sum(b.moe.nbytes for b in self.weights.blocks if b.moe is not None))
        return found

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache that one token of one sequence takes."""
        return 2 * self.config.layers * self.config.kv_size * self.dtype.itemsize

    @property
    def matmul(self) -> Matmul:
        """The product of activations and a weight of this model."""
        plain = one_row_linear if self.mv else linear
        return functools.partial(plain, impl=self.impl, batch_invariant=self.batch_invariant)

    @property
    def kernel(self) -> str:
        """The ops that serve the blocks and the body of each: "quantize_rows.cpu + matmul_w8a8.cpu", or "torch".

        "torch mv" when single rows take torch.mv.
        """
        first = self.weights.blocks[0]
        ops = list(ops_of(first.qkv.spec)) if isinstance(first.qkv, QuantTensor) else []
        if ops and ops[0] is quantize_rows:
            ops = [rmsnorm_quantize, *ops] if first.moe is not None else [rmsnorm_quantize, silu_mul_quantize, *ops]
        if first.moe is not None and first.moe.quantised:
            ops.append(moe_matmul)
        if not ops:
            return "torch" + (" mv" if self.mv else "") + (", dequantised" if self.spec else "")
        return " + ".join(f"{op.name}.{op.body_on(self.device.type, self.impl).name}" for op in ops)

    @property
    def same_fusions(self) -> bool:
        """False when this side fuses what the 16-bit side does in several steps: sums, norms and SiLU with quantisation."""
        return not any(name in self.kernel for name in ("rmsnorm_quantize", "moe_matmul"))

    @property
    def isa(self) -> str | None:
        """Instruction set of the C++ bodies, None when none serves here."""
        return native_isa() if ".cpu" in self.kernel else None

    @property
    def max_len(self) -> int:
        """Longest sequence that the rope tables cover."""
        return self.cos.shape[0]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of this model's figures must know."""
        return self.weights.notes

    @torch.inference_mode()
    def with_head(self, head: str) -> Model:
        """The same blocks with a head "int8-row"; from a 16-bit head only."""
        if head not in HEADS:
            raise ValueError(f"head {head!r} is not known; known: {', '.join(HEADS)}")
        if head == self.head:
            return self
        if head == "16bit":
            raise ValueError("the 16-bit head is gone; load the model with head='16bit' and take with_head('int8-row')")
        held = weights_module.int8_head(self.weights, self.config, self.dtype, self.impl)
        return replace(self, weights=held, head=head)

    @torch.inference_mode()
    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Normed last hidden state [B, T, hidden] of ids int64 [B, T], without a cache."""
        return self._run(ids, 0, causal)

    @torch.inference_mode()
    def head_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits [..., V] of hidden states [..., hidden]."""
        return self.matmul(hidden, self.weights.head).float()

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """fp32 logits [B, T, V] of ids int64 [B, T], right-padded to T; rows past a sequence's length are zero."""
        out = self.head_logits(self.hidden(ids))
        for row, length in zip(out, lengths or (), strict=False):
            row[length:] = 0
        return out

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` sequences of `length` tokens, prompt and answer together."""
        if length > self.max_len:
            raise ValueError(f"length {length} is above this model's {self.max_len}; load it with max_len={length}")
        return Cache.new(self.config, batch, length, self.dtype, self.device)

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, cache: Cache, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """Fills an empty cache with right-padded prompts int64 [B, T]; fp32 logits [B, V] after each prompt's end."""
        batch, width = ids.shape
        lengths = [width] * batch if lengths is None else [int(n) for n in lengths]
        if batch != cache.batch or any(cache.lengths):
            raise ValueError(f"prefill of {batch} prompts needs an empty cache of {batch}; rewind it or make a new one")
        if len(lengths) != batch or not all(1 <= n <= width for n in lengths):
            raise ValueError(f"lengths {lengths} do not fit {batch} prompts of at most {width} tokens, at least 1 each")
        cache.need(width)
        hidden = self._run(ids, 0, prefill_into(cache))
        cache.lengths = list(lengths)
        if min(lengths) == width:  # no index to bring to the device
            return self.head_logits(hidden[:, -1])
        ends = torch.tensor(lengths, device=self.device) - 1
        return self.head_logits(hidden[torch.arange(batch, device=self.device), ends])

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """One token int64 [B] per sequence -> fp32 logits [B, V] for the next; the cache grows by one."""
        cache.need(1)
        hidden = self._run(tokens[:, None], cache.lengths, step_into(cache, self.device))
        cache.lengths = [length + 1 for length in cache.lengths]
        return self.head_logits(hidden[:, 0])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Up to `max_new` new ids per prompt, without the id that ended it. `stop` None = the model's end-of-text ids."""
        stop = self.config.eos if stop is None else tuple(stop)
        if not prompts or not all(len(p) for p in prompts):
            raise ValueError("a prompt has no token; give at least one")
        if (worst := max(max(p) for p in prompts)) >= self.config.vocab:
            raise ValueError(
                f"token {worst} is outside the vocabulary of {self.config.vocab}; is it another tokenizer?"
            )
        lengths = [len(p) for p in prompts]
        padded = [list(p) + [0] * (max(lengths) - len(p)) for p in prompts]
        cache = self.new_cache(len(prompts), max(lengths) + max_new)
        sampler = Sampler(len(prompts), temperature, top_p, seed)
        logits = self.prefill(torch.tensor(padded, device=self.device), cache, lengths)
        answers: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        for index in range(max_new):
            tokens = sampler(logits)
            for b, token in enumerate(tokens.tolist()):
                if b in running and token in stop:
                    running.discard(b)
                elif b in running:
                    answers[b].append(token)
            if not running or index + 1 == max_new:
                break
            logits = self.step(tokens, cache)
        return answers

    def _run(self, ids: torch.Tensor, position: int | list[int], attend: Attend) -> torch.Tensor:
        """All blocks and the last norm over ids [B, T] that start at `position`, one for all or one per sequence."""
        new = ids.shape[1]
        if isinstance(position, list) and min(position) == max(position):
            position = position[0]
        last = (position if isinstance(position, int) else max(position)) + new
        if last > self.max_len:
            raise ValueError(f"{last} tokens are above this model's {self.max_len}; load it with max_len={last}")
        if isinstance(position, int):
            cos, sin = self.cos[position : position + new], self.sin[position : position + new]  # [T, 1, D]
        else:
            at = torch.tensor(position, device=self.device)
            cos, sin = self.cos[at, None], self.sin[at, None]  # [B, 1, 1, D]
        x = F.embedding(ids.to(self.device), self.weights.embedding)
        add = None
        for layer, weights in enumerate(self.weights.blocks):
            how: dict[str, Any] = {"impl": self.impl, "batch_invariant": self.batch_invariant}
            x, add = block(x, add, weights, self.config, layer, cos, sin, attend, self.matmul, **how)
        x = x if add is None else x.add_(add)
        return F.rms_norm(x, (self.config.hidden,), self.weights.norm, self.config.norm_eps)
