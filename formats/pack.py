"""Codes to bits: a little-endian bit stream, the one rule behind compressed-tensors, GPTQ and 3-bit files.

Code i of a row, unsigned (u = q + 2^(b-1)), starts at bit i*b of the stream; int32 word w holds bits 32w..32w+31. A
code may cross into the next word; the tail is zero.

    4 bits   word 0:  31..28 27..24 23..20 19..16 15..12 11..8  7..4  3..0
                       u7     u6     u5     u4     u3     u2     u1    u0
    8 bits   word 0:  31......24 23......16 15.......8 7........0
                       u3         u2         u1         u0
    3 bits   32 codes in 3 words; u10 and u21 are cut by a border

The 4- and 8-bit roads view bytes as words, which is this stream on the little-endian machines that torch runs on.
"""

from __future__ import annotations

import torch

from .spec import FormatError


def word_count(n: int, bits: int) -> int:
    """int32 words that `n` codes of `bits` bits take."""
    return (n * bits + 31) // 32


def _padded(codes: torch.Tensor, multiple: int, fill: int) -> torch.Tensor:
    """`codes` [R, n] with `fill` columns added until n is a multiple; contiguous."""
    missing = -codes.shape[1] % multiple
    if missing:
        return torch.nn.functional.pad(codes, (0, missing), value=fill)
    # A single row may keep the stride of the matrix it was cut from; words need the one of its own size.
    return codes.contiguous().view(-1).view(codes.shape)


def _view(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of `x` [R, C] as `dtype` [R, ?]. By way of one dimension: a single row or column may have odd strides."""
    return x.contiguous().reshape(-1).view(dtype).reshape(x.shape[0], -1)


def pack(codes: torch.Tensor, bits: int, dim: int = 1) -> torch.Tensor:
    """Signed int8 codes [R, C] as int32 words along `dim`: [R, ceil(C*bits/32)], or [ceil(R*bits/32), C] for dim 0.

    `bits` in 2..8. FormatError for a code outside -2^(bits-1) .. 2^(bits-1)-1.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise FormatError(f"pack wants int8 codes [rows, columns], found {codes.dtype} {tuple(codes.shape)}")
    if bits not in range(2, 9) or dim not in (0, 1):
        raise FormatError(f"pack knows 2 to 8 bits along dim 0 or 1, asked for {bits} bits along dim {dim}")
    if dim == 0:
        return pack(codes.t().contiguous(), bits).t().contiguous()
    rows, n = codes.shape
    half = 1 << (bits - 1)
    if codes.numel() == 0:
        return torch.zeros(rows, word_count(n, bits), dtype=torch.int32, device=codes.device)
    if bits < 8:
        lo, hi = (int(v) for v in torch.aminmax(codes))
        if lo < -half or hi >= half:
            raise FormatError(f"codes reach from {lo} to {hi}, {bits} bits hold {-half}..{half - 1}; encode them again")
    if bits == 8:  # q + 128 is q with its top bit turned; -128 pads to unsigned 0
        return _view(_padded(codes, 4, -128) ^ -128, torch.int32)
    if bits == 4:
        u = (_padded(codes, 8, -8) + 8).view(torch.uint8)
        return _view(u[:, 0::2] | (u[:, 1::2] << 4), torch.int32)
    u = _padded(codes, 32, -half)
    words = torch.zeros(rows, u.shape[1] // 32, bits, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        value = (u[:, i::32].to(torch.int64) + half) << offset
        words[:, :, word] |= value & 0xFFFFFFFF
        if offset + bits > 32:
            words[:, :, word + 1] |= value >> 32
    words = words.reshape(rows, -1)[:, : word_count(n, bits)]
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(words: torch.Tensor, bits: int, n: int, dim: int = 1) -> torch.Tensor:
    """The inverse: int32 words back to `n` signed int8 codes along `dim`. FormatError when the word count is not n's."""
    if words.dtype != torch.int32 or words.dim() != 2:
        raise FormatError(f"unpack wants int32 words [rows, columns], found {words.dtype} {tuple(words.shape)}")
    if bits not in range(2, 9) or dim not in (0, 1):
        raise FormatError(f"unpack knows 2 to 8 bits along dim 0 or 1, asked for {bits} bits along dim {dim}")
    if words.shape[dim] != word_count(n, bits):
        raise FormatError(
            f"{words.shape[dim]} words along dim {dim}, expected {word_count(n, bits)} for {n} codes of {bits} bits"
        )
    if dim == 0:
        return unpack(words.t().contiguous(), bits, n).t().contiguous()
    rows = words.shape[0]
    half = 1 << (bits - 1)
    if words.numel() == 0:
        return torch.empty(rows, n, dtype=torch.int8, device=words.device)
    if bits == 8:
        return (_view(words, torch.int8) ^ -128)[:, :n].contiguous()
    if bits == 4:
        u = _view(words, torch.uint8)
        out = torch.empty(rows, u.shape[1] * 2, dtype=torch.int8, device=words.device)
        out[:, 0::2] = u & 15
        out[:, 1::2] = u >> 4
        return out.sub_(8)[:, :n].contiguous()
    blocks = (n + 31) // 32
    stream = torch.zeros(rows, blocks * bits, dtype=torch.int64, device=words.device)
    stream[:, : words.shape[1]] = words
    stream = (stream & 0xFFFFFFFF).reshape(rows, blocks, bits)
    out = torch.empty(rows, blocks, 32, dtype=torch.int8, device=words.device)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        value = stream[:, :, word] >> offset
        if offset + bits > 32:
            value = value | (stream[:, :, word + 1] << (32 - offset))
        out[:, :, i] = (value & ((1 << bits) - 1)) - half
    return out.reshape(rows, -1)[:, :n].contiguous()
