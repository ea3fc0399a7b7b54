"""The verbs that need more than one floor: quantise and verify with a text, generate, bench, demo.

`quant` and `bench` do not know each other; they meet at the checkpoint, and here. Everything in this file may be called
from Python as well: `percard.quantize(src, dst, "w4a16-g128")`, `percard.verify(dst, src, text=...)`, `percard.load(dir)`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from .bench import engine, quality, slot_report
from .bench import model as bench_module
from .bench import record as record_module
from .bench import report as bench_report
from .bench.record import Record
from .console import DONE, GATE_RED
from .formats.spec import FormatError
from .quant import preflight as preflight_module
from .quant import quantize as quantize_module
from .quant import verify as verify_module
from .quant.progress import Callback
from .quant.recipe import Recipe, RecipeError
from .quant.report import Gate, Report, human

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .bench.engine import Model

load = engine.load
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights that are not read, so that a hub download does not fetch them.
_NOT_FETCHED = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
    "*.ot",
    "original/*",
    "onnx/*",
]


def source(name: str | Path) -> Path:
    """The folder that `name` means: a path, or a hub id that huggingface_hub has or fetches.

    FormatError says in one line how to get it when it is neither here nor to be had.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FormatError(f"{name}: is a file; give the folder that holds config.json and the safetensors files")
    text = str(name)
    if not _HUB_ID.fullmatch(text):
        raise FormatError(f"{name}: no such folder; give a checkpoint folder, or a hub id such as Qwen/Qwen3-8B")
    by_hand = f"on a machine with network `hf download {text} --local-dir {text.split('/')[1]}`, then give that folder"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FormatError(
            f"{text}: no such folder here, and huggingface_hub, which would fetch it, is not installed; "
            f"pip install huggingface_hub, or {by_hand}"
        ) from None
    try:
        return Path(snapshot_download(text, ignore_patterns=_NOT_FETCHED, etag_timeout=10))
    except Exception as error:  # the hub client has many ways to fail; each means: not to be had
        why = " ".join(str(error).split())[:160]
        raise FormatError(
            f"{text}: no such folder here, and the hub did not give it ({type(error).__name__}: {why}); {by_hand}"
        ) from None


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
    """What `verify` found; `gate` with a text at level model, else None."""

    report: Report

    @property
    def gate(self) -> Gate | None:
        return self.report.gate

    @property
    def exit_code(self) -> int:
        return GATE_RED if self.report.status == "red" else DONE

    def to_dict(self) -> dict[str, Any]:
        return self.report.to_dict()

    def show(self) -> list[RenderableType]:
        return show_report(self.report)


def verify(
    dst: str | Path,
    src: str | Path,
    *,
    level: str | None = None,
    text: str | Path | None = None,
    tokens: int | None = None,
    progress: Callback | None = None,
) -> Verdict:
    """Re-opens `dst` and compares it with `src`; with a held-out `text` also what both models say (level model).

    level: bytes, weights, blocks or model; None = model with a text, else weights. tokens: of the text at most.
    """
    level = level or ("weights" if text is None else "model")
    report = verify_module.verify(Path(dst), source(src), level=level, text=text, tokens=tokens, progress=progress)
    return Verdict(report)


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


@dataclass(frozen=True)
class Completion:
    """What a model added to `prompt`; `tokens` new ones in `seconds`, prefill included."""

    prompt: str
    text: str
    tokens: int
    seconds: float
    spec: str

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_new: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Completion:
    """`prompt` completed by the checkpoint in `path`, FP16 or quantised."""
    folder = source(path)
    return complete(load(folder), folder, prompt, max_new=max_new, temperature=temperature, top_p=top_p, seed=seed)


def complete(model: Model, folder: Path, prompt: str, *, max_new: int = 64, **sampling: Any) -> Completion:
    """`prompt` completed by a loaded model, with the tokenizer of `folder`; `sampling` as in Model.generate."""
    from tokenizers import Tokenizer

    vocabulary = folder / "tokenizer.json"
    if not vocabulary.is_file():
        raise FormatError(f"{vocabulary}: not there; text needs the model's tokenizer, copy it from the source")
    tokenizer = Tokenizer.from_file(str(vocabulary))
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise FormatError("--prompt is empty; give at least one character to go on from")
    room = model.max_len - len(ids)
    if room < 1:
        raise FormatError(f"--prompt has {len(ids)} tokens, this model takes {model.max_len}; shorten it")
    stop = {*model.config.eos, *_stop_ids(folder)}
    start = time.perf_counter()
    (new,) = model.generate([ids], min(max_new, room), stop=sorted(stop), **sampling)
    seconds = time.perf_counter() - start
    # Decoded with the prompt and cut, because a tokenizer may join bytes or spaces across the border.
    before, whole = tokenizer.decode(ids), tokenizer.decode(ids + new)
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new)
    return Completion(prompt, text, len(new), seconds, str(model.spec or str(model.dtype).removeprefix("torch.")))


def _stop_ids(folder: Path) -> Sequence[int]:
    """End-of-text ids of generation_config.json, which chat models extend beyond config.json's."""
    try:
        value = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return ()
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int)]


def bench_model(
    name: str | Path,
    specs: Sequence[str],
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    plan: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Record]:
    """Speed of a checkpoint or `shape:<name>` in 16 bits and in `specs`; `plan` as in bench.model.Plan."""
    where = name if str(name).startswith("shape:") else source(name)
    origin = None if against is None else source(against)
    wanted = bench_module.Plan(**(plan or {}))
    command = f"percard bench model {name} --specs {','.join(specs)}"
    return bench_module.run(
        where, specs, plan=wanted, against=origin, text=text, out=out, progress=progress, command=command
    )


def show_records(records: Sequence[Record]) -> list[RenderableType]:
    """The tables of records: model runs with their footnotes, then ops."""
    models = [record for record in records if record.level == "model"]
    parts: list[RenderableType] = []
    if models:
        parts.append(bench_report.table(bench_report.rows(models), bench_report.title(models)))
        parts += [f"- {words}" for words in bench_report.footnotes(models)]
    if any(record.level == "op" for record in records):
        parts.append(slot_report.of_records(records))
    return parts


def read_records(path: str | Path) -> list[Record]:
    """The records of a JSONL file, or of `records.jsonl` in a folder. FormatError when there are none."""
    file = Path(path) / "records.jsonl" if Path(path).is_dir() else Path(path)
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
    for part in show_records(records):
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
