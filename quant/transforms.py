"""What was done to a model's weights before they were rounded, so that the function stays the same.

A scale s [K] between a producer and its readers: readers become W * s (columns), the producer gives x / s. A rotation of
the residual stream (methods/rotate.py) comes first. The quantiser applies both to what it reads, and so does `verify`:
the scales lie in `percard-transforms.npz` beside the checkpoint, which no engine opens.

    key (module name)           producer           readers
    ...input_layernorm          that norm          q, k, v
    ...self_attn.v_proj         rows and bias of v o; s has heads x D entries, shared by the query heads of a key head
    ...post_attention_layernorm that norm          gate, up; in a mixture the router and all experts' gate and up
    ...up_proj                  rows, bias of up   down of the same MLP or expert
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ..formats.spec import FormatError

FILE = "percard-transforms.npz"
INPUT_NORM, POST_NORM, V, UP = "input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "up_proj"
Read = Callable[[str], torch.Tensor]


class Rotates(Protocol):
    """What Transforms needs of a rotation."""

    def apply(self, name: str, tensor: torch.Tensor, read: Read) -> torch.Tensor: ...


@dataclass(eq=False)
class Transforms:
    """scales: key -> fp32 [K]. kv: (kv_heads, heads_per_kv, D) of the model's attention. rotation: None = none."""

    kv: tuple[int, int, int]
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    rotation: Rotates | None = None

    def rows(self, key: str) -> torch.Tensor:
        """What the producer's channels are divided by: s itself, for v one entry per row."""
        scale = self.scales[key]
        if key.endswith(V):
            heads, group, d = self.kv
            return scale.view(heads, group, d)[:, 0].reshape(-1)
        return scale

    def touches(self, name: str) -> bool:
        """Whether tensor `name` differs from the source's."""
        return self.rotation is not None or bool(self._columns(name)) or bool(self._rows(name))

    def apply(self, name: str, tensor: torch.Tensor, read: Read) -> torch.Tensor:
        """Tensor `name` of the source as the transformed model has it, fp32; `read` gives other source tensors."""
        value = tensor.float()
        if self.rotation is not None:
            value = self.rotation.apply(name, value, read)
        for key in self._columns(name):
            value = value * self.scales[key].to(value.device)
        for key in self._rows(name):
            rows = self.rows(key).to(value.device)
            value = value / (rows if value.dim() == 1 else rows[:, None])
        return value

    def _columns(self, name: str) -> list[str]:
        """Keys of the scales that multiply the columns of `name`."""
        if not name.endswith(".weight"):
            return []
        module = name.removesuffix(".weight")
        parent, _, leaf = module.rpartition(".")
        if leaf in ("q_proj", "k_proj", "v_proj"):
            return self._known(f"{parent.removesuffix('.self_attn')}.{INPUT_NORM}")
        if leaf == "o_proj":
            return self._known(f"{parent}.v_proj")
        if leaf == "down_proj":
            return self._known(f"{parent}.{UP}")
        if leaf in ("gate_proj", "up_proj", "gate") and ".mlp" in module:
            return self._known(f"{module[: module.index('.mlp')]}.{POST_NORM}")
        return []

    def _rows(self, name: str) -> list[str]:
        """Keys of the scales that divide the rows of `name`, or a norm or bias by it."""
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            return []
        if module.endswith((INPUT_NORM, POST_NORM)):
            return self._known(module) if leaf == "weight" else []
        return self._known(module) if module.endswith((V, f".{UP}")) else []

    def _known(self, key: str) -> list[str]:
        return [key] if key in self.scales else []

    def to_bytes(self) -> bytes:
        """The file's bytes; the same scales give the same bytes."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for key in sorted(self.scales):
                piece = io.BytesIO()
                np.lib.format.write_array(piece, self.scales[key].float().cpu().numpy(), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{key}.npy", (1980, 1, 1, 0, 0, 0)), piece.getvalue())
        return out.getvalue()

    @staticmethod
    def read_scales(path: Path) -> dict[str, torch.Tensor]:
        """The scales in a file, or beside a checkpoint in a folder; empty when there are none. FormatError: not ours."""
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            return {}
        try:
            with np.load(path, allow_pickle=False) as found:
                scales = {key: torch.from_numpy(found[key].copy()) for key in found.files}
        except (OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
            raise FormatError(f"{path}: cannot be read ({error}); quantize again") from None
        for key, scale in scales.items():
            if scale.dtype != torch.float32 or scale.dim() != 1 or not bool((scale > 0).all()):
                raise FormatError(f"{path}: {key} is not a row of fp32 scales above zero; quantize again")
        return scales


def settled(norm: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`scale` moved to where norm / scale is exactly what the norm's own dtype holds: nothing is lost in the norm.

    norm [K] in its storage dtype, scale fp32 [K]. Channels whose norm is 0 keep scale 1.
    """
    wanted = norm.float()
    stored = (wanted / scale).to(norm.dtype).float()
    exact = wanted / stored
    good = torch.isfinite(exact) & (exact > 0)
    return torch.where(good, exact, torch.ones_like(exact))


def check_shapes(scales: Mapping[str, torch.Tensor], widths: Mapping[str, int], where: Path) -> None:
    """FormatError when a scale belongs to no producer of this model (`widths`: key -> channels)."""
    for key, scale in scales.items():
        if widths.get(key) != scale.shape[0]:
            raise FormatError(
                f"{where / FILE}: {key} has {scale.shape[0]} scales, the model {widths.get(key, 'no such')}"
            )
