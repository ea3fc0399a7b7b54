"""What `bench attention` times: problems, caches that hold the same rows in every spec, and what else attends over them.

The rival of a decode is torch's scaled_dot_product_attention with the query heads of a key head as rows of one product: with
enable_gqa it expands keys and values on a CPU and takes four to ten times as long. On a CPU in bf16 and in fp32, the faster one
counts; on a card through flash, cuDNN and memory-efficient kernels, and FlashAttention and FlashInfer where they are installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..formats import kvcache
from ..formats.huge import zeros
from ..formats.kvcache import KVPages, KVSpec
from . import card, clock

DTYPE = torch.bfloat16  # of queries, outputs and unquantised pages
_EPS = 1e-6
_UNIT = 4096  # tokens that are drawn; longer caches repeat them
_MOST_COPIES, _MOST_BYTES = 256, 2 << 30
Calls = list[Callable[[], Any]]


@dataclass(frozen=True)
class Problem:
    """`batch` sequences of `context` cached tokens, `tokens` of them fresh; query heads, key heads, numbers of a head."""

    op: str
    kv: str
    heads: int
    kv_heads: int
    size: int
    context: int
    batch: int
    tokens: int = 1

    @property
    def name(self) -> str:
        """`attention_decode.32-8-128.s8192.b1.n1.int8`."""
        sizes = f"{self.heads}-{self.kv_heads}-{self.size}.s{self.context}.b{self.batch}.n{self.tokens}"
        return f"{self.op}.{sizes}.{self.kv}"

    @property
    def spec(self) -> KVSpec:
        return KVSpec.parse(self.kv)

    def sections(self) -> dict[str, Any]:
        """What a row says of itself before it is measured."""
        group = self.heads // self.kv_heads
        shape = {"G": group, "H": self.kv_heads, "D": self.size, "T": self.tokens, "S": self.context}
        scheme = {"spec": self.kv, "kv_spec": self.kv, "kv_bits": (self.spec.k_bits + self.spec.v_bits) / 2}
        return {
            "level": "op",
            "case": self.name,
            "shape": shape | {"batch": self.batch, "P": kvcache.PAGE},
            "scheme": scheme,
        }


class Rows:
    """Keys and values that were drawn: [2, units, P, Hkv, D]; page j of sequence b holds unit (j + 7 b) % units."""

    def __init__(self, p: Problem, where: torch.device, seed: int):
        random = torch.Generator(where).manual_seed(seed)
        units = kvcache.pages_of(min(p.context, _UNIT))
        drawn = torch.randn(2, units, kvcache.PAGE, p.kv_heads, p.size, generator=random, device=where)
        drawn[0] *= 1 + 3 * (
            torch.rand(p.kv_heads, p.size, generator=random, device=where) < 0.03
        )  # channels that stand out
        self.p, self.drawn, self.random = p, drawn.to(DTYPE), random
        per = kvcache.pages_of(p.context)
        pages, sequences = torch.arange(per, device=where), torch.arange(p.batch, device=where)
        self.unit_of = (pages[None] + 7 * sequences[:, None]) % units  # [B, pages]
        self.q = torch.randn(p.batch * p.tokens, p.heads, p.size, generator=random, device=where).to(DTYPE)

    def dense(self, dtype: torch.dtype, heads_first: bool = True) -> tuple[torch.Tensor, ...]:
        """Keys and values [B, Hkv, S, D] (or [B, S, Hkv, D]) as they were drawn."""
        found = []
        for part in self.drawn:
            rows = part[self.unit_of].flatten(1, 2)[:, : self.p.context].to(dtype)
            found.append(rows.transpose(1, 2).contiguous() if heads_first else rows.contiguous())
        return tuple(found)

    def pool(self) -> tuple[KVPages, torch.Tensor]:
        """Pages in random order that hold them in the problem's spec, and the table int32 [B, pages]."""
        p, where = self.p, self.drawn.device
        count = self.unit_of.numel()
        table = torch.randperm(count, generator=self.random, device=where).view(self.unit_of.shape)
        pages = kvcache.new_pages(count, p.kv_heads, p.size, dtype=DTYPE, device=where, spec=p.spec)
        for rows, words, part, bits in zip(
            (pages.k, pages.v), pages.words, self.drawn, (p.spec.k_bits, p.spec.v_bits), strict=True
        ):
            part = part.transpose(1, 2)  # [units, Hkv, P, D]
            if words is None:
                rows[table] = part[self.unit_of]
                continue
            data, scale, offset = kvcache.quantize(part, bits, p.spec.symmetric)
            found = scale[..., None] if offset is None else torch.stack((scale, offset), -1)
            rows[table] = data[self.unit_of]
            words[..., : found.shape[-1]][table] = found[self.unit_of]
        return pages, table.to(torch.int32)

    def fresh(self) -> tuple[torch.Tensor, ...]:
        """Keys and values of the last tokens of each sequence, [T, Hkv, D]."""
        sequence, at = self.fresh_at()
        unit, row = self.unit_of[sequence, at // kvcache.PAGE], at % kvcache.PAGE
        return tuple(part[unit, row].contiguous() for part in self.drawn)

    def fresh_at(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequence and position of each fresh token, int64 [T]."""
        p, where = self.p, self.drawn.device
        at = torch.arange(p.context - p.tokens, p.context, device=where).repeat(p.batch)
        return torch.arange(p.batch, device=where).repeat_interleave(p.tokens), at

    def cos_sin(self) -> torch.Tensor:
        """Cosines, then sines, fp32 [S, D]."""
        place = torch.arange(self.p.context, device=self.drawn.device)[:, None]
        turn = 10000.0 ** -(torch.arange(0, self.p.size, 2, device=self.drawn.device) / self.p.size)
        return torch.cat(((place * turn).cos(), (place * turn).sin()), 1)

    @property
    def weight(self) -> torch.Tensor:
        return torch.ones(self.p.size, dtype=DTYPE, device=self.drawn.device)

    def lengths(self) -> torch.Tensor:
        return torch.full((self.p.batch,), self.p.context, dtype=torch.int32, device=self.drawn.device)


def arguments(rows: Rows, pages: KVPages, table: torch.Tensor) -> tuple[Any, ...]:
    """The op's public arguments over one pool."""
    p, where = rows.p, table.device
    if p.op == "attention_decode":
        return rows.q, pages, table, rows.lengths(), p.context, p.tokens
    starts = torch.arange(p.batch + 1, dtype=torch.int32, device=where)
    if p.op == "gather_dequantize":
        return pages, table, rows.lengths(), starts * p.context, p.batch * p.context, DTYPE, True, True, p.size
    if p.op == "attention_prefill":
        return rows.q, pages, table, rows.lengths(), starts * p.tokens, p.tokens, p.context
    k, v = rows.fresh()
    sequence, at = rows.fresh_at()
    slots = table[sequence, at // kvcache.PAGE].long() * kvcache.PAGE + at % kvcache.PAGE
    return k, v, pages, slots, rows.q, at, rows.cos_sin(), rows.weight, rows.weight, _EPS


def rivals(rows: Rows) -> tuple[dict[str, Callable[[], Calls]], list[dict[str, str]]]:
    """What else does it: by name what makes its calls, one per copy of a cache; and who is not here, with the reason."""
    p = rows.p
    if p.op == "kv_append":
        return {"torch bfloat16": lambda: [_torch_append(rows)]}, []
    if p.op == "gather_dequantize":
        return {"torch page by page": lambda: [_torch_gather(rows)]}, []
    if rows.q.is_cuda:
        return _card_rivals(rows)
    types = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    return {f"torch {name}": functools.partial(_sdpa, rows, dtype) for name, dtype in types.items()}, []


def copies_of(nbytes: int, where: torch.device) -> int:
    """Caches of `nbytes` that keep the last cache cold; fewer where memory does not allow it."""
    wanted = min(_MOST_COPIES, clock.copies_for_cold_cache(nbytes, card.last_level_cache(where)))
    room = card.free_bytes(where) // 4 if where.type == "cuda" else min(_MOST_BYTES, card.free_bytes(where) // 6)
    return max(1, min(wanted, room // max(1, nbytes)))


def _folded(rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Queries [B, Hkv, G n, D], the heads of a key head as rows, and the mask of several tokens [G n, S] (True: seen)."""
    p = rows.p
    group = p.heads // p.kv_heads
    q = rows.q.view(p.batch, p.tokens, p.kv_heads, group, p.size).permute(0, 2, 3, 1, 4).flatten(2, 3).contiguous()
    if p.tokens == 1:
        return q, None
    at = torch.arange(p.context, device=q.device)
    seen = at[None] <= (p.context - p.tokens + torch.arange(p.tokens, device=q.device))[:, None]
    return q, seen.repeat(group, 1)


def _held(x: torch.Tensor) -> torch.Tensor:
    """A copy in memory of the kind that pages have (huge.py)."""
    return zeros(tuple(x.shape), x.dtype, x.device).copy_(x)


def _sdpa(rows: Rows, dtype: torch.dtype, backend: Any = None) -> Calls:
    q, mask = _folded(rows)
    q = q.to(dtype)
    k, v = rows.dense(dtype)
    copies = [(_held(k), _held(v)) for _ in range(copies_of(2 * k.nbytes, k.device))]

    def call(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with contextlib.nullcontext() if backend is None else torch.nn.attention.sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return [functools.partial(call, *pair) for pair in copies]


def _card_rivals(rows: Rows) -> tuple[dict[str, Callable[[], Calls]], list[dict[str, str]]]:
    """torch's kernels by backend, and what is installed beside it."""
    kinds = torch.nn.attention.SDPBackend
    backends = {"flash": kinds.FLASH_ATTENTION, "cudnn": kinds.CUDNN_ATTENTION, "efficient": kinds.EFFICIENT_ATTENTION}
    found: dict[str, Callable[[], Calls]] = {
        f"torch {name}": functools.partial(_sdpa, rows, DTYPE, kind) for name, kind in backends.items()
    }
    absent = []
    for name, module, make in (("FlashAttention", "flash_attn", _flash), ("FlashInfer", "flashinfer", _flashinfer)):
        if importlib.util.find_spec(module) is None:
            absent.append({"impl": name, "status": "absent", "reason": f"{module} is not installed"})
        else:
            found[name] = functools.partial(make, rows)
    return found, absent


def _flash(rows: Rows) -> Calls:
    """flash_attn_with_kvcache over a dense cache [B, S, Hkv, D]; bottom-right causal."""
    attend = importlib.import_module("flash_attn").flash_attn_with_kvcache
    p = rows.p
    q, (k, v) = rows.q.view(p.batch, p.tokens, p.heads, p.size), rows.dense(DTYPE, heads_first=False)
    count = copies_of(2 * k.nbytes, k.device)
    copies = [(k, v)] + [(k.clone(), v.clone()) for _ in range(count - 1)]
    return [functools.partial(attend, q, *pair, cache_seqlens=rows.lengths(), causal=True) for pair in copies]


def _flashinfer(rows: Rows) -> Calls:
    """BatchDecode (one token) or BatchPrefill over pages of 16 bits, planned outside of the time."""
    flashinfer, p, where = importlib.import_module("flashinfer"), rows.p, rows.q.device
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=where)
    per = kvcache.pages_of(p.context)
    starts = torch.arange(p.batch + 1, dtype=torch.int32, device=where)
    last = torch.full((p.batch,), p.context - (per - 1) * kvcache.PAGE, dtype=torch.int32, device=where)
    kind = (p.heads, p.kv_heads, p.size, kvcache.PAGE)
    unquantised = Rows(replace(p, kv="bf16"), where, 0)
    calls: Calls = []
    for _ in range(copies_of(p.batch * p.context * p.kv_heads * p.size * 4, where)):
        pages, table = unquantised.pool()
        if p.tokens == 1:
            decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
            decode.plan(starts * per, table.flatten(), last, *kind, q_data_type=DTYPE, kv_data_type=DTYPE)
            calls.append(functools.partial(decode.run, rows.q, (pages.k, pages.v)))
        else:
            prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            prefill.plan(starts * p.tokens, starts * per, table.flatten(), last, *kind, causal=True, q_data_type=DTYPE)
            calls.append(functools.partial(prefill.run, rows.q, (pages.k, pages.v)))
    return calls


def _torch_append(rows: Rows) -> Callable[[], Any]:
    """Norm, rotation and two copies into unquantised pages, as separate calls of torch."""
    (k, v), q, (sequence, at) = rows.fresh(), rows.q, rows.fresh_at()
    pages, table = Rows(replace(rows.p, kv="bf16"), q.device, 0).pool()
    cos, sin = (part[:, None].repeat(1, 1, 2).to(DTYPE) for part in rows.cos_sin()[at].chunk(2, -1))
    page, row = table[sequence, at // kvcache.PAGE].long(), at % kvcache.PAGE

    def prepared(x: torch.Tensor) -> torch.Tensor:
        x = F.rms_norm(x, (x.shape[-1],), rows.weight, _EPS)
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    def call() -> torch.Tensor:
        pages.k[page, :, row] = prepared(k)
        pages.v[page, :, row] = v
        return prepared(q)

    return call


def _torch_gather(rows: Rows) -> Callable[[], Any]:
    """Pages picked by the table, unpacked as formats/kvcache.py writes it, cast and laid out."""
    pages, table = rows.pool()
    p, chosen = rows.p, table.long()

    def call() -> tuple[torch.Tensor, ...]:
        found = []
        for part, words, bits in zip((pages.k, pages.v), pages.words, (p.spec.k_bits, p.spec.v_bits), strict=True):
            x = part[chosen]  # [B, pages, Hkv, P, row]
            if words is not None:
                x = kvcache.dequantize(x, words[chosen], bits, p.size, p.spec.symmetric)
            found.append(x.to(DTYPE).transpose(2, 3).flatten(1, 2)[:, : p.context].flatten(0, 1))
        return tuple(found)

    return call
