"""What pruning loses and distilling brings back: `python -m percard.bench.recovery --out FILE.json`.

Each arm (recovery_arms.py) is a few commands of percard, run as a user would run them, with all settings written out; the
folder that is left is scored beside the source by this bench's engine on a held-out text, in fp32: KL, top-1, cross-entropy.
Recovered cross-entropy alone proves little: a teacher that is not trained out lets plain labels win back more than was lost
while the student drifts away from it. So there are two measures, and a control with the same steps on the same data.

    DIR/arms/NAME.json    one file per finished arm: a run that was stopped goes on behind the last one; an arm whose commands,
                          text or start have changed is done again (`--fresh`: all of them)
    DIR/NAME/             what its commands wrote; distilling that was killed goes on from its own state
    FILE.json, FILE.md    the record: settings, machine, every arm with its commands, seconds and scores, what was asked; its tables

The training text is a seeded part of Python's standard library, which is what tiny-qwen3 was trained on, without the held-out
files; its sha256 is in the record. Another Python has another library: then the figures differ in their last digits.
Threads are pinned (`--threads`), so that the same machine gives the same figures.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..formats.checkpoint import Checkpoint
from ..formats.spec import FormatError
from . import card, quality
from .engine import Model, load
from .llmcompressor_sides import our_source
from .recovery_arms import CASES, SEEDS, STEPS, Arm, all_arms, checks

SCHEMA = 1
_EXAMPLE = Path("examples/tiny-qwen3")  # of the repository; a wheel does not ship it
_PACKAGE = __package__.partition(".")[0]
CHARACTERS, PROMPTS, PROMPT = 1_300_000, 64, 400  # of the training text; prompts, and characters of each
HELD_OUT, WINDOW = 16_384, 256  # tokens that are scored, and of a window
_TEXTS = {"train": "data", "prompts": "prompts"}  # name of a file -> its word in commands
Say = Callable[[str], None]


class Failed(RuntimeError):
    """A command of an arm ended with an error; the text is its last words."""


def write_texts(model: Path, folder: Path, characters: int = CHARACTERS) -> dict[str, Any]:
    """train.jsonl, of so many characters, and prompts.jsonl in `folder`, from what the model was trained on; sizes and sha256 of both.

    FormatError when the model's folder has no train.py that says what that was.
    """
    source = model / "train.py"
    if not source.is_file():
        raise FormatError(f"{source}: not there; take the repository's examples/tiny-qwen3")
    spec = importlib.util.spec_from_file_location("train_tiny_qwen3", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts, _ = module.corpus()
    random.Random(0).shuffle(texts)
    train: list[str] = []
    size = 0
    while size <= characters:
        train.append(texts[len(train)])
        size += len(train[-1])
    known = set(train)
    others = [text for text in dict.fromkeys(texts) if text not in known and len(text) > 2 * PROMPT]
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    for name, key, lines in (
        ("train", "text", train),
        ("prompts", "prompt", [text[:PROMPT] for text in others[:PROMPTS]]),
    ):
        path = folder / f"{name}.jsonl"
        text = "".join(json.dumps({key: line}) + "\n" for line in lines)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # a killed run goes on with the very file
            path.write_text(text, encoding="utf-8")
        found[name] = {"documents": len(lines), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return found


@torch.inference_mode()
def score(folder: Path, reference: Model, ids: torch.Tensor) -> dict[str, float]:
    """KL to the reference, top-1, cross-entropy of a checkpoint on ids [n]; what cross-entropy it lost, and that one's standard error."""
    model = load(folder, dtype=torch.float32, device="cpu")
    kl, ce, lost, same = [], [], [], []
    for part in ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW).split(8):
        log_p, log_q = (torch.log_softmax(m.logits(part)[:, :-1].float(), -1) for m in (reference, model))
        wanted = part[:, 1:, None]
        ours = -log_q.gather(-1, wanted).flatten()
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).flatten())
        same.append((log_p.argmax(-1) == log_q.argmax(-1)).flatten())
        ce.append(ours)
        lost.append(ours + log_p.gather(-1, wanted).flatten())
    each = torch.cat(lost).double()
    return {
        "kl": float(torch.cat(kl).double().mean()),
        "top1": float(torch.cat(same).double().mean()),
        "ce": float(torch.cat(ce).double().mean()),
        "ce_lost": float(each.mean()),
        "ce_lost_error": float(each.std()) / len(each) ** 0.5,
        "tokens": len(each),
    }


@torch.inference_mode()
def every_choice(reference: Model, ids: torch.Tensor, drop: int) -> dict[str, float]:
    """Blocks that stay, as "0,1,3", -> KL to the whole model on ids [n], for every choice of `drop` blocks to leave out."""
    blocks, layers = reference.weights.blocks, range(len(reference.weights.blocks))
    parts = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW).split(8)
    found: dict[str, float] = dict.fromkeys(
        (",".join(map(str, kept)) for kept in itertools.combinations(layers, len(layers) - drop)), 0.0
    )
    for part in parts:
        log_p = torch.log_softmax(reference.logits(part)[:, :-1].float(), -1)
        for name in found:
            kept = [int(i) for i in name.split(",")]
            weights = dataclasses.replace(reference.weights, blocks=tuple(blocks[i] for i in kept))
            config = dataclasses.replace(reference.config, layers=len(kept))
            model = dataclasses.replace(reference, weights=weights, config=config)
            log_q = torch.log_softmax(model.logits(part)[:, :-1].float(), -1)
            found[name] += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    count = sum(part.shape[0] * (WINDOW - 1) for part in parts)
    return {name: total / count for name, total in found.items()}


def recovered(cell: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, float]:
    """Shares of lost KL and cross-entropy that came back since `start`."""
    return {"kl_back": 1 - cell["kl"] / start["kl"], "ce_back": 1 - cell["ce_lost"] / start["ce_lost"]}


def percard(command: Sequence[str], threads: int, told: Callable[[dict[str, Any]], None]) -> None:
    """Runs `percard COMMAND --json` and passes its progress on; Failed with its last words when it fails."""
    full = [sys.executable, "-m", _PACKAGE, *command, "--json"]
    pinned = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(
        full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | pinned
    ) as process:
        assert process.stdout is not None
        words: list[str] = []
        for line in process.stdout:
            if line.startswith('{"event": "progress"'):
                told(json.loads(line))
            else:
                words = [*words[-20:], line.strip()]
    if process.returncode:
        raise Failed(f"percard {shlex.join(command)} ended with {process.returncode}: {' '.join(words)[-600:]}")


class Cells:
    """Runs arms and remembers them, one JSON file each."""

    def __init__(
        self,
        arms: Sequence[Arm],
        model: Path,
        work: Path,
        say: Say,
        *,
        threads: int = 1,
        told: Callable[[dict[str, Any]], None] = lambda event: None,
        call: Callable[..., None] = percard,
    ) -> None:
        self.arms, self.model, self.work, self.say = {arm.name: arm for arm in arms}, model, work, say
        self.threads, self.told, self.call = threads, told, call
        (work / "arms").mkdir(parents=True, exist_ok=True)
        self.texts = write_texts(model, work)
        self.ids = quality.read_ids(model / "heldout.txt", model, HELD_OUT)
        self.weights = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(model.glob("*.safetensors"))}

    def get(self, name: str) -> dict[str, Any]:
        """The arm's figures; done now if it was not yet, with the arms that it needs."""
        arm = self.arms[name]
        needed = {other: self.get(other) for other in arm.needs}
        if (found := self.finished(name)) is not None:
            return found
        cell = {"name": name, "kind": arm.kind, "words": arm.words, "stamp": self._stamp(arm, needed), **self._run(arm)}
        if arm.scored:
            cell |= self._score(arm)
        if arm.start:
            cell |= recovered(cell, needed[arm.start])
        write(self._cell(name), cell)
        return cell

    def finished(self, name: str) -> dict[str, Any] | None:
        """The arm's figures if it is done and nothing that they depend on has changed since."""
        needed = {other: self.finished(other) for other in self.arms[name].needs}
        if not self._cell(name).is_file() or None in needed.values():
            return None
        cell: dict[str, Any] = json.loads(self._cell(name).read_text(encoding="utf-8"))
        stamp = self._stamp(self.arms[name], {n: c for n, c in needed.items() if c is not None})
        return cell if cell["stamp"] == stamp else None

    def _cell(self, name: str) -> Path:
        return self.work / "arms" / f"{name}.json"

    def forget(self) -> None:
        """Removes every arm, finished or not."""
        for name in self.arms:
            self._cell(name).unlink(missing_ok=True)
            for folder in (self.work / name, self._unfinished(name)):
                shutil.rmtree(folder, ignore_errors=True)

    def paths(self, command: str, out: Path) -> list[str]:
        """The words of a command with the paths of this run."""
        places = {"model": self.model, "work": self.work, "out": out}
        places |= {word: self.work / f"{name}.jsonl" for name, word in _TEXTS.items()}
        return [word.format(**places) for word in shlex.split(command)]

    def _stamp(self, arm: Arm, needed: Mapping[str, Mapping[str, Any]]) -> str:
        before = {name: cell["stamp"] for name, cell in needed.items()}
        read = {
            name: self.texts[name] for name, word in _TEXTS.items() if any(f"{{{word}}}" in c for c in arm.commands)
        }
        told = (arm.commands, arm.drop, before, self.weights, read, self.threads, HELD_OUT, WINDOW)
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def _unfinished(self, name: str) -> Path:
        """What a killed verb leaves beside its output."""
        return self.work / f".{name}.percard-unfinished"

    def _run(self, arm: Arm) -> dict[str, Any]:
        """Runs the commands. seconds: by the clock; cpu_seconds: of the processor, which other work on the machine does not change.

        Distilling that was killed goes on from its last state: then the seconds are those of this run, and `resumed` says so.
        """
        out = self.work / arm.name
        shutil.rmtree(out, ignore_errors=True)
        resumed = self._unfinished(arm.name).exists()
        self.say(f"{arm.name}: {arm.words}" + (", going on" if resumed else ""))
        before, began, here = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), time.process_time()
        for command in arm.commands:
            self.call(self.paths(command, out), self.threads, self.told)
        choices = every_choice(self.reference, self.ids, arm.drop) if arm.drop else None
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = time.process_time() - here + after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found: dict[str, Any] = {"commands": [f"percard {command}" for command in arm.commands]}
        found |= {"seconds": time.monotonic() - began, "cpu_seconds": spent, "resumed": resumed, "source": our_source()}
        return found | _facts(out) | ({} if choices is None else {"choices": choices})

    @functools.cached_property
    def reference(self) -> Model:
        """The source, in fp32."""
        return load(self.model, dtype=torch.float32, device="cpu")

    def _score(self, arm: Arm) -> dict[str, Any]:
        folder = self.work / arm.name
        sizes = [torch.Size(info.shape).numel() for info in Checkpoint.open(folder).tensors.values()]
        return {**score(folder, self.reference, self.ids), "parameters": sum(sizes)}


def _facts(out: Path) -> dict[str, Any]:
    """What the verb itself wrote down about what it did."""
    found: dict[str, Any] = {}
    for name, keys in (
        ("distill.json", ("steps", "trained_tokens", "dtype", "loss", "run")),
        ("prune.json", ("cuts", "kept_layers")),
        ("capture.json", ("tokens", "k", "completions")),
    ):
        if (path := out / name).is_file():
            report = json.loads(path.read_text(encoding="utf-8"))
            found[path.stem] = {key: report[key] for key in keys if key in report}
    return found


def write(path: Path, found: Mapping[str, Any]) -> None:
    """JSON at `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def record(cells: Cells, done: Sequence[Mapping[str, Any]], command: str) -> dict[str, Any]:
    """Everything of a run as a JSON value."""
    return {
        "schema": SCHEMA,
        "command": command,
        "model": cells.model.name,
        "text": f"heldout.txt, {len(cells.ids)} tokens in windows of {WINDOW}",
        "data": cells.texts,
        "threads": cells.threads,
        **card.fingerprint(torch.device("cpu")),
        "arms": [{k: v for k, v in cell.items() if k != "stamp"} for cell in done],
        "checks": checks({str(cell["name"]): cell for cell in done}),
    }


_COLUMNS = ("arm", "what", "parameters", "KL", "KL back", "top-1", "cross-entropy", "back", "minutes of one core")


def rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A record's scored arms as text, in the order of its columns."""
    shown: list[tuple[str, ...]] = []
    for arm in found["arms"]:
        if "kl" not in arm:
            continue
        back = [f"{arm[key]:.0%}" if key in arm else "" for key in ("kl_back", "ce_back")]
        shown.append((
            arm["name"], arm["words"], f"{arm['parameters']:,}", f"{arm['kl']:.4f}", back[0], f"{arm['top1']:.1%}",
            f"{arm['ce']:.4f}", back[1], f"{arm['cpu_seconds'] / 60:.1f}",
        ))  # fmt: skip
    return shown


def markdown(found: Mapping[str, Any], kinds: Sequence[str]) -> str:
    """The table of docs, of arms of these kinds."""
    wanted = {arm["name"] for arm in found["arms"] if arm["kind"] in kinds}
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---|---|" + "---:|" * (len(_COLUMNS) - 2)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(found) if row[0] in wanted]
    return "\n".join(lines) + "\n"


def _short(value: float) -> str:
    """Three digits, whole numbers from a hundred on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def choices(found: Mapping[str, Any]) -> str:
    """The table of docs, of what scores gain on chance: KL right after pruning, a column for each seed."""
    arms = {arm["name"]: arm for arm in found["arms"]}
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " |", "|---|" + "---:|" * len(SEEDS)]
    for case, (size, _, ways) in CASES.items():
        for way in ways:
            each = [arms[n] for seed in SEEDS if (n := f"{case}-{way}-{seed}") in arms]
            if len(each) == len(SEEDS):
                words = f"`{size}`, {'at random' if way == 'random' else f'by {way}'}"
                lines.append(f"| {words} | " + " | ".join(f"{arm['kl']:.4f}" for arm in each) + " |")
    return "\n".join(lines) + "\n"


def asked(found: Mapping[str, Any]) -> str:
    """The table of docs, of what was asked."""
    lines = ["| asked | found | limit |", "|---|---:|---:|"]
    lines += [f"| {c['words']} | {_short(c['value'])} | {_short(c['limit'])} |" for c in found["checks"]]
    return "\n".join(lines) + "\n"


def page(found: Mapping[str, Any]) -> str:
    """All tables of a record, as docs have them."""
    head = f"# {found['model']}, {found['text']}\n\n`{found['command']}`"
    return "\n".join([head, "", choices(found), markdown(found, ("child", "distil")), asked(found)])


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The same for a terminal, and what was asked."""
    arms, asked = Table(title=f"{found['model']}, {found['text']}"), Table()
    for name in _COLUMNS:
        arms.add_column(name)
    for row in rows(found):
        arms.add_row(*row)
    for name in ("asked", "found", "limit", ""):
        asked.add_column(name)
    for check in found["checks"]:
        numbers = [_short(check[key]) for key in ("value", "limit")]
        asked.add_row(check["words"], *numbers, "held" if check["held"] else "missed")
    return [arms, asked]


def _left(begun: float, done: float, total: float) -> str:
    if not done:
        return ""
    seconds = (time.monotonic() - begun) * (total - done) / done
    return f", about {seconds / 60:.0f} min left"


def main(
    out: Annotated[Path, typer.Option(help="File of the record.")],
    model: Annotated[Path, typer.Option(help="tiny-qwen3's folder, with train.py and texts.")] = _EXAMPLE,
    work: Annotated[Path, typer.Option(help="Folder for children and finished arms.")] = Path("out/recovery"),
    only: Annotated[str, typer.Option(help="Arms, or kinds of them (prune, distil, ..), with commas.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Of every training arm; the record is made with 150.")] = STEPS,
    threads: Annotated[int, typer.Option(min=1, help="Of every command.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do finished arms again.")] = False,
) -> None:
    """Prunes and distils tiny-qwen3 in every way that docs/distill.md speaks of, and scores what comes out."""
    console = Console()
    torch.set_num_threads(threads)
    arms = all_arms(steps)
    asked = {word.strip() for word in only.split(",")} - {""}
    if unknown := asked - {a.name for a in arms} - {a.kind for a in arms}:
        names = ", ".join([*dict.fromkeys(a.kind for a in arms), *(a.name for a in arms)])
        raise typer.BadParameter(f"{min(unknown)!r} is no arm; known: {names}", param_hint="--only")
    wanted = [a for a in arms if not asked or {a.name, a.kind} & asked]

    def told(event: dict[str, Any]) -> None:
        left = event["eta_s"]
        rest = "" if left is None else f", {left:.0f} s left"
        status.update(f"{event['phase']} {event['done']} of {event['total']} {event['unit']}{rest}: {event['label']}")

    try:
        with console.status("texts") as status:
            cells = Cells(arms, model, work, console.log, threads=threads, told=told)
            if fresh:
                cells.forget()
            begun, finished, total = time.monotonic(), 0.0, sum(a.weight for a in wanted)
            for number, arm in enumerate(wanted, 1):
                cell = cells.get(arm.name)
                finished += arm.weight
                kl = f", KL {cell['kl']:.4f}" if "kl" in cell else ""
                console.log(f"{number} of {len(wanted)} arms: {arm.name}{kl}{_left(begun, finished, total)}")
    except (Failed, FormatError) as error:
        console.print(f"percard: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    finished_arms = [one for name in cells.arms if (one := cells.finished(name)) is not None]
    found = record(cells, finished_arms, shlex.join(["python", "-m", f"{_PACKAGE}.bench.recovery", *sys.argv[1:]]))
    write(out, found)
    out.with_suffix(".md").write_text(page(found), encoding="utf-8")
    for table in tables(found):
        console.print(table)
    console.print(f"written: {out} and {out.with_suffix('.md').name}")
    if not all(check["held"] for check in found["checks"]):
        raise typer.Exit(4)


if __name__ == "__main__":
    typer.run(main)
