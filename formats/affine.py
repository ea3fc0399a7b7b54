"""Quantise and dequantise: the arithmetic that all else is measured by (docs/formats.md, "Arithmetic").

Codes are signed, qmin = -2^(b-1), qmax = 2^(b-1) - 1. Rounding is half to even, after the clamp, all of it in fp32.

                symmetric                              asymmetric
    scale       s = absmax / ((2^b - 1) / 2)           s = (hi - lo) / (2^b - 1),  lo = min(x, 0), hi = max(x, 0)
    zero        none                                   z = round(clamp(qmin - lo/s, qmin, qmax))
    code        q = round(clamp(x/s, qmin, qmax))      q = round(clamp(x/s + z, qmin, qmax))
    value       q * s                                  (q - z) * s

The scale is rounded to the dtype it is stored in before any code is found, so that what is stored is what was meant.
A group of zeros has s = 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .spec import FormatError, QuantSpec
from .tensor import QuantTensor

_CHUNK = 1 << 17  # weights per step: temporaries stay in the cache, and memory stays small for any tensor


def _row_ranges(rows: int, columns: int) -> Iterator[slice]:
    """Slices over `rows` of about `_CHUNK` weights each."""
    if columns == 0:
        return
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _check_weight(w: torch.Tensor, spec: QuantSpec) -> int:
    """Number of scales per row; FormatError when `w` is not a float matrix or the group does not divide."""
    if w.dim() != 2 or not w.is_floating_point():
        raise FormatError(f"a weight is {w.dtype} {tuple(w.shape)}, expected a float matrix [out, in]")
    if spec.float_format is not None:
        raise FormatError(
            f"{spec} is a float format, not an affine one; take an integer spec such as w8a8 or w4a16-g128"
        )
    return spec.groups(w.shape[1])


def _grouped(w: torch.Tensor, groups: int) -> torch.Tensor:
    """`w` [N, K] in fp32 as [N, groups, K/groups]."""
    return w.to(torch.float32).reshape(w.shape[0], groups, w.shape[1] // groups)


def scale_dtype_of(spec: QuantSpec, model_dtype: torch.dtype) -> torch.dtype:
    """What scales are stored in: fp32 for w8a8, whose engines keep it, else the model's own dtype."""
    return torch.float32 if spec.weight_bits == 8 and spec.act_bits == 8 else model_dtype


def _store(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 scales rounded to `dtype`: 0 becomes 1, what would round to 0 the smallest number that no device flushes."""
    if not bool(torch.isfinite(scale).all()):
        raise FormatError("a weight holds NaN or Inf; repair the source, no scale can be found for it")
    stored = scale.to(dtype).clamp_min_(2.0**-24 if dtype == torch.float16 else 2.0**-126)
    stored[scale == 0] = 1.0
    if not bool(torch.isfinite(stored).all()):
        raise FormatError(
            f"a scale of {float(scale.max()):.3g} does not fit into {dtype}; store scales as torch.bfloat16"
        )
    return stored


def _zero_of(lo: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Signed zero point, int8, from the least weight of each group (at most 0) and its stored scale."""
    return (spec.qmin - lo / scale.to(torch.float32)).clamp_(spec.qmin, spec.qmax).round_().to(torch.int8)


def find_scales(
    w: torch.Tensor, spec: QuantSpec, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales from the largest weights of each group, without search.

    w: float [N, K]. Returns scale [N, K/group] in `scale_dtype` ([N, 1] without a group), and zero int8 of the same
    shape or None. FormatError for NaN, Inf, a group that does not divide, a scale that the dtype cannot hold.
    """
    groups = _check_weight(w, spec)
    rows = w.shape[0]
    scale = torch.empty(rows, groups, dtype=scale_dtype, device=w.device)
    zero = None if spec.symmetric else torch.empty(rows, groups, dtype=torch.int8, device=w.device)
    steps = (1 << spec.weight_bits) - 1
    if w.shape[1] == 0:
        return scale.fill_(1.0), zero if zero is None else zero.zero_()
    for part in _row_ranges(*w.shape):
        lo, hi = torch.aminmax(_grouped(w[part], groups), dim=2)
        if zero is None:
            scale[part] = _store(torch.maximum(hi, -lo) / (steps / 2), scale_dtype)
        else:
            lo.clamp_(max=0)
            scale[part] = _store((hi.clamp_(min=0) - lo) / steps, scale_dtype)
            zero[part] = _zero_of(lo, scale[part], spec)
    return scale, zero


def encode(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, spec: QuantSpec) -> torch.Tensor:
    """Codes of `w` float [N, K] for given scale and zero [N, K/group]: int8 [N, K], signed, in qmin..qmax."""
    groups = _check_weight(w, spec)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    for part in _row_ranges(*w.shape):
        t = _grouped(w[part], groups) / scale[part].to(torch.float32).unsqueeze(2)
        if zero is not None:
            t += zero[part].unsqueeze(2)
        codes[part] = t.clamp_(spec.qmin, spec.qmax).round_().reshape(-1, w.shape[1])
    return codes


def decode(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    spec: QuantSpec,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Values (q - z) * s of int8 codes [N, K]: [N, K] in `dtype`, computed in fp32 and rounded once."""
    groups = spec.groups(codes.shape[1])
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for part in _row_ranges(*codes.shape):
        t = _grouped(codes[part], groups)
        if zero is not None:
            t = t - zero[part].unsqueeze(2)
        values[part] = (t * scale[part].to(torch.float32).unsqueeze(2)).reshape(-1, codes.shape[1])
    return values


def quantize(
    w: torch.Tensor,
    spec: QuantSpec,
    scale_dtype: torch.dtype = torch.bfloat16,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
) -> QuantTensor:
    """`w` float [N, K] as a plain QuantTensor.

    Without `scale`: two-level scales for int8 activations with 4-bit groups (what `matmul_w4a8` multiplies exactly),
    else `find_scales`. A given scale is rounded to `scale_dtype` first; a missing zero of an asymmetric spec is found
    from it. FormatError for NaN, Inf, scales that are not above zero, a group that does not divide.
    """
    groups = _check_weight(w, spec)
    if scale is None:
        if spec.act_bits == 8 and spec.group is not None:
            scale = two_level_scales(w, spec, scale_dtype)
        else:
            scale, zero = find_scales(w, spec, scale_dtype)
    else:
        if tuple(scale.shape) != (w.shape[0], groups):
            raise FormatError(f"scale has shape {tuple(scale.shape)}, expected {(w.shape[0], groups)} for {spec}")
        scale = scale.to(scale_dtype)
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise FormatError(f"given scales hold values that are not finite and above zero in {scale_dtype}")
        if not bool(torch.isfinite(w).all()):
            raise FormatError("a weight holds NaN or Inf; repair the source")
        if zero is None and not spec.symmetric:
            zero = torch.empty(w.shape[0], groups, dtype=torch.int8, device=w.device)
            for part in _row_ranges(*w.shape):
                zero[part] = _zero_of(_grouped(w[part], groups).amin(dim=2).clamp_(max=0), scale[part], spec)
    return QuantTensor(encode(w, scale, zero, spec), scale, zero, spec, "plain", (w.shape[0], w.shape[1]))


def dequantize(qt: QuantTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values of a plain QuantTensor: [N, K] in `dtype`."""
    if qt.packing != "plain":
        raise FormatError(f"dequantize wants packing plain, found {qt.packing}; use layout.repack(qt, 'plain') first")
    return decode(qt.data, qt.scale, qt.zero, qt.spec, dtype)


def two_level(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """s[n, g] = S[n] * m[n, g], with m in 1..16 and S of at most 4 significant bits, or None if a row has no such S.

    scale: float [N, G]. Returns S fp32 [N, 1], the smallest that fits, and m int32 [N, G]. All products m * S are
    exact in bf16. Not two-level is a fact of a tensor, not an error. The idea: QServe (arXiv 2405.04532), there with
    free S.
    """
    s = scale.to(torch.float64)
    if s.numel() == 0:
        return s.new_ones(s.shape[0], 1).float(), s.to(torch.int32)
    least = s.amin(dim=1, keepdim=True)
    if not bool((torch.isfinite(s) & (s > 0)).all()):
        return None
    best = torch.zeros_like(least)
    for m in range(1, 17):  # the least scale of a row is some m times S; a larger m means a smaller S
        candidate = least / m
        sixteenths = torch.frexp(candidate).mantissa * 16
        ratio = (s / candidate).round_()
        fits = (candidate * m == least) & (sixteenths == sixteenths.round())
        fits &= ((ratio * candidate == s) & (ratio <= 16)).all(dim=1, keepdim=True)
        best = torch.where(fits, candidate, best)
    if not bool((best > 0).all()):
        return None
    return best.to(torch.float32), (s / best).round_().to(torch.int32)


def two_level_scales(
    w: torch.Tensor,
    spec: QuantSpec,
    scale_dtype: torch.dtype = torch.bfloat16,
    costs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Two-level scales of `w` float [N, K] for a symmetric 4-bit group spec: [N, K/group] in `scale_dtype`.

    S = the largest scale of the row / 16, rounded up to 4 significant bits; m = the one of 1..16 with the least squared
    error of its group, each column's error times `costs` fp32 [K] if given. A group of zeros has m = 1, a row of zeros
    S = 1.
    """
    groups = _check_weight(w, spec)
    if spec.weight_bits != 4 or not spec.symmetric:
        raise FormatError(f"two-level scales are for symmetric 4-bit weights, not {spec}")
    # 8 * 2^-24 is the least fp16 number whose 16 multiples by 4-bit mantissas are all exact; bf16 and fp32 reach lower.
    floor = 2.0**-21 if scale_dtype == torch.float16 else 2.0**-120
    out = torch.empty(w.shape[0], groups, dtype=scale_dtype, device=w.device)
    for part in _row_ranges(*w.shape):
        x = _grouped(w[part], groups)
        free = x.abs().amax(dim=2) / 7.5
        if not bool(torch.isfinite(free).all()):
            raise FormatError("a weight holds NaN or Inf; repair the source, no scale can be found for it")
        mantissa, exponent = torch.frexp(free.amax(dim=1, keepdim=True) / 16)
        row = torch.ldexp(torch.ceil(mantissa * 16), exponent - 4)
        row = torch.where(row == 0, torch.ones_like(row), row.clamp_min(floor))
        best = torch.full_like(free, torch.inf)
        m_best = torch.ones_like(free)
        for m in range(1, 17):
            s = (row * m).unsqueeze(2)
            squares = (x / s).clamp_(-8, 7).round_().mul_(s).sub_(x).square_()
            error = (squares if costs is None else squares.mul_(costs.view(groups, -1))).sum(dim=2)
            better = error < best
            best = torch.where(better, error, best)
            m_best = torch.where(better, torch.full_like(m_best, m), m_best)
        out[part] = (row * m_best).to(scale_dtype)
    return out
