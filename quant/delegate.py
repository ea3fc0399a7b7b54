"""The whole-model road: a method of another package that wants the model in memory, and whose codes become our files.

    run     load the source through transformers, fp32; hand it over with the calibration windows; take codes apart
    keep    all codes in one file of the work folder, so that a run killed after those hours goes on from there
    write   block by block like every other method: our container, our report, our checks

Nothing streams: what `needs` says is several times the source. Names stay those of the disk; a linear that the package
did not return under its name stops the run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..formats import affine, compressed_tensors
from ..formats.checkpoint import Checkpoint, Writer
from ..formats.spec import FormatError
from ..formats.tensor import QuantTensor
from . import report
from .methods import autoround
from .methods.records import signal_and_noise
from .progress import Meter
from .recipe import Recipe
from .report import Module
from .text import Windows
from .walk import Assignment, Linear, Map

if TYPE_CHECKING:
    from .preflight import Preflight

FILE = "delegate.safetensors"  # codes, scales and zeros of the whole model


class Delegate:
    """Quantises blocks as calibrated.Blocks does; the package runs when the first block is asked for.

    `work`: a folder for the codes, which an earlier run of the same recipe may have left there.
    """

    def __init__(self, plan: Preflight, work: Path, meter: Meter) -> None:
        self.plan, self.file, self.meter = plan, work / FILE, meter

    def quantise(self, index: int, writer: Writer) -> dict[str, Any]:
        """Block `index` into `writer`; the journal's entry."""
        if not self.file.is_file():
            _keep(self.file, self._run())
        plan, modules = self.plan, []
        for linear in plan.found.linears:
            if linear.block == index and linear.name in plan.assignment.specs:
                modules.append(vars(self._write(linear, writer)))
        return {"modules": modules, "layer": {"index": index, "tokens": []}}

    def drop_old(self, index: int | None) -> None:
        """Nothing: the file of codes goes with the work folder."""

    def _run(self) -> Iterator[tuple[str, QuantTensor]]:
        """What the package makes of the model."""
        plan, specs = self.plan, self.plan.assignment.specs
        assert plan.windows is not None
        inside = [x for x in plan.found.linears if x.block is not None]  # a head is rounded to nearest, as ever
        wanted = {x.name: specs[x.name] for x in inside if x.name in specs}
        if not wanted:
            return
        self.meter.add(0, f"{autoround.PACKAGE} {autoround.version()}, the whole model at once")
        yield from autoround.autoround(
            _model(plan.source),
            plan.windows.ids,
            wanted,
            scale_dtype=affine.scale_dtype_of(next(iter(wanted.values())), plan.found.dtype),
            left=[x.name for x in inside if x.name not in specs],
            seed=plan.recipe.calibration.seed,
            **dict(plan.recipe.rounding.options),
        )

    def _write(self, linear: Linear, writer: Writer) -> Module:
        plan, dtype = self.plan, self.plan.found.dtype
        spec, info = plan.assignment.specs[linear.name], plan.source.info(linear.tensor)
        data, scale, zero = (_read(self.file, f"{linear.name}.{part}") for part in ("data", "scale", "zero"))
        if data is None or scale is None:
            raise FormatError(f"{self.file}: {linear.name} is not in it; start over with --fresh")
        tensor = QuantTensor(data, scale, zero, spec, "plain", linear.shape)
        size = 0
        for suffix, part in compressed_tensors.write(tensor, dtype).items():
            writer.add(f"{linear.name}.{suffix}", part)
            size += part.nbytes
        sums = signal_and_noise(plan.source.read(linear.tensor).float(), data, scale, zero, spec)
        self.meter.add(info.nbytes, linear.name)
        ratio = report.sqnr(sums["signal"], sums["noise"])
        facts = {"package": f"{autoround.PACKAGE} {autoround.version()}"}
        return Module(linear.name, str(spec), plan.method_of(linear), linear.shape, ratio, info.nbytes, size, facts)


def needs(source: Checkpoint, found: Map, assignment: Assignment, recipe: Recipe, windows: Windows) -> tuple[int, int]:
    """(memory, disk) in bytes that the package and its codes take, beside Python and the output."""
    options, config = dict(recipe.rounding.options), source.config
    hidden, chosen = int(config["hidden_size"]), int(config.get("num_experts_per_tok") or 1)
    parameters = sum(info.nbytes // info.dtype.itemsize for info in source.tensors.values())
    largest = experts = inner = 0
    for block in found.blocks():
        sizes = {x.name: x.shape[0] * x.shape[1] for x in block}
        inside = [x for x in block if ".experts." in x.name]
        rows = sum(x.shape[0] for x in block) - sum(x.shape[0] for x in inside)
        rows += sum(x.shape[0] for x in inside) * 3 * chosen // max(len(inside), 1)  # three matrices an expert
        largest, experts = max(largest, sum(sizes.values())), max(experts, sum(sizes[x.name] for x in inside))
        inner = max(inner, 3 * rows + 12 * hidden)
    count, length = windows.ids.shape
    count = min(count, options["samples"])
    memory = autoround.memory(parameters, largest, experts, (count, length, hidden), options["batch"], inner)
    codes = [x for x in found.linears if x.block is not None and x.name in assignment.specs]
    disk = sum(x.shape[0] * x.shape[1] + 5 * x.shape[0] * assignment.specs[x.name].groups(x.shape[1]) for x in codes)
    return memory, disk


def _model(source: Checkpoint) -> torch.nn.Module:
    """The source as transformers loads it, in fp32. FormatError when a weight of the model is not in the files."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(source.path),
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, found = loaded
    if found["missing_keys"]:
        name = sorted(found["missing_keys"])[0]
        raise FormatError(f"{source.path}: transformers finds no weight for {name}; take another method")
    return model.eval()


def _keep(path: Path, made: Iterator[tuple[str, QuantTensor]]) -> None:
    """Writes all codes; the file has its name when it is complete."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in made:
        tensors |= {f"{name}.data": tensor.data, f"{name}.scale": tensor.scale}
        if tensor.zero is not None:
            tensors[f"{name}.zero"] = tensor.zero
    part = path.with_name(path.name + ".tmp")
    save_file(tensors, str(part))
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(path)


def _read(path: Path, name: str) -> torch.Tensor | None:
    """One tensor of the file; None when it holds no such name."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return file.get_tensor(name) if name in set(file.keys()) else None
