"""attention_decode(q, pages, table, lengths, max_kv_len, max_q_len=1, scale=None, deterministic=False, with_lse=False,
q_starts=None, window=-1, sinks=None, softcap=0.0, splits=0, q_bits=8, table_starts=None) -> (out, lse).

B sequences of n = max_q_len fresh tokens each, or of q_starts[b + 1] - q_starts[b] of them; S cached tokens, the fresh ones included.
q, out [T, Hq, D] bf16 | fp16 | fp32, any strides of q with the last 1. pages: KVPages, of that type when they are not quantised.
table int32 [B, at least max_kv_len / P] (with table_starts int32 [B + 1]: its rows one after another), lengths int32 [B], at most
max_kv_len. lse fp32 [T, Hq], natural log; [T, 0] unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...formats.kvcache import KVPages, unaligned
from .. import attention
from ..attention import Attention, Outputs
from ..op import Cost, Unsupported

OP = "attention_decode"
MOST_TOKENS = 16
SCHEMA = f"({attention.FIELDS}, int splits) -> (Tensor, Tensor)"
LEAST_CHUNK, TILE, FIXED_CHUNK = 256, 64, 1024
TABLE, LONGEST = Attention._fields.index("table"), Attention._fields.index("max_kv_len")
TENSORS = Attention._fields.index("scale")  # what stands before it


def unwrap(
    q: torch.Tensor,
    pages: KVPages,
    table: torch.Tensor,
    lengths: torch.Tensor,
    max_kv_len: int,
    max_q_len: int = 1,
    scale: float | None = None,
    deterministic: bool = False,
    with_lse: bool = False,
    q_starts: torch.Tensor | None = None,
    window: int = -1,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
    splits: int = 0,
    q_bits: int = 8,
    table_starts: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """`scale` None is D^-0.5. `deterministic`: a request's bits depend on nothing but itself (always so on a CPU).

    `splits` 0: as many as sizes say. The other arguments: kernels/attention.py, Attention.
    """
    given = attention.flat_of(
        q, pages, table, lengths, max_kv_len, max_q_len, q_starts=q_starts, table_starts=table_starts, scale=scale,
        window=window, sinks=sinks, softcap=softcap, q_bits=q_bits, deterministic=deterministic, with_lse=with_lse,
    )  # fmt: skip
    return *given, splits


def check(*flat: Any) -> None:
    a, splits = Attention(*flat[:-1]), flat[-1]
    if a.max_q_len > MOST_TOKENS:
        raise Unsupported(
            f"{OP}: {a.max_q_len} fresh tokens a sequence, expected 1 to {MOST_TOKENS}; attention_prefill takes more"
        )
    attention.check(OP, a)
    if splits < 0:
        raise ValueError(f"{OP}: splits is {splits}, expected 0 (as sizes say) or more")


def key(*flat: Any) -> tuple[Any, ...]:
    """All that `check` and `takes` look at. Of max_kv_len, which grows with every token, only whether it is in its bounds."""
    k_pages, table, longest = flat[1], flat[TABLE], flat[LONGEST]
    held = table.shape[-1] * k_pages.shape[2] if table.ndim and k_pages.ndim > 2 else 0
    kinds = [None if t is None else (t.dtype, t.shape, t.stride(), t.device) for t in flat[:TENSORS]]
    return (*kinds, *flat[TENSORS:LONGEST], longest > 0, longest <= held, *flat[LONGEST + 1 :])


def out_like(*flat: Any) -> Outputs:
    return attention.out_like(Attention(*flat[:-1]))


def cost(*flat: Any) -> Cost:
    """Of sequences that are all max_kv_len long: looking at lengths would wait for the device."""
    a = Attention(*flat[:-1])
    keys = a.max_kv_len if a.window < 0 else min(a.max_kv_len, a.window + a.max_q_len)
    row = sum(t.shape[1] * t.shape[3] * t.element_size() for t in (a.k_pages, a.v_pages))
    row += sum(t.shape[1] * t.shape[3] * t.element_size() for t in (a.k_scales, a.v_scales) if t is not None)
    moved = a.batch * keys * row + 2 * a.q.numel() * a.q.element_size()
    return Cost(flops=4 * a.q.numel() * keys, bytes=moved)


def chunk(length: int, splits: int) -> int:
    """Keys of a split of a sequence: at least 256, whole tiles. The kernel says the same (gpu.py, `_chunk`)."""
    tiles = -(-length // (splits * TILE))
    return max(LEAST_CHUNK, tiles * TILE)


def _same(a: Attention, splits: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What calls of one key tell the C++ function alike, of sizes and after them: see `native`."""
    heads, page = a.k_pages.shape[1:3]
    sizes = (a.batch, a.max_q_len, a.q.shape[1], heads, a.q.shape[2], page)
    steps = (*a.q.stride()[:2], *a.k_pages.stride()[:3], *a.v_pages.stride()[:3])
    steps += (*attention.strides(a.k_scales, 4), *attention.strides(a.v_scales, 4))
    row = 0 if a.table_starts is not None else a.table.stride(0)
    return sizes, ((*steps, row), (*attention.dtype_codes(a), a.q_bits), a.scale, a.softcap, splits)


def _pointers(out: Outputs, flat: tuple[Any, ...]) -> list[int]:
    found = [0 if t is None else t.data_ptr() for t in flat[:TENSORS]]
    return [*found, out[0].data_ptr(), out[1].data_ptr() if out[1].shape[1] else 0]


def native(out: Outputs, *flat: Any) -> tuple[Any, ...]:
    """Addresses, sizes, strides, types and forms, each as one tuple; then scale, softcap, splits."""
    a = Attention(*flat[:-1])
    sizes, rest = _same(a, flat[-1])
    return _pointers(out, flat), (*sizes, a.max_kv_len, a.window), *rest


def plan(*flat: Any) -> Callable[..., tuple[Outputs, tuple[Any, ...]]]:
    """Of calls with the key of this one: outputs, and what `native` gives."""
    a = Attention(*flat[:-1])
    (sizes, rest), window = _same(a, flat[-1]), a.window
    lse = out_like(*flat)[1]

    def ready(*flat: Any) -> tuple[Outputs, tuple[Any, ...]]:
        out = attention.dense_like(flat[0]), attention.dense_like(lse)
        return out, (_pointers(out, flat), (*sizes, flat[LONGEST], window), *rest)

    return ready


def tolerance(want: Outputs, *flat: Any) -> Outputs:
    return attention.tolerance(want, Attention(*flat[:-1]))


def triton_takes(*flat: Any) -> str | None:
    scale = Attention(*flat[:-1]).scale
    return None if scale > 0 else f"takes scales above 0, this one is {scale}; use impl='reference'"


def triton_remark(*flat: Any) -> str | None:
    """What `explain` says of pages of another engine that are read in place."""
    a = Attention(*flat[:-1])
    return unaligned(a.k_pages, a.v_pages)


def cpu_takes(*flat: Any) -> str | None:
    a = Attention(*flat[:-1])
    words = {t.dtype for t in (a.k_scales, a.v_scales) if t is not None}
    if len(words) > 1:
        return "scales of K and V are of two types, expected both float16 or both float32; copy one of them"
    return None
