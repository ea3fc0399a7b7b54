"""Packings: the same codes in the order that the body of an op reads them. They live in memory and never touch a disk.

Each packing is a pair, pack_<name> and unpack_<name>, from and to packing "plain", held inverse by a test.

    planes16_w4     int16 [Np, Kp/4]        4-bit codes, four planes of 32 in a 16-bit word   matmul_w4a16, Triton
    planes16_w8     int16 [Np, Kp/2]        8-bit codes, two planes of 64 in a 16-bit word    matmul_w8a16, Triton
    planes8_w4      int8  [Np, Kp/2]        4-bit codes, two planes of 64 in a byte           matmul_w4a8, Triton
    rows8           int8  [Np, Kp]          8-bit codes, as they are                          matmul_w8a8, Triton
    rows16_k4_w4    uint8 [Np/16, Kp/8, 64] 4-bit codes, 16 rows x 8 inputs per cache line    C++
    rows16_k4_w8    int8  [Np/16, Kp/4, 64] 8-bit codes, 16 rows x 4 inputs per cache line    C++

What is common to all:
- K is padded to Kp, a multiple of 128, and N to Np, a multiple of 64 (rows16_*: of 16).
- 4-bit codes are unsigned, u = q + 8 in 0..15. 8-bit codes are signed.
- `scale` is fp32 [groups, Np], one column per output row, so that a body reads neighbours for neighbouring rows; `zero` is
  int8 [groups, Np], signed as on disk, or None. With a group G, groups = Kp/G; without one, groups = 1.
- `planes16_w4`, and `planes16_w8` of an asymmetric spec, keep scale and zero point in one int32 word per group and row, in
  `scale`; `zero` is None (`scale_words`). A kernel loads it once, and ahead of time, since it feeds the product.
- 4-bit codes in groups for int8 activations (w4a8-gN) whose scales are two-level, s[n, g] = S[n] * m[n, g] with m = 1..16
  (affine.two_level), have one more row of `scale` in `planes8_w4` and `rows16_k4_w4`: the last one is S, 1 in padding
  (`row_scale`). q * m is an int8 then, and sums stay int32 over all of K. The rows before it are s in `rows16_k4_w4`, so that
  whoever does not care reads on as ever, and m itself in `planes8_w4`, so that a kernel has nothing to divide.
- Padding counts nothing: the padded rows and groups have scale 0 and zero 0 and the code 0; columns that are padded inside
  the group of a true row (specs without a group) hold the row's zero point, so that code - zero = 0.
- `shape` stays the true (N, K).

Unpacking gives fp32 scales: the values are exact (in scale words those of bf16 and fp16 scales; others to 2^-19, beside 8-bit
codes to 2^-16), the dtype that they are stored in on disk is the checkpoint's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from .affine import two_level
from .spec import FormatError, QuantSpec
from .tensor import ExpertsTensor, QuantTensor

BLOCK = 128  # K is cut into blocks of this many codes
_CHUNK = 1 << 18  # codes per step: bounds the temporaries

Pack = Callable[[QuantTensor], QuantTensor]


def padded_shape(shape: tuple[int, int], packing: str) -> tuple[int, int]:
    """(Np, Kp) of a weight of true size (N, K) in a packing."""
    rows = 16 if packing.startswith("rows16_") else 64
    return -(-shape[0] // rows) * rows, -(-shape[1] // BLOCK) * BLOCK


def has_words(spec: QuantSpec, packing: str) -> bool:
    """Whether `scale` of a packed weight is int32, scale and zero point in one word (`scale_words`)."""
    return packing == "planes16_w4" or (packing == "planes16_w8" and not spec.symmetric)


def has_row_scale(scale: torch.Tensor, k: int, group: int) -> bool:
    """Whether the packed `scale` of a weight with K = k ends with the row S of two-level scales."""
    return group != k and scale.shape[0] * group > -(-k // BLOCK) * BLOCK


def row_scale(scale: torch.Tensor, k: int, group: int) -> torch.Tensor | None:
    """S fp32 [Np] of the packed `scale` of a weight with K = k, or None when it has no such row."""
    return scale[-1] if has_row_scale(scale, k, group) else None


def _two_level(qt: QuantTensor, packing: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(S, m) of a plain weight (affine.two_level) if its scales are two-level and somebody multiplies them so."""
    spec = qt.spec
    many = spec.group is not None and qt.scale.shape[1] > 1 and qt.scale.shape[0] > 0
    if not many or spec.act_bits != 8 or not spec.symmetric or packing not in ("planes8_w4", "rows16_k4_w4"):
        return None
    if two_level(qt.scale[:16]) is None:  # most foreign files end here, soon
        return None
    found = two_level(qt.scale)
    if found is None or float(found[0].min()) < 2.0**-100:  # bodies divide by S
        return None
    return found


def storage(shape: tuple[int, int], packing: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """dtype and shape of `data` in a packing."""
    n, k = padded_shape(shape, packing)
    return {
        "planes16_w4": (torch.int16, (n, k // 4)),
        "planes16_w8": (torch.int16, (n, k // 2)),
        "planes8_w4": (torch.int8, (n, k // 2)),
        "rows8": (torch.int8, (n, k)),
        "rows16_k4_w4": (torch.uint8, (n // 16, k // 8, 64)),
        "rows16_k4_w8": (torch.int8, (n // 16, k // 4, 64)),
    }[packing]


def _row_steps(n: int, k: int) -> Iterator[tuple[int, int]]:
    """(start, stop) over `n` padded rows: about `_CHUNK` codes each, whole blocks of 64 rows."""
    step = max(1, _CHUNK // max(1, k) // 64) * 64
    for start in range(0, n, step):
        yield start, min(n, start + step)


def _check(qt: QuantTensor, packing: str, bits: int, wanted: str) -> None:
    """Refuse a tensor that is in another packing than `wanted`, or whose codes `packing` cannot hold."""
    if qt.spec.float_format is not None or qt.spec.weight_bits != bits:
        fits = ", ".join(name for name in PACKINGS if name.endswith(f"{qt.spec.weight_bits}")) or "none: dequantize it"
        raise FormatError(f"packing {packing} holds {bits}-bit integer codes, found {qt.spec}; packings for it: {fits}")
    if qt.packing != wanted:
        raise FormatError(
            f"packing {packing}: found a tensor packed as {qt.packing}, expected {wanted}; use layout.repack"
        )
    if wanted == "plain":
        return
    dtype, shape = storage(qt.shape, packing)
    if qt.data.dtype != dtype or tuple(qt.data.shape) != shape:
        raise FormatError(
            f"packing {packing}: data is {qt.data.dtype} {tuple(qt.data.shape)}, expected {dtype} {shape} for {qt.shape}"
        )


def _pack(qt: QuantTensor, packing: str, bits: int, to_data: Callable[[torch.Tensor], torch.Tensor]) -> QuantTensor:
    """Pad codes, scale and zero, and lay out the codes by `to_data`: int8 [n, Kp] (4 bits: uint8, unsigned) to bytes."""
    _check(qt, packing, bits, "plain")
    (rows, columns), (n, k) = qt.shape, padded_shape(qt.shape, packing)
    dtype, shape = storage(qt.shape, packing)
    device = qt.data.device
    data = torch.empty(shape, dtype=dtype, device=device)
    flat = data.view(torch.uint8).view(n, -1) if data.numel() else data
    for start, stop in _row_steps(n, k) if data.numel() else ():
        codes = torch.zeros(stop - start, k, dtype=torch.int8, device=device)
        last = min(stop, rows)
        if last > start:
            codes[: last - start, :columns] = qt.data[start:last]
            if qt.zero is not None and qt.spec.group is None:
                codes[: last - start, columns:] = qt.zero[start:last]
        part = (codes + 8).view(torch.uint8) if bits == 4 else codes
        flat[start:stop] = to_data(part).reshape(stop - start, -1).view(torch.uint8)
    groups = qt.spec.groups(columns)
    padded_groups = 1 if qt.spec.group is None else k // qt.spec.group
    scale = torch.zeros(padded_groups, n, dtype=torch.float32, device=device)
    scale[:groups, :rows] = qt.scale.t()
    levels = _two_level(qt, packing)
    if levels is not None:
        per_row = torch.ones(1, n, dtype=torch.float32, device=device)
        per_row[0, :rows] = levels[0][:, 0]
        if packing == "planes8_w4":
            scale[:groups, :rows] = levels[1].t()
        scale = torch.cat((scale, per_row))
    zero = None
    if qt.zero is not None:
        zero = torch.zeros(padded_groups, n, dtype=torch.int8, device=device)
        zero[:groups, :rows] = qt.zero.t()
    return replace(qt, data=data, scale=scale, zero=zero, packing=packing)


def _unpack(
    qt: QuantTensor, packing: str, bits: int, to_codes: Callable[[torch.Tensor, int, int], torch.Tensor]
) -> QuantTensor:
    """The inverse of `_pack`: `to_codes(bytes uint8 [n, ...], n, Kp)` gives back what `to_data` was given."""
    _check(qt, packing, bits, packing)
    (rows, columns), (n, k) = qt.shape, padded_shape(qt.shape, packing)
    codes = torch.empty(rows, columns, dtype=torch.int8, device=qt.data.device)
    flat = qt.data.contiguous().reshape(-1).view(torch.uint8).view(n, -1) if codes.numel() else qt.data
    for start, stop in _row_steps(n, k) if codes.numel() else ():
        last = min(stop, rows)
        if last <= start:
            break
        part = to_codes(flat[start:stop], stop - start, k).view(torch.int8)[: last - start, :columns]
        codes[start:last] = part - 8 if bits == 4 else part
    groups = qt.spec.groups(columns)
    scale = qt.scale[:groups, :rows].t().contiguous()
    row = row_scale(qt.scale, columns, qt.spec.group or columns)
    if row is not None and packing == "planes8_w4":
        scale *= row[:rows, None]
    zero = None if qt.zero is None else qt.zero[:groups, :rows].t().contiguous()
    return replace(qt, data=codes, scale=scale, zero=zero, packing="plain")


def scale_words(scale: torch.Tensor, zero: torch.Tensor | None, bits: int = 4) -> torch.Tensor:
    """fp32 scales and signed zero points int8 (None: 0) of one shape as int32 words: what a kernel needs of a group in one load.

        bit 31   30 ...... 23   22 ............. 5   4 ... 0
           [ sign | exponent  |  upper mantissa    |  z + 8 ]     word & 0xFFFFFFE0 is the fp32 scale, word & 31 is z + 8
           [ sign | exponent  |  mantissa, 22..8 | z + 128  ]     beside 8-bit codes: word & 0xFFFFFF00, word & 255

    18 bits of mantissa hold every bf16 and fp16 scale exactly (subnormal fp16 too), and so do 15; an fp32 scale is rounded to
    the nearest, by at most 2^-19 or 2^-16 of itself. Five bits hold z + 8 = 16 as well, which GPTQ files of version 1 have.
    """
    low, half = _low_bits(bits), 1 << (bits - 1)
    unsigned = torch.full_like(scale, half, dtype=torch.int32) if zero is None else zero.to(torch.int32) + half
    if unsigned.numel() and (int(unsigned.min()) < 0 or int(unsigned.max()) >= 1 << low):
        found = f"{int(unsigned.min()) - half} to {int(unsigned.max()) - half}"
        most = f"{-half} to {(1 << low) - 1 - half}"
        raise FormatError(
            f"packing planes16_w{bits}: zero points reach from {found}, expected {most} in {bits}-bit weights"
        )
    word = scale.contiguous().view(torch.int32)
    return ((word + (1 << (low - 1)) - 1 + ((word >> low) & 1)) & -(1 << low)) | unsigned


def split_words(words: torch.Tensor, bits: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `scale_words`: scale fp32 and signed zero int8."""
    low = _low_bits(bits)
    return (words & -(1 << low)).view(torch.float32), ((words & ((1 << low) - 1)) - (1 << (bits - 1))).to(torch.int8)


def _low_bits(bits: int) -> int:
    """Bits of a scale word that hold the zero point."""
    return 5 if bits == 4 else 8


def pack_planes16_w4(qt: QuantTensor) -> QuantTensor:
    """Plain 4-bit codes to int16 [Np, Kp/4]. Word j = 0..31 of a block of 128 inputs:

        bit 15      12 11       8 7        4 3        0
           [ plane 3  | plane 2  | plane 1  | plane 0 ]      plane p holds u of k = 32p + j, 0..15
             k=96+j     k=64+j     k=32+j     k=j            64 bytes per row and block

    The word is as wide as bf16, so a card loads and swizzles it like a bf16 tile, and a plane is unpacked by one shift and
    one mask, without moving a code to another lane. `scale` becomes int32 [groups, Np], see `scale_words`.
    """

    def to_data(u: torch.Tensor) -> torch.Tensor:
        planes = u.view(u.shape[0], -1, 4, 32)  # [n, blocks, plane, j]
        low = planes[:, :, 0] | (planes[:, :, 1] << 4)
        high = planes[:, :, 2] | (planes[:, :, 3] << 4)
        return torch.stack((low, high), dim=3)  # [n, blocks, j, byte of the word]

    packed = _pack(qt, "planes16_w4", 4, to_data)
    return replace(packed, scale=scale_words(packed.scale, packed.zero), zero=None)


def unpack_planes16_w4(qt: QuantTensor) -> QuantTensor:
    """The inverse of `pack_planes16_w4`."""

    def to_codes(data: torch.Tensor, n: int, k: int) -> torch.Tensor:
        words = data.view(n, k // BLOCK, 32, 2)
        low, high = words[..., 0], words[..., 1]
        return torch.stack((low & 15, low >> 4, high & 15, high >> 4), dim=2).view(n, k)

    scale, zero = split_words(qt.scale)
    return _unpack(replace(qt, scale=scale, zero=None if qt.spec.symmetric else zero), "planes16_w4", 4, to_codes)


def pack_planes16_w8(qt: QuantTensor) -> QuantTensor:
    """Plain 8-bit codes to int16 [Np, Kp/2]. Word j = 0..63 of a block of 128 inputs:

        bit 15        8 7         0
           [  plane 1  |  plane 0  ]      plane 0 holds the signed code of k = j, plane 1 of k = 64 + j
              k=64+j      k=j             128 bytes per row and block

    As wide as bf16 for the reason that planes16_w4 is. Without zero points `scale` stays fp32, exact, and a kernel has nothing
    to subtract; with them it becomes int32 [groups, Np], see `scale_words`.
    """

    def to_data(codes: torch.Tensor) -> torch.Tensor:
        return codes.view(codes.shape[0], -1, 2, 64).transpose(2, 3)  # [n, blocks, j, byte of the word]

    packed = _pack(qt, "planes16_w8", 8, to_data)
    if packed.zero is None:
        return packed
    return replace(packed, scale=scale_words(packed.scale, packed.zero, 8), zero=None)


def unpack_planes16_w8(qt: QuantTensor) -> QuantTensor:
    """The inverse of `pack_planes16_w8`."""

    def to_codes(data: torch.Tensor, n: int, k: int) -> torch.Tensor:
        return data.view(n, k // BLOCK, 64, 2).transpose(2, 3).reshape(n, k)

    scale, zero = (qt.scale, None) if qt.spec.symmetric else split_words(qt.scale, 8)
    return _unpack(replace(qt, scale=scale, zero=zero), "planes16_w8", 8, to_codes)


def pack_planes8_w4(qt: QuantTensor) -> QuantTensor:
    """Plain 4-bit codes to int8 [Np, Kp/2]. Byte j = 0..63 of a block of 128 inputs:

    bit 7        4 3        0
       [ plane 1  | plane 0 ]      plane 0 holds u of k = j, plane 1 of k = 64 + j
    """

    def to_data(u: torch.Tensor) -> torch.Tensor:
        planes = u.view(u.shape[0], -1, 2, 64)
        return planes[:, :, 0] | (planes[:, :, 1] << 4)

    return _pack(qt, "planes8_w4", 4, to_data)


def unpack_planes8_w4(qt: QuantTensor) -> QuantTensor:
    """The inverse of `pack_planes8_w4`."""

    def to_codes(data: torch.Tensor, n: int, k: int) -> torch.Tensor:
        words = data.view(n, k // BLOCK, 64)
        return torch.stack((words & 15, words >> 4), dim=2).view(n, k)

    return _unpack(qt, "planes8_w4", 4, to_codes)


def pack_rows8(qt: QuantTensor) -> QuantTensor:
    """Plain 8-bit codes to int8 [Np, Kp]: byte k of row n is the signed code of (n, k)."""
    return _pack(qt, "rows8", 8, lambda codes: codes)


def unpack_rows8(qt: QuantTensor) -> QuantTensor:
    """The inverse of `pack_rows8`."""
    return _unpack(qt, "rows8", 8, lambda data, n, k: data.view(n, k))


def pack_rows16_k4_w4(qt: QuantTensor) -> QuantTensor:
    """Plain 4-bit codes to uint8 [Np/16, Kp/8, 64]. Line l of row block b holds 16 rows x 8 inputs:

        byte 4r + j, r = 0..15, j = 0..3, is row n = 16b + r:
        bit 7        4 3        0
           [ k=8l+4+j | k=8l+j  ]      u, 0..15

    Lines of one row block follow each other along k. Lanes are rows: sums need no horizontal step, and the low or high
    nibbles of a line are the operand of `vpmaddubsw` / `vpdpbusd` with 4 activations broadcast.
    """

    def to_data(u: torch.Tensor) -> torch.Tensor:
        nibbles = u.view(u.shape[0] // 16, 16, -1, 2, 4)  # [row block, r, line, nibble, j]
        return (nibbles[:, :, :, 0] | (nibbles[:, :, :, 1] << 4)).transpose(1, 2)  # [row block, line, r, j]

    return _pack(qt, "rows16_k4_w4", 4, to_data)


def unpack_rows16_k4_w4(qt: QuantTensor) -> QuantTensor:
    """The inverse of `pack_rows16_k4_w4`."""

    def to_codes(data: torch.Tensor, n: int, k: int) -> torch.Tensor:
        lines = data.view(n // 16, k // 8, 16, 4).transpose(1, 2)  # [row block, r, line, j]
        return torch.stack((lines & 15, lines >> 4), dim=3).view(n, k)

    return _unpack(qt, "rows16_k4_w4", 4, to_codes)


def pack_rows16_k4_w8(qt: QuantTensor) -> QuantTensor:
    """Plain 8-bit codes to int8 [Np/16, Kp/4, 64]. Line l of row block b holds 16 rows x 4 inputs:

    byte 4r + j, r = 0..15, j = 0..3, is the signed code of row n = 16b + r, input k = 4l + j
    """

    def to_data(codes: torch.Tensor) -> torch.Tensor:
        return codes.view(codes.shape[0] // 16, 16, -1, 4).transpose(1, 2)  # [row block, line, r, j]

    return _pack(qt, "rows16_k4_w8", 8, to_data)


def unpack_rows16_k4_w8(qt: QuantTensor) -> QuantTensor:
    """The inverse of `pack_rows16_k4_w8`."""

    def to_codes(data: torch.Tensor, n: int, k: int) -> torch.Tensor:
        return data.view(n // 16, k // 4, 16, 4).transpose(1, 2).reshape(n, k)

    return _unpack(qt, "rows16_k4_w8", 8, to_codes)


PACKINGS: dict[str, tuple[Pack, Pack]] = {
    "planes16_w4": (pack_planes16_w4, unpack_planes16_w4),
    "planes16_w8": (pack_planes16_w8, unpack_planes16_w8),
    "planes8_w4": (pack_planes8_w4, unpack_planes8_w4),
    "rows8": (pack_rows8, unpack_rows8),
    "rows16_k4_w4": (pack_rows16_k4_w4, unpack_rows16_k4_w4),
    "rows16_k4_w8": (pack_rows16_k4_w8, unpack_rows16_k4_w8),
}


def repack(qt: QuantTensor, packing: str) -> QuantTensor:
    """`qt` in another packing, or in "plain", by way of plain."""
    for name in (qt.packing, packing):
        if name != "plain" and name not in PACKINGS:
            raise FormatError(f"unknown packing {name!r}; known: plain, {', '.join(PACKINGS)}")
    if qt.packing == packing:
        return qt
    plain = qt if qt.packing == "plain" else PACKINGS[qt.packing][1](qt)
    return plain if packing == "plain" else PACKINGS[packing][0](plain)


def stack_experts(weights: Iterable[QuantTensor], count: int) -> ExpertsTensor:
    """`count` weights of one spec, packing and shape as one stack, which is filled one by one: a generator keeps peaks low.

    FormatError when they differ or when there are fewer or more.
    """
    stack: list[torch.Tensor | None] = []
    first, found = None, 0
    for i, weight in enumerate(weights):
        parts = (weight.data, weight.scale, weight.zero)
        if first is None:
            first = weight
            stack = [None if t is None else t.new_empty((count, *t.shape)) for t in parts]
        if (weight.spec, weight.packing, weight.shape) != (first.spec, first.packing, first.shape) or i >= count:
            raise FormatError(
                f"expert {i} is {weight.spec} {weight.packing} {weight.shape}, expected {count} experts like the first, "
                f"{first.spec} {first.packing} {first.shape}"
            )
        for to, part in zip(stack, parts, strict=True):
            if to is not None and part is not None:
                to[i] = part
        found = i + 1
    if first is None or found != count:
        raise FormatError(f"found {found} experts, expected {count}")
    data, scale, zero = stack
    assert data is not None and scale is not None
    return ExpertsTensor(data, scale, zero, first.spec, first.packing, (count, *first.shape))


def repack_experts(experts: ExpertsTensor, packing: str, device: torch.device | str | None = None) -> ExpertsTensor:
    """`experts` in another packing, or in "plain", expert by expert, on `device` (default: where they are)."""
    device = experts.data.device if device is None else torch.device(device)
    if experts.packing == packing:
        return experts.to(device)
    count = experts.shape[0]
    return stack_experts((repack(experts.expert(e).to(device), packing) for e in range(count)), count)
