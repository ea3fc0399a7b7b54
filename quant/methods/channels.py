"""Scales per channel between what makes an input and the linears that read it: what the methods that search them share.

What a scale s [K] will cost can be said before anything is rounded. Errors of rounding are even within a step and do not
know of each other, so a row v of numbers that share a step of max|v| / c leaves (max|v| / c)^2 / 12 on each of them:

    weights   sum over rows n, groups g of (max_g |w[n]| s)^2 * sum over i in g of each[i] / s[i]^2
    inputs    sum over tokens t         of (max |x[t]| / s)^2 * sum over i of |W[:, i]|^2 s[i]^2

Both have a gradient in log s, and `descend` follows it: s has a value for each channel, not one exponent for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...formats.spec import QuantSpec
from .records import LinearGroup

Ties = tuple[int, int, int]
_WIDEST = math.log(256.0)  # largest scale over 1, and 1 over the smallest
_RATE = 0.1  # first step of the descent, in units of log s; falls to 0


def tied(values: torch.Tensor, ties: Ties | None) -> torch.Tensor:
    """values [K] with the mean over the query heads that share a key head in place of each."""
    if ties is None:
        return values
    return values.view(ties).mean(1, keepdim=True).expand(ties).reshape(-1)


def sampled_rows(group: LinearGroup, rows: int) -> dict[QuantSpec, torch.Tensor]:
    """About `rows` rows of all quantised readers together, every n-th of each: spec -> fp32 [rows, K]."""
    total = sum(group.readers[name].shape[0] for name in group.specs)
    step = max(1, -(-total // rows))
    parts: dict[QuantSpec, list[torch.Tensor]] = {}
    start = 0  # the stride runs on from reader to reader, so that small experts do not all show the same rows
    for name, spec in group.specs.items():
        weight = group.readers[name]
        parts.setdefault(spec, []).append(weight[start::step].float())
        start = (start - weight.shape[0]) % step
    return {spec: torch.cat(found) for spec, found in parts.items()}


@dataclass(frozen=True, eq=False)
class Term:
    """A sum over rows n and groups g of (max_g |v[n]| s^p)^2 * sum over i in g of each[i] s[i]^-2p, times `weight`.

    size fp32 [N, K]: |v|. each fp32 [K]. p: +1 for weights, -1 for inputs.
    """

    size: torch.Tensor
    each: torch.Tensor
    groups: int
    p: int
    weight: float

    def slope(self, log: torch.Tensor) -> tuple[float, torch.Tensor]:
        """(the sum, its gradient in log s [K]) at log s."""
        scale = (self.p * log).exp()
        width = log.shape[0] // self.groups
        largest, where = (self.size * scale).view(-1, self.groups, width).max(2)  # [N, groups]
        largest = largest.square_()
        channel = (self.each / scale.square()).view(self.groups, width)
        shared = channel.sum(1)
        cost = float(largest.sum(0).double() @ shared.double())
        where += torch.arange(self.groups, device=log.device) * width
        pushed = torch.zeros_like(log).index_add_(0, where.flatten(), (largest * shared).flatten())
        pulled = (channel * largest.sum(0)[:, None]).flatten()
        return self.weight * cost, (pushed - pulled).mul_(2 * self.p * self.weight)


def of_weights(weight: torch.Tensor, spec: QuantSpec, each: torch.Tensor) -> Term:
    """What rounding weight [N, K] to `spec` costs when a squared error of channel i costs each[i]."""
    step = 2.0 / ((1 << spec.weight_bits) - 1)
    return Term(weight.abs(), each, spec.groups(weight.shape[1]), 1, step * step / 12)


def of_inputs(sample: torch.Tensor, weights: Sequence[torch.Tensor], tokens: int) -> Term:
    """What int8 tokens cost the readers `weights` [N, K]; sample fp32 [R, K] of `tokens` inputs."""
    norm = torch.stack([w.square().sum(0) for w in weights]).sum(0)
    return Term(sample.abs(), norm, 1, -1, tokens / max(sample.shape[0], 1) / 127**2 / 12)


def descend(
    start: torch.Tensor, terms: Sequence[Term], steps: int, free: torch.Tensor, ties: Ties | None
) -> torch.Tensor:
    """The scale fp32 [K] after `steps` steps from `start` down the gradient of the terms' sum (Adam on log s).

    free bool [K]: channels that may change.
    """
    begin = start.log()
    log = begin.clone()
    mean, square = torch.zeros_like(log), torch.zeros_like(log)
    for t in range(1, steps + 1):
        found = [term.slope(log) for term in terms]
        total = max(sum(cost for cost, _ in found), 1e-30)
        gradient = torch.stack([slope for _, slope in found]).sum(0) / total
        gradient = torch.where(free, tied(gradient, ties), 0.0)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient.square()
        step = (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        log = (log - _RATE * (1 - (t - 1) / steps) * step).clamp_(-_WIDEST, _WIDEST)
    log = torch.where(free & torch.isfinite(log), log, begin)
    return log.exp()
