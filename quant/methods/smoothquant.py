"""SmoothQuant (arXiv 2211.10438): what is large in the inputs is moved into the weights, so that int8 tokens keep the rest.

    s = absmax(x)^a / absmax(w)^(1-a)      readers W -> W * s      producer x -> x / s

absmax(w) of a channel is over all quantised readers. The exponent is searched, 0 meaning the identity: what counts is
the output error of the pair on a sample, weights rounded to nearest and inputs to int8 with one scale per token:

    sum over readers of |int8(x / s) decode(code(W * s))^T - x W^T|^2

From the best exponent, `refine` steps of gradient descent give each channel a scale of its own, by what the errors of
weights and inputs are expected to be (channels.py); the result stays only if its output error is less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...formats import affine
from ...formats.spec import QuantSpec
from ...kernels import rows as int8
from . import channels
from .channels import sampled_rows
from .records import LinearGroup, Option, Transform

GRID = (0.0, 0.5, 0.65, 0.8, 0.9)
OPTIONS = {
    "alpha": Option(float, -1.0, "share of the outliers that moves into the weights; below 0 = searched", -1.0, 1.0),
    "refine": Option(int, 40, "steps of gradient descent on the scales, from the best exponent", 0, 1000),
    "rows": Option(int, 1024, "rows of the readers that the search looks at", 16, 1 << 20),
}
_LEAST = 1e-5  # a smaller absmax counts as this


def serves(spec: QuantSpec) -> str | None:
    """None, or why SmoothQuant is of no use for such a spec."""
    if spec.float_format is not None:
        return f"smoothquant scales for integers, {spec} is a float format"
    if spec.act_bits != 8:
        return f"smoothquant helps int8 activations, {spec} keeps them at 16 bits; take awq"
    return None


def smoothquant(
    group: LinearGroup,
    spec: QuantSpec,
    *,
    scale_dtype: torch.dtype,
    alpha: float | None = None,
    grid: Sequence[float] = GRID,
    refine: int = 40,
    rows: int = 1024,
) -> Transform:
    """The scale of a group. alpha None or below 0 = the best of `grid` and the identity; 0 = the identity.

    Each reader counts at its own spec (`group.specs`; `spec` is the group's main one); one with 16-bit activations sees
    x as it is. Channels that no token reached keep scale 1. Facts: alpha, errors (alpha -> relative output error, when
    searched), refined, unseen (channels), why (of an identity that was not searched).
    """
    stats = group.stats
    one = torch.ones_like(stats.absmax)
    if not any(name in group.specs for name in group.readers):
        return Transform(one, {}, {"alpha": 0.0, "why": "no reader is quantised"})
    if stats.tokens == 0 or not bool((stats.absmax > 0).any()):
        return Transform(one, {}, {"alpha": 0.0, "why": "no token reached this input"})
    facts: dict[str, Any] = {"unseen": int((stats.absmax <= 0).sum())}
    weight = _absmax_of_readers(group)
    if alpha is not None and alpha >= 0:
        return Transform(_scale(stats.absmax, weight, alpha), {}, {"alpha": alpha, **facts})
    looked_at = sampled_rows(group, rows)
    exact = {its: stats.sample @ w.T for its, w in looked_at.items()}
    total = sum(float(y.double().square().sum()) for y in exact.values())

    def error(scale: torch.Tensor) -> float:
        """Of the outputs, relative; on the sample and the rows looked at."""
        x = stats.sample / scale
        codes, steps, _ = int8.quantize(x)
        short, off = codes.float() * steps[:, None], 0.0
        for its, w in looked_at.items():
            decoded = affine.dequantize(affine.quantize(w * scale, its, scale_dtype))
            y = (short if its.act_bits == 8 else x) @ decoded.T
            off += float((y - exact[its]).double().square().sum())
        return off / total if total else 0.0

    best, chosen, least = one, 0.0, float("inf")
    errors: dict[str, float] = {}
    for a in dict.fromkeys((0.0, *grid)):
        scale = _scale(stats.absmax, weight, a)
        found = error(scale)
        errors[f"{a:g}"] = float(f"{found:.4g}")
        if found < least:
            best, chosen, least = scale, a, found
    if refine:
        scale = _refined(best, group, looked_at, refine)
        found = error(scale)
        errors["refined"] = float(f"{found:.4g}")
        if found < least:
            best, facts["refined"] = scale, True
    return Transform(best, {}, {"alpha": chosen, "errors": errors, "refined": False, **facts})


def _refined(
    start: torch.Tensor, group: LinearGroup, looked_at: dict[QuantSpec, torch.Tensor], steps: int
) -> torch.Tensor:
    """The scale after `steps` steps from `start` down the gradient of the expected errors on the sample."""
    sample = group.stats.sample
    power = sample.square().sum(0)
    terms = [channels.of_weights(w, its, power) for its, w in looked_at.items()]
    eight = [w for its, w in looked_at.items() if its.act_bits == 8]
    if eight:
        terms.append(channels.of_inputs(sample, eight, sample.shape[0]))
    return channels.descend(start, terms, steps, group.stats.absmax > 0, None)


def _absmax_of_readers(group: LinearGroup) -> torch.Tensor:
    """fp32 [K]: the largest |w| of each channel over all quantised readers."""
    largest = torch.zeros_like(group.stats.absmax)
    for name in group.specs:
        if group.readers[name].shape[0]:
            low, high = torch.aminmax(group.readers[name].float(), dim=0)
            largest = torch.maximum(largest, torch.maximum(high, -low))
    return largest


def _scale(x: torch.Tensor, w: torch.Tensor, alpha: float) -> torch.Tensor:
    """absmax(x)^alpha / absmax(w)^(1 - alpha) with its geometric mean at 1; 1 for unseen channels; alpha 0 = ones."""
    seen = torch.isfinite(x) & torch.isfinite(w) & (x > 0)
    if alpha == 0 or not bool(seen.any()):
        return torch.ones_like(x)
    log = alpha * x.clamp(min=_LEAST).log() - (1 - alpha) * w.clamp(min=_LEAST).log()
    return torch.where(seen, (log - log[seen].mean()).exp(), torch.ones_like(x))
