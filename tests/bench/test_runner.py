"""The runner of a slot with a fake clock: stages, cut points, resume, failures, signals, and a folder that stays valid."""

from __future__ import annotations

import json
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from percard.bench import folder
from percard.bench import runner as runner_module
from percard.bench.folder import BadFolder, read_lines, rows_of
from percard.bench.runner import CUT, DONE, ERROR, INTERRUPTED, RED, Runner
from percard.bench.stage import Cell, Run, Stage
from percard.bench.worker import Outcome

MACHINE = {"card": "fake", "driver": "1"}


class FakeClock:
    """Seconds that pass only when somebody works."""

    def __init__(self) -> None:
        self.t = 1000.0

    def __call__(self) -> float:
        return self.t


class FakeWorker:
    """Does what a cell's arguments say, on the fake clock. `log` is every cell that was begun."""

    def __init__(self, clock: FakeClock, where: Path, log: list[str], card: list[bool]) -> None:
        self.clock, self.where, self.log, self.card = clock, where, log, card

    def run(
        self,
        task: str,
        arguments: dict[str, Any],
        timeout: float,
        on_row: Callable[[dict[str, Any]], None],
        stop: Callable[[], bool],
    ) -> Outcome:
        manifest = json.loads((self.where / "manifest.json").read_text())  # whole at any moment
        assert manifest["state"] == "running"
        do, takes = arguments.get("do", "ok"), arguments.get("takes", 1.0)
        if task == "probe":
            return Outcome("ok" if self.card[0] else "failed", None if self.card[0] else {"type": "E", "message": "no"})
        self.log.append(arguments["name"])
        if takes > timeout:
            self.clock.t += timeout
            return Outcome("timeout", {"type": "Timeout", "message": "too slow", "stage": "run"}, poisoned=True)
        self.clock.t += takes
        if do in ("SIGTERM", "SIGINT"):
            os.kill(os.getpid(), getattr(signal, do))
            assert stop(), "the flag is seen by every wait"
            return Outcome("stopped", poisoned=True)
        if do == "die":
            return Outcome("died", {"type": "WorkerDied", "message": "signal SIGKILL", "stage": "run"}, poisoned=True)
        if do == "lose the card":
            self.card[0] = False
            return Outcome("failed", {"type": "E", "message": "CUDA error", "stage": "x"}, poisoned=True)
        if do == "fail":
            return Outcome("failed", {"type": "ValueError", "message": "wrong", "stage": "x"})
        if do == "red":
            on_row(
                {"status": "failed", "quality": {"gate": "red"}, "error": {"type": "C", "message": "off", "stage": "g"}}
            )
            return Outcome("ok")
        on_row({"part": "rival", "value": 2})
        on_row({"value": 1})
        return Outcome("ok")

    def ready(self, stop: Callable[[], bool]) -> None:
        pass

    def close(self) -> None:
        pass


class Track:
    """A folder with runs in it. Stages are {name: list of (do, takes)}; every cell is predicted to take 10 s."""

    def __init__(self, where: Path) -> None:
        self.where, self.clock, self.begun, self.card = where, FakeClock(), [], [True]
        self.lines: list[str] = []

    def cells(self, name: str, plan: list[tuple[str, float]]) -> list[Cell]:
        found = []
        for i, (do, takes) in enumerate(plan):
            label = f"{name}{i}"
            arguments = {"name": label, "do": do, "takes": takes}
            row = {"level": "op", "case": label}
            found.append(Cell(label, "cell", arguments, 10.0, {"cell": label}, row, kind=name))
        return found

    def run(self, stages: dict[str, list[tuple[str, float]]], minutes: float = 10, **options: Any) -> int:
        where = self.where

        def stage(name: str, plan: list[tuple[str, float]]) -> Stage:
            def work(run: Run) -> None:
                run.cells(self.cells(name, plan))
                run.write(f"{name}.txt", f"{run.left():.1f}")

            return Stage(name, 100.0, work, essential=name.startswith("must"))

        with folder.claimed(where):
            made = Runner(
                where,
                minutes,
                about={"sources": options.pop("sources", "1"), "uuid": None},
                device="cpu",
                identity=options.pop("identity", MACHINE),
                probe=Cell("probe", "probe", {}, 1.0, {}),
                now=self.clock,
                make_worker=lambda log, env: FakeWorker(self.clock, where, self.begun, self.card),
                say=self.lines.append,
                **options,
            )
            return made.run([stage(name, plan) for name, plan in stages.items()])

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.where / "manifest.json").read_text())

    def states(self) -> dict[str, str]:
        return {s["name"]: s["state"] for s in self.manifest["stages"]}

    def own(self) -> dict[str, str]:
        """Case -> status of the cells' own rows."""
        return {row["case"]: row["status"] for row in rows_of(self.where) if row.get("value") != 2}


@pytest.fixture
def track(tmp_path: Path) -> Track:
    return Track(tmp_path / "slot")


OK = [("ok", 10.0)] * 4


def test_complete_run(track: Track) -> None:
    assert track.run({"a": OK, "b": OK}) == DONE
    assert track.states() == {"a": "done", "b": "done"} and track.manifest["state"] == "complete"
    assert track.begun == [f"{s}{i}" for s in "ab" for i in range(4)]
    assert len(rows_of(track.where)) == 16  # each cell: one row of a rival, one of its own
    with tarfile.open(track.where / "stage-2-b.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["b.txt", "records.jsonl", "stage.json"]
    assert {row["case"] for row in folder.archived(track.where / "stage-2-b.tar.gz", "records.jsonl")} == {
        f"b{i}" for i in range(4)
    }


def test_archives_alone_give_the_same_rows(track: Track) -> None:
    track.run({"a": OK, "b": OK})
    before = rows_of(track.where)
    (track.where / "records.jsonl").unlink()
    assert rows_of(track.where) == before


def test_report_after_every_stage_and_a_bug_in_it_costs_nothing(track: Track) -> None:
    seen = []

    def report(where: Path) -> None:
        seen.append(len(list(read_lines(where / "records.jsonl"))))
        raise KeyError("bug")

    assert track.run({"a": OK, "b": OK}, report=report) == DONE
    assert seen == [8, 16, 16] and "bug" in track.manifest["report_error"]


# Two stages of 20 cells at 10 s want 400 s; a stage of n minutes has n * 60 * 0.95 / 2.
@pytest.mark.parametrize("minutes", [3, 4, 5, 6, 7, 8, 10, 14])
def test_every_cut_point_then_resume(track: Track, minutes: float) -> None:
    plan = {"a": [("ok", 10.0)] * 20, "b": [("ok", 10.0)] * 20}
    begin, calls = track.clock.t, 0
    code = track.run(plan, minutes)
    assert track.clock.t - begin <= minutes * 60 * runner_module.SHARE, "the reserve stays"
    if code == DONE:
        assert minutes >= 8
    while code != DONE:
        assert code == CUT and calls < 5
        cut = [row for row in rows_of(track.where) if row["status"] == "cut"]
        assert cut and all("predicted 10.0 s" in row["error"]["message"] for row in cut)
        assert set(track.own()) == {f"{s}{i}" for s in "ab" for i in range(20)}, "what was not reached has a row too"
        calls += 1
        code = track.run(plan, minutes)
    assert sorted(track.begun) == sorted(set(track.begun)), "nothing was measured twice"
    assert set(track.own().values()) == {"ok"} and set(track.states().values()) == {"done"}
    assert len(track.manifest["calls"]) == calls + 1


def test_cell_starts_only_with_a_margin(track: Track) -> None:
    # 3 minutes of one stage are 171 s. Cells of 10 s start while more than 13 s are left: 16 times (158 s left over 13).
    assert track.run({"a": [("ok", 10.0)] * 20}, 3) == CUT
    assert len(track.begun) == 16


def test_time_left_over_goes_to_the_next_stage(track: Track) -> None:
    assert track.run({"a": [("ok", 1.0)], "b": [("ok", 10.0)] * 20}, 5) == DONE


def test_predictions_are_corrected_by_what_was_seen(track: Track) -> None:
    # Cells take 30 s where 10 were predicted: with 35 s left none may start.
    assert track.run({"a": [("ok", 30.0)] * 8}, 3) == CUT
    last = next(row for row in rows_of(track.where) if row["status"] == "cut")
    assert "predicted 30.0 s" in last["error"]["message"]
    assert track.clock.t - 1000 <= 171


def test_short_slot_keeps_the_essential_stages(track: Track) -> None:
    plan = {"must": OK, "b": OK, "must too": OK}
    assert track.run(plan, 2.9) == DONE
    assert track.states() == {"must": "done", "must too": "done"}
    assert (track.where / "stage-3-must too.tar.gz").exists(), "a stage keeps its number"
    assert track.run(plan, 3) == DONE and track.states()["b"] == "done"


def test_failing_cells_are_rows(track: Track) -> None:
    plan = {"a": [("ok", 1.0), ("fail", 1.0), ("die", 1.0), ("ok", 900.0), ("ok", 1.0)]}
    assert track.run(plan) == DONE
    assert track.own() == {"a0": "ok", "a1": "failed", "a2": "failed", "a3": "timeout", "a4": "ok"}
    assert track.run(plan) == DONE and len(track.begun) == 5, "done stages are skipped"


def test_retry_runs_failed_cells_again(track: Track) -> None:
    assert track.run({"a": [("ok", 1.0), ("fail", 1.0)], "b": [("ok", 900.0)] * 1}, 5) == ERROR
    plan = {"a": [("ok", 1.0), ("fail", 1.0)], "b": [("ok", 1.0)]}
    assert track.run(plan, 5) == ERROR and track.begun == ["a0", "a1", "b0"]
    assert track.run(plan, 5, retry=True) == DONE and track.begun[3:] == ["b0"]


def test_all_failed_is_an_error(track: Track) -> None:
    assert track.run({"a": [("fail", 1.0)] * 3, "b": OK}) == ERROR
    assert track.states() == {"a": "failed", "b": "done"}


def test_red_gate(track: Track) -> None:
    plan = {"a": [("ok", 1.0), ("red", 1.0)], "b": OK}
    assert track.run(plan) == RED and track.states() == {"a": "red", "b": "done"}
    assert track.run(plan) == RED and len(track.begun) == 6, "red stays red, without running again"


def test_red_wins_over_cut(track: Track) -> None:
    assert track.run({"a": [("red", 1.0)] + [("ok", 10.0)] * 40}, 3) == RED


def test_other_code_runs_what_it_changed(track: Track) -> None:
    assert track.run({"a": OK}) == DONE
    assert track.run({"a": OK}, sources="2") == DONE
    assert len(track.begun) == 4, "the stage was entered again, its cells have the same keys"


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", CUT), ("SIGINT", INTERRUPTED)])
def test_signal_in_a_cell(track: Track, name: str, code: int) -> None:
    before = signal.getsignal(getattr(signal, name))
    assert track.run({"a": [("ok", 1.0), (name, 1.0), ("ok", 1.0)], "b": OK}) == code
    assert signal.getsignal(getattr(signal, name)) is before
    assert track.own() == {"a0": "ok", "a1": "cut", "a2": "cut"} and track.begun == ["a0", "a1"]
    assert track.manifest["calls"][-1]["why"] == name and track.states() == {"a": "cut", "b": "waiting"}
    assert track.run({"a": [("ok", 1.0)] * 3, "b": OK}) == DONE


def test_lost_card(track: Track) -> None:
    assert track.run({"a": [("ok", 1.0), ("lose the card", 1.0), ("ok", 1.0)], "b": OK}) == CUT
    assert track.manifest["calls"][-1]["why"] == "lost card"
    assert track.own() == {"a0": "ok", "a1": "failed", "a2": "cut"}


def test_stage_that_breaks_costs_itself(track: Track) -> None:
    def broken(run: Run) -> None:
        raise KeyError("no such thing")

    with folder.claimed(track.where):
        made = Runner(
            track.where, 5, about={}, device="cpu", identity=MACHINE, now=track.clock, say=track.lines.append,
            make_worker=lambda log, env: FakeWorker(track.clock, track.where, track.begun, track.card),
        )  # fmt: skip
        work = Stage("good", 10, lambda run: run.cells(track.cells("a", OK)))
        assert made.run([Stage("bad", 10, broken), work]) == ERROR
    assert track.states() == {"bad": "failed", "good": "done"}
    assert "no such thing" in track.manifest["stages"][0]["note"]


def test_full_disk(track: Track, monkeypatch: pytest.MonkeyPatch) -> None:
    wrote = folder.append_line

    def full(path: Path, line: str) -> None:
        if path.exists() and len(path.read_bytes().splitlines()) >= 3:
            raise OSError(28, "No space left on device")
        wrote(path, line)

    monkeypatch.setattr(runner_module, "append_line", full)
    assert track.run({"a": OK, "b": OK}) == ERROR
    assert track.manifest["state"] == "error" and "No space left" in track.lines[-1]
    monkeypatch.undo()
    assert track.run({"a": OK, "b": OK}) == DONE and set(track.own().values()) == {"ok"}


def test_killed_while_writing(track: Track) -> None:
    """SIGKILL leaves a stage that is running, a torn row, a temporary file. The next call mends and goes on."""
    assert track.run({"a": [("ok", 10.0)] * 20}, 3) == CUT
    path = track.where / "records.jsonl"
    data = path.read_bytes().rstrip(b"\n")
    path.write_bytes(data[: data.rfind(b"\n") + 30])
    manifest = track.manifest
    manifest["stages"][0].update(state="running")
    manifest["stages"][0]["ranges"][-1][1] = None
    (track.where / "manifest.json").write_text(json.dumps(manifest))
    (track.where / "manifest.json.tmp").write_text("{")
    assert rows_of(track.where), "readable as it is"
    code = track.run({"a": [("ok", 10.0)] * 20}, 3)
    assert code == DONE and set(track.own().values()) == {"ok"} and len(track.own()) == 20
    assert all(json.loads(line) for line in path.read_bytes().splitlines())
    path.unlink()
    assert len(track.own()) == 20, "the archive holds the rows of both calls"


def test_many_workers_leave_whole_rows(track: Track) -> None:
    def work(run: Run) -> None:
        run.cells(track.cells("a", [("ok", 0.01)] * 60), into="compiled.jsonl", workers=6)

    with folder.claimed(track.where):
        made = Runner(
            track.where, 5, about={}, device="cpu", identity=MACHINE, now=track.clock, say=lambda line: None,
            make_worker=lambda log, env: FakeWorker(track.clock, track.where, track.begun, track.card),
        )  # fmt: skip
        assert made.run([Stage("a", 1, work)]) == DONE
    assert len(list(read_lines(track.where / "compiled.jsonl"))) == 120 and len(set(track.begun)) == 60
    assert "compiled.jsonl" in track.manifest["row_files"]


def test_folders_that_are_refused(track: Track, tmp_path: Path) -> None:
    track.run({"a": OK})
    with pytest.raises(BadFolder, match=r"another machine.*driver.*choose a new folder"):
        track.run({"a": OK}, identity={**MACHINE, "driver": "2"})
    with folder.claimed(track.where), pytest.raises(BadFolder, match="another run"):
        track.run({"a": OK})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(BadFolder, match=r"no manifest\.json"), folder.claimed(tmp_path / "mine"):
        pass
    with pytest.raises(BadFolder, match="is a file"), folder.claimed(tmp_path / "mine" / "thesis.txt"):
        pass
    (track.where / "manifest.json").write_text("{")
    with pytest.raises(BadFolder, match="not readable"):
        track.run({"a": OK})
