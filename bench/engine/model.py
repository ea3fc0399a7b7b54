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

from ...formats.kvcache import BF16
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
from . import attend as attention
from . import experts, invariant
from . import kv as caches
from . import weights as weights_module
from .attend import Attend, causal
from .cache import Cache
from .config import Config
from .sampling import Sampler
from .weights import Block, Weight, Weights

HEADS = ("16bit", "int8-row")
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
            norm = invariant.rms_norm if batch_invariant else F.rms_norm
            normed = norm(x, (config.hidden,), b.post_norm, eps)
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
    plain = invariant.rms_norm if how["batch_invariant"] else F.rms_norm
    return x, matmul(_noted(tape, plain, x, norm.shape, norm, eps), w, bias, tape=tape)


def _swiglu_matmul(
    gate_up: torch.Tensor, w: Weight | None, bias: torch.Tensor | None, matmul: Matmul, how: Mapping[str, Any]
) -> torch.Tensor:
    """silu(gate) * up times w, gate_up [B, T, 2 ffn] -> [B, T, hidden]."""
    ffn, tape = gate_up.shape[-1] // 2, how["tape"]
    rows = gate_up.view(-1, 2 * ffn)
    if isinstance(w, QuantTensor) and quantizes(rows, w, impl=how["impl"], batch_invariant=how["batch_invariant"]):
        made = silu_mul_quantize(rows, impl=how["impl"], tape=tape)
        return linear_quantized(made, w, bias, gate_up.dtype, **how).view(*gate_up.shape[:-1], -1)
    plain = invariant.silu_mul if how["batch_invariant"] else lambda x: F.silu(x[..., :ffn]).mul_(x[..., ffn:])
    return matmul(_noted(tape, plain, gate_up), w, bias, tape=tape)


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder that is ready to run. Build it with `bench.engine.load`.

    `spec` None = 16-bit (or fp32) weights; `head` is "16bit" or "int8-row"; `source` names the checkpoint or shape;
    `seed` is what synthetic weights were drawn with, None = they are real; `cos_sin` is the table of rotations, fp32
    [max_len, D]; `kv` is how caches hold keys and values, layer by layer; `mv` sends single rows through torch.mv (`one_row_linear`). `batch_invariant`: what a sequence gets depends on it alone, to the
    bit (invariant.py, and what every op is asked for).
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
    kv: caches.Layers = caches.PLAIN

    def with_kv(self, asked: caches.Asked) -> Model:
        """The same weights over another cache; `asked` as in `load`."""
        return replace(self, kv=caches.of(asked, self.config, self.source))

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
        config = self.config
        specs = self.kv.specs or (BF16,) * config.layers
        return sum(spec.bytes_per_token(config.head_dim, config.kv_heads, self.dtype) for spec in specs)

    @property
    def matmul(self) -> Matmul:
        """The product of activations and a weight of this model."""
        plain = one_row_linear if self.mv else linear
        plain = invariant.product if self.batch_invariant else plain
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
        return (*self.weights.notes, *self.kv.notes)

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
        """Normed last hidden state [B, T, hidden] of ids int64 [B, T].

        Over a quantised cache every token reads keys and values back from it, its own included, as steps do.
        """
        if not (self.kv.quantised or self.batch_invariant):
            return self._run(ids, self._whole(ids))
        cache = self.new_cache(*ids.shape)
        return self._packed(ids.flatten(), cache, [ids.shape[1]] * ids.shape[0], True).view(*ids.shape, -1)

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
        specs = self.kv.specs
        return Cache.new(self.config, batch, length, self.dtype, self.device, specs=specs, mu=self.kv.mu)

    @torch.inference_mode()
    def prefill(
        self, ids: torch.Tensor, cache: Cache, lengths: Sequence[int] | None = None, *, read_back: bool = False
    ) -> torch.Tensor:
        """Right-padded prompts int64 [B, T] join the cache, after what it holds; fp32 logits [B, V] after each one's end.

        Fresh tokens see each other in 16 bits and what the cache held as it is there. With `read_back` they see each other
        from the cache as well, so that a part of a prompt that was there before makes no difference.
        """
        batch, width = ids.shape
        lengths = [width] * batch if lengths is None else [int(n) for n in lengths]
        if batch != cache.batch:
            raise ValueError(f"prefill of {batch} prompts needs a cache of {batch}, this one is for {cache.batch}")
        if len(lengths) != batch or not all(1 <= n <= width for n in lengths):
            raise ValueError(f"lengths {lengths} do not fit {batch} prompts of at most {width} tokens, at least 1 each")
        cache.need(*lengths)
        if read_back or self.batch_invariant or any(cache.lengths):
            packed = torch.cat([row[:n] for row, n in zip(ids, lengths, strict=True)])
            return self.prefill_packed(packed, cache, lengths, read_back=read_back)
        hidden = self._run(ids, self._whole(ids, cache, lengths))
        cache.lengths = list(lengths)
        if min(lengths) == width:  # no index to bring to the device
            return self.head_logits(hidden[:, -1].contiguous())  # torch takes rows with gaps 100 times slower in bf16
        ends = torch.tensor(lengths, device=self.device) - 1
        return self.head_logits(hidden[torch.arange(batch, device=self.device), ends])

    @torch.inference_mode()
    def prefill_packed(
        self, ids: torch.Tensor, cache: Cache, counts: Sequence[int], *, read_back: bool = False
    ) -> torch.Tensor:
        """`prefill` of prompts that lie one behind another in ids int64 [N]: no work goes into padding. `counts` tokens each.

        With `batch_invariant` they are always read back: our attention promises bits, torch's does not.
        """
        cache.need(*counts)
        hidden = self._packed(ids, cache, counts, read_back or self.batch_invariant)[0]
        cache.lengths = [n + m for n, m in zip(cache.lengths, counts, strict=True)]
        return self.head_logits(hidden[torch.tensor(counts, device=self.device).cumsum(0) - 1])

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
            logits = self.bare_step(tokens.to(self.device), cache)
        elif self in cache.steps:
            tape, mine, logits = cache.steps[self]
            mine.copy_(tokens)
            tape.again()
        else:
            tape, mine = Tape(), tokens.clone()
            logits = self.bare_step(mine, cache, tape)
            cache.steps[self] = tape, mine, logits
        cache.grow()
        return logits.to(torch.float32, copy=True)  # the next step writes over its own

    @torch.inference_mode()
    def bare_step(self, tokens: torch.Tensor, cache: Cache, tape: Tape | None = None) -> torch.Tensor:
        """Logits [B, V] in the model's type of a step whose place `cache.point` has said: what a graph on a card captures."""
        how: dict[str, Any] = {"impl": self.impl, "tape": tape, "deterministic": self.batch_invariant}
        attend = attention.one(self.config, self.cos_sin, cache, **how)
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
        keep_stop: bool = False,  # whether the id that ended an answer is its last
    ) -> list[list[int]]:
        """Up to `max_new` new ids per prompt. `stop` None = the model's end-of-text ids."""
        stop = self.config.eos if stop is None else tuple(stop)
        if not prompts or not all(len(p) for p in prompts):
            raise ValueError("a prompt has no token; give at least one")
        if (worst := max(max(p) for p in prompts)) >= self.config.vocab:
            raise ValueError(f"token {worst} is outside the vocabulary of {self.config.vocab}; another tokenizer?")
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
                if b in running and (keep_stop or token not in stop):
                    answers[b].append(token)
                if token in stop:
                    running.discard(b)
            if not running or index + 1 == max_new:
                break
            logits = self.step(tokens, cache)
        return answers

    def _within(self, length: int) -> None:
        if length > self.max_len:
            raise ValueError(f"{length} tokens are above this model's {self.max_len}; load it with max_len={length}")

    def _whole(self, ids: torch.Tensor, cache: Cache | None = None, counts: Sequence[int] = ()) -> Attend:
        width = ids.shape[1]
        self._within(width)
        slots = None if cache is None else cache.prompt_slots(width, counts)
        return causal(self.config, self.cos_sin[:width], self.dtype, cache, slots=slots, impl=self.impl)

    def _packed(self, ids: torch.Tensor, cache: Cache, counts: Sequence[int], read_back: bool) -> torch.Tensor:
        """Hidden states [1, N, hidden] of a packed chunk int64 [N], which joins the cache."""
        chunk = cache.chunk(counts)
        self._within(max(n + m for n, m in zip(chunk.before, counts, strict=True)))
        if read_back:
            # a body that leaves prompts to torch's attention serves when it is named
            named = "triton" if self.batch_invariant and self.device.type == "cuda" else None
            attend = attention.read_back(self.config, self.cos_sin, chunk, self.impl or named)
        else:
            attend = attention.after(self.config, self.cos_sin, self.dtype, chunk, self.impl)
        return self._run(ids[None], attend)

    def _run(self, ids: torch.Tensor, attend: Attend, tape: Tape | None = None) -> torch.Tensor:
        """All blocks and the last norm over ids [B, T]: [B, T, hidden]."""
        how: dict[str, Any] = {"impl": self.impl, "batch_invariant": self.batch_invariant, "tape": tape}
        x, add = _noted(tape, F.embedding, ids.to(self.device), self.weights.embedding), None
        for layer, weights in enumerate(self.weights.blocks):
            x, add = block(x, add, weights, self.config, layer, attend, self.matmul, **how)
        if add is not None:
            _add(tape, x, add)
        norm = invariant.rms_norm if self.batch_invariant else F.rms_norm
        return _noted(tape, norm, x, (self.config.hidden,), self.weights.norm, self.config.norm_eps)
