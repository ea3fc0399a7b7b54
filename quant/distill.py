"""`percard distill`: a student learns to say what its teacher says. The whole story, top to bottom.

    plan      both models, their tokenizers, the front of the text; swapped roles are a question (distill_plan.py)
    data      the text becomes tokens on the disk, once (distill_data.py)
    train     transformers' own models, in one process or in those of torchrun under FSDP2 (distill_train.py)
    write     an ordinary checkpoint under the student's names and dtypes; loss curve, report, model card (distill_report.py)

A run that was killed goes on from its last complete state and repeats what it would have done (distill_state.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError
from ..formats.writer import Writer
from . import distill_data, distill_models, distill_report, distill_state, output, qad_child, qad_report, report
from .blocks import disk_names
from .capture_cache import Capture
from .distill_losses import must_serve
from .distill_models import Student, Teacher
from .distill_plan import Plan, Refused, Wish, plan
from .distill_processes import Processes, processes
from .distill_train import Schedule, train
from .journal import NAME, Journal, source_mark
from .output import Output
from .progress import Callback

# (student or child, teacher) -> what a held-out text says about them; the roof has one, this floor does not know the bench.
Measure = Callable[[Path, Path], dict[str, Any]]
# Settings that change how a run goes on, not what it is.
_FREE = ("lr", "every", "micro", "device", "checkpointing")


def run(
    student: str | os.PathLike[str],
    teacher: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    dst: str | os.PathLike[str],
    wish: Wish,
    *,
    yes: bool = False,
    force: bool = False,
    fresh: bool = False,
    measure: Measure | None = None,
    progress: Callback | None = None,
) -> dict[str, Any]:
    """Trains `student` towards `teacher` into the new folder `dst`; returns the report that lies there as distill.json.

    teacher: a checkpoint, a capture, or several: at most one checkpoint, any number of captures (distill_plan.plan).
    Under torchrun every process calls it; the first one writes, the others return {}. FormatError or FileExistsError with
    nothing left behind; Refused for a question without `yes`; Diverged, an interrupt or a full disk keep the last good state.
    """
    out_path = Path(dst)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # whatever the caller is in: this trains
        stack.enter_context(torch.enable_grad())
        group = stack.enter_context(processes(wish.device))
        must_serve(group.device)
        planned = plan(student, teacher, wish)
        if planned.question and not yes:
            raise Refused(planned.question)
        if wish.batch % group.world:
            raise FormatError(
                f"--batch {wish.batch}: {group.world} processes share it, take a multiple of {group.world}"
            )
        dtype = _dtype(wish, group)
        out: Output | None = None
        if group.first:
            for source in (planned.student.path, planned.reference, *(c.folder for c in planned.captures)):
                output.refuse(source, out_path, force)
            out = stack.enter_context(Output(out_path, force, fresh))
            _begin(out, planned, dtype, group)
            if planned.qad is not None:
                out.keep = out.keep or planned.qad.recipe is not None  # so many blocks of GPTQ need not be done again
                qad_child.begin(planned.qad, out.work, progress)
        work = Path(group.told(None if out is None else str(out.work)))
        start = None if planned.qad is None else qad_child.start_of(planned.qad, work)
        data = _data(planned, work)
        if data.windows < wish.batch:
            raise FormatError(f"{planned.text}: {data.windows} windows, less than one batch of {wish.batch}")
        schedule = Schedule(
            planned.steps(data.windows), wish.batch, wish.micro or wish.batch, wish.rate, wish.decay, wish.every
        )
        ours, theirs = _models(planned, group, dtype, start)
        curve, spent = train(ours, theirs, data, schedule, group, work, progress=progress, saved=_keeping(out))
        if planned.qad is not None and start is not None:
            qad_child.write(planned.qad, start, ours.model, None if out is None else out.folder)
            group.wait()
        else:
            _write(planned, ours, out, group)
        if out is None:
            return {}
        done: dict[str, Any] = {
            "schema": 1,
            "verb": "distill",
            **planned.to_dict(),
            "steps": schedule.steps,
            "trained_tokens": data.count(schedule.steps * schedule.batch),
            "processes": group.world,
            "dtype": str(dtype).removeprefix("torch."),
            "data": data.facts,
            "run": {**spent, "tokens_per_s": spent["tokens"] / spent["seconds"] if spent["tokens"] else None},
            "curve": distill_report.thinned(curve),
            "versions": report.versions(),
        }
        if measure is not None and isinstance(planned.teacher, Capture):
            done["warnings"].append(
                "the held-out text was not measured: a capture cannot say what it thinks of another text"
            )
        elif measure is not None:
            pairs = {"before": (start or planned.student).path, "after": out.folder}
            done["quality"] = {name: measure(folder, planned.reference) for name, folder in pairs.items()}
        name, picture = qad_report.FILES if start is not None else (distill_report.NAME, distill_report.PICTURE)
        note = distill_report.draw(curve, out.folder / picture)
        done["warnings"] += [note] if note else []
        output.write(out.folder / name, json.dumps(done, indent=1, ensure_ascii=False) + "\n")
        if planned.qad is not None and start is not None:
            qad_report.write(planned, start, done, out, progress)
        else:
            distill_report.write_card(out.folder, done, planned)
        out.publish()
    return done


def _dtype(wish: Wish, group: Processes) -> torch.dtype:
    """Of the products: bf16 on a card, fp32 on a CPU, unless it is said."""
    name = wish.dtype or ("bf16" if group.device.type == "cuda" else "fp32")
    return torch.bfloat16 if name == "bf16" else torch.float32


def _begin(out: Output, planned: Plan, dtype: torch.dtype, group: Processes) -> None:
    """Journal and tokens: of this run, or those that a killed one left."""
    import transformers

    wish = {k: v for k, v in dataclasses.asdict(planned.wish).items() if k not in (*_FREE, "data", "dtype")}
    path = Path(planned.wish.data or "").expanduser()
    stat = path.stat() if path.is_file() else None
    out.keep = out.written = bool(distill_state.states(out.work))
    out.note = output.KEPT
    Journal(
        out.work / NAME,
        {
            "source": source_mark(planned.student),
            "teacher": planned.teacher.sha256 if isinstance(planned.teacher, Capture) else source_mark(planned.teacher),
            **(
                {"captures": more} if (more := [c.sha256 for c in planned.captures if c is not planned.teacher]) else {}
            ),
            "text": [planned.wish.data, *([stat.st_size, stat.st_mtime_ns] if stat else [])],
            "wish": wish,
            "dtype": str(dtype),
            "device": group.device.type,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "percard": report.versions()["percard"],
        },
    )
    for captured in planned.captures:
        captured.verify()
    if planned.wish.data is not None and not (out.work / distill_data.FACTS).is_file():
        distill_data.write(planned.wish.data, out.work, planned.student.path, planned.vocab, planned.window)


def _data(planned: Plan, work: Path) -> distill_data.Data:
    """The text if there is one, and the windows of every capture; their probabilities only where no teacher runs along."""
    texts = [distill_data.opened(work)] if planned.wish.data is not None else []
    captured = [distill_data.CapturedData(capture, planned.k, planned.vocab) for capture in planned.captures]
    return distill_data.Data([*texts, *captured], planned.wish.seed)


def _keeping(out: Output | None) -> Callable[[int], None]:
    """From the first state on, what is there is worth keeping."""

    def saved(step: int) -> None:
        if out is not None:
            out.keep = out.written = True

    return saved


def _models(
    planned: Plan, group: Processes, dtype: torch.dtype, start: Checkpoint | None
) -> tuple[Student, Teacher | None]:
    """Both models on their device, one process after another; no teacher where nothing is asked of it."""
    wish, hidden = planned.wish, planned.hidden
    theirs = planned.teacher
    wide = int((planned.student if isinstance(theirs, Capture) else theirs).config["hidden_size"])
    student: Student | None = None
    teacher: Teacher | None = None
    for _ in group.in_turn():
        if planned.qad is not None and start is not None:
            model = qad_child.load(planned.qad, start)
        else:
            model = distill_models.load(planned.student.path, torch.float32)
        if wish.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student = Student(model, planned.objective, hidden, planned.vocab, dtype, wide)
        # Under --qad weights are gathered as they are: what is rounded then is what one process rounds.
        distill_models.spread(student, group, dtype if start is None else torch.float32)
        if not isinstance(theirs, Capture) and (planned.objective.kind != "none" or hidden is not None):
            blocks = [other for _, other in hidden.pairs] if hidden is not None else []
            teacher = Teacher(distill_models.load(theirs.path, dtype), blocks, dtype)
            distill_models.spread(teacher, group, dtype)
    assert student is not None
    return student, teacher


def _write(planned: Plan, student: Student, out: Output | None, group: Processes) -> None:
    """The trained weights under the names and in the dtypes of the student's files, one tensor in memory at a time."""
    source, tied = planned.student, planned.found.tied
    plan_ = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
    with contextlib.ExitStack() as stack:
        writer = None if out is None else stack.enter_context(Writer(out.folder, plan_, resume=()))
        left = set(plan_)
        for name, held in student.model.state_dict().items():
            whole = held.full_tensor() if hasattr(held, "full_tensor") else held
            if writer is None:
                continue
            for disk, tensor in disk_names({name: whole}, tied).items():
                if disk not in left:
                    raise FormatError(f"{source.path}: trained tensor {disk} is not in the student's files")
                writer.add(disk, tensor.detach().to("cpu", plan_[disk][0]))
                left.discard(disk)
                if disk == "model.embed_tokens.weight" and tied and "lm_head.weight" in left:  # stored twice
                    writer.add("lm_head.weight", tensor.detach().to("cpu", plan_["lm_head.weight"][0]))
                    left.discard("lm_head.weight")
        if writer is not None:
            for name in sorted(left):  # what transformers computes by itself, such as rotary frequencies
                writer.add(name, source.read(name))
            writer.copy_side_files(source)
            writer.finish(source.config)
    group.wait()
