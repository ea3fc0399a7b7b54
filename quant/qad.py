"""Linears that train with the weights that will be written: fake quantisation, and its gradients.

    weights    u = w / s + z, in steps of the scale;  q = round(clamp(u)),  value = (q - z) s:  du = dvalue s inside the range
               of the codes, 0 where a step would lead further out of it
    scales     s = store(base (1 + shift)):  ds = sum over the group of dvalue (q - z), exact, since no code depends on s

Rounding has no gradient; it is passed straight through (arXiv 1308.3432). That weights are trained in steps keeps codes where
they are when a scale moves, and makes one learning rate right for all layers. Every forward pass rounds scales to what the file
stores and codes to what the codec finds (formats/affine.py); where a row's scales are multiples of one number
(affine.two_level) they stay so. What was trained is therefore what is written, bit by bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..formats import affine
from ..formats.spec import FormatError, QuantSpec
from ..formats.tensor import QuantTensor
from ..kernels import rows

SHIFT = "scale_shift"  # how the trained parameter of the scales is called in a module
STEPS = "steps"  # and that of the weights
# Learning rates to the peak rate: of scales, as shares of what they were, and of 16-bit parameters, beside weights in steps;
# and of 16-bit parameters beside scales alone.
SCALES_TIMES, REST_TIMES, REST_BESIDE_SCALES = 0.1, 0.01, 0.1
_LEAST, _MOST = 0.125, 8.0  # of what a scale was at the start: it stays positive, and no group gets lost
# A weight starts at most so many steps from its code, and then so much nearer to it: not at its border.
_INSIDE, _NEARER = 0.49, 0.8


class FakeLinear(nn.Module):
    """y = x value^T + bias, with value the dequantised weight that a file will hold.

    tensor: where it starts, plain. train_weights: `steps` fp32 [N, K] are trained, from `near` [N, K] (the weight that was
    rounded, None: the centres of the codes), else the codes stay. train_scales: scales are trained as base (1 + shift).
    """

    base: torch.Tensor
    codes: torch.Tensor | None
    zero: torch.Tensor | None
    unit: torch.Tensor | None

    def __init__(
        self,
        tensor: QuantTensor,
        bias: torch.Tensor | None,
        *,
        train_weights: bool,
        train_scales: bool,
        near: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.stored = tensor.spec, tensor.scale.dtype
        self.register_buffer("base", tensor.scale.float(), persistent=False)
        self.register_buffer("zero", tensor.zero, persistent=False)
        two = affine.two_level(tensor.scale) if tensor.spec.act_bits == 8 and tensor.spec.group is not None else None
        self.register_buffer("unit", None if two is None else two[0], persistent=False)
        self.register_buffer("codes", None if train_weights else tensor.data, persistent=False)
        self.steps = nn.Parameter(start(tensor, near)) if train_weights else None
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self.scale_shift = nn.Parameter(torch.zeros_like(self.base)) if train_scales else None

    def scale(self) -> torch.Tensor:
        """fp32 [N, K/group] of numbers that the file's dtype holds."""
        if self.scale_shift is None:
            return self.base
        found: torch.Tensor = _Scale.apply(self.scale_shift, self.base, self.unit, self.stored)
        return found

    def value(self) -> torch.Tensor:
        """The weight as the file says it, fp32 [N, K]."""
        codes = self.codes if self.steps is None else _Round.apply(self.steps, self.spec)
        found: torch.Tensor = _Value.apply(codes, self.scale(), self.zero)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spec.act_bits == 8:
            x = _Rows.apply(x)
        return F.linear(x, self.value(), self.bias)

    @torch.no_grad()
    def tensor(self) -> QuantTensor:
        """What is written; on the CPU. Where FSDP2 splits parameters every process has to ask."""
        scale = self.base
        if self.scale_shift is not None:
            scale = _Scale.apply(whole(self.scale_shift), self.base, self.unit, self.stored)
        codes = self.codes
        if codes is None:
            assert self.steps is not None
            codes = _Round.apply(whole(self.steps), self.spec).to(torch.int8)
        shape = (codes.shape[0], codes.shape[1])
        return QuantTensor(codes, scale.to(self.stored), self.zero, self.spec, "plain", shape).to("cpu")


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter, all of it, where FSDP2 splits it."""
    found: torch.Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
    return found


@torch.no_grad()
def start(tensor: QuantTensor, near: torch.Tensor | None) -> torch.Tensor:
    """fp32 steps [N, K] whose codes are those of `tensor`: as near to the weights `near` as may be, or the codes themselves."""
    codes = tensor.data.float()
    if near is None:
        return codes
    if near.shape != codes.shape:
        raise FormatError(f"a weight is {tuple(near.shape)}, its codes {tuple(codes.shape)}")
    steps = near.float().view(*tensor.scale.shape, -1) / tensor.scale.float().unsqueeze(2)
    if tensor.zero is not None:
        steps += tensor.zero.unsqueeze(2)
    return codes + (steps.view(codes.shape) - codes).clamp_(-_INSIDE, _INSIDE).mul_(_NEARER)


class _Scale(torch.autograd.Function):
    """base (1 + shift), as the file stores it."""

    @staticmethod
    def forward(
        ctx: Any, shift: torch.Tensor, base: torch.Tensor, unit: torch.Tensor | None, stored: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(shift, base)
        scale = base * (1 + shift).clamp_(_LEAST, _MOST)
        if unit is not None:
            scale = unit * (scale / unit).round_().clamp_(1, 16)
        return scale.to(stored).float().clamp_min_(2.0**-24 if stored == torch.float16 else 2.0**-126)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        shift, base = ctx.saved_tensors
        found = grads[0] * base
        times = 1 + shift
        stuck = ((times <= _LEAST) & (found > 0)) | ((times >= _MOST) & (found < 0))  # a step would lead further out
        return found.masked_fill_(stuck, 0.0), None, None, None


class _Round(torch.autograd.Function):
    """Codes, as fp32, of weights in steps."""

    @staticmethod
    def forward(ctx: Any, steps: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        ctx.save_for_backward(steps)
        ctx.spec = spec
        return steps.clamp(spec.qmin, spec.qmax).round_()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (steps,) = ctx.saved_tensors
        out = ((steps <= ctx.spec.qmin - 0.5) & (grads[0] > 0)) | ((steps >= ctx.spec.qmax + 0.5) & (grads[0] < 0))
        return grads[0].masked_fill(out, 0.0), None


class _Value(torch.autograd.Function):
    """(q - z) s of codes q [N, K], int8 or fp32."""

    @staticmethod
    def forward(ctx: Any, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(codes, scale, zero)
        return (_levels(codes, zero, scale.shape) * scale.unsqueeze(2)).view(codes.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        codes, scale, zero = ctx.saved_tensors
        grad = grads[0].float().view(*scale.shape, -1)
        dcodes = (grad * scale.unsqueeze(2)).view(codes.shape) if ctx.needs_input_grad[0] else None
        dscale = (_levels(codes, zero, scale.shape) * grad).sum(2) if ctx.needs_input_grad[1] else None
        return dcodes, dscale, None


def _levels(codes: torch.Tensor, zero: torch.Tensor | None, groups: torch.Size) -> torch.Tensor:
    """q - z, fp32 [N, K/group, group]."""
    found = codes.to(torch.float32).view(*groups, -1)
    return found if zero is None else found - zero.unsqueeze(2)


class _Rows(torch.autograd.Function):
    """x [.., K] as int8 per token leaves it (kernels/quantize_rows); no row is clipped, so every gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        q, scale, _ = rows.quantize(x.reshape(-1, x.shape[-1]).float())
        return (q.float() * scale.unsqueeze(1)).view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return (grads[0],)
