"""What a slot is made of: stages, cells, and what a stage function gets to work with (runner.py runs them)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folder import RECORDS, replace

if TYPE_CHECKING:
    from .runner import Runner


@dataclass(frozen=True)
class Cell:
    """One task of a stage: `task` "package.module:function" with JSON `arguments`, `seconds` predicted.

    `identity` makes the measurement what it is: with the machine it is the key of the cell's row, and a row with that
    key is not measured again. `row` is what the row says even when the cell never ran. A function that gives several
    rows names all but the last with "part", which joins the identity. Cells of one `kind` share the correction of
    their predictions.
    """

    name: str
    task: str
    arguments: Mapping[str, Any]
    seconds: float
    identity: Mapping[str, Any]
    row: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""


@dataclass(frozen=True)
class Stage:
    """A part of the run: `seconds` of a ten-minute slot, the function that does it, whether a short slot keeps it.

    A `patient` stage may overrun its share up to the end of the slot: what follows has no meaning without it.
    """

    name: str
    seconds: float
    run: Callable[[Run], None]
    essential: bool = False
    patient: bool = False


@dataclass
class Tally:
    """How the cells of a stage ended."""

    ok: int = 0
    failed: int = 0
    red: int = 0
    cut: int = 0
    skipped: int = 0

    def words(self) -> str:
        """ "12 ok, 1 failed" without the zeros."""
        return ", ".join(f"{n} {word}" for word, n in vars(self).items() if n) or "no cells"


@dataclass
class Run:
    """What a stage function gets: where to write, on what, and how long still."""

    runner: Runner
    folder: Path
    device: str
    machine: Mapping[str, Any]
    tally: Tally = field(default_factory=Tally)
    files: list[str] = field(default_factory=list)
    deadline: float = 0.0

    def left(self) -> float:
        """Seconds until this stage must end."""
        return self.deadline - self.runner.now()

    def say(self, text: str) -> None:
        """One line of progress."""
        self.runner.say(text)

    def cells(
        self, cells: Sequence[Cell], *, into: str = RECORDS, workers: int = 1, env: Mapping[str, str] | None = None
    ) -> None:
        """Runs cells in their order, rows into file `into` of the folder; `workers` > 1 only for what is not timed.

        `env` is for processes of these cells alone; they end with the last cell.
        """
        self.runner.run_cells(self, cells, into, workers, dict(env or {}))

    def ask(self, task: str, arguments: Mapping[str, Any], timeout: float) -> list[dict[str, Any]]:
        """What a task yields, for planning: nothing is written. RuntimeError tells what went wrong."""
        return self.runner.ask(task, arguments, timeout)

    def write(self, name: str, text: str) -> None:
        """Writes a file of this stage, whole or not at all."""
        replace(self.folder / name, text.encode())
        if name not in self.files:
            self.files.append(name)
