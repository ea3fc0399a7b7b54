"""How a long verb tells how far it is: a callback, a frozen record, and the meter that counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One step: `done` of `total` `unit` ("bytes" or "blocks"), what is at work, seconds left (None: unknown)."""

    phase: str
    done: int
    total: int
    unit: str
    label: str
    eta_s: float | None


Callback = Callable[[Progress], None]


class Meter:
    """Counts work done and tells `progress`; the time left follows from the rate so far."""

    def __init__(self, phase: str, total: int, progress: Callback | None, unit: str = "bytes") -> None:
        self.phase, self.total, self.unit, self.progress = phase, total, unit, progress
        self.done, self.before, self.started = 0, 0, time.monotonic()

    def skip(self, amount: int) -> None:
        """`amount` units were done by an earlier run: they count as done, not for the rate."""
        self.done += amount
        self.before += amount

    def add(self, amount: int, label: str) -> None:
        """`amount` more units are done; `label` names what they were of."""
        self.done += amount
        if self.progress is not None:
            spent = self.seconds
            fresh = self.done - self.before
            left = spent * (self.total - self.done) / fresh if fresh and spent > 0 else None
            self.progress(Progress(self.phase, self.done, self.total, self.unit, label, left))

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started
