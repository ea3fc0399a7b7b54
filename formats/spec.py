"""QuantSpec: what a weight is quantised to. Its printed name is used on disk, in records and in errors.

    w8a8  w8a16  w8a16-g128  w4a16-g128  w4a16-g128-asym  w3a16-g64  w4a8  w4a8-g128  fp8-dynamic  fp8-block

`wX` are the bits of a weight, `aY` the bits of an activation (16 = not quantised), `-gN` the number of weights along
the input that share a scale (none = one scale per output row), `-asym` adds an integer zero point per group.
Activations of an `a8` spec are int8 with one scale per token, found at run time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GROUPS = (32, 64, 128)
_FLOAT = ("fp8-dynamic", "fp8-block")
_READ_ONLY = ("nvfp4", "mxfp4")
_EXAMPLES = "w8a8, w8a16, w8a16-g128, w4a16-g128, w4a16-g128-asym, w3a16-g64, w4a8, w4a8-g128, fp8-dynamic, fp8-block"
_MAX_MESSAGE = 2000  # characters: a hostile name may have millions
_NAME = re.compile(r"w(3|4|8)a(8|16)(?:-g(32|64|128))?(-asym)?")


class FormatError(ValueError):
    """Bytes, names or shapes that do not mean what a format says. Names the file or tensor, and the remedy."""

    def __str__(self) -> str:
        """The message; its middle is left out where a name inside is thousands of characters long."""
        text = super().__str__()
        return text if len(text) <= _MAX_MESSAGE else f"{text[: _MAX_MESSAGE // 2]} ... {text[-_MAX_MESSAGE // 2 :]}"


@dataclass(frozen=True)
class QuantSpec:
    """bits of a weight and of an activation, group along the input (None = per output row), symmetric or not.

    `QuantSpec.parse(name)` and `str(spec)` are inverse. Source of the names: docs/formats.md.
    """

    weight_bits: int
    act_bits: int = 16
    group: int | None = None
    symmetric: bool = True
    float_format: str | None = None  # "fp8-dynamic" and its kin; None = integers

    def __post_init__(self) -> None:
        if self.float_format is not None:
            if self.float_format not in _FLOAT + _READ_ONLY:
                raise FormatError(
                    f"unknown float format {self.float_format!r}; known: {', '.join(_FLOAT + _READ_ONLY)}"
                )
            return
        if self.weight_bits not in (3, 4, 8) or self.act_bits not in (8, 16):
            raise FormatError(f"w{self.weight_bits}a{self.act_bits} is not a spec; examples: {_EXAMPLES}")
        if self.group is not None and self.group not in GROUPS:
            raise FormatError(f"group {self.group} is not one of {GROUPS}")
        if self.act_bits == 8 and not self.symmetric:
            raise FormatError(f"asymmetric weights with int8 activations are not offered; take w{self.weight_bits}a16")
        if self.weight_bits == 8 and self.act_bits == 8 and self.group is not None:
            raise FormatError("w8a8 has one scale per output row; take w8a8 or w8a16-g128")
        if self.weight_bits == 3 and (self.act_bits != 16 or not self.symmetric or self.group not in (64, 128)):
            raise FormatError("3-bit weights come as w3a16-g64 and w3a16-g128")

    @classmethod
    def parse(cls, name: str) -> QuantSpec:
        """The spec that `name` says; FormatError lists examples when there is none."""
        text = name.strip().lower()
        if text in _FLOAT:
            return cls(8, 8, None, True, text)
        if text in _READ_ONLY:
            return cls(4, 16, 16 if text == "nvfp4" else 32, True, text)
        match = _NAME.fullmatch(text)
        if match is None:
            raise FormatError(f"unknown spec {name!r}; examples: {_EXAMPLES}")
        weight, act, group, asym = match.groups()
        return cls(int(weight), int(act), int(group) if group else None, asym is None)

    def __str__(self) -> str:
        if self.float_format is not None:
            return self.float_format
        group = f"-g{self.group}" if self.group else ""
        return f"w{self.weight_bits}a{self.act_bits}{group}{'' if self.symmetric else '-asym'}"

    @property
    def qmin(self) -> int:
        """Smallest signed code."""
        return -(1 << (self.weight_bits - 1))

    @property
    def qmax(self) -> int:
        """Largest signed code."""
        return (1 << (self.weight_bits - 1)) - 1

    def groups(self, k: int) -> int:
        """How many scales a row of `k` weights has; FormatError offers the groups that fit when `k` does not divide."""
        if self.group is None:
            return 1
        if k % self.group:
            fits = [f"g{g}" for g in GROUPS if k % g == 0]
            offer = f"groups that fit: {', '.join(fits)}" if fits else "no group fits: use one scale per row (no -g)"
            raise FormatError(f"input size {k} is not divisible by group {self.group} of {self}; {offer}")
        return k // self.group
