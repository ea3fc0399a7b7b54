"""A quantised checkpoint and its source, opened side by side: what each tensor should be, and what it is.

Methods may change weights before they round them (transforms.py). What the quantised checkpoint is compared with is then
the source's tensor after that change, worked out here again from the source and the scales beside the checkpoint.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..formats import compressed_tensors
from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError, QuantSpec
from ..formats.tensor import QuantTensor
from . import report, walk
from .methods import rotate
from .report import Report
from .transforms import INPUT_NORM, POST_NORM, UP, Rotates, Transforms, V, check_shapes
from .walk import EMBEDDING, HEAD, Linear, Map


@dataclass(frozen=True, eq=False)
class Pair:
    """`source` and `made` of it; `specs` of the modules that are quantised in `made`; `said`: its report, None without."""

    source: Checkpoint
    made: Checkpoint
    found: Map
    specs: dict[str, QuantSpec]
    transforms: Transforms
    said: Report | None
    note: str = ""  # why `said` is None although there is a report

    @classmethod
    def open(cls, dst: str | os.PathLike[str], src: str | os.PathLike[str], said: Report | None = None) -> Pair:
        """FormatError when one of them cannot be read. `said`: the report of `dst` while it is not in its folder yet."""
        source, made = Checkpoint.open(Path(src)), Checkpoint.open(Path(dst))
        found, where = walk.of(source), str(source.path)
        note, file = "", made.path / report.REPORT_NAME
        if said is None and file.is_file():
            try:
                said = Report.load(file)
            except FormatError as error:  # perhaps another tool's: what it would have said is then not known
                note = f"{error}; what was calibrated on, and whether weights were rotated, is not known"
        kv = walk.kv_heads(source.config, where)
        scales = Transforms.read_scales(made.path)
        check_shapes(scales, _widths(found), made.path)
        transforms = Transforms(kv, scales, _rotation(source, kv, said))
        return cls(source, made, found, specs_of(made), transforms, said, note)

    @property
    def linears(self) -> list[Linear]:
        """Those that are quantised."""
        return [x for x in self.found.linears if x.name in self.specs]

    @property
    def untied(self) -> bool:
        """Whether `made` has an output head of its own where the source's is its embedding, as a rotation needs it."""
        return (
            self.transforms.rotation is not None
            and self.found.tied
            and HEAD not in self.source.tensors
            and self.made.config.get("tie_word_embeddings") is False
        )

    @property
    def heads(self) -> tuple[str, str]:
        """The names of the tensors that are the output heads of source and `made`."""
        name = EMBEDDING if self.found.tied else HEAD
        return name, HEAD if self.untied else name

    def touches(self, name: str) -> bool:
        """Whether a transform changed tensor `name` of the source."""
        return self.transforms.touches(name)

    def expected(self, name: str) -> torch.Tensor:
        """Tensor `name` as it was before rounding: the source's own, or fp32 where a transform changed it."""
        tensor = self.source.read(EMBEDDING if name == HEAD and self.untied else name)
        return self.transforms.apply(name, tensor, self.source.read) if self.touches(name) else tensor

    def stored(self, name: str) -> torch.Tensor:
        """Tensor `name` as a checkpoint holds it that does not quantise it: `expected`, rounded to the source's dtype."""
        dtype = self.source.info(EMBEDDING if name == HEAD and self.untied else name).dtype
        return self.expected(name).to(dtype)

    def read(self, name: str) -> torch.Tensor | QuantTensor:
        """Tensor `name` of `made` by its name in the source; a QuantTensor for a weight that is quantised."""
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in self.specs:
            return self.made.read(name)
        shape = self.source.info(name).shape
        return read_module(self.made, module, (shape[0], shape[1]), self.specs[module], self.found.dtype)

    @property
    def parameters(self) -> int:
        """Of the source; a tied head counts once."""
        return sum(torch.Size(info.shape).numel() for info in self.source.tensors.values())

    @property
    def main_spec(self) -> QuantSpec | None:
        """The spec of most modules: it says which thresholds judge the model."""
        found = list(self.specs.values())
        return max(dict.fromkeys(found), key=found.count) if found else None


def read_module(
    made: Checkpoint, module: str, shape: tuple[int, int], spec: QuantSpec, dtype: torch.dtype
) -> QuantTensor:
    """Codes and scales of a quantised module [N, K]; dtype: of the model's 16-bit tensors."""
    parts = {suffix: made.read(f"{module}.{suffix}") for suffix in compressed_tensors.plan(shape, spec, dtype)}
    return compressed_tensors.read(parts, spec, shape, module)


def specs_of(made: Checkpoint) -> dict[str, QuantSpec]:
    """What config.json says about each quantised module; FormatError when it says nothing."""
    if not compressed_tensors.claims(made.config):
        raise FormatError(
            f"{made.path / 'config.json'}: no quantization_config of compressed-tensors; "
            "give a checkpoint that `percard quantize` wrote"
        )
    try:
        return compressed_tensors.specs(made.config, made.names)
    except FormatError as error:
        raise FormatError(f"{made.path / 'config.json'}: {error}") from None


def _widths(found: Map) -> dict[str, int]:
    """How many scales each producer of this model may have (transforms.py)."""
    widths = {n.removesuffix(".weight"): shape[0] for n, shape in found.others.items() if n.endswith("norm.weight")}
    widths = {n: size for n, size in widths.items() if n.endswith((INPUT_NORM, POST_NORM))}
    for linear in found.linears:
        if linear.name.endswith("self_attn.o_proj"):
            widths[linear.name.removesuffix("self_attn.o_proj") + V] = linear.shape[1]
        if linear.name.endswith(f".{UP}"):
            widths[linear.name] = linear.shape[0]
    return widths


def _rotation(source: Checkpoint, kv: tuple[int, int, int], said: Report | None) -> Rotates | None:
    """The rotation that the recipe in a report names; None = it names none."""
    try:
        stages = ((said.recipe if said is not None else None) or {}).get("stages") or [{}]
        methods = (stages[0].get("quantize") or {}).get("methods") or []
        options = next((m["rotate"] or {} for m in methods if isinstance(m, dict) and "rotate" in m), None)
        if options is None:
            return None
        heads, group, d = kv
        hidden, layers = (int(source.config[key]) for key in ("hidden_size", "num_hidden_layers"))
        known = {key: options.get(key, rotate.OPTIONS[key].default) for key in ("seed", "values")}
        return rotate.plan(hidden, heads * group, heads, d, layers, **known)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"report.json: its recipe cannot be read ({error}); quantize again") from None
