"""The state of a training run: complete under its name, or not there. torch.distributed.checkpoint writes and reads it.

    state-00000200/     parameters in fp32, both moments of AdamW, the step; written as state-00000200.tmp, then renamed
    curve.jsonl         a line of figures for every step so far

A state is good once a step that started from it gave a finite loss: only then does the one before it go. Any number of processes
reads what another number wrote.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException

from . import output
from .distill_processes import Processes

CURVE = "curve.jsonl"
_NAME = re.compile(r"state-(\d{8})")
_ROOM = 64 << 20  # bytes: a disk with less is full, as far as a tensor goes


def prepare(optimiser: torch.optim.Optimizer) -> None:
    """Gives AdamW its moments before the first step, so that a state always has the same shape."""
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            optimiser.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _tree(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Name -> tensor, of all that training changes; split tensors stay split."""
    tree: dict[str, Any] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            tree[f"{name}/value"] = parameter.data
            tree |= {f"{name}/{key}": optimiser.state[parameter][key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return tree


def save(folder: Path, step: int, module: nn.Module, optimiser: torch.optim.Optimizer, group: Processes) -> None:
    """State after `step` steps, beside the one before it."""
    name = folder / f"state-{step:08}"
    part = name.with_suffix(".tmp")
    if group.first:
        for old in (part, name):
            output.discard(old) if old.exists() else None
    group.wait()
    try:
        with _as_it_was(part), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process alone has no process group is no news
            checkpoint.save(_tree(module, optimiser), checkpoint_id=part, no_dist=group.mesh is None)
    except OSError:
        if group.first:  # on a full disk it is in the way of everything else
            output.discard(part)
        raise
    group.wait()
    if group.first:
        part.rename(name)
        output.sync(folder)
    group.wait()


@contextlib.contextmanager
def _as_it_was(path: Path) -> Iterator[None]:
    """What went wrong, an interrupt or a full disk, in place of the BaseException that torch wraps around it.

    An OSError names `path`. Bytes that could not be written come from torch as a RuntimeError of its zip file; a write that fails on
    a disk with room left is an error of that disk.
    """
    try:
        yield
    except CheckpointException as wrapped:
        error: BaseException | None = next(iter(wrapped.failures.values()))[0]
        first = error
        while error is not None and not isinstance(error, OSError | KeyboardInterrupt):
            error = error.__context__
        if error is None and isinstance(first, RuntimeError) and "inline_container" in str(first):
            code = errno.ENOSPC if shutil.disk_usage(path.parent).free < _ROOM else errno.EIO
            error = OSError(code, os.strerror(code))
        if isinstance(error, OSError):
            error.filename = str(path)
        raise (error or first or wrapped) from None


def confirm(folder: Path) -> None:
    """The newest state has shown that it is good: older ones go."""
    for older in states(folder)[:-1]:
        output.discard(older)


def doubt(folder: Path, step: int) -> int:
    """The step behind `step` went wrong: a state of just that step goes. Returns the step of the one that stays, 0 = none."""
    found = {int(path.name.removeprefix("state-")): path for path in states(folder)}
    if step in found:
        output.discard(found.pop(step))
    return max(found, default=0)


def states(folder: Path) -> list[Path]:
    """Complete states, the oldest first."""
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def restore(folder: Path, module: nn.Module, optimiser: torch.optim.Optimizer, group: Processes) -> int:
    """Reads the newest state into module and optimiser; how many steps it stands for, 0 = there is none."""
    found: str = group.told(states(folder)[-1].name if group.first and states(folder) else "")
    if not found:
        return 0
    with _as_it_was(folder / found), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.load(_tree(module, optimiser), checkpoint_id=folder / found, no_dist=group.mesh is None)
    return int(found.removeprefix("state-"))


class Curve:
    """The figures of every step; goes on behind step `done`, forgetting what came after it."""

    def __init__(self, path: Path, done: int) -> None:
        self.path = path
        self.points: list[dict[str, Any]] = []
        if path.is_file() and done:
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    point = json.loads(line)
                except ValueError:
                    break
                if point["step"] <= done:
                    self.points.append(point)
        output.write(path, "".join(json.dumps(p) + "\n" for p in self.points))

    def add(self, point: dict[str, Any]) -> None:
        self.points.append(point)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")

    def sync(self) -> None:
        """Before a state counts, its curve is on the disk."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
