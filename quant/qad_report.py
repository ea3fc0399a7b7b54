"""What distilling under quantisation leaves beside the weights: qad.json, report.json as the quantiser writes it, the model card.

A 16-bit student may bring distill.json and a card of its own; they stay as they are, as the quantiser leaves them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..formats import compressed_tensors
from ..formats.checkpoint import Checkpoint
from . import distill_report, engines, output, report, verify, walk
from .distill_plan import Plan
from .output import Output
from .progress import Callback
from .qad_child import Qad, reported, trained_rest
from .report import Module, Report

FILES = ("qad.json", "qad-loss.png")


def write(planned: Plan, start: Checkpoint, done: dict[str, Any], out: Output, progress: Callback | None) -> None:
    """report.json, checked against the 16-bit source where that is known, and the card. RuntimeError for wrong bytes."""
    qad = planned.qad
    assert qad is not None
    said = _said(qad, start, out.dst, done["run"]["seconds"])
    source = Path(said.source)
    if said.source and (source / "config.json").is_file():
        found = verify.verify(out.folder, source, level="weights", said=said, progress=progress)
        if found.failures and qad.recipe is not None:
            raise RuntimeError(f"{out.folder}: the checkpoint read back is not what was written: {found.failures[0]}")
        measured = {m.name: m.sqnr for m in found.modules}
        said = dataclasses.replace(
            said, modules=tuple(dataclasses.replace(m, sqnr=measured.get(m.name)) for m in said.modules)
        )
        said = verify.merged(said, found)
    else:
        note = (
            "its 16-bit source is not there, so the files were not compared with it; percard verify --against it does"
        )
        said = dataclasses.replace(said, warnings=(*said.warnings, note))
    done["warnings"] += [f"report.json: {words}" for words in (*said.failures, *said.flags)]
    output.write(out.folder / report.REPORT_NAME, said.to_json())
    first = report.card(
        said,
        Path(said.source or planned.student.path).name,
        _serve(qad, out.dst, said),
        report.Licence.of(planned.student.path),
    )
    theirs = (start.path / report.SECOND_CARD_NAME).exists()
    if qad.recipe is None and not theirs and (start.path / report.CARD_NAME).exists():
        theirs = "by percard" not in (start.path / report.CARD_NAME).read_text(encoding="utf-8", errors="replace")
    name = report.SECOND_CARD_NAME if theirs else report.CARD_NAME
    output.write(out.folder / name, first + "\n" + "\n".join(_training(planned, done)) + "\n")


def _said(qad: Qad, start: Checkpoint, dst: Path, seconds: float) -> Report:
    """The report before verification: what the start's says, and what was trained since."""
    before = reported(start.path)
    known = {} if before is None else {m.name: m.method for m in before.modules}
    how = "qad" if qad.weights else "qad scales"
    modules = []
    for linear in qad.found.linears:
        if linear.name in qad.specs:
            spec, method = qad.specs[linear.name], known.get(linear.name, "")
            if linear.block is not None and how not in method:
                method = f"{method}, {how}" if method else how
            parts = compressed_tensors.plan(linear.shape, spec, qad.found.dtype)
            size = sum(start.info(f"{linear.name}.{suffix}").nbytes for suffix in parts)
            whole = linear.shape[0] * linear.shape[1] * qad.found.dtype.itemsize
            modules.append(Module(linear.name, str(spec), method, linear.shape, None, whole, size))
    kept = {x.name: "16-bit in the student" for x in qad.found.linears if x.name not in qad.specs}
    halves = sum(m.bytes_before for m in modules), sum(m.bytes_after for m in modules)
    sizes = {"quantised_before": halves[0], "quantised_after": halves[1], "copied": start.nbytes - halves[1]}
    return Report(
        verb="distill",
        source=str(qad.student.path) if qad.recipe is not None else (before.source if before is not None else ""),
        output=str(dst),
        level="none",
        modules=tuple(modules),
        kept=kept if before is None else before.kept,
        bytes={"source": halves[0] + sizes["copied"], "output": start.nbytes, **sizes},
        seconds={"train": seconds},
        recipe=None if before is None else before.recipe,
        calibration={} if before is None else before.calibration,
        fingerprints={} if before is None else before.fingerprints,
        promotions=() if before is None else before.promotions,
        trained=trained_rest(qad),
    )


def _serve(qad: Qad, dst: Path, said: Report) -> dict[str, str]:
    return engines.commands(dst, qad.found, walk.Assignment(dict(qad.specs), said.kept))


def _training(planned: Plan, done: Mapping[str, Any]) -> list[str]:
    """The part of the card that says what was trained how."""
    qad = planned.qad
    assert qad is not None
    weights, scales, rest = qad.counts
    what = [f"{weights:,} weights under fake quantisation"] if qad.weights else []
    what += [f"{scales:,} scales"] if qad.scales else []
    what += [f"{rest:,} 16-bit parameters"] if qad.rest else []
    return [
        "## Trained after quantising",
        "",
        f"Started from {qad.words}, towards the teacher `{planned.reference.resolve().name}`. Trained: {' and '.join(what)}; "
        "what was trained is what is written, to the bit.",
        *([f"Licence of the teacher: {words}."] if (words := str(report.Licence.of(planned.reference))) else []),
        "",
        *distill_report.facts(done, planned),
    ]
