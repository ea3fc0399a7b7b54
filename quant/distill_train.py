"""The loop: batch, teacher, loss, step. One process, or several under FSDP2, by the same lines.

AdamW (.9, .95), gradients clipped to norm 1, weight decay on matrices only; linear warm-up over 2 % of the steps (at least 10),
then a cosine down to a tenth. Dropout does not exist; the order of the data is a function of the step: a run that goes on
repeats what it would have done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from . import distill_state
from .distill_data import digest
from .distill_models import Batch, Student, Teacher, target_of
from .distill_processes import Processes
from .progress import Callback, Meter
from .qad import REST_BESIDE_SCALES, REST_TIMES, SCALES_TIMES, SHIFT, STEPS

WARM_UP, WARM_UP_STEPS, LAST = 0.02, 10, 0.1
BETAS, CLIP = (0.9, 0.95), 1.0


class Diverged(ArithmeticError):
    """A loss or a gradient is no number any more; the last good state is kept. Exit code 1."""

    code = 1


class Data(Protocol):
    """Where batches come from: tokens for a teacher that runs along, or a capture that brings its words."""

    def batch(self, step: int, size: int) -> Batch: ...


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: steps, windows a step, windows that run at once in a process, peak rate, weight decay, save interval."""

    steps: int
    batch: int
    micro: int
    lr: float
    decay: float
    every: int

    def rate(self, step: int) -> float:
        """Learning rate of a step (0 = the first)."""
        warm = min(self.steps, max(WARM_UP_STEPS, round(WARM_UP * self.steps)))
        if step < warm:
            return self.lr * (step + 1) / warm
        share = (step - warm) / max(1, self.steps - warm - 1)
        return self.lr * (LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def optimiser_of(student: Student, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW over what is trained; norms, biases and all of a quantised student are not decayed."""
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    scales = [trained.pop(name) for name in list(trained) if name.endswith(SHIFT)]
    steps = [trained.pop(name) for name in list(trained) if name.endswith(STEPS)]
    rest = (REST_TIMES if steps else REST_BESIDE_SCALES) if scales or steps else 1.0
    decay = schedule.decay if rest == 1.0 else 0.0
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": decay, "times": rest},
        {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0, "times": rest},
        {"params": steps, "weight_decay": 0.0, "times": 1.0},
        {"params": scales, "weight_decay": 0.0, "times": SCALES_TIMES if steps else 1.0},
    ]
    made = torch.optim.AdamW([g for g in groups if g["params"]], lr=schedule.lr, betas=BETAS)
    distill_state.prepare(made)
    return made


def train(
    student: Student,
    teacher: Teacher | None,
    data: Data,
    schedule: Schedule,
    group: Processes,
    folder: Path,
    *,
    progress: Callback | None = None,
    saved: Callable[[int], None] = lambda step: None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Trains to the end from the newest state in `folder`, and leaves a state of the last step there.

    Returns the curve (a point per step: step, loss, divergence, ce, hidden, lr, norm) and this run's seconds and tokens.
    Diverged when a loss or gradient is not finite: nothing of that step is kept. `saved` is told of every state.
    """
    student.train()
    optimiser = optimiser_of(student, schedule)
    start = distill_state.restore(folder, student, optimiser, group)
    curve = distill_state.Curve(folder / distill_state.CURVE, start) if group.first else None
    meter = Meter("distill", schedule.steps, progress if group.first else None, "steps")
    meter.skip(start)
    began, tokens = time.monotonic(), 0
    for step in range(start, schedule.steps):
        batch = data.batch(step, schedule.batch)
        point = _step(student, teacher, batch, optimiser, schedule, step, group)
        wrong = [n for n in ("loss", "norm") if not math.isfinite(point[n])]
        if wrong:
            last = distill_state.doubt(folder, step) if group.first else 0
            kept = f"the state of step {last} is kept" if last else "no good state is there yet"
            raise Diverged(
                f"step {step + 1}: {'the loss' if wrong[0] == 'loss' else 'the gradient'} is {point[wrong[0]]} at batch "
                f"sha256 {digest(batch)}; stopped, {kept}; look at the data or go on with a lower --lr"
            )
        if group.first:
            distill_state.confirm(folder)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        tokens += batch.ids.numel()
        if curve is not None:
            curve.add(point)
        done = step + 1
        if done % schedule.every == 0 or done == schedule.steps:
            if curve is not None:
                curve.sync()
            distill_state.save(folder, done, student, optimiser, group)
            if group.first:
                saved(done)
        spent = time.monotonic() - began
        meter.add(1, f"loss {point['loss']:.4f}  {tokens / spent:.0f} tok/s" if spent else "")
    return (curve.points if curve is not None else []), {"seconds": time.monotonic() - began, "tokens": tokens}


def _step(
    student: Student,
    teacher: Teacher | None,
    batch: Batch,
    optimiser: torch.optim.Optimizer,
    schedule: Schedule,
    step: int,
    group: Processes,
) -> dict[str, Any]:
    """Gradients of one batch, clipped; the figures of the whole batch on every process."""
    for settings in optimiser.param_groups:
        settings["lr"] = schedule.rate(step) * settings["times"]
    total = max(1, int(batch.counted.sum()))
    share = schedule.batch // group.world
    sums = torch.zeros(4, device=group.device)
    for begin in range(group.rank * share, (group.rank + 1) * share, schedule.micro):
        part = batch.rows(slice(begin, min(begin + schedule.micro, (group.rank + 1) * share))).to(group.device)
        target, heard = target_of(part, teacher)
        loss, parts = student(part, target, heard, total)
        (loss * group.world).backward()  # FSDP2 takes the mean over processes, the losses are shares of a sum
        sums += torch.cat([loss.detach()[None], parts])
    found = group.sum(sums).tolist()
    norm: Any = torch.nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], CLIP)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    names = ("loss", "divergence", "ce", "hidden")
    return {"step": step + 1, **dict(zip(names, found, strict=True)), "lr": schedule.rate(step), "norm": float(norm)}
