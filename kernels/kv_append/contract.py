"""kv_append(k, v, pages, slots, q, positions, cos_sin, q_weight, k_weight, eps) -> q_out. T tokens, D numbers of a head.

k, v [T, Hkv, D] bf16 | fp16 | fp32, q [T, Hq, D] or None alike: any strides with the last 1. pages: KVPages in place, of that type
where numbers stay as they are; scales fp16 [pages, Hkv, P, C], any strides. slots int64 [T] = page * P + row, below 0 skips.
positions int64 [T] and cos_sin fp32 [max_pos, D], cosines of the D / 2 pairs, then their sines: both or neither. q_weight, k_weight
[D] alike: norms of a head, both or neither. q_out is contiguous [T, Hq, D], [T, 0, D] without q.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...formats.kvcache import KVPages, KVSpec, check_pages, parse_form, quantize, row_length
from ...formats.spec import FormatError
from ..op import DTYPE_CODES, Cost, pointer, rows_contiguous
from ..weight import check_place, ulp
from .reference import prepared

OP = "kv_append"
MOST = 256  # numbers of a head
SCHEMA = (
    "(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!)? scales, Tensor? mu, Tensor slots, Tensor? q,"
    " Tensor? positions, Tensor? cos_sin, Tensor? q_weight, Tensor? k_weight, float eps, str form) -> Tensor"
)
Maybe = torch.Tensor | None


class Append(NamedTuple):
    """The flat arguments, in the order of SCHEMA."""

    k: torch.Tensor
    v: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    scales: Maybe
    mu: Maybe
    slots: torch.Tensor
    q: Maybe
    positions: Maybe
    cos_sin: Maybe
    q_weight: Maybe
    k_weight: Maybe
    eps: float
    form: str


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
) -> Append:
    if pages.v_scales is not None:
        raise FormatError(f"{OP}: scale words of K and V lie apart, as another engine has them; write into new_pages")
    q = None if q is None else rows_contiguous(q)
    return Append(
        rows_contiguous(k), rows_contiguous(v), pages.k, pages.v, pages.scales, pages.mu, slots, q, positions, cos_sin,
        q_weight, k_weight, float(eps), pages.form,
    )  # fmt: skip


def check(*flat: Any) -> None:
    a = Append(*flat)
    if a.k.ndim != 3:
        raise ValueError(f"{OP}: k has shape {tuple(a.k.shape)}, expected [T, Hkv, D]")
    size, dtype = a.k.shape[2], a.k.dtype
    _check_held(a, size)
    heads, tokens = a.k_pages.shape[1], a.k.shape[0]
    if dtype not in DTYPE_CODES or (a.scales is None and dtype != a.k_pages.dtype):
        raise ValueError(f"{OP}: k is {dtype}, the pages {a.k_pages.dtype}; expected one float type for both")
    if size > MOST:
        raise ValueError(f"{OP}: a head has {size} numbers, expected at most {MOST}")
    for name, rows in (("k", a.k), ("v", a.v)):
        if rows.shape != (tokens, heads, size) or rows.dtype != dtype or rows.stride(2) != 1:
            found = f"{rows.dtype} {tuple(rows.shape)}"
            raise ValueError(f"{OP}: {name} is {found}, expected {dtype} [T, {heads}, {size}] as the pages have it")
    q = a.q
    if q is not None and (
        q.ndim != 3 or q.shape[::2] != (tokens, size) or q.shape[1] % heads or q.dtype != dtype or q.stride(2) != 1
    ):
        found = f"{q.dtype} {tuple(q.shape)}"
        raise ValueError(f"{OP}: q is {found}, expected {dtype} [{tokens}, a multiple of {heads}, {size}]")
    _check_tokens(a, tokens, size, dtype)
    check_place(OP, a.k, v=a.v, k_pages=a.k_pages, v_pages=a.v_pages, scales=a.scales, mu=a.mu, slots=a.slots, q=q)
    check_place(OP, a.k, positions=a.positions, cos_sin=a.cos_sin, q_weight=a.q_weight, k_weight=a.k_weight)


def _check_held(a: Append, size: int) -> None:
    """The pages: ours, of one spec, with the plane of scales it has."""
    spec, nibbles, zeros = parse_form(a.form)
    if nibbles != "halves" or zeros != "offset":
        raise FormatError(f"{OP}: pages {a.form!r} are another engine's and are only read; write into new_pages")
    if a.scales is not None and spec.quantised:
        wanted = (*a.k_pages.shape[:3], spec.channels)
        if a.scales.dtype != torch.float16 or a.scales.shape != wanted:
            found = f"{a.scales.dtype} {tuple(a.scales.shape)}"
            raise FormatError(f"{OP}: the scales are {found}, expected float16 {wanted} for {a.form}")
    # both have words of the same plane, of at least as many numbers as either has: no slices on the way
    check_pages(OP, a.k_pages, a.v_pages, a.scales, a.scales, a.mu, a.form, size)
    for name, rows, bits in (("k", a.k_pages, spec.k_bits), ("v", a.v_pages, spec.v_bits)):
        if rows.ndim == 4 and rows.shape[3] != row_length(bits, size):
            found = f"{rows.dtype} {tuple(rows.shape)}"
            raise FormatError(
                f"{OP}: the pages of {name} are {found}, expected rows of {row_length(bits, size)} for {a.form}"
            )


def _check_tokens(a: Append, tokens: int, size: int, dtype: torch.dtype) -> None:
    """Slots, positions, weights."""
    slots, positions, cos_sin = a.slots, a.positions, a.cos_sin
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
    if a.q is not None and (a.q_weight is None) != (a.k_weight is None):
        raise ValueError(f"{OP}: q_weight and k_weight come together, or neither does")
    for name, weight in (("q_weight", a.q_weight), ("k_weight", a.k_weight)):
        if weight is not None and (weight.dtype != dtype or weight.shape != (size,) or not weight.is_contiguous()):
            found = f"{weight.dtype} {tuple(weight.shape)}"
            raise ValueError(f"{OP}: {name} is {found}, expected contiguous {dtype} {(size,)}")


def out_like(*flat: Any) -> torch.Tensor:
    a = Append(*flat)
    heads = 0 if a.q is None else a.q.shape[1]
    return torch.empty((a.k.shape[0], heads, a.k.shape[2]), dtype=a.k.dtype, device=a.k.device)


def written(*flat: Any) -> tuple[torch.Tensor, ...]:
    """What a call changes in place: rows of k_pages and of v_pages, 4-bit ones number by number, and the scales if there are any."""
    a = Append(*flat)
    rows = tuple(unpacked(rows, a.k.shape[2]) if rows.dtype == torch.uint8 else rows for rows in (a.k_pages, a.v_pages))
    return rows if a.scales is None else (*rows, a.scales)


def unpacked(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Bytes [..., row] as their `size` numbers of 0 .. 15, then the bytes that fill the row."""
    packed = rows[..., : size // 2]
    return torch.cat((packed & 15, packed >> 4, rows[..., size // 2 :]), -1)


def cost(*flat: Any) -> Cost:
    """Rows are read once and written once: queries in their type, keys and values as the pages hold them."""
    a = Append(*flat)
    read = 2 * a.k.numel() + (0 if a.q is None else a.q.numel())
    kept = a.k.shape[0] * parse_form(a.form).spec.bytes_per_token(a.k.shape[2], a.k.shape[1], a.k.dtype)
    out = 0 if a.q is None else a.q.numel() * a.q.element_size()
    return Cost(flops=8 * read, bytes=read * a.k.element_size() + out + kept + 8 * a.k.shape[0])


def native(out: torch.Tensor, *flat: Any) -> tuple[int | float, ...]:
    a = Append(*flat)
    k, v, q, k_pages, v_pages, scales = a.k, a.v, a.q, a.k_pages, a.v_pages, a.scales
    held = (k, v, k_pages, v_pages, scales, a.mu, a.slots, q, out, a.positions, a.cos_sin, a.q_weight, a.k_weight)
    sizes = (k.shape[0], 0 if q is None else q.shape[1], *k_pages.shape[1:2], k.shape[2], k_pages.shape[2])
    strides = (*k.stride()[:2], *v.stride()[:2], *((0, 0) if q is None else q.stride()[:2]))
    strides = (
        *strides,
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        *((0,) * 4 if scales is None else scales.stride()),
    )
    spec = parse_form(a.form).spec
    kinds = (DTYPE_CODES[k.dtype], spec.k_bits, spec.v_bits, spec.channels, int(spec.symmetric))
    sizes = (*sizes, k_pages.shape[3], v_pages.shape[3])
    return (*(pointer(t) for t in held), *sizes, *strides, *kinds, a.eps)


def tolerance(want: Any, *flat: Any) -> tuple[torch.Tensor, ...]:
    """q_out and the rows of keys: one ulp, and what the order of the sum of squares moves; values are copied, all else stays.

    A turned number is a sum of two products, so what counts is the size of both, not of their sum. Without a norm nothing may
    differ in quantised pages: a rotation and the offset round once a step everywhere.
    """
    a = Append(*flat)
    q_out, k_want, v_want = want[:3]

    def off(x: torch.Tensor, weight: Maybe) -> torch.Tensor:
        pair = prepared(x, weight, a.eps, None, None).abs()
        return 2.0**-20 * (pair + pair.roll(x.shape[-1] // 2, -1))

    turned = torch.zeros_like(q_out, dtype=torch.float32)
    if a.q is not None:
        turned = ulp(q_out) + off(a.q, a.q_weight)
    rows, live = torch.zeros_like(k_want, dtype=torch.float32), a.slots >= 0
    page, row = a.slots[live] // a.k_pages.shape[2], a.slots[live] % a.k_pages.shape[2]
    values = torch.zeros_like(v_want, dtype=torch.float32)
    if a.scales is None:
        rows[page, :, row] = ulp(k_want[page, :, row]) + off(a.k[live], a.k_weight)
        return turned, rows, values
    words = torch.zeros_like(a.scales, dtype=torch.float32)
    if a.k_weight is not None:
        positions = None if a.positions is None else a.positions[live]
        keys, by = prepared(a.k[live], a.k_weight, a.eps, positions, a.cos_sin), off(a.k[live], a.k_weight)
        if a.mu is not None:
            keys, by = keys - a.mu, by + 2.0**-20 * a.mu.abs()
        spec = parse_form(a.form).spec
        codes, words[page, :, row, 0::2] = quantized_off(keys, by, spec.k_bits, spec)
        rows[page, :, row, : codes.shape[-1]] = codes
    return turned, rows, values, words


def quantized_off(x: torch.Tensor, by: torch.Tensor, bits: int, spec: KVSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """How far codes [..., D] and scale words [..., 1 or 2] of rows x may move when each number moves by at most `by`.

    A word moves by one step of fp16, and only where a row that is moved gets another word. Codes follow their numbers, which a
    division and a rounding keep in order, by as much as those at both ends of the range; under another word, by a code and by
    as many scales as it moved.
    """
    apart = by.amax(-1, keepdim=True) * by.new_tensor([-1.0, 1.0])
    ends = torch.stack((x.amin(-1), x.amax(-1)), -1)  # all that words depend on
    (scale, offset), *others = (quantize(ends + f * apart, bits, spec.symmetric)[1:] for f in (0, 1, -1))
    steps = [torch.where((other[0] != scale) & torch.isfinite(scale), ulp(scale), 0.0) for other in others]
    first, last = (0, 15) if offset is not None else (-127, 127) if bits == 8 else (-7, 7)
    moved = torch.maximum(*steps)[..., None]
    jump = last * moved
    if offset is not None:
        steps = [torch.where((other[1] != offset) & torch.isfinite(offset), ulp(offset), 0.0) for other in others]
        moved = torch.cat((moved, torch.maximum(*steps)[..., None]), -1)
        jump = jump + moved[..., 1:]
    by_scale = scale.float()[..., None]

    def codes(y: torch.Tensor) -> torch.Tensor:
        return ((y if offset is None else y - offset.float()[..., None]) / by_scale).clamp(first, last).round()

    near = torch.maximum((codes(x - by) - codes(x)).abs(), (codes(x + by) - codes(x)).abs())
    allowed = torch.where(jump > 0, (jump / by_scale).ceil() + 1, near).nan_to_num(0.0)
    if spec.channels == 4 and offset is None:  # int8 beside values with offsets
        moved = torch.cat((moved, torch.zeros_like(moved)), -1)
    return allowed, moved


def triton_takes(*flat: Any) -> str | None:
    return None


def cpu_takes(*flat: Any) -> str | None:
    return None
