"""moe_matmul(x, w: ExpertsTensor [E, N, K], ids [T, topk], weights=None, sx=None, out_dtype=None).

up     (weights None)             x [T, K], w rows 0..I-1 gate, I..2I-1 up   -> [T * topk, I]
down   (weights fp32 [T, topk])   x [T * topk, K], row t * topk + j for (t, j) -> [T, N]

x is bf16 | fp16 | fp32 with 4-bit weights, or int8 with sx fp32 [rows of x] and 8-bit weights. The result is in the type of
x, or in out_dtype; int8 rows give bfloat16 when none is named.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...formats.tensor import ExpertsTensor
from ..op import DTYPE_CODES, Cost, pointer, rows_contiguous
from ..weight import check_per_row, check_place, check_rows, check_weight, ulp, weight_bytes
from .reference import pairwise

OP = "moe_matmul"
SCHEMA = (
    "(Tensor x, Tensor? sx, Tensor w, Tensor scale, Tensor? zero, Tensor ids, Tensor? weights,"
    " int n, int k, int group, str packing, ScalarType out_dtype,"
    " bool batch_invariant=False) -> Tensor"
)
# What each body reads, by the bits of a weight (formats/layout.py). An op with two kinds of weight has no one packing.
PACKINGS = {
    "triton": {4: "planes16_w4", 8: "rows8"},
    "cpu": {4: "rows16_k4_w4", 8: "rows16_k4_w8"},
    "reference": {4: "plain", 8: "plain"},
}
MAX_K = 132104  # 127 * 128 * K stays below 2^31
MAX_PAIRS = 1 << 30  # (token, expert) pairs: their numbers are int32 on every machine

Flat = tuple[
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor,
    torch.Tensor | None,
    int,
    int,
    int,
    str,
    torch.dtype,
    bool,
]


def unwrap(
    x: torch.Tensor,
    w: ExpertsTensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None = None,
    sx: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> Flat:
    """ids and weights in any integer and float type become contiguous int32 and fp32.

    `batch_invariant`: what a token gets does not depend, to the bit, on the other tokens. Always so with int8 rows.
    """
    bits = (w.spec.weight_bits, w.spec.act_bits)
    if w.spec.float_format is not None or bits != ((8, 8) if sx is not None else (4, 16)):
        found = "int8 rows with scales" if sx is not None else "rows without scales"
        raise ValueError(
            f"{OP}: the experts are {w.spec} and x is {found}; w4a16 takes rows as they are, w8a8 int8 rows"
        )
    _, n, k = w.shape
    if out_dtype is None:
        out_dtype = torch.bfloat16 if x.dtype == torch.int8 else x.dtype
    ids = ids.to(torch.int32).contiguous()
    weights = None if weights is None else weights.to(torch.float32).contiguous()
    sx = None if sx is None else sx.contiguous()
    group = w.spec.group or k
    return (
        rows_contiguous(x),
        sx,
        w.data,
        w.scale,
        w.zero,
        ids,
        weights,
        n,
        k,
        group,
        w.packing,
        out_dtype,
        batch_invariant,
    )


def check(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> None:
    if sx is not None and (x.dtype != torch.int8 or zero is not None or group != k):
        raise ValueError(
            f"{OP}: x is {x.dtype} with row scales, expected int8 and symmetric w8a8 experts with one scale per row"
        )
    if sx is not None and k > MAX_K:
        raise ValueError(
            f"{OP}: K is {k}, expected at most {MAX_K}, where int32 sums are safe; split the layer along K"
        )
    if sx is None and x.dtype not in DTYPE_CODES:
        raise ValueError(f"{OP}: x is {x.dtype}, expected bfloat16, float16 or float32, or int8 with its scales sx")
    if out_dtype not in DTYPE_CODES or (sx is None and out_dtype != x.dtype):
        raise ValueError(f"{OP}: out_dtype is {out_dtype}, expected {'a float type' if sx is not None else x.dtype}")
    if ids.ndim != 2 or ids.dtype != torch.int32 or ids.shape[1] < 1 or not ids.is_contiguous():
        raise ValueError(f"{OP}: ids is {ids.dtype} {tuple(ids.shape)}, expected contiguous int32 [T, topk], topk >= 1")
    if ids.numel() > MAX_PAIRS:
        raise ValueError(f"{OP}: ids holds {ids.numel()} pairs, expected at most {MAX_PAIRS}; cut the batch")
    check_rows(OP, x, k)
    rows = ids.shape[0] if weights is None else ids.numel()
    if x.shape[0] != rows:
        face = "ids [T, topk] without weights go with x [T, K]" if weights is None else "down wants x [T * topk, K]"
        raise ValueError(f"{OP}: x has {x.shape[0]} rows, expected {rows} for ids {tuple(ids.shape)}: {face}")
    if sx is not None:
        check_per_row(OP, "sx", sx, torch.float32, rows)
    if weights is None and n % 2:
        raise ValueError(f"{OP}: the experts have {n} rows, expected an even number: gate rows, then as many up rows")
    if weights is not None and (
        weights.dtype != torch.float32 or weights.shape != ids.shape or not weights.is_contiguous()
    ):
        found = f"{weights.dtype} {tuple(weights.shape)}"
        raise ValueError(f"{OP}: weights is {found}, expected contiguous float32 {tuple(ids.shape)}")
    _check_experts(w, scale, zero, n, k, group, packing, 8 if sx is not None else 4)
    check_place(OP, x, sx=sx, w=w, scale=scale, zero=zero, ids=ids, weights=weights)


def _check_experts(
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    bits: int,
) -> None:
    """The first expert is a weight as every matmul wants it, and the others lie behind it."""
    if packing != "plain" and f"{bits}" != packing[-1]:
        raise ValueError(f"{OP}: packing is {packing}, expected one of {bits}-bit codes for this x")
    stacked = [t for t in (w, scale, zero) if t is not None]
    experts = w.shape[0] if w.ndim else 0
    if experts < 1 or any(t.ndim < 2 or t.shape[0] != experts or not t.is_contiguous() for t in stacked):
        found = ", ".join(str(tuple(t.shape)) for t in stacked)
        raise ValueError(f"{OP}: w, scale and zero are {found}, expected contiguous [E, ...], E >= 1 the same in all")
    check_weight(OP, w[0], scale[0], None if zero is None else zero[0], n, k, group, packing)


def out_like(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> torch.Tensor:
    tokens, topk = ids.shape
    size = (tokens * topk, n // 2) if weights is None else (tokens, n)
    return torch.empty(size, dtype=out_dtype, device=x.device)


def active_experts(pairs: int, experts: int) -> float:
    """How many of E experts have a token when `pairs` pairs are spread evenly at random."""
    return experts * (1.0 - (1.0 - 1.0 / experts) ** pairs)


def cost(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Cost:
    """The experts that have a token are counted by expectation: looking at ids would wait for the device."""
    tokens, topk = ids.shape
    pairs, experts = tokens * topk, w.shape[0]
    read = weight_bytes(w, scale, zero, None) * active_experts(pairs, experts) / experts
    outputs = pairs * n // 2 if weights is None else tokens * n
    moved = x.shape[0] * k * x.element_size() + outputs * out_dtype.itemsize + 4 * pairs
    return Cost(flops=2 * pairs * n * k, bytes=int(read) + moved)


def native(
    out: torch.Tensor,
    x: torch.Tensor,
    sx: torch.Tensor | None,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> tuple[int, ...]:
    pointers = tuple(pointer(t) for t in (x, sx, w, scale, zero, ids, weights, out))
    x_dtype = 0 if sx is not None else DTYPE_CODES[x.dtype]
    sizes = (*ids.shape, w.shape[0], n, k, group, x.stride(0), scale.stride(0))
    return (*pointers, *sizes, x_dtype, DTYPE_CODES[out_dtype], int(batch_invariant))


def tolerance(
    want: torch.Tensor,
    x: torch.Tensor,
    sx: torch.Tensor | None,
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    packing: str,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """One ulp of the output type, and what the order of sums may do to a product before it.

    A product of 16-bit x is off by 2^-16 of |x| @ |W|^T as in matmul_w4a16, one of int8 by 2^-22 of itself. silu has a slope
    of at most 1.1, so up passes on 1.1 |u| dg + |silu(g)| du; its exponential costs 2^-20 of the result.
    """
    product = pairwise(x, sx, w, scale, zero, ids, weights, group)  # [P, N]
    off = 2.0**-22 * product.abs()
    if sx is None:
        off = off + 2.0**-16 * pairwise(x.abs(), None, w, scale, zero, ids, weights, group, absolute=True)
    if weights is None:
        (gate, up), (d_gate, d_up) = product.chunk(2, 1), off.chunk(2, 1)
        silu = torch.nn.functional.silu(gate).abs()
        return ulp(want) + 1.1 * (up.abs() + d_up) * d_gate + silu * d_up + 2.0**-20 * want.float().abs()
    mine = (ids >= 0) & (ids < w.shape[0])
    weight = weights.abs().where(mine, torch.zeros_like(weights))[:, :, None]
    terms = (weight * (off + 2.0**-21 * product.abs()).view(*ids.shape, n)).sum(1)
    return ulp(want) + terms


def _reads(body: str, *flat: Any) -> str | None:
    """None, or why `body` does not read experts that are packed as these."""
    sx, packing = flat[1], flat[10]
    wanted = PACKINGS[body][4 if sx is None else 8]
    if packing == wanted:
        return None
    return (
        f"reads experts packed as {wanted}, these are {packing}; pack them once with linear.prepare_experts(w, device)"
    )


cpu_takes = functools.partial(_reads, "cpu")
reference_takes = functools.partial(_reads, "reference")


def triton_takes(*flat: Any) -> str | None:
    if flat[0].dtype == torch.float32:
        return "multiplies 16-bit activations, x is float32; cast x to bfloat16 or float16"
    return _reads("triton", *flat)
