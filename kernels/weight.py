"""What the contracts of the matmuls ask of a weight. Bodies read raw memory, so its size is checked before them.

Packings are those of formats/layout.py: K is padded to 128 codes, N to the rows below; a padded scale is 0.
"""

from __future__ import annotations

import functools

import torch

from ..formats.layout import PACKINGS, padded_shape
from ..formats.spec import GROUPS
from ..formats.tensor import QuantTensor


@functools.cache
def packed_size(n: int, k: int, group: int, packing: str) -> tuple[int, int, int]:
    """(bytes of data, rows of scale, columns of scale) of a weight [n, k] in a packing; KeyError if there is none such."""
    if packing not in PACKINGS:
        raise KeyError(packing)
    rows, columns = padded_shape((n, k), packing)
    codes_per_byte = 2 if packing.endswith("w4") else 1
    return rows * columns // codes_per_byte, 1 if group == k else columns // group, rows


def expect_spec(op: str, w: QuantTensor, bits: int, symmetric_only: bool, rows_only: bool) -> None:
    """ValueError unless the weight's spec is one that op `op` multiplies."""
    spec = w.spec
    wrong = spec.float_format is not None or spec.weight_bits != bits
    if wrong or (symmetric_only and not spec.symmetric) or (rows_only and spec.group is not None):
        kind = (
            f"{bits}-bit{' symmetric' if symmetric_only else ''} codes{' with one scale per row' if rows_only else ''}"
        )
        raise ValueError(f"{op}: the weight is {spec}, expected {kind}; kernels.linear.linear takes the op that fits")


def fp32_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    """The flat form of a bias: fp32, which holds every bf16 and fp16 value."""
    return bias if bias is None or bias.dtype == torch.float32 else bias.float()


def check_weight(
    op: str, w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, n: int, k: int, group: int, packing: str
) -> None:
    """ValueError unless w, scale and zero have the sizes that `packing` gives a weight [n, k]."""
    if n < 1 or k < 1:
        raise ValueError(f"{op}: the weight is [{n}, {k}], expected at least one row and one column")
    if group != k and (group not in GROUPS or k % group):
        raise ValueError(f"{op}: group is {group}, expected K = {k} or a divisor of it out of {GROUPS}; requantise")
    if packing == "plain":
        if w.dtype != torch.int8 or w.shape != (n, k):
            raise ValueError(f"{op}: w is {w.dtype} {tuple(w.shape)}, expected int8 {(n, k)} for packing plain")
        if not scale.is_floating_point():
            raise ValueError(f"{op}: scale is {scale.dtype}, expected a float dtype")
        rows, columns = n, k // group
    else:
        if packing not in PACKINGS:
            raise ValueError(f"{op}: packing {packing!r} is unknown, expected plain or one of {', '.join(PACKINGS)}")
        size, rows, columns = packed_size(n, k, group, packing)
        if w.numel() * w.element_size() != size:
            found = f"{w.numel() * w.element_size()} bytes"
            raise ValueError(
                f"{op}: w holds {found}, expected {size} for [{n}, {k}] packed as {packing}; pack it again"
            )
        # Scale words hold scale and zero point in one int32 (formats/layout.py).
        if scale.dtype != torch.float32 and (scale.dtype != torch.int32 or not packing.startswith("planes16_")):
            raise ValueError(f"{op}: scale is {scale.dtype}, expected float32 in packing {packing}; pack it again")
    if scale.shape != (rows, columns) and not (
        scale.ndim == 2 and _has_more(scale, rows, columns, group == k, packing)
    ):
        raise ValueError(
            f"{op}: scale has shape {tuple(scale.shape)}, expected {(rows, columns)} for group {group} in packing {packing}"
        )
    if zero is not None and (zero.dtype != torch.int8 or zero.shape != scale.shape):
        raise ValueError(f"{op}: zero is {zero.dtype} {tuple(zero.shape)}, expected int8 {tuple(scale.shape)}")
    if not (w.is_contiguous() and scale.is_contiguous() and (zero is None or zero.is_contiguous())):
        raise ValueError(f"{op}: w, scale or zero is not contiguous; call .contiguous() once at load")


def _has_more(scale: torch.Tensor, rows: int, columns: int, one_group: bool, packing: str) -> bool:
    """Rows behind those of the groups: of padding when a spec names a group as long as K; the row S of two-level scales."""
    if packing == "plain" or scale.shape[1] != columns:
        return False
    if one_group:
        return scale.shape[0] > 1
    return packing in ("planes8_w4", "rows16_k4_w4") and scale.shape[0] == rows + 1


def check_rows(op: str, x: torch.Tensor, k: int, name: str = "x") -> None:
    """ValueError unless `x` is [M, k] with a contiguous last dimension."""
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected [M, {k}]; flatten the leading dimensions")
    if k > 1 and x.stride(1) != 1:
        raise ValueError(
            f"{op}: {name} has strides {x.stride()}, expected a contiguous last dimension; call .contiguous()"
        )


def check_per_row(op: str, name: str, values: torch.Tensor, dtype: torch.dtype, m: int) -> None:
    """ValueError unless `values` is contiguous [m] of `dtype`, one number per row of x."""
    if values.dtype != dtype or values.shape != (m,) or not values.is_contiguous():
        found = f"{values.dtype} {tuple(values.shape)}"
        raise ValueError(f"{op}: {name} is {found}, expected contiguous {dtype} {(m,)}, as quantize_rows returns it")


def check_place(op: str, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    """ValueError unless all tensors are on the device of x."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x on {x.device}; move one of them")


def check_bias(op: str, bias: torch.Tensor | None, n: int) -> None:
    """ValueError unless the flat bias is None or fp32 [n]."""
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (n,)):
        raise ValueError(f"{op}: bias is {bias.dtype} {tuple(bias.shape)}, expected float32 {(n,)}")


def wrong_packing(packing: str, wanted: str) -> str | None:
    """None, or the refusal of a body that reads another packing."""
    if packing == wanted:
        return None
    return (
        f"reads a weight packed as {wanted}, this one is {packing}; pack it once with kernels.linear.prepare(w, device)"
    )


def values(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group: int) -> torch.Tensor:
    """(code - zero) * scale of plain codes [N, K]: fp32 [N, K]. For references and tolerances; exact for 16-bit scales."""
    codes = w.float()
    if zero is not None:
        codes = codes - zero.float().repeat_interleave(group, 1)[:, : w.shape[1]]
    return codes * scale.float().repeat_interleave(group, 1)[:, : w.shape[1]]


def ulp(values: torch.Tensor) -> torch.Tensor:
    """Distance from each value to the next larger one of its dtype, fp32. 0 at NaN and Inf."""
    _, exponent = torch.frexp(values.float())
    info = torch.finfo(values.dtype)
    step = torch.ldexp(torch.full_like(values, info.eps, dtype=torch.float32), exponent - 1)
    step = step.where(values != 0, torch.zeros_like(step)).clamp_min(info.eps * info.tiny)
    return step.where(torch.isfinite(values), torch.zeros_like(step))


def weight_bytes(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bias: torch.Tensor | None) -> int:
    """Bytes of a weight and its bias as they lie in memory, each read once."""
    return sum(t.numel() * t.element_size() for t in (w, scale, zero, bias) if t is not None)
