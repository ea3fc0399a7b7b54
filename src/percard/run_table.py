"""The table that ends `percard run`: every child beside the model that all began with, and its speed where its gate allows one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import console

if TYPE_CHECKING:
    from .quant.stages_plan import Step
    from .running import Work

JSON, MARKDOWN, QUALITY = "run.json", "run.md", "quality.json"
SHOWN = ("prune", "distill", "quantize")


@dataclass(frozen=True)
class Row:
    """A child, or the model itself. Bytes of the linears of its blocks and of all its tensors; kl in nats a token, top1 a share,
    against the model; tok_s of a decode step in the same rounds as the model in FP16, ratio to that; None = not measured."""

    stage: str
    what: str
    parameters: int
    linears: int
    bytes: int
    seconds: float | None = None
    kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    gate: str = ""
    reasons: tuple[str, ...] = ()
    tok_s: float | None = None
    ratio: float | None = None
    ratio_ci: tuple[float, float] | None = None


@dataclass(frozen=True)
class Table:
    """`rows[0]` is the model. notes: what a reader must know of the figures."""

    model: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def red(self) -> bool:
        """Whether the last child is not good enough."""
        return len(self.rows) > 1 and self.rows[-1].gate == "red"

    def to_dict(self) -> dict[str, Any]:
        """run.json; shares are of the model's."""
        first = self.rows[0]
        rows = []
        for row in self.rows:
            shares = {"linears": row.linears / first.linears, "bytes": row.bytes / first.bytes}
            shares["parameters"] = row.parameters / first.parameters
            rows.append({**dataclasses.asdict(row), "share": shares})
        return {"schema": 1, "verb": "run", "model": self.model, "rows": rows, "notes": list(self.notes)}

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headings and lines as words."""
        first = self.rows[0]
        head = [
            "stage",
            "what",
            "parameters",
            "linears of the blocks",
            "checkpoint",
            "KL",
            "top-1",
            "perplexity",
            "gate",
            "tok/s",
        ]

        def share(value: int, of: int) -> str:
            return f"{console.amount(value, 'bytes')} ({value / of:.1%})"

        lines = []
        for row in self.rows:
            speed = (
                ""
                if row.tok_s is None
                else (f"{row.tok_s:,.0f}" if row.tok_s >= 10 else f"{row.tok_s:.2g}")
                + ("" if row.ratio is None else f" ({row.ratio:.2f}x)")
            )
            lines.append(
                [
                    row.stage,
                    row.what,
                    f"{row.parameters:,} ({row.parameters / first.parameters:.1%})",
                    share(row.linears, first.linears),
                    share(row.bytes, first.bytes),
                    _figure(row.kl, "{:.4f}"),
                    _figure(row.top1, "{:.1%}"),
                    _figure(row.perplexity, "{:.2f}"),
                    row.gate,
                    speed or ("gate red" if row.gate == "red" else "-"),
                ]
            )
        return head, lines

    def show(self) -> list[Any]:
        """For a terminal."""
        from rich import box
        from rich.table import Table as Rich

        head, lines = self.cells()
        table = Rich(box=box.SIMPLE_HEAD, pad_edge=False, title=f"against {self.model}", title_justify="left")
        for name in head:
            table.add_column(name, justify="left" if name in ("stage", "what", "gate") else "right", overflow="fold")
        for line in lines:
            table.add_row(*line)
        return [table, *(f"- {words}" for words in self.notes)]

    def markdown(self) -> str:
        """run.md."""
        head, lines = self.cells()
        rule = ["---" if name in ("stage", "what", "gate") else "---:" for name in head]
        rows = ["| " + " | ".join(line) + " |" for line in (head, rule, *lines)]
        return "\n".join([f"# {self.model}", "", *rows, "", *(f"- {words}" for words in self.notes)]) + "\n"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def write(out: Path, table: Table) -> list[Path]:
    """run.json and run.md."""
    from .quant import output

    output.write(out / JSON, json.dumps(console.plain_data(table.to_dict()), indent=1, ensure_ascii=False) + "\n")
    output.write(out / MARKDOWN, table.markdown())
    return [out / JSON, out / MARKDOWN]


def made(work: Work, steps: list[Step], seconds: Mapping[str, float], red: list[str]) -> Table:
    """The table of all children that are there; their quality is measured now unless it was measured before. red: of stages."""
    children = [s for s in steps if s.stage.kind in SHOWN and (work.folder(s.stage.name) / "config.json").is_file()]
    judge = Judge(work)
    limits = ", ".join(_limit(name, value) for name, value in work.recipe.check.gate.items() if value is not None)
    rows = [_row(work, None, judge, {}, seconds)]
    speeds = _speeds(work, steps)
    rows += [_row(work, step, judge, speeds, seconds) for step in children]
    if speeds:
        last = list(speeds.values())[-1]
        rows[0] = dataclasses.replace(rows[0], tok_s=last.baseline)
    notes = [*red, *(f"{row.stage} against the model: {words}" for row in rows for words in row.reasons)]
    if judge.text is None:
        notes.append("quality was not measured: the recipe has no verify.text")
    else:
        notes += [f"KL, top-1 and perplexity: {words}" for words in dict.fromkeys(judge.protocols)]
        notes.append(
            f"gate against the model: {limits}; {'the recipe' if _own(work) else 'what 4-bit weights are held to'}"
        )
    if speeds:
        floats = ", ".join(f"{speed.float} beside {name}" for name, speed in speeds.items())
        notes.append(f"tok/s: {last.words}; FP16 is torch's fastest float in those rounds: {floats}")
    return Table(work.recipe.model, tuple(rows), tuple(notes))


def _own(work: Work) -> bool:
    from .quant.stages import GATE

    return dict(work.recipe.check.gate) != GATE


def _limit(name: str, value: float) -> str:
    if name == "kl":
        return f"KL at most {value:g}"
    return f"top-1 at least {value:.0%}" if name == "top1" else f"perplexity at most {value:.1%} above"


def _row(work: Work, step: Step | None, judge: Judge, speeds: Mapping[str, Speed], seconds: Mapping[str, float]) -> Row:
    """The row of a stage's child; step None: of the model."""
    name = "source" if step is None else step.stage.name
    parameters, linears, size = sizes(work.folder(name), work.folder(name if step is None else _plain(step)))
    row = Row(name, "FP16" if step is None else _what(step), parameters, linears, size, seconds.get(name))
    if step is None:
        return row
    if (found := judge.of(work.folder(name))) is not None:
        word, reasons = judge.verdict(found)
        figures = {key: found[key] for key in ("kl", "top1", "perplexity")}
        row = dataclasses.replace(row, **figures, gate=word, reasons=tuple(reasons))
    if (speed := speeds.get(name)) is not None and row.gate != "red":
        row = dataclasses.replace(row, tok_s=speed.tok_s, ratio=speed.ratio, ratio_ci=speed.ci)
    return row


def _plain(step: Step) -> str:
    """Where the 16-bit weights of a child are."""
    return step.origin if step.quantised else step.stage.name


def _what(step: Step) -> str:
    wish = step.stage.wish
    if step.stage.kind == "quantize":
        return f"{wish.spec} {'+'.join(s.method for s in wish.steps)}"
    if step.stage.kind == "distill":
        length = f", {wish.steps} steps" if wish.steps else ""
        kind = "scales" if wish.scales_only else wish.qad or "16 bit"
        return f"{kind}, from {' and '.join(step.stage.teachers)}{length}"
    return "16 bit, pruned"


def sizes(folder: Path, plain: Path) -> tuple[int, int, int]:
    """(parameters, bytes of the linears of the decoder's blocks with their scales, bytes of all tensors). plain: where the same
    model's 16-bit weights are."""
    from .formats.checkpoint import Checkpoint
    from .quant import walk

    made, origin = Checkpoint.open(folder), Checkpoint.open(plain)
    names = {linear.name for linear in walk.of(origin).linears if linear.block is not None}
    inside = 0
    for tensor, info in made.tensors.items():
        module, _, suffix = tensor.rpartition(".")
        inside += info.nbytes if module in names and suffix.startswith("weight") else 0
    return sum(math.prod(info.shape) for info in origin.tensors.values()), inside, made.nbytes


# Quality ----------------------------------------------------------------------------------------------------------------


class Judge:
    """What children say about the held-out text, against the model, both in fp32 through the engine; kept in quality.json."""

    def __init__(self, work: Work) -> None:
        self.work, self.text = work, work.recipe.check.text
        self.protocols: list[str] = []
        self._path = work.out / QUALITY
        self._known: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}
        self._reference: Any = None
        self._ids: Any = None
        self.small = False

    def _key(self, folder: Path) -> str:
        from .formats.checkpoint import Checkpoint
        from .quant.journal import source_mark

        assert self.text is not None
        parts = [source_mark(Checkpoint.open(path)) for path in (self.work.source, folder)]
        parts += [hashlib.sha256(Path(self.text).read_bytes()).hexdigest(), str(self.work.recipe.check.tokens)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def of(self, folder: Path) -> dict[str, Any] | None:
        """Figures of a child; None without a text."""
        from .quant import output

        if self.text is None:
            return None
        key = self._key(folder)
        if key not in self._known:
            self._known[key] = self._measured(folder)
            output.write(self._path, json.dumps(self._known, indent=1) + "\n")
        self.protocols.append(self._known[key]["protocol"])
        return dict(self._known[key])

    def _measured(self, folder: Path) -> dict[str, Any]:
        import torch

        from .bench import engine, quality
        from .quant import heldout

        check = self.work.recipe.check
        assert self.text is not None
        if self._reference is None:
            self._reference = engine.load(self.work.source, dtype=torch.float32)
            config = self._reference.config
            self._ids = heldout.read(self.text, self.work.source, config.vocab, config.context, check.tokens).ids
        self.work.say(f"quality of {folder.name} on {len(self._ids)} tokens")
        found = quality.compare(self._reference, engine.load(folder, dtype=torch.float32), self._ids)
        return {**dataclasses.asdict(found), "small": quality.is_small(self._reference)}

    def verdict(self, found: Mapping[str, Any]) -> tuple[str, list[str]]:
        """("green" | "red", reasons) by the recipe's limits; a small model's perplexity scatters and decides nothing."""
        from .bench import quality

        limits = {n: v for n, v in self.work.recipe.check.gate.items() if v is not None}
        if found["small"] and not _own(self.work):
            limits.pop("perplexity", None)
        fields = {f.name: found[f.name] for f in dataclasses.fields(quality.Quality)}
        reasons = quality.beyond(quality.Quality(**fields), limits)
        return ("red" if reasons else "green"), reasons

    def section(self, folder: Path) -> dict[str, Any]:
        """The same as a record of the bench has it."""
        from .bench import quality

        found = self.of(folder)
        assert found is not None
        fields = {f.name: found[f.name] for f in dataclasses.fields(quality.Quality)}
        return quality.section(quality.Quality(**fields), self.verdict(found), self.work.source.name)


# Speed ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a child's decode steps and of the model's, in the same rounds; `float` is what that one ran in."""

    tok_s: float
    baseline: float
    ratio: float
    ci: tuple[float, float]
    float: str
    words: str


def time_children(work: Work, step: Step, path: Path) -> None:
    """Times children against the model in FP16 (bench/model.py); what is in `path` already is not timed again."""
    from .bench import model, model_sides, quality

    wish = dict(step.stage.wish)
    of, head, _ = (wish.pop(name) for name in ("of", "head", "gate"))
    judge = Judge(work)
    for name in _children(work, step, of):
        folder = work.folder(name)
        section = judge.section(folder)
        found = judge.of(folder)
        assert found is not None
        fields = {f.name: found[f.name] for f in dataclasses.fields(quality.Quality)}
        base = quality.reference_section(quality.Quality(**fields), work.source.name)
        work.say(f"timing {name} against {work.source.name} in FP16")
        _, specs, _ = model_sides.sources(folder, [], work.source)
        gates = {model_sides.BASELINE: base, str(specs[0]) if specs else model_sides.CHILD: section}
        model.run(
            folder,
            plan=model.Plan(**wish, head=head, energy=False),
            against=work.source,
            gates=gates,
            out=path,
            progress=work.say,
            command=f"percard run, stage {step.stage.name}",
        )


def _children(work: Work, step: Step, of: str) -> list[str]:
    """Stages in front of the bench whose children it times."""
    stages = work.recipe.stages
    names = [s.name for s in stages[: stages.index(step.stage)] if s.kind in SHOWN]
    return names[-1:] if of == "last" else names


def _speeds(work: Work, steps: list[Step]) -> dict[str, Speed]:
    """By child, from the records of the last bench stage that timed it."""
    from .bench import model_sides, record

    found: dict[str, Speed] = {}
    for step in steps:
        path = work.folder(step.stage.name) / "records.jsonl"
        if step.stage.kind != "bench" or not path.is_file():
            continue
        rows = list(record.read(path))
        for name in _children(work, step, step.stage.wish["of"]):
            folder = work.folder(name)
            if not (folder / "config.json").is_file():
                continue
            mark = model_sides.weights_hash(folder)
            mine = [r for r in rows if (r.model or {}).get("weights_hash") == mark and r.status == "ok"]
            if (speed := _speed(mine, step.stage.wish["head"])) is not None:
                found[name] = speed
    return found


def _speed(rows: list[Any], head: str) -> Speed | None:
    """Of the last decode row of a child, and of the baseline that was timed in its rounds; None when there is none."""
    decode = [r for r in rows if ".model.tg" in r.case and r.tokens]
    bases = {r.cell_key: r for r in decode}
    for row in reversed(decode):
        versus = row.tokens["vs_fp16"]["same_batch"]
        base = bases.get(versus["baseline_key"])
        quantised = row.scheme["weight_bits"] < 16
        if base is None or base is row or (quantised and row.scheme["head"] != head):
            continue
        where = row.card or row.cpu or {}
        words = f"decode steps after {row.shape['kv_len']} tokens, batch {row.shape['batch']}, A B A B in fresh rounds for each child"
        words += f", on {where.get('name') or where.get('model') or 'this machine'}"
        ci = versus["ci95"]
        return Speed(
            row.tokens["tok_s"], base.tokens["tok_s"], versus["ratio"], (ci[0], ci[1]), base.body["dtype"], words
        )
    return None
