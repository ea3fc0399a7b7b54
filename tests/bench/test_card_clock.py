"""The clock of a card and what the board says, against a made-up card: torch.cuda and NVML are replaced by fakes."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from percard.bench import board, clock

DEVICE = torch.device("cuda", 0)


class FakeCard:
    """Counts what is started. Inside a capture calls are recorded, a replay takes the sum of their seconds."""

    def __init__(self) -> None:
        self.now, self.recording, self.slept, self.freed = 0.0, None, 0.0, 0
        self.started: list[str] = []

    def work(self, name: str, seconds: float, launch: float = 0.0) -> Callable[[], None]:
        def call() -> None:
            if self.recording is not None:
                self.recording.append((name, seconds))
            else:
                self.started.append(name)
                self.now += max(seconds, launch)

        return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    card = FakeCard()

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = card.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    class Graph:
        def __init__(self) -> None:
            self.calls: list[tuple[str, float]] = []

        def replay(self) -> None:
            card.started += [name for name, _ in self.calls]
            card.now += sum(seconds for _, seconds in self.calls)

        def reset(self) -> None:
            card.freed += 1

    class Stream:
        def __init__(self, device: Any = None) -> None:
            pass

        def wait_stream(self, other: Any) -> None:
            pass

    @contextlib.contextmanager
    def graph(made: Graph, stream: Any = None) -> Iterator[None]:
        assert isinstance(stream, Stream) and card.recording is None
        card.recording = made.calls
        yield
        card.recording = None

    def synchronize(device: Any = None) -> None:
        assert card.recording is None, "a synchronize within a capture is an error"

    def sleep(seconds: float) -> None:
        card.slept += seconds

    fakes = {"Event": Event, "CUDAGraph": Graph, "Stream": Stream, "graph": graph, "synchronize": synchronize}
    fakes |= {"current_stream": lambda device=None: Stream(), "stream": lambda stream: contextlib.nullcontext()}
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(clock.time, "sleep", sleep)
    return card


def test_graphs_in_turn_over_all_copies(fake: FakeCard) -> None:
    a = [fake.work(f"a{i}", 10e-6, launch=30e-6) for i in range(3)]
    b = [fake.work("b0", 2e-3)]
    found = clock.card_ab({"a": a, "b": b}, device=DEVICE, rounds=5)
    assert found["a"].graph.median == pytest.approx(10e-6) and found["b"].graph.median == pytest.approx(2e-3)
    assert found["a"].eager.median == pytest.approx(30e-6), "launches show in eager calls"
    assert len(found["a"].graph.samples) == 5
    assert found["a"].calls % 3 == 0 and found["a"].calls * 10e-6 >= 0.0049, "whole turns, at least 5 ms"
    for name, times in found.items():
        assert times.calls * times.replays * times.graph.median >= 0.009, f"{name}: a sample lasts about 10 ms"
    tail = [name for name in fake.started if name in ("a0", "b0")]
    firsts = [i for i, name in enumerate(fake.started) if name == "b0"]
    assert "a0" in tail and abs(fake.started.count("a0") - fake.started.count("a1")) < 5, (
        "each copy is read equally often"
    )
    assert any(x + 1 < y for x, y in itertools.pairwise(firsts)), "A B A B, not A A B B"
    assert fake.slept == pytest.approx(0.005 * 5 * sum(t.replays for t in found.values()))
    assert fake.freed >= 2, "graphs and their memory are given back"


def test_a_capture_that_fails_frees_what_was_made(fake: FakeCard) -> None:
    def broken() -> None:
        if fake.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        clock.card_ab({"x": [broken]}, device=DEVICE, rounds=1)


def test_card_ab_refuses_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="at least one"):
        clock.card_ab({"a": []}, device=DEVICE)
    with pytest.raises(ValueError, match="at least one"):
        clock.card_ab({"a": [lambda: None]}, device=DEVICE, rounds=0)


def test_copies_hold_four_times_the_cache() -> None:
    assert clock.copies_for_cold_cache(8_700_000, 60 << 20) == 29
    assert clock.copies_for_cold_cache(500 << 20, 60 << 20) == 1
    assert clock.copies_for_cold_cache(0, 0) == 1


@pytest.fixture
def no_board(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine without NVML and without nvidia-smi."""
    board._nvml.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", None)

    def absent(*args: Any, **options: Any) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", absent)
    yield monkeypatch
    board._nvml.cache_clear()


def _nvml(**answers: Any) -> types.ModuleType:
    module = types.ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})  # type: ignore[attr-defined]
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = 1, 2, 0  # type: ignore[attr-defined]
    module.nvmlInit = lambda: None  # type: ignore[attr-defined]

    def not_supported(handle: Any) -> None:
        raise module.NVMLError("not supported")

    module.nvmlDeviceGetEccMode = not_supported  # type: ignore[attr-defined]
    for name, value in answers.items():
        setattr(module, name, lambda *args, v=value: v)
    return module


def test_board_without_anything_says_so(no_board: pytest.MonkeyPatch) -> None:
    state = board.state("abc")
    assert state["source"].startswith("not available") and state["power_cap_w"] is None and state["throttle"] == []


def test_board_by_nvml(no_board: pytest.MonkeyPatch) -> None:
    answers = {"nvmlSystemGetDriverVersion": b"580.1", "nvmlDeviceGetHandleByUUID": "h", "nvmlDeviceGetClockInfo": 1980}
    answers |= {"nvmlDeviceGetPowerManagementLimit": 600_000, "nvmlDeviceGetPowerManagementDefaultLimit": 700_000}
    answers |= {"nvmlDeviceGetCurrentClocksEventReasons": 0x44, "nvmlDeviceGetMigMode": [1, 1]}
    no_board.setitem(sys.modules, "pynvml", _nvml(**answers))
    state = board.state("abc")
    assert (state["driver"], state["sm"], state["power_cap_w"], state["ecc"]) == ("580.1", 1980, 600.0, None)
    assert state["throttle"] == ["power cap", "thermal, hardware"] and state["source"] == "nvml"
    reasons = board.noisy(state)
    assert len(reasons) == 3 and "600 W is below the default 700 W" in reasons[0] and "MIG" in reasons[1]


def test_board_by_nvidia_smi(no_board: pytest.MonkeyPatch) -> None:
    text = "580.1, 96.00, Enabled, [N/A], 700.00, 700.00, 1980, 3201, 1980, 31, 76.12\n"
    no_board.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, text, ""))
    state = board.state()
    assert state["source"] == "nvidia-smi" and state["mig"] is None and state["power_cap_w"] == 700.0
    assert state["ecc"] == "Enabled" and board.noisy(state) == []
    no_board.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "No devices\n", ""))
    assert board.state()["source"].startswith("not available")


def test_watch_sums_up() -> None:
    samples = iter([1000, 1900, 1400] + [1400] * 1000)

    def ask(uuid: str | None) -> dict[str, Any]:
        sm = next(samples)
        return {"sm": sm, "mem": 3201, "temp_c": 40, "power_w": None, "throttle": ["power cap"] if sm < 1200 else []}

    watch = board.Watch(None, every_s=0.001, ask=ask)
    with watch.running():
        while len(watch.samples) < 3:
            pass
    found = watch.summary()
    assert found["clocks"]["sm_min"] == 1000 and found["clocks"]["sm_max"] == 1900
    assert found["throttle"] == ["power cap"] and found["power_w"] is None
    silent = board.Watch(None, ask=lambda uuid: 1 / 0)
    with silent.running():
        pass
    assert silent.summary() == {}
