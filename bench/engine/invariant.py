"""Products, norms and SiLU whose bits for a token depend on that token alone: what 16-bit weights take in batch-invariant mode.

torch promises nothing about batches: its matmul chooses a kernel by the number of rows, its vector code has another exp than
the code for the rest of an array, and where one ends and the other begins depends on all of it. Here every step is one
of which IEEE 754 fixes each bit (+ - * / sqrt, comparing, rounding to whole numbers, one operation a call), in an order
that the size of a row alone decides; or a sum of whole numbers below 2^53, which is exact in any order.

    linear      x = q_x * 2^e_x by row, w = q_w * 2^e_w by row, q whole numbers of b bits, 2 b + log2 K <= 53
                y = (q_x . q_w) * 2^(e_x + e_w) + bias: torch's fp64 product, whatever its blocks and threads, is exact
    rms_norm    squares are added in halves: the first half of a row to the second, until one number is left
    silu_mul    e^x = 2^n e^r, |r| <= ln 2 / 2, and a series

b is 21 for K = 1024: a row keeps 21 bits below its largest number, about what fp32 sums of that length keep. Whole numbers in
place of floats, so that the order of sums is free: Ozaki, Ogita, Oishi and Rump 2012, doi:10.1007/s11075-011-9478-1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ...formats.tensor import QuantTensor
from ...kernels import linear as quantised
from ...kernels.op import Tape

_MANTISSA = 53
_LN2_HIGH, _LN2_LOW = (
    0.693147180369123816490,
    1.90821492927058770002e-10,
)  # 32 bits of ln 2, so n times it is exact; the rest
_SERIES = tuple(1 / math.factorial(i) for i in range(14))
_WHOLE = WeakIdKeyDictionary()  # weight -> itself as whole numbers, as long as it lives


def bits_for(k: int) -> int:
    """Bits of the whole numbers of rows of k, such that sums of k products of two are exact in fp64."""
    return (_MANTISSA - math.ceil(math.log2(max(k, 2)))) // 2


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent, int64 in -1022 .. 1023, as fp64: written as bits."""
    return (exponent + 1023 << 52).view(torch.float64)


def whole(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [..., K] of a float type as whole numbers fp64 [..., K] and what they are multiples of, a power of two [..., 1]."""
    bits = bits_for(rows.shape[-1])
    exact = rows.double()
    most = exact.abs().amax(-1, keepdim=True)
    # most < 2^above; rows of zeros, and of less than 2^-500, become zeros
    above = ((most.view(torch.int64) >> 52) - 1022).clamp(-500, 500)
    return (exact * _power(bits - above)).round_(), _power(above - bits)


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] times w [N, K], plus bias [N]: [..., N] in the type of x. 8 bytes for every weight are kept beside it."""
    if w not in _WHOLE:
        _WHOLE[w] = whole(w)
    q_w, unit_w = _WHOLE[w]
    q_x, unit_x = whole(x.reshape(-1, x.shape[-1]))
    y = (q_x @ q_w.t()).mul_(unit_x).mul_(unit_w[:, 0])
    if bias is not None:
        y = y.add_(bias.double())
    return y.to(x.dtype).view(*x.shape[:-1], w.shape[0])


def product(
    x: torch.Tensor,
    w: torch.Tensor | QuantTensor,
    bias: torch.Tensor | None = None,
    *,
    tape: Tape | None = None,
    **how: Any,
) -> torch.Tensor:
    """kernels.linear, but a 16-bit or fp32 weight goes this way; `how` goes to it."""
    if isinstance(w, QuantTensor):
        return quantised.linear(x, w, bias, tape=tape, **how)
    return linear(x, w, bias) if tape is None else tape.keep(linear, x, w, bias)


def halves(x: torch.Tensor) -> torch.Tensor:
    """The sum of each row [..., K] -> [..., 1], always in the same order."""
    while (k := x.shape[-1]) > 1:
        half = k // 2
        added = x[..., :half] + x[..., half : 2 * half]
        x = added if k % 2 == 0 else torch.cat((added, x[..., 2 * half :]), -1)
    return x


def rms_norm(x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """torch.nn.functional.rms_norm over the last dimension; `shape` is its size, as there."""
    exact = x.double()
    mean = halves(exact * exact) / float(shape[-1])
    y = exact / (mean + eps).sqrt()
    return (y if weight is None else y * weight.double()).to(x.dtype)


def exp(x: torch.Tensor) -> torch.Tensor:
    """e^x of fp64, within 2^-50 of it; x is cut to -700 .. 700."""
    x = x.clamp(-700.0, 700.0)
    n = (x * (1 / math.log(2))).round()
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    y = torch.full_like(r, _SERIES[-1])
    for term in reversed(_SERIES[:-1]):
        y = y * r + term
    return y * _power(n.long())


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of rows [..., 2 ffn] (gate, then up): [..., ffn] in their type."""
    gate, up = gate_up.double().chunk(2, -1)
    return (gate / (exp(-gate) + 1.0) * up).to(gate_up.dtype)
