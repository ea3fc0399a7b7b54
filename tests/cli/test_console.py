"""How a verb speaks: exit codes by kind of error, progress in three forms."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from percard import console
from percard.bench.model import NotComparable
from percard.formats.spec import FormatError, QuantSpec
from percard.kernels.op import Unsupported
from percard.quant.progress import Progress
from percard.quant.recipe import RecipeError


class Refused(RuntimeError):
    """Stands in for quant.preflight.Refused, which wants a whole preflight."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (FormatError("a.safetensors: truncated; fetch it again"), 2, "fetch it again"),
        (RecipeError("unknown key"), 2, "unknown key"),
        (Unsupported("no body"), 2, "no body"),
        (Refused("refused: no room"), 3, "no room"),
        (NotComparable("cache"), 3, "cache"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 1, "out/x: disk full"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "held.txt"), 2, "held.txt"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "out"),
        (FileExistsError("out: output exists; choose another --out"), 2, "choose another"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "memory"),
        (ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"), 1, "pip install matplotlib"),
        (KeyError("x"), 1, "PERCARD_TRACEBACK=1"),
    ],
)
def test_an_error_becomes_a_code_and_one_line(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.fail(error, "percard quantize", as_json=False) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("percard quantize: ") and words in said


def test_a_message_of_many_lines_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.fail(ValueError("first\n  second\n\nthird"), "percard", as_json=False)
    assert capsys.readouterr().err == "percard: first second third\n"


def test_the_refusal_of_the_preflight_is_known_by_its_name() -> None:
    from percard.quant import preflight

    assert preflight.Refused.__name__ in console._REFUSALS


def test_a_traceback_only_when_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCARD_TRACEBACK", "1")
    try:
        raise FormatError("bad")
    except FormatError as error:
        console.fail(error, "percard", as_json=False)
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith("percard: bad\n")


def _events() -> list[Progress]:
    return [
        Progress("quantize", n, 100_000_000, "bytes", f"layer {n}", 75.4) for n in (1_000_000, 50_000_000, 100_000_000)
    ]


def test_plain_progress_is_one_line_per_interval_and_phase(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter([0.0, 1.0, 9.0, 10.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(ticks))
    with console.showing_progress(as_json=False) as show:
        for event in _events():
            show(event)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "50%" in lines[0] and "50.0 MB of 100.0 MB" in lines[0] and "ETA 1:15" in lines[0]
    assert lines[1].endswith("done")


def test_json_progress_is_one_line_per_event(capsys: pytest.CaptureFixture[str]) -> None:
    with console.showing_progress(as_json=True) as show:
        for event in _events():
            show(event)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [e["done"] for e in events] == [1_000_000, 50_000_000, 100_000_000]
    assert events[0] == {
        "event": "progress", "phase": "quantize", "done": 1_000_000, "total": 100_000_000, "unit": "bytes",
        "label": "layer 1000000", "eta_s": 75.4,
    }  # fmt: skip


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75.4, "1:15"), (3675, "1:01:15"), (None, "?")])
def test_clock(seconds: float | None, text: str) -> None:
    assert console.clock(seconds) == text


def test_plain_data_speaks_json() -> None:
    tree = {"spec": QuantSpec.parse("w4a16-g64"), "path": Path("a/b"), "bad": float("nan"), "many": (1, {2: None})}
    assert console.plain_data(tree) == {"spec": "w4a16-g64", "path": "a/b", "bad": None, "many": [1, {"2": None}]}
