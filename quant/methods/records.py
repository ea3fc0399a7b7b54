"""What a method takes and gives: the records that all methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...formats import affine
from ...formats.spec import QuantSpec
from ...formats.tensor import QuantTensor


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
    statistics of a text. serves: None for a spec that the method can give, else why not.
    """

    name: str
    kind: str
    run: Callable[..., Any]
    options: dict[str, Option]
    by_rows: bool
    calibrated: bool
    serves: Callable[[QuantSpec], str | None]


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
