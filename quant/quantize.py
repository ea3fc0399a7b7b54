"""`percard quantize`: source checkpoint in, quantised checkpoint out, checked. The whole story, top to bottom.

Data-free methods know no model: weight after weight, row range by row range, is read, rounded and packed, and whatever
has no spec is copied byte by byte. Memory is about one packed weight and a row range per thread. What the method found is
what is written: nothing is quantised a second time.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..formats import affine, compressed_tensors
from ..formats.checkpoint import Checkpoint, TensorInfo, Writer
from ..formats.spec import FormatError, QuantSpec
from . import engines, output, preflight, report, verify, walk
from .methods import METHODS
from .progress import Callback, Meter
from .recipe import Recipe
from .report import Module, Report
from .walk import Linear
from .workers import Workers


def run(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    recipe: Recipe,
    *,
    force: bool = False,
    progress: Callback | None = None,
) -> Report:
    """Quantises `src` into the new folder `dst` and checks the result.

    Raises, with nothing left behind: FormatError (source), RecipeError, FileExistsError (output), preflight.Refused,
    OSError (disk full). A report with status "red" leaves the folder: it is complete, but a module is worse than it should be.
    """
    source_path, out_path = Path(src), Path(dst)
    output.refuse(source_path, out_path, force)
    plan = preflight.check(source_path, recipe, out_path)
    if plan.refusals:
        raise preflight.Refused(plan)
    meter = Meter("quantize", plan.bytes_source, progress)
    with output.Output(out_path, force) as out:
        modules = _write(plan, out.folder, meter)
        seconds = {"quantize": meter.seconds}
        done = _report(plan, out_path, modules, seconds)
        if recipe.verify.level != "none":
            done = _verified(done, out.folder, source_path, recipe.verify.level, progress)
        output.write(out.folder / report.REPORT_NAME, done.to_json())
        if recipe.card:
            name = report.SECOND_CARD_NAME if (source_path / report.CARD_NAME).exists() else report.CARD_NAME
            commands = engines.commands(out_path, plan.found, plan.assignment)
            output.write(out.folder / name, report.card(done, plan.base, commands))
        out.publish()
    return done


def _write(plan: preflight.Preflight, folder: Path, meter: Meter) -> list[Module]:
    """Writes every tensor and side file into `folder`; config.json comes last."""
    source, specs = plan.source, plan.assignment.specs
    linears = {x.tensor: x for x in plan.found.linears if x.name in specs}
    modules = []
    with Writer(folder, plan.tensors) as writer, Workers() as workers:
        # In the order of the bytes on disk: reading is sequential, and shards are done one by one.
        for name in source.names:
            if name in linears:
                linear = linears[name]
                modules.append(_quantise(plan, linear, specs[linear.name], writer, workers, meter))
            else:
                _copy(source, name, writer, meter)
        writer.copy_side_files(source)
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        config["quantization_config"] = compressed_tensors.config(dict(specs), sorted(plan.assignment.kept))
        writer.finish(config)
    return modules


def _quantise(
    plan: preflight.Preflight, linear: Linear, spec: QuantSpec, writer: Writer, workers: Workers, meter: Meter
) -> Module:
    """Rounds one weight, row range by row range, and writes its tensors."""
    source, dtype = plan.source, plan.found.dtype
    step = plan.recipe.rounding
    method, options = METHODS[step.method], dict(step.options)
    whole = {
        suffix: torch.empty(shape, dtype=kind)
        for suffix, (kind, shape) in compressed_tensors.plan(linear.shape, spec, dtype).items()
    }
    filled = dict.fromkeys(whole, 0)
    facts = {"signal": 0.0, "noise": 0.0}
    info = source.info(linear.tensor)

    def work(start: int, stop: int) -> tuple[dict[str, torch.Tensor], dict[str, Any], int]:
        weight = source.read_rows(linear.tensor, start, stop)
        try:
            rounded = method.run(weight.float(), None, spec, scale_dtype=affine.scale_dtype_of(spec, dtype), **options)
        except FormatError as error:
            raise FormatError(f"{info.file}: tensor {linear.tensor}, rows {start} to {stop - 1}: {error}") from None
        return compressed_tensors.write(rounded.tensor, dtype), rounded.facts, weight.nbytes

    for pieces, found, done in workers.over(work, walk.row_ranges(linear.shape, method.by_rows)):
        for suffix, piece in pieces.items():
            if suffix == "weight_shape":  # of the whole weight, not of a range
                piece = torch.tensor(linear.shape, dtype=piece.dtype)
            at = filled[suffix]
            count = min(piece.shape[0], whole[suffix].shape[0] - at)
            whole[suffix][at : at + count] = piece[:count]
            filled[suffix] = at + count if suffix != "weight_shape" else 0
        for key in facts:
            facts[key] += found[key]
        meter.add(done, linear.name)
    for suffix, tensor in whole.items():
        writer.add(f"{linear.name}.{suffix}", tensor)
    size = sum(tensor.nbytes for tensor in whole.values())
    ratio = report.sqnr(facts["signal"], facts["noise"])
    return Module(linear.name, str(spec), method.name, linear.shape, ratio, info.nbytes, size)


def _copy(source: Checkpoint, name: str, writer: Writer, meter: Meter) -> None:
    """Copies a tensor's bytes, and looks at them on the way: NaN or Inf stops the run."""
    info = source.info(name)

    def watched() -> Iterator[bytes]:
        done = 0
        for chunk in source.raw(name):
            _refuse_non_finite(chunk, done, info, name)
            yield chunk
            done += len(chunk)
            meter.add(len(chunk), name)

    writer.add_raw(name, watched())


# Bits of a float without its sign, and the least pattern that is Inf or NaN.
_EXPONENTS: dict[torch.dtype, tuple[type, int, int]] = {
    torch.bfloat16: (np.uint16, 0x7FFF, 0x7F80),
    torch.float16: (np.uint16, 0x7FFF, 0x7C00),
    torch.float32: (np.uint32, 0x7FFFFFFF, 0x7F800000),
    torch.float64: (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}


def _refuse_non_finite(chunk: bytes, offset: int, info: TensorInfo, name: str) -> None:
    """FormatError with the element's index when the bytes at `offset` of a float tensor hold NaN or Inf."""
    if info.dtype not in _EXPONENTS:
        return
    kind, mask, least = _EXPONENTS[info.dtype]
    bits = np.frombuffer(chunk, dtype=kind) & kind(mask)
    if bits.size and bits.max() >= least:
        first = offset // bits.itemsize + int(np.argmax(bits >= least))
        place = [int(i) for i in np.unravel_index(first, info.shape)] if info.shape else []
        raise FormatError(
            f"{info.file}: tensor {name} holds NaN or Inf at {place}; repair the source or download it again"
        )


def _report(plan: preflight.Preflight, dst: Path, modules: list[Module], seconds: dict[str, float]) -> Report:
    """The report before verification."""
    copied = sum(plan.source.info(n).nbytes for n in plan.source.names) - sum(m.bytes_before for m in modules)
    return Report(
        verb="quantize",
        source=str(plan.src),
        output=str(dst),
        level="none",
        modules=tuple(modules),
        kept=dict(plan.assignment.kept),
        bytes={
            "source": plan.bytes_source,
            "output": plan.bytes_output,
            "quantised_before": sum(m.bytes_before for m in modules),
            "quantised_after": sum(m.bytes_after for m in modules),
            "copied": copied,
        },
        seconds=seconds,
        warnings=plan.warnings,
        recipe=plan.recipe.to_dict(),
    )


def _verified(done: Report, folder: Path, src: Path, level: str, progress: Callback | None) -> Report:
    """The report with what a look at the written files says; RuntimeError when they are not what was written."""
    found = verify.verify(folder, src, level=level, progress=progress)
    if found.failures:
        raise RuntimeError(f"{folder}: the checkpoint read back is not what was written: {found.failures[0]}")
    return dataclasses.replace(
        done,
        level=level,
        checks=found.checks,
        flags=found.flags,
        seconds={**done.seconds, "verify": found.seconds["verify"]},
    )
