"""QuantTensor: a quantised weight; ExpertsTensor: one for each expert of a layer.

Plain frozen objects, not tensor subclasses; unwrapped at the door of every op.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .spec import FormatError, QuantSpec


@dataclass(frozen=True)
class QuantTensor:
    """A weight of true size `shape` = (N, K), out and in features.

    In packing "plain": `data` int8 [N, K], one signed code per byte; `scale` float [N, K/group] ([N, 1] per row), as
    stored on disk; `zero` int8 [N, K/group], signed, or None. value = (code - zero) * scale.
    Other packings (layout.py) hold the same numbers as the body of an op wants them; they never touch the disk.
    """

    data: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    spec: QuantSpec
    packing: str
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if self.packing != "plain":
            return
        rows, columns = self.shape
        if self.data.dtype != torch.int8 or tuple(self.data.shape) != (rows, columns):
            raise FormatError(f"codes are {self.data.dtype} {tuple(self.data.shape)}, expected int8 {(rows, columns)}")
        groups = (rows, self.spec.groups(columns))
        if tuple(self.scale.shape) != groups:
            raise FormatError(f"scale has shape {tuple(self.scale.shape)}, expected {groups} for {self.spec}")
        if self.spec.symmetric != (self.zero is None):
            raise FormatError(f"{self.spec} {'has no' if self.spec.symmetric else 'needs a'} zero point")
        if self.zero is not None and (self.zero.dtype != torch.int8 or tuple(self.zero.shape) != groups):
            raise FormatError(f"zero is {self.zero.dtype} {tuple(self.zero.shape)}, expected int8 {groups}")

    def to(self, device: torch.device | str) -> QuantTensor:
        """The same weight on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, data=self.data.to(device), scale=self.scale.to(device), zero=zero)

    @property
    def nbytes(self) -> int:
        """Bytes that data, scale and zero take in this packing."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scale, self.zero) if t is not None)


@dataclass(frozen=True)
class ExpertsTensor:
    """The weights of all experts of a layer, stacked; true size `shape` = (E, N, K).

    Expert e is `expert(e)`: every tensor has one dimension more than in a QuantTensor of the same packing, the first.
    layout.stack_experts makes one, layout.repack_experts packs it.
    """

    data: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    spec: QuantSpec
    packing: str
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        for name, tensor in (("data", self.data), ("scale", self.scale), ("zero", self.zero)):
            if tensor is not None and (tensor.ndim < 1 or tensor.shape[0] != self.shape[0]):
                raise FormatError(f"{name} of {self.shape[0]} experts has shape {tuple(tensor.shape)}")
        if self.shape[0]:
            self.expert(0)

    def expert(self, index: int) -> QuantTensor:
        """The weight [N, K] of one expert: views, no copies."""
        zero = None if self.zero is None else self.zero[index]
        return QuantTensor(self.data[index], self.scale[index], zero, self.spec, self.packing, self.shape[1:])

    def to(self, device: torch.device | str) -> ExpertsTensor:
        """The same weights on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, data=self.data.to(device), scale=self.scale.to(device), zero=zero)

    @property
    def nbytes(self) -> int:
        """Bytes that data, scale and zero take in this packing."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scale, self.zero) if t is not None)
