"""search_scale(w fp32 [N, K], spec, scale_dtype, norm=2.0) -> scale [N, K/group] in scale_dtype, all > 0."""

from __future__ import annotations

import torch

from ...formats.spec import QuantSpec
from ..op import DTYPE_CODES, Cost, pointer

SCHEMA = "(Tensor w, int bits, int group, bool symmetric, int scale_dtype, float norm) -> Tensor"
TRIALS = 80  # p = 1 - i/100, i = 0 .. 79
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}

Flat = tuple[torch.Tensor, int, int, bool, int, float]


def unwrap(w: torch.Tensor, spec: QuantSpec, scale_dtype: torch.dtype, norm: float = 2.0) -> Flat:
    """`group` of the flat form is always a number of weights: K when a row has one scale."""
    if spec.float_format is not None:
        raise ValueError(f"search_scale: {spec} has no integer codes; take an integer spec, such as w4a16-g128")
    if scale_dtype not in DTYPE_CODES:
        raise ValueError(f"search_scale: scale_dtype is {scale_dtype}, expected float32, bfloat16 or float16")
    group = spec.group if spec.group is not None else max(int(w.shape[-1]), 1)
    return w, spec.weight_bits, group, spec.symmetric, DTYPE_CODES[scale_dtype], float(norm)


def check(w: torch.Tensor, bits: int, group: int, symmetric: bool, scale_dtype: int, norm: float) -> None:
    if w.ndim != 2 or w.dtype != torch.float32:
        raise ValueError(f"search_scale: w is {w.dtype} {tuple(w.shape)}, expected float32 [N, K]")
    if group < 1 or w.shape[1] % group:
        raise ValueError(f"search_scale: rows of w have {w.shape[1]} weights, expected a multiple of the group {group}")
    if not 2 <= bits <= 8:
        raise ValueError(f"search_scale: bits is {bits}, expected 2 to 8")
    if scale_dtype not in _DTYPES:
        raise ValueError(f"search_scale: scale_dtype is code {scale_dtype}, expected one of {sorted(_DTYPES)}")
    if not 0.5 <= norm <= 8.0:
        raise ValueError(f"search_scale: norm is {norm}, expected 0.5 to 8")


def dtype_of(code: int) -> torch.dtype:
    """The torch dtype of a code of csrc/ops.h."""
    return _DTYPES[code]


def out_like(w: torch.Tensor, bits: int, group: int, symmetric: bool, scale_dtype: int, norm: float) -> torch.Tensor:
    return w.new_empty((w.shape[0], w.shape[1] // group), dtype=_DTYPES[scale_dtype])


def cost(w: torch.Tensor, bits: int, group: int, symmetric: bool, scale_dtype: int, norm: float) -> Cost:
    n, k = w.shape
    return Cost(flops=TRIALS * 7 * n * k, bytes=4 * n * k + n * (k // group) * _DTYPES[scale_dtype].itemsize)


def native(
    out: torch.Tensor, w: torch.Tensor, bits: int, group: int, symmetric: bool, scale_dtype: int, norm: float
) -> tuple:
    """(w, scale, N, K, stride_wn, bits, group, symmetric, scale dtype code, norm); scale is contiguous [N, K/group]."""
    n, k = w.shape
    return (pointer(w), pointer(out), n, k, w.stride(0), bits, group, int(symmetric), scale_dtype, float(norm))


def tolerance(w: torch.Tensor, bits: int, group: int, symmetric: bool, scale_dtype: int, norm: float) -> dict:
    """Two scales may lie an ulp apart in error, so bodies are held to the error they reach, summed per group."""
    return {"loss_rtol": 1e-4}


def cpu_takes(w: torch.Tensor, bits: int, group: int, symmetric: bool, scale_dtype: int, norm: float) -> str | None:
    return None
