"""`percard verify DST --against SRC`: is what lies on disk what it should be, and does it say what its source says?

    level bytes     every expected tensor with dtype and shape, config against tensors, all that was not quantised equal
                    to the source byte by byte, side files by sha256
    level weights   bytes, and per quantised weight: no NaN, scales above 0, SQNR against the source
    level blocks    weights, and per block: how far its output is off, FP and quantised on the same input
    level model     blocks, and KL, top-1 and perplexity of the whole model over a held-out text

A wrong byte is a failure, a weight below its SQNR a flag; both make the report red, and so does a gate that is missed.
Where a method changed weights before it rounded them (transforms.py), the source's tensors are changed here as well before
they are compared. Needs no engine; the last two levels run the blocks through transformers. Broken files raise FormatError.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ..formats import accepts, compressed_tensors
from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError, QuantSpec
from . import fidelity, heldout, report, walk
from .methods.records import signal_and_noise
from .pair import Pair
from .progress import Callback, Meter
from .report import Module, Report
from .walk import EMBEDDING, HEAD, Linear
from .workers import Workers

LEVELS = ("bytes", "weights", "blocks", "model")
WITH_TEXT = ("blocks", "model")
LEAST_SQNR = {3: 12.0, 4: 12.0, 8: 30.0}  # dB by weight bits; normal weights: int4 g128 19.1, int8 row 42.1
# The same for methods that make the weight's error larger to make the output's smaller (gptq, clips). Another weight of the
# same model, which this is to find, has -3 dB.
LEAST_CALIBRATED = {3: 4.0, 4: 6.0, 8: 20.0}
DATA_FREE = ("rtn", "hqq")
MAX_LISTED = 20  # failures of one kind that are spelled out


def verify(
    dst: str | os.PathLike[str],
    src: str | os.PathLike[str],
    *,
    level: str = "weights",
    text: str | os.PathLike[str] | heldout.HeldOut | None = None,
    tokens: int | None = None,
    said: Report | None = None,
    calibration_ids: torch.Tensor | None = None,
    work: Path | None = None,
    progress: Callback | None = None,
) -> Report:
    """Compares the quantised checkpoint `dst` with its source. FormatError when one of them cannot be read at all.

    text: held-out text for levels blocks and model: a file, `tokens` of it at most, or what heldout.read made of one.
    said: what report.json of `dst` will say, while it is not written yet; calibration_ids: the windows [n, T] that were
    calibrated on, to be told from the text.
    work: where hidden states go that are too many for memory.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level!r} is unknown; choose one of {', '.join(LEVELS)}")
    if text is None and level in WITH_TEXT:
        raise FormatError(
            f"level {level} runs both models over a held-out text; give one with --text FILE (text= in Python)"
        )
    pair = Pair.open(dst, src, said)
    held_out = None
    if level not in WITH_TEXT or text is None:
        pass
    elif isinstance(text, heldout.HeldOut):
        held_out = text
    else:
        vocabulary = pair.source.info(EMBEDDING).shape[0]
        window = fidelity.window_of(pair.source.config)
        held_out = heldout.read(os.fspath(text), pair.source.path, vocabulary, window, tokens)
    done = _files(pair, level, progress)
    if held_out is None:
        return done
    if done.failures:
        note = f"level {level} was not reached: the files are not as they should be"
        return dataclasses.replace(done, warnings=(*done.warnings, note))
    return compared(pair, done, held_out, calibration_ids=calibration_ids, work=work, progress=progress)


def compared(
    pair: Pair,
    done: Report,
    text: heldout.HeldOut,
    *,
    calibration_ids: torch.Tensor | None = None,
    work: Path | None = None,
    progress: Callback | None = None,
) -> Report:
    """`done` with what levels blocks and model find (`done.level` says which)."""
    calibration = pair.said.calibration if pair.said is not None else {}
    flag, warning = heldout.compare(text, calibration, calibration_ids, pair.source.path)
    meter = Meter("compare", 1, None)
    found = fidelity.measure(pair, text.pieces, level=done.level, work=work, progress=progress)
    gates = done.gates
    if found.gate is not None:
        gate = fidelity.judged(found.gate, pair.main_spec, pair.parameters < fidelity.SMALL)
        gates = (*gates, dataclasses.replace(gate, text=text.name, sha256=text.sha256))
    return dataclasses.replace(
        done,
        layers=found.layers,
        gates=gates,
        flags=(*done.flags, *([flag] if flag else [])),
        warnings=(*done.warnings, *([warning] if warning else [])),
        seconds={**done.seconds, "compare": meter.seconds},
    )


def merged(done: Report, found: Report) -> Report:
    """The report of a run with what `verify` found in what it wrote."""
    tokens = {layer.index: layer.tokens for layer in done.layers}
    layers = tuple(dataclasses.replace(x, tokens=tokens.get(x.index, ())) for x in found.layers)
    return dataclasses.replace(
        done,
        level=found.level,
        bytes=found.bytes,
        checks=found.checks,
        failures=(*done.failures, *found.failures),
        flags=tuple(dict.fromkeys((*done.flags, *found.flags))),
        warnings=tuple(dict.fromkeys((*done.warnings, *found.warnings))),
        layers=layers or done.layers,
        gates=(*done.gates, *found.gates),
        accepts=found.accepts,
        seconds={**done.seconds, **{k: done.seconds.get(k, 0.0) + v for k, v in found.seconds.items()}},
    )


def _accepts(pair: Pair) -> tuple[dict[str, object], ...]:
    """The rows of accepts.json for what this checkpoint holds."""
    used = dict.fromkeys((str(pair.specs[x.name]), ".experts." in x.name) for x in pair.linears)
    kinds = ((spec, "experts" if experts else "dense") for spec, experts in used)
    return tuple(
        {"engine": r.engine, "versions": r.versions, "spec": spec, "modules": kind, "verdict": r.verdict}
        | {"needs": r.needs, "reason": r.reason, "source": r.source}
        for spec, kind in kinds
        for r in accepts.rows()
        if spec in r.specs and r.modules == kind
    )


def _files(pair: Pair, level: str, progress: Callback | None) -> Report:
    """Levels bytes and weights."""
    source, made, specs, linears = pair.source, pair.made, pair.specs, pair.linears
    infos, dtype = source.tensors, pair.found.dtype
    meter = Meter("verify", sum(i.nbytes for i in infos.values()), progress)
    failures = [*_names(pair), *_config(pair), *_side_files(source, made)]
    wrong = {x.name for x in linears if any(f"{x.name}." in f for f in failures)}
    copied = [n for n in source.names if n not in {x.tensor for x in linears}] + ([HEAD] if pair.untied else [])
    failures += _copies(pair, copied, meter)
    modules, flags, weights = [], [], {}
    if level != "bytes":
        with Workers() as workers:
            for linear in linears:
                if linear.name not in wrong:
                    weights[linear.name] = _weight(pair, linear, workers, meter)
    for linear in linears:
        spec = specs[linear.name]
        names = [f"{linear.name}.{s}" for s in compressed_tensors.plan(linear.shape, spec, dtype)]
        size = sum(made.info(n).nbytes for n in names if n in made.tensors)
        ratio, exact = None, False
        if linear.name in weights:
            problem, signal, noise = weights[linear.name]
            ratio, exact = report.sqnr(signal, noise), noise == 0
            if problem:
                failures.append(problem)
            elif not exact and (ratio or 0.0) < (least := _least(linear, spec, pair.said)):
                flags.append(
                    f"{linear.name}: SQNR {ratio or 0.0:.1f} dB, at least {least:.0f} expected for {spec}; "
                    "give it more bits in the recipe's layers, or compare with the right source"
                )
        else:
            meter.add(infos[linear.tensor].nbytes, linear.name)
        modules.append(Module(linear.name, str(spec), "", linear.shape, ratio, infos[linear.tensor].nbytes, size))
    return Report(
        verb="verify",
        source=str(source.path),
        output=str(made.path),
        level=level,
        modules=tuple(modules),
        kept={},
        bytes=_bytes(source, made, modules),
        seconds={"verify": meter.seconds},
        checks={
            "tensors": len(made.names),
            "quantised": len(modules),
            "equal_to_source": sum(1 for n in copied if not pair.touches(n)),
            "transformed": sum(1 for n in copied if pair.touches(n)),
            "side_files": {p.name: _sha256(p) for p in source.side_files},
        },
        failures=tuple(failures),
        flags=tuple(flags),
        warnings=tuple(
            [f"{p.name} of the source was left out: never opened" for p in source.skipped]
            + ([pair.note] if pair.note else [])
        ),
        calibration=pair.said.calibration if pair.said is not None else {},
        accepts=_accepts(pair),
    )


def _least(linear: Linear, spec: QuantSpec, said: Report | None) -> float:
    """The SQNR in dB below which a weight is flagged; what method made it stands in the report."""
    method = next((m.method for m in said.modules if m.name == linear.name), "") if said is not None else ""
    free = method in ("", *DATA_FREE)
    return (LEAST_SQNR if free else LEAST_CALIBRATED)[spec.weight_bits]


def _names(pair: Pair) -> Iterator[str]:
    """Differences between the tensors that should be there and those that are."""
    source, made = pair.source, pair.made
    expected = {n: (source.info(n).dtype, source.info(n).shape) for n in source.names}
    if pair.untied:
        expected[HEAD] = (source.info(EMBEDDING).dtype, source.info(EMBEDDING).shape)
    for linear in pair.linears:
        del expected[linear.tensor]
        plan = compressed_tensors.plan(linear.shape, pair.specs[linear.name], pair.found.dtype)
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


def _config(pair: Pair) -> Iterator[str]:
    """config.json may differ in quantization_config only (and in a head that was untied), the order of keys included."""
    made, free = pair.made, ("quantization_config", *(["tie_word_embeddings"] if pair.untied else []))
    here = [(k, v) for k, v in pair.source.config.items() if k not in free]
    there = [(k, v) for k, v in made.config.items() if k not in free]
    if here != there:
        keys = sorted({k for k, v in here if (k, v) not in there} | {k for k, v in there if (k, v) not in here})
        yield f"{made.path / 'config.json'}: differs from the source in {', '.join(keys) or 'the order of its keys'}"


def _side_files(source: Checkpoint, made: Checkpoint) -> Iterator[str]:
    """Side files must be equal; our own report and card take the place of older ones, which a pruned or distilled source has."""
    for path in source.side_files:
        name = path.relative_to(source.path)
        copy = made.path / name
        if str(name) in (report.REPORT_NAME, report.SECOND_CARD_NAME):
            continue
        if not copy.is_file():
            yield f"{copy}: is missing; the source has it"
        elif _sha256(copy) != _sha256(path):
            yield f"{copy}: differs from the source's (sha256 {_sha256(copy)[:12]}, expected {_sha256(path)[:12]})"


def _copies(pair: Pair, names: list[str], meter: Meter) -> Iterator[str]:
    """Tensors without a spec must be equal byte by byte, to the source's or to what the transforms make of it."""
    source, made, problems = pair.source, pair.made, []
    for name in names:
        info = source.info(EMBEDDING if name == HEAD and pair.untied else name)
        if name in made.tensors and made.info(name).nbytes == info.nbytes:
            if pair.said is not None and name in pair.said.trained:
                if not bool(torch.isfinite(made.read(name)).all()):
                    problems.append(f"{made.info(name).file}: tensor {name} holds NaN or Inf; train it again")
            elif pair.touches(name):
                if not _equal(made.read(name), pair.stored(name), pair.transforms.rotation is not None):
                    problems.append(
                        f"{made.info(name).file}: tensor {name} differs from the source's after the transforms "
                        "(percard-transforms.npz, report.json); one of them is not the one that was written"
                    )
            elif any(a != b for a, b in zip(source.raw(name), made.raw(name), strict=True)):
                problems.append(
                    f"{made.info(name).file}: tensor {name} differs from the source's; it had to be copied as it is"
                )
        meter.add(info.nbytes if name in source.tensors else 0, name)
    yield from _at_most(problems)


def _equal(found: torch.Tensor, expected: torch.Tensor, rotated: bool) -> bool:
    """Bit by bit; where a rotation summed rows, whose order another machine may change, up to the last bits."""
    if rotated:
        most = float(expected.float().abs().max()) if expected.numel() else 0.0
        other = float((found != expected).float().mean()) if expected.dtype.itemsize == 2 else 0.0
        close = torch.allclose(found.float(), expected.float(), rtol=torch.finfo(expected.dtype).eps, atol=1e-5 * most)
        return close and other < 0.01  # of many sums a few are near enough to a border to round another way
    return torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8))


def _weight(pair: Pair, linear: Linear, workers: Workers, meter: Meter) -> tuple[str | None, float, float]:
    """(what is wrong, signal, noise) of one quantised weight; sums of squares over row ranges."""
    source, made, spec = pair.source, pair.made, pair.specs[linear.name]
    suffixes = compressed_tensors.plan(linear.shape, spec, pair.found.dtype)
    file = made.info(f"{linear.name}.{next(iter(suffixes))}").file
    size = source.info(linear.tensor).nbytes // max(linear.shape[0], 1)
    whole = pair.expected(linear.tensor) if pair.touches(linear.tensor) else None

    def rows(start: int, stop: int) -> torch.Tensor:
        return source.read_rows(linear.tensor, start, stop) if whole is None else whole[start:stop]

    def work(start: int, stop: int) -> tuple[str | None, dict[str, float], int]:
        weight, bytes_done = rows(start, stop), size * (stop - start)
        parts = {s: _rows(made, f"{linear.name}.{s}", s, linear, spec, start, stop) for s in suffixes}
        none = {"signal": 0.0, "noise": 0.0}
        try:
            tensor = compressed_tensors.read(parts, spec, (stop - start, linear.shape[1]))
        except FormatError as error:
            return f"{file}: {linear.name}, rows {start} to {stop - 1}: {error}", none, bytes_done
        if not bool((tensor.scale > 0).all()):
            return f"{file}: tensor {linear.name}.weight_scale is not finite and above zero", none, bytes_done
        sums = signal_and_noise(weight.float(), tensor.data, tensor.scale, tensor.zero, spec)
        return None, sums, bytes_done

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
