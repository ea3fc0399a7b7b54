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
from ...kernels.attention_decode import attention_decode
from ...kernels.kv_append import kv_append
from ...kernels.linear import linear, linear_quantized, ops_of, quantizes
from ...kernels.moe_matmul import moe_matmul
from ...kernels.op import Tape, native_isa
from ...kernels.quantize_rows import quantize_rows
from ...kernels.rmsnorm_quantize import rmsnorm_quantize
from ...kernels.silu_mul_quantize import silu_mul_quantize
from . import experts
from . import weights as weights_module
from .cache import Cache
from .config import Config
from .rope import rotate, spread
from .sampling import Sampler
from .weights import Block, Weight, Weights

HEADS = ("16bit", "int8-row")
# (what the qkv product gave [B, T, (H + 2 kv_heads) D], the block, its number) -> [B, T, H D]
Attend = Callable[[torch.Tensor, Block, int], torch.Tensor]
# (q [B, H, T, D], k and v [B, kv_heads, T, D] as they go into a cache, the block's number) -> [B, H, T, D]
Mix = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]

# (x [..., K], weight [N, K], bias [N] or None) -> [..., N]
Matmul = Callable[..., torch.Tensor]


def one_row_linear(
    x: torch.Tensor,
    w: Weight,
    bias: torch.Tensor | None = None,
    *,
    impl: str | None = None,
    batch_invariant: bool = False,
    tape: Tape | None = None,
) -> torch.Tensor:
    """`linear`, but a single row times a 16-bit or fp32 weight is torch.mv.

    On some CPUs torch's bf16 matmul is up to twice as slow as its matrix-vector product. The probe of `bench model`
    finds out, so that the 16-bit side of a decode gets whichever is faster there.
    """
    if isinstance(w, QuantTensor) or x.numel() != x.shape[-1]:
        return linear(x, w, bias, impl=impl, batch_invariant=batch_invariant, tape=tape)
    row = x.view(-1)
    y = _noted(tape, (lambda row: torch.mv(w, row)) if bias is None else (lambda row: torch.mv(w, row).add_(bias)), row)
    return y.view(*x.shape[:-1], w.shape[0])


def _noted(tape: Tape | None, function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """function(*args), on the tape when there is one."""
    return function(*args) if tape is None else tape.keep(function, *args)


def _add(tape: Tape | None, x: torch.Tensor, more: torch.Tensor) -> None:
    """x += more, on the tape when there is one."""
    if tape is None:
        x += more
    else:
        tape.note(functools.partial(x.add_, more))


def block(
    x: torch.Tensor,
    add: torch.Tensor | None,
    b: Block,
    config: Config,
    layer: int,
    attend: Attend,
    matmul: Matmul = linear,
    impl: str | None = None,
    batch_invariant: bool = False,
    tape: Tape | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One decoder block: x + add [B, T, hidden] (`add` None: x) to the same kind of pair. x may change in place.

    The sum is left to the norm that comes next: where a weight takes int8 rows, norm, sum and quantisation are one op.
    """
    how: dict[str, Any] = {"impl": impl, "batch_invariant": batch_invariant, "tape": tape}
    eps = config.norm_eps
    x, qkv = _norm_matmul(x, add, b.input_norm, eps, b.qkv, b.qkv_bias, matmul, how)
    add = matmul(attend(qkv, b, layer), b.o, b.o_bias, tape=tape)

    if b.moe is not None:  # the router reads the normed rows as they are, so there is nothing to fuse
        _add(tape, x, add)
        moe = b.moe

        def mlp(x: torch.Tensor) -> torch.Tensor:
            normed = F.rms_norm(x, (config.hidden,), b.post_norm, eps)
            return experts.run(normed, moe, matmul, impl, batch_invariant)

        return x, _noted(tape, mlp, x)
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
    rows, tape = x.view(-1, x.shape[-1]), how["tape"]
    if isinstance(w, QuantTensor) and quantizes(rows, w, impl=how["impl"], batch_invariant=how["batch_invariant"]):
        if add is None:
            *made, _ = rmsnorm_quantize(rows, norm, eps, impl=how["impl"], tape=tape)
        else:
            *made, rows = rmsnorm_quantize(add.view(-1, x.shape[-1]), norm, eps, rows, impl=how["impl"], tape=tape)
        y = linear_quantized(tuple(made), w, bias, x.dtype, **how)
        return rows.view(x.shape), y.view(*x.shape[:-1], -1)
    if add is not None:
        _add(tape, x, add)
    return x, matmul(_noted(tape, F.rms_norm, x, norm.shape, norm, eps), w, bias, tape=tape)


def _swiglu_matmul(
    gate_up: torch.Tensor, w: Weight | None, bias: torch.Tensor | None, matmul: Matmul, how: Mapping[str, Any]
) -> torch.Tensor:
    """silu(gate) * up times w, gate_up [B, T, 2 ffn] -> [B, T, hidden]."""
    ffn, tape = gate_up.shape[-1] // 2, how["tape"]
    rows = gate_up.view(-1, 2 * ffn)
    if isinstance(w, QuantTensor) and quantizes(rows, w, impl=how["impl"], batch_invariant=how["batch_invariant"]):
        made = silu_mul_quantize(rows, impl=how["impl"], tape=tape)
        return linear_quantized(made, w, bias, gate_up.dtype, **how).view(*gate_up.shape[:-1], -1)
    mixed = _noted(tape, lambda x: F.silu(x[..., :ffn]).mul_(x[..., ffn:]), gate_up)
    return matmul(mixed, w, bias, tape=tape)


def causal(
    config: Config, cos_sin: torch.Tensor, dtype: torch.dtype, cache: Cache | None = None, mix: Mix | None = None
) -> Attend:
    """Attention of T tokens to themselves and those before, from position 0 on; padding must be on the right.

    By torch's own steps, as long rows have them. `cache`, an empty one, is left with the keys and values. `mix` attends
    in torch's place: a measurement that looks at keys and values, or changes them.
    """
    cos, sin = spread(cos_sin, dtype)  # [T, 1, D]
    slots = None if cache is None else cache.prompt_slots(cos_sin.shape[0])

    def attend(qkv: torch.Tensor, b: Block, layer: int) -> torch.Tensor:
        heads, qk_heads = config.heads, config.heads + config.kv_heads
        rows = qkv.view(*qkv.shape[:2], qk_heads + config.kv_heads, config.head_dim)
        qk, v = rows[:, :, :qk_heads], rows[:, :, qk_heads:]
        if b.qk_norm is not None:
            qk = F.rms_norm(qk, (config.head_dim,), None, config.norm_eps) * b.qk_norm
        qk = rotate(qk, cos, sin)
        q, k = qk[:, :, :heads], qk[:, :, heads:]
        if cache is not None and slots is not None:
            kv_append(k.flatten(0, 1), v.flatten(0, 1), cache.pages[layer], slots)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if mix is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != config.kv_heads)
        else:
            out = mix(q, k, v, layer)
        return out.transpose(1, 2).flatten(2)

    return attend


def over_pages(config: Config, cos_sin: torch.Tensor, cache: Cache, **how: Any) -> Attend:
    """Attention of one new token per sequence, which joins the cache where `cache.point` says; `how` goes to the ops."""
    parts = (config.heads, config.kv_heads, config.kv_heads)

    def attend(qkv: torch.Tensor, b: Block, layer: int) -> torch.Tensor:
        q, k, v = qkv.view(cache.batch, sum(parts), config.head_dim).split(parts, 1)
        norms = {} if b.qk_norm is None else {"q_weight": b.qk_norm[0], "k_weight": b.qk_norm[config.heads]}
        turn: dict[str, Any] = {"positions": cache.positions, "cos_sin": cos_sin, "eps": config.norm_eps, **norms}
        pages = cache.pages[layer]
        q = kv_append(k, v, pages, cache.slots, q=q, **turn, **how)
        out, _ = attention_decode(q, pages, cache.table, cache.ends, max_kv_len=cache.room, **how)
        return out.view(*qkv.shape[:2], -1)

    return attend


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder that is ready to run. Build it with `bench.engine.load`.

    `spec` None = 16-bit (or fp32) weights; `head` is "16bit" or "int8-row"; `source` names the checkpoint or shape;
    `seed` is what synthetic weights were drawn with, None = they are real; `cos_sin` is the table of rotations, fp32
    [max_len, D]; `mv` sends single rows through torch.mv (`one_row_linear`); `batch_invariant` is what every quantised
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
    cos_sin: torch.Tensor
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
        return replace(self, weights=weights_module.cast(self.weights, dtype), dtype=dtype)

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

    def attention(self, phase: str) -> str:
        """What attends in a phase: our ops over pages in a decode, torch's over whole prompts."""
        if phase != "decode":
            return "torch scaled_dot_product_attention"
        ops = (kv_append, attention_decode)
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
        """Longest sequence that the table of rotations covers."""
        return self.cos_sin.shape[0]

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
        return self._run(ids, self._causal(ids))

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
        hidden = self._run(ids, self._causal(ids, cache))
        cache.lengths = list(lengths)
        if min(lengths) == width:  # no index to bring to the device
            return self.head_logits(hidden[:, -1])
        ends = torch.tensor(lengths, device=self.device) - 1
        return self.head_logits(hidden[torch.arange(batch, device=self.device), ends])

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """One token int64 [B] per sequence -> fp32 logits [B, V] for the next; the cache grows by one.

        On a CPU the first step over a cache is noted, and the next ones repeat its calls: a step is some 300 of them, and
        checking and allocating for each takes as long as a fifth of its work. A card has CUDA graphs for that.
        """
        cache.need(1)
        self._within(max(cache.lengths) + 1)
        cache.point()
        if self.device.type != "cpu":
            logits = self._step(tokens.to(self.device), cache, None)
        elif self in cache.steps:
            tape, mine, logits = cache.steps[self]
            mine.copy_(tokens)
            tape.again()
        else:
            tape, mine = Tape(), tokens.clone()
            logits = self._step(mine, cache, tape)
            cache.steps[self] = tape, mine, logits
        cache.lengths = [length + 1 for length in cache.lengths]
        return logits.to(torch.float32, copy=True)  # the next step writes over its own

    def _step(self, tokens: torch.Tensor, cache: Cache, tape: Tape | None) -> torch.Tensor:
        """Logits [B, V] in the model's type."""
        how: dict[str, Any] = {"impl": self.impl, "tape": tape}
        attend = over_pages(self.config, self.cos_sin, cache, **how)
        return self.matmul(self._run(tokens[:, None], attend, tape)[:, 0], self.weights.head, tape=tape)

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

    def _within(self, length: int) -> None:
        if length > self.max_len:
            raise ValueError(f"{length} tokens are above this model's {self.max_len}; load it with max_len={length}")

    def _causal(self, ids: torch.Tensor, cache: Cache | None = None) -> Attend:
        self._within(ids.shape[1])
        return causal(self.config, self.cos_sin[: ids.shape[1]], self.dtype, cache)

    def _run(self, ids: torch.Tensor, attend: Attend, tape: Tape | None = None) -> torch.Tensor:
        """All blocks and the last norm over ids [B, T]: [B, T, hidden]."""
        how: dict[str, Any] = {"impl": self.impl, "batch_invariant": self.batch_invariant, "tape": tape}
        x, add = _noted(tape, F.embedding, ids.to(self.device), self.weights.embedding), None
        for layer, weights in enumerate(self.weights.blocks):
            x, add = block(x, add, weights, self.config, layer, attend, self.matmul, **how)
        if add is not None:
            _add(tape, x, add)
        return _noted(tape, F.rms_norm, x, (self.config.hidden,), self.weights.norm, self.config.norm_eps)
