"""The verbs that need more than one floor: quantise and verify with a text, generate, bench, demo.

`quant` and `bench` do not know each other; they meet at the checkpoint, and here. Everything in this file may be called
from Python as well: `percard.quantize(src, dst, "w4a16-g128")`, `percard.verify(dst, src, text=...)`, `percard.load(dir)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from . import bench_ladder
from .bench import contexts, engine, imports, quality, report_caches, report_lines, report_ratios, slot_report
from .bench import folder as folder_module
from .bench import model as bench_module
from .bench import record as record_module
from .bench import report as bench_report
from .bench.ratios import Bound
from .bench.record import Record
from .caches import CacheGate, gate_caches, is_quantised
from .completion import Completion, complete
from .console import DONE, GATE_RED
from .formats.spec import FormatError
from .hub import source
from .quant import preflight as preflight_module
from .quant import quantize as quantize_module
from .quant import verify as verify_module
from .quant.progress import Callback
from .quant.recipe import Recipe, RecipeError
from .quant.report import Gate, Report, human

if TYPE_CHECKING:
    from rich.console import RenderableType


load = engine.load


def recipe(spec: str | None = None, *, file: str | Path | None = None, **flags: Any) -> Recipe:
    """The Recipe that flags (those of Recipe.from_flags) or a file mean. RecipeError when both or neither say the spec."""
    if file is not None:
        if spec is not None:
            raise RecipeError(f"--spec {spec} and --recipe {file} both say what to do; keep one")
        return Recipe.load(file)
    if spec is None:
        raise RecipeError(
            "--spec is missing; say one, such as w4a16-g128 or w8a8 (there is no default), or --recipe FILE"
        )
    return Recipe.from_flags(spec=spec, **flags)


def preflight(src: str | Path, plan: Recipe, dst: Path | None = None) -> preflight_module.Preflight:
    """What quantising `src` by `plan` would do and need, from config and headers alone."""
    return preflight_module.check(source(src), plan, dst)


def quantize(
    src: str | Path,
    dst: str | Path,
    spec: str | None = None,
    *,
    recipe: Recipe | None = None,
    force: bool = False,
    fresh: bool = False,
    progress: Callback | None = None,
) -> Report:
    """Checkpoint `src` (folder or hub id) to `dst` in `spec`, or as a Recipe says. FormatError, RecipeError for bad input."""
    plan = recipe if recipe is not None else Recipe.from_flags(spec=spec or "")
    try:
        return quantize_module.run(source(src), Path(dst), plan, force=force, fresh=fresh, progress=progress)
    except (KeyboardInterrupt, OSError) as error:
        done = quantize_module.finished_units(dst)
        if done:
            error.add_note(f"{done} finished units are kept: the same command goes on, --fresh starts over")
        raise


@dataclass(frozen=True)
class Verdict:
    """What `verify` found; `gate` with a text at level model, else None; `caches` with kv. No report for 16-bit weights."""

    report: Report | None
    caches: tuple[CacheGate, ...] = ()

    @property
    def gate(self) -> Gate | None:
        return None if self.report is None else self.report.gate

    @property
    def exit_code(self) -> int:
        red = self.report is not None and self.report.status == "red"
        return GATE_RED if red or any(found.gate == "red" for found in self.caches) else DONE

    def to_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {"verb": "verify", "status": "green"} if self.report is None else self.report.to_dict()
        if not self.caches:
            return told
        red = {"status": "red"} if self.exit_code == GATE_RED else {}
        return told | {"caches": [asdict(found) for found in self.caches]} | red

    def show(self) -> list[RenderableType]:
        lines = [] if self.report is None else show_report(self.report)
        for found in self.caches:
            lines += [found.show(), _verdict(f"cache {found.kv}", found.gate, "; ".join(found.reasons))]
        return [*lines, self.caches[0].protocol] if self.caches else lines


def verify(
    dst: str | Path,
    src: str | Path,
    *,
    level: str | None = None,
    text: str | Path | None = None,
    tokens: int | None = None,
    kv: Sequence[str] = (),
    progress: Callback | None = None,
) -> Verdict:
    """Re-opens `dst` and compares it with `src`; with a held-out `text` also what both models say (level model).

    level: bytes, weights, blocks or model; None = model with a text, else weights. tokens: of the text at most. kv: caches to
    run `dst` over, each against a bf16 one; `dst` may then hold 16-bit weights, of which nothing else is compared.
    """
    origin = source(src)
    level = level or ("weights" if text is None else "model")
    report = None
    if not kv or is_quantised(dst):
        report = verify_module.verify(Path(dst), origin, level=level, text=text, tokens=tokens, progress=progress)
    if report is not None and report.failures:
        return Verdict(report)
    return Verdict(report, gate_caches(dst, origin, kv, text, tokens) if kv else ())


def show_report(report: Report) -> list[RenderableType]:
    """A verb's Report in a few lines: what came out, how near it is, what to look at."""
    specs: dict[str, list[float]] = {}
    for module in report.modules:
        specs.setdefault(module.spec, []).extend([] if module.sqnr is None else [module.sqnr])
    lines: list[RenderableType] = []
    for spec, found in specs.items():
        count = sum(1 for m in report.modules if m.spec == spec)
        near = f"SQNR {min(found):.1f} dB at worst, {sorted(found)[len(found) // 2]:.1f} dB median" if found else ""
        lines.append(f"{count} modules in {spec}   {near}")
    before, after = report.bytes.get("source"), report.bytes.get("output")
    if before and after:
        lines.append(f"{human(before)} -> {human(after)} ({after / before:.0%}), {sum(report.seconds.values()):.1f} s")
    lines += [Text(text, "red") for text in (*report.failures, *report.flags)]
    lines += [Text(text, "yellow") for text in report.warnings]
    if (gate := report.gate) is not None:
        lines += [*_promoted(report), gate.show(), gate.protocol, _verdict("gate", gate.gate, "; ".join(gate.reasons))]
    elif report.layers and (errors := [layer.error for layer in report.layers if layer.error is not None]):
        worst = max(range(len(errors)), key=errors.__getitem__)
        lines.append(
            f"error of a block's output: {max(errors):.2%} at worst (block {worst}), {min(errors):.2%} at best"
        )
    if report.level == "none":
        lines.append(Text(f"{report.output}: written, not checked; percard verify does that"))
    else:
        lines.append(_verdict(f"{report.output}: checked ({report.level}),", report.status))
    return lines


def _promoted(report: Report) -> list[RenderableType]:
    """What was done about a red gate, in a line."""
    if not report.promotions:
        return []
    sets, size = len(report.promotions), sum(p.bytes for p in report.promotions)
    return [f"first {report.gates[0].show()}; then {sets} sets got more bits, {human(size)} in all"]


def _verdict(subject: str, word: str, why: str = "") -> Text:
    style = f"bold {word}" if word in ("green", "red") else "bold"
    return Text.assemble(subject, " ", (word, style), f" ({why})" if why else "")


def bench_model(
    name: str | Path,
    specs: Sequence[str],
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    plan: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    command: str = "percard bench model",
    **how: Any,
) -> list[Record]:
    """Speed of a checkpoint or `shape:<name>` in 16 bits and in `specs`; `plan` as in bench.model.Plan, contexts as "1k,8k" and
    a bound as "tpot=50ms" too. `how`: retry, force and dry_run of bench.model.run."""
    where = name if str(name).startswith("shape:") else source(name)
    origin = None if against is None else source(against)
    given = dict(plan or {})
    if isinstance(given.get("contexts"), str):
        given["contexts"] = contexts.parse(given["contexts"])
    if isinstance(given.get("bound"), str):
        given["bound"] = Bound.parse(given["bound"])
    wanted = bench_module.Plan(**given)
    return bench_module.run(
        where, specs, plan=wanted, against=origin, text=text, out=out, progress=progress, command=command, **how
    )


def show_records(records: Sequence[Record], ratios: bool = True) -> list[RenderableType]:
    """The tables of records: ladders of a task, model runs with their footnotes, then ops; without `ratios` not those over batches."""
    records = report_lines.latest(records)  # of a cell that was measured again its last row
    others = [record for record in records if record.source != "percard"]
    own = [record for record in records if record.source == "percard" and not bench_ladder.is_rung(record)]
    models = [record for record in own if record.level == "model"]
    parts: list[RenderableType] = bench_ladder.ladders(records)
    if models:
        parts.append(bench_report.table(bench_report.rows(models), bench_report.title(models)))
        if caches := report_caches.rows(models):
            parts.append(report_caches.table(caches, "decode over caches and contexts"))
        for lines in report_ratios.tables(models) if ratios else ():
            parts += [report_ratios.table(lines), *(f"- {words}" for words in lines.notes)]
        parts += [f"- {words}" for words in bench_report.footnotes(models)]
    if any(record.level == "op" for record in records):
        parts.append(slot_report.of_records(records))
    return parts + [f"- {record.case}, measured by {record.source}: {imports.in_words(record)}" for record in others]


def read_records(path: str | Path) -> list[Record]:
    """The records of a JSONL file, of `records.jsonl` in a folder, or of a slot's archives. FormatError when there are none."""
    file = Path(path) / "records.jsonl" if Path(path).is_dir() else Path(path)
    if not file.is_file() and any(Path(path).glob("stage-*.tar.gz")):
        return [Record.from_json(json.dumps(row), str(path)) for row in folder_module.rows_of(Path(path))]
    if not file.is_file():
        raise FormatError(f"{file}: not there; give a JSONL file of records, or the folder that a bench wrote")
    records = list(record_module.read(file))
    if not records:
        raise FormatError(f"{file}: holds no record")
    return records


BLOCK = re.compile(r"(<!-- demo -->\n).*?(<!-- /demo -->)", re.DOTALL)


def block(records: Sequence[Record]) -> str:
    """The table of a model run as it stands in the readme, with the machine in its title and the footnotes below."""
    when = records[0].ts[:10]
    return bench_report.markdown(
        bench_report.rows(records), f"{bench_report.title(records)} ({when})", bench_report.footnotes(records)
    )


def write_block(readme: str | Path, records: Sequence[Record]) -> None:
    """Puts the table of a model run between the two comments of a markdown file."""
    path = Path(readme)
    text = path.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        raise FormatError(f"{path}: has no <!-- demo --> and <!-- /demo --> to write between; add both lines")
    path.write_text(BLOCK.sub(lambda match: match[1] + block(records) + match[2], text), encoding="utf-8")


SPECS = ("w8a8", "w4a16-g64", "w4a8-g64")
PROMPT = "def count_words(text):\n    counts = {}\n    for word in text.split():"
EXAMPLE = Path("examples/tiny-qwen3")
# Seconds that the timed rounds may take on a CPU; the rest of the eight minutes is for loading and for the other steps.
BUDGET_S = 200.0
Say = Callable[["RenderableType"], None]


@dataclass(frozen=True)
class Demo:
    """What the demo measured: `data` is report.json, `files` what it wrote."""

    data: dict[str, Any]
    files: tuple[Path, ...]

    @property
    def exit_code(self) -> int:
        return GATE_RED if any(row["gate"] == "red" for row in self.data["variants"]) else DONE


@contextmanager
def _silent() -> Iterator[None]:
    yield None


def demo(
    out: str | Path,
    *,
    model: str | Path | None = None,
    text: str | Path | None = None,
    quick: bool = False,
    say: Say = lambda words: None,
    showing: Callable[[], AbstractContextManager[Any]] = _silent,
    steps: Callable[[str], None] | None = None,
) -> Demo:
    """The whole road on a small trained model: quantise, gate, time at true shapes, complete a prompt, report.

    `say` gets what belongs on the terminal, `showing()` yields a progress callback, `steps` lines of words. A variant
    whose gate is red gets no speed figure.
    """
    from . import doctor

    folder, origin = Path(out), Path(model) if model is not None else EXAMPLE
    if not (origin / "config.json").is_file():
        raise FormatError(
            f"{origin}: no checkpoint there; run the demo in a checkout of percard, or give --model FOLDER"
        )
    held_out = Path(text) if text is not None else origin / "heldout.txt"

    say(_title(1, "This machine"))
    for part in doctor.summary(doctor.examine()):
        say(part)

    say(_title(2, f"Quantise {origin.name}"))
    places: dict[str, Path] = {}
    for spec in SPECS:
        places[spec] = folder / "checkpoints" / spec
        with showing() as progress:
            done = quantize(origin, places[spec], spec, force=True, progress=progress)
        for line in show_report(done):
            say(line)

    say(_title(3, "Quality against 16 bits"))
    ids = quality.read_ids(held_out, origin, 4096 if quick else None)
    reference = load(origin)
    models = {spec: load(place, head="int8-row") for spec, place in places.items()}
    gates: dict[str, dict[str, Any]] = {}
    for spec, variant in models.items():
        found = quality.compare(reference, variant, ids)
        word, reasons = quality.gate(found, variant.spec, quality.is_small(reference))
        gates[spec] = quality.section(found, (word, reasons), origin.name)
        gates[bench_module.BASELINE] = quality.reference_section(found, origin.name)
        say(_verdict(f"{spec:10} KL {found.kl:.4f}  top-1 {found.top1:.1%}  gate", word, "; ".join(reasons)))

    shape = "shape:qwen3-8b" if reference.device.type == "cuda" else "shape:qwen3-0.6b"
    say(_title(4, f"Speed, {shape.removeprefix('shape:')} with synthetic weights"))
    plan = bench_module.Plan(budget_s=BUDGET_S)
    if quick:
        plan = bench_module.Plan(prompt=128, new=8, rounds=1, layers=2)
    log = folder / "records.jsonl"
    log.unlink(missing_ok=True)
    records = bench_module.run(shape, SPECS, plan=plan, gates=gates, out=log, progress=steps, command="percard demo")

    say(_title(5, "Result"))
    for part in show_records(records, ratios=False):
        say(part)
    answers = {"FP16": complete(reference, origin, PROMPT, max_new=36)}
    answers |= {spec: complete(variant, places[spec], PROMPT, max_new=36) for spec, variant in models.items()}
    say(_side_by_side(answers))
    sections = {f"One prompt, {len(answers)} answers": _answers_markdown(answers)}
    files = bench_report.write(folder, records, heading="percard demo", sections=sections)
    say("wrote " + ", ".join(str(path) for path in files))
    return Demo(json.loads((folder / "report.json").read_text(encoding="utf-8")), tuple(files))


def _title(number: int, words: str) -> Text:
    return Text(f"\n{number}  {words}", "bold")


def _side_by_side(answers: Mapping[str, Completion]) -> RenderableType:
    from rich.table import Table

    table = Table(title=Text(f"Greedy, from:\n{PROMPT}"), title_justify="left", pad_edge=False, width=120)
    for name in answers:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(answer.text.rstrip()) for answer in answers.values()))
    return table


def _answers_markdown(answers: Mapping[str, Completion]) -> str:
    parts = [f"The prompt, greedy decoding:\n\n```python\n{PROMPT.rstrip()}\n```\n"]
    parts += [f"{name}:\n\n```python\n{answer.text.rstrip()}\n```\n" for name, answer in answers.items()]
    return "\n".join(parts)
