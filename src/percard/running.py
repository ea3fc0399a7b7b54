"""`percard run`: the stages of a recipe one after another, each with its own folder; finished ones are skipped; one table at the end.

    check     the dry run of every stage, before the first one starts (quant/stages_plan.py)
    run       each verb as it runs alone, with its own journal; run-journal.jsonl says which stage was made from what
    table     every child against the model: size, KL, top-1, perplexity, speed (run_table.py); run.json and run.md

A stage is finished when its folder is there and the journal says that it was made by the same settings from the same inputs. A
stage that was killed goes on where its verb goes on.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import bench_options as options
from . import console

if TYPE_CHECKING:
    from .quant.progress import Progress
    from .quant.stages import Stage, Stages
    from .quant.stages_plan import Step

JOURNAL, VERIFIED, RECORDS = "run-journal.jsonl", "report.json", "records.jsonl"
Say = Callable[[str], None]


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file with the stages.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of all stages; else output.dir of the recipe.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="That stage and no other, again if it is finished.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="That stage and all behind it again.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="All of it again.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Go on although a dry run asks something.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every stage, say what it would do; stop.")] = False,
    as_json: options.AsJson = False,
) -> None:
    try:
        code = _run(recipe, out, only, start, fresh, yes, dry_run, as_json)
    except KeyboardInterrupt as error:  # the parser would forget what it says about finished stages
        sys.exit(console.fail(error, "percard run", as_json))
    raise typer.Exit(code)


def _run(
    file: Path,
    out: Path | None,
    only: str | None,
    start: str | None,
    fresh: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    from .hub import source
    from .quant.fields import RecipeError
    from .quant.stages import Stages

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("percard run is one process; take the distill stage alone with torchrun -m percard distill")
    recipe = Stages.load(file)
    if out is None and recipe.out is None:
        raise RecipeError(f"{file}: output.dir is missing; say where the stages go, there or with --out")
    names = [stage.name for stage in recipe.stages]
    if sum([only is not None, start is not None, fresh]) > 1:
        raise typer.BadParameter("--only, --from and --fresh are three ways to say what runs again; keep one")
    for flag, name in (("--only", only), ("--from", start)):
        if name is not None and name not in names:
            raise RecipeError(f"{flag} {name}: no such stage; the recipe has {', '.join(names)}")
    work = Work(recipe, source(recipe.model), out or Path(recipe.out or ""), yes, as_json)
    steps = work.checked()
    if dry_run:
        if as_json:
            console.emit_json(work.planned(steps))
        else:
            for part in planned(work, steps):
                console.show(part)
        return console.REFUSED if work.refusals(steps) else console.DONE
    return work.run(steps, only, start, fresh)


def planned(work: Work, steps: list[Step]) -> Iterator[Any]:
    """The dry run, for people."""
    from rich import box
    from rich.table import Table

    from .quant.report import human
    from .quant.stages_plan import needs

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "verb", "what it would do", "writes"):
        table.add_column(name, justify="right" if name == "writes" else "left", overflow="fold")
    for number, step in enumerate(steps, 1):
        size = human(step.bytes) if step.bytes else ""
        table.add_row(f"{number} {step.stage.name}", step.stage.kind, step.words, size)
    yield table
    yield f"{work.out}: {human(needs(steps))} of disk at most"
    yield from (f"note: {step.stage.name}: {words}" for step in steps for words in step.warnings)
    yield from (f"refused: {words}" for words in work.refusals(steps))


@dataclass
class Work:
    """One call: the recipe, the model's folder, where stages go; `again`: stages that this call was asked to make again."""

    recipe: Stages
    source: Path
    out: Path
    yes: bool
    as_json: bool
    again: tuple[str, ...] = ()

    @property
    def say(self) -> Say:
        return console.showing_steps(self.as_json)

    def folder(self, name: str) -> Path:
        """Of a stage, or of the model."""
        from .quant.stages import SOURCE

        return self.source if name == SOURCE else self.out / name

    def checked(self) -> list[Step]:
        """The dry run of every stage."""
        from .pruning import coster
        from .quant.stages_plan import Planner

        with tempfile.TemporaryDirectory(prefix="percard-run-") as ghosts:
            return Planner(self.recipe, self.source, self.out, Path(ghosts), coster).run()

    def refusals(self, steps: list[Step]) -> list[str]:
        """Why the first stage does not start."""
        from .quant.stages_plan import room

        found = [f"{step.stage.name}: {words}" for step in steps for words in step.refusals]
        if not self.yes:
            found += [f"{step.stage.name}: {step.question}" for step in steps if step.question]
        full = room(self.out, steps)
        return [*found, *([full] if full else [])]

    def planned(self, steps: list[Step]) -> dict[str, Any]:
        """The dry run as JSON."""
        from .quant.stages_plan import needs

        found = {"stages": [step.to_dict() for step in steps], "disk": needs(steps), "refusals": self.refusals(steps)}
        return {"verb": "run", "model": self.recipe.model, "out": str(self.out), **found}

    def run(self, steps: list[Step], only: str | None, start: str | None, fresh: bool) -> int:
        """All stages that are not finished, then the table. The exit code."""
        from .quant.stages_plan import Refused
        from .run_table import made, write

        if refused := self.refusals(steps):
            raise Refused("refused: " + "; ".join(refused))
        self.out.mkdir(parents=True, exist_ok=True)
        red: list[str] = []
        with _locked(self.out):
            journal = _Journal(self.out / JOURNAL)
            begin = steps[0].stage.name if fresh else start
            names = [step.stage.name for step in steps]
            self.again = (
                tuple(names[names.index(begin) :]) if begin is not None else (only,) if only is not None else ()
            )
            for name in self.again:
                journal.add(name, "again")
            for number, step in enumerate(steps, 1):
                if only is None or step.stage.name == only:
                    red += self._stage(step, f"{number}/{len(steps)}", journal)
                if red and self.recipe.check.on_red == "stop":
                    self.say(f"stopped behind {step.stage.name}: it is red, and verify.on_red is stop")
                    break
            table = made(self, steps, journal.seconds, red)
            files = write(self.out, table)
        if self.as_json:
            console.emit_json(table.to_dict())
        else:
            for part in table.show():
                console.show(part)
            console.show("wrote " + ", ".join(str(path) for path in files))
        return console.GATE_RED if red or table.red else console.DONE

    def _stage(self, step: Step, place: str, journal: _Journal) -> list[str]:
        """One stage, unless it is finished; what is red about it."""
        stage, folder = step.stage, self.folder(step.stage.name)
        mark = self._mark(step)
        state = journal.of(stage.name)
        there = _identity(folder)
        # A stage that has to be made again is there when what lies there is not what lay there as it was begun.
        again = state.again and (not state.begun or there == state.old)
        if there is not None and not again:
            if state.mark is None:
                raise FileExistsError(
                    f"{folder}: is there and was not made by this recipe; name another output.dir, or replace all with --fresh"
                )
            if parts := [name for name in mark if mark[name] != state.mark.get(name)]:
                raise FileExistsError(
                    f"{folder}: was made from something else ({', '.join(parts)} changed); --from {stage.name} makes it and "
                    "all behind it again, another output.dir keeps both"
                )
            if (
                state.done or stage.kind != "bench"
            ):  # whose file grows while it measures; others are complete or not there
                if not state.done:
                    journal.add(stage.name, "done")  # killed between its last rename and this line
                self.say(f"stage {place} {stage.name}: finished, {folder}")
                return self._red(stage, folder)
        fresh = stage.name in self.again  # asked for in this call; a call after a kill goes on
        goes = "goes on" if state.mark == mark and not state.done and not fresh else "begins"
        journal.add(stage.name, "begin", mark=mark, old=there)
        self.say(f"stage {place} {stage.name}: {goes}: {step.words}")
        clock = time.monotonic()
        with self._showing(place, stage) as progress:
            getattr(self, f"_{stage.kind}")(step, folder, again, fresh, progress)
        journal.add(stage.name, "done", seconds=round(time.monotonic() - clock, 1))
        return self._red(stage, folder)

    @contextmanager
    def _showing(self, place: str, stage: Stage) -> Iterator[Callable[[Progress], None]]:
        """Progress of a verb with its stage in front."""
        with console.showing_progress(self.as_json) as show:

            def named(event: Progress) -> None:
                words = stage.name if event.phase == stage.kind else f"{stage.name}: {event.phase}"
                show(dataclasses.replace(event, phase=f"{place} {words}"))

            yield named

    def _mark(self, step: Step) -> dict[str, Any]:
        """What the result of a stage depends on: settings, models, texts."""
        from .formats.checkpoint import Checkpoint
        from .quant.capture_cache import FACTS, sha256_of
        from .quant.journal import source_mark

        def model(name: str) -> str:
            folder = self._teacher(name)
            facts = folder / FACTS
            return sha256_of(facts) if facts.is_file() else source_mark(Checkpoint.open(folder))

        stage = step.stage
        roles = {f"teacher {number}": name for number, name in enumerate(stage.teachers, 1)}
        roles |= {"model": step.student} if stage.kind != "capture" else {}
        if stage.kind in ("verify", "bench"):
            roles["original"] = step.origin if stage.kind == "verify" else "source"
        found = {"settings": json.loads(json.dumps(console.plain_data(stage.to_dict())))}
        found |= {role: model(name) for role, name in roles.items() if name}
        return found | {"texts": _texts(stage, self.recipe)}

    def _teacher(self, name: str) -> Path:
        """A stage's folder, or one from elsewhere."""
        from .quant.stages import SOURCE

        known = name == SOURCE or name in [stage.name for stage in self.recipe.stages]
        return self.folder(name) if known else Path(name).expanduser()

    def _red(self, stage: Stage, folder: Path) -> list[str]:
        """Why a finished stage is red; of a bench the table says it."""
        if stage.kind not in ("quantize", "verify"):
            return []
        found = json.loads((folder / VERIFIED).read_text(encoding="utf-8"))
        if found.get("status") != "red":
            return []
        gates = found.get("gates") or [{}]
        reasons = [*found.get("failures", ()), *found.get("flags", ()), *gates[-1].get("reasons", ())]
        return [f"{stage.name} is red: {'; '.join(reasons)}"]

    # Verbs --------------------------------------------------------------------------------------------------------------

    def _prune(self, step: Step, folder: Path, force: bool, fresh: bool, progress: Any) -> None:
        from .pruning import coster
        from .quant import prune

        cost = coster(step.stage.cost) if step.stage.cost else None
        prune.run(
            self.folder(step.student), folder, step.stage.wish, cost=cost, force=force, fresh=fresh, progress=progress
        )

    def _capture(self, step: Step, folder: Path, force: bool, fresh: bool, progress: Any) -> None:
        from .capturing import speaker
        from .quant import capture, completions
        from .quant.keep import Keep

        teacher, wish = self._teacher(step.stage.teachers[0]), dict(step.stage.wish)
        if "data" in wish:
            text = capture.plan(teacher, wish.pop("data"), **wish)
            capture.run(text, folder, force=force, fresh=fresh, progress=progress)
            return
        keep = Keep.parse(wish.pop("keep", None), wish.pop("keep_timeout", 10.0))
        plan = completions.plan(teacher, wish.pop("generate"), keep=keep, **wish)
        completions.run(plan, lambda: speaker(teacher, plan), folder, force=force, fresh=fresh, progress=progress)

    def _distill(self, step: Step, folder: Path, force: bool, fresh: bool, progress: Any) -> None:
        from .quant import distill

        teachers = [self._teacher(name) for name in step.stage.teachers]
        distill.run(
            self.folder(step.student),
            teachers,
            folder,
            step.stage.wish,
            yes=self.yes,
            force=force,
            fresh=fresh,
            progress=progress,
        )

    def _quantize(self, step: Step, folder: Path, force: bool, fresh: bool, progress: Any) -> None:
        from .quant import quantize

        quantize.run(self.folder(step.student), folder, step.stage.wish, force=force, fresh=fresh, progress=progress)

    def _verify(self, step: Step, folder: Path, force: bool, fresh: bool, progress: Any) -> None:
        from .quant import output, verify

        wish = step.stage.wish
        text = wish["text"] if wish["level"] in verify.WITH_TEXT else None
        found = verify.verify(
            self.folder(step.student),
            self.folder(step.origin),
            level=wish["level"],
            text=text,
            tokens=wish["tokens"] if text is not None else None,
            progress=progress,
        )
        folder.mkdir(exist_ok=True)
        output.write(folder / VERIFIED, found.to_json())

    def _bench(self, step: Step, folder: Path, force: bool, fresh: bool, progress: Any) -> None:
        from .run_table import time_children

        folder.mkdir(exist_ok=True)
        if force:
            (folder / RECORDS).unlink(missing_ok=True)
        time_children(self, step, folder / RECORDS)


def _texts(stage: Stage, recipe: Stages) -> dict[str, Any]:
    """Name, size and time of every file of text that a stage reads."""
    tree = stage.to_dict()[stage.kind]
    names = [tree.get("data"), tree.get("generate"), tree.get("text"), (tree.get("calibration") or {}).get("source")]
    names += [recipe.check.text] if stage.kind == "bench" or (tree.get("verify") or {}).get("text") else []
    found = {}
    for name in filter(None, names):
        path = Path(name).expanduser()
        found[name] = [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None
    return found


def _identity(folder: Path) -> list[int] | None:
    """Tells one result of a stage from the next; None where there is none."""
    for name in ("config.json", "capture.json", VERIFIED, RECORDS):
        if (folder / name).is_file():
            stat = (folder / name).stat()
            return [stat.st_ino, stat.st_mtime_ns]
    return None


# Journal ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """What the journal says about a stage: what it was begun from, what lay in its folder then, whether it ended, whether it
    has to be made again, and whether that was begun."""

    mark: dict[str, Any] | None = None
    old: list[int] | None = None
    done: bool = False
    again: bool = False
    begun: bool = False


class _Journal:
    """A line for each stage that begins, ends, or has to be made again; a torn last line is dropped."""

    def __init__(self, path: Path) -> None:
        from .quant.journal import whole_lines

        self.path = path
        self.lines = whole_lines(path)

    def of(self, name: str) -> _State:
        state = _State()
        for line in (line for line in self.lines if line.get("stage") == name):
            if line["event"] == "begin":
                state = _State(line.get("mark"), line.get("old"), again=state.again, begun=True)
            elif line["event"] == "done":
                state = dataclasses.replace(state, done=True, again=False)
            else:
                state = dataclasses.replace(state, again=True, begun=False)
        return state

    @property
    def seconds(self) -> dict[str, float]:
        """How long each finished stage took, over all calls that saw it end."""
        return {line["stage"]: line["seconds"] for line in self.lines if "seconds" in line}

    def add(self, name: str, event: str, **more: Any) -> None:
        """One more line, on the disk before the work goes on."""
        line = {"stage": name, "event": event, **more}
        with self.path.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keeps two runs out of one folder; the kernel drops the lock when a process dies."""
    handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{out}: another run is at work there; wait for it, or name another --out") from None
        yield
    finally:
        os.close(handle)
