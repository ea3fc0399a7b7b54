"""Cells: what is in the file is not measured again, a failure is a row, an interrupt and a full disk lose nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from percard.bench import cells, record
from percard.bench.cells import Cell
from percard.bench.fair import NotComparable
from percard.bench.record import Record
from percard.console import describe


class Bench:
    """Cells that note when they run; `seconds` is what each takes by the bench's own clock."""

    def __init__(self, **broken: Exception | type[BaseException]) -> None:
        self.ran: list[str] = []
        self.said: list[str] = []
        self.broken, self.clock = broken, 0.0

    def cell(self, name: str, *, seconds: float = 1.0, takes: float = 1.0) -> Cell:
        row = {"level": "op", "case": name, "scheme": {"spec": "w8a8"}}

        def run() -> list[Record]:
            self.ran.append(name)
            self.clock += takes
            if name in self.broken:
                raise self.broken[name]
            return [Record(cell_key=name, **row, latency_us={"median": 12.0})]  # type: ignore[arg-type]

        return Cell(name, (name,), seconds, run, row)

    def run(self, out: Path | None, *names: str, **how: Any) -> list[Record]:
        made = [self.cell(name) for name in names]
        return cells.run(made, out, say=self.said.append, now=lambda: self.clock, **how)


def test_what_is_in_the_file_is_not_measured_again(tmp_path: Path) -> None:
    out, bench = tmp_path / "r.jsonl", Bench()
    bench.run(out, "a", "b")
    found = bench.run(out, "a", "c", "b")
    assert bench.ran == ["a", "b", "c"]
    assert [row.case for row in found] == ["a", "c", "b"]
    assert [row.case for row in record.read(out)] == ["a", "b", "c"]
    assert "2 of 3 cells are in" in bench.said[2] and bench.said[3] == "3/3 100 %  c: 12.0 us"


def test_force_measures_all_and_the_last_row_counts(tmp_path: Path) -> None:
    out, bench = tmp_path / "r.jsonl", Bench()
    bench.run(out, "a", "b")
    bench.run(out, "a", "b", force=True)
    assert bench.ran == ["a", "b"] * 2 and len(list(record.read(out))) == 4
    assert len(bench.run(out, "a", "b")) == 2 and len(bench.ran) == 4


class OutOfMemoryError(RuntimeError):
    """As torch.cuda has one; it is asked by name."""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("the kernel\nbroke"), "failed"),
        (MemoryError(), "oom"),
        (OutOfMemoryError("8 GiB"), "oom"),
        (NotImplementedError("no body serves"), "refused"),
        (NotComparable("weights stay in cache"), "refused"),
        (FileNotFoundError(2, "no such file", "weights"), "failed"),
    ],
)
def test_a_failing_cell_is_a_row_and_the_rest_goes_on(tmp_path: Path, error: Exception, status: str) -> None:
    out, bench = tmp_path / "r.jsonl", Bench(b=error)
    found = bench.run(out, "a", "b", "c")
    assert [row.status for row in found] == ["ok", status, "ok"]
    row = found[1]
    assert row.error and row.error["type"] == type(error).__name__ and "\n" not in row.error["message"]
    assert row.error["stage"] == "test_cells.run" and row.scheme == {"spec": "w8a8"} and row.latency_us is None
    assert f"b: {status}: " in bench.said[1]
    assert bench.run(out, "a", "b", "c") == list(record.read(out)) and bench.ran == ["a", "b", "c"]


def test_retry_measures_failures_again_and_no_other(tmp_path: Path) -> None:
    out, bench = tmp_path / "r.jsonl", Bench(b=RuntimeError("once"), c=NotImplementedError("never served"))
    bench.run(out, "a", "b", "c")
    bench.broken.clear()
    assert [row.status for row in bench.run(out, "a", "b", "c", retry=True)] == ["ok", "ok", "refused"]
    assert bench.ran == ["a", "b", "c", "b"]
    assert [row.status for row in bench.run(out, "a", "b", "c")] == ["ok", "ok", "refused"]


def test_a_cut_row_is_measured(tmp_path: Path) -> None:
    out, bench = tmp_path / "r.jsonl", Bench()
    record.append(out, Record(cell_key="a", level="op", case="a", status="cut"))
    bench.run(out, "a")
    assert bench.ran == ["a"]


def several(*statuses: str, then: Exception | None = None) -> Cell:
    """A cell with keys 0, 1, 2 that gives rows of these statuses, then raises."""

    def run() -> Iterator[Record]:
        for i, status in enumerate(statuses):
            yield Record(cell_key=str(i), level="model", case=f"m{i}", status=status)
        if then is not None:
            raise then

    return Cell("m", ("0", "1", "2"), 1.0, run, {"level": "model", "case": "m"})


def test_a_cell_of_several_rows_writes_each_as_it_comes(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    found = cells.run([several("ok", then=RuntimeError("broke"))], out, say=lambda words: None)
    assert [(row.cell_key, row.status) for row in found] == [("0", "ok"), ("1", "failed")]
    known = cells.settled(out)
    assert len(cells.rows_of(several(), known)) == 2  # it ended there: the same call leaves it so
    assert not cells.rows_of(several(), cells.settled(out, retry=True))
    assert not cells.rows_of(several(), {"0": known["0"]})  # a kill between two rows
    first_refused = Record(cell_key="0", level="model", case="m0", status="refused")
    assert not cells.rows_of(several(), {"0": first_refused, "2": known["0"]})
    whole = cells.run([several("ok", "ok", "suspect")], out, say=lambda words: None, retry=True)
    assert len(whole) == len(cells.rows_of(several(), cells.settled(out))) == 3


def test_time_left_follows_what_was_seen() -> None:
    bench = Bench()
    made = [bench.cell("a", seconds=10, takes=20), bench.cell("b", seconds=30, takes=30), bench.cell("c", seconds=60)]
    cells.run(made, None, say=bench.said.append, now=lambda: bench.clock)
    # a took twice what was predicted, so b and c are thought to take 2 x 90 s; then a and b together 50 s for 40 s
    assert bench.said[0].startswith("1/3 33 % ETA 0:03:00  a: ")
    assert bench.said[1].startswith("2/3 66 % ETA 0:01:15  b: ")
    assert bench.said[2] == "3/3 100 %  c: 12.0 us"


def test_dry_run_tells_and_measures_nothing(tmp_path: Path) -> None:
    out, bench = tmp_path / "r.jsonl", Bench()
    bench.run(out, "a")
    bench.said.clear()
    assert [row.case for row in bench.run(out, "a", "b", "c", dry_run=True)] == ["a"]
    assert bench.ran == ["a"]
    assert bench.said[1:] == ["b: about 1.0 s", "c: about 1.0 s", "2 cells to measure, about 0:00:02"]


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    out, bench = tmp_path / "r.jsonl", Bench(c=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        bench.run(out, "a", "b", "c", "d")
    assert caught.value.__notes__ == [f"2 of 4 cells are in {out} and stay there; the same command goes on"]
    assert [row.case for row in record.read(out)] == ["a", "b"]
    with pytest.raises(KeyboardInterrupt) as caught:
        bench.run(None, "c")
    assert "--out" in caught.value.__notes__[0]


def test_a_poisoned_card_ends_the_run(tmp_path: Path) -> None:
    out, bench = tmp_path / "r.jsonl", Bench(b=RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(cells.Cut, match="b left the card") as caught:
        bench.run(out, "a", "b", "c")
    assert caught.value.__notes__ == [f"2 of 3 cells are in {out} and stay there; the same command goes on"]
    assert describe(caught.value)[0] == 5 and bench.ran == ["a", "b"]
    assert [row.status for row in bench.run(out, "a", "b", "c")] == ["ok", "failed", "ok"] and bench.ran[2:] == ["c"]


def full_after(calls: int) -> Callable[..., None]:
    """fsync that has no room from its so many-th call on."""
    seen = iter(range(1 << 30))

    def fsync(file: int) -> None:
        if next(seen) >= calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, bench = tmp_path / "r.jsonl", Bench()
    monkeypatch.setattr(record.os, "fsync", full_after(2))
    with pytest.raises(OSError) as caught:
        bench.run(out, "a", "b", "c", "d")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(out)
    assert caught.value.__notes__ == [f"2 of 4 cells are in {out} and stay there; the same command goes on"]
    assert out.read_bytes().endswith(b"\n") and [row.case for row in record.read(out)] == ["a", "b"]
    monkeypatch.undo()
    assert len(bench.run(out, "a", "b", "c", "d")) == 4 and bench.ran == ["a", "b", "c", "c", "d"]


def test_a_row_that_half_fits_is_taken_back(tmp_path: Path) -> None:
    """The kernel writes as much of a row as the limit allows; the reader must not see it, nor the next writer."""
    out = tmp_path / "r.jsonl"
    record.append(out, Record(cell_key="a", level="op", case="a"))
    size = out.stat().st_size
    code = (
        "import resource, sys; from percard.bench.record import Record, append\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 20}, {size + 20}))\n"
        "append(sys.argv[1], Record(cell_key='b', level='op', case='b'))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "File too large" in done.stderr and str(out) in done.stderr
    assert out.stat().st_size == size
    assert [row.case for row in record.read(out)] == ["a"]


def test_devices_are_no_files_to_go_on_from() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="No space left"):
        Bench().run(Path("/dev/full"), "a")


def test_rows_in_words() -> None:
    row = {"cell_key": "k", "level": "op", "case": "c"}
    rival = {"impl": "torch float32", "status": "ok", "ratio": 2.0}
    timed = Record(**row, latency_us={"median": 10.0}, roofline={"bytes": 40_000}, against=[rival])  # type: ignore[arg-type]
    assert cells.in_words(timed) == "10.0 us, 4.0 GB/s, 2.00 x torch float32"
    red = Record(**row, quality={"gate": "red", "reasons": ["KL 0.9"]})  # type: ignore[arg-type]
    assert cells.in_words(red) == "gate red: KL 0.9"
    model = Record(**row, tokens={"tok_s": 3.0}, quality={"kl": 0.001, "top1": 0.99})  # type: ignore[arg-type]
    assert cells.in_words(model) == "3.0 tok/s, KL 0.00100, top-1 99.00%"
