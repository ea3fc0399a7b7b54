"""HQQ (mobiusml/hqq): data-free; scales and zeros that leave the least sum |error|^p with p < 1.

Such a norm lets a few weights be wrong so that most are right. Half-quadratic splitting gives the large errors to an
auxiliary e and fits the rest by least squares, in turns, for each group of weights w:

    q = code(w / s + z)
    e = shrink(w / s - (q - z))        shrink(x) = sign(x) * max(0, |x| - |x|^(p - 1) / beta)
    s = s * sum (q - z) (w / s - e) / sum (q - z)^2
    beta = kappa * beta

The paper fits z instead, z = mean(q - (w / s - e)), and leaves it real. Files hold whole zeros, and that fit moves a
zero by less than half a step: rounded, it is where it was (less than one in 1000 of 37,632 groups moved). So the scale
is fitted, and an asymmetric group tries the zeros beside its own as well, each with turns of its own; a third move.
Errors are measured in steps of s, so that a weight and twice that weight get the same codes (the paper's code takes
weights as they are, and what beta = 10 means then depends on how large they happen to be).

Each group keeps the best it has seen, by sum |error|^p of what is stored: whole zeros, scales in their dtype. Where it
starts is among them: the scales that RTN finds, with search and without. So no group is worse than either in that norm;
in the mean square RTN with search is the better one, and in KL on tiny-qwen3 too (w4a16-g64-asym .0082 against .0088).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...formats import affine
from ...formats.spec import FormatError, QuantSpec
from ...formats.tensor import QuantTensor
from ...kernels.search_scale import search_scale
from .records import Option, Rounded, signal_and_noise

OPTIONS = {
    "norm": Option(float, 0.7, "exponent of the error that is kept small", 0.1, 1.0),
    "beta": Option(float, 10.0, "how much of a large error is given up at first: less of it when higher", 0.1, 1e4),
    "kappa": Option(float, 1.01, "beta grows by this at every turn", 1.0, 2.0),
    "iterations": Option(int, 20, "turns of a scale; half of them for each of three zeros", 1, 1000),
}
_CHUNK = 1 << 17  # weights per step: temporaries stay in the cache
_HALF_EVEN = 1.5 * 2.0**23  # x + this - this is x rounded half to even


def serves(spec: QuantSpec) -> str | None:
    """None, or why HQQ has no such spec."""
    if spec.float_format is not None:
        return f"hqq rounds to integers, {spec} is a float format"
    if spec.act_bits == 8 and spec.weight_bits == 4:
        if spec.group is not None:
            return f"{spec} has two-level scales, and hqq fits the scale of each group freely; take rtn or gptq"
        return f"{spec} has one 4-bit scale per row, which asks for a calibration text; take rotate and gptq, or rtn"
    return None


@dataclass(frozen=True)
class _Turns:
    """The constants of the splitting."""

    norm: float
    beta: float
    kappa: float
    iterations: int

    def shrink(self, error: torch.Tensor, beta: float) -> torch.Tensor:
        """sign(x) * max(0, |x| - |x|^(p - 1) / beta), in place."""
        size = error.abs()
        keep = (size - size.pow(self.norm - 1.0).div_(beta)).clamp_(min=0)  # 0^(p - 1) is Inf, and nothing is kept
        return keep.copysign_(error)


def hqq(
    weight: torch.Tensor,
    stats: object,
    spec: QuantSpec,
    *,
    scale_dtype: torch.dtype,
    bound: torch.Tensor | None = None,
    norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> Rounded:
    """Rounds weight fp32 [N, K]. FormatError for NaN, Inf, a group that does not divide K, a scale out of range.

    `stats` and `bound` are what calibrated methods read: HQQ reads none, and finds by itself which weights to cut.
    Facts: signal, noise (records.py); error and error_start, sums of |error|^norm, at the end and with RTN's scales.
    """
    why = serves(spec)
    if why is not None:
        raise FormatError(why)
    turns = _Turns(norm, beta, kappa, iterations)
    scale, zero = affine.find_scales(weight, spec, scale_dtype)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    error = error_start = 0.0
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0] if weight.shape[1] else 0, step):
        part = slice(start, start + step)
        groups = _Groups(weight[part], scale[part], None if zero is None else zero[part], spec, turns)
        groups.offer(search_scale(weight[part], spec, scale_dtype).float(), groups.zero)
        error_start += float(groups.error.sum(dtype=torch.float64))
        groups.fit()
        error += float(groups.error.sum(dtype=torch.float64))
        scale[part] = groups.scale.to(scale_dtype)
        if zero is not None and groups.zero is not None:
            zero[part] = groups.zero.to(torch.int8)
        codes[part] = affine.encode(weight[part], scale[part], None if zero is None else zero[part], spec)
    tensor = QuantTensor(codes, scale, zero, spec, "plain", (weight.shape[0], weight.shape[1]))
    facts = {"error": error, "error_start": error_start}
    return Rounded(tensor, facts | signal_and_noise(weight, codes, scale, zero, spec))


class _Groups:
    """The groups of some rows, and the best scale and zero of each so far: fp32 [R, groups], values as stored."""

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, spec: QuantSpec, turns: _Turns
    ) -> None:
        self.w = weight.reshape(*scale.shape, -1)
        self.spec, self.turns, self.dtype = spec, turns, scale.dtype
        self.tiny = 2.0**-24 if self.dtype == torch.float16 else 2.0**-126
        self.scale = scale.float()
        self.zero = None if zero is None else zero.float()
        self.error = self._error(self.scale, self.zero)

    def _levels(self, x: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """q - z for x = w / s [R, groups, size]."""
        if zero is None:
            return x.clamp(self.spec.qmin, self.spec.qmax).add_(_HALF_EVEN).sub_(_HALF_EVEN)
        z = zero.unsqueeze(2)
        q = (x + z).clamp_(self.spec.qmin, self.spec.qmax).add_(_HALF_EVEN).sub_(_HALF_EVEN)
        return q.sub_(z)

    def _error(self, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """sum |value - w|^p of every group."""
        s = scale.unsqueeze(2)
        return self._levels(self.w / s, zero).mul_(s).sub_(self.w).abs_().pow_(self.turns.norm).sum(2)

    def offer(self, scale: torch.Tensor, zero: torch.Tensor | None) -> None:
        """Keeps scale and zero of the groups that they make better. Groups know nothing of each other."""
        error = self._error(scale, zero)
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.error = torch.where(better, error, self.error)
        if zero is not None and self.zero is not None:
            self.zero = torch.where(better, zero, self.zero)

    def fit(self) -> None:
        """Fits the scale in turns; with a zero, for it and for those beside it."""
        if self.zero is None:
            self._turns(self.scale, None, self.turns.iterations)
            return
        scale, zero = self.scale, self.zero
        for step in (0.0, -1.0, 1.0):
            beside = (zero + step).clamp_(self.spec.qmin, self.spec.qmax)
            self._turns(scale, beside, -(-self.turns.iterations // 2))

    def _turns(self, scale: torch.Tensor, zero: torch.Tensor | None, count: int) -> None:
        """Goes on from the scale that is not rounded, so that small steps add up; offers what would be stored."""
        beta = self.turns.beta
        for _ in range(count):
            scale = self._fitted_scale(scale, zero, beta)
            self.offer(scale.to(self.dtype).float().clamp_(min=self.tiny), zero)
            beta *= self.turns.kappa

    def _fitted_scale(self, scale: torch.Tensor, zero: torch.Tensor | None, beta: float) -> torch.Tensor:
        """The scale by least squares, without what `shrink` gives up."""
        x = self.w / scale.unsqueeze(2)
        levels = self._levels(x, zero)
        x -= self.turns.shrink(x - levels, beta)
        squares = levels.square().sum(2)
        fitted = scale * (levels * x).sum(2) / squares
        return torch.where((squares > 0) & (fitted > 0) & torch.isfinite(fitted), fitted, scale)
