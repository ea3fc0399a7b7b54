"""What a method takes and gives: the records that all methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...formats import affine
from ...formats.spec import QuantSpec
from ...formats.tensor import QuantTensor


@dataclass(frozen=True, eq=False)
class Stats:
    """What a text says about the input x [tokens, K] of a linear, or of all linears that read it.

    gram fp32 [K, K]: the sum of x x^T over tokens. absmax, absmean fp32 [K]: of |x|. sample fp32 [R, K]: R <= 512 rows,
    drawn evenly by a seed. tokens: how many rows were seen; 0 = none, and then every sum is zero.
    """

    gram: torch.Tensor
    absmax: torch.Tensor
    absmean: torch.Tensor
    sample: torch.Tensor
    tokens: int

    def scaled(self, scale: torch.Tensor) -> Stats:
        """The same for inputs x / scale, scale fp32 [K]."""
        return Stats(
            self.gram / scale[:, None] / scale,
            self.absmax / scale,
            self.absmean / scale,
            self.sample / scale,
            self.tokens,
        )


@dataclass(frozen=True, eq=False)
class LinearGroup:
    """Linears that read one input x [*, K], and where that input comes from: a norm, or the rows of another linear.

    readers: name -> weight fp32 [N, K]; all that reads the input, also what is not quantised (a router). specs: the
    spec of each reader that is quantised. stats: of x. ties (kv_heads, heads_per_kv, D): x is attention's output, K =
    kv_heads * heads_per_kv * D, and all query heads of a key head must share their D scales, since one row of v feeds them.
    clips: readers whose scales may be clipped (not q and k: what they make is multiplied once more).
    """

    readers: Mapping[str, torch.Tensor]
    specs: Mapping[str, QuantSpec]
    stats: Stats
    ties: tuple[int, int, int] | None = None
    clips: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Transform:
    """The same function with other weights: readers become W * scale, what makes their input gives x / scale.

    scale fp32 [K], above zero. bounds: reader -> fp32 [N, groups], the largest |W * scale| that a group's scale has to
    cover, for roundings. facts go into the report.
    """

    scale: torch.Tensor
    bounds: Mapping[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rounded:
    """What a rounding method found: the plain tensor whose codes go to disk as they are, and facts for the report."""

    tensor: QuantTensor
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Option:
    """One option of a method: type, default, a phrase for help, and the range of a number."""

    kind: type
    default: Any
    help: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Method:
    """A method by name.

    kind: "rounding" or "transform". by_rows: rows stand alone, so a weight may come in row ranges. calibrated: needs
    statistics of a text. serves: None for a spec that the method can give, else why not. prepare(stats, **options): what
    all weights with one input share, handed to `run` as `prepared`; None = nothing. whole: `run` takes the model in
    memory, not one weight (delegate.py).
    """

    name: str
    kind: str
    run: Callable[..., Any]
    options: dict[str, Option]
    by_rows: bool
    calibrated: bool
    serves: Callable[[QuantSpec], str | None]
    prepare: Callable[..., Any] | None = None
    correct: Callable[..., torch.Tensor] | None = None
    remedy: str = "take an integer spec, such as w4a16-g128 or w8a8"
    whole: bool = False


_STEP = 1 << 20  # weights per step, so that temporaries stay in the cache


def signal_and_noise(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, spec: QuantSpec
) -> dict[str, float]:
    """Sums of squares of weight fp32 [N, K] and of its error once decoded; SQNR is 10 log10 of their ratio, in dB."""
    rows, columns = weight.shape
    signal = noise = 0.0
    step = max(1, _STEP // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        w = weight[part].flatten()
        value = affine.decode(codes[part], scale[part], None if zero is None else zero[part], spec)
        error = value.flatten().sub_(w)
        signal += float(torch.dot(w, w))
        noise += float(torch.dot(error, error))
    return {"signal": signal, "noise": noise}
