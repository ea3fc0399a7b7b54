"""The calibrated half of `quantize`: each block by sequential.py, its bytes to the writer, its facts to the journal."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..formats import compressed_tensors
from ..formats.checkpoint import Writer
from ..formats.spec import FormatError
from . import report
from .preflight import Preflight
from .progress import Meter
from .report import Module
from .rounding import Done
from .sequential import Sequential
from .transforms import Transforms


class Blocks:
    """Quantises the blocks that `entries` of the journal do not hold yet, in order.

    Scales of finished blocks and the sha256 of the last activations come from the journal and from files in `work`; so a
    run that goes on sees what the one before it saw.
    """

    def __init__(
        self, plan: Preflight, transforms: Transforms, work: Path, meter: Meter, entries: list[dict[str, Any]]
    ) -> None:
        assert plan.windows is not None
        self.plan, self.transforms, self.work, self.meter = plan, transforms, work, meter
        self.done = [e for e in entries if e["unit"].startswith("block ")]
        for path in work.glob("scales-*.npz"):
            if int(path.stem.split("-")[1]) >= len(self.done):
                path.unlink()
        for index in range(len(self.done)):
            transforms.scales |= Transforms.read_scales(self._scales(index))
        self.sequential = Sequential(
            plan.source,
            plan.found,
            plan.assignment,
            plan.recipe,
            transforms,
            plan.windows.ids,
            plan.dtype,
            work,
            meter,
        )
        self.started = bool(self.done)
        if self.started:
            self._check_activations()

    def _check_activations(self) -> None:
        """What the last finished block left is what it noted."""
        expected = self.done[-1]["activations"]
        if not expected:
            return
        for path, mark in zip(self.sequential.files(len(self.done)), expected, strict=True):
            if not path.is_file():
                raise FormatError(f"{path}: activations of an earlier run are gone; start over with --fresh")
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != mark:
                raise FormatError(
                    f"{path}: not what the earlier run wrote (sha256 {found[:12]}); start over with --fresh"
                )

    def _scales(self, index: int) -> Path:
        return self.work / f"scales-{index:05d}.npz"

    def quantise(self, index: int, writer: Writer) -> dict[str, Any]:
        """Block `index` into `writer`; the journal's entry."""
        if not self.started:
            self.sequential.begin()
            self.started = True
        before = set(self.transforms.scales)
        made = self.sequential.block(index)
        new = Transforms(self.transforms.kv, {k: v for k, v in self.transforms.scales.items() if k not in before})
        if new.scales:
            part = self._scales(index).with_suffix(".tmp")
            part.write_bytes(new.to_bytes())
            part.rename(self._scales(index))
        modules = []
        for done in made.done:
            size = 0
            for suffix, tensor in compressed_tensors.write(done.tensor, self.plan.found.dtype).items():
                writer.add(f"{done.linear.name}.{suffix}", tensor)
                size += tensor.nbytes
            modules.append(vars(self._module(done, size, made.notes.get(done.linear.name, {}))))
        return {"modules": modules, "layer": {"index": index, "tokens": made.tokens}, "activations": made.activations}

    def _module(self, done: Done, size: int, notes: dict[str, Any]) -> Module:
        facts = notes | {k: v for k, v in done.facts.items() if k not in ("signal", "noise")}
        return Module(
            done.linear.name,
            str(done.tensor.spec),
            self.plan.method_of(done.linear),
            done.linear.shape,
            report.sqnr(done.facts["signal"], done.facts["noise"]),
            self.plan.source.info(done.linear.tensor).nbytes,
            size,
            facts,
        )

    def drop_old(self, index: int | None) -> None:
        """The input of a finished block is needed no more; its output is the next one's input."""
        if index is not None:
            for path in self.sequential.files(index):
                path.unlink(missing_ok=True)
