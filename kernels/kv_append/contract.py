"""kv_append(k, v, pages, slots, q, positions, cos_sin, q_weight, k_weight, eps) -> q_out. T tokens, D numbers of a head.

k, v [T, Hkv, D] bf16 | fp16 | fp32, q [T, Hq, D] or None alike: any strides with the last 1. pages: KVPages of that type, in
place. slots int64 [T] = page * P + row, below 0 skips. positions int64 [T] and cos_sin fp32 [max_pos, D], cosines of the D / 2
pairs, then their sines: both or neither. q_weight, k_weight [D] alike: norms of a head, both or neither. q_out is contiguous
[T, Hq, D], [T, 0, D] without q.
"""

from __future__ import annotations

from typing import Any

import torch

from ...formats.kvcache import KVPages, check_pages
from ..op import DTYPE_CODES, Cost, pointer, rows_contiguous
from ..weight import check_place, ulp
from .reference import prepared

OP = "kv_append"
MOST = 256  # numbers of a head
SCHEMA = (
    "(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots, Tensor? q, Tensor? positions,"
    " Tensor? cos_sin, Tensor? q_weight, Tensor? k_weight, float eps, str spec) -> Tensor"
)
Maybe = torch.Tensor | None
Flat = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Maybe, Maybe, Maybe, Maybe, Maybe, float, str
]


def unwrap(
    k: torch.Tensor,
    v: torch.Tensor,
    pages: KVPages,
    slots: torch.Tensor,
    q: Maybe = None,
    positions: Maybe = None,
    cos_sin: Maybe = None,
    q_weight: Maybe = None,
    k_weight: Maybe = None,
    eps: float = 1e-6,
) -> Flat:
    q = None if q is None else rows_contiguous(q)
    rows = rows_contiguous(k), rows_contiguous(v)
    return (*rows, pages.k, pages.v, slots, q, positions, cos_sin, q_weight, k_weight, float(eps), str(pages.spec))


def check(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    q: Maybe,
    positions: Maybe,
    cos_sin: Maybe,
    q_weight: Maybe,
    k_weight: Maybe,
    eps: float,
    spec: str,
) -> None:
    check_pages(OP, k_pages, v_pages, spec)
    heads, size, dtype = k_pages.shape[1], k_pages.shape[3], k.dtype
    if dtype not in DTYPE_CODES or dtype != k_pages.dtype:
        raise ValueError(f"{OP}: k is {dtype}, the pages {k_pages.dtype}; expected one float type for both")
    if size > MOST:
        raise ValueError(f"{OP}: a head has {size} numbers, expected at most {MOST}")
    tokens = k.shape[0] if k.ndim else 0
    for name, rows in (("k", k), ("v", v)):
        if rows.shape != (tokens, heads, size) or rows.dtype != dtype or rows.stride(2) != 1:
            found = f"{rows.dtype} {tuple(rows.shape)}"
            raise ValueError(f"{OP}: {name} is {found}, expected {dtype} [T, {heads}, {size}] as the pages have it")
    if q is not None and (
        q.ndim != 3 or q.shape[::2] != (tokens, size) or q.shape[1] % heads or q.dtype != dtype or q.stride(2) != 1
    ):
        found = f"{q.dtype} {tuple(q.shape)}"
        raise ValueError(f"{OP}: q is {found}, expected {dtype} [{tokens}, a multiple of {heads}, {size}]")
    if slots.dtype != torch.int64 or slots.shape != (tokens,) or not slots.is_contiguous():
        raise ValueError(f"{OP}: slots is {slots.dtype} {tuple(slots.shape)}, expected contiguous int64 {(tokens,)}")
    if (positions is None) != (cos_sin is None):
        raise ValueError(f"{OP}: positions and cos_sin come together, or neither does")
    if positions is not None and cos_sin is not None:
        if positions.dtype != torch.int64 or positions.shape != (tokens,) or not positions.is_contiguous():
            found = f"{positions.dtype} {tuple(positions.shape)}"
            raise ValueError(f"{OP}: positions is {found}, expected contiguous int64 {(tokens,)}")
        right = cos_sin.ndim == 2 and cos_sin.shape[1] == size and cos_sin.is_contiguous()
        if cos_sin.dtype != torch.float32 or not right:
            found = f"{cos_sin.dtype} {tuple(cos_sin.shape)}"
            raise ValueError(f"{OP}: cos_sin is {found}, expected contiguous float32 [max_pos, {size}]")
    if q is not None and (q_weight is None) != (k_weight is None):
        raise ValueError(f"{OP}: q_weight and k_weight come together, or neither does")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and (weight.dtype != dtype or weight.shape != (size,) or not weight.is_contiguous()):
            found = f"{weight.dtype} {tuple(weight.shape)}"
            raise ValueError(f"{OP}: {name} is {found}, expected contiguous {dtype} {(size,)}")
    check_place(OP, k, v=v, k_pages=k_pages, v_pages=v_pages, slots=slots, q=q, positions=positions, cos_sin=cos_sin)
    check_place(OP, k, q_weight=q_weight, k_weight=k_weight)


def out_like(*flat: Any) -> torch.Tensor:
    k, q = flat[0], flat[5]
    return torch.empty((k.shape[0], 0 if q is None else q.shape[1], k.shape[2]), dtype=k.dtype, device=k.device)


def written(*flat: Any) -> tuple[torch.Tensor, ...]:
    """What a call changes in place: k_pages and v_pages."""
    return flat[2], flat[3]


def cost(*flat: Any) -> Cost:
    k, q = flat[0], flat[5]
    rows = 2 * k.numel() + (0 if q is None else q.numel())
    return Cost(flops=8 * rows, bytes=2 * rows * k.element_size() + 8 * k.shape[0])


def native(out: torch.Tensor, *flat: Any) -> tuple[int | float, ...]:
    k, v, k_pages, v_pages, slots, q, positions, cos_sin, q_weight, k_weight, eps, _ = flat
    pointers = (pointer(t) for t in (k, v, k_pages, v_pages, slots, q, out, positions, cos_sin, q_weight, k_weight))
    sizes = (k.shape[0], 0 if q is None else q.shape[1], *k_pages.shape[1:2], k.shape[2], k_pages.shape[2])
    strides = (*k.stride()[:2], *v.stride()[:2], *((0, 0) if q is None else q.stride()[:2]))
    return (*pointers, *sizes, *strides, *k_pages.stride()[:3], *v_pages.stride()[:3], DTYPE_CODES[k.dtype], eps)


def tolerance(want: Any, *flat: Any) -> tuple[torch.Tensor, ...]:
    """q_out and the rows of keys: one ulp, and what the order of the sum of squares moves; values are copied, all else stays.

    A turned number is a sum of two products, so what counts is the size of both, not of their sum.
    """
    k, _, k_pages, v_pages, slots, q, _, _, q_weight, k_weight, eps, _ = flat
    q_out, k_want, _ = want

    def off(x: torch.Tensor, weight: Maybe, got: torch.Tensor) -> torch.Tensor:
        pair = prepared(x, weight, eps, None, None).abs()
        pair = pair + pair.roll(x.shape[-1] // 2, -1)
        return ulp(got) + 2.0**-20 * pair.to(got.device)

    turned = torch.zeros_like(q_out, dtype=torch.float32) if q is None else off(q, q_weight, q_out)
    rows, live = torch.zeros_like(k_want, dtype=torch.float32), slots >= 0
    at = slots[live]
    page, row = at // k_pages.shape[2], at % k_pages.shape[2]
    rows[page, :, row] = off(k[live], k_weight, k_want[page, :, row])
    return turned, rows, torch.zeros_like(v_pages, dtype=torch.float32)


def triton_takes(*flat: Any) -> str | None:
    return None


def cpu_takes(*flat: Any) -> str | None:
    return None
