"""RTN: round to nearest. Data-free; every row stands alone, so a weight may come in row ranges.

Scales: `search` (default) takes, per group, the one of 80 shrunk scales with the least error (kernels/search_scale);
without it the largest weight sets the scale. `w4a8-g*` takes two-level scales, whose search is part of their definition
(formats/affine.py). The scale is rounded to its storage dtype before any code is found.
"""

from __future__ import annotations

import torch

from ...formats import affine
from ...formats.spec import FormatError, QuantSpec
from ...kernels.search_scale import search_scale
from .records import Option, Rounded, signal_and_noise

OPTIONS = {
    "search": Option(bool, True, "try 80 shrunk scales per group and keep the best"),
    "norm": Option(float, 2.0, "exponent of the error that the search sums", 1.0, 4.0),
    "body": Option(str, "", "which body searches: empty for the fast one, 'reference' for plain torch (slow)"),
}


def serves(spec: QuantSpec) -> str | None:
    """None, or why RTN has no such spec."""
    return None if spec.float_format is None else f"rtn rounds to integers, {spec} is a float format"


def rtn(
    weight: torch.Tensor,
    stats: None,
    spec: QuantSpec,
    *,
    scale_dtype: torch.dtype,
    bound: torch.Tensor | None = None,
    search: bool = True,
    norm: float = 2.0,
    body: str = "",
) -> Rounded:
    """Rounds weight fp32 [N, K]. FormatError for NaN, Inf, a group that does not divide K, a scale out of range.

    `stats` is what calibrated methods read; RTN reads none. bound fp32 [N, groups]: the largest |w| that a scale has to
    cover (AWQ's clip), so there is nothing left to search; None = all. Facts: signal and noise, sums of squares in fp64.
    """
    two_level = spec.act_bits == 8 and spec.group is not None
    scale = zero = None
    if bound is not None and not two_level:
        _check_range(weight, spec, scale_dtype)
        grouped, most = weight.reshape(*bound.shape, -1), bound.unsqueeze(2)
        covered = torch.minimum(torch.maximum(grouped, -most), most).reshape(weight.shape)
        scale, zero = affine.find_scales(covered, spec, scale_dtype)
        free = torch.isinf(bound).all(dim=1)  # rows without a bound
        if search and bool(free.any()):
            scale[free] = search_scale(weight[free], spec, scale_dtype, norm, impl=body or None)
    elif search and not two_level:
        _check_range(weight, spec, scale_dtype)
        zero = None if spec.symmetric else affine.find_scales(weight, spec, scale_dtype)[1]
        scale = search_scale(weight, spec, scale_dtype, norm, impl=body or None)
    tensor = affine.quantize(weight, spec, scale_dtype, scale, zero)
    return Rounded(tensor, signal_and_noise(weight, tensor.data, tensor.scale, tensor.zero, spec))


def _check_range(weight: torch.Tensor, spec: QuantSpec, dtype: torch.dtype) -> None:
    """The search has no opinion on NaN, nor on scales that its dtype cannot hold: they are refused before it."""
    widest = float(weight.abs().amax()) if weight.numel() else 0.0
    if not widest < float("inf"):
        raise FormatError("a weight holds NaN or Inf; repair the source, no scale can be found for it")
    scale = 2 * widest / ((1 << spec.weight_bits) - 1)
    if scale > torch.finfo(dtype).max:
        raise FormatError(f"a scale of {scale:.3g} does not fit into {dtype}; store scales as torch.bfloat16")
