"""attention_prefill(q, pages, table, lengths, q_starts, max_q_len, max_kv_len, v=None, v_starts=None, scale=None, window=-1,
sinks=None, softcap=0.0, q_bits=8, deterministic=False, with_lse=False, table_starts=None) -> (out, lse).

Of sequence b the fresh tokens are rows q_starts[b] .. q_starts[b + 1] - 1 of q, at most max_q_len of them (q_starts None: as many of
each); lengths[b] keys are in the pages, the fresh ones included, at most max_kv_len.
q, out [T, Hq, D] bf16 | fp16 | fp32, any strides of q with the last 1. pages: KVPages, of that type when they are not quantised.
table int32 [B, at least max_kv_len / P] (with table_starts int32 [B + 1]: its rows one after another), lengths int32 [B].
v, of q's type, [sum S, Hkv, D] with v_starts int32 [B + 1]: values, as gather_dequantize gives them, in place of the pages'.
lse fp32 [T, Hq], natural log; [T, 0] unless asked for.
"""

from __future__ import annotations

from typing import Any

import torch

from ...formats.kvcache import KVPages
from .. import attention, device
from ..attention import Attention, Given, Outputs
from ..op import Cost, pointer, rows_contiguous
from ..weight import check_place

OP = "attention_prefill"
SCHEMA = f"({attention.FIELDS}, Tensor? v, Tensor? v_starts) -> (Tensor, Tensor)"
WARPGROUPS = (90, 100, 103)  # SMs whose engines bring attention of warpgroups
BLOCK = 256  # keys of which the C++ body sums weights of 15 bits


def unwrap(
    q: torch.Tensor,
    pages: KVPages,
    table: torch.Tensor,
    lengths: torch.Tensor,
    q_starts: torch.Tensor | None,
    max_q_len: int,
    max_kv_len: int,
    v: torch.Tensor | None = None,
    v_starts: torch.Tensor | None = None,
    scale: float | None = None,
    window: int = -1,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
    q_bits: int = 8,
    deterministic: bool = False,
    with_lse: bool = False,
    table_starts: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """`scale` None is D^-0.5. `deterministic`: a request's bits depend on nothing but itself (always so on a CPU)."""
    more: dict[str, Any] = {"window": window, "sinks": sinks, "softcap": softcap, "q_bits": q_bits}
    given = attention.flat_of(
        q, pages, table, lengths, max_kv_len, max_q_len, q_starts=q_starts, table_starts=table_starts, scale=scale,
        deterministic=deterministic, with_lse=with_lse, **more,
    )  # fmt: skip
    return *given, v if v is None else rows_contiguous(v), v_starts


def parts(*flat: Any) -> tuple[Attention, Given]:
    """The arguments that all attentions have, and values in place of the pages', or None."""
    a, (v, v_starts) = Attention(*flat[:-2]), flat[-2:]
    return a, None if v is None else (v, v_starts)


def check(*flat: Any) -> None:
    a, (v, v_starts) = Attention(*flat[:-2]), flat[-2:]
    attention.check(OP, a)
    if (v is None) != (v_starts is None):
        raise ValueError(f"{OP}: v and v_starts come together, found {'v_starts' if v is None else 'v'} alone")
    if v is None:
        return
    wanted = (a.k_pages.shape[1], a.q.shape[2])
    if v.ndim != 3 or v.shape[1:] != wanted or v.dtype != a.q.dtype or v.stride(2) != 1:
        found = f"{v.dtype} {tuple(v.shape)}"
        raise ValueError(f"{OP}: v is {found}, expected {a.q.dtype} [keys of all sequences, {wanted[0]}, {wanted[1]}]")
    if v_starts.dtype != torch.int32 or v_starts.shape != (a.batch + 1,) or not v_starts.is_contiguous():
        found = f"{v_starts.dtype} {tuple(v_starts.shape)}"
        raise ValueError(f"{OP}: v_starts is {found}, expected contiguous int32 {(a.batch + 1,)}")
    check_place(OP, a.q, v=v, v_starts=v_starts)


def out_like(*flat: Any) -> Outputs:
    return attention.out_like(Attention(*flat[:-2]))


def cost(*flat: Any) -> Cost:
    """Of sequences that are all max_kv_len long, the mean token seeing half of the fresh ones: lengths are not looked at."""
    a = Attention(*flat[:-2])
    keys = max(1, a.max_kv_len - a.max_q_len // 2)
    keys = keys if a.window < 0 else min(keys, a.window)
    row = sum(t.shape[1] * t.shape[3] * t.element_size() for t in (a.k_pages, a.v_pages))
    row += sum(t.shape[1] * t.shape[3] * t.element_size() for t in (a.k_scales, a.v_scales) if t is not None)
    return Cost(flops=4 * a.q.numel() * keys, bytes=a.batch * a.max_kv_len * row + 2 * a.q.numel() * a.q.element_size())


def native(out: Outputs, *flat: Any) -> tuple[Any, ...]:
    a, (v, v_starts) = Attention(*flat[:-2]), flat[-2:]
    given = (a.q, a.k_pages, a.v_pages, a.k_scales, a.v_scales, a.mu, a.table, a.table_starts, a.lengths, a.q_starts)
    pointers = tuple(pointer(t) for t in (*given, a.sinks, v, v_starts, out[0], out[1] if a.with_lse else None))
    sizes = (a.batch, a.max_q_len, a.q.shape[1], a.k_pages.shape[1], a.q.shape[2], a.k_pages.shape[2], a.window)
    steps = (*a.q.stride()[:2], *a.k_pages.stride()[:3], *a.v_pages.stride()[:3])
    steps += (*attention.strides(a.k_scales, 4), *attention.strides(a.v_scales, 4), *attention.strides(v, 2))
    row = 0 if a.table_starts is not None else a.table.stride(0)
    return pointers, sizes, (*steps, row), (*attention.dtype_codes(a), a.q_bits), a.scale, a.softcap


def tolerance(want: Outputs, *flat: Any) -> Outputs:
    """That of all attentions; the C++ body's tiles of whole weights are BLOCK keys, the largest weight of one 32760."""
    return attention.tolerance(want, *parts(*flat), tile=BLOCK)


def triton_takes(*flat: Any) -> str | None:
    return None


def triton_yields(*flat: Any) -> str | None:
    """Where attention over 16-bit rows is scheduled better than Triton can, rows of 16 bits are worth making."""
    q = flat[0]
    if not q.is_cuda or device.card_of(q.device).sm not in WARPGROUPS:
        return None
    sm = device.card_of(q.device).sm
    return f"FlashAttention over 16-bit rows is faster on sm_{sm}; gather_dequantize + your engine's attention, or impl='triton'"


def cpu_takes(*flat: Any) -> str | None:
    return None
