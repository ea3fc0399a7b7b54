"""Attention of the engine: over whole prompts, after a prefix, and over pages.

    causal     a prompt attends to itself in 16 bits by torch, and joins an empty cache
    after      a chunk attends to itself in 16 bits and to what the cache holds, dequantised
    read_back  a chunk joins the cache, and every token reads all keys and values from there, as `one` does
    one        a step: one token of each sequence

`after` and `causal` are the fast ways to fill a cache. With `read_back` a token sees the same keys whether they were just
computed, found as a prefix, or come from steps; what measures the quality of a cache goes that way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...formats.kvcache import KVPages
from ...kernels.attention import rounded_q
from ...kernels.attention_decode import attention_decode
from ...kernels.attention_prefill import attention_prefill
from ...kernels.gather_dequantize import gather_dequantize
from ...kernels.kv_append import kv_append
from ...kernels.op import Unsupported
from .cache import Cache, Chunk
from .config import Config
from .rope import rotate, spread
from .weights import Block

# (what the qkv product gave [B, T, (H + 2 kv_heads) D], the block, its number) -> [B, T, H D]
Attend = Callable[[torch.Tensor, Block, int], torch.Tensor]
# (q [B, H, T, D], k and v [B, kv_heads, T, D] as they go into a cache, the block's number) -> [B, H, T, D]
Mix = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
_ROWS = 1024  # queries of a sequence that meet their keys at one time in torch


def _turned(
    qkv: torch.Tensor, b: Block, config: Config, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys (normed and turned) and values [B, T, heads, D], by torch's own steps, as long rows have them."""
    heads, qk_heads = config.heads, config.heads + config.kv_heads
    rows = qkv.view(*qkv.shape[:2], qk_heads + config.kv_heads, config.head_dim)
    qk, v = rows[:, :, :qk_heads], rows[:, :, qk_heads:]
    if b.qk_norm is not None:
        qk = F.rms_norm(qk, (config.head_dim,), None, config.norm_eps) * b.qk_norm
    qk = rotate(qk, cos, sin)
    return qk[:, :, :heads], qk[:, :, heads:], v


def causal(
    config: Config,
    cos_sin: torch.Tensor,
    dtype: torch.dtype,
    cache: Cache | None = None,
    mix: Mix | None = None,
    slots: torch.Tensor | None = None,
    impl: str | None = None,
) -> Attend:
    """T tokens attend to themselves and those before, from position 0 on; padding must be on the right.

    `cache`, an empty one, is left with the keys and values, at `slots` int64 [B * T]. `mix` attends in torch's place: a
    measurement that looks at keys and values, or changes them.
    """
    cos, sin = spread(cos_sin, dtype)  # [T, 1, D]

    def attend(qkv: torch.Tensor, b: Block, layer: int) -> torch.Tensor:
        q, k, v = _turned(qkv, b, config, cos, sin)
        if cache is not None and slots is not None:
            kv_append(k.flatten(0, 1), v.flatten(0, 1), cache.pages[layer], slots, impl=impl)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if mix is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=config.heads != config.kv_heads)
        else:
            out = mix(q, k, v, layer)
        return out.transpose(1, 2).flatten(2)

    return attend


def after(config: Config, cos_sin: torch.Tensor, dtype: torch.dtype, chunk: Chunk, impl: str | None = None) -> Attend:
    """A packed chunk [1, N] over what its sequences hold; fresh keys and values in 16 bits, and appended."""
    cos, sin = spread(cos_sin[chunk.positions], dtype)  # [N, 1, D]

    def attend(qkv: torch.Tensor, b: Block, layer: int) -> torch.Tensor:
        q, k, v = (part[0] for part in _turned(qkv, b, config, cos, sin))  # [N, heads, D]
        out = torch.empty_like(q)
        if any(chunk.before):
            held = _held(chunk, layer, chunk.before, config.head_dim, dtype, impl)
            for mine, old in zip(_sequences(chunk), held, strict=True):
                keys, values = (torch.cat((prefix, new[mine])) for prefix, new in zip(old, (k, v), strict=True))
                out[mine] = _bottom_right(q[mine], keys, values)
        else:
            for mine in _sequences(chunk):
                out[mine] = _square(q[mine], k[mine], v[mine])
        kv_append(k, v, chunk.cache.pages[layer], chunk.slots, impl=impl)
        return out.view(1, len(out), -1)

    return attend


def read_back(config: Config, cos_sin: torch.Tensor, chunk: Chunk, impl: str | None = None) -> Attend:
    """A packed chunk [1, N] joins the cache and attends to it alone: queries are rounded over quantised pages."""
    lengths = [n + m for n, m in zip(chunk.before, chunk.counts, strict=True)]
    most: dict[str, Any] = {"max_q_len": max(chunk.counts), "max_kv_len": max(lengths)}

    def attend(qkv: torch.Tensor, b: Block, layer: int) -> torch.Tensor:
        pages = chunk.cache.pages[layer]
        q = _appended(qkv, b, config, cos_sin, pages, chunk.positions, chunk.slots, impl=impl)
        given = (q, pages, chunk.cache.table, chunk.ends, chunk.starts)
        try:
            out, _ = attention_prefill(*given, **most, deterministic=True, impl=impl)
        except Unsupported:  # where attention over 16-bit rows is the faster way, rows are gathered
            out = _gathered(q, chunk, layer, lengths, impl)
        return out.view(1, len(out), -1)

    return attend


def _gathered(q: torch.Tensor, chunk: Chunk, layer: int, lengths: Sequence[int], impl: str | None) -> torch.Tensor:
    """attention_prefill by torch: queries [N, H, D] over keys and values that are read back in fp32."""
    seen = q.float()
    if chunk.cache.pages[layer].spec.quantised:
        codes, step = rounded_q(seen)
        seen = codes * step
    out = torch.empty_like(q)
    held = _held(chunk, layer, lengths, q.shape[-1], torch.float32, impl)
    for mine, (keys, values) in zip(_sequences(chunk), held, strict=True):
        out[mine] = _bottom_right(seen[mine], keys, values).to(q.dtype)
    return out


def one(config: Config, cos_sin: torch.Tensor, cache: Cache, deterministic: bool = False, **how: Any) -> Attend:
    """One new token of each sequence, which joins the cache where `cache.point` says; `how` goes to the ops.

    `deterministic`: the bits of a sequence's attention depend on nothing but itself.
    """

    def attend(qkv: torch.Tensor, b: Block, layer: int) -> torch.Tensor:
        pages = cache.pages[layer]
        q = _appended(qkv, b, config, cos_sin, pages, cache.positions, cache.slots, **how)
        over = (q, pages, cache.table, cache.ends)
        out, _ = attention_decode(*over, max_kv_len=cache.room, deterministic=deterministic, **how)
        return out.view(*qkv.shape[:2], -1)

    return attend


def _appended(
    qkv: torch.Tensor,
    b: Block,
    config: Config,
    cos_sin: torch.Tensor,
    pages: KVPages,
    positions: torch.Tensor,
    slots: torch.Tensor,
    **how: Any,
) -> torch.Tensor:
    """Queries [N, H, D], normed and turned; keys and values have joined the pages."""
    parts = (config.heads, config.kv_heads, config.kv_heads)
    q, k, v = qkv.view(len(slots), sum(parts), config.head_dim).split(parts, 1)
    norms = {} if b.qk_norm is None else {"q_weight": b.qk_norm[0], "k_weight": b.qk_norm[config.heads]}
    turn: dict[str, Any] = {"positions": positions, "cos_sin": cos_sin, "eps": config.norm_eps, **norms}
    return kv_append(k, v, pages, slots, q=q, **turn, **how)


def _sequences(chunk: Chunk) -> Iterator[slice]:
    """The tokens of each sequence among the packed ones."""
    first = 0
    for count in chunk.counts:
        yield slice(first, first + count)
        first += count


def _held(
    chunk: Chunk, layer: int, lengths: Sequence[int], size: int, dtype: torch.dtype, impl: str | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each sequence its first `lengths[b]` keys and values in the pages of a layer, [length, Hkv, D] in `dtype`."""
    table = chunk.cache.table
    starts = torch.tensor([0, *lengths]).cumsum(0)
    some = (torch.tensor(lengths, dtype=torch.int32).to(table.device), starts.to(table.device, torch.int32))
    rows = gather_dequantize(
        chunk.cache.pages[layer], table, *some, total=sum(lengths), dtype=dtype, size=size, impl=impl
    )
    return list(zip(*(part.split(list(lengths)) for part in rows), strict=True))


def _square(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """n queries [n, H, D] over n keys and values [n, Hkv, D]: query i sees keys 0 .. i. -> [n, H, D]"""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return found[0].transpose(0, 1)


def _bottom_right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """n queries [n, H, D] at the end of S keys and values [S, Hkv, D]: query i sees keys 0 .. S - n + i. -> [n, H, D]"""
    fresh, length = len(q), len(k)
    at = torch.arange(length, device=q.device)
    keys, values = (part.transpose(0, 1)[None] for part in (k, v))
    parts = []
    for first in range(0, fresh, _ROWS):
        rows = q[first : first + _ROWS]
        ends = length - fresh + first + torch.arange(len(rows), device=q.device)
        last = length - fresh + first + len(rows)  # keys after it are seen by none of these
        mask = at[:last] <= ends[:, None]
        found = F.scaled_dot_product_attention(
            rows.transpose(0, 1)[None], keys[:, :, :last], values[:, :, :last], attn_mask=mask,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        parts.append(found[0].transpose(0, 1))
    return torch.cat(parts)
