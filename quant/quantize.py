"""`percard quantize`: source checkpoint in, quantised checkpoint out, checked. The whole story, top to bottom.

Data-free methods know no model: weight after weight, row range by row range, is read, rounded and packed, and whatever
has no spec is copied byte by byte. Memory is about one packed weight and a row range per thread. Calibrated methods go
block by block (sequential.py). What the method found is what is written: nothing is quantised a second time.

Work is cut into units, a block or about half a gigabyte. A finished unit is on the disk and in the journal, so that a run
that was killed costs one unit and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..formats import affine, compressed_tensors
from ..formats.checkpoint import TensorInfo, Writer
from ..formats.spec import FormatError, QuantSpec
from . import engines, fidelity, heldout, output, preflight, promote, report, verify, walk
from .journal import NAME, Journal, machine, source_mark, stretches
from .methods import METHODS, autoround
from .output import Output
from .progress import Callback, Meter
from .recipe import Recipe, Step
from .report import Layer, Module, Report
from .transforms import FILE as TRANSFORMS
from .transforms import Transforms
from .walk import EMBEDDING, HEAD, Linear
from .workers import Workers

if TYPE_CHECKING:
    from .calibrated import Blocks
    from .delegate import Delegate

UNIT = 512 << 20  # bytes of the source that a unit of copies and data-free rounding takes
REVISION = 1  # raised when the same recipe gives other bytes


def run(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    recipe: Recipe,
    *,
    force: bool = False,
    fresh: bool = False,
    progress: Callback | None = None,
) -> Report:
    """Quantises `src` into the new folder `dst` and checks the result; goes on with what a killed run left, unless `fresh`.

    Raises, with nothing left behind: FormatError (source), RecipeError, FileExistsError (output, or an unfinished run
    that differs), preflight.Refused. OSError (disk full) and an interrupt leave the finished units for the next call. A
    report with status "red" leaves the folder: it is complete, but not as good as it should be.
    """
    source_path, out_path = Path(src), Path(dst)
    output.refuse(source_path, out_path, force)
    plan = preflight.check(source_path, recipe, out_path)
    if plan.refusals:
        raise preflight.Refused(plan)
    text = _held_out(plan)  # before hours of work, not after
    with Output(out_path, force, fresh) as out:
        out.keep = (out.work / NAME).exists()  # finished units of an earlier run
        journal = Journal(out.work / NAME, _fingerprint(plan))
        meter = Meter("quantize", plan.bytes_source, progress)
        modules, layers = _write(plan, out, journal, meter)
        out.written = True
        done = _report(plan, out_path, modules, {"quantize": meter.seconds}, journal.fingerprint)
        done = dataclasses.replace(done, layers=tuple(layers))
        if recipe.verify.level != "none":
            done = _verified(done, plan, out, text, progress)
        output.write(out.folder / report.REPORT_NAME, done.to_json())
        if recipe.card:
            name = report.SECOND_CARD_NAME if (source_path / report.CARD_NAME).exists() else report.CARD_NAME
            now = {m.name: QuantSpec.parse(m.spec) for m in done.modules}  # promotion may have changed some
            commands = engines.commands(out_path, plan.found, walk.Assignment(now, done.kept))
            licence = report.Licence.of(source_path)
            output.write(out.folder / name, report.card(done, plan.base, commands, licence))
        out.publish()
    return done


def _fingerprint(plan: preflight.Preflight) -> dict[str, Any]:
    """All that the bytes depend on."""
    recipe = {k: v for k, v in plan.recipe.to_dict().items() if k in ("stages", "run")}
    mark: dict[str, Any] = {
        "source": source_mark(plan.source),
        "recipe": recipe,
        "percard": f"{report.versions()['percard']}.{REVISION}",
    }
    if plan.recipe.calibrated:
        import transformers

        assert plan.windows is not None
        mark |= {"calibration": plan.windows.sha256, "transformers": transformers.__version__}
        mark |= {"dtype": str(plan.dtype).removeprefix("torch.")}
        if METHODS[plan.recipe.rounding.method].whole:
            mark |= {"package": f"{autoround.PACKAGE} {autoround.version()}"}
    return mark | machine()


@dataclasses.dataclass(frozen=True)
class Unit:
    """A stretch of work that is done whole or again. `names`: tensors of the source. block: None = around the blocks."""

    key: str
    names: tuple[str, ...]
    block: int | None = None


def _units(plan: preflight.Preflight) -> list[Unit]:
    """The work in order. Data-free: along the bytes on disk. Calibrated: what is around the blocks, then each block."""
    blocks: dict[int, list[str]] = {}
    rest: list[str] = []
    for name in plan.source.names:
        index = walk.block_of(plan.found, name) if plan.recipe.calibrated else None
        (rest if index is None else blocks.setdefault(index, [])).append(name)
    if plan.untied:
        rest.append(HEAD)
    units = stretches(rest, lambda name: _info(plan, name).nbytes, UNIT)
    parts = [Unit(f"part {i}", tuple(names)) for i, names in enumerate(units)]
    return parts + [Unit(f"block {i}", tuple(blocks[i]), i) for i in sorted(blocks)]


def _write(plan: preflight.Preflight, out: Output, journal: Journal, meter: Meter) -> tuple[list[Module], list[Layer]]:
    """Writes every tensor and side file; config.json comes last. Modules, and facts of each calibrated block."""
    source, specs = plan.source, plan.assignment.specs
    linears = {x.tensor: x for x in plan.found.linears if x.name in specs}
    units = _units(plan)
    finished = {entry["unit"]: entry for entry in journal.entries}
    kept = [n for u in units if u.key in finished for n in _output_names(plan, u, linears)]
    meter.skip(sum(_info(plan, n).nbytes for u in units if u.key in finished for n in u.names))
    transforms = Transforms(plan.kv, rotation=plan.rotation)
    blocks: Blocks | Delegate | None = None
    with Writer(out.folder, plan.tensors, resume=kept) as writer:
        if plan.recipe.calibrated:
            # transformers, which only these methods need, is imported in there
            if METHODS[plan.recipe.rounding.method].whole:
                from .delegate import Delegate

                blocks = Delegate(plan, out.work, meter)
            else:
                from .calibrated import Blocks

                blocks = Blocks(plan, transforms, out.work, meter, journal.entries)
        for unit in units:
            if unit.key in finished:
                continue
            if unit.block is not None:
                assert blocks is not None
                entry = blocks.quantise(unit.block, writer)
            else:
                mine = [linears[n] for n in unit.names if n in linears]
                with Workers() as workers:
                    found = [_quantise(plan, x, specs[x.name], writer, workers, meter, transforms) for x in mine]
                entry = {"modules": [dataclasses.asdict(m) for m in found]}
            for name in (n for n in unit.names if n not in linears):
                _copy(plan, name, writer, meter, transforms)
            writer.sync()
            finished[unit.key] = {"unit": unit.key, **entry}
            journal.add(finished[unit.key])
            out.keep = True
            if blocks is not None:
                blocks.drop_old(unit.block)
        writer.copy_side_files(source)
        extra = {TRANSFORMS: transforms.to_bytes()} if transforms.scales else {}
        writer.finish(plan.config, extra)
    entries = [finished[u.key] for u in units]
    modules = [Module(**{**m, "shape": tuple(m["shape"])}) for e in entries for m in e["modules"]]
    return _in_order(plan, modules), [
        Layer(e["layer"]["index"], tokens=tuple(e["layer"]["tokens"])) for e in entries if "layer" in e
    ]


def _info(plan: preflight.Preflight, name: str) -> TensorInfo:
    """Of a source tensor; a head that was untied comes from the embedding."""
    return plan.source.info(EMBEDDING if name == HEAD and plan.untied else name)


def _in_order(plan: preflight.Preflight, modules: list[Module]) -> list[Module]:
    """By the order of execution, whatever the order of work."""
    rank = {x.name: i for i, x in enumerate(plan.found.linears)}
    return sorted(modules, key=lambda m: rank[m.name])


def _output_names(plan: preflight.Preflight, unit: Unit, linears: Mapping[str, Linear]) -> Iterator[str]:
    """The tensors of the output that a unit writes; linears: those with a spec, by tensor."""
    for name in unit.names:
        if name not in linears:
            yield name
            continue
        x = linears[name]
        for suffix in compressed_tensors.plan(x.shape, plan.assignment.specs[x.name], plan.found.dtype):
            yield f"{x.name}.{suffix}"


def _quantise(
    plan: preflight.Preflight,
    linear: Linear,
    spec: QuantSpec,
    writer: Writer,
    workers: Workers,
    meter: Meter,
    transforms: Transforms,
) -> Module:
    """Rounds one weight, row range by row range, and writes its tensors."""
    source, dtype = plan.source, plan.found.dtype
    step = plan.recipe.rounding
    if linear.block is None and METHODS[step.method].calibrated:  # a head: no block shows what it reads
        step = Step.of("rtn")
    method, options = METHODS[step.method], dict(step.options)
    whole = {
        suffix: torch.empty(shape, dtype=kind)
        for suffix, (kind, shape) in compressed_tensors.plan(linear.shape, spec, dtype).items()
    }
    filled = dict.fromkeys(whole, 0)
    facts = {"signal": 0.0, "noise": 0.0}
    info = source.info(linear.tensor)
    changed = None
    if transforms.touches(linear.tensor):
        changed = transforms.apply(linear.tensor, source.read(linear.tensor), source.read)

    def work(start: int, stop: int) -> tuple[dict[str, torch.Tensor], dict[str, Any], int]:
        weight = source.read_rows(linear.tensor, start, stop) if changed is None else changed[start:stop]
        try:
            rounded = method.run(weight.float(), None, spec, scale_dtype=affine.scale_dtype_of(spec, dtype), **options)
        except FormatError as error:
            raise FormatError(f"{info.file}: tensor {linear.tensor}, rows {start} to {stop - 1}: {error}") from None
        nbytes = (stop - start) * linear.shape[1] * info.dtype.itemsize
        return compressed_tensors.write(rounded.tensor, dtype), rounded.facts, nbytes

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
    return Module(linear.name, str(spec), plan.method_of(linear), linear.shape, ratio, info.nbytes, size)


def _copy(plan: preflight.Preflight, name: str, writer: Writer, meter: Meter, transforms: Transforms) -> None:
    """Copies a tensor's bytes, and looks at them on the way: NaN or Inf stops the run. What a transform touched is new."""
    source = plan.source
    info = _info(plan, name)
    if transforms.touches(name):
        read = source.read(EMBEDDING if name == HEAD and plan.untied else name)
        changed = transforms.apply(name, read, source.read).to(info.dtype)
        if not bool(torch.isfinite(changed).all()):
            raise FormatError(f"{info.file}: tensor {name} holds NaN or Inf once transformed; take another method")
        writer.add(name, changed)
        meter.add(info.nbytes, name)
        return

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


def _report(
    plan: preflight.Preflight,
    dst: Path,
    modules: list[Module],
    seconds: dict[str, float],
    fingerprint: dict[str, Any],
) -> Report:
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
        calibration=plan.calibration,
        fingerprints=fingerprint,
    )


def finished_units(dst: str | os.PathLike[str]) -> int:
    """How many units an unfinished run to `dst` has done; the next run goes on behind them."""
    return max(0, output.unfinished(Path(dst), NAME) - 1)


def _held_out(plan: preflight.Preflight) -> heldout.HeldOut | None:
    """The text that the result will be held against; None = the recipe wants none."""
    wanted = plan.recipe.verify
    if wanted.text is None or wanted.level not in ("blocks", "model"):
        return None
    window = fidelity.window_of(plan.source.config)
    return heldout.read(wanted.text, plan.src, int(plan.source.config["vocab_size"]), window)


def _verified(
    done: Report, plan: preflight.Preflight, out: Output, text: heldout.HeldOut | None, progress: Callback | None
) -> Report:
    """The report with what a look at the written files says, and after promotion when the recipe wants it.

    RuntimeError when the files are not what was written.
    """
    wanted, ids = plan.recipe.verify, None if plan.windows is None else plan.windows.ids
    given = {"level": wanted.level, "text": text, "said": done, "calibration_ids": ids, "work": out.work}
    found = verify.verify(out.folder, plan.src, progress=progress, **given)  # type: ignore[arg-type]
    if found.failures:
        raise RuntimeError(f"{out.folder}: the checkpoint read back is not what was written: {found.failures[0]}")
    done = verify.merged(done, found)
    if done.gate is None or done.gate.gate != "red" or wanted.on_red != "promote" or text is None:
        return done
    serve = plan.recipe.serve
    better, where = promote.until_green(
        out.folder, plan.src, done, text, max_extra=wanted.max_extra, serve=serve, work=out.work, progress=progress
    )
    if where != out.folder:
        (out.work / NAME).unlink()  # the units that it names are gone from here on
        promote.replace(out.folder, where)
    return better
