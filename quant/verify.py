"""`percard verify DST --against SRC`: is what lies on disk what it should be? Needs no engine and no model code.

    level bytes     every expected tensor with dtype and shape, config against tensors, all that was not quantised equal
                    to the source byte by byte, side files by sha256
    level weights   bytes, and per quantised weight: no NaN, scales above 0, SQNR against the source

A wrong byte is a failure, a weight below its SQNR a flag; both make the report red. Broken files raise FormatError.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ..formats import compressed_tensors
from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError, QuantSpec
from . import report, walk
from .methods.records import signal_and_noise
from .progress import Meter
from .recipe import Callback
from .report import Module, Report
from .walk import Linear
from .workers import Workers

LEVELS = ("bytes", "weights")
LEAST_SQNR = {3: 12.0, 4: 12.0, 8: 30.0}  # dB by weight bits; normal weights: int4 g128 19.1, int8 row 42.1
MAX_LISTED = 20  # failures of one kind that are spelled out


def verify(
    dst: str | os.PathLike[str],
    src: str | os.PathLike[str],
    *,
    level: str = "weights",
    progress: Callback | None = None,
) -> Report:
    """Compares the quantised checkpoint `dst` with its source. FormatError when one of them cannot be read at all."""
    if level not in LEVELS:
        raise ValueError(f"level {level!r} is unknown; choose one of {', '.join(LEVELS)}")
    source, made = Checkpoint.open(Path(src)), Checkpoint.open(Path(dst))
    where = str(source.path)
    infos = {n: source.info(n) for n in source.names}
    found = walk.survey(
        source.config, {n: i.shape for n, i in infos.items()}, {n: i.dtype for n, i in infos.items()}, where
    )
    specs = _specs(made)
    linears = [x for x in found.linears if x.name in specs]
    meter = Meter("verify", sum(i.nbytes for i in infos.values()), progress)
    failures = [*_names(source, made, linears, specs, found.dtype), *_config(source, made), *_side_files(source, made)]
    wrong = {x.name for x in linears if any(f"{x.name}." in f for f in failures)}
    copied = [n for n in source.names if n not in {x.tensor for x in linears}]
    failures += _copies(source, made, copied, meter)
    modules, flags, weights = [], [], {}
    if level == "weights":
        with Workers() as workers:
            for linear in linears:
                if linear.name not in wrong:
                    spec = specs[linear.name]
                    weights[linear.name] = _weight(source, made, linear, spec, found.dtype, workers, meter)
    for linear in linears:
        spec = specs[linear.name]
        names = [f"{linear.name}.{s}" for s in compressed_tensors.plan(linear.shape, spec, found.dtype)]
        size = sum(made.info(n).nbytes for n in names if n in made.tensors)
        ratio, exact = None, False
        if linear.name in weights:
            problem, signal, noise = weights[linear.name]
            ratio, exact = report.sqnr(signal, noise), noise == 0
            if problem:
                failures.append(problem)
            elif not exact and (ratio or 0.0) < LEAST_SQNR[spec.weight_bits]:
                flags.append(
                    f"{linear.name}: SQNR {ratio or 0.0:.1f} dB, at least {LEAST_SQNR[spec.weight_bits]:.0f} expected for "
                    f"{spec}; give it more bits in the recipe's layers, or compare with the right source"
                )
        else:
            meter.add(infos[linear.tensor].nbytes, linear.name)
        modules.append(Module(linear.name, str(spec), "", linear.shape, ratio, infos[linear.tensor].nbytes, size))
    return Report(
        verb="verify",
        source=where,
        output=str(made.path),
        level=level,
        modules=tuple(modules),
        kept={},
        bytes=_bytes(source, made, modules),
        seconds={"verify": meter.seconds},
        checks={
            "tensors": len(made.names),
            "quantised": len(modules),
            "equal_to_source": len(copied),
            "side_files": {p.name: _sha256(p) for p in source.side_files},
        },
        failures=tuple(failures),
        flags=tuple(flags),
        warnings=tuple(f"{p.name} of the source was left out: never opened" for p in source.skipped),
    )


def _specs(made: Checkpoint) -> dict[str, QuantSpec]:
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


def _names(
    source: Checkpoint, made: Checkpoint, linears: list[Linear], specs: dict[str, QuantSpec], dtype: torch.dtype
) -> Iterator[str]:
    """Differences between the tensors that should be there and those that are."""
    expected = {n: (source.info(n).dtype, source.info(n).shape) for n in source.names}
    for linear in linears:
        del expected[linear.tensor]
        plan = compressed_tensors.plan(linear.shape, specs[linear.name], dtype)
        expected |= {f"{linear.name}.{suffix}": value for suffix, value in plan.items()}
    problems = []
    for name, (kind, shape) in expected.items():
        if name not in made.tensors:
            problems.append(f"{made.path}: tensor {name} is missing")
        elif (made.info(name).dtype, tuple(made.info(name).shape)) != (kind, tuple(shape)):
            info = made.info(name)
            problems.append(
                f"{info.file}: tensor {name} is {info.dtype} {list(info.shape)}, expected {kind} {list(shape)}"
            )
    problems += [f"{made.info(n).file}: tensor {n} should not be there" for n in made.names if n not in expected]
    yield from _at_most(problems)


def _config(source: Checkpoint, made: Checkpoint) -> Iterator[str]:
    """config.json may differ in quantization_config only, the order of the keys included."""
    here = [(k, v) for k, v in source.config.items() if k != "quantization_config"]
    there = [(k, v) for k, v in made.config.items() if k != "quantization_config"]
    if here != there:
        keys = sorted({k for k, v in here if (k, v) not in there} | {k for k, v in there if (k, v) not in here})
        yield f"{made.path / 'config.json'}: differs from the source in {', '.join(keys) or 'the order of its keys'}"


def _side_files(source: Checkpoint, made: Checkpoint) -> Iterator[str]:
    """Side files must be equal; our own report takes the place of an older one."""
    for path in source.side_files:
        name = path.relative_to(source.path)
        copy = made.path / name
        if str(name) == report.REPORT_NAME:
            continue
        if not copy.is_file():
            yield f"{copy}: is missing; the source has it"
        elif _sha256(copy) != _sha256(path):
            yield f"{copy}: differs from the source's (sha256 {_sha256(copy)[:12]}, expected {_sha256(path)[:12]})"


def _copies(source: Checkpoint, made: Checkpoint, names: list[str], meter: Meter) -> Iterator[str]:
    """Tensors without a spec must be equal byte by byte."""
    problems = []
    for name in names:
        if name in made.tensors and made.info(name).nbytes == source.info(name).nbytes:
            pairs = zip(source.raw(name), made.raw(name), strict=True)
            if any(a != b for a, b in pairs):
                problems.append(
                    f"{made.info(name).file}: tensor {name} differs from the source's; it had to be copied as it is"
                )
        meter.add(source.info(name).nbytes, name)
    yield from _at_most(problems)


def _weight(
    source: Checkpoint,
    made: Checkpoint,
    linear: Linear,
    spec: QuantSpec,
    dtype: torch.dtype,
    workers: Workers,
    meter: Meter,
) -> tuple[str | None, float, float]:
    """(what is wrong, signal, noise) of one quantised weight; sums of squares over row ranges."""
    suffixes = compressed_tensors.plan(linear.shape, spec, dtype)
    file = made.info(f"{linear.name}.{next(iter(suffixes))}").file

    def work(start: int, stop: int) -> tuple[str | None, dict[str, float], int]:
        weight = source.read_rows(linear.tensor, start, stop)
        parts = {s: _rows(made, f"{linear.name}.{s}", s, linear, spec, start, stop) for s in suffixes}
        none = {"signal": 0.0, "noise": 0.0}
        try:
            tensor = compressed_tensors.read(parts, spec, (stop - start, linear.shape[1]))
        except FormatError as error:
            return f"{file}: {linear.name}, rows {start} to {stop - 1}: {error}", none, weight.nbytes
        if not bool((tensor.scale > 0).all()):
            return f"{file}: tensor {linear.name}.weight_scale is not finite and above zero", none, weight.nbytes
        sums = signal_and_noise(weight.float(), tensor.data, tensor.scale, tensor.zero, spec)
        return None, sums, weight.nbytes

    problem: str | None = None
    if "weight_shape" in suffixes and made.read(f"{linear.name}.weight_shape").tolist() != list(linear.shape):
        said = made.read(f"{linear.name}.weight_shape").tolist()
        problem = f"{file}: tensor {linear.name}.weight_shape says {said}, expected {list(linear.shape)}"
    signal = noise = 0.0
    for wrong, sums, done in workers.over(work, walk.row_ranges(linear.shape)):
        problem = problem or wrong
        signal, noise = signal + sums["signal"], noise + sums["noise"]
        meter.add(done, linear.name)
    if problem is None and not (signal < float("inf") and noise < float("inf")):
        problem = f"{file}: {linear.name} holds NaN or Inf, or its source does"
    return problem, signal, noise


def _rows(
    made: Checkpoint, name: str, suffix: str, linear: Linear, spec: QuantSpec, start: int, stop: int
) -> torch.Tensor:
    """What rows start..stop-1 of a weight need of one of its tensors; `start` is a multiple of walk.ROW_MULTIPLE."""
    rows, columns = linear.shape
    if suffix == "weight_shape":
        return torch.tensor([stop - start, columns])
    if made.info(name).shape[0] == rows:
        return made.read_rows(name, start, stop)
    return made.read_rows(
        name, start * spec.weight_bits // 32, -(-stop * spec.weight_bits // 32)
    )  # packed along the rows


def _bytes(source: Checkpoint, made: Checkpoint, modules: list[Module]) -> dict[str, int]:
    before, after = sum(m.bytes_before for m in modules), sum(m.bytes_after for m in modules)
    return {
        "source": source.nbytes,
        "output": made.nbytes,
        "quantised_before": before,
        "quantised_after": after,
        "copied": source.nbytes - before,
    }


def _at_most(problems: list[str]) -> Iterator[str]:
    yield from problems[:MAX_LISTED]
    if len(problems) > MAX_LISTED:
        yield f"and {len(problems) - MAX_LISTED} more of this kind"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
