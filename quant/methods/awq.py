"""AWQ (arXiv 2306.00978): channels that inputs use much are scaled up before rounding, and their input down.

    readers W -> W * s        producer x -> x / s        error  dW = decode(code(W * s)) / s - W

Candidates: the identity, and s = xmean^a / wmean^(1-a) for a = 0, .05 .. .95, with and without wmean (xmean: mean |x| of
a channel; wmean: mean over rows of |w| / largest of its group), divided by sqrt(max * min). What a candidate costs
depends on the rounding that follows:

    loss "gram"   tr(dW G dW^T), G = sum x x^T         what rounding to nearest leaves
    loss "gptq"   sum over n, i of dW[n, i]^2 * D[i]   what GPTQ leaves: each column makes good for those before it, and
                                                       D[i] is what remains of x[i] (methods/gptq.py)

An error that GPTQ can make good for costs it nothing, so scales chosen for one rounding are not the best for the other.
From the best candidate, `refine` steps of gradient descent follow on what the errors are expected to cost (channels.py;
for "gram", D = diag(G): errors of rounding to nearest do not know of each other). The result stays only if it costs less.

Clip: per group the largest |w s| that the scale has to cover is shrunk by 1, .95 .. .55, and what costs least stays: by
the group's own block of G, or by D.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...formats.spec import QuantSpec
from ...kernels import rows as int8
from . import channels, gptq
from .channels import sampled_rows, tied
from .records import LinearGroup, Option, Stats, Transform

LOSSES = ("gram", "gptq")
OPTIONS = {
    "grid": Option(int, 20, "how many exponents are tried", 1, 100),
    "duo": Option(bool, True, "candidates that look at the weights as well as at the inputs"),
    "clip": Option(bool, True, "search how much of the largest weights a scale has to cover"),
    "loss": Option(str, "auto", "what is kept small: gram, gptq, or auto: what the rounding that follows goes by"),
    "refine": Option(int, 40, "steps of gradient descent on the scales, from the best candidate", 0, 1000),
    "rows": Option(int, 1024, "rows of the readers that the search for scales looks at", 16, 1 << 20),
    "damp": Option(float, 0.01, "added to diag(G), as a share of its mean, where loss is gptq", 0.0, 1.0),
}
SHRINK = tuple(1 - 0.05 * i for i in range(10))
_WORK = 1 << 34  # multiply-adds of one gram product in the search: beyond it fewer rows are looked at
_PIECE = 1 << 18  # weights per step: temporaries stay in the cache
_BLOCK = 512  # groups up to this size are clipped by their block of G


def serves(spec: QuantSpec) -> str | None:
    """None, or why AWQ is of no use for such a spec."""
    return None if spec.float_format is None else f"awq scales for integers, {spec} is a float format"


def awq(
    group: LinearGroup,
    spec: QuantSpec,
    *,
    scale_dtype: torch.dtype,
    grid: int = 20,
    duo: bool = True,
    clip: bool = True,
    loss: str = "gram",
    refine: int = 40,
    rows: int = 1024,
    damp: float = 0.01,
) -> Transform:
    """The scale of a group, and bounds for those of its readers that may be clipped. ValueError for an unknown loss.

    Each reader counts at its own spec (`group.specs`; `spec` is the group's main one), readers without one cost nothing.
    Channels that no token reached keep scale 1. Identity when nothing is quantised or no token was seen.
    Facts: loss, candidate ("identity", or its exponent, "+w" when it looked at weights), refined, gain (cost over the
    identity's), clipped (share of groups), unseen (channels), why (of an identity).
    """
    if loss not in LOSSES:
        raise ValueError(f"awq: loss is {loss!r}, expected one of {', '.join(LOSSES)}")
    stats = group.stats
    one = torch.ones_like(stats.absmean)
    why = _no_search(group)
    if why is not None:
        return Transform(one, {}, {"candidate": "identity", "why": why})
    cost = _Cost.of(group, loss, rows, damp, scale_dtype)
    facts: dict[str, Any] = {"loss": loss, "candidate": "identity", "refined": False}
    best, least = one, cost.of_scale(one)
    first = least
    for name, scale in _candidates(cost, group, grid, duo):
        found = cost.of_scale(scale)
        if found < least:
            best, least, facts["candidate"] = scale, found, name
    if refine:
        scale = cost.refined(best, refine)
        found = cost.of_scale(scale)
        if found < least:
            best, least, facts["refined"] = scale, found, True
    facts["gain"] = round(least / first, 4) if first > 0 else 1.0
    facts["unseen"] = int((stats.absmean <= 0).sum())
    bounds, shares = {}, []
    for name in group.clips if clip else ():
        its = group.specs.get(name)
        if its is None or (its.act_bits == 8 and its.group is not None):
            continue  # two-level scales are searched where they are made
        bounds[name], share = cost.bounds(group.readers[name], best, its)
        shares.append(share)
    if shares:
        facts["clipped"] = round(sum(shares) / len(shares), 4)
    return Transform(best, bounds, facts)


def _no_search(group: LinearGroup) -> str | None:
    """Why the identity is all there is, or None."""
    if not any(name in group.specs for name in group.readers):
        return "no reader is quantised"
    if group.stats.tokens == 0:
        return "no token reached this input"
    if not bool((group.stats.absmean > 0).any()):
        return "every input was zero"
    if not bool(torch.isfinite(group.stats.gram).all() & torch.isfinite(group.stats.absmean).all()):
        return "the statistics hold NaN or Inf"
    return None


@dataclass(frozen=True, eq=False)
class _Cost:
    """What a scale costs. weights: rows looked at, by spec. each fp32 [K]: what an error of a channel costs."""

    stats: Stats
    ties: tuple[int, int, int] | None
    weights: dict[QuantSpec, torch.Tensor]
    searched: dict[QuantSpec, torch.Tensor]
    each: torch.Tensor
    loss: str
    dtype: torch.dtype

    @staticmethod
    def of(group: LinearGroup, loss: str, rows: int, damp: float, dtype: torch.dtype) -> _Cost:
        stats = group.stats
        weights = sampled_rows(group, rows)
        searched = weights
        if loss == "gram":
            searched = sampled_rows(group, min(rows, max(128, _WORK // stats.gram.shape[0] ** 2)))
        return _Cost(stats, group.ties, weights, searched, _each(stats, loss, damp), loss, dtype)

    def of_scale(self, scale: torch.Tensor) -> float:
        """The cost of `scale` fp32 [K] on the rows looked at; identity and candidates are measured alike."""
        total = 0.0
        for spec, weight in self.searched.items():
            scaled = weight * scale
            error = _rounding_error(scaled, spec, self.dtype).div_(scale)
            if self.loss == "gram":
                total += float(torch.dot((error @ self.stats.gram).flatten(), error.flatten()))
            else:
                total += float(error.square_().sum(0).double() @ self.each.double())
            if spec.act_bits == 8 and self.stats.sample.shape[0]:
                total += self._inputs(scaled, scale)
        return total

    def _inputs(self, scaled: torch.Tensor, scale: torch.Tensor) -> float:
        """What int8 inputs add: their errors on the sample, channel by channel, as if they did not know of each other."""
        x = self.stats.sample / scale
        codes, steps, _ = int8.quantize(x)
        error = (codes.float() * steps[:, None]).sub_(x).square_().mean(0)
        return float(error.double() @ scaled.square().sum(0).double()) * self.stats.tokens

    def refined(self, scale: torch.Tensor, steps: int) -> torch.Tensor:
        """`scale` after `steps` steps down the gradient of what it is expected to cost."""
        terms = [channels.of_weights(w, spec, self.each) for spec, w in self.weights.items()]
        eight = [w for spec, w in self.weights.items() if spec.act_bits == 8]
        if eight and self.stats.sample.shape[0]:
            terms.append(channels.of_inputs(self.stats.sample, eight, self.stats.tokens))
        free = tied(self.stats.absmean, self.ties) > 0
        return channels.descend(scale, terms, steps, free, self.ties)

    def bounds(self, weight: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, float]:
        """(largest |W * scale| to cover fp32 [N, groups], share of groups that are clipped) of weight [N, K]."""
        rows, columns = weight.shape
        groups = spec.groups(columns)
        size = columns // groups
        blocks = self._blocks(scale, groups) if self.loss == "gram" and size <= _BLOCK else None
        each = (self.each / scale.square()).view(groups, size)
        out = torch.empty(rows, groups, device=weight.device)
        clipped = 0
        step = max(1, _PIECE // max(columns, 1))
        for start in range(0, rows, step):
            w = (weight[start : start + step].float() * scale).view(-1, groups, size)
            low, high = torch.aminmax(w, dim=2)
            full = torch.maximum(high, -low)
            best, least = full, torch.full_like(full, torch.inf)
            for shrink in SHRINK:
                bound = full * shrink
                error = _errors(w, torch.maximum(low, -bound), torch.minimum(high, bound), spec, self.dtype)
                if blocks is None:
                    cost = torch.einsum("ngi,gi->ng", error.square_(), each)
                else:
                    e = error.transpose(0, 1)  # [groups, rows, size]
                    cost = torch.bmm(e, blocks).mul_(e).sum(2).T
                better = cost < least
                least = torch.where(better, cost, least)
                best = torch.where(better, bound, best)
            out[start : start + step] = best
            clipped += int((best < full).sum())
        return out, clipped / max(rows * groups, 1)

    def _blocks(self, scale: torch.Tensor, groups: int) -> torch.Tensor:
        """The blocks of G on its diagonal, one for each group, for inputs x / scale: [groups, size, size]."""
        size = self.stats.gram.shape[0] // groups
        inner = torch.arange(groups, device=scale.device)
        blocks = self.stats.gram.view(groups, size, groups, size)[inner, :, inner, :]
        s = scale.view(groups, size)
        return blocks / s[:, :, None] / s[:, None, :]


def _each(stats: Stats, loss: str, damp: float) -> torch.Tensor:
    """What an error of each channel costs, fp32 [K]; 0 for channels that no token reached."""
    diagonal = stats.gram.diagonal().clone()
    dead = diagonal <= 0
    if loss == "gptq":
        factor = gptq.prepare(stats, damp=damp)
        if factor.upper is not None:
            diagonal[factor.order] = factor.variance * factor.mean
            return diagonal.masked_fill_(dead, 0.0)
    diagonal += damp * diagonal.mean()
    return diagonal.masked_fill_(dead, 0.0)


def _rounding_error(weight: torch.Tensor, spec: QuantSpec, dtype: torch.dtype) -> torch.Tensor:
    """decoded - weight of weight fp32 [N, K] rounded to nearest without a search."""
    grouped = weight.view(weight.shape[0], spec.groups(weight.shape[1]), -1)
    out = torch.empty_like(grouped)
    step = max(1, _PIECE // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], step):
        w = grouped[start : start + step]
        out[start : start + step] = _errors(w, *torch.aminmax(w, dim=2), spec, dtype)
    return out.view_as(weight)


def _errors(
    w: torch.Tensor, low: torch.Tensor, high: torch.Tensor, spec: QuantSpec, dtype: torch.dtype
) -> torch.Tensor:
    """decoded - w of w fp32 [N, groups, size] by scales that cover low..high [N, groups]: affine.py's, in fewer passes."""
    steps = (1 << spec.weight_bits) - 1
    span = torch.maximum(high, -low) * 2 if spec.symmetric else high.clamp(min=0) - low.clamp(max=0)
    scale = (span / steps).to(dtype).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(2)
    t = w / scale
    if spec.symmetric:
        return t.clamp_(spec.qmin, spec.qmax).round_().mul_(scale).sub_(w)
    zero = (spec.qmin - low.clamp(max=0).unsqueeze(2) / scale).clamp_(spec.qmin, spec.qmax).round_()
    return t.add_(zero).clamp_(spec.qmin, spec.qmax).round_().sub_(zero).mul_(scale).sub_(w)


def _candidates(cost: _Cost, group: LinearGroup, grid: int, duo: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, scale) of every candidate but the identity."""
    seen = tied(group.stats.absmean, group.ties) > 0
    x = tied(group.stats.absmean, group.ties)
    total = torch.zeros_like(x)
    count = 0
    for spec, weight in cost.weights.items():
        grouped = weight.abs().view(weight.shape[0], spec.groups(weight.shape[1]), -1)
        total += (grouped / (grouped.amax(2, keepdim=True) + 1e-6)).view_as(weight).sum(0)
        count += weight.shape[0]
    w = tied(total / max(count, 1), group.ties)
    for i in range(grid):
        a = i / grid
        if a > 0:
            yield f"{a:.2f}", _settled(x**a, seen)
        if duo:
            yield f"{a:.2f}+w", _settled(x**a / (w ** (1 - a) + 1e-4), seen)


def _settled(scale: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """`scale` in the middle of its range, not below 1e-4 before; 1 where it means nothing."""
    good = seen & torch.isfinite(scale)
    if not bool(good.any()):
        return torch.ones_like(scale)
    scale = torch.where(good, scale, torch.ones_like(scale)).clamp(min=1e-4)
    high, low = scale[good].amax(), scale[good].amin()
    return torch.where(good, scale / (high * low).sqrt(), torch.ones_like(scale))
