"""What else multiplies the same numbers on this machine. Each rival is optional, and says why when it is not there.

A rival gets the same values as we do: the weight of the case as floats, or the very codes and scales. Its own packing
lies outside the timed region, as ours does; quantising activations lies inside where its name says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..formats import affine
from ..formats.tensor import QuantTensor
from ..kernels.quantize_rows import quantize_rows

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Rival:
    """`absent(x, w)` is None or why it cannot run this case; `make(x, w)` packs its own copy of the weight and returns
    the call; `bits` a weight takes. `exact` rivals must agree with the float product, others may leave scales out."""

    name: str
    bits: float
    absent: Callable[[torch.Tensor, QuantTensor], str | None]
    make: Callable[[torch.Tensor, QuantTensor], Call]
    exact: bool = True


def floats(device: torch.device, x: torch.Tensor) -> tuple[Rival, ...]:
    """torch's own matmul: in the type of x on a card, in each float type on a CPU (the fastest is the baseline).

    On a CPU a single row also goes through torch.mv, which is faster there than F.linear for some types.
    """
    if device.type == "cuda":
        return (_float(x.dtype),)
    types = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(_float(dtype) for dtype in types) + tuple(_row(dtype) for dtype in types if x.shape[0] == 1)


def _float(dtype: torch.dtype) -> Rival:
    def make(x: torch.Tensor, w: QuantTensor) -> Call:
        dense, rows = affine.dequantize(w, dtype), x.to(dtype)
        return lambda: F.linear(rows, dense)

    return Rival(f"torch {str(dtype).removeprefix('torch.')}", 8.0 * dtype.itemsize, lambda x, w: None, make)


def _row(dtype: torch.dtype) -> Rival:
    def make(x: torch.Tensor, w: QuantTensor) -> Call:
        dense, row = affine.dequantize(w, dtype), x[0].to(dtype)
        return lambda: torch.mv(dense, row)[None]

    return Rival(f"torch {str(dtype).removeprefix('torch.')} mv", 8.0 * dtype.itemsize, lambda x, w: None, make)


def _int_mm_absent(x: torch.Tensor, w: QuantTensor) -> str | None:
    if str(w.spec) != "w8a8":
        return f"multiplies int8 by int8, this is {w.spec}"
    if x.is_cuda and x.shape[0] <= 16:
        return f"M = {x.shape[0]} is refused below 17 (pytorch#178469)"
    if x.is_cuda and (x.shape[1] % 8 or w.shape[0] % 8):
        return f"wants K and N in multiples of 8, these are {x.shape[1]} and {w.shape[0]}"
    return None


def _int_mm_bare(x: torch.Tensor, w: QuantTensor) -> Call:
    xq = quantize_rows(x)[0]
    codes = w.data.clone().t()
    return lambda: torch._int_mm(xq, codes)


def _int_mm_whole(x: torch.Tensor, w: QuantTensor) -> Call:
    codes, scale = w.data.clone().t(), w.scale.float().t().contiguous()

    def call() -> torch.Tensor:
        xq, sx, _ = quantize_rows(x)
        return (torch._int_mm(xq, codes) * sx[:, None] * scale).to(x.dtype)

    return call


def _int4pack_absent(x: torch.Tensor, w: QuantTensor) -> str | None:
    if x.is_cuda:
        return "its card body (tinygemm) has another packing and is not compared here"
    if w.spec.weight_bits != 4 or w.spec.group is None or not w.spec.symmetric:
        return f"wants symmetric 4-bit weights with groups, this is {w.spec}"
    return None if w.shape[0] % 16 == 0 else f"wants N in multiples of 16, this is {w.shape[0]}"


def _int4pack(x: torch.Tensor, w: QuantTensor) -> Call:
    rows, group = x.to(torch.bfloat16), w.spec.group
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu((w.data.to(torch.int32) + 8), 1)
    scale = w.scale.to(torch.bfloat16).t()
    both = torch.stack([scale, torch.zeros_like(scale)], dim=2).contiguous()  # [K/g, N, 2]: scale, and zero / scale
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(rows, words, group, both)


def _int8pack_absent(x: torch.Tensor, w: QuantTensor) -> str | None:
    if w.spec.weight_bits != 8 or w.spec.group is not None:
        return f"wants 8-bit weights with a scale per row, this is {w.spec}"
    return "has no body for a card in this torch" if x.is_cuda else None


def _int8pack(x: torch.Tensor, w: QuantTensor) -> Call:
    rows, codes, scale = x.to(torch.bfloat16), w.data.clone(), w.scale[:, 0].to(torch.bfloat16)
    return lambda: torch.ops.aten._weight_int8pack_mm(rows, codes, scale)


QUANTISED = (
    Rival("torch._int_mm alone", 8, _int_mm_absent, _int_mm_bare, exact=False),
    Rival("torch._int_mm + quantize_rows + scales", 8, _int_mm_absent, _int_mm_whole),
    Rival("torch._weight_int4pack_mm_for_cpu", 4.5, _int4pack_absent, _int4pack),
    Rival("torch._weight_int8pack_mm", 8, _int8pack_absent, _int8pack),
)
