"""Joules of a run: the board's own counter, else its power integrated; on a CPU the package's counter (RAPL).

    with energy.measured(device) as meter:
        work()
    meter.section(tokens)      # the Record's section "energy"

The scope is the board or the CPU package, not the wall. Idle power stands beside and is not subtracted. A window below MIN_S is
measured and marked `power_valid` false: counters tick some ten times a second, and an average of power lags by up to one second.
A machine without a counter gets the reason in words and no figure.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import board

MIN_S = 5.0  # shorter windows are not valid
EVERY_S = 0.05  # between two readings when power is integrated
IDLE_S = 0.5
POWERCAP = Path("/sys/class/powercap")


class NoCounter(RuntimeError):
    """This machine does not say what it draws; the text is the reason."""


@dataclass(frozen=True)
class Source:
    """Where joules come from. `joules` counts up from anywhere, `wrap` is where it starts again (None = never); without it
    `watt` is integrated. `words` name the source."""

    scope: str
    words: str
    joules: Callable[[], tuple[float, ...]] | None
    watt: Callable[[], float] | None = None
    wrap: tuple[float, ...] = ()

    def between(self, before: tuple[float, ...], after: tuple[float, ...]) -> float:
        """Joules from one reading to the next, summed over counters, of which each may have started again once."""
        ends = self.wrap or (0.0,) * len(before)
        return sum(b - a if b >= a else b - a + end for a, b, end in zip(before, after, ends, strict=True))


class Meter:
    """What `measured` gives: figures once its block has ended, None where nothing was measured."""

    def __init__(self, scope: str, idle_w: float | None):
        self.scope, self.idle_w = scope, idle_w
        self.joules: float | None = None
        self.seconds = 0.0
        self.reason: str | None = None  # why it is not valid

    @property
    def valid(self) -> bool:
        return self.joules is not None and self.reason is None

    def section(self, out_tokens: float | None = None) -> dict[str, Any]:
        """The section "energy" of a Record. `out_tokens` were made in the window, None = the window made none."""
        joules = self.joules
        return {
            "energy_j": joules,
            "avg_power_w": joules / self.seconds if joules is not None and self.seconds > 0 else None,
            "idle_power_w": self.idle_w,
            "j_per_out_token": joules / out_tokens if joules is not None and out_tokens else None,
            "scope": self.scope,
            "power_valid": self.valid,
            "power_reason": self.reason,
        }


def scope_of(device: torch.device) -> str:
    """What the joules are of."""
    return "gpu_board" if device.type == "cuda" else "cpu_package"


def missing(device: torch.device, reason: str) -> dict[str, Any]:
    """The section of a row that has no measured energy, with the reason."""
    meter = Meter(scope_of(device), None)
    meter.reason = reason
    return meter.section()


def source(device: torch.device, uuid: str | None = None, powercap: Path = POWERCAP) -> Source:
    """The best source this machine has; NoCounter with the reason when there is none. `uuid` names the card, None = the first."""
    return _board(uuid) if device.type == "cuda" else _packages(powercap)


def idle_power(found: Source, seconds: float = IDLE_S, sleep: Callable[[float], None] = time.sleep) -> float | None:
    """Watt while nothing of ours runs, over `seconds`; None when the source broke meanwhile."""
    meter = Meter(found.scope, None)
    with _window(found, meter, time.perf_counter):
        sleep(seconds)
    return meter.joules / meter.seconds if meter.joules is not None and meter.seconds > 0 else None


@contextlib.contextmanager
def measured(
    device: torch.device,
    *,
    uuid: str | None = None,
    idle_w: float | None = None,
    found: Source | None = None,
    powercap: Path = POWERCAP,
    now: Callable[[], float] = time.perf_counter,
) -> Iterator[Meter]:
    """Measures what the block draws. The block must end with its work done (synchronised); `found` is a source asked for before.

    Never raises for want of a counter: the meter then says why.
    """
    meter = Meter(scope_of(device), idle_w)
    try:
        found = found or source(device, uuid, powercap)
    except NoCounter as error:
        begin = now()
        yield meter
        meter.seconds, meter.reason = now() - begin, str(error)
        return
    with _window(found, meter, now):
        yield meter
    if meter.reason is None and meter.joules is not None and meter.joules <= 0:
        meter.joules, meter.reason = None, f"{found.words}: the counter did not move"
    if meter.reason is None and meter.seconds < MIN_S:
        meter.reason = f"a window of {meter.seconds:.1f} s is shorter than {MIN_S:.0f} s"


@contextlib.contextmanager
def _window(found: Source, meter: Meter, now: Callable[[], float]) -> Iterator[None]:
    """Fills joules and seconds of the meter; a source that breaks meanwhile is its reason."""
    if found.joules is None:
        assert found.watt is not None
        with _integrated(found.watt, meter, now):
            yield
        return
    first = _read(found.joules, meter)
    begin = now()
    yield
    meter.seconds = now() - begin
    last = _read(found.joules, meter)
    if first is not None and last is not None:
        meter.joules = found.between(first, last)


def _read(joules: Callable[[], tuple[float, ...]], meter: Meter) -> tuple[float, ...] | None:
    try:
        return joules()
    except Exception as error:  # a card that is lost, a file that is gone: NVML has an error class for each
        meter.reason = f"{type(error).__name__}: {error}"
        return None


@contextlib.contextmanager
def _integrated(watt: Callable[[], float], meter: Meter, now: Callable[[], float]) -> Iterator[None]:
    """Power read from a thread, its trapezoids summed."""
    taken: list[tuple[float, float]] = []
    done = threading.Event()

    def read() -> bool:
        try:
            taken.append((now(), watt()))
        except Exception as error:
            meter.reason = f"{type(error).__name__}: {error}"
            return False
        return True

    def sample() -> None:
        while not done.wait(EVERY_S):
            if not read():
                return

    begin = now()
    read()
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if meter.reason is None:
        read()
    meter.seconds = now() - begin
    if meter.reason is None and len(taken) > 1:
        meter.joules = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(taken))
        meter.seconds = taken[-1][0] - taken[0][0]


def _board(uuid: str | None) -> Source:
    """NVML's counter in mJ (Volta and newer), else its power of this moment."""
    try:
        board.energy_j(uuid)
        return Source("gpu_board", "NVML energy counter", lambda: (board.energy_j(uuid),))
    except Exception as error:  # not installed, no driver, an older card
        why = f"{type(error).__name__}: {error}"
    try:
        board.power_w(uuid)
    except Exception as error:
        second = f"{type(error).__name__}: {error}"
        raise NoCounter(
            f"NVML has no energy counter ({why}) and no power ({second}); pip install nvidia-ml-py"
        ) from None
    return Source("gpu_board", "NVML power, integrated", None, lambda: board.power_w(uuid))


def _packages(powercap: Path) -> Source:
    """The energy counters of all CPU packages, in microjoules (Linux powercap; Intel and AMD)."""
    folders = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        with contextlib.suppress(OSError):
            if (folder / "name").read_text().strip().startswith("package"):
                folders.append(folder)
    if not folders:
        raise NoCounter(f"no energy counter: {powercap} names no CPU package (a virtual machine has none)")

    def value(folder: Path, name: str) -> float:
        return int((folder / name).read_text()) / 1e6

    def joules() -> tuple[float, ...]:
        return tuple(value(folder, "energy_uj") for folder in folders)

    try:
        joules()
        wraps = tuple(value(folder, "max_energy_range_uj") for folder in folders)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise NoCounter(f"{folders[0]}/energy_uj: not readable ({said}); only root may, on most systems") from None
    return Source("cpu_package", "RAPL", joules, wrap=wraps)
