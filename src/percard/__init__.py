"""percard: more tokens out of every card.

Public names are loaded on first use (PEP 562), so that `import percard` touches neither CUDA nor Triton:

    percard.quantize(src, dst, spec="w4a16-g128")     a checkpoint becomes INT8 / INT4
    percard.verify(dst, src)                          re-opens and checks what was written
    percard.load(path)                                the bench's engine over a checkpoint
    percard.linear, percard.QuantLinear               a quantised linear for your own model
    percard.QuantSpec, percard.QuantTensor            what the bytes mean
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "QuantSpec": "formats.spec",
    "FormatError": "formats.spec",
    "QuantTensor": "formats.tensor",
    "Unsupported": "kernels.op",
    "linear": "kernels.linear",
    "QuantLinear": "kernels.linear",
    "Recipe": "quant.recipe",
    "RecipeError": "quant.recipe",
    "quantize": "compose",
    "verify": "compose",
    "load": "compose",
}
__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:
    from .compose import load as load
    from .compose import quantize as quantize
    from .compose import verify as verify
    from .formats.spec import FormatError as FormatError
    from .formats.spec import QuantSpec as QuantSpec
    from .formats.tensor import QuantTensor as QuantTensor
    from .kernels.linear import QuantLinear as QuantLinear
    from .kernels.linear import linear as linear
    from .kernels.op import Unsupported as Unsupported
    from .quant.recipe import Recipe as Recipe
    from .quant.recipe import RecipeError as RecipeError


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'percard' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
