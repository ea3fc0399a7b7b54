"""attention_decode(q, pages, table, lengths, max_kv_len, max_q_len=1, scale=None, deterministic=False, with_lse=False)
-> (out, lse). B sequences of n = max_q_len fresh tokens each, T = B n; S cached tokens, the fresh ones included.

q, out [T, Hq, D] bf16 | fp16 | fp32, any strides of q with the last 1. pages: KVPages of that type. table int32 [B, at least
max_kv_len / P], lengths int32 [B], at most max_kv_len. lse fp32 [T, Hq], natural log; [T, 0] unless asked for.
"""

from __future__ import annotations

from typing import Any

import torch

from ...formats.kvcache import KVPages, check_pages, pages_of
from ..op import DTYPE_CODES, Cost, Unsupported, pointer, rows_contiguous
from ..weight import check_place, ulp
from .reference import sizes_of

OP = "attention_decode"
MOST, MOST_TOKENS = 256, 16
SCHEMA = (
    "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor table, Tensor lengths, float scale, int q_len, int max_kv_len,"
    " bool deterministic, bool with_lse, str spec) -> (Tensor, Tensor)"
)
LEAST_CHUNK, TILE, FIXED_CHUNK = 256, 64, 1024
Outputs = tuple[torch.Tensor, torch.Tensor]
Flat = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, int, int, bool, bool, str]


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
) -> Flat:
    """`scale` None is D^-0.5. `deterministic`: a request's bits depend on nothing but itself (always so on a CPU).

    q_starts, window, sinks and softcap are named so that a call that needs them is refused, not answered wrongly.
    """
    for name, given in (
        ("q_starts (unequal numbers of fresh tokens)", q_starts is not None),
        ("a sliding window", window >= 0),
        ("sinks", sinks is not None),
        ("softcap", softcap != 0.0),
    ):
        if given:
            raise Unsupported(f"{OP}: {name} is not built yet; use torch's scaled_dot_product_attention with a mask")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    flags = (deterministic, with_lse, str(pages.spec))
    return (rows_contiguous(q), pages.k, pages.v, table, lengths, scale, max_q_len, max_kv_len, *flags)


def check(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    q_len: int,
    max_kv_len: int,
    deterministic: bool,
    with_lse: bool,
    spec: str,
) -> None:
    check_pages(OP, k_pages, v_pages, spec)
    heads, page, size = k_pages.shape[1:]
    if q.dtype not in DTYPE_CODES or q.dtype != k_pages.dtype:
        raise ValueError(f"{OP}: q is {q.dtype}, the pages {k_pages.dtype}; expected one float type for both")
    if size > MOST:
        raise Unsupported(f"{OP}: a head has {size} numbers, expected at most {MOST}; use torch's attention")
    if not 1 <= q_len <= MOST_TOKENS:
        raise Unsupported(f"{OP}: {q_len} fresh tokens a sequence, expected 1 to {MOST_TOKENS}; prefill takes more")
    if q.ndim != 3 or q.shape[2] != size or q.shape[1] % heads or not q.shape[1] or q.stride(2) != 1:
        raise ValueError(f"{OP}: q has shape {tuple(q.shape)}, expected [T, a multiple of {heads}, {size}]")
    batch = q.shape[0] // q_len
    if q.shape[0] % q_len or lengths.shape != (batch,):
        found = f"{q.shape[0]} tokens and lengths {tuple(lengths.shape)}"
        raise ValueError(f"{OP}: {found}, expected [B] lengths for B * {q_len} tokens")
    if lengths.dtype != torch.int32 or table.dtype != torch.int32:
        raise ValueError(f"{OP}: lengths is {lengths.dtype} and table {table.dtype}, expected int32 for both")
    if not lengths.is_contiguous() or table.ndim != 2 or table.stride(1) != 1:
        raise ValueError(f"{OP}: table has shape {tuple(table.shape)}, expected [B, pages], rows in one piece")
    if max_kv_len < 1 or table.shape[0] != batch or table.shape[1] < pages_of(max_kv_len, page):
        found = f"table {tuple(table.shape)} and max_kv_len {max_kv_len}"
        wanted = (batch, pages_of(max(max_kv_len, 1), page))
        raise ValueError(f"{OP}: {found}, expected at least {wanted} pages of {page} tokens")
    check_place(OP, q, k_pages=k_pages, v_pages=v_pages, table=table, lengths=lengths)


def out_like(*flat: Any) -> Outputs:
    q, with_lse = flat[0], flat[9]
    lse = torch.empty((q.shape[0], q.shape[1] if with_lse else 0), dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def cost(*flat: Any) -> Cost:
    """Of sequences that are all max_kv_len long: looking at lengths would wait for the device."""
    q, k_pages, q_len, keys = flat[0], flat[1], flat[6], flat[7]
    row = k_pages.shape[1] * q.shape[2] * q.element_size()
    return Cost(
        flops=4 * q.numel() * keys, bytes=2 * q.shape[0] // q_len * keys * row + 2 * q.numel() * q.element_size()
    )


def chunk(length: int, splits: int) -> int:
    """Keys of a split of a sequence: at least 256, whole tiles. The kernel says the same (gpu.py, `_chunk`)."""
    tiles = -(-length // (splits * TILE))
    return max(LEAST_CHUNK, tiles * TILE)


def native(out: Outputs, *flat: Any) -> tuple[int | float, ...]:
    q, k_pages, v_pages, table, lengths, scale, q_len, max_kv_len, _, with_lse, _ = flat
    pointers = (pointer(t) for t in (q, k_pages, v_pages, table, lengths, out[0], out[1] if with_lse else None))
    sizes = (q.shape[0] // q_len, q_len, q.shape[1], k_pages.shape[1], q.shape[2], k_pages.shape[2], max_kv_len)
    strides = (*q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3], table.stride(0))
    return (*pointers, *sizes, *strides, DTYPE_CODES[q.dtype], scale)


def tolerance(want: Outputs, *flat: Any) -> Outputs:
    """An ulp, the rounding of weights to the type of V where a body multiplies 16-bit numbers, and the order of sums.

    A score is off by 2^-18 of scale * sum |q| |k|, which moves a weight by twice that share; a weight by half an ulp of its
    type. Both act on sum_t p_t |v_t|.
    """
    q = flat[0]
    reach, spread = sizes_of(*flat)  # [T, Hq, D] sum of p |v|, [T, Hq, 1] the largest scale * |q| . |k|
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[q.dtype]
    off = ulp(want[0]) + (rounding + 2.0**-17 * (1 + spread)) * reach
    return off, (2.0**-17 * (1 + spread[..., 0]))[:, : want[1].shape[1]]


def triton_takes(*flat: Any) -> str | None:
    return None


def cpu_takes(*flat: Any) -> str | None:
    return None
